"""Attention with sinks in one call, against transformers' own, which holds all logits."""

import pytest
import torch
import transformers

from quantadapt.model.sinks import NAME, attention_with_sinks, fused_groups, fused_sinks

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
}
PLAIN = {key: size for key, size in SIZES.items() if key != "sliding_window"}
KINDS = {
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "granite-swa": ("GraniteSWAConfig", {}),
}


EXACT = {"gpt-oss"}  # computes in the dtype that it has, also in float64


def of(kind):
    name, more = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):  # of a size that matters
            torch.nn.init.normal_(parameter, mean=1.0, std=2.0)
    return (model.double() if kind in EXACT else model).eval()


def outcome(model, **batch):
    """Return the logits of all tokens that count, and the gradient of everything."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits[mask].square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits[mask].detach(), grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [5, 17])
def test_it_is_the_same_attention(kind, padded, length) -> None:
    model = of(kind)
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :3] = 0
    logits, grads = outcome(model, **batch)
    with fused_sinks(model):
        assert model.config._attn_implementation == NAME
        found, found_grads = outcome(model, **batch)
    assert model.config._attn_implementation == "eager"
    near = {"rtol": 1e-9, "atol": 1e-9} if kind in EXACT else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, logits, **near)
    assert grads.keys() == found_grads.keys()
    assert any(name.endswith("sinks") for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, **near)
    for parameter in model.parameters():  # the sinks do something
        if parameter.shape == (4,):
            parameter.data.fill_(-1e9)
    assert (outcome(model, **batch)[0] - logits).abs().max() > 1e-3


def test_token_by_token() -> None:
    model = of("gpt-oss")
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(ids, use_cache=False).logits
    with fused_sinks(model), torch.no_grad():
        cache = transformers.DynamicCache()
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-9, atol=1e-9)


def test_a_choice_of_the_users_stays_and_other_models_are_left_alone() -> None:
    model = of("gpt-oss")
    model.set_attn_implementation("flex_attention")
    other = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**PLAIN))
    with fused_sinks(model), fused_sinks(other):
        assert model.config._attn_implementation == "flex_attention"
        assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mask_heads", [None, 1, 4])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_query_sees_shared_keys_without_repeating_them(sinks, mask_heads) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    key, value = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    mask = None
    if mask_heads:
        mask = torch.rand(3, mask_heads, 1, 5) < 0.6
        mask[..., 0] = True
    logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    s_aux = torch.randn(4, dtype=torch.float64) if sinks else None
    if sinks:
        logits = torch.cat([logits, s_aux.view(1, 4, 1, 1).expand(3, 4, 1, 1)], -1)
    expected = logits.softmax(-1)[..., :5] @ value.repeat_interleave(2, 1)
    found, _ = attention_with_sinks(None, query, key, value, mask, s_aux=s_aux)
    assert (found - expected.transpose(1, 2)).abs().max() < 1e-12


def test_attention_is_put_back_as_it_was() -> None:
    config = transformers.LlamaConfig(**PLAIN)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with fused_groups(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
