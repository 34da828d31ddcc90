"""What is shown of data before a run, as objectives read them: `quantadapt data`, the studio."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.data.looking import Shown
from quantadapt.objectives.surveying import looked_at
from quantadapt.planning.stage import task_for
from quantadapt.registry import registry
from quantadapt.studio.form import Form
from quantadapt.studio.looking import data_html

PAIR = {"prompt": "Say a colour.\n", "chosen": "Red.", "rejected": "Four."}
FILES: dict[str, list[dict[str, Any]]] = {
    "pairs": [PAIR, {"prompt": "Same?\n", "chosen": "Yes.", "rejected": "Yes."}],
    "turns": [
        {"prompt": [{"role": "user", "content": "Say a colour."}],
         "chosen": [{"role": "assistant", "content": "Red."}],
         "rejected": [{"role": "assistant", "content": "Four."}]},
    ],
    "judged": [{"prompt": "p", "completion": "good", "label": True},
               {"prompt": "p", "completion": "bad", "label": 0}],
    "asked": [{"prompt": "What is 2 + 3?\n", "answer": {"is": "5 <b>"}}],
    "texts": [{"text": "Where is my parcel?", "label": "delivery"}, {"text": "Hi", "label": 7}],
    "words": [{"tokens": ["Anna", "in", "Rome"], "ner_tags": ["person", "o", "place"]}],
    "groups": [{"anchor": "add", "positive": "a + b", "negative_1": "a - b", "negative_2": "a"}],
    "scored": [{"sentence1": "add", "sentence2": "sum", "score": 0.5}],
    "passages": [{"query": "add", "passage": "a + b", "label": 1}],
    "plain": [{"text": "one two three"}],
    "answers": [{"prompt": "p ", "completion": "c"}],
}  # fmt: skip


def seen(
    objective: str, rows: Sequence[Any], folder: Path, tokenizer: Any, **data: Any
) -> tuple[list[Shown], Any]:
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    spec = qa.Spec(objective=objective, data={"path": str(file), **data})
    return looked_at(spec, tokenizer, 5)


def parts(found: Sequence[Shown], tokenizer: Any) -> list[tuple[str, bool, list[str]]]:
    """Return (title, whether to be avoided, what of it is learnt) of each text."""
    return [
        (one.title, one.against, [text for learnt, text in one.stretches(tokenizer) if learnt])
        for one in found
    ]


READ = {
    ("sft", "answers"): [("", False, ["c</s>"])],
    ("distill", "answers"): [("", False, ["c</s>"])],
    ("pretrain", "answers"): [("", False, ["<s>p c</s>"])],
    ("pretrain", "plain"): [("", False, ["<s>one two three</s>"])],
    **{
        (objective, "pairs"): [("chosen", False, ["Red.</s>"]), ("rejected", True, ["Four.</s>"])]
        for objective in ("dpo", "orpo", "simpo", "reward")
    },
    ("kto", "pairs"): [
        ("desirable", False, ["Red.</s>"]),
        ("undesirable", True, ["Four.</s>"]),
        ("desirable", False, ["Yes.</s>"]),
        ("undesirable", True, ["Yes.</s>"]),
    ],
    ("kto", "judged"): [("desirable", False, ["good</s>"]), ("undesirable", True, ["bad</s>"])],
    ("grpo", "asked"): [("prompt", False, [])],
    ("rloo", "answers"): [("prompt", False, [])],
    ("classify", "texts"): [("", False, []), ("", False, [])],
    ("embed", "groups"): [(t, False, []) for t in ("anchor", "positive", "negative", "negative")],
    ("embed", "scored"): [("sentence1", False, []), ("sentence2", False, [])],
    ("rerank", "passages"): [("", False, [])],
    ("rerank", "groups"): [("", False, [])] * 3,
}


@pytest.mark.parametrize(("objective", "kind"), READ, ids=map("-".join, READ))
def test_what_is_learnt_is_that_of_the_objective(objective, kind, tmp_path, tokenizer) -> None:
    found, report = seen(objective, FILES[kind], tmp_path, tokenizer)
    assert parts(found, tokenizer) == READ[objective, kind]
    assert all(one.where == f"{tmp_path / 'data.jsonl'}:{1 + n}" for n, one in enumerate(found)
               if kind == "judged")  # fmt: skip
    assert sum(file.rows for file in report.files) == len(FILES[kind])
    learnt = sum(sum(one.mask) for one in found)
    assert sum(file.learnt for file in report.files) == learnt
    assert sum(file.tokens for file in report.files) == sum(len(one.ids) for one in found)
    assert (" of them learnt" in report.words()[0]) == (learnt > 0)
    if (objective, kind) == ("dpo", "pairs"):
        assert report.files[0].dropped == {"with equal answers": 1}


def test_all_objectives_are_looked_at() -> None:
    names = {record.name for record in registry().records(qa.Objective)}
    assert names - {objective for objective, _ in READ} == {"classify-tokens"}  # below


def test_labels_scores_and_what_functions_get_are_told(tmp_path, tokenizer) -> None:
    def notes(objective: str, kind: str) -> list[str]:
        return [one.words for one in seen(objective, FILES[kind], tmp_path, tokenizer)[0]]

    assert [words.split(", ")[-1] for words in notes("classify", "texts")] == [
        "label delivery",
        "label 7",
    ]
    (words,) = notes("classify-tokens", "words")
    assert words.endswith(", 3 of them learnt, labels Anna = person, in = o, Rome = place")
    assert notes("embed", "scored")[0].endswith(", score 0.5")
    assert notes("rerank", "passages")[0].endswith(", score 1")
    assert notes("grpo", "asked")[0].endswith('reward functions get {"answer": {"is": "5 <b>"}}')
    assert notes("rloo", "answers")[0].endswith('reward functions get {"reference": "c"}')
    assert notes("dpo", "pairs")[1].endswith("of them to be avoided")


def test_a_prompt_that_asks_nothing_is_dropped(tmp_path, tokenizer) -> None:
    rows = [{"prompt": text} for text in ("", " \n", "?")]
    found, report = seen("grpo", rows, tmp_path, tokenizer)
    assert [one.where for one in found] == [f"{tmp_path / 'data.jsonl'}:3"]
    assert report.files[0].dropped == {"with an empty prompt": 2}
    assert found[0].words == "2 tokens"  # with the one that begins a text


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        ("dpo", {"prompt": "p", "chosen": "word " * 40, "rejected": "other " * 40}),
        ("kto", {"prompt": "p", "completion": "word " * 40, "label": 1}),
        ("classify", {"text": "word " * 40, "label": "a"}),
        ("embed", {"anchor": "word " * 40, "positive": "other " * 40}),
        ("rerank", {"query": "word " * 20, "passage": "other " * 20, "label": 1}),
        ("sft", {"prompt": "p", "completion": "word " * 40}),
    ],
)
def test_what_is_cut_is_told(objective, row, tmp_path, tokenizer) -> None:
    """Kept and cut tokens together are those of the same data with room for all."""
    whole, _ = seen(objective, [row], tmp_path, tokenizer)
    found, report = seen(objective, [row], tmp_path, tokenizer, max_length=16)
    assert report.files[0].cut == 1
    for one, other in zip(found, whole, strict=True):
        assert not other.cut
        assert len(one.ids) + one.cut == len(other.ids)
        assert len(one.ids) == len(one.mask) == 16


@pytest.mark.parametrize(
    ("objective", "named", "kind"),
    [("dpo", "dpo", "pairs"), ("reward", "dpo", "pairs"), ("kto", "kto", "judged"),
     ("classify", "classify", "texts"), ("embed", "embed", "scored"), ("sft", "", "answers"),
     ("rerank", "rerank", "passages"), ("grpo", "grpo", "asked")],
)  # fmt: skip
def test_a_warning_names_the_command_that_shows_such_data(
    objective, named, kind, tmp_path, tokenizer, say
) -> None:
    """Of rows the second one is left out; the command reads the file."""
    rows = [{name: value * 90 if isinstance(value, str) else value for name, value in row.items()}
            for row in FILES[kind]]  # fmt: skip
    kept = [*FILES[kind] * 4, *rows] if kind != "passages" else [
        {**FILES[kind][0], "query": f"q{n}", "label": n % 2} for n in range(4)] + rows  # fmt: skip
    kept = [{**row, "score": n / 9} if "score" in row else row for n, row in enumerate(kept)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, kept)))
    spec = qa.Spec(objective=objective, data={"path": str(file), "eval_path": str(file),
                                              "max_length": 24})  # fmt: skip
    with pytest.warns(qa.DataWarning) as warned:
        task_for(spec).read(spec.data, tokenizer, seed=0)
    (command,) = {re.findall("`quantadapt (.*?)`", str(one.message))[0] for one in warned}
    assert command == f"data {file}{' --objective ' * bool(named)}{named}"
    assert "tokens" in say(*command.split())


def test_long_text_goes_on_in_further_rows(tmp_path, tokenizer) -> None:
    (one,), report = seen("pretrain", [{"text": "word " * 40}], tmp_path, tokenizer, max_length=16)
    whole = len(tokenizer("word " * 40)["input_ids"]) + 1
    assert (len(one.ids), one.cut, one.note) == (16, 0, f"{whole - 16} more in further rows")
    assert report.files[0].tokens == whole


@pytest.fixture
def say(capsys: Any) -> Any:
    def call(*arguments: Any, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.err
        return str(shown.out) if "--json" in arguments else str(shown.out + shown.err)

    return call


def test_the_command_reads_as_the_objective_does(tmp_path, say) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIR))
    lines = say("data", file, "--objective", "dpo").splitlines()
    assert lines[0].startswith(f"{file}:1 chosen   ")
    assert "  learnt | Red.</s>" in lines
    assert "  avoid  | Four.</s>" in lines
    one, other = json.loads(say("data", file, "--objective", "dpo", "--json"))["examples"]
    assert (one["title"], one["avoid"]) == ("chosen", False)
    assert (other["title"], other["avoid"]) == ("rejected", True)
    assert "set --objective dpo" in say("data", file, code=1)
    told = say("data", file, "--objective", "dop", code=2)
    assert "did you mean 'dpo'?" in told
    told = say("data", file, "--objective", "classify", code=1)
    assert "no column 'text'" in told
    assert "--column" in told


def test_the_studio_reads_as_the_objective_of_the_form_does(tmp_path) -> None:
    pasted = json.dumps({**PAIR, "rejected": "<script>alert(1)</script>"})
    page = data_html(Form(tmp_path, objective="dpo", pasted=pasted))
    assert '<span class="learnt">Red.&lt;/s&gt;</span>' in page
    assert '<span class="avoid">&lt;script&gt;alert(1)' in page
    assert "to be avoided" in page
    assert "<script" not in page
    assert "objective: dpo" in data_html(Form(tmp_path, pasted=pasted))
    page = data_html(Form(tmp_path, objective="classify"))
    assert "Nothing of the text itself is learnt" in page
    lines = (demo.LABELLED / "sequence" / "train.jsonl").read_text().splitlines()[:4]
    labels = {json.loads(line)["label"] for line in lines}
    assert all(f"label {label}" in page for label in labels)
    page = data_html(Form(tmp_path, pasted=pasted, more="objective=dpo\nobjective.beta=0.2"))
    assert 'class="avoid"' in page
