"""Reading data: files, folders and hub data sets become token ids with a loss mask.

Four steps, each a function: find the sources, read records with their line numbers, turn every
record into segments (text, trained or not), and tokenize the segments. Training and evaluation
data take the same way.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import is_local_path
from .data_files import FORMATS, READERS, RECOGNIZED, SUFFIXES, Record, first_line, kind_of
from .errors import DataError
from .spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


HELD_OUT_NAMES = frozenset({"eval", "evaluation", "validation", "valid", "val", "dev", "test"})
MAX_PROMPTS = 32
TEXT_PROMPT_TOKENS = 16
_BATCH = 1000


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt for samples, and what the data says after it."""

    text: str
    reference: str


@dataclass(frozen=True)
class Data:
    """Tokenized data.

    Attributes:
        train, eval: columns `input_ids` (token ids) and `completion_mask` (1 where the loss
            counts). The first token is never predicted, whatever its mask.
        prompts: up to 32 held-out prompts.
        format: the format that was read, one of `FORMATS`.
        cut: examples shortened to `max_length` and kept, in both data sets together.
        dropped: examples left out because nothing to learn was left of them.
    """

    train: Dataset
    eval: Dataset
    prompts: list[Prompt]
    format: str
    cut: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the loss counts on it."""

    text: str
    trained: bool


@dataclass
class _Counts:
    cut: int = 0
    dropped: int = 0


def load_data(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
    """Read, split and tokenize what `spec` names; the bundled demo data if it names nothing.

    Without held-out data of its own (`eval_path`, a file or split called validation or test) a
    share of `eval_fraction`, at least one example, is split off, shuffled by `seed`.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    train, held_out = _read(spec)
    train = train[: spec.max_examples]
    if not held_out:
        train, held_out = _split(train, spec, seed)
    name = _format(spec, train)
    counts = _Counts()
    train_set = _dataset(train, name, tokenizer, spec.max_length, counts)
    eval_set = _dataset(held_out, name, tokenizer, spec.max_length, counts)
    prompts = [_prompt(record, name, tokenizer) for record in held_out[:MAX_PROMPTS]]
    return Data(train_set, eval_set, prompts, name, counts.cut, counts.dropped)


def load_held_out(
    source: str | None, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> Dataset:
    """Read data that is for measuring only.

    That is all of a file, the held-out part of a folder or hub id that has one, or the bundled
    demo's held-out data if `source` is None.

    Raises:
        DataError: as `load_data`.
    """
    if source is None:
        return load_data(DataSpec(), tokenizer, seed=0).eval
    records, own_held_out = _read_source(source)
    records = own_held_out or records
    spec = DataSpec(path=source, max_length=max_length)
    return _dataset(records, _format(spec, records), tokenizer, max_length, _Counts())


def load_everything(
    source: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> Dataset:
    """Read all of a file, or the training part of a folder or hub id, unsplit.

    Raises:
        DataError: as `load_data`.
    """
    records, _ = _read_source(source)
    spec = DataSpec(path=source, max_length=max_length)
    return _dataset(records, _format(spec, records), tokenizer, max_length, _Counts())


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a prompt, exactly as they stand in the training data."""
    ids: list[int] = _token_ids(tokenizer, [text])[0]
    return [*_bos(tokenizer, text), *ids]


def prompt_and_completion(
    input_ids: Sequence[int], completion_mask: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Split an example into the untrained and the trained tokens, for encoder-decoder models."""
    pairs = list(zip(input_ids, completion_mask, strict=True))
    return [i for i, trained in pairs if not trained], [i for i, trained in pairs if trained]


# ------------------------------------------------------------------------------ sources


def _read(spec: DataSpec) -> tuple[list[Record], list[Record]]:
    """Return (training records, held-out records); the latter may be empty."""
    if spec.path is None:
        from .demo import EVAL_FILE, TRAIN_FILE

        train, held_out = _read_file(TRAIN_FILE), _read_file(EVAL_FILE)
    else:
        train, held_out = _read_source(spec.path)
    if spec.eval_path is not None:
        evaluation, own_held_out = _read_source(spec.eval_path)
        held_out = own_held_out or evaluation
    return train, held_out


def _read_source(source: str) -> tuple[list[Record], list[Record]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path), []
    if is_local_path(source):
        fix = "check the spelling; a relative path starts at the current folder"
        raise DataError("there is no such file or folder", fix=fix, where=source)
    return _read_hub(source)


def _read_folder(folder: Path) -> tuple[list[Record], list[Record]]:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS and f.is_file())
    if not files:
        what = "the folder holds no data files"
        raise DataError(what, fix=f"put files there that end in {SUFFIXES}", where=str(folder))
    held_out = [f for f in files if f.stem.lower() in HELD_OUT_NAMES]
    train = [f for f in files if f not in held_out]
    if not train:
        train, held_out = held_out, []
    return _read_files(train), _read_files(held_out)


def _read_files(files: Iterable[Path]) -> list[Record]:
    return [record for file in files for record in _read_file(file)]


def _read_file(path: Path) -> list[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        what = f"files ending in {path.suffix or 'nothing'!r} cannot be read"
        raise DataError(what, fix=f"use a file that ends in {SUFFIXES}", where=str(path))
    try:
        records = list(reader(path))
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror or error}", where=str(path)) from None
    if not records:
        raise DataError("the file holds no examples", fix=f"{RECOGNIZED}", where=str(path))
    return records


def _read_hub(name: str) -> tuple[list[Record], list[Record]]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises errors of many libraries
        what = f"no such file or folder here, and not readable from the hub: {first_line(error)}"
        fix = "give the path of a local file, or check the hub id, the network and your access"
        raise DataError(what, fix=fix, where=name) from error
    if "train" not in splits:
        found = ", ".join(sorted(map(str, splits)))
        fix = "download the part that you want and give its path"
        raise DataError(f"the data set has no split 'train', only {found}", fix=fix, where=name)
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    evaluation = _hub_records(splits[held_out], f"{name}[{held_out}]") if held_out else []
    return _hub_records(splits["train"], f"{name}[train]"), evaluation


def _hub_records(rows: Iterable[dict[str, Any]], name: str) -> list[Record]:
    return [Record(row, f"{name}:row {number}") for number, row in enumerate(rows, 1)]


def _split(records: list[Record], spec: DataSpec, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (training, held-out) records, each in the order in which they were read."""
    if len(records) < 2:
        fix = "add examples, or name held-out data with data.eval_path"
        what = "there is only one example, so none can be held out for evaluation"
        raise DataError(what, fix=fix, where=spec.path or "demo data")
    count = min(max(1, round(len(records) * spec.eval_fraction)), len(records) - 1)
    chosen = set(random.Random(seed).sample(range(len(records)), count))
    train = [record for index, record in enumerate(records) if index not in chosen]
    return train, [records[index] for index in sorted(chosen)]


# ------------------------------------------------------------------------------ formats


def _format(spec: DataSpec, records: Sequence[Record]) -> str:
    """Return the format to read `records` in. Raises DataError where no columns are known."""
    if spec.format != "auto":
        return spec.format
    found = records[0].values
    for name, columns in FORMATS.items():
        if all(column in found for column in columns):
            return name
    names = ", ".join(map(repr, found)) or "none"
    fix = f"rename them; {RECOGNIZED}"
    raise DataError(f"no known columns, found {names}", fix=fix, where=records[0].where)


def segments(record: Record, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return the text of a record in pieces. `name` is its format.

    Raises:
        DataError: a column is missing or holds no text.
    """
    if name == "text":
        return [Segment(_text(record, "text"), True)]
    if name == "prompt-completion":
        return [Segment(_text(record, "prompt"), False), Segment(_text(record, "completion"), True)]
    if name == "alpaca":
        return [Segment(_alpaca_prompt(record), False), Segment(_text(record, "output"), True)]
    return _chat(_messages(record), tokenizer, record.where)


def _alpaca_prompt(record: Record) -> str:
    instruction = _text(record, "instruction")
    given = _text(record, "input") if record.values.get("input") is not None else ""
    if given:
        return f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


def _text(record: Record, column: str) -> str:
    if column not in record.values:
        found = ", ".join(map(repr, record.values)) or "none"
        fix = "every example needs the same columns; set data.format if they were misread"
        what = f"the column {column!r} is missing, found {found}"
        raise DataError(what, fix=fix, where=record.where)
    return _checked(record.values[column], repr(column), record.where)


def _checked(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind_of(value)}, expected text", where=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half a surrogate pair", where=where) from None
    return value


def _messages(record: Record) -> list[dict[str, str]]:
    """Return the checked turns of a chat, up to and including the last of the assistant."""
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "'messages' is missing or no list of turns"
        fix = 'write [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
        raise DataError(what, fix=fix, where=record.where)
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            what = f"turn {number} of 'messages' is {kind_of(message)}, expected an object"
            raise DataError(what, where=record.where)
        keys = ("role", "content")
        values = [_checked(message.get(k), f"{k!r} of turn {number}", record.where) for k in keys]
        turns.append(dict(zip(keys, values, strict=True)))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        fix = "add a turn with the role 'assistant'; only those are learnt"
        raise DataError("no turn of the assistant", fix=fix, where=record.where)
    return turns


def _chat(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Segment]:
    if not tokenizer.chat_template:
        return _plain_chat(turns, tokenizer)
    try:
        return _template_chat(turns, tokenizer)
    except Exception as error:  # a template is a program and may raise anything
        what = f"the chat template refuses it: {first_line(error)}"
        fix = "reorder the turns, or use another format"
        raise DataError(what, fix=fix, where=where) from error


def _plain_chat(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Lay a chat out as alpaca does; the loss counts on every turn of the assistant."""
    eos = str(tokenizer.eos_token or "")
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
    result = []
    for index, turn in enumerate(turns):
        result.append(Segment(heads.get(turn["role"], ""), False))
        last = index == len(turns) - 1
        trained = turn["role"] == "assistant"
        end = eos if trained and not last else ""
        result.append(Segment(turn["content"] + end, trained))
        result.append(Segment("" if last else "\n\n", False))
    return [segment for segment in result if segment.text]


def _template_chat(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Render with the template; the loss counts on what each turn of the assistant adds.

    Some templates render earlier turns differently (they drop reasoning). Turns that are no
    continuation of one another cannot be told apart, and then only the last one counts.
    """

    def render(count: int, ask: bool) -> str:
        text = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=ask
        )
        return str(text)

    whole = render(len(turns), False)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    spans = [(render(index, True), render(index + 1, False)) for index in answers]
    spans = [(a, b) for a, b in spans if whole.startswith(b) and b.startswith(a)]
    if not spans or spans[-1][1] != whole:
        start = _common_prefix(render(len(turns) - 1, True), whole)
        spans = [(whole[:start], whole)]
    result, position = [], 0
    for before, after in spans:
        result.append(Segment(whole[position : len(before)], False))
        result += _up_to_eos(whole[len(before) : len(after)], str(tokenizer.eos_token or ""))
        position = len(after)
    return [segment for segment in result if segment.text]


def _up_to_eos(text: str, eos: str) -> list[Segment]:
    """Leave what a template writes after the end of the turn out of the loss."""
    end = text.rfind(eos) + len(eos) if eos and eos in text else len(text)
    if text[end:].strip():
        end = len(text)
    return [Segment(text[:end], True), Segment(text[end:], False)]


def _common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _prompt(record: Record, name: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the text before the last trained segment, and that segment."""
    pieces = segments(record, name, tokenizer)
    if name == "text":
        ids = _token_ids(tokenizer, [pieces[0].text])[0]
        first = str(tokenizer.decode(ids[:TEXT_PROMPT_TOKENS]))
        return Prompt(first, str(tokenizer.decode(ids[TEXT_PROMPT_TOKENS:])))
    last = max(index for index, piece in enumerate(pieces) if piece.trained)
    reference = pieces[last].text.removesuffix(str(tokenizer.eos_token or ""))
    return Prompt("".join(piece.text for piece in pieces[:last]), reference)


# ------------------------------------------------------------------------------ tokens


def _dataset(
    records: Sequence[Record],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: _Counts,
) -> Dataset:
    """Tokenize records. Raises DataError where no example is left."""
    import datasets
    import numpy

    ids, masks = [], []
    for start in range(0, len(records), _BATCH):
        batch = [segments(r, name, tokenizer) for r in records[start : start + _BATCH]]
        for tokens, mask in _tokenize(batch, tokenizer):
            if not any(mask[1:max_length]):
                counts.dropped += 1
                continue
            counts.cut += len(tokens) > max_length
            ids.append(numpy.asarray(tokens[:max_length], dtype=numpy.int32))
            masks.append(numpy.asarray(mask[:max_length], dtype=numpy.int8))
    if not ids:
        what = f"no example is left: within {max_length} tokens there is nothing to learn"
        fix = "raise data.max_length, shorten the prompts, or fill the empty completions"
        raise DataError(what, fix=fix, where=records[0].where)
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def _tokenize(
    batch: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (token ids, mask) per example: bos, the segments one by one, eos.

    Prompt and completion are tokenized apart, so that a prompt has the same tokens in training
    and when the model is asked. An example without any trained text gets an empty mask.
    """
    flat = iter(_token_ids(tokenizer, [piece.text for pieces in batch for piece in pieces]))
    for pieces in batch:
        ids = _bos(tokenizer, pieces[0].text if pieces else "")
        mask = [0] * len(ids)
        for piece in pieces:
            tokens = next(flat)
            ids += tokens
            mask += [int(piece.trained)] * len(tokens)
        if all(piece.trained for piece in pieces):
            mask = [1] * len(ids)
        if any(piece.trained and piece.text for piece in pieces):
            ids, mask = _with_eos(ids, mask, pieces, tokenizer)
        else:
            mask = [0] * len(ids)
        yield ids, mask


def _with_eos(
    ids: list[int],
    mask: list[int],
    pieces: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
    """End the example with eos, unless the text does so by itself or goes on after it."""
    eos = tokenizer.eos_token_id
    last = max(index for index, value in enumerate(mask) if value) if any(mask) else -1
    ended = last >= 0 and ids[last] == eos
    if eos is None or ended or not pieces[-1].trained:
        return ids, mask
    return [*ids, int(eos)], [*mask, 1]


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return [bos], or nothing where there is none or the text starts with it."""
    if tokenizer.bos_token_id is None or text.startswith(str(tokenizer.bos_token)):
        return []
    return [int(tokenizer.bos_token_id)]
