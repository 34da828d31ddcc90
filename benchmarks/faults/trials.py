"""What is tried: one fault each, and what is wrong afterwards."""

from __future__ import annotations

import errno
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .commands import Bench, Command, called_again, left_whole, unexpected
from .processes import Fault, Process, call

ERRORS = {
    "open": (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO),
    "os.mkdir": (errno.ENOSPC, errno.EDQUOT),
    "os.rename": (errno.ENOSPC, errno.EIO),
}
"""What a change may fail with; all others with EIO."""

LASTING = (errno.ENOSPC, errno.EDQUOT)
"""They stay until somebody makes room."""


@dataclass(frozen=True)
class Trial:
    """One of many.

    Attributes:
        part: which part of the campaign, a row of its table.
        group: which command, or file; what is counted together.
        name: what happens.
        wrong: does it; returns what is wrong.
    """

    part: str
    group: str
    name: str
    wrong: Callable[[], list[str]]

    @property
    def title(self) -> str:
        """What it is called, the same in each campaign."""
        return re.sub(r"\.[0-9a-f]{8}\.", ".*.", f"{self.part}: {self.group} {self.name}")


def share_of(trials: list[Trial], share: float, seed: int) -> Iterator[Trial]:
    """Yield a share of the trials of each part, evenly spread, in their order."""
    begin = random.Random(seed).random()
    for part in dict.fromkeys(trial.part for trial in trials):
        found = [trial for trial in trials if trial.part == part]
        count = max(1, round(share * len(found)))
        yield from (found[int((number + begin) * len(found) / count)] for number in range(count))


# Kills -------------------------------------------------------------------------------------------


def kills(bench: Bench, command: Command) -> Iterator[Trial]:
    """Kill the command before each of its changes, and as each size of a file is reached."""
    for at, change in enumerate(command.changes, 1):
        fault = Fault(at, signal.SIGKILL)
        yield _trial("killed", bench, command, f"at {at}, {change}", fault, -signal.SIGKILL)
    for size in sizes_of(command):
        fault = Fault(signal=signal.SIGXFSZ, size=size)
        yield _trial("killed", bench, command, f"at {size} bytes", fault, -signal.SIGXFSZ)


def sizes_of(command: Command) -> list[int]:
    """Return sizes at which some file of the command is cut off."""
    largest = command.largest
    return [size for size in (4096, 16384, 65536, 262144, largest - 1) if size < largest]


def signals(bench: Bench, command: Command) -> Iterator[Trial]:
    """Send SIGTERM or SIGHUP before each change, which a run has to obey."""
    for at, change in enumerate(command.changes, 1):
        number = (signal.SIGTERM, signal.SIGHUP)[at % 2]
        name = f"gets {number.name} at {at}, {change}"
        yield _trial("signalled", bench, command, name, Fault(at, number), 128 + number, -number, 0)


def failures(bench: Bench, command: Command) -> Iterator[Trial]:
    """Let each change fail, as on a full disk, with too many files open, or on a broken disk."""
    for at, change in enumerate(command.changes, 1):
        errors = ERRORS.get(change.split()[0], (errno.EIO,))
        error = errors[at % len(errors)]
        fault = Fault(at, error=error, lasting=error in LASTING)
        name = f"gets {errno.errorcode[error]} at {at}, {change}"
        yield _trial("write fails", bench, command, name, fault, 1, 2, 0)
    for size in sizes_of(command):
        fault = Fault(size=size)
        yield _trial("write fails", bench, command, f"after {size} bytes", fault, 1, 2, 0)


def _trial(
    part: str, bench: Bench, command: Command, name: str, fault: Fault, *codes: int
) -> Trial:
    """Return the trial of a fault after which a command ends with one of these codes."""

    def wrong() -> list[str]:
        bench.fresh(command)
        ended = call(command.action, bench.root, fault)
        found = unexpected(ended)
        if ended.code not in codes:
            found.append(f"it ended with {ended.code}: {ended.text[-600:]}")
        if ended.code == 0 and command.result(command.output) != command.expected:
            found.append("it ended well with another result")
        if part == "signalled" and (ended.code or 0) > 0:
            found += _not_interrupted(command)
        return found + left_whole(command, bench.root) + called_again(command, bench.root)

    return Trial(part, command.name, name, wrong)


def _not_interrupted(command: Command) -> list[str]:
    """Return what is wrong with the state that a run notes that was told to end."""
    from quantadapt.folders.run_folder import RunFolder

    state = RunFolder(command.output).marker.get("state", "interrupted")
    untouched = command.earlier is not None and state == command.earlier[0]
    return [] if state == "interrupted" or untouched else [f"its state is {state}"]


# Writers -----------------------------------------------------------------------------------------


def writers(bench: Bench, command: Command) -> Iterator[Trial]:
    """Stop the command before a change, and let others come meanwhile."""
    every = 5
    for at in range(1, len(command.changes) + 1, every):
        name = f"stops at {at}, {command.changes[at - 1]}"
        yield Trial("two writers", command.name, name, _others(bench, command, at))


def _others(bench: Bench, command: Command, at: int) -> Callable[[], list[str]]:
    def wrong() -> list[str]:
        bench.fresh(command)
        first, found = Process(command.action, bench.root, Fault(at, signal.SIGSTOP)), []
        if not first.stopped():
            return [f"it ended before: {first.ended().text[-600:]}"]
        for name, action in {**command.again, "first": command.action}.items():
            locked, before = _is_locked(bench, first.pid), bench.contents()
            ended = call(action, bench.root)
            found += unexpected(ended)
            if locked and (ended.code != 2 or f"process {first.pid}" not in ended.text):
                found.append(f"{name} beside it ends with {ended.code}: {ended.text[-300:]}")
            if locked and bench.contents() != before:
                found.append(f"{name} beside it changes files")
        first.go_on()
        ended = first.ended()
        found += unexpected(ended)
        if ended.code != 0 and locked:
            found.append(f"it ended with {ended.code} in the end: {ended.text[-600:]}")
        return found + left_whole(command, bench.root) + called_again(command, bench.root)

    return wrong


def _is_locked(bench: Bench, pid: int) -> bool:
    """Say whether a lock below the root is held by this process and noted so."""
    held = [file.read_text() for file in bench.root.rglob(".*quantadapt-lock")]
    return any(f'"pid": {pid}' in text for text in held)


def races(bench: Bench, command: Command, rounds: int = 3) -> Iterator[Trial]:
    """Begin the command eight times at once."""

    def wrong() -> list[str]:
        bench.fresh(command)
        begun = [Process(command.action, bench.root) for _ in range(8)]
        ended = [process.ended() for process in begun]
        found = [text for one in ended for text in unexpected(one)]
        codes = sorted(one.code if one.code is not None else -1 for one in ended)
        if codes[0] != 0 or codes[-1] > 2:
            texts = "\n".join(one.text[-300:] for one in ended if one.code)
            found.append(f"eight at once ended with {codes}: {texts[-900:]}")
        if command.result(command.output) != command.expected:
            found.append("the result is another one")
        return found + left_whole(command, bench.root)

    for number in range(1, rounds + 1):
        yield Trial("two writers", command.name, f"eight at once, {number}", wrong)
