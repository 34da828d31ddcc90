"""Where the rows of bytes of streamed blocks lie: in CPU memory, or in a file on a fast disk."""

from __future__ import annotations

import mmap
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelError
from ..memory.cards import size_words
from ..model.flat import Leaf, write_into
from ..model.page_locked import page_locked, unlock
from .traffic import timed_event

WHERE = "train.stream_folder"
FIX = (
    "free memory, keep the base on a fast disk (train.stream_folder), use a backend with fewer"
    " bits, or train.stream: experts, or none"
)

Events = tuple[Any, Any]
"""CUDA's, before and after a copy."""


class Copy(Protocol):
    """A copy that is under way, or done."""

    def result(self) -> Events | None:
        """Wait until the device has been told of it; return the events around it, or None without
        CUDA. Raises ModelError where the row cannot be read."""


class Rows(Protocol):
    """Keeps rows, and copies them into slots."""

    def keep(self, leaves: list[Leaf], nbytes: int) -> Tensor:
        """Return the bytes of `leaves`, uint8 [nbytes] in CPU memory, or mapped into it. Raises
        ModelError where there is no room."""

    def let_go(self, row: Tensor) -> None:
        """Nobody needs what `keep` returned any more."""

    def copy(self, row: Tensor, slot: Tensor, free: Any, side: Any) -> Copy:
        """Start copying what `keep` returned into `slot`, uint8 [nbytes] on the device.

        Args:
            free: CUDA's event after which nothing reads what is in the slot.
            side: CUDA's stream for copies. Both are None without CUDA.
        """

    def rest(self) -> None:
        """Wait for copies to be begun, and give back what they need."""


@dataclass
class _Begun:
    events: Events | None

    def result(self) -> Events | None:
        return self.events


class InMemory:
    """Rows in CPU memory, page-locked where CUDA copies from it."""

    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = is_cuda

    def keep(self, leaves: list[Leaf], nbytes: int) -> Tensor:
        """Return the bytes of `leaves`, see `Rows`."""
        if self.is_cuda:
            row = page_locked(nbytes, "a block", FIX, "train.stream")
        else:
            row = torch.empty(nbytes, dtype=torch.uint8)
        write_into(row, leaves)
        return row

    def let_go(self, row: Tensor) -> None:
        """Forget a row."""
        if self.is_cuda:
            unlock(row)

    def copy(self, row: Tensor, slot: Tensor, free: Any, side: Any) -> Copy:
        """Start copying a row into `slot`."""
        return _Begun(_copied(row, slot, free, side))

    def rest(self) -> None:
        """Copies are begun at once, and need nothing."""


class OnDisk:
    """Rows in a file without a name, of which nothing is left when the process ends, however it
    does. The system keeps as much of it in CPU memory as is free.

    A thread reads a row into page-locked memory, of which one row's worth is there, and has it
    copied from there.

    Args:
        folder: on a disk with room for all rows. Raises ModelError if no file can be made there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.expanduser()
        try:
            # Not buffered, so that an error of writing comes when it is written.
            self._file = tempfile.TemporaryFile(dir=folder, prefix="quantadapt-", buffering=0)  # noqa: SIM115
        except OSError as error:
            what = f"the streamed base cannot be kept in {folder}: {error.strerror or error}"
            raise ModelError(what, fix="name another folder", where=WHERE) from error
        self._offsets: dict[int, int] = {}
        self._end = 0
        self._reader = ThreadPoolExecutor(1, "quantadapt-stream")
        self._read: Tensor | None = None
        self._copied: Any = None

    def keep(self, leaves: list[Leaf], nbytes: int) -> Tensor:
        """Return the bytes of `leaves`, see `Rows`."""
        row = torch.empty(nbytes, dtype=torch.uint8)
        write_into(row, leaves)
        offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Written, and not copied into a mapping: there a full disk would end the process.
            self._file.seek(offset)
            left = row.numpy().data
            while left:
                left = left[self._file.write(left) :]
            mapped = mmap.mmap(self._file.fileno(), nbytes, offset=offset)
        except OSError as error:
            raise self._error("be kept", f", after {size_words(self._end)}", error) from error
        self._end = offset + nbytes
        row = torch.frombuffer(mapped, dtype=torch.uint8)
        self._offsets[row.data_ptr()] = offset
        return row

    def let_go(self, row: Tensor) -> None:
        """Forget a row."""
        del self._offsets[row.data_ptr()]

    def copy(self, row: Tensor, slot: Tensor, free: Any, side: Any) -> Copy:
        """Start copying a row into `slot`."""
        return self._reader.submit(self._bring, self._offsets[row.data_ptr()], slot, free, side)

    def _bring(self, offset: int, slot: Tensor, free: Any, side: Any) -> Events | None:
        """Read a row and have it copied; in the reader's thread."""
        if side is None:
            self._fill(slot, offset)
            return None
        with torch.cuda.device(slot.device):
            if self._read is None or self._read.numel() < slot.numel():
                self._read = torch.empty(slot.numel(), dtype=torch.uint8, pin_memory=True)
            if self._copied is not None:  # from what is written now
                self._copied.synchronize()
            started, read = timed_event(side), self._read[: slot.numel()]
            self._fill(read, offset)
            events = _copied(read, slot, free, side)
        assert events is not None
        self._copied = events[1]
        return started, events[1]

    def _fill(self, target: Tensor, offset: int) -> None:
        """Read bytes of the file into `target`, uint8 in CPU memory."""
        left = target.numpy().data
        try:
            self._file.seek(offset)
            while left:
                if not (count := self._file.readinto(left)):  # type: ignore[attr-defined]
                    raise OSError("the file has become shorter")
                left = left[count:]
        except OSError as error:
            raise self._error("be read", "", error) from error

    def _error(self, does: str, after: str, error: OSError) -> ModelError:
        what = f"the streamed base cannot {does} in {self.folder}{after}: {error.strerror or error}"
        fix = "make room there, name a folder on another disk, or use a backend with fewer bits"
        return ModelError(what, fix=fix, where=WHERE)

    def rest(self) -> None:
        """Wait for the reader, and give its memory back."""
        self._reader.submit(int).result()  # what was asked for before is done then
        self._read = self._copied = None


def _copied(row: Tensor, slot: Tensor, free: Any, side: Any) -> Events | None:
    """Copy a row into a slot; return CUDA's events before and after."""
    if side is None:
        slot.copy_(row)
        return None
    side.wait_event(free)
    started = timed_event(side)
    with torch.cuda.stream(side):
        slot.copy_(row, non_blocking=True)
    return started, timed_event(side)
