"""What the studio's form says: as a spec to plan, and as the command line that runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem, SpecError
from ..folders.atomic import write_atomic
from ..planning.mistakes import spec_of
from ..planning.planned import Plan
from ..planning.stage import plan as make_plan
from ..spec import Spec, apply_overrides

_PASTED = "pasted"
"""The folder beside the runs that keeps data which was typed in."""


@dataclass(frozen=True)
class Form:
    """The fields; empty ones say nothing.

    Attributes:
        runs: the folder that runs lie in.
        name: of the new run; by default after backend and adapter, with a number where it is taken.
        model: checkpoint folder or hub id; empty for the bundled demo.
        data: a path or hub id.
        pasted: data as text, one JSON object a line; wins over `data`.
        more: lines KEY=VALUE, as after `--set`.
        gpus: how many processes train.
    """

    runs: Path
    name: str = ""
    model: str = ""
    backend: str = ""
    adapter: str = ""
    objective: str = ""
    data: str = ""
    pasted: str = ""
    steps: str = ""
    learning_rate: str = ""
    more: str = ""
    gpus: int = 1
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        if self.name.strip():
            return self.runs / self.name.strip()
        wanted = f"{self.backend or 'hqq'}-{self.adapter or 'lora'}"
        names = (wanted if not n else f"{wanted}-{n + 1}" for n in range(10**6))
        return next(self.runs / name for name in names if not (self.runs / name).exists())

    @property
    def pasted_file(self) -> Path:
        """Where pasted data go: the same text into the same file."""
        digest = hashlib.sha256(self.pasted.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return self.runs / _PASTED / f"{digest}.jsonl"

    def keep_pasted(self) -> None:
        """Write pasted data into their file."""
        if self.pasted.strip() and not self.pasted_file.exists():
            self.pasted_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.pasted_file, f"{self.pasted.strip()}\n")

    def flags(self) -> Iterator[tuple[str, str, str]]:
        """Yield (flag, key of the spec, value) of what is said."""
        data = str(self.pasted_file) if self.pasted.strip() else self.data.strip()
        said = (
            ("--model", "model", self.model.strip()),
            ("--backend", "backend", self.backend),
            ("--adapter", "adapter", self.adapter),
            ("--objective", "objective", self.objective),
            ("--data", "data.path", data),
            ("--max-steps", "train.max_steps", self.steps.strip()),
            ("--learning-rate", "train.learning_rate", self.learning_rate.strip()),
            ("--output", "output", str(self.folder)),
        )
        yield from (row for row in said if row[2])

    @property
    def lines(self) -> list[str]:
        """The lines of `more`."""
        return [line.strip() for line in self.more.splitlines() if line.strip()]

    def arguments(self) -> list[str]:
        """Return the arguments of `quantadapt` that do the run."""
        said = [f"{flag}={value}" for flag, _, value in self.flags()]
        said += [f"--set={line}" for line in self.lines]
        said += [f"--gpus={self.gpus}"] if self.gpus > 1 else []
        return ["run", *said, *(["--trust-remote-code"] if self.trust_remote_code else [])]

    def spec(self) -> Spec:
        """Return the spec. Raises SpecError with every mistake."""
        values: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        for _, key, value in self.flags():
            *parents, last = key.split(".")
            node = values
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        wrong = self._wrong_name()
        try:
            found = spec_of(apply_overrides(values, self.lines))
        except SpecError as error:
            raise SpecError([*wrong, *error.problems]) from None
        if wrong:
            raise SpecError(wrong)
        return found

    def plan(self, cards: Sequence[float] = ()) -> Plan:
        """Plan the run; writes nothing but pasted data. Raises PlanRefused and SpecError.

        Args:
            cards: GiB of other cards than this machine's to plan for.
        """
        self.keep_pasted()
        spec, own = self.spec(), not cards
        return make_plan(spec, processes=self.gpus, cards=cards, weights=False, check_output=own)

    def _wrong_name(self) -> list[Problem]:
        name = self.name.strip()
        if name and (Path(name).name != name or name.startswith(".") or name == _PASTED):
            what = f"{name!r} is no name for a run"
            fix = "use one without slashes, and without a dot at its beginning"
            return [Problem(what, fix, "name")]
        return []
