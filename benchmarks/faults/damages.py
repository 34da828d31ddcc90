"""Files of a checkpoint that are damaged before a run goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .commands import Bench, Command, unexpected
from .processes import call
from .trials import Trial

PART = "damaged"


def _lose(file: Path) -> None:
    file.unlink()


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")  # an empty line more would say the same


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _flip(where: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        contents = bytearray(file.read_bytes())
        contents[int(where * (len(contents) - 1))] ^= 1
        file.write_bytes(contents)

    return flip


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _earlier(file: Path) -> None:
    shutil.copy(file.parents[1] / "checkpoint-2" / file.name, file)


HARMS = {
    "is lost": _lose,
    "is empty": _empty,
    "is cut": _cut,
    "is longer": _lengthen,
    "is all zeros": _zeros,
    "has another first bit": _flip(0.0),
    "has another bit": _flip(0.5),
    "has another last bit": _flip(1.0),
    "is a folder": _folder,
    "is a link to nothing": _link,
    "is that of the one before": _earlier,
}


def trials(bench: Bench, command: Command) -> Iterator[Trial]:
    """Harm each file of the last checkpoint, or the same of all, before the run goes on."""
    assert command.before is not None
    checkpoints = sorted(path.name for path in (command.before / "checkpoints").iterdir())
    for file in sorted((command.before / "checkpoints" / checkpoints[-1]).iterdir()):
        for what, harm in HARMS.items():
            for harmed in (checkpoints[-1:], checkpoints):
                if what == "is that of the one before" and _same(command.before, file.name):
                    continue
                if harm is _earlier and len(harmed) > 1:
                    continue  # that of the first is whole
                yield _trial(bench, command, file.name, what, harm, harmed)


def _same(run: Path, name: str) -> bool:
    """Say whether all checkpoints have the same file of this name."""
    return len({file.read_bytes() for file in run.glob(f"checkpoints/*/{name}")}) == 1


def _trial(
    bench: Bench,
    command: Command,
    name: str,
    what: str,
    harm: Callable[[Path], None],
    harmed: list[str],
) -> Trial:
    last = harmed[-1]

    def wrong() -> list[str]:
        bench.fresh(command)
        for checkpoint in harmed:
            harm(bench.out / "checkpoints" / checkpoint / name)
        before = bench.contents()
        ended = call(command.action, bench.root)
        found = unexpected(ended)
        if f"{last} is damaged" not in ended.text:
            found.append(f"the damage is not told: {ended.text[-600:]}")
        if len(harmed) > 1:
            if ended.code != 2 or bench.contents() != before:
                found.append(f"it ended with {ended.code}, and has to be refused")
            return found
        if ended.code != 0 or command.result(command.output) != command.expected:
            found.append(f"it ended with {ended.code}, or another result: {ended.text[-600:]}")
        return found

    which = "of the last" if len(harmed) == 1 else "of all"
    return Trial(PART, name, f"{what}, {which}", wrong)
