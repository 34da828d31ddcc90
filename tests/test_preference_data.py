"""Pairs of a chosen and a rejected answer: read, tokenized, cut, dropped and refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.data.preferences import load_preferences
from quantadapt.data.reading import read_held_out
from quantadapt.errors import DataError, PlanRefused


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@cache
def without_template() -> Any:
    found = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    found.chat_template = None
    return found


ROW = {"prompt": "Name a colour.\n", "chosen": "It is red.", "rejected": "No."}


def written(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(file: Path, *, known: Any = None, **data: Any) -> Any:
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file)} | data).data
    return load_preferences(spec, known or without_template(), seed=0)


def shown(row: dict[str, Any], known: Any = None) -> list[tuple[str, str]]:
    """Return (prompt, what is learnt) of both answers, as text."""
    known, found = known or without_template(), []
    for ids, mask in (("input_ids", "completion_mask"), ("rejected_ids", "rejected_mask")):
        parts = (
            [i for i, m in zip(row[ids], row[mask], strict=True) if m == kept] for kept in (0, 1)
        )
        found.append(
            tuple(known.decode(part, clean_up_tokenization_spaces=False) for part in parts)
        )
    return found


def ids(text: str) -> list[int]:
    return without_template()(text, add_special_tokens=False)["input_ids"]


def test_prompt_and_answers_are_tokenized_as_for_sft(tmp_path) -> None:
    known = without_template()
    (row,) = read(written(tmp_path, [ROW])).train
    opening = known("x")["input_ids"][: -len(ids("x"))]
    prompt, eos = [*opening, *ids(ROW["prompt"])], known.eos_token_id
    assert row["input_ids"] == [*prompt, *ids(ROW["chosen"]), eos]
    assert row["rejected_ids"] == [*prompt, *ids(ROW["rejected"]), eos]
    assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(ids(ROW["chosen"])) + 1)
    assert row["rejected_mask"] == [0] * len(prompt) + [1] * (len(ids(ROW["rejected"])) + 1)


HUMAN, YES, NO = "\n\nHuman: Is it red?", "\n\nAssistant: Yes, it is.", "\n\nAssistant: Yes, no."


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        (HUMAN + YES, HUMAN + NO, HUMAN + "\n\nAssistant:", (" Yes, it is.", " Yes, no.")),
        ("Q: 2?\nA: two", "Q: 2?\nA: twelve", "Q: 2?\nA: ", ("two", "twelve")),
        ("one\ntwo", "one\nthree", "one\n", ("two", "three")),
    ],
)
def test_without_a_prompt_it_is_what_both_texts_begin_with(
    tmp_path, chosen, rejected, prompt, answers
) -> None:
    rows = [{"chosen": chosen, "rejected": rejected}]
    found = shown(read(written(tmp_path, rows)).train[0])
    eos = without_template().eos_token
    assert [learnt for _, learnt in found] == [f"{answer}{eos}" for answer in answers]
    assert all(before.endswith(prompt) for before, _ in found)


USER = {"role": "user", "content": "Is it red?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("It is.", "Go away."))
ASKED = {"prompt": [USER]}
SYSTEM = {"role": "system", "content": "Be kind."}
CHATS = {
    "prompt and answers": {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
    "no prompt": {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "whole chats beside a text": {
        "prompt": USER["content"],
        "chosen": [SYSTEM, USER, GOOD],
        "rejected": [SYSTEM, USER, BAD],
    },
    "answers as texts": {
        "prompt": [SYSTEM, USER],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
}


@pytest.mark.parametrize("kind", CHATS)
def test_all_forms_of_a_chat_are_one(tmp_path, kind) -> None:
    """Against what the tokenizer's own template writes."""
    known = tokenizer()
    (row,) = read(written(tmp_path, [CHATS[kind]]), known=known).train
    asked = known.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False)
    for answer, (before, learnt) in zip((GOOD, BAD), shown(row, known), strict=True):
        whole = known.apply_chat_template([SYSTEM, USER, answer], tokenize=False)
        assert before.startswith(asked)
        assert whole.startswith(asked + learnt)
        assert answer["content"] in learnt
        assert answer["content"] not in before


def test_a_text_before_answers_of_the_assistant_is_the_turn_of_a_user(tmp_path) -> None:
    rows = [{"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]}]
    others = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    one = read(written(tmp_path, rows, "one.jsonl"), known=tokenizer()).train[0]
    assert one == read(written(tmp_path, others, "other.jsonl"), known=tokenizer()).train[0]


def test_columns_may_have_other_names(tmp_path) -> None:
    rows = [{"q": ROW["prompt"], "better": ROW["chosen"], "worse": ROW["rejected"], "score": 3}]
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    found = read(written(tmp_path, rows), columns=columns)
    assert found.train[0] == read(written(tmp_path, [ROW], "same.jsonl")).train[0]
    assert "columns that preference does not know: score" in found.report.words()[0]


def test_csv_is_read_too(tmp_path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text('prompt,chosen,rejected\n"Name a colour.\n",It is red.,No.\n')
    assert read(file).train[0] == read(written(tmp_path, [ROW])).train[0]


# --- cut, dropped, refused -----------------------------------------------------------------------


def test_what_is_cut_and_dropped_is_told(tmp_path) -> None:
    long = "word " * 40
    rows = [
        ROW,
        {**ROW, "chosen": long},  # cut
        {**ROW, "prompt": long},  # nothing of the answers is left
        {**ROW, "rejected": ROW["chosen"]},
        {**ROW, "chosen": long, "rejected": f"{long} more"},  # equal once cut
        {**ROW, "rejected": ""},
    ]
    with pytest.warns(qa.DataWarning, match="cut or dropped"):
        found = read(written(tmp_path, rows), max_length=24)
    (report,) = found.report.files
    assert len(found.train) == len(found.eval) == 2
    assert (report.examples, report.cut) == (4, 2)
    assert dict(report.dropped) == {
        "with nothing to learn within 24 tokens": 2,
        "with equal answers": 2,
        "with answers that are equal within 24 tokens": 2,
        "with an empty answer": 2,
    }
    assert max(map(len, found.train["input_ids"])) == 24
    first = found.train[0]
    assert report.tokens >= 2 * (len(first["input_ids"]) + len(first["rejected_ids"]))


def test_nothing_left_is_refused(tmp_path) -> None:
    rows = [{**ROW, "rejected": ROW["chosen"]}] * 3
    with pytest.raises(DataError, match="no pair is left: 3 dropped \\(3 with equal answers\\)"):
        read(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "2: the column 'rejected' is missing"),
        ({**ROW, "chosen": 3}, "2: 'chosen' is a number, expected text"),
        ({**ROW, "chosen": None}, "2: 'chosen' is null, expected text"),
        ({**ROW, "prompt": 1}, "2: 'prompt' is a number, expected text"),
        ({**ROW, "chosen": [GOOD]}, "2: 'chosen' is a list and 'rejected' text"),
        ({**ASKED, "chosen": ["hi"], "rejected": [BAD]}, "2: turn 2 of 'messages' is text"),
        ({**ASKED, "chosen": [{"content": "x"}], "rejected": [BAD]}, "2: 'role' of turn 2"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_refused_with_its_line(tmp_path, row, says) -> None:
    with pytest.raises(DataError, match=f"pairs.jsonl:{says}"):
        read(written(tmp_path, [ROW, row]), known=tokenizer())


def test_a_chat_whose_answer_is_no_turn_of_the_assistant_is_dropped(tmp_path) -> None:
    rows = [ROW, {"prompt": [USER], "chosen": [USER], "rejected": [BAD]}]
    with pytest.warns(qa.DataWarning, match="with no turn of the assistant"):
        assert len(read(written(tmp_path, rows), known=tokenizer()).train) == 1


def asked(text: str, *more: Any) -> list[Any]:
    return [{"role": "user", "content": text}, *more]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": asked("a", GOOD), "rejected": asked("b", BAD)},
        {"chosen": asked("a", GOOD, *asked("c", GOOD)), "rejected": asked("b", BAD)},
        {"prompt": asked("a", GOOD), "chosen": asked("c", GOOD), "rejected": asked("d", BAD)},
    ],
    ids=["first turn", "later turns", "after the prompt"],
)
def test_answers_to_different_prompts_are_no_pair(row, tmp_path) -> None:
    with pytest.warns(qa.DataWarning, match="2 with answers to different prompts"):
        assert len(read(written(tmp_path, [ROW, row]), known=tokenizer()).train) == 1


def test_chats_may_go_on_differently_after_the_first_answer(tmp_path) -> None:
    row = {"chosen": asked("a", GOOD, *asked("c", GOOD)), "rejected": asked("a", BAD)}
    assert len(read(written(tmp_path, [row]), known=tokenizer()).train) == 1


def test_a_prompt_beside_whole_chats_stands_there_once(tmp_path) -> None:
    whole = {"chosen": asked("a", GOOD), "rejected": asked("a", BAD)}
    rows = [{"prompt": asked("a"), **whole}, whole]
    one, other = read(written(tmp_path, rows), known=tokenizer()).train
    assert one == other


def test_texts_with_no_prompt_or_with_two_are_told(tmp_path) -> None:
    repeats = {"prompt": "Say.", "chosen": "Say. Yes.", "rejected": "Say. No."}
    found = read(written(tmp_path, [{"chosen": "Yes.", "rejected": "No."}, repeats, ROW]))
    assert found.report.files[0].remarks == {
        "pairs have no prompt, as their answers begin differently": 2,  # learnt, and held out
        "pairs repeat the prompt in both answers, so that it stands there twice": 2,
    }


def test_a_held_out_part_of_which_nothing_is_left_is_told_as_that(tmp_path) -> None:
    equal = written(tmp_path, [{**ROW, "rejected": ROW["chosen"]}], "held_out.jsonl")
    says = "(?s)no pair is left of what is held out, and 2 to learn from: .*data.eval_path"
    with pytest.raises(DataError, match=says):
        read(written(tmp_path, [ROW, ROW]), eval_path=str(equal))


def test_missing_columns_are_refused_by_the_plan(tmp_path, capsys) -> None:
    file = written(tmp_path, [{"text": "a"}])
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--data", str(file), "--backend", "none", "--set", "objective=dpo"])
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "no column 'chosen', 'rejected', found 'text'" in told
    assert "data.columns, e.g. {chosen: better, rejected: worse}" in told


def test_a_format_of_texts_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="'alpaca' is no format of pairs"):
        read(written(tmp_path, [ROW]), format="alpaca")


def test_sft_says_which_objective_learns_pairs(tmp_path) -> None:
    file = written(tmp_path, [ROW, ROW])
    with pytest.raises(DataError, match=r"chosen.*rejected[^\n]*\n?.*set objective: dpo"):
        qa.SFT().read(qa.Spec(data=str(file)).data, without_template(), seed=0)


def test_pairs_are_recognized_where_a_model_is_measured(tmp_path) -> None:
    file = written(tmp_path, [ROW])
    found = read_held_out(str(file), without_template())
    assert found.examples[0] == read(file).train[0]
    assert [prompt.reference for prompt in found.prompts] == [ROW["chosen"]]


def test_without_data_the_bundled_pairs_are_read() -> None:
    data = load_preferences(qa.Spec().data, without_template(), seed=0)
    assert (len(data.train), len(data.eval)) == (128, 32)
    assert (data.cut, data.dropped) == (0, 0)


def test_a_share_is_held_out_whole(tmp_path) -> None:
    rows = [{**ROW, "prompt": f"Name colour {i}.\n"} for i in range(20)]
    spec = qa.Spec(data={"path": str(written(tmp_path, rows)), "eval_fraction": 0.25}).data
    data = load_preferences(spec, without_template(), seed=0)
    assert (len(data.train), len(data.eval)) == (15, 5)
    texts = {shown(row)[0][0] for row in data.train} & {shown(row)[0][0] for row in data.eval}
    assert not texts


# --- planned -------------------------------------------------------------------------------------


def refusal(**values: Any) -> str:
    with pytest.raises(PlanRefused) as error:
        qa.plan(qa.Spec(backend="none", **values), check_output=False)
    return str(error.value)


def test_what_does_not_go_with_pairs_is_refused() -> None:
    assert "leave train.packing out" in refusal(objective="dpo", train={"packing": True})
    assert "task-loss-adalora" in refusal(objective="dpo", adapter="adalora")
    wrong = {"name": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}
    assert "loss_type ipo has no label_smoothing" in refusal(objective=wrong)
    assert "use one of 'sigmoid'" in refusal(objective={"name": "dpo", "loss_type": "kl"})
    assert "beta" in refusal(objective={"name": "dpo", "beta": 0})


@pytest.mark.parametrize("key", ["is_encoder_decoder", "output_router_logits"])
def test_a_model_that_does_not_learn_pairs_is_refused(tmp_path, key) -> None:
    config = json.loads((demo.MODEL_DIR / "config.json").read_text()) | {key: True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanRefused, match=r"pairs-(encoder-decoder|routers)"):
        qa.plan(qa.Spec(model=str(tmp_path), backend="none", objective="dpo"), weights=False)


def test_preferences_are_measured_where_nobody_says_otherwise() -> None:
    def names(**values: Any) -> list[str]:
        made = qa.plan(qa.Spec(backend="none", objective="dpo", **values), check_output=False)
        return list(made.evaluators)

    assert names() == names(evaluate={"samples": 0}) == ["preferences"]
    assert names(evaluate={"evaluations": ["perplexity"]}) == ["perplexity"]
