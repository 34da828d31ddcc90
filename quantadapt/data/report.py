"""What became of the data: examples, tokens, what was cut or dropped, and why, file by file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..folders.metrics import many

LOUD = 0.05
"""Of more examples than that cut or dropped, a warning tells."""


@dataclass
class FileReport:
    """What became of one file.

    Attributes:
        file: its path, or a hub id and its split.
        format: the format that was detected, one of `FORMATS`.
        rows: rows that were read.
        examples: examples that are used, of which `held_out` are only measured on.
        tokens: tokens of those, of which `learnt` are learnt; none of prompts that a model answers
            by itself.
        cut: how many of them were longer than the limit; `lost` tokens to learn went with that.
        dropped: how many others were left out, by reason.
        remarks: what else happened to how many examples.
        unused: columns that the format does not know.
        pictures: of the examples that are used; `standing` tokens stand for them.
    """

    file: str
    format: str = ""
    rows: int = 0
    examples: int = 0
    held_out: int = 0
    tokens: int = 0
    learnt: int = 0
    cut: int = 0
    lost: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    pictures: int = 0
    standing: int = 0

    def keep(self, *masks: list[int], max_length: int, held_out: bool) -> None:
        """Count an example that is used, of one sequence or several, up to `max_length` tokens of
        each."""
        self.examples += 1
        self.held_out += held_out
        self.cut += any(len(mask) > max_length for mask in masks)
        for mask in masks:
            self.tokens += min(len(mask), max_length)
            self.learnt += sum(mask[:max_length])
            self.lost += sum(mask[max_length:])

    @property
    def harmed(self) -> float:
        """The share of examples that were cut or dropped, 0 to 1."""
        left_out = self.dropped.total()
        return (self.cut + left_out) / max(self.examples + left_out, 1)

    def counts(self, max_length: int) -> str:
        """Return the counts in words, e.g. `90 examples, 6000 tokens, 900 of them learnt`."""
        if not self.examples and not self.dropped:
            return many(self.rows, "row") if self.rows else "read row by row"
        parts = [many(self.examples, "example")]
        if 0 < self.held_out < self.examples:
            parts[0] += f" ({self.held_out:,} of them held out)"
        parts.append(many(self.tokens, "token"))
        parts += [f"{self.learnt:,} of them learnt"] if self.learnt else []
        if self.pictures:
            parts.append(f"{many(self.pictures, 'picture')} of {many(self.standing, 'token')}")
        parts += self.losses(max_length) or ["none cut or dropped"]
        return ", ".join(parts)

    def losses(self, max_length: int) -> list[str]:
        """Return what was cut and what was dropped, in words."""
        words = []
        if self.cut:
            cut = f"{self.cut:,} cut to {max_length} tokens"
            words.append(f"{cut} ({self.lost:,} tokens to learn lost)" if self.lost else cut)
        if self.dropped:
            reasons = "; ".join(f"{count:,} {why}" for why, count in self.dropped.most_common())
            words.append(f"{self.dropped.total():,} dropped ({reasons})")
        return words

    def notes(self) -> list[str]:
        """Return what else is to be known, in words."""
        found = [f"{what} ({count:,})" for what, count in self.remarks.most_common()]
        if self.unused:
            found.append(f"columns that {self.format} does not know: {', '.join(self.unused)}")
        return found


def source_of(file: str) -> str:
    """Return the hub id without its split; a path as it is."""
    return file.rpartition("[")[0] if file.endswith("]") else file


@dataclass
class DataReport:
    """What became of the data of a run; examples are cut to `max_length` tokens."""

    max_length: int
    files: list[FileReport] = field(default_factory=list)

    def of(self, file: str) -> FileReport:
        """Return the report on a file, a new one at first."""
        found = next((report for report in self.files if report.file == file), None)
        if found is None:
            found = FileReport(file)
            self.files.append(found)
        return found

    def words(self) -> list[str]:
        """Return a sentence for each file."""
        return [
            "; ".join([f"{f.file}: {f.format}, {f.counts(self.max_length)}", *f.notes()])
            for f in self.files
        ]

    def warnings(self) -> list[tuple[str, str]]:
        """Return (file, what is lost, in words) for each that lost more than `LOUD` of its
        examples."""
        return [
            (
                f.file,
                f"{f.harmed:.0%} of the examples in {f.file} are cut or dropped: "
                f"{', '.join(f.losses(self.max_length))}",
            )
            for f in self.files
            if f.harmed > LOUD
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-ready data."""
        files = [
            {**vars(file), "dropped": dict(file.dropped), "remarks": dict(file.remarks)}
            for file in self.files
        ]
        return {"max_length": self.max_length, "files": files}
