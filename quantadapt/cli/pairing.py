"""Two models answer the same questions, one after the other, for whoever compares them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..paths import path_problem

if TYPE_CHECKING:
    from ..data.files import Row
    from ..generation.sampling import Sampling
    from ..judging.pairs import Answered, Pair
    from .session import Session


def is_file(path: str) -> bool:
    """Say whether `path` is a file, of answers."""
    return not path_problem(path) and Path(path).expanduser().is_file()


def is_run(path: str) -> bool:
    """Say whether `path` is a run, which has held something out."""
    return not path_problem(path) and (Path(path).expanduser() / "spec.yaml").is_file()


class Source:
    """Who answers what."""

    def __init__(self, a: str, b: str, prompts: str | None, most: int) -> None:
        self.paths, self.prompts, self.most = (a, b), prompts, most
        self.files = [path for path in self.paths if is_file(path)]

    def answers(self) -> dict[str, Answered]:
        """Return what was answered already, by path."""
        from ..judging.pairs import Answered, read_answers, refuse_others

        found = {}
        for path in self.files:
            whole = read_answers(path)
            found[path] = Answered(path, whole.prompts[: self.most], whole.answers[: self.most])
        if len(found) == 2:
            refuse_others(*found.values())
        return found

    def asked(self, tokenizer: Any) -> list[tuple[Row, Any]]:
        """Return what is asked, each with the row that the answer is put into. Held-out questions
        are written as the model of `tokenizer` learnt them."""
        from ..data.files import Row
        from ..data.sources import read_source
        from ..generation.files import ANSWER, asked_in, read_prompts
        from .models import held_out_of

        if self.files:
            rows = [row for part in read_source(self.files[0]) for row in part]
            bare = [
                Row({k: v for k, v in row.values.items() if k != ANSWER}, row.where) for row in rows
            ]
            return [(row, asked_in(row)) for row in bare[: self.most]]
        if self.prompts is not None:
            return list(read_prompts(self.prompts))[: self.most]
        run = next(path for path in self.paths if is_run(path))
        held_out, _ = held_out_of(run, None, tokenizer)
        return [
            (Row({"prompt": p.text, "reference": p.reference}, f"held-out example {number}"), p)
            for number, p in enumerate(held_out.prompts[: self.most], 1)
        ]


def made_pairs(
    shown: Session,
    source: Source,
    folder: Path,
    sampling: Sampling,
    batch_size: int,
    how: Mapping[str, Any],
) -> list[Pair]:
    """Return the pairs; what is there already is not made again."""
    from ..judging.folder import ANSWERS
    from ..judging.pairs import PAIRS, paired, read_pairs, write_pairs

    file = folder / PAIRS
    if file.exists():
        return read_pairs(str(file))
    given = source.answers()
    both = []
    for path, name in zip(source.paths, ANSWERS, strict=True):
        if path in given:
            both.append(given[path])
            continue
        out = folder / name
        both.append(_answered(shown, source, path, out, sampling, batch_size, how))
    pairs = paired(*both)
    write_pairs(file, pairs)
    return pairs


def _answered(
    shown: Session,
    source: Source,
    path: str,
    out: Path,
    sampling: Sampling,
    batch_size: int,
    how: Mapping[str, Any],
) -> Answered:
    """Let the model at `path` answer into `out`, and return what it did."""
    from ..errors import DataError
    from ..folders.lines import lines_in
    from ..generation.files import ANSWER, answer_file
    from ..judging.pairs import Answered, as_text
    from .answering import answer_into, asking, ids_of

    with asking(shown, path, **how) as asked:
        found = source.asked(asked.writer.tokenizer)
        if not found:
            fix = "give --prompts FILE"
            raise DataError("the held-out data have no questions", fix=fix, where=path)
        if not out.exists():
            rows = [row for row, _ in found]
            ids = ids_of(asked, found)
            made_with = {"model": path, "options": sampling.model_dump(mode="json")}
            with answer_file(out, rows, made_with) as file:
                what = f"{path} answers"
                answer_into(file, shown, asked, rows, ids, sampling, batch_size, what)
    texts = [as_text(getattr(text, "text", text)) for _, text in found]
    references = [str(row.values.get("reference") or "") for row, _ in found]
    return Answered(path, texts, [line[ANSWER] for line in lines_in(out)], references)
