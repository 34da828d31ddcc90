"""Formats and chats: what each file comes to, compared with `apply_chat_template` of the whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from quantadapt.data.reading import load_data, load_everything, load_held_out, look, survey
from quantadapt.data.tokens import encode_prompt
from quantadapt.errors import DataError, DataWarning, SpecError
from quantadapt.spec import DataSpec, Spec

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
)
TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}" + CALLS + "{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REASONING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content or '' }}" + CALLS + "{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Like Qwen3's: the reasoning of turns before the last question is left out."""

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"in": "Rom"}}}
ASK = {"role": "user", "content": "Weather in Rom?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "20 C", "name": "weather"}
ANSWER = {"role": "assistant", "content": "It is 20 C."}


@pytest.fixture
def templated(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the tokenizer with another chat template, or none."""

    def use(template: str | None) -> Any:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return use


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Small files lose large shares; one test looks at the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        yield


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def everything(path: str, tokenizer: Any, **options: Any) -> tuple[list[Any], Any]:
    """Return (ids, mask) of all examples, and the report on the only file."""
    found, report = look(DataSpec(path=path, **options), tokenizer, limit=1000)
    (file,) = report.files
    return [(one.ids, one.mask) for one in found], file


def learnt(example: tuple[list[int], list[int]], tokenizer: Any) -> list[str]:
    """Return the stretches of text that are learnt."""
    ids, mask = example
    starts = [i for i, on in enumerate(mask) if on and (i == 0 or not mask[i - 1])]
    found = []
    for start in starts:
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        found.append(tokenizer.decode(ids[start:end]))
    return found


def texts(path: str, tokenizer: Any, **options: Any) -> list[list[str]]:
    return [learnt(example, tokenizer) for example in everything(path, tokenizer, **options)[0]]


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


# The template -----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, LLAMA3, TOOLS], ids=["chatml", "llama3", "tools"])
def test_a_chat_has_the_tokens_of_its_template(template, tmp_path, templated) -> None:
    tokenizer = templated(template)
    row = {"messages": [{"role": "system", "content": "Be brief."}, *chat(*"abcd")["messages"]]}
    (example,), file = everything(lines(tmp_path / "a.jsonl", [row]), tokenizer)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    assert example[0] == whole
    assert [text[0] for text in learnt(example, tokenizer)] == ["b", "d"]
    assert file.learnt == sum(example[1])
    assert file.tokens == len(whole)


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_bos_is_the_same_in_training_and_asking(template, tmp_path, templated) -> None:
    tokenizer = templated(template)
    data = load_data(
        DataSpec(path=lines(tmp_path / "a.jsonl", [chat("hello", "you")] * 2)), tokenizer, seed=0
    )
    asked = tokenizer.apply_chat_template(
        chat("hello")["messages"], add_generation_prompt=True, return_dict=False
    )
    ids = data.train[0]["input_ids"]
    assert encode_prompt(tokenizer, data.prompts[0]) == asked == ids[: len(asked)]
    assert ids.count(tokenizer.bos_token_id) == (template == LLAMA3)


def test_a_text_begins_as_the_tokenizer_begins_it(tmp_path, tokenizer) -> None:
    from tokenizers import processors

    core = tokenizer.backend_tokenizer
    before = core.post_processor
    path = lines(tmp_path / "a.jsonl", [{"prompt": "say", "completion": "x"}])
    try:
        for opening in ([], [0], [2, 0]):
            names = [tokenizer.convert_ids_to_tokens(i) for i in opening]
            core.post_processor = processors.TemplateProcessing(
                single=[*names, "$A"], special_tokens=list(zip(names, opening, strict=True))
            )
            (example,), _ = everything(path, tokenizer)
            whole = tokenizer("say")["input_ids"]
            assert whole[: len(opening)] == opening
            assert example[0][: len(whole)] == whole == encode_prompt(tokenizer, "say")
    finally:
        core.post_processor = before


def with_spaces(scheme: str) -> Any:
    """A tokenizer that puts a space in front of a text, as Llama 2's and Mistral's do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\u2581", *map(chr, range(32, 127)), "\n"]
    names = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*names, *letters, "\u2581a"])}
    core = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>"))
    if scheme == "legacy":
        spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        core.normalizer = normalizers.Sequence(spaces)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=names[3:],
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
def test_no_space_stands_where_a_text_goes_on(scheme, tmp_path) -> None:
    """The tokens are those of the whole text, as others train on and servers send."""
    tokenizer = with_spaces(scheme)
    turns = chat("q one", "a one", "q two", " a two")["messages"]
    (tmp_path / "c").mkdir()
    path = lines(tmp_path / "c" / "a.jsonl", [{"messages": turns}])
    for break_ in ("\n", ""):
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>" + break_ + "{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>" + break_ + "{% endif %}"
        )
        (example,), _ = everything(path, tokenizer)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert example[0] == tokenizer(whole, add_special_tokens=False).input_ids
    pairs = [("Add:\n", "a + b"), ("Add:", " a + b")]
    path = lines(tmp_path / "a.jsonl", [{"prompt": a, "completion": b} for a, b in pairs])
    for (ids, mask), (prompt, answer) in zip(*everything(path, tokenizer)[:1], pairs, strict=True):
        assert ids == tokenizer(f"{prompt}{answer}</s>").input_ids
        assert ids[: mask.index(1)] == tokenizer(prompt).input_ids


def test_tools_and_calls_go_to_the_template(tmp_path, templated) -> None:
    tokenizer = templated(TOOLS)
    turns = [ASK, CALLING, RESULT, ANSWER]
    (example,), _ = everything(
        lines(tmp_path / "a.jsonl", [{"messages": turns, "tools": [TOOL]}]), tokenizer
    )
    whole = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert tokenizer.decode(example[0]) == whole
    call = '<tool_call>\n{"name": "weather", "arguments": {"in": "Rom"}}\n</tool_call></s>'
    assert learnt(example, tokenizer) == [call, "It is 20 C.</s>"]


def test_a_turn_that_only_calls_is_no_empty_answer(tmp_path, templated) -> None:
    row = {"messages": [ASK, CALLING], "tools": [TOOL]}
    path = lines(tmp_path / "a.jsonl", [row])
    assert "<tool_call>" in texts(path, templated(TOOLS))[0][0]
    for template in (
        None,
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}",
    ):
        found, file = everything(path, templated(template))
        assert not found
        assert "with calls of tools" in str(file.dropped)


def test_arguments_as_json_text_are_not_quoted_again(tmp_path, templated) -> None:
    """As OpenAI writes them; templates in the manner of `arguments | tojson` expect an object."""
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"in": "Rom"}'}}
    rows = [{"messages": [ASK, {**CALLING, "tool_calls": [call]}]} for call in (CALL, as_text)]
    one, other = texts(lines(tmp_path / "a.jsonl", rows), templated(TOOLS))
    assert one == other
    plus = TOOLS.replace("{'name': c.function.name, 'arguments': c.function.arguments} | tojson",
                         "c.function.name + c.function.arguments")  # fmt: skip
    one, other = texts(str(tmp_path / "a.jsonl"), templated(plus))
    assert one == other
    assert 'weather{"in": "Rom"}' in one[0]


def test_every_turn_is_learnt_as_it_is_generated(tmp_path, templated) -> None:
    tokenizer = templated(REASONING)
    turns = chat("q1", "a1", "q2", "a2")["messages"]
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "first", "second"
    path = lines(tmp_path / "a.jsonl", [{"messages": turns}])
    (last, first), file = everything(path, tokenizer)
    assert learnt(first, tokenizer) == ["<think>first</think>a1</s>"]
    assert learnt(last, tokenizer) == ["<think>second</think>a2</s>"]
    for example, count in ((first, 2), (last, 4)):
        assert (
            tokenizer.decode(example[0]).rstrip()
            == tokenizer.apply_chat_template(turns[:count], tokenize=False).rstrip()
        )
    assert "several examples" in " ".join(file.remarks)


def test_calls_in_between_stay_in_one_example(tmp_path, templated) -> None:
    """Between a question and its answer the reasoning stays."""
    tokenizer = templated(REASONING)
    turns = [ASK, {**CALLING, "reasoning_content": "look"}, RESULT, ANSWER]
    (example,), _ = everything(lines(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer)
    calling, answer = learnt(example, tokenizer)
    assert calling.startswith("<think>look</think>")
    assert answer == "<think></think>It is 20 C.</s>"


CHANNELS = (
    "{% for m in messages %}{% set later = messages[loop.index:] | map(attribute='role') | list %}"
    "{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}{% if 'assistant' not in later %}<|assistant|><|thinks|>"
    "{{ m.content }}<|end|>{% endif %}<|assistant|>to={{ m.tool_calls[0].function.name }}</s>"
    "{% else %}<|assistant|><|says|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As that of gpt-oss: what is said beside a call is written until there is an answer."""


def test_what_tools_say_is_not_learnt_where_turns_before_it_are_rewritten(
    tmp_path, templated
) -> None:
    tokenizer = templated(CHANNELS)
    turns = [ASK, {**CALLING, "content": "Let me look."}, RESULT, ANSWER]
    (last, first), file = everything(lines(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer)
    assert learnt(first, tokenizer) == ["<|thinks|>Let me look.<|end|><|assistant|>to=weather</s>"]
    assert learnt(last, tokenizer) == ["<|says|>It is 20 C.</s>"]
    assert tokenizer.decode(last[0]) == tokenizer.apply_chat_template(turns, tokenize=False)
    told = "the chat template writes earlier turns in another way once they are answered"
    assert file.remarks[told] == 1


def test_of_two_answers_in_a_row_each_is_learnt_once(tmp_path, templated) -> None:
    tokenizer = templated(
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}"
        "<think></think>{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [*chat("q", "a1")["messages"], {"role": "assistant", "content": "a2"}]
    (last, first), _ = everything(lines(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer)
    assert learnt(first, tokenizer) == ["<think></think>a1</s>"]
    assert learnt(last, tokenizer) == ["<think></think>a2</s>"]


def test_turns_that_the_template_leaves_out_are_told(tmp_path, templated) -> None:
    """As Llama 3.1's leaves out what is said beside a call, and gpt-oss's a second system turn."""
    turns = [ASK, {**CALLING, "content": "Let me look."}, RESULT, ANSWER]
    late = [ASK, ANSWER, {"role": "system", "content": "Be brief."}, ASK, ANSWER]
    quoted = CHANNELS.replace("{{ m.content }}<|end|>", "{{ m.content | tojson }}<|end|>", 1)
    path = lines(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": late}])
    _, file = everything(path, templated(quoted))
    assert "says is not written" not in str(file.remarks)
    mute = (
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{% if m.tool_calls %}"
        "to={{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, file = everything(path, templated(mute))
    for role in ("assistant", "system"):
        assert file.remarks[f"what a turn of the {role} says is not written by the chat template"]


def test_turns_of_weight_0_are_not_learnt(tmp_path, templated) -> None:
    rows = [chat("q1", "a1", "q2", "a2") for _ in range(3)]
    rows[0]["messages"][1]["weight"] = 0
    rows[1]["messages"][3]["weight"] = 0
    rows[2]["messages"][1]["weight"] = rows[2]["messages"][3]["weight"] = 0
    path = lines(tmp_path / "a.jsonl", rows)
    for template in (LLAMA3, None):
        tokenizer = templated(template)
        found, file = everything(path, tokenizer)
        assert [learnt(example, tokenizer) for example in found] == [["a2</s>"], ["a1</s>"]]
        assert file.dropped == {"with no turn of the assistant that has weight 1": 1}


def test_what_the_template_leaves_out_is_said(tmp_path, templated) -> None:
    turns = [ASK, {**ANSWER, "reasoning_content": "deep thought", "name": "Marvin"}]
    path = lines(tmp_path / "a.jsonl", [{"messages": turns, "tools": [TOOL]}] * 3)
    _, file = everything(path, templated(LLAMA3))
    for what in ("reasoning_content", "name", "tools"):
        assert file.remarks[f"{what!r} is not written by the chat template"] == 3
    _, file = everything(path, templated(REASONING))
    assert "reasoning_content" not in str(file.remarks)


def test_arrow_tables_give_back_what_was_put_in(tmp_path, templated) -> None:
    """Their objects all have the same keys, with nulls where one has none."""
    rows = [{"messages": [ASK, CALLING]}, {"messages": [ASK, ANSWER]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    tokenizer = templated(TOOLS)
    assert texts(str(tmp_path / "a.parquet"), tokenizer) == texts(
        lines(tmp_path / "a.jsonl", rows), tokenizer
    )


def test_content_in_parts_is_text(tmp_path, templated) -> None:
    parts = [{"type": "text", "text": "so "}, {"type": "text", "text": "be it"}]
    row = {"messages": [ASK, {"role": "assistant", "content": parts}]}
    assert texts(lines(tmp_path / "a.jsonl", [row]), templated(LLAMA3)) == [["so be it</s>"]]
    parts.append({"type": "audio"})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'content' of turn 2 has a part of type 'aud"):
        texts(lines(tmp_path / "a.jsonl", [row]), templated(LLAMA3))


# Formats ----------------------------------------------------------------------------------------


def oasst(name: str, parent: str | None, text: str, **more: Any) -> dict[str, Any]:
    role = "assistant" if text.startswith("a") else "prompter"
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, **more}


def test_a_short_answer_does_not_hide_that_a_question_is_lost(tmp_path, templated) -> None:
    """A template for pictures, as SmolVLM's, looks for parts: of a text it writes nothing, and the
    answer A stands in the word Assistant."""
    tokenizer = templated(
        "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>"
        "{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    )
    path = lines(tmp_path / "a.jsonl", [chat("Which letter comes first?", "A")])
    (example,), file = everything(path, tokenizer)
    assert tokenizer.decode(example[0]) == "User: Which letter comes first?</s>Assistant: A</s>"
    assert learnt(example, tokenizer) == ["A</s>"]
    assert not file.remarks


def test_oasst_trees_become_chats(tmp_path, templated) -> None:
    rows = [
        oasst("4", "2", "q2"),
        oasst("1", None, "q1"),
        oasst("2", "1", "a1", rank=0),
        oasst("3", "1", "a1 worse", rank=1),
        oasst("5", "4", "a2"),
        oasst("6", "4", "a3"),
        oasst("7", "9", "a lost"),
        oasst("10", None, "q other"),
        oasst("11", "10", "a other"),
        oasst("12", "11", "q after"),
    ]
    tokenizer = templated(LLAMA3)
    found, file = everything(lines(tmp_path / "a.jsonl", rows), tokenizer)
    assert file.format == "oasst"
    assert [learnt(example, tokenizer) for example in found] == [
        ["a1</s>", "a2</s>"],
        ["a3</s>"],  # a1 is learnt once
        ["a other</s>"],
    ]
    assert tokenizer.decode(found[1][0]) == tokenizer.apply_chat_template(
        chat("q1", "a1", "q2", "a3")["messages"], tokenize=False
    )
    assert list(file.remarks.values()) == [1]
    assert file.dropped == {"that answer one that is not there": 1}
    assert file.rows == 10


def test_nested_oasst_trees_are_the_same(tmp_path, templated) -> None:
    def nested(name: str, text: str, *replies: Any) -> dict[str, Any]:
        return {**oasst(name, None, text), "replies": list(replies)}

    tree = nested("1", "q1", nested("2", "a1", nested("3", "q2", nested("4", "a2"))))
    row = {"message_tree_id": "1", "prompt": tree}
    assert texts(lines(tmp_path / "a.jsonl", [row]), templated(LLAMA3)) == [["a1</s>", "a2</s>"]]


def test_paths_of_one_tree_are_held_out_together(tmp_path, templated) -> None:
    rows = []
    for tree in range(6):
        rows.append(oasst(f"{tree}", None, f"q{tree}"))
        rows += [oasst(f"{tree}-{n}", f"{tree}", f"a{tree}") for n in range(3)]
    tokenizer = templated(LLAMA3)
    spec = DataSpec(path=lines(tmp_path / "a.jsonl", rows), eval_fraction=0.5)
    data = load_data(spec, tokenizer, seed=0)
    assert len(data.eval) == len(data.train) == 9
    asked = [
        {tokenizer.decode(ids)[:18] for ids in d["input_ids"]} for d in (data.train, data.eval)
    ]
    assert not asked[0] & asked[1]


QUESTION, REPLY = chat("q", "a")["messages"]
SAME = {
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "messages": {"messages": [QUESTION, REPLY]},
    "prompt-completion": {"prompt": [QUESTION], "completion": [REPLY]},
}


@pytest.mark.parametrize("name", SAME)
def test_chats_of_all_formats_are_alike(name, tmp_path, templated) -> None:
    tokenizer = templated(LLAMA3)
    (example,), file = everything(lines(tmp_path / "a.jsonl", [SAME[name]]), tokenizer)
    assert file.format == name
    messages = chat("q", "a")["messages"]
    assert example[0] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert learnt(example, tokenizer) == ["a</s>"]


def test_sharegpt_calls_tools(tmp_path, templated) -> None:
    turns = [
        {"from": "human", "value": "Weather in Rom?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"in": "Rom"}}'},
        {"from": "observation", "value": "20 C"},
        {"from": "gpt", "value": "It is 20 C."},
    ]
    rows = [
        {"conversations": turns, "tools": json.dumps([TOOL])},
        {"messages": [ASK, CALLING, RESULT, ANSWER], "tools": [TOOL]},
    ]
    tokenizer = templated(TOOLS)
    made = [
        everything(lines(tmp_path / f"{n}.jsonl", [row]), tokenizer)[0]
        for n, row in enumerate(rows)
    ]
    assert made[0] == made[1]


INSTRUCTIONS = [
    ("dolly", {"instruction": "Add.", "context": "1 2", "response": "3"}),
    ("self-instruct", {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}),
    ("alpaca", {"question": "Add.", "given": "1 2", "answer": "3"}),
]


@pytest.mark.parametrize(("name", "row"), INSTRUCTIONS, ids=[name for name, _ in INSTRUCTIONS])
def test_instructions_of_all_formats_are_alike(name, row, tmp_path, tokenizer) -> None:
    names = {"instruction": "question", "input": "given", "output": "answer"}
    options = {"columns": names} if name == "alpaca" else {}
    (example,), file = everything(lines(tmp_path / "a.jsonl", [row]), tokenizer, **options)
    assert file.format == name
    text = "<s>### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    assert tokenizer.decode(example[0]) == text
    assert learnt(example, tokenizer) == ["3</s>"]


def test_every_instance_is_an_example(tmp_path, tokenizer) -> None:
    instances = [{"input": str(n), "output": f"out{n}"} for n in range(3)]
    row = {"instruction": "Do.", "instances": instances}
    path = lines(tmp_path / "a.jsonl", [row, {**row, "instances": []}])
    assert texts(path, tokenizer) == [[f"out{n}</s>"] for n in range(3)]
    assert everything(path, tokenizer)[1].dropped == {"with no instance": 1}


def test_columns_may_have_any_names(tmp_path, tokenizer) -> None:
    row = {"text": "no", "q": "2+2? ", "a": "4", "id": 7}
    path = lines(tmp_path / "a.jsonl", [row])
    names = {"prompt": "q", "completion": "a"}
    (example,), file = everything(path, tokenizer, columns=names)
    assert tokenizer.decode(example[0]) == "<s>2+2? 4</s>"
    assert (file.format, file.unused) == ("prompt-completion", ["text", "id"])
    with pytest.raises(DataError, match=r"a\.jsonl:1: data.columns names 'aa'.*\n.*mean 'a'"):
        everything(path, tokenizer, columns={"prompt": "q", "completion": "aa"})
    with pytest.raises(SpecError, match="'promt' is not possible"):
        Spec(data={"columns": {"promt": "q"}})
    like = DataSpec(columns=names)
    assert load_held_out(path, tokenizer, like=like)["input_ids"][0] == example[0]
    other = lines(tmp_path / "b.jsonl", [{"prompt": "2+2? ", "completion": "4"}])
    assert load_held_out(other, tokenizer, like=like)["input_ids"][0] == example[0]


def test_columns_of_later_rows_are_told_as_well(tmp_path, tokenizer) -> None:
    rows = [
        {"prompt": "a ", "completion": "b"},
        {"prompt": "c ", "completion": "d", "context": "e"},
    ]
    _, file = everything(lines(tmp_path / "a.jsonl", [*rows, *rows]), tokenizer)
    assert file.unused == ["context"]
    assert "columns that prompt-completion does not know: context" in file.notes()


OTHERS = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "'chosen', 'rejected'"),
    ({"prompt": "p", "completion": "c", "label": True}, "'label'"),
    ({"text": "t", "label": 1}, "'label'"),
    ({"text": "t", "labels": [1]}, "'labels'"),
]


@pytest.mark.parametrize(("row", "named"), OTHERS)
def test_data_of_another_task_are_refused(row, named, tmp_path, tokenizer) -> None:
    path = lines(tmp_path / "a.jsonl", [row] * 2)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: the columns? {named}") as caught:
        everything(path, tokenizer)
    assert "to learn" in caught.value.problems[0].fix
    if "chosen" not in row:
        name = "text" if "text" in row else "prompt-completion"
        assert everything(path, tokenizer, format=name)[1].unused == [[*row][-1]]
    else:
        names = {"prompt": "prompt", "completion": "chosen"}
        assert texts(path, tokenizer, columns=names) == [["c</s>"]] * 2


def test_each_file_has_a_format_of_its_own(tmp_path, templated) -> None:
    tokenizer = templated(LLAMA3)
    lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] * 2)
    lines(tmp_path / "b.jsonl", [chat("q", "a")] * 3)
    lines(tmp_path / "test.jsonl", [{"text": "t"}])
    data = load_data(DataSpec(path=str(tmp_path)), tokenizer, seed=0)
    found = {Path(f.file).name: (f.format, f.examples, f.held_out) for f in data.report.files}
    assert found == {
        "a.jsonl": ("prompt-completion", 2, 0),
        "b.jsonl": ("messages", 3, 0),
        "test.jsonl": ("text", 1, 1),
    }


# Counts -----------------------------------------------------------------------------------------


def test_cut_and_dropped_are_counted_and_told_loudly(tmp_path, tokenizer) -> None:
    """100 of 200 chats are dropped and 100 cut."""
    long = "word " * 100
    rows = [chat(long, "a"), chat("q", long)] * 100
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.warns(DataWarning, match=r"100% of the examples in .*a\.jsonl") as caught:
        data = load_data(DataSpec(path=path, max_length=32), tokenizer, seed=0)
    assert "100 cut to 32 tokens" in str(caught[0].message)
    assert "100 dropped (100 with nothing to learn within 32 tokens)" in str(caught[0].message)
    (file,) = data.report.files
    assert (file.rows, file.examples, file.cut, file.dropped.total()) == (200, 100, 100, 100)
    assert (data.cut, data.dropped) == (100, 100)
    assert file.held_out == len(data.eval)
    parts = [*data.train, *data.eval]
    assert file.tokens == sum(len(e["input_ids"]) for e in parts)
    assert file.learnt == sum(sum(e["completion_mask"]) for e in parts)
    whole = tokenizer.apply_chat_template(rows[1]["messages"], return_dict=False)
    start = tokenizer.apply_chat_template(
        rows[1]["messages"][:1], add_generation_prompt=True, return_dict=False
    )
    answer = whole[: whole.index(tokenizer.eos_token_id) + 1][len(start) :]
    assert file.lost == 100 * (len(answer) - (32 - len(start)))


def test_few_losses_are_no_warning(tmp_path, tokenizer) -> None:
    rows = [{"prompt": "p", "completion": f"c{n}"} for n in range(39)]
    path = lines(tmp_path / "a.jsonl", [*rows, {"prompt": "p", "completion": ""}])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        report = load_data(DataSpec(path=path), tokenizer, seed=0).report
    assert report.words() == [
        f"{path}: prompt-completion, 39 examples (2 of them held out), "
        f"{report.files[0].tokens} tokens, {report.files[0].learnt} of them learnt, "
        "1 dropped (1 with an empty answer)"
    ]
    with pytest.warns(DataWarning):
        load_everything(lines(tmp_path / "b.jsonl", [*rows[:3], rows[0] | {"completion": ""}]),
                        tokenizer)  # fmt: skip


def test_a_survey_needs_no_tokenizer(tmp_path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "t", "id": 1}] * 3)
    found = survey(DataSpec(path=path))
    assert found
    assert found.words() == [f"{path}: text, 3 rows; columns that text does not know: id"]
    assert survey(DataSpec(path="owner/name")) is None


# Bad data ---------------------------------------------------------------------------------------

BAD = [
    ("a.jsonl", '{"text": "x", "text": "y"}\n', r"a\.jsonl:1: .*the key 'text' is there twice"),
    ("a.jsonl", '{"text": NaN}\n', r"a\.jsonl:1: 'text' is NaN, an empty cell"),
    ("a.jsonl", '{"text": "x"}\n{"text": ' + "[" * 100_000, r"a\.jsonl:2: not readable as JSON"),
    ("a.csv", "text,text\nx,y\n", r"a\.csv:1: the column 'text' is there twice"),
    ("a.jsonl", '{"text": "' + "x" * (2**24 + 1) + '"}\n', r"a\.jsonl:1: 'text' holds 16,777,217"),
    ("a.jsonl", '{"conversations": [{"from": "me", "value": "x"}]}\n', r"turn 1 is from 'me'"),
    ("a.jsonl", '{"instruction": "x", "instances": 3}\n', r"'instances' is missing or no list"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", '
     '"content": "y", "weight": 0.5}]}\n', r"a\.jsonl:1: 'weight' of turn 2 is 0.5"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}', "are no calls"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}', "of turn 1 is null"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "id": "1"}]}', "'content' of turn 1 is null"),
    ("a.jsonl", '{"messages": [], "tools": 3}\n', "no list of turns"),
    ("a.jsonl", '{"message_id": "1", "parent_id": null, "role": "prompter", "text": "a"}\n' * 2,
     r"a\.jsonl:2: the message_id '1' is there twice, first in .*a\.jsonl:1"),
    ("a.jsonl", '{"message_id": "1", "parent_id": [1], "role": "x", "text": "a"}', "is a list"),
    ("a.jsonl", '{"prompt": {"message_id": "1", "replies": 5}}', "'replies' is no list"),
    ("a.jsonl", "", "the file holds no examples"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_data_is_named_with_file_and_line(name, content, message, tmp_path, tokenizer) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        everything(str(tmp_path / name), tokenizer)
    assert str(tmp_path) in str(caught.value)


def test_bom_and_line_ends_are_no_text(tmp_path, tokenizer) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\np,c\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\r\n')
    for name in ("a.csv", "a.jsonl"):
        (example,), _ = everything(str(tmp_path / name), tokenizer)
        assert tokenizer.decode(example[0]) == "<s>pc</s>"


def test_a_circle_of_messages_ends(tmp_path, tokenizer) -> None:
    rows = [oasst("1", "2", "q"), oasst("2", "1", "a"), oasst("3", None, "q"), oasst("4", "3", "a")]
    found, file = everything(lines(tmp_path / "a.jsonl", rows), tokenizer)
    assert len(found) == 1
    assert file.dropped.total() == 2


def test_an_unknown_role_is_refused_without_a_template(tmp_path, templated) -> None:
    row = {"messages": [{"role": "usr", "content": "q"}, ANSWER]}
    with pytest.raises(DataError, match="turn 1 has the role 'usr'"):
        everything(lines(tmp_path / "a.jsonl", [row]), templated(None))


def test_deep_and_broken_chats_are_named(tmp_path, templated) -> None:
    """Whatever a template makes of them: an error in a sentence, with the line."""
    tokenizer = templated(TOOLS)
    deep = "[" * 200_000 + "]" * 200_000  # how deep JSON may be depends on the Python
    call = '{"function": {"name": "f", "arguments": %s}}'
    row = '{"messages": [{"role": "assistant", "tool_calls": [%s]}]}'
    for arguments in (deep, '{"x": "\\ud800"}'):
        (tmp_path / "a.jsonl").write_text(row % (call % arguments))
        with pytest.raises(DataError, match=r"a\.jsonl:1: "):
            everything(str(tmp_path / "a.jsonl"), tokenizer)


def test_an_answer_that_is_opened_in_another_way_is_told(tmp_path, templated) -> None:
    path = lines(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "")])
    _, file = everything(path, templated(LLAMA3))
    assert file.remarks == {"an empty answer is learnt": 1}
    thinking = LLAMA3.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>'")
    _, file = everything(path, templated(thinking))
    assert file.remarks["the chat template opens an answer in another way than it writes one"] == 2
