"""Reading data: every format, the same tokens for prompt and training, errors with their line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from quantadapt.data.reading import load_data, load_everything, load_held_out
from quantadapt.data.tokens import encode_prompt
from quantadapt.demo import EVAL_FILE, TRAIN_FILE
from quantadapt.errors import DataError
from quantadapt.spec import DataSpec

PAIRS = [{"prompt": f"say {n}: ", "completion": f"word{n}"} for n in range(20)]


@pytest.fixture
def plain(tokenizer):
    """The same tokenizer without its chat template."""
    template, tokenizer.chat_template = tokenizer.chat_template, None
    yield tokenizer
    tokenizer.chat_template = template


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(path: Path, records: list) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def load(path: str, tokenizer, **options):
    return load_data(DataSpec(path=path, **options), tokenizer, seed=0)


def trained(example, tokenizer) -> str:
    pairs = zip(example["input_ids"], example["completion_mask"], strict=True)
    return tokenizer.decode([token for token, counts in pairs if counts])


def test_the_demo_is_read_when_no_path_is_given(tokenizer):
    data = load_data(DataSpec(max_examples=30), tokenizer, seed=0)
    assert data.format == "alpaca"
    assert len(data.train) == 30
    assert len(data.eval) == len(EVAL_FILE.read_text().splitlines())
    first = json.loads(TRAIN_FILE.read_text().splitlines()[0])
    assert trained(data.train[0], tokenizer) == first["output"] + tokenizer.eos_token
    assert data.train[0]["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_tokens(kind, tmp_path, tokenizer):
    path = tmp_path / f"data.{kind}"
    table = datasets.Dataset.from_list(PAIRS)
    if kind == "jsonl":
        lines(path, PAIRS)
    elif kind == "json":
        write(path, json.dumps(PAIRS, indent=1))
    elif kind == "csv":
        table.to_csv(str(path), index=False)
    else:
        table.to_parquet(str(path))
    data = load(str(path), tokenizer, eval_fraction=0.1)
    assert (len(data.train), len(data.eval), data.format) == (18, 2, "prompt-completion")
    reference = load(lines(tmp_path / "other.jsonl", PAIRS), tokenizer, eval_fraction=0.1)
    assert data.train.to_list() == reference.train.to_list()


def test_a_prompt_has_the_tokens_that_it_has_in_training(tmp_path, tokenizer):
    data = load(lines(tmp_path / "a.jsonl", PAIRS), tokenizer)
    ids = encode_prompt(tokenizer, data.prompts[0].text)
    example = data.eval[0]
    assert example["input_ids"][: len(ids)] == ids
    assert sum(example["completion_mask"][: len(ids)]) == 0
    assert all(example["completion_mask"][len(ids) :])
    assert trained(example, tokenizer) == data.prompts[0].reference + tokenizer.eos_token


def test_alpaca_prompts_are_laid_out_as_documented(tmp_path, tokenizer):
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    path = lines(tmp_path / "a.jsonl", [record, record, {**record, "input": ""}])
    texts = [tokenizer.decode(row["input_ids"]) for row in load(path, tokenizer).train]
    head = f"{tokenizer.bos_token}### Instruction:\nAdd.\n\n"
    tail = f"### Response:\n3{tokenizer.eos_token}"
    assert set(texts) <= {f"{head}### Input:\n1 2\n\n{tail}", f"{head}{tail}"}
    assert f"{head}### Input:\n1 2\n\n{tail}" in texts


def test_text_is_learnt_whole_and_paragraphs_are_examples(tmp_path, tokenizer):
    text = "first one\nof two lines\n\n\nsecond\n\nthird\n"
    data = load(write(tmp_path / "a.txt", text), tokenizer)
    rows = [*data.train, *data.eval]
    assert sorted(tokenizer.decode(row["input_ids"][1:-1]) for row in rows) == [
        "first one\nof two lines",
        "second",
        "third",
    ]
    assert all(all(row["completion_mask"]) for row in rows)
    by_line = load(write(tmp_path / "b.txt", "one\ntwo\nthree\n"), tokenizer)
    assert len(by_line.train) + len(by_line.eval) == 3


CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
}


def test_chat_counts_every_turn_of_the_assistant(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [CHAT, CHAT])
    data = load(path, tokenizer)
    eos = tokenizer.eos_token
    assert trained(data.train[0], tokenizer) == f"Hello{eos}So long{eos}"
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(data.train[0]["input_ids"]) == whole
    assert data.prompts[0].text.endswith("Bye\n\n### Response:\n")
    assert data.prompts[0].reference == "So long"


def test_chat_works_without_a_template(tmp_path, plain):
    data = load(lines(tmp_path / "a.jsonl", [CHAT, CHAT]), plain)
    eos = plain.eos_token
    assert trained(data.train[0], plain) == f"Hello{eos}So long{eos}"


def turns(*contents: str, first: str = "user") -> dict:
    roles = ["assistant", "user"] if first == "assistant" else ["user", "assistant"]
    return {
        "messages": [
            {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
        ]
    }


@pytest.mark.parametrize("template", [True, False])
def test_a_chats_prompt_has_the_tokens_that_it_has_in_training(
    template, tmp_path, tokenizer, monkeypatch
):
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    path = lines(tmp_path / "a.jsonl", [turns("\n\nHi", "Hello", "Bye", "So long")] * 2)
    data = load(path, tokenizer)
    ids, mask = data.eval[0].values()
    start = max(index for index, counts in enumerate(mask) if not counts and any(mask[index:]))
    assert encode_prompt(tokenizer, data.prompts[0]) == ids[: start + 1]


def test_an_empty_answer_is_no_prompt(tmp_path, plain):
    held_out = lines(tmp_path / "b.jsonl", [turns("Hi", ""), turns("Hi", "Hello")])
    path = lines(tmp_path / "a.jsonl", [CHAT, CHAT])
    data = load(path, plain, eval_path=held_out)
    assert [prompt.reference for prompt in data.prompts] == ["Hello"]
    assert (len(data.eval), data.dropped) == (1, 1)


def test_an_assistant_may_open_the_chat(tmp_path, tokenizer):
    eos = tokenizer.eos_token
    path = lines(tmp_path / "a.jsonl", [turns("Welcome", "Hi", "Hello", first="assistant")] * 2)
    data = load(path, tokenizer)
    assert trained(data.train[0], tokenizer) == f"Hello{eos}"
    assert "Welcome" in data.prompts[0].text
    path = lines(tmp_path / "b.jsonl", [turns("Welcome", first="assistant")] * 2)
    assert trained(load(path, tokenizer).train[0], tokenizer).endswith(f"Welcome{eos}")


def test_a_template_that_rewrites_earlier_turns_counts_the_last_one(tmp_path, tokenizer):
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    try:
        data = load(lines(tmp_path / "a.jsonl", [CHAT, CHAT]), tokenizer)
        assert trained(data.train[0], tokenizer).startswith("So long")
        assert "Hello" not in tokenizer.decode(data.train[0]["input_ids"])
    finally:
        tokenizer.chat_template = template


def test_long_examples_are_cut_or_dropped_and_counted(tmp_path, tokenizer):
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "word " * 100},
        {"prompt": "word " * 100, "completion": "b"},
        {"prompt": "a", "completion": ""},
    ]
    held_out = lines(tmp_path / "b.jsonl", records[:1])
    path = lines(tmp_path / "a.jsonl", records)
    data = load(path, tokenizer, max_length=16, eval_path=held_out)
    assert (data.cut, data.dropped) == (1, 2)
    assert sorted(map(len, data.train["input_ids"]))[-1] == 16
    assert sum(data.train[1]["completion_mask"]) == 16 - 2  # bos and the prompt


def test_the_split_depends_on_the_seed_alone(tmp_path, tokenizer):
    spec = DataSpec(path=lines(tmp_path / "a.jsonl", PAIRS), eval_fraction=0.2)
    one, again, other = (load_data(spec, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert one.eval.to_list() == again.eval.to_list() != other.eval.to_list()
    assert not {p.text for p in one.prompts} & {tokenizer.decode(i) for i in one.train["input_ids"]}
    assert len(one.eval) == 4


def test_runs_of_other_seeds_are_measured_on_the_same_examples_if_they_say_so(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", PAIRS)
    spec = DataSpec(path=path, eval_fraction=0.2, split_seed=7)
    as_seven = load_data(DataSpec(path=path, eval_fraction=0.2), tokenizer, seed=7)
    for seed in (0, 1):
        data = load_data(spec, tokenizer, seed=seed)
        assert data.eval.to_list() == as_seven.eval.to_list()
        assert data.train.to_list() == as_seven.train.to_list()


def test_a_folder_keeps_its_held_out_file(tmp_path, tokenizer):
    for name, part in (("a", PAIRS[:5]), ("b", PAIRS[5:9]), ("test", PAIRS[9:12])):
        lines(tmp_path / f"{name}.jsonl", part)
    write(tmp_path / "README.md", "not data")
    data = load(str(tmp_path), tokenizer)
    assert (len(data.train), len(data.eval)) == (9, 3)


def test_one_part_alone_is_read_whole(tmp_path, tokenizer):
    train = lines(tmp_path / "train.jsonl", PAIRS[:5])
    lines(tmp_path / "test.jsonl", PAIRS[5:8])
    for source, held_out in ((str(tmp_path), PAIRS[5:8]), (train, PAIRS[:5])):
        found = [trained(row, tokenizer) for row in load_held_out(source, tokenizer)]
        assert found == [pair["completion"] + tokenizer.eos_token for pair in held_out]
        assert len(load_everything(source, tokenizer)) == 5
    assert len(load_held_out(None, tokenizer)) == len(EVAL_FILE.read_text().splitlines())


def test_eval_path_is_taken_whole(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", PAIRS[:15])
    held_out = lines(tmp_path / "b.jsonl", PAIRS[15:])
    data = load(path, tokenizer, eval_path=held_out, max_examples=10)
    assert (len(data.train), len(data.eval)) == (10, 5)


def test_the_hub_is_asked_for_ids_only(monkeypatch, tokenizer):
    splits = {"train": PAIRS[:10], "validation": PAIRS[10:13]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    data = load("owner/name", tokenizer)
    assert (len(data.train), len(data.eval)) == (10, 3)

    def fail(name):
        raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="not readable from the hub: offline\n    fix: give"):
        load("owner/name", tokenizer)
    with pytest.raises(DataError, match="no such file"):
        load("missing.jsonl", tokenizer)


BAD = [
    ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
    ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: expected an object .* found a list"),
    ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2: 'text' is a number, expected text"),
    ("a.jsonl", '{"text": "x"}\n{"t": "x"}\n', r"a\.jsonl:2: the column 'text' is missing"),
    ("a.jsonl", '{"text": "x"}\n{"text": null}\n', r"'text' is null"),
    ("a.jsonl", '{"q": "x", "a": 1}\n' * 2, r"no known columns, found 'q', 'a'"),
    ("a.jsonl", '{"text": "\\ud800"}\n' * 2, r"a\.jsonl:1: .*surrogate"),
    ("a.jsonl", '{"text": "x"}\n', r"only one example"),
    ("a.jsonl", "\n\n", r"no examples"),
    ("a.json", '[{"text": "x"},\n{"text" "y"}]', r"a\.json:2: not valid JSON"),
    ("a.json", '{\n"text": "x"\n}', r"expected a list of objects"),
    ("a.csv", 'text,b\nx,1\n"y\n', r"a\.csv:3: not valid CSV"),
    ("a.csv", "text,b\nx,1\ny\n", r"a\.csv:3: the row does not have the 2 columns"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 text: byte 0xff"),
    ("a.txt", b"\x00\x01\x02", r"a\.txt:1: this is binary data"),
    ("a.parquet", b"garbage", r"not a readable Parquet file"),
    ("a.bin", b"garbage", r"files ending in '.bin' cannot be read"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n' * 2, r"no turn of the assis"),
    ("a.jsonl", '{"messages": ["x"]}\n' * 2, r"turn 1 of 'messages' is text"),
    ("a.jsonl", '{"prompt": "a", "completion": ""}\n' * 2, r"no example is left"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_data_is_named_with_file_and_line(name, content, message, tmp_path, tokenizer):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load(str(path), tokenizer)
    assert str(tmp_path) in str(caught.value)


def problems_of(path: str, tokenizer, **options) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, **options)
    return [(problem.where, problem.what) for problem in caught.value.problems]


def test_all_lines_that_cannot_be_read_are_told_at_once(tmp_path, tokenizer):
    good, cut = b'{"text": "x"}', b'{"text": '
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, cut, b"[1]", b'{"text": "\xff"}', good, cut, *[cut] * 7]))
    of_json, of_kind, of_text = problems_of(str(path), tokenizer)
    assert of_json[0] == f"{path}:2"
    assert of_json[1].endswith("(column 10); likewise at 6, 7, 8, 9, 10 and 3 more")
    assert of_kind == (f"{path}:3", "expected an object with named columns, found a list")
    assert of_text == (f"{path}:4", "not UTF-8 text: byte 0xff at column 11")
    table = write(tmp_path / "a.csv", "text,b\nx,1\ny\nx,1\nz,1,2\n")
    (row,) = problems_of(table, tokenizer)
    assert row[0] == f"{table}:3"
    assert row[1].endswith("; likewise at 5")
    items = write(tmp_path / "a.json", '[{"text": "x"}, 1, {"text": "x"}, 2]')
    assert [what for _, what in problems_of(items, tokenizer)] == [
        "expected an object with named columns, found a number; likewise at item 4"
    ]


def test_where_no_example_is_left_that_is_told_once(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    ((_, what),) = problems_of(path, tokenizer)
    assert what == "no example is left: 2 dropped (2 with an empty answer)"


def test_files_that_cannot_be_read_are_told_at_once(tmp_path, tokenizer):
    for name in ("a", "b", "test"):
        write(tmp_path / f"{name}.jsonl", '{"text": "x"}\n{"text": \n')
    found = problems_of(str(tmp_path), tokenizer, eval_path="./nowhere.jsonl")
    assert [where.removeprefix(f"{tmp_path}/") for where, _ in found] == [
        "a.jsonl:2", "b.jsonl:2", "test.jsonl:2", "./nowhere.jsonl",
    ]  # fmt: skip
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(14):
        write(folder / f"{number:02d}.jsonl", "{\n")
    with pytest.raises(DataError) as caught:
        load(str(folder), tokenizer)
    assert len(caught.value.problems) == 14
    assert str(caught.value).count("not valid JSON") == 12
    assert str(caught.value).endswith("\n  and 2 more")


@pytest.mark.parametrize("kind", ["columns", "turns"])
def test_what_is_wrong_with_held_out_rows_is_told_beside_the_others(kind, tmp_path, plain):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good, bad = {"messages": turns}, {"messages": [{"role": "usr", "content": "a"}, turns[1]]}
    if kind == "columns":
        good, bad = {"text": "x"}, {"text": 3}
    train = lines(tmp_path / "a.jsonl", [good, bad])
    held_out = lines(tmp_path / "b.jsonl", [good, good, bad])
    found = problems_of(train, plain, eval_path=held_out)
    assert [where for where, _ in found] == [f"{train}:2", f"{held_out}:3"]
    assert found[0][1] == found[1][1]


def test_a_forced_format_wins_over_the_columns(tmp_path, tokenizer):
    record = {"text": "t", "prompt": "p", "completion": "c"}
    path = lines(tmp_path / "a.jsonl", [record, record])
    assert load(path, tokenizer).format == "prompt-completion"
    assert load(path, tokenizer, format="text").format == "text"
