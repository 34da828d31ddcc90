"""Training a tiny random model: the same numbers as by hand, also after a resume."""

from __future__ import annotations

import time

import pytest
import torch
from datasets import Dataset
from few_rows import few_rows
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from quantadapt.data.batches import CausalCollator, PackedCollator
from quantadapt.errors import OutputError, PlanRefused, TrainingError
from quantadapt.evaluation import perplexity
from quantadapt.folders.checkpoints import PARTIAL
from quantadapt.planning import plan
from quantadapt.planning.optimizers import optimizer_problems
from quantadapt.sharding import PACKED
from quantadapt.spec import Spec, TrainSpec
from quantadapt.training import base_parameters, problems, train

VOCABULARY = 64
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS),
    "adalora": lambda: AdaLoraConfig(init_r=6, target_r=2, total_step=999, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture(scope="module")
def data(random_data) -> Dataset:
    return random_data


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)).to(dtype)


def adapted(name: str = "lora", dtype: torch.dtype = torch.float32):
    base = llama(dtype)
    torch.manual_seed(1)
    config = CONFIGS[name]()
    config.task_type = "CAUSAL_LM"
    return get_peft_model(base, config)


def spec(**options) -> TrainSpec:
    defaults = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4}
    return TrainSpec(**{**defaults, "learning_rate": 1e-2, **options})


class Stop:
    """An on_log that presses Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, entry: dict) -> None:
        if entry["step"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_token_of_a_row_is_no_label(packed):
    """Nothing comes before it to predict it from, and `counted` must not say otherwise."""
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [1, 1, 1], "seq_lengths": [3]},
            {"input_ids": [8, 9], "completion_mask": [0, 1], "seq_lengths": [2]}]  # fmt: skip
    batch = (PackedCollator(0) if packed else CausalCollator(pad_token_id=0, multiple=4))(rows)
    assert batch["counted"] == int((batch["labels"][:, 1:] != -100).sum()) == 3
    assert tuple(batch["input_ids"].shape) == ((1, 5) if packed else (2, 4))


def test_losses_equal_a_loop_written_by_hand(tokenizer, data, tmp_path):
    part = data.select(range(4))
    options = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.5}
    model = adapted("vera")  # no dropout
    found = train(model, tokenizer, part, spec(**options), output=tmp_path, seed=0)

    model = adapted("vera").train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    expected = []
    for _ in range(4):
        total, count = 0.0, 0
        for row in part:
            ids = torch.tensor([row["input_ids"]])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            total = total - log_probs.gather(1, ids[0, 1:, None])[2:].sum()
            count += ids.shape[1] - 3
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert [loss for _, loss in found.losses] == pytest.approx(expected, abs=1e-5)
    assert found.tokens == 4 * sum(map(len, part["input_ids"]))


@pytest.mark.parametrize(
    "name", ["lora", "adalora", *(pytest.param(n, marks=pytest.mark.slow) for n in [*CONFIGS][2:])]
)
def test_a_resume_goes_on_with_the_same_losses(name, tokenizer, data, tmp_path):
    kind = spec(max_steps=12, save_steps=6)  # 8 steps per epoch: in the middle of one
    whole = train(adapted(name), tokenizer, data, kind, output=tmp_path / "a", seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(adapted(name), tokenizer, data, kind, output=tmp_path / "b", seed=3, on_log=Stop(8))
    left = [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()]
    assert left == ["checkpoint-6"]

    again = spec(max_steps=12, save_steps=6, resume=True)
    model = adapted(name)
    resumed = train(model, tokenizer, data, again, output=tmp_path / "b", seed=3)
    assert resumed.resumed_from == 6
    assert [step for step, _ in resumed.losses] == list(range(1, 13))
    assert dict(resumed.losses) == pytest.approx(dict(whole.losses), abs=1e-5)

    loaded = PeftModel.from_pretrained(llama(), tmp_path / "b" / "checkpoints" / "checkpoint-12")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = loaded.eval()(ids).logits - model.eval()(ids).logits
    assert float(difference.abs().max()) < 1e-5


def test_a_finished_run_has_nothing_to_resume(tokenizer, data, tmp_path):
    train(adapted(), tokenizer, data, spec(save_steps=2), output=tmp_path, seed=0)
    calls: list[dict] = []
    kind = spec(save_steps=2, resume=True)
    model = adapted()
    found = train(model, tokenizer, data, kind, output=tmp_path, seed=0, on_log=calls.append)
    assert (found.steps, found.resumed_from, calls) == (4, 4, [])
    weights = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert all(float(p.detach().abs().sum()) > 0 for p in weights.values())


def test_checkpoints_of_another_run_are_not_mixed_in(tokenizer, data, tmp_path):
    train(adapted(), tokenizer, data, spec(save_steps=2), output=tmp_path, seed=0)
    with pytest.raises(OutputError, match=r"earlier run\n    fix: set train\.resume"):
        train(adapted(), tokenizer, data, spec(), output=tmp_path, seed=0)


def test_a_checkpoint_that_cannot_be_written_leaves_the_others_whole(
    tokenizer, data, tmp_path, monkeypatch
):
    from transformers import Trainer

    def full(self, *args):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_scaler", full)
    with pytest.raises(OutputError, match="checkpoint-4: not enough disk space"):
        train(adapted(), tokenizer, data, spec(save_steps=2), output=tmp_path, seed=0)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_what_a_run_that_was_killed_has_left_is_replaced(tokenizer, data, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / PARTIAL / "checkpoint-2").mkdir(parents=True)
    (checkpoints / PARTIAL / "checkpoint-2" / "half").write_text("a file")
    train(adapted(), tokenizer, data, spec(save_steps=2), output=tmp_path, seed=0)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert list(checkpoints.rglob("half")) == []


def test_adalora_ranks_fall_to_the_budget(tokenizer, data, tmp_path):
    model = adapted("adalora")
    train(model, tokenizer, data, spec(max_steps=12), output=tmp_path, seed=0)
    config = model.peft_config["default"]
    assert config.total_step == 12
    ranks = [sum(kept) for kept in config.rank_pattern.values()]
    assert sum(ranks) == 2 * len(TARGETS) < 6 * len(TARGETS)
    alive = [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(alive) == sum(ranks)


def test_a_schedule_that_does_not_fit_is_replaced(tokenizer, data, tmp_path):
    model = adapted("adalora")
    model.peft_config["default"].tinit, model.peft_config["default"].tfinal = 200, 500
    train(model, tokenizer, data, spec(max_steps=12), output=tmp_path, seed=0)
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal) == (1, 3)
    assert sum(map(sum, config.rank_pattern.values())) == 2 * len(TARGETS)


@pytest.mark.parametrize("max_steps", [1, 2])
def test_adalora_survives_runs_too_short_to_prune(max_steps, tokenizer, data, tmp_path):
    model = adapted("adalora")
    found = train(model, tokenizer, data, spec(max_steps=max_steps), output=tmp_path, seed=0)
    assert found.steps == max_steps


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "per_device_train_batch_size": 16},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 8},
        {"gradient_checkpointing": True, "use_reentrant": True, "per_device_train_batch_size": 8},
    ],
)
def test_memory_options_do_not_change_the_loss(options, tokenizer, data, tmp_path):
    part = data.select(range(8))
    plain = train(
        adapted("vera"),
        tokenizer,
        part,
        spec(max_steps=2, per_device_train_batch_size=8),
        output=tmp_path / "a",
        seed=0,
    )
    model = adapted("vera")
    kind = spec(max_steps=2, **options)
    found = train(model, tokenizer, part, kind, output=tmp_path / "b", seed=0)
    assert dict(found.losses) == pytest.approx(dict(plain.losses), abs=2e-5)
    assert found.tokens == plain.tokens
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_the_model_is_given_back_as_it_was(tokenizer, data, tmp_path):
    model = adapted(dtype=torch.bfloat16).eval()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = model.config.to_dict()
    kind = spec(save_steps=2, gradient_checkpointing=True)
    train(model, tokenizer, data, kind, output=tmp_path, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == frozen[name].dtype
            assert parameter.equal(frozen[name])
    assert not model.training
    assert "forward" not in {**model.__dict__, **model.get_base_model().__dict__}
    assert not model.get_input_embeddings()._forward_hooks
    assert model.config.to_dict() == config
    assert not list(tmp_path.rglob("README.md"))


def test_the_first_and_the_last_step_are_logged(tokenizer, data, tmp_path, capfd):
    calls: list[dict] = []
    kind = spec(max_steps=7, logging_steps=3)
    found = train(adapted(), tokenizer, data, kind, output=tmp_path, seed=0, on_log=calls.append)
    assert [call["step"] for call in calls] == [1, 3, 6, 7]
    keys = {"step", "max_steps", "loss", "learning_rate", "grad_norm", "seconds", "tokens"}
    keys |= {"seconds_left", "peak_memory_gib"}
    assert all(set(call) == keys and call["max_steps"] == 7 for call in calls)
    assert found.losses == [(call["step"], call["loss"]) for call in calls]
    assert found.tokens == calls[-1]["tokens"]
    assert 0 < calls[0]["seconds"] < calls[-1]["seconds"] <= found.seconds
    assert calls[0]["seconds_left"] > calls[-1]["seconds_left"] == 0
    assert 0.1 < calls[-1]["peak_memory_gib"] <= found.peak_memory_gib
    assert capfd.readouterr().out == ""


def test_a_loss_that_is_no_number_stops_before_the_weights_are_hurt(tokenizer, data, tmp_path):
    model = adapted()

    inner = model.get_base_model()
    healthy, calls = inner.forward, iter(range(99))

    def poisoned(*args, **kwargs):
        output = healthy(*args, **kwargs)
        if inner.training:  # what is tried out before is not
            output.loss = output.loss * (float("nan") if next(calls) == 2 else 1.0)
        return output

    inner.forward = poisoned
    with pytest.raises(TrainingError, match=r"step 3\n    fix: lower train\.learning_rate"):
        train(model, tokenizer, data, spec(), output=tmp_path, seed=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_encoder_decoder_model_learns(tokenizer, data, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **tokens))
    config = LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config)
    before = perplexity(model, data).loss
    found = train(model, tokenizer, data, spec(max_steps=16), output=tmp_path, seed=0)
    after = perplexity(model, data).loss
    assert after < before - 0.05
    assert found.tokens == 2 * sum(len(ids) + 1 for ids in data["input_ids"])  # eos for the encoder

    text = data.map(lambda row: {"completion_mask": [1] * len(row["input_ids"])})
    with pytest.raises(TrainingError, match="needs prompts"):
        train(model, tokenizer, text, spec(), output=tmp_path, seed=0)


def test_accumulating_an_encoder_decoder_model_changes_nothing(tokenizer, data, tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes, **tokens)
    found = []
    for size in (4, 2):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(T5ForConditionalGeneration(config), lora)
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        found.append(train(model, tokenizer, data, spec(**parts), output=tmp_path, seed=0).losses)
    whole, accumulated = ([loss for _, loss in losses] for losses in found)
    assert accumulated == pytest.approx(whole, abs=1e-5)


def balanced() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    routers = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads, **routers))


def with_z_loss() -> BambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "z_loss_coefficient": 0.1}
    return BambaForCausalLM(BambaConfig(vocab_size=VOCABULARY, **sizes, **heads, **mamba))


@pytest.mark.parametrize(
    ("make", "adapter", "beside"),
    [
        (balanced, "lora", lambda made, _: 0.5 * _unbalanced(made.router_logits)),
        (with_z_loss, "lora", lambda made, _: 0.1 * made.logits.logsumexp(-1).square().mean()),
        (llama, "adalora", lambda _, model: _not_orthogonal(model)),
    ],
    ids=["routers", "z-loss", "adalora"],
)
def test_what_is_added_to_the_loss_counts_once_a_step(
    make, adapter, beside, tokenizer, data, tmp_path
):
    """It did once a pass, so that its weight rose with the passes of a step."""
    base = make()
    torch.manual_seed(1)
    config = CONFIGS[adapter]()
    config.task_type, config.lora_dropout = "CAUSAL_LM", 0.0
    config.target_modules = "all-linear" if make is with_z_loss else TARGETS[:2]
    model = get_peft_model(base, config)
    with torch.no_grad():
        total, count, added = 0.0, 0, []
        order = torch.utils.data.RandomSampler(data, generator=torch.Generator())
        order.generator.manual_seed(0)
        rows = [data[i] for i in list(order)[:4]]
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            made = model(ids, use_cache=False)
            wanted = torch.tensor(row["completion_mask"][1:]).bool()
            losses = torch.nn.functional.cross_entropy(
                made.logits[0, :-1].double(), ids[0, 1:], reduction="none"
            )
            total, count = total + losses[wanted].sum(), count + int(wanted.sum())
            added.append(beside(made, model))
    expected = float(total / count + sum(added) / len(rows))
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    found = train(model, tokenizer, data, spec(**parts), output=tmp_path, seed=0)
    assert found.losses[0][1] == pytest.approx(expected, abs=2e-5)


def _unbalanced(routers) -> torch.Tensor:
    """Mixtral's: experts times the share of tokens that each gets times its mean probability."""
    shares = torch.cat([*routers]).softmax(-1)
    chosen = torch.zeros_like(shares).scatter(1, shares.topk(2).indices, 1.0)
    return shares.shape[1] * (chosen.mean(0) * shares.mean(0)).sum()


def _not_orthogonal(model) -> torch.Tensor:
    """AdaLoRA's, as PEFT writes it down: the mean of ‖G - I‖ of its factors, times its weight."""
    found = []
    for name, weight in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = weight @ weight.T if "lora_A" in name else weight.T @ weight
            found.append(torch.linalg.norm(gram - torch.eye(len(gram))))
    return model.peft_config["default"].orth_reg_weight * sum(found) / len(found)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_the_loss_is_the_mean_over_all_tokens_but_the_first(kind, tokenizer, data, tmp_path):
    """Whatever the class is called, and without a loss on routers that its config does not ask
    for."""
    torch.manual_seed(0)
    if kind == "gpt2":
        no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, **no_dropout)
        base, targets = GPT2LMHeadModel(config), ["c_attn"]
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        config = MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads)
        base, targets = MixtralForCausalLM(config), ["q_proj"]
    lora = LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"
    )
    model = get_peft_model(base, lora)
    part = data.select(range(4)).map(lambda row: {"completion_mask": [1] * len(row["input_ids"])})
    expected = perplexity(model, part).loss
    found = train(model, tokenizer, part, spec(max_steps=1), output=tmp_path, seed=0)
    assert found.losses == [(1, pytest.approx(expected, abs=1e-5))]


def test_packing_is_refused_where_examples_would_see_each_other(tokenizer, data, tmp_path):
    """BLOOM has no positions to read from where an example begins."""
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.2
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["dense"], task_type="CAUSAL_LM")
    model = get_peft_model(BloomForCausalLM(config), lora)
    with pytest.raises(TrainingError, match="BloomForCausalLM does not keep the examples"):
        train(model, tokenizer, data, spec(packing=True), output=tmp_path, seed=0)
    assert train(adapted(), tokenizer, data, spec(packing=True), output=tmp_path, seed=0).steps == 4


def test_weights_are_counted_without_the_adapter():
    expected = sum(p.numel() for p in llama().parameters())
    assert base_parameters(llama()) == expected
    assert all(base_parameters(adapted(name)) == expected for name in CONFIGS)
    sharded = llama()
    packed = torch.nn.Parameter(torch.zeros(100), requires_grad=False)
    sharded.model.layers[0].register_parameter(PACKED, packed)
    assert base_parameters(sharded) == expected


def test_settings_that_cannot_be_used_are_explained(tokenizer, data, tmp_path):
    (found,) = problems(TrainSpec(optim="adamw_torc"))
    assert (found.where, found.fix) == ("train.optim", "did you mean 'adamw_torch'?")
    assert problems(TrainSpec()) == []
    (short,) = problems(TrainSpec(optim="adamw"))
    assert "'adamw_torch_fused'" in short.fix
    with pytest.raises(TrainingError, match="cannot be set up"):
        train(adapted(), tokenizer, data, spec(optim="no"), output=tmp_path, seed=0)
    frozen = adapted().requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable weights"):
        train(frozen, tokenizer, data, spec(), output=tmp_path, seed=0)


OPTIMIZERS = [name.value for name in OptimizerNames]
SCHEDULES = [name.value for name in SchedulerType]
COMPILED = "adamw_torch_4bit"
ELSEWHERE = (
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("grokadamw", "stable_adamw"),
)
"""Optimizers of libraries that these tests do not have."""


@pytest.mark.parametrize(
    "options",
    [
        *({"optim": name} for name in OPTIMIZERS if name != COMPILED),
        *({"lr_scheduler_type": name} for name in SCHEDULES),
        pytest.param({"optim": COMPILED}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_what_transformers_has_trains_or_is_refused_at_once(options, tokenizer, data, tmp_path):
    """None is found out by transformers when the base is there."""
    name = next(iter(options.values()))
    given = spec(**options, max_steps=3, warmup_ratio=0.4)
    if found := optimizer_problems(given):
        with pytest.raises(PlanRefused, match=name):
            train(adapted(), tokenizer, data, given, output=tmp_path, seed=0)
        with pytest.raises(PlanRefused, match=name):
            plan(Spec(backend="none", train=options))
        away = any(name.startswith(begin) for begin in ELSEWHERE)
        assert ("which is not installed" in found[0].what) == away
        return
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert train(model, tokenizer, data, given, output=tmp_path, seed=0).steps == 3
    after = dict(model.named_parameters())
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.slow
def test_what_a_slow_dequantize_costs_is_told(tmp_path, monkeypatch) -> None:
    from quantadapt_hqq import HQQTarget

    import quantadapt as qa
    from quantadapt.testing.small_demo import small_model

    model = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), "lora")

    def share(folder: str, **options) -> float:
        result = qa.train(model, few_rows(), max_steps=2, output=tmp_path / folder, **options)
        assert not {"train", "zero_grad", "forward"} & vars(model).keys()
        return result.dequantize_share

    fast, own = share("fast"), HQQTarget.dequantize

    def slow(self, module):
        time.sleep(0.04)
        return own(self, module)

    monkeypatch.setattr(HQQTarget, "dequantize", slow)
    assert fast > 0
    # 14 layers, forward and backward: some 1,100 ms a step, however long the rest takes
    assert 3 * fast < share("slow") <= 1
