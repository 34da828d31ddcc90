"""Examples as they are shown: the text that a model sees, with what is learnt of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from ..spec import DataSpec
from .files import Row
from .mistakes import all_told, each_done
from .report import DataReport
from .sources import read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Shown(NamedTuple):
    """A text as the model sees it; an example is one of those or several.

    Attributes:
        where: its file and line.
        ids, mask: token ids, and 1 where one is learnt.
        cut: how many tokens were cut off behind them.
        title: which text of an example it is, such as `chosen`.
        against: whether the answer is one to be avoided.
        note: what else is known of it, such as its label.
    """

    where: str
    ids: list[int]
    mask: list[int]
    cut: int
    title: str = ""
    against: bool = False
    note: str = ""

    @classmethod
    def up_to(
        cls, length: int, where: str, ids: Sequence[int], mask: Sequence[int], *,
        title: str = "", against: bool = False, note: str = "",
    ) -> Shown:  # fmt: skip
        """Return a text of which `length` tokens are kept."""
        cut = max(0, len(ids) - length)
        return cls(where, [*ids[:length]], [*mask[:length]], cut, title, against, note)

    @property
    def words(self) -> str:
        """Its counts, e.g. `12 of 40 tokens, 5 of them learnt`, and the note."""
        size, cut = len(self.ids), self.cut
        tokens = "token" if size + cut == 1 else "tokens"
        found = [f"{size:,} of {size + cut:,} {tokens}" if cut else f"{size:,} {tokens}"]
        if learnt := sum(self.mask):
            found.append(f"{learnt:,} of them {'to be avoided' if self.against else 'learnt'}")
        return ", ".join([*found, self.note] if self.note else found)

    def stretches(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
        """Yield (whether it is learnt, text) for tokens that follow each other."""
        pairs = zip(self.ids, self.mask, strict=True)
        for learnt, stretch in groupby(pairs, key=lambda pair: bool(pair[1])):
            yield learnt, str(tokenizer.decode([token for token, _ in stretch]))


Show = Callable[[Iterable[Row], DataSpec, DataReport, bool], Iterable[list[Shown]]]
"""Makes of rows what is shown of each example that is used, and counts in the report; the last
says whether they are held out."""


def first_shown(spec: DataSpec, limit: int, show: Show) -> tuple[list[Shown], DataReport]:
    """Read all that `spec` names, unsplit.

    Returns:
        What is shown of the first `limit` examples that are used, and the report.

    Raises:
        DataError: the data cannot be read or used.
    """
    report, kept = DataReport(spec.max_length), list[list[Shown]]()

    def keep(rows: list[Row], held_out: bool) -> None:
        def made(some: Iterable[Row], counts: DataReport) -> Any:
            return show(some, spec, counts, held_out)

        for texts in all_told(rows, made, report):
            kept.extend([texts] if len(kept) < limit else [])

    parts = zip(read(spec), (False, True), strict=True)
    each_done(partial(keep, rows, held_out) for rows, held_out in parts)
    return [text for texts in kept for text in texts], report
