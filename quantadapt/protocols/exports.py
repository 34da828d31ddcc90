"""What an export implements: an `Exporter`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..capabilities import Cell, Merge
from ..errors import Problem
from .options import Figure, Options

if TYPE_CHECKING:
    from ..exporting.tuned import Tuned
    from ..records import Adapter, Backend


class Exporter(Options, ABC):
    """What is written from a tuned model; its fields are the export's options.

    Implement `write`, and `merges` where that works with merged weights: a combination that does
    not allow it is then refused when a run is planned, in the words of its rules.

    Attributes:
        for_load: options under which a server for many users takes what is written, the best first;
            none where it is for something else.
    """

    for_load: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    @property
    def merges(self) -> Merge:
        """What it does with the adapter: NEVER (the default) leaves it beside the base, DENSE
        merges it into dense weights, REQUANTIZE has them quantized again."""
        return Merge.NEVER

    @property
    def folder(self) -> str:
        """The folder that is written, in that of the run; empty: called as the export is."""
        return ""

    @property
    def reads(self) -> list[str]:
        """The files and folders that it reads besides the tuned model, which must not lie in the
        folder that is written; by default each option that names one."""
        options = self.model_dump().values()
        return [o for o in options if isinstance(o, str) and os.path.exists(os.path.expanduser(o))]

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> Iterable[Problem]:
        """Return what else is wrong with this export of this combination. Asked before any work
        starts: look at options and the files that they name, load and download nothing."""
        return ()

    def refusals_of_rounded(self) -> Iterable[Problem]:
        """Return what is wrong with this export of a model that was trained through the quantizer,
        `train.merge_aware`; asked of such a model, where `refusals` is asked."""
        return ()

    @property
    def planned(self) -> str:
        """What will be written, in a few words, e.g. "dense merged model"; empty: its name."""
        return ""

    @property
    def refused(self) -> str:
        """What is not written where it is refused; empty: "no" and `planned`."""
        return ""

    def done(self, figures: Mapping[str, Figure]) -> str:
        """Return what became of it, as half a sentence about what `write` returned; empty: the
        figures with their names."""
        return ""

    def needed(self, tuned: Tuned) -> int | None:
        """Return the bytes that `write` will take on the disk, where that is known; it is refused
        at once if they are not free."""
        return None

    @abstractmethod
    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        """Write everything into `folder`, which is empty, and return figures about it by name.

        The folder gets its own name when this returns. If this raises, it is removed, and what an
        earlier export left is as it was.
        """
        ...
