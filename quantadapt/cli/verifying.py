"""`quantadapt matrix --verify`: shows the work while it goes on, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import TaskID

from ..showing.bars import Bars
from .matrix_view import OUTCOMES, show_verified
from .session import Session

if TYPE_CHECKING:
    from rich.console import Console

    from ..matrix.process import Job
    from ..matrix.results import VerifiedCell
    from ..records import Adapter, Backend


def verify_cells(
    shown: Session,
    backends: Sequence[Backend],
    adapters: Sequence[Adapter],
    *,
    output: Path,
    backend_options: Sequence[str],
    device: str,
    dtype: str | None,
    timeout: float | None,
    jobs: int,
    fresh: bool,
) -> None:
    """Verify, and print what came of it. Ends in SystemExit(1) if a cell failed or crashed."""
    from ..matrix.results import Verified
    from ..matrix.verify import TIMEOUT, Verification, parse_options

    with VerifyDisplay(shown.progress) as display:
        verification = Verification(output, timeout=timeout or TIMEOUT, listener=display)
        cells = verification.run(
            backends,
            adapters,
            options=parse_options(backend_options),
            device=device,
            dtype=dtype,
            fresh=fresh,
            jobs=jobs,
        )
    part = Verified.of(cells, str(output))
    bad = [cell for cell in cells if cell.bad]
    count = dict(Counter(cell.verified for cell in cells))
    if shown.as_json:
        document = {"file": str(output), "count": count, "verified": part.to_dict()}
        shown.print_json(document)
    else:
        for piece in part.by_device():
            show_verified(shown, piece)
        for line in dict.fromkeys(_again(cell) for cell in bad):
            shown.out.print(f"    {line}", markup=False, soft_wrap=True)
        words = ", ".join(f"{number} {outcome}" for outcome, number in count.items())
        style = "bold red" if bad else "bold green"
        text = f"\n{words or 'nothing to verify'}; results are in {output}"
        shown.out.print(text, style=style, markup=False, soft_wrap=True)
    if bad:
        raise SystemExit(1)


def _again(cell: VerifiedCell) -> str:
    """Return the command that shows what is wrong with one cell."""
    options = ",".join(f"{name}={value}" for name, value in cell.options.items())
    words = ["pytest --pyargs quantadapt.testing", f"--backend {cell.backend}"]
    words += [f"--backend-options {options}"] if options else []
    words += [f"--adapter {cell.adapter}", f"--device {cell.device}", f"--dtype {cell.dtype}"]
    return " ".join(words)


class VerifyDisplay(Bars):
    """A listener for `Verification`; use it as a context manager.

    A line for each cell; on a terminal also a bar for each process that is at work.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars: dict[tuple[str, ...], TaskID] = {}

    def on_planned(self, facts: Mapping[str, Any]) -> None:
        """It is known what there is to do for one backend."""
        if done := facts["of"] - facts["todo"]:
            text = f"{facts['job'].title}: {done} of {facts['of']} cells need no run"
            self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def on_job(self, facts: Mapping[str, Any]) -> None:
        """A process begins."""
        job: Job = facts["job"]
        self._bars[_key(job)] = self._live.add_task(escape(job.title), total=None, told="starting")

    def on_test(self, facts: Mapping[str, Any]) -> None:
        """A process began with a test."""
        bar = self._bars.get(_key(facts["job"]))
        if bar is not None and "number" in facts:
            done, total = facts["number"] - 1, facts["of"]
            text = f"{done}/{total} {escape(str(facts['test']))}"
            self._live.update(bar, completed=done, total=total, told=text)

    def on_cell(self, facts: Mapping[str, Any]) -> None:
        """A cell has a result."""
        cell: VerifiedCell = facts["cell"]
        word = f"[{OUTCOMES[cell.verified]}]{cell.text()}[/]"
        detail = f"  {escape(cell.detail)}" if cell.detail else ""
        self.console.print(f"{escape(cell.title):<32} {word}{detail}", soft_wrap=True)

    def on_ended(self, facts: Mapping[str, Any]) -> None:
        """A process ended."""
        bar = self._bars.pop(_key(facts["job"]), None)
        if bar is not None:
            self._live.remove_task(bar)
            self._live.refresh()


def _key(job: Job) -> tuple[str, ...]:
    return (job.title, *job.adapters)
