"""Packed rows: the same losses and gradients as the examples one by one, by stock transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.batches import PackedCollator
from quantadapt.errors import PlanRefused, SpecError, TrainingError
from quantadapt.model import packed_attention as ours
from quantadapt.model.sinks import fused_sinks
from quantadapt.objectives.sft import SFT
from quantadapt.testing.small_demo import small_model
from quantadapt.training.packing import filling, kept_apart, packed, refuse_leaks

VOCABULARY = 64
LENGTHS = [[9, 1, 14], [23], [2, 2, 3]]
"""Of the examples in each row."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HERE = {
    "llama": ("LlamaConfig", {}),
    "llama without groups": ("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2, with biases": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral, with a window": ("MistralConfig", {"sliding_window": 4}),
    "gemma": ("GemmaConfig", {}),
    "gemma3, with windows": ("Gemma3TextConfig", {**WINDOW, "query_pre_attn_scalar": 5}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "gpt-oss, with sinks": ("GptOssConfig", {**WINDOW, "num_local_experts": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
}
"""Whose attention is computed here."""
ELSEWHERE = {
    "qwen2-moe, whose windows only masks know": (
        "Qwen2MoeConfig",
        {**EXPERTS, **WINDOW, "shared_expert_intermediate_size": 16, "use_sliding_window": True},
    ),
    "gemma2, with a cap": ("Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 5}),
}
"""Whose attention transformers knows with a mask alone."""

EXPERT_KINDS = ("qwen2-moe", "qwen3-moe", "mixtral", "gpt-oss")


def of(kind: str, attention: str | None = None) -> Any:
    name, more = (HERE | ELSEWHERE)[kind]
    torch.manual_seed(0)
    sizes = {} if kind == "gpt2" else SIZES
    zero = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    config = getattr(transformers, name)(**{"vocab_size": VOCABULARY, **sizes, **zero, **more})
    kinds = {"attn_implementation": attention} if attention else {}
    if kind.split(",")[0] in EXPERT_KINDS:  # grouped products know no float64
        kinds["experts_implementation"] = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, **kinds).double()
    for parameter in model.parameters():  # of a size that matters
        torch.nn.init.normal_(parameter, std=0.3)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for lengths in LENGTHS:
        ids = torch.randint(VOCABULARY, (sum(lengths),), generator=generator).tolist()
        mask = (torch.rand(sum(lengths), generator=generator) < 0.7).int().tolist()
        found.append({"input_ids": ids, "completion_mask": mask, "seq_lengths": lengths})
    return found


def one_by_one(model: Any) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """Return the summed loss of all examples, each by itself, how many labels count, and the
    gradients of their mean, by nothing of ours."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows():
        parts = [torch.tensor(row[k]).split(row["seq_lengths"]) for k in list(row)[:2]]
        for ids, mask in zip(*parts, strict=True):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            losses = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total = total + losses[mask[1:].bool()].sum()
            count += int(mask[1:].sum())
    (total / count).backward()
    return total / count, count, gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_a_row(model: Any, **filled: Any) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    batch, task = PackedCollator(0, **filled)(rows()), SFT()
    count = task.count(batch)
    loss = task.loss(model, batch, torch.tensor(float(count), dtype=torch.float64))
    loss.backward()
    return loss.detach(), count, gradients(model)


def assert_same(found: Any, expected: Any) -> None:
    (loss, count, grads), (its_loss, its_count, its_grads) = found, expected
    assert count == its_count
    assert float(loss) == pytest.approx(float(its_loss.detach()), abs=1e-6)
    assert grads.keys() == its_grads.keys() != set()
    for name, grad in its_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [*HERE, *ELSEWHERE])
def test_losses_and_gradients_are_those_of_the_examples_alone(kind: str) -> None:
    model, notes = of(kind).train(), list[str]()
    expected = one_by_one(model)
    with fused_sinks(model), kept_apart(model, notes.append):
        assert ours.is_lent(model.config.get_text_config()) == (kind in HERE)
        for filled in ({}, {"multiple": 16, "few_shapes": kind in HERE}):
            assert_same(in_a_row(model, **filled), expected)
    (note,) = notes
    assert ("example by example" in note) == (kind in HERE)
    assert not ours.is_lent(model.config.get_text_config())


def varlen_twin(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, by its definition: tensors [tokens, heads, size]."""
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    assert len(query) == int(cu_seq_q[-1])
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    tokens = torch.arange(len(query))
    example = torch.bucketize(tokens, cu_seq_k[1:], right=True)
    apart = tokens[:, None] - tokens[None]
    seen = example[:, None] == example[None]
    for distance, side in zip((apart, -apart), window_size, strict=True):
        seen &= (distance <= side) | (side < 0)
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def without_groups(*args: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
    """As it is before torch 2.12."""
    return varlen_twin(*args, scale=scale, window_size=window_size)


def one_call(monkeypatch: Any, call: Any = varlen_twin) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", call)
    monkeypatch.setattr(ours, "_has_kernel", lambda *_: True)
    ours._parameters.cache_clear()


@pytest.fixture(autouse=True)
def known_anew() -> Any:
    yield
    ours._parameters.cache_clear()


@pytest.mark.parametrize("kind", HERE)
def test_in_one_call_they_are_so_as_well(kind: str, monkeypatch: Any) -> None:
    one_call(monkeypatch)
    model, notes = of(kind).train(), list[str]()
    expected = one_by_one(model)
    with fused_sinks(model), kept_apart(model, notes.append):
        for filled in ({}, {"multiple": 16, "few_shapes": True}):
            assert_same(in_a_row(model, **filled), expected)
    assert ("varlen_attn" in notes[0]) == ("sinks" not in kind)


def test_in_one_call_of_an_older_torch(monkeypatch: Any) -> None:
    one_call(monkeypatch, without_groups)
    model = of("llama").train()
    expected = one_by_one(model)
    with kept_apart(model, print):
        assert_same(in_a_row(model), expected)


def test_heads_of_any_width_fit_into_one_call(monkeypatch: Any) -> None:
    """Values narrower than keys (DeepSeek's), and neither of a width that the kernel takes."""
    one_call(monkeypatch)
    stock = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 11, n).double() for n in (13, 13, 5))
    starts = torch.tensor([0, 4, 11, 11], dtype=torch.int32)
    module, places = torch.nn.Module(), {"cu_seq_lens_q": starts, "max_length_q": 8}
    found, _ = ours.attention_by_example(stock, module, query, key, value, None, **places)
    parts = [t.split([4, 7], dim=2) for t in (query, key, value)]
    expected = torch.cat([stock(module, *p, None)[0] for p in zip(*parts, strict=True)], dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_kernel_computes_what_its_twin_does(heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, 40, 41, 100, 128, 128, 128], dtype=torch.int32, device="cuda")
    tensors = [torch.randn(1, n, 128, 64, device="cuda") for n in (4, heads, heads)]
    places = {"cu_seq_lens_q": starts, "max_length_q": 64, "sliding_window": window}
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # the first goes example by example
        given = [t.detach().to(dtype).requires_grad_() for t in tensors]
        stock = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        module = torch.nn.Module()
        module.num_key_value_groups = 4 // heads
        out, _ = ours.attention_by_example(stock, module, *given, None, **places)
        grads = torch.autograd.grad(out.float().square().sum(), given)
        found.append([out, *grads])
    for exact, half in zip(*found, strict=True):
        error = (half.float() - exact).norm() / exact.norm()
        assert float(error.detach()) < 0.02


@pytest.mark.parametrize("reentrant", [False, True])
def test_they_are_so_where_layers_are_computed_again(reentrant: bool) -> None:
    model = of("gemma3, with windows").train()
    expected = one_by_one(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with kept_apart(model, print):
        assert_same(in_a_row(model), expected)


def test_what_users_chose_stays() -> None:
    model, notes = of("llama", "eager").train(), list[str]()
    expected = one_by_one(model)
    with kept_apart(model, notes.append):
        assert model.config._attn_implementation == "eager"
        assert_same(in_a_row(model), expected)
    assert "masks of all pairs" in notes[0]


@pytest.mark.parametrize("kind", ["mistral, with a window", "gemma3, with windows"])
@pytest.mark.parametrize("padded", [False, True])
def test_batches_that_are_not_packed_are_computed_as_ever(kind: str, padded: bool) -> None:
    """As those are that are measured on while a packed run trains."""
    model = of(kind).eval()
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    if padded:
        batch["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
        batch["attention_mask"][0, 7:] = 0
    expected = model(**batch, use_cache=False).logits
    with kept_apart(model, print):
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
        in_a_row(model)
        assert torch.equal(model(**batch, use_cache=False).logits, expected)


def test_no_pair_of_tokens_of_two_examples_is_computed(monkeypatch: Any) -> None:
    model, seen = of("llama"), list[tuple[int, int]]()
    stock = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[2], key.shape[2]))
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with kept_apart(model, print):
        seen.clear()
        in_a_row(model)
    each = [(n, n) for lengths in LENGTHS for n in lengths]
    assert seen == each * 2  # layers


def test_a_model_that_does_not_say_where_examples_begin_gets_masks(monkeypatch: Any) -> None:
    model, notes = of("llama").train(), list[str]()
    attention = type(model.get_base_model().model.layers[0].self_attn)
    whole = attention.forward
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

    def silent(self: Any, *args: Any, **kwargs: Any) -> Any:
        return whole(self, *args, **{k: v for k, v in kwargs.items() if k not in names})

    monkeypatch.setattr(attention, "forward", silent)
    expected = one_by_one(model)
    with kept_apart(model, notes.append):
        assert not ours.is_lent(model.config)
        assert_same(in_a_row(model), expected)
    assert "masks of all pairs" in notes[0]


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_a_model_that_refuses_packed_rows_by_itself_is_refused(
    error: Any, monkeypatch: Any
) -> None:
    """As those with short convolutions do, where the library for them is missing."""
    model = of("llama")
    attention = type(model.get_base_model().model.layers[0].self_attn)

    def refusing(*_: Any, **__: Any) -> Any:
        raise error("it takes another library")

    monkeypatch.setattr(attention, "forward", refusing)
    refused = pytest.raises(TrainingError, match="a row apart: it takes another library")
    with refused, kept_apart(model, print):
        pass
    assert not ours.is_lent(model.config)


# Rows and batches ---------------------------------------------------------------------------------


def examples(lengths: list[int]) -> Dataset:
    ids = [[i] * n for i, n in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [[1] * n for n in lengths]})


@pytest.mark.parametrize("length", [None, 20])
def test_each_example_is_whole_in_one_row_that_is_as_full_as_can_be(length: int | None) -> None:
    lengths = [3, 7, 10, 1, 9, 2, 8]  # 40 tokens
    rows = packed(examples(lengths), length)
    assert len(rows) == 40 // (length or 10)
    found = []
    for row in rows:
        parts = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        assert sum(row["seq_lengths"]) == (length or 10)
        found += [(int(part[0]), len(part)) for part in parts if len(set(part.tolist())) == 1]
    assert sorted(found) == list(enumerate(lengths))


def test_an_example_that_finds_no_room_is_told_and_not_cut() -> None:
    with pytest.raises(TrainingError, match="the longest example has 30 tokens") as error:
        packed(examples([30, 5]), 16)
    assert "set train.packing to 30 or more" in str(error.value)


def test_how_full_rows_are_is_told() -> None:
    found = filling(packed(examples([10, 6, 2])))
    assert found == (3, 2, 10, pytest.approx(0.1), "examples")
    assert found.words == "3 examples in 2 rows of up to 10 tokens, 10.0% of them empty"
    assert filling(packed(examples([10, 6, 2]), usual=18)) == (3, 1, 18, 0, "examples")
    assert filling(packed(examples([10, 6, 2]), usual=3)) == found
    assert filling(examples([10, 6, 2])) is None


def test_what_fills_a_batch_up_counts_for_nothing() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [1, 0, 1, 1, 1], "seq_lengths": [3, 2]}
    batch = PackedCollator(1, 8, few_shapes=True)([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 8]
    assert (batch["max_length_q"], batch["counted"], batch["tokens"]) == (4, 2, 5)
    assert SFT().tokens(None, batch) == 5


# Through the commands' ways -----------------------------------------------------------------------


def planned(**spec: Any) -> Any:
    return qa.plan(qa.Spec(**spec), check_output=False, cards=[80])


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_a_plan_says_what_a_step_sees(objective: str) -> None:
    given = {"objective": objective, "data": {"max_length": 256}}
    for packing, words in ((True, "256 tokens"), (1024, "1,024 tokens")):
        made = planned(**given, train={"packing": packing, "per_device_train_batch_size": 2})
        (note,) = [note for note in made.notes if "packed" in note]
        assert f"2 rows of {words}" in note
    assert made.memory.work.length == 1024
    assert not [note for note in planned(**given).notes if "packed" in note]


class FromTwo(transformers.GPT2LMHeadModel):
    """As RoBERTa does, it counts positions from 2 where a row does not say them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **more: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None] + 2
        return super().forward(input_ids=input_ids, position_ids=position_ids, **more)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        (FromTwo, "apart: it counts positions from another number than 0"),
        (transformers.RobertaForCausalLM, "does not keep the examples of a row apart"),
        (transformers.BloomForCausalLM, "does not keep the examples of a row apart"),
        (transformers.LlamaForCausalLM, ""),
    ],
)
def test_models_that_mix_rows_up_or_count_otherwise_are_refused(kind: Any, refused: str) -> None:
    """However little it is: of tiny random models a hundredth of the logits, as of BLOOM."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = kind(kind.config_class(**sizes, is_decoder=True)).eval()
    if refused:
        with pytest.raises(TrainingError, match=refused):
            refuse_leaks(model, PackedCollator(0))
    else:
        refuse_leaks(model, PackedCollator(0))


def test_a_plan_refuses_rows_without_room() -> None:
    with pytest.raises(PlanRefused, match=r"512 tokens, and a packed row has room for 100"):
        planned(train={"packing": 100})
    with pytest.raises(PlanRefused, match=r"lays text in rows of data\.max_length"):
        planned(objective="pretrain", train={"packing": 1024}, data={"max_length": 512})
    with pytest.raises(SpecError, match=r"train\.packing"):
        qa.Spec(train={"packing": 10})


def test_a_plan_refuses_to_pack_for_an_encoder_decoder_model(tmp_path: Any) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, num_layers=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path)
    with pytest.raises(PlanRefused, match="packing is for causal models"):
        planned(model=str(tmp_path), train={"packing": True})


@pytest.mark.parametrize("packing", [True, 96])
def test_a_run_learns_from_packed_rows_what_it_does_from_single_examples(packing: Any) -> None:
    """The loss of the first step, over all of the data, is that of stock transformers."""
    lengths = [30, 9, 22, 14, 3, 28, 17]
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    masks = [[int(i >= n // 3) for i in range(n)] for n in lengths]
    total, count, model = 0.0, 0, of("llama").float()
    for row, mask in zip(ids, masks, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(row)[1:, None])[:, 0]
        kept = torch.tensor(mask[1:]).bool()
        total, count = total + float(losses[kept].sum()), count + int(kept.sum())
    notes: list[str] = []
    found = qa.train(
        model,
        Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        tokenizer=transformers.AutoTokenizer.from_pretrained(demo.MODEL_DIR),
        **{"packing": packing, "per_device_train_batch_size": 8, "max_steps": 1},
        on_note=notes.append,
    )
    assert found.losses == [(1, pytest.approx(total / count, rel=1e-5))]
    assert found.tokens == sum(lengths)
    rows, longest = (2, 94) if packing == 96 else (5, 30)
    assert found.packed[:3] == (7, rows, longest)
    assert f"packing: {found.packed.words}" in notes


def test_rows_are_as_long_as_examples_may_be(tmp_path: Any) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(
        "".join(f'{{"prompt": "a", "completion": "{"b c " * n}"}}\n' for n in range(1, 9))
    )
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "lora")
    options = {"packing": True, "max_steps": 1, "max_length": 64}
    found = qa.train(model, str(data), eval_data=None, **options)
    assert found.packed.examples > found.packed.rows
    assert 32 < found.packed.length <= 64 == model.quantadapt.max_length
