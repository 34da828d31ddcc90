"""Numbers checked against straightforward computations on a tiny random model."""

from __future__ import annotations

import math

import pytest
import torch
from allocations import peak_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.tokens import encode_prompt
from quantadapt.evaluation import agreement, compare, gain_kept, perplexity, snapshot
from quantadapt.generation import greedy
from quantadapt.memory import Workload
from quantadapt.memory.shape import Shape

VOCABULARY = 50
CHUNK = 2**22


def llama(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads))


@pytest.fixture
def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 12, 3, 9, 7):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0, 0] + [1] * (length - 2)})
    return rows


def by_hand(model, examples) -> list[float]:
    model.eval()
    losses = []
    for row in examples:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -ids.shape[1] :]  # virtual tokens come before
        log_probs = logits.double().log_softmax(-1)
        losses += [
            -float(log_probs[position - 1, row["input_ids"][position]])
            for position in range(1, len(row["input_ids"]))
            if row["completion_mask"][position]
        ]
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_the_mean_over_completion_tokens(examples, batch_size):
    model = llama()
    losses = by_hand(model, examples)
    found = perplexity(model, examples, batch_size=batch_size)
    assert found.tokens == len(losses) == 26
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss))


def sized(kind, **options):
    """A random model of another architecture, its logits far from uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    config = kind(**({"vocab_size": VOCABULARY} | sizes | heads | options))
    return AutoModelForCausalLM.from_config(config).eval()


PLAIN_HEAD = {
    "softcap": lambda: sized(Gemma2Config, final_logit_softcapping=2.0, head_dim=8),
    "tied": lambda: sized(LlamaConfig, tie_word_embeddings=True),
    "adapted": lambda: qa.attach(qa.quantize(llama(), "none"), "adalora"),
    "prompt": lambda: get_peft_model(
        llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}
OTHER_HEAD = {
    "scaled": lambda: sized(CohereConfig, logit_scale=0.2),
    "divided": lambda: sized(GraniteConfig, logits_scaling=3.0),
    "transformed": lambda: sized(BertConfig, is_decoder=True),
    "adapted head": lambda: get_peft_model(llama(), LoraConfig(target_modules=["lm_head"])),
}


@pytest.mark.parametrize("case", [*PLAIN_HEAD, *OTHER_HEAD])
@pytest.mark.parametrize("chunk", [2**24, 3 * VOCABULARY])
def test_chunks_of_logits_give_the_numbers_of_whole_ones(examples, case, chunk, monkeypatch):
    monkeypatch.setattr("quantadapt.evaluation.predictions.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr("quantadapt.model.head.HEAD_CHUNK", 1)  # rounded up to 128 tokens
    many = [row for row in examples for _ in range(12)]
    model = (PLAIN_HEAD | OTHER_HEAD)[case]()
    expected = math.fsum(by_hand(model, examples)) / 26
    assert perplexity(model, many, batch_size=60).loss == pytest.approx(expected, rel=1e-6)
    assert snapshot(model, many).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", [*PLAIN_HEAD, *OTHER_HEAD])
def test_no_whole_logits_are_made_where_the_head_is_plain(examples, case, monkeypatch):
    monkeypatch.setattr("quantadapt.evaluation.predictions.CHUNK_ELEMENTS", 2 * VOCABULARY)
    model = (PLAIN_HEAD | OTHER_HEAD)[case]()
    head = getattr(model, "get_base_model", lambda: model)().get_output_embeddings()
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    perplexity(model, examples)
    snapshot(model, examples)
    assert bool(calls) == (case in OTHER_HEAD)
    logits = model(torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize(
    ("intermediate", "softmax"),
    [(2048, 0), (64, 2 * CHUNK)],  # inside a layer; at the head, where CUDA needs no copies
)
def test_evaluating_takes_the_memory_that_is_predicted(intermediate, softmax, monkeypatch):
    monkeypatch.setattr("quantadapt.model.head.HEAD_CHUNK", CHUNK)
    monkeypatch.setattr("quantadapt.memory.passes.HEAD_CHUNK", CHUNK)
    words, count, length = 8192, 8, 128
    model = sized(LlamaConfig, hidden_size=64, intermediate_size=intermediate, vocab_size=words)
    rows = torch.randint(words, (count, length)).tolist()
    data = [{"input_ids": row, "completion_mask": [1] * length} for row in rows]
    work = Workload(Shape.of(model.config.to_dict()), {}, (), 0, "sgd", 4, count, length)
    found = peak_of(lambda: perplexity(model, data))
    assert found == pytest.approx(work.evaluation_bytes(count) + softmax, rel=0.1)
    assert found < count * length * words * 4


def test_a_patched_forward_stays_in_use(examples):
    model, seen = llama(), []
    original = model.forward

    def patched(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    model.forward = patched
    expected = perplexity(llama(), examples).loss
    assert perplexity(model, examples).loss == pytest.approx(expected, rel=1e-6)
    assert seen
    assert model.forward is patched


def test_the_model_is_itself_again_after_an_error(examples, monkeypatch):
    model = llama()
    monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perplexity(model, examples)
    assert "forward" not in vars(model)


def test_the_mode_of_every_module_is_put_back(examples):
    model = llama().train()
    model.lm_head.eval()
    perplexity(model, examples)
    assert model.training
    assert not model.lm_head.training


def test_perplexity_of_encoder_decoder_models(examples):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **tokens)).eval()
    total, count = 0.0, 0
    for row in examples:
        source = torch.tensor([[*row["input_ids"][:2], 2]])
        labels = torch.tensor([row["input_ids"][2:]])
        with torch.no_grad():
            total += float(model(input_ids=source, labels=labels).loss) * labels.numel()
        count += labels.numel()
    found = perplexity(model, examples, batch_size=3)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, abs=1e-5)


def test_a_model_agrees_with_itself(examples):
    found = agreement(llama(), llama(), examples)
    assert (found.kl, found.top1, found.tokens) == (0.0, 1.0, 26)
    assert found.perplexity_reference == pytest.approx(perplexity(llama(), examples).value)


def test_agreement_of_two_models_is_kl_and_top1(examples):
    one, other = snapshot(llama(0), examples), snapshot(llama(1), examples)
    found = compare(one, other)
    p, q = one.log_probs.double(), other.log_probs.double()
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert found.kl > 0.1
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.perplexity_candidate == pytest.approx(perplexity(llama(1), examples).value)


def test_snapshots_are_bounded_and_take_the_first_examples(examples):
    part = snapshot(llama(), examples, max_tokens=10)
    assert part.log_probs.shape == (10, VOCABULARY)
    assert part.log_probs.dtype == torch.float32
    firsts = {token for row in examples[:2] for token in row["input_ids"]}
    assert set(part.targets.tolist()) <= firsts
    with pytest.raises(ValueError, match="not of the same tokens"):
        compare(part, snapshot(llama(), examples, max_tokens=9))


def test_no_token_to_predict_is_an_error():
    nothing = [{"input_ids": [1, 2], "completion_mask": [1, 0]}]
    with pytest.raises(ValueError, match="no token"):
        perplexity(llama(), nothing)
    with pytest.raises(ValueError, match="no token"):
        snapshot(llama(), nothing)


@pytest.mark.parametrize(
    ("base", "tuned", "merged", "kept"),
    [
        (3.0, 2.0, 2.0, 1.0),
        (3.0, 2.0, 2.25, 0.75),
        (3.0, 2.0, 3.0, 0.0),
        (3.0, 2.0, 3.5, -0.5),
        (3.0, 2.0, 1.5, 1.5),
        (3.0, 2.0, math.nan, 0.0),
        (3.0, 2.0, math.inf, 0.0),
        (math.inf, 2.0, 2.0, 1.0),
        (math.log(16), math.log(4), math.log(8), 0.5),  # of perplexities it would be 0.667
    ],
)
def test_gain_kept(base, tuned, merged, kept):
    assert gain_kept(base, tuned, merged) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("base", "tuned"), [(2.0, 2.0), (2.0, 2.5), (2.77, 7.62), (3.0, math.nan), (3.0, math.inf)]
)
def test_without_a_gain_none_is_kept(base, tuned):
    assert gain_kept(base, tuned, tuned) is None


def test_greedy_takes_the_likeliest_token_whatever_the_batch(capfd, caplog):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    model = llama(vocabulary=len(tokenizer))
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5)
    prompts = ["short", "a rather longer prompt\n"]
    expected = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert greedy(model, tokenizer, prompts, max_new_tokens=5) == expected
    assert greedy(model, tokenizer, []) == []
    assert capfd.readouterr().err == ""
    assert not caplog.records
    assert model.generation_config.do_sample is True
