"""Answers: the tokens of transformers' generate, whatever the batch; drawn as asked; in files."""

import copy
import json
import math
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from chosen import shortfall
from processes import wants_two_gpus
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.fused import FusedLayers
from quantadapt.compiling import on_its_device
from quantadapt.data.files import Row as DataRow
from quantadapt.errors import (
    DataError,
    ModelError,
    NumbersError,
    OptionsError,
    OutputError,
    SpecError,
    refuse_below_one,
)
from quantadapt.evaluation.predictions import evaluating
from quantadapt.folders.lines import problems_of
from quantadapt.generation import (
    Answer,
    PromptWriter,
    Sampling,
    answers,
    layout_of,
    slots,
    streamed,
)
from quantadapt.generation.files import answer_file, read_prompts
from quantadapt.generation.rows import Row
from quantadapt.generation.sampling import Chooser, drawn_together
from quantadapt.generation.slots import SlotRows, takes_slots, unrecorded
from quantadapt.generation.text import TextSoFar
from quantadapt.streaming import stream
from quantadapt.testing.small_demo import small_model

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "eos_token_id": 2,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, eos_token_id=2, bos_token_id=1
    ),
    "mamba": MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, eos_token_id=2, state_size=4
    ),
}
SLOTTED = {
    "llama": FAMILIES["llama"],
    "gemma2": FAMILIES["gemma2"],
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "qwen3-moe": Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt-oss": GptOssConfig(
        **SMALL, num_local_experts=2, num_experts_per_tok=2, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


class Ids:
    """A tokenizer whose text is the ids."""

    eos_token_id = 2
    all_special_tokens = ()
    chat_template = None

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"{i} " for i in ids if not (skip_special_tokens and i == 2))


def prompts(count=7):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


def made(config, attention=None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def stock(model, ids, count):
    """What transformers' own generate continues one prompt with, as our text."""
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return Ids().decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family) -> None:
    model, asked = made(FAMILIES[family]), prompts()
    expected = [stock(model, ids, 12) for ids in asked]
    sampling = Sampling(max_new_tokens=12)
    for size in (1, 3, 16):
        found = list(answers(model, Ids(), asked, sampling, batch_size=size))
        assert [answer.text for answer in found] == expected
        assert [answer.prompt_tokens for answer in found] == [len(ids) for ids in asked]
    assert "".join(streamed(model, Ids(), asked[0], sampling)) == expected[0]


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", SLOTTED)
def test_slots_hold_what_a_growing_cache_holds(family, attention, monkeypatch) -> None:
    """Also where slots become more and longer while rows are answered."""
    model, asked = made(SLOTTED[family], attention), prompts(9)
    assert takes_slots(model)
    expected = [stock(model, ids, 12) for ids in asked]
    monkeypatch.setattr(slots, "LEAST_LENGTH", 4)
    made_stores = []
    monkeypatch.setattr(
        slots, "rows_for", lambda m: made_stores.append(SlotRows(m)) or made_stores[-1]
    )
    for size in (1, 3, 16):
        found = list(answers(model, Ids(), asked, Sampling(max_new_tokens=12), batch_size=size))
        assert [answer.text for answer in found] == expected
    assert [rows._store.slots for rows in made_stores] == [1, 4, 16]
    assert made_stores[-1]._store.length == 32


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq", "torchao-int8"])
@pytest.mark.parametrize("family", ["llama", "gpt-oss", "mistral"])
def test_recorded_steps_choose_the_best_token(family, backend, recwarn) -> None:
    config = copy.deepcopy(SLOTTED[family])
    config.hidden_size = config.intermediate_size = 128
    model = qa.attach(qa.quantize(made(config).bfloat16(), backend, device="cuda"), r=4).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = SlotRows(model)
    with evaluating(model):
        rows = [Row(ids, Sampling().chooser(i), 24) for i, ids in enumerate(prompts(5))]
        batch.add(rows[:3])
        while batch.rows:
            batch.step()
            if len(rows[0].tokens) == 8:
                batch.add(rows[3:])
        assert max(shortfall(model, row.prompt, row.tokens) for row in rows) < 0.1
    assert batch._store.graph is not None
    assert not [w for w in recwarn if issubclass(w.category, slots.NotRecordedWarning)]


@pytest.mark.cuda
@wants_two_gpus
def test_answers_on_a_gpu_that_is_not_the_current_one() -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        config = copy.deepcopy(SLOTTED["llama"])
        config.hidden_size = config.intermediate_size = 128
        model = qa.quantize(made(config).bfloat16(), "hqq", device=device)
        torch.manual_seed(0)
        model = qa.attach(model, r=4, init_lora_weights=False).eval()
        asked = list(answers(model, Ids(), prompts(3), Sampling(max_new_tokens=24), batch_size=1))
        found.append([answer.text for answer in asked])
        assert torch.cuda.current_device() == 0
    assert found[0] == found[1]


def test_kernels_of_triton_are_started_where_their_first_tensor_is(monkeypatch) -> None:
    given, where = torch.ones(2), []
    monkeypatch.setattr(
        torch.cuda, "device_of", lambda tensor: where.append(tensor) or nullcontext()
    )
    launched = on_its_device(lambda kind, x, y: (kind, x, y))
    assert launched("gate", given, y=3)[0::2] == ("gate", 3)
    assert where[0] is given


def test_adapters_are_cast_when_rows_come_in_and_not_at_each_token(monkeypatch) -> None:
    model = qa.attach(qa.quantize(made(SLOTTED["llama"]), "none", dtype="bfloat16"), r=2).eval()
    seen = []
    monkeypatch.setattr(FusedLayers, "refresh", lambda self: seen.append(len(self._casts)))
    with evaluating(model):
        batch = SlotRows(model)
        batch.add([Row([5, 6, 7], Sampling().chooser(0), 4)])
        while batch.rows:
            batch.step()
            batch.add([])  # as a server does between tokens
    (casts,) = seen
    assert casts > 0


def test_rows_are_answered_by_the_weights_there_are_when_they_come() -> None:
    model = qa.attach(qa.quantize(made(SLOTTED["llama"]), "none", dtype="bfloat16"), r=2).eval()

    def answered(batch: SlotRows) -> list[int]:
        batch.add([row := Row([5, 6, 7], Sampling().chooser(0), 8)])
        while batch.rows:
            batch.step()
        return row.tokens

    with evaluating(model):
        batch = SlotRows(model)
        before = answered(batch)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        after = answered(batch)
        assert after == answered(SlotRows(model)) != before


def test_slots_are_for_models_that_say_so() -> None:
    assert not takes_slots(made(FAMILIES["llama"], "flex_attention"))
    assert not takes_slots(made(FAMILIES["mamba"]))
    assert unrecorded(made(FAMILIES["llama"])) == ""
    assert "fixed places" in unrecorded(made(FAMILIES["llama"], "flex_attention"))
    assert "one prompt at a time" in unrecorded(made(FAMILIES["mamba"]))


def test_a_streamed_base_is_not_recorded() -> None:
    model = qa.attach(qa.quantize(made(FAMILIES["llama"]), "torchao-int8", device="cpu"), r=2)
    assert unrecorded(model) == ""
    stream(model, "all")
    assert "block by block" in unrecorded(model)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_an_answer_ends_where_the_model_ends_it(family) -> None:
    """Of models that answer by transformers' generate, one that ended with another token than the
    tokenizer's was said to be cut."""
    model, asked = made(FAMILIES[family]), prompts()
    first = [int(stock(model, ids, 1)) for ids in asked]
    third = int(stock(model, asked[2], 3).split()[-1])
    model.generation_config.eos_token_id = [first[0], third]
    found = list(answers(model, Ids(), asked, Sampling(max_new_tokens=6), batch_size=4))
    assert found[0] == Answer("", 0, len(asked[0]), "stop")
    for answer, ids in zip(found, asked, strict=True):
        expected = stock(model, ids, 6).split()
        ends = [i for i, token in enumerate(expected) if int(token) in (first[0], third)]
        assert answer.text.split() == expected[: ends[0] if ends else 6]
        assert answer.tokens == len(answer.text.split())
        assert answer.finish == ("stop" if ends else "length")


def test_quantized_models_with_adapters_answer_as_transformers_has_them() -> None:
    model = qa.attach(qa.quantize(made(FAMILIES["llama"]), "hqq", device="cpu"), r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = [stock(model.eval(), ids, 8) for ids in prompts()]
    found = list(answers(model, Ids(), prompts(), Sampling(max_new_tokens=8), batch_size=3))
    assert [answer.text for answer in found] == expected
    with model.disable_adapter():
        bare = [a.text for a in answers(model, Ids(), prompts(), Sampling(max_new_tokens=8))]
    assert bare != expected
    assert model.training is False


def test_encoder_decoder_models_answer_by_transformers() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        eos_token_id=2, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    ids = prompts()[0]
    output = model.generate(torch.tensor([[*ids, 2]]), max_new_tokens=5, do_sample=False)
    found = next(answers(model, Ids(), [ids], Sampling(max_new_tokens=5)))
    assert found.ids == tuple(output[0, 1:].tolist())  # what comes before is the decoder's start
    assert found.text == Ids().decode(found.ids, skip_special_tokens=True)
    assert (found.tokens, found.finish) == (5, "length")


# Drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}], ids=["plain", "top", "min"]
)
def test_tokens_drawn_together_are_those_drawn_one_by_one(options) -> None:
    sampling = Sampling(temperature=0.8, seed=3, **options)
    logits = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)) * 3
    alone, together = ([sampling.chooser(number) for number in range(4)] for _ in range(2))
    for _ in range(5):
        one_by_one = [choose(row, [1]) for choose, row in zip(alone, logits, strict=True)]
        assert drawn_together(together, logits) == one_by_one
    others = [*together[:3], Sampling(temperature=0.7, seed=3).chooser()]
    assert drawn_together(others, logits) is None


def test_draws_depend_on_seed_and_number_alone() -> None:
    model, asked = made(FAMILIES["llama"]), prompts()
    drawn = Sampling(max_new_tokens=8, temperature=1.5, top_p=0.95, seed=5)
    alone = [
        next(answers(model, Ids(), [ids], drawn, first=number)).text
        for number, ids in enumerate(asked)
    ]
    before = torch.random.get_rng_state()
    assert [a.text for a in answers(model, Ids(), asked, drawn, batch_size=3)] == alone
    assert torch.equal(torch.random.get_rng_state(), before)
    other = drawn.model_copy(update={"seed": 6})
    assert [a.text for a in answers(model, Ids(), asked, other)] != alone


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 2}, [0, 1]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 1, 2]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 1, 2]),
    ],
)
def test_tokens_are_drawn_by_their_share(options, allowed) -> None:
    shares = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05], dtype=torch.float64)
    wanted = shares.pow(1 / options["temperature"])
    wanted = wanted * torch.tensor([float(i in allowed) for i in range(5)], dtype=torch.float64)
    wanted /= wanted.sum()
    choose = Chooser(Sampling(seed=1, **options))
    count = 4000
    drawn = [choose(shares.log().float(), [0]) for _ in range(count)]
    found = torch.bincount(torch.tensor(drawn), minlength=5) / count
    limit = 4 * (wanted * (1 - wanted) / count).sqrt() + 1e-9
    assert bool(((found - wanted).abs() <= limit).all()), (found, wanted)


def test_a_temperature_of_next_to_nothing_is_greedy() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Chooser(Sampling(temperature=1e-40))(logits, [0]) == 1
    assert Sampling(temperature=1e-6).is_greedy


def test_answers_end_where_the_model_does() -> None:
    config = LlamaConfig(**SMALL, max_position_embeddings=16)
    model = made(config)
    model.generation_config.eos_token_id = None
    tokenizer = Ids()
    tokenizer.eos_token_id = None
    with pytest.warns(UserWarning, match="16 tokens together at most"):
        found = list(answers(model, tokenizer, [[5] * 4, [5] * 10], Sampling(max_new_tokens=99)))
    assert [answer.tokens for answer in found] == [12, 6]
    assert {answer.finish for answer in found} == {"length"}


def test_a_penalty_turns_from_what_was_said() -> None:
    choose = Chooser(Sampling(repetition_penalty=2.0))
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert choose(logits, [1]) == 0
    assert choose(logits, [0]) == 1  # 3 / 2 is less than 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temprature": 1}, "temperature"),
    ],
)
def test_wrong_options_are_told(options, words) -> None:
    with pytest.raises(SpecError, match=words):
        Sampling(**options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: qa.generate(m, ["x"], layout="chats"), "layout: 'chats'.*'chat' or 'instr"),
        (lambda m: qa.merge(m, "out", kind="auto"), "kind: 'auto'.*'dense' or 'requantize'"),
        (lambda m: qa.quantize(m, head="tokens"), "head: 'tokens'.*'sequence' or 'token'"),
        (lambda m: qa.evaluate(m, max_examples=0, batch_size=True), "batch_size: True.*max_exa"),
    ],
)
def test_words_and_counts_that_are_not_known_are_refused(call, said) -> None:
    """A layout was ignored, the others failed with an error of Python or of their own."""
    with pytest.raises(OptionsError, match=f"(?s){said}"):
        call(torch.nn.Linear(1, 1))


def test_a_count_may_be_any_whole_number() -> None:
    """numpy's were refused as if they were below 1."""
    refuse_below_one(one=np.int64(1))
    with pytest.raises(OptionsError, match=r"(?s)none: .*whole: 1\.5"):
        refuse_below_one(none=np.int64(0), whole=1.5)


# Text ---------------------------------------------------------------------------------------------


def test_text_comes_in_pieces_that_join_to_the_whole(tokenizer) -> None:
    text = "def größe(x):\n    return '→ 日本 🙂' * x\n" * 3
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    so_far, pieces = TextSoFar(tokenizer), []
    for index, token in enumerate(ids):
        pieces.append(so_far.add([token], last=index == len(ids) - 1))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) == so_far.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stop", [("7 8 ",), ("9 9", "8 1"), ("never",)])
def test_a_text_ends_an_answer_and_is_not_part_of_it(stop) -> None:
    ids = [5, 6, 7, 8, 10, 11]
    so_far, shown = TextSoFar(Ids(), stop), ""
    for token in ids:
        shown += so_far.add([token])
    shown += so_far.add([], last=True)
    whole = "5 6 7 8 10 11 "
    found = [whole.find(text) for text in stop if text in whole]
    assert shown == so_far.text == whole[: min(found, default=len(whole))]
    assert so_far.ended == bool(found)


def test_a_stop_text_frees_the_row() -> None:
    model, asked = made(FAMILIES["llama"]), prompts()
    words = stock(model, asked[0], 8).split()
    stop = f"{words[3]} "
    found = list(answers(model, Ids(), asked, Sampling(max_new_tokens=8, stop=(stop,))))
    assert found[0].finish == "stop"
    assert found[0].text == stock(model, asked[0], 8).partition(stop)[0]


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("by_itself", [False, True])
def test_a_stop_text_ends_an_answer_as_in_transformers(
    by_itself, special, room, monkeypatch
) -> None:
    """One in the last token there may be was said to be cut; a special token ended nothing."""
    monkeypatch.setitem(answers.__globals__, "takes_rows", lambda model: not by_itself)
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    model = made(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}))
    ids = [24, 6, 7]
    fifth = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, -1]
    stop = tokenizer.decode([fifth])
    if special:
        name = tokenizer.convert_ids_to_tokens(int(fifth))
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    output = model.generate(
        torch.tensor([ids]),
        max_new_tokens=12,
        do_sample=False,
        stop_strings=[stop],
        tokenizer=tokenizer,
    )[0, len(ids) :].tolist()
    expected = tokenizer.decode(output).partition(stop)[0]
    options = Sampling(max_new_tokens=len(output) + room, stop=("", stop))
    found = next(answers(model, tokenizer, [ids], options))
    assert (found.text, found.finish) == (expected, "stop")
    assert list(found.ids) == output
    assert "".join(streamed(model, tokenizer, ids, options)) == expected


# Prompts ------------------------------------------------------------------------------------------


def test_prompts_are_written_as_they_stand_in_training_data(tokenizer) -> None:
    by_template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add a and b."}], tokenize=False, add_generation_prompt=True
    )
    writers = {name: PromptWriter(tokenizer, name) for name in ("chat", "instruction", "text")}
    ids = {name: writer.ids("Add a and b.") for name, writer in writers.items()}
    assert tokenizer.decode(ids["chat"]) == by_template
    alpaca = "### Instruction:\nAdd a and b.\n\n### Response:\n"
    assert tokenizer.decode(ids["instruction"], skip_special_tokens=True) == alpaca
    assert tokenizer.decode(ids["text"], skip_special_tokens=True) == "Add a and b."
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
    plain = tokenizer.decode(writers["instruction"].ids(turns))
    eos = tokenizer.eos_token
    assert plain.endswith(
        f"Be brief.\n\n### Instruction:\nOne\n\n### Response:\nTwo{eos}\n\n"
        "### Instruction:\nThree\n\n### Response:\n"
    )
    assert writers["text"].ids("") == [tokenizer.bos_token_id]


def test_a_run_is_asked_as_its_data_were_written(tmp_path, tokenizer) -> None:
    assert layout_of(tmp_path, tokenizer) == "chat"
    for kind, layout in (("alpaca", "instruction"), ("messages", "chat"), ("text", "text")):
        data = {"data": {"files": [{"format": kind}]}}
        (tmp_path / "metrics.json").write_text(json.dumps(data), encoding="utf-8")
        assert layout_of(tmp_path, tokenizer) == layout
        without = copy.deepcopy(tokenizer)
        without.chat_template = None  # chats are learnt in alpaca's layout then
        expected = "instruction" if kind == "messages" else layout
        assert layout_of(tmp_path, without) == expected


def test_what_lies_in_a_run_is_asked_as_the_run_is(tmp_path, tokenizer, monkeypatch) -> None:
    data = {"data": {"files": [{"format": "alpaca"}]}}
    (tmp_path / "metrics.json").write_text(json.dumps(data), encoding="utf-8")
    for name in ("adapter", "base", "merged", "other"):
        (tmp_path / name).mkdir()
        expected = "chat" if name == "other" else "instruction"
        assert layout_of(tmp_path / name, tokenizer) == expected
        monkeypatch.chdir(tmp_path / name)
        assert layout_of(".", tokenizer) == expected
    assert layout_of("merged", tokenizer) == "chat"  # seen from here, no folder


def test_generate_from_python(tokenizer) -> None:
    model = qa.quantize(str(demo.MODEL_DIR), "none", device="cpu")
    text = "def add(a, b):\n"
    found = qa.generate(model, [text, [{"role": "user", "content": "Hi"}]], max_new_tokens=6)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    output = model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[0].text == expected
    assert found[1].prompt_tokens > 3
    with pytest.raises(SpecError, match="max_new_token"):
        qa.generate(model, [text], max_new_token=3)
    with pytest.raises(DataError, match="2,100 tokens, the model is made for"):
        list(answers(model, tokenizer, [[5] * 2100], Sampling()))


def test_a_classifier_does_not_answer() -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(FAMILIES["llama"])
    with pytest.raises(ModelError, match="does not generate text"):
        list(answers(model, Ids(), [[3]], Sampling()))


# Files --------------------------------------------------------------------------------------------

ROWS = [DataRow({"prompt": f"p{number}", "id": number}, f"x:{number}") for number in range(4)]


def test_a_file_of_answers_goes_on_after_an_interruption(tmp_path) -> None:
    out, made_with = tmp_path / "a.jsonl", {"model": "m", "options": {"seed": 1}}

    def write(rows, stop_at=None):
        with answer_file(out, ROWS, made_with) as file:
            begun = file.done
            for number, row in enumerate(rows[begun:], begun):
                if number == stop_at:
                    raise KeyboardInterrupt
                file.add(row, Answer(f"a{number}", 1, 1, "stop"))
        return begun

    with pytest.raises(KeyboardInterrupt):
        write(ROWS, stop_at=2)
    partial = tmp_path / "a.jsonl.partial"
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "p2", "answ')  # killed in the middle of a line
    assert not out.exists()
    with pytest.raises(OutputError, match="other options"), answer_file(out, ROWS, {"model": "n"}):
        pass
    assert write(ROWS) == 2
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["answer"]) for line in lines] == [(n, f"a{n}") for n in range(4)]
    assert not partial.exists()
    with pytest.raises(OutputError, match="there already"):
        write(ROWS)


def test_lines_end_where_jsonl_has_them_end(tmp_path) -> None:
    """Other characters end lines for Python's str, such as those that JSON leaves as they are."""
    odd = "a\u2028b\u2029c\u0085d\x0be"
    rows = [DataRow({"prompt": f"{odd} {number}"}, f"x:{number}") for number in range(6)]
    out = tmp_path / "a.jsonl"

    def write(stop_at):
        with answer_file(out, rows, {}) as file:
            for number in range(file.done, len(rows)):
                if number == stop_at:
                    raise KeyboardInterrupt
                file.add(rows[number], Answer(f"{odd} {number}", 1, 1, "stop"))

    for stop_at in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            write(stop_at)
        with (tmp_path / "a.jsonl.partial").open("ab") as file:
            file.write(b'{"prompt": "\xe2\x80')  # half a character
    write(None)
    lines = out.read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["answer"] for line in lines] == [f"{odd} {n}" for n in range(6)]
    begun = answer_file(out, rows, {}, overwrite=True)
    with pytest.raises(OutputError, match="0 of 6 answers"), begun:
        pass


def test_prompts_are_read_from_files(tmp_path) -> None:
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"prompt": "text"},
        {"messages": chat},
        {"instruction": "do", "input": "it"},
        {"instruction": "do"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [asked for _, asked in read_prompts(str(file))] == ["text", chat[:1], "do\n\nit", "do"]
    file.write_text('{"prompt": "x", "answer": "y"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="'answer' already"):
        read_prompts(str(file))
    file.write_text('{"question": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no known columns, found 'question'"):
        read_prompts(str(file))


@pytest.mark.parametrize("text", ["notes, without an end", "notes\nof somebody\n", '{"a": 1}'])
def test_what_somebody_else_wrote_is_never_written_over(tmp_path, text) -> None:
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    partial.write_text(text)
    for overwrite in (False, True):
        wanted = answer_file(out, ROWS, {}, overwrite=overwrite)
        with pytest.raises(OutputError, match="something else is there"):
            wanted.__enter__()
        assert [p.what for p in problems_of(out, None, overwrite=overwrite)]
        assert partial.read_text() == text


def test_lines_that_were_lost_are_answered_again(tmp_path) -> None:
    """As after a power failure: the second of three lines never reached the disk."""
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    with suppress(KeyboardInterrupt), answer_file(out, ROWS, {}) as file:
        for row in ROWS[:2]:
            file.add(row, Answer("x", 1, 1, "stop"))
        raise KeyboardInterrupt
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(lines[0] + lines[1] + bytes(len(lines[2]) - 1) + b"\n")
    with answer_file(out, ROWS, {}) as file:
        assert file.done == 1
        for row in ROWS[1:]:
            file.add(row, Answer("y", 1, 1, "stop"))
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == [
        "x", *"y" * (len(ROWS) - 1)
    ]  # fmt: skip
    partial.write_bytes(lines[0][:9])  # killed as the first line was written
    with answer_file(out, ROWS, {}, overwrite=True) as file:
        assert file.done == 0
        for row in ROWS:
            file.add(row, Answer("z", 1, 1, "stop"))
    assert not partial.exists()


def test_what_cannot_become_an_answers_file_is_told_at_once(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    prompts = tmp_path / "a.jsonl.partial"
    prompts.write_text('{"prompt": "x"}\n')
    cases = {
        tmp_path / "folder": "a folder is in the way",
        prompts: "the file of prompts",
        tmp_path / "a.jsonl": "the file of prompts",  # answers are written there in the making
        prompts / "x.jsonl": "is a file",
    }
    for path, words in cases.items():
        found = problems_of(path, str(prompts), overwrite=True)
        assert words in " ".join(problem.what for problem in found), path
    assert problems_of(tmp_path / "new" / "b.jsonl", str(prompts)) == []


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}])
def test_a_number_that_is_none_is_no_answer(family, value, options) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():  # finite weights may do this as well: these are the logits alone
        model.get_output_embeddings().weight[7] = value
    sampling = Sampling(max_new_tokens=3, **options)
    with pytest.raises(NumbersError, match="no numbers"):
        list(answers(model, Ids(), prompts(2), sampling))
    with pytest.raises(NumbersError, match="no numbers"):
        list(streamed(model, Ids(), prompts(1)[0], sampling))


def test_text_that_cannot_be_encoded_is_told(tokenizer) -> None:
    for layout in ("text", "chat", "instruction"):
        with pytest.raises(DataError, match="half a surrogate pair"):
            PromptWriter(tokenizer, layout).ids("a\ud800")


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("one text", {}, "prompts is one text"),
        (["x"], {"batch_size": 0}, "batch_size: 0 is not possible"),
        (["x"], {"batch_size": True}, "batch_size: True is not possible"),
        ([None], {}, "prompt: it is null"),
        ([5], {}, "prompt: it is a number"),
        ([["x"]], {}, "prompt: it is a list"),
    ],
)
def test_what_cannot_be_asked_is_told(prompts, options, words) -> None:
    model = qa.quantize(str(demo.MODEL_DIR), "none", device="cpu")
    with pytest.raises((SpecError, DataError), match=words):
        qa.generate(model, prompts, max_new_tokens=1, **options)
