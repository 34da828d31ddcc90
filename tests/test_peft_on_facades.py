"""PEFT's own functions over facades, beside the same functions over dense layers that hold the same
numbers: what PEFT does to a layer, a facade bears as `nn.Linear` does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from parameters import slow_but
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import quantadapt as qa
from quantadapt.errors import ModelError
from quantadapt.facade import LazyWeight, QuantLinear, facades
from quantadapt.protocols import AdapterTarget

BACKENDS = ("none", "hqq", "bnb-nf4", "torchao-int8")
TARGETS = ["a", "b"]


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128, bias=bias)
        self.block = nn.Sequential(nn.Linear(128, 64, bias=bias))
        self.b = nn.Linear(64, 64, bias=bias)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.block(torch.tanh(self.a(x))))
        return self.head(torch.tanh(self.b(hidden)))


X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=slow_but(BACKENDS, "hqq", "torchao-int8"))
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A model of facades, and a dense one with the same numbers."""
    return made(request.param)


def made(backend: str, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(bias))
    dense, model = models
    model = qa.quantize(
        model, backend=backend, device="cpu", dtype="float32", skip_modules=["head"]
    )
    for name, facade in facades(model):
        dense.get_submodule(name).weight.data.copy_(facade.dequantize())
    return model, dense


def tuned(model: nn.Module, config: Any) -> Any:
    """Attach, and give every trained parameter another value than the one it starts from."""
    torch.manual_seed(2)
    result = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in result.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return result


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the vendors' own tensors."""
    kept = {}
    for name, facade in facades(model):
        for key, value in facade.vendor.state_dict().items():
            plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            kept[f"{plain}.{key}"] = copy.deepcopy(value)
    return kept


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    def raw(value: Any) -> Any:
        return value.dequantize() if hasattr(value, "__tensor_flatten__") else value

    return one.keys() == other.keys() and all(
        torch.equal(raw(one[key]), raw(other[key])) for key in one
    )


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.VeraConfig, peft.LoraConfig])
def test_unload_gives_the_base_back(pair, config) -> None:
    model, _ = pair
    before, y = bits(model), model(X)
    bare = tuned(model, config(r=4, target_modules=TARGETS)).unload()
    assert same(bits(bare), before)
    assert torch.equal(bare(X), y)


CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, r=0, target_modules=TARGETS),
    "delora": lambda: peft.DeloraConfig(target_modules=TARGETS),
    "peanut": lambda: peft.PeanutConfig(target_modules=TARGETS),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=TARGETS),
    "frod": lambda: peft.FrodConfig(target_modules=TARGETS),
}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_merging_in_place_and_back(pair, name, safe) -> None:
    """Without no_grad around it, as PEFT's documentation calls it."""
    model, dense = pair
    before = bits(model)
    facade, stock = tuned(model, CONFIGS[name]()).eval(), tuned(dense, CONFIGS[name]()).eval()
    y = stock(X)
    assert close(facade(X), y)
    for each in (facade, stock):
        each.merge_adapter(safe_merge=safe)
    assert close(facade(X), stock(X))
    facade.unmerge_adapter()
    assert same(bits(facade), before)
    assert close(facade(X), y)


@pytest.mark.parametrize("name", ["lora", "oft", "supertuning"])
def test_merge_and_unload_quantizes_again(pair, name) -> None:
    model, dense = pair
    merged = tuned(model, CONFIGS[name]()).merge_and_unload()
    expected = tuned(dense, CONFIGS[name]()).merge_and_unload()
    assert [n for n, _ in facades(merged)] == ["a", "block.0", "b"]
    for layer in TARGETS:
        facade, weight = merged.get_submodule(layer), expected.get_submodule(layer).weight
        again = copy.deepcopy(facade)
        again.requantize(weight.detach())
        assert close(facade.dequantize(), again.dequantize())
        assert close(facade.dequantize(), weight, 0.15)  # what 4 bits cost
        assert facade._merged is None, "the dense weights are gone"


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("name", ["lora", "oft"])
def test_what_is_merged_and_unloaded_is_quantized_at_once(pair, name, merged_before) -> None:
    """Also where somebody holds PEFT's layers, say a cycle of references that waits for gc."""
    model, _ = pair
    wrapped = tuned(model, CONFIGS[name]())
    held = list(wrapped.modules())
    if merged_before:
        wrapped.merge_adapter()
    merged = wrapped.merge_and_unload()
    assert all(facade._merged is None for _, facade in facades(merged))
    expected = merged(X)
    del held
    assert torch.equal(merged(X), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_is_its_own(again) -> None:
    model, _ = made("bnb-nf4")
    merged = tuned(model, CONFIGS["lora"]())
    before, y = bits(merged), merged(X).detach()
    merged.merge_adapter()
    copied = again(merged)
    merged.unmerge_adapter()
    assert close(copied(X), y)
    copied.unmerge_adapter()
    assert same(bits(copied), before)
    assert close(copied(X), y)


def test_what_is_saved_while_merged_is_merged(pair) -> None:
    model, _ = pair
    before = bits(model)
    merged = tuned(model, CONFIGS["lora"]())
    merged.merge_adapter()
    assert not same(bits(merged), before)
    merged.unmerge_adapter()
    assert same(bits(merged), before)


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "data.add_": lambda w: w.data.add_(torch.ones(w.shape)),
    "data.copy_": lambda w: w.data.copy_(torch.full(w.shape, 0.5)),
    "item": lambda w: w.__setitem__(0, 0.25),
    "view of a view": lambda w: w.data.T[1:3].reshape(-1, 64)[0].fill_(0.5),
    "scatter": lambda w: w.data.reshape(-1).scatter_add_(0, torch.arange(64), torch.ones(64)),
    "split": lambda w: w.chunk(2)[1].zero_(),
    "out": lambda w: torch.add(w.detach(), 1.0, out=w),
    "foreach": lambda w: torch._foreach_mul_([w, w.data[:2]], 2.0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([3]), torch.ones(1, w.shape[1])),
    "data =": lambda w: setattr(w, "data", torch.full(w.shape, 0.5)),
    "+=": lambda w: setattr(w, "data", w.data.__iadd__(torch.ones(w.shape))),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_arrives(pair, name) -> None:
    """As often as it is quantized, and no more than that costs."""
    model, dense = pair
    with torch.no_grad():
        WRITES[name](model.b.weight)
        WRITES[name](dense.b.weight)
        again = copy.deepcopy(model.b)
        again.requantize(dense.b.weight)
    assert close(model.b.dequantize(), again.dequantize(), 0.01)
    assert close(model.b.dequantize(), dense.b.weight, 0.15)
    assert not any(p.requires_grad for p in model.b.parameters())


def test_views_stay_lazy_and_read_right() -> None:
    model, dense = made("hqq")
    lazy, weight = model.a.weight, dense.a.weight.detach()
    for view in (
        lambda w: w.T,
        lambda w: w.reshape(-1)[5:99:3],
        lambda w: w.unsqueeze(0).expand(2, -1, -1),
        lambda w: w.view(2, 64, 64).transpose(0, 2),
    ):
        assert isinstance(view(lazy), LazyWeight)
        assert torch.equal(view(lazy).clone(), view(weight))
        assert view(lazy).stride() == view(weight).stride()


class _Once(AdapterTarget):
    def matches(self, module: nn.Module) -> bool:
        return True

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        return module.weight.detach()


def test_what_cannot_be_written_is_refused() -> None:
    facade = QuantLinear(nn.Linear(4, 4), _Once(), torch.float32)
    before = facade.dequantize().clone()
    with torch.no_grad(), pytest.raises(ModelError, match="cannot be quantized again"):
        facade.weight.mul_(2)
    assert torch.equal(facade.dequantize(), before)
    with pytest.raises(ModelError, match="has the shape"):
        facade.weight.data = torch.zeros(2, 2)
    with pytest.raises(ModelError, match="frozen"):
        facade.weight.requires_grad = True
    with pytest.raises(ModelError, match="weight that is trained"):
        facade.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ModelError, match="has the shape"):
        facade.weight[0].data = torch.ones(5)
    with pytest.raises(ModelError, match="parametrized"):
        del facade.weight
    with pytest.raises(ModelError, match="parametrized"):
        nn.utils.parametrize.register_parametrization(facade, "weight", nn.Identity())


def test_a_parameter_takes_the_place_of_the_weight(pair) -> None:
    model, _ = pair
    model.a.weight = nn.Parameter(torch.full((128, 64), 0.5), requires_grad=False)
    assert close(model.a(X), X @ torch.full((64, 128), 0.5) + model.a.bias, 0.01)
    assert isinstance(model.a.weight, LazyWeight)


@pytest.mark.parametrize("kept", [["b"], ["block"]])
def test_modules_to_save_train_a_dense_copy(pair, kept, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["a"], modules_to_save=kept)
    model, dense = (tuned(each, config) for each in pair)
    losses = []
    for each in (model, dense):
        optimizer = torch.optim.SGD((p for p in each.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(X).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    model.save_pretrained(tmp_path)
    fresh, _ = made_like(model)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert close(loaded.eval()(X), model.eval()(X))


def test_layers_that_are_tuned_whole_are_dense_copies(pair, tmp_path: Path) -> None:
    """LN tuning copies the layers that it is given, and trains the copies."""
    config = peft.LNTuningConfig(target_modules=["b"])
    model, dense = (tuned(each, config) for each in pair)
    assert close(model(X), dense(X))
    for each in (model, dense):
        each(X).square().sum().backward()
    grads = [
        each.base_model.model.b.ln_tuning_layers.default.weight.grad for each in (model, dense)
    ]
    assert close(*grads, 1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made_like(model)[0], tmp_path)
    assert close(loaded(X), dense(X))
    assert close(loaded.merge_and_unload()(X), dense.merge_and_unload()(X))


def made_like(model: Any) -> tuple[nn.Module, nn.Module]:
    return made(model.quantadapt.backend.name)


@pytest.mark.parametrize("how", ["get_peft_model", "attach"])
@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_train_and_are_saved(pair, which, how, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "bias": which}
    model, dense = pair
    name = model.quantadapt.backend.name
    model = (
        qa.attach(model, "lora", **config)
        if how == "attach"
        else tuned(model, LoraConfig(**config))
    )
    dense = tuned(dense, LoraConfig(**config))
    with torch.no_grad():
        given = dict(dense.named_parameters())
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(given[key])
    for each in (model, dense):
        each(X).square().sum().backward()
    gradients = {
        key: p.grad for key, p in model.named_parameters() if p.requires_grad and "bias" in key
    }
    expected = {
        key: p.grad for key, p in dense.named_parameters() if p.requires_grad and "bias" in key
    }
    assert gradients.keys() == expected.keys()
    assert len(gradients) >= 2
    assert all(close(gradients[key], expected[key], 1e-3) for key in expected)
    model.save_pretrained(tmp_path)
    fresh, _ = made(name)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert close(loaded.eval()(X), model.eval()(X))
    y = model(X).detach()
    model.merge_adapter()
    assert close(model(X), y)


@pytest.mark.parametrize("config", [LoraConfig, peft.ShiraConfig])
def test_a_facade_follows_to_dtype(pair, config) -> None:
    outputs = []
    for each in pair:
        each.to(torch.bfloat16)
        torch.manual_seed(0)
        wrapped = get_peft_model(
            each, config(r=4, target_modules=TARGETS), autocast_adapter_dtype=False
        )
        assert wrapped.base_model.model.a.weight.dtype == torch.bfloat16
        outputs.append(wrapped(X.bfloat16()))
        each.float()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert close(outputs[0].float(), outputs[1].float(), 0.05)
    assert pair[0].a.weight.dtype == torch.float32


def test_initializations_that_write_into_the_base(pair) -> None:
    model, dense = pair
    y = dense(X)
    for init in ("olora", "pissa"):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=init)
        start = get_peft_model(copy.deepcopy(model), config)
        assert close(start(X), y, 0.15)
        base = start.base_model.model.a.base_layer
        a, b = (getattr(start.base_model.model.a, f"lora_{n}").default.weight for n in "AB")
        assert close(base.dequantize() + b @ a, dense.a.weight, 0.15)
        assert not close(base.dequantize(), dense.a.weight, 0.15), init


@pytest.mark.slow
def test_bdlora_and_compiling_and_offloading_over_fused_layers() -> None:
    from accelerate import cpu_offload
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["b"], target_modules_bd_b=["a"], nblocks=2)
    model, dense = made("hqq")
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_bdlora": blocks}
    attached = qa.attach(model, "lora", **config)
    stock = tuned(dense, LoraConfig(**config))
    attached.load_state_dict(stock.state_dict(), strict=False)
    for key, parameter in stock.named_parameters():
        if "lora_" in key:
            attached.get_parameter(key).data.copy_(parameter)
    assert close(attached(X), stock(X))

    attached = qa.attach(made("hqq")[0], "lora", r=4, target_modules=TARGETS).train()
    y = attached(X)
    compiled = torch.compile(attached, backend="eager")
    assert close(compiled(X), y)
    compiled(X).square().sum().backward()
    assert sum(p.grad is not None for p in attached.parameters()) == 4
    cpu_offload(attached.eval(), execution_device="cpu")
    assert close(attached(X), y)


def test_adapters_of_stock_peft_load_onto_facades(pair, tmp_path: Path) -> None:
    """Two of them, with heads of their own, switched and merged."""
    _, dense = pair
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head"])
    for name, seed in (("one", 3), ("two", 4)):
        stock = tuned(copy.deepcopy(dense), config)
        torch.manual_seed(seed)
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        stock.save_pretrained(tmp_path / name)
    loaded, expected = (PeftModel.from_pretrained(m, tmp_path / "one", "one") for m in pair)
    for each in (loaded, expected):
        each.load_adapter(tmp_path / "two", "two")
        each.eval()
    outputs = []
    for name in ("one", "two", "one"):
        for each in (loaded, expected):
            each.set_adapter(name)
        assert close(loaded(X), expected(X))
        outputs.append(loaded(X))
    assert not close(outputs[0], outputs[1], 0.1)
    loaded.merge_adapter(["one"])
    assert close(loaded(X), outputs[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "backend", slow_but([*BACKENDS, "bnb-int8", "quanto", "eetq"], "bnb-nf4", "quanto")
)
def test_parameters_are_counted_as_dense_ones(backend, bias, capsys) -> None:
    models = made(backend, bias)
    config = LoraConfig(r=4, target_modules=TARGETS, bias="lora_only")
    facade, stock = (get_peft_model(model, config) for model in models)
    assert facade.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    capsys.readouterr()  # what vendors print as they are imported
    facade.print_trainable_parameters()
    text = capsys.readouterr().out
    stock.print_trainable_parameters()
    assert text == capsys.readouterr().out
    mixed = peft.get_peft_model(made(backend)[0], peft.LoHaConfig(target_modules=["a"]), mixed=True)
    plain = peft.get_peft_model(made(backend)[1], peft.LoHaConfig(target_modules=["a"]), mixed=True)
    assert mixed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def llama(backend: str | None, cls: str = "LlamaForCausalLM", **options: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config)
    if backend is None:
        return model
    return qa.quantize(model, backend=backend, device="cpu", dtype="float32", **options)


@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4"])
def test_transformers_counts_parameters_as_dense_ones(backend) -> None:
    model, dense = llama(backend), llama(None)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for embeddings in (False, True):
        counts = [m.num_parameters(exclude_embeddings=embeddings) for m in (model, dense)]
        assert counts[0] == counts[1]
    assert model.num_parameters(only_trainable=True) < dense.num_parameters()
    counts = [get_peft_model(m, prompt).get_nb_trainable_parameters() for m in (model, dense)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("backend", ["none", "hqq", "torchao-int8"])
def test_a_state_dict_is_loaded_with_its_biases(backend, assign) -> None:
    model, _ = made(backend)
    state = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    y, biases = model(X), {n: f.bias.detach().clone() for n, f in facades(model)}
    with torch.no_grad():
        for _, facade in facades(model):
            facade.bias.add_(1)
    assert not close(model(X), y, 0.1)
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(X), y)
    for name, facade in facades(model):
        assert torch.equal(facade.bias, biases[name])
    with pytest.raises(RuntimeError, match=r"size mismatch for b\.bias"):
        model.load_state_dict({**state, "b.bias": torch.zeros(3)}, strict=False)
    state.pop("b.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*b\.bias"):
        model.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "backend",
    slow_but([*BACKENDS, "bnb-fp4", "bnb-int8", "quanto", "eetq"], "bnb-nf4", "bnb-int8", "quanto"),
)
def test_the_state_dict_of_another_model_is_loaded(backend, bias) -> None:
    """bitsandbytes' own 4-bit layers would load the codes, and leave the scales as they are."""
    another, _ = made(backend, bias)
    with torch.no_grad():
        another.b.weight.mul_(3)
        another.a.weight.copy_(another.a.weight.flip(0))
    state, y = {k: copy.deepcopy(v) for k, v in another.state_dict().items()}, another(X)
    model, _ = made(backend, bias)
    assert not close(model(X), y, 0.1)
    model.load_state_dict(state)
    assert torch.equal(model(X), y)
    assert not any(p.requires_grad for n, p in model.b.named_parameters() if n != "bias")
    another.b.weight.data.zero_()  # and it is a copy
    assert torch.equal(model(X), y)
    for config in (LoraConfig(target_modules=["a", "b"]), ADAMSS):
        model = get_peft_model(made(backend, bias)[0], config)
        found = peft.get_base_model_state_dict(model)
        assert found.keys() == state.keys()
        told = peft.set_base_model_state_dict(model, state)
        assert not told.missing_keys + told.unexpected_keys
        with model.disable_adapter():
            assert close(model(X), y, 1e-6)


ADAMSS = peft.AdamssConfig(target_modules=["a"], r=4, num_subspaces=2, subspace_rank=2)


def test_a_state_dict_that_is_another_methods_is_refused() -> None:
    model, state = made("bnb-nf4")[0], made("bnb-fp4")[0].state_dict()
    with pytest.raises(RuntimeError, match=r"b cannot be made of these tensors.*fp4"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*b\.weight\.else"):
        made("bnb-nf4")[0].load_state_dict({**model.state_dict(), "b.weight.else": torch.ones(1)})
    with torch.no_grad():
        model.b.weight.mul_(3)
    state = model.state_dict()
    del state["b.weight.quant_map"]
    with pytest.raises(RuntimeError, match=r"b cannot be made.*quant_map"):
        made("bnb-nf4")[0].load_state_dict(state, strict=False)


IDS = torch.arange(1, 25).view(4, 6)
PROJECTIONS = ["q_proj", "down_proj"]


def llamas(backend: str, cls: str = "LlamaForCausalLM") -> tuple[Any, Any]:
    """A model of facades, and a dense one with the same numbers."""
    skip = ["score"] if cls.endswith("SequenceClassification") else []
    model, dense = llama(backend, cls, skip_modules=skip), llama(None, cls)
    for name, facade in facades(model):
        dense.get_submodule(name).weight.data.copy_(facade.dequantize())
    return model.eval(), dense.eval()


def with_lora(model: Any, how: str = "get_peft_model", **options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options}
    if how == "attach":
        return qa.attach(model, "lora", **options)
    return get_peft_model(model, LoraConfig(**options))


def fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in ("lora_", "modules_to_save")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: Any, **options: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, **options).logits.detach()


WEIGHTED = {
    "linear": (["one", "two"], {}),
    "cat": (["one", "three"], {}),
    "svd": (["one", "three"], {}),
    "ties": (["one", "two"], {"density": 0.6}),
    "dare_linear": (["one", "two"], {"density": 0.6}),
    "magnitude_prune": (["one", "two"], {"density": 0.6}),
    "dare_ties_svd": (["one", "three"], {"density": 0.6}),
}


@pytest.mark.parametrize("how", ["get_peft_model", "attach"])
@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4"])
def test_several_adapters_work_as_on_dense_layers(backend, how) -> None:
    def same_as_stock(change: Any = lambda model: None, **options: Any) -> bool:
        outputs = []
        for each in (model, stock):
            torch.manual_seed(9)  # dare drops at random
            change(each)
            outputs.append(logits(each, **options))
        return close(*outputs)

    model, stock = llamas(backend)
    model, stock = with_lora(model, how), with_lora(stock)
    for each in (model, stock):
        each.add_adapter("one", LoraConfig(r=4, target_modules=PROJECTIONS))
        each.add_adapter("two", LoraConfig(r=4, target_modules=PROJECTIONS, use_rslora=True))
        each.add_adapter("three", LoraConfig(r=6, target_modules=PROJECTIONS, lora_alpha=3))
        fill(each, 7)
    for name in ("default", "one", "three", "two"):
        assert same_as_stock(lambda each, name=name: each.set_adapter(name))
    assert same_as_stock(adapter_names=["one", "two", "__base__", "three"])
    for kind, (names, options) in WEIGHTED.items():
        assert same_as_stock(
            lambda each, kind=kind, names=names, options=options: (
                each.add_weighted_adapter(
                    names, [0.7, 0.5], kind, combination_type=kind, **options
                ),
                each.set_adapter(kind),
            )
        ), kind
    assert same_as_stock(lambda each: each.base_model.set_adapter(["one", "two"]))
    assert same_as_stock(lambda each: each.merge_adapter(["one", "two"]))
    assert same_as_stock(lambda each: each.unmerge_adapter())
    assert same_as_stock(lambda each: (each.delete_adapter("two"), each.set_adapter("cat")))


@pytest.mark.parametrize("how", ["get_peft_model", "attach"])
@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4"])
def test_adapters_go_from_facades_to_stock_layers_and_are_swapped(
    backend, how, tmp_path: Path
) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model, dense = llamas(backend)
    tuned = with_lora(model, how, modules_to_save=["lm_head"])
    fill(tuned, 1)
    y = logits(tuned)
    tuned.save_pretrained(tmp_path / "one")
    for low in (False, True):
        base = copy.deepcopy(dense)
        there = PeftModel.from_pretrained(base, tmp_path / "one", low_cpu_mem_usage=low)
        assert close(logits(there), y)
    base, stock = llamas(backend)
    for each in (base, stock):
        each.load_adapter(str(tmp_path / "one"))  # transformers' own way
    assert close(logits(base), logits(stock))
    plain = with_lora(llamas(backend)[0], how)
    fill(plain, 2)
    z = logits(plain)
    plain.save_pretrained(tmp_path / "two")
    fill(plain, 3)
    assert not close(logits(plain), z, 0.1)
    hotswap_adapter(plain, str(tmp_path / "two"), "default")
    assert close(logits(plain), z)


def test_a_classifier_is_trained_with_its_head(tmp_path: Path) -> None:
    cls = "LlamaForSequenceClassification"
    model, dense = llamas("hqq", cls)
    model = with_lora(model, task_type="SEQ_CLS")
    assert model.base_model.model.score.modules_to_save.default.weight.requires_grad
    fill(model, 1)
    model.save_pretrained(tmp_path)
    for base in (dense, llamas("hqq", cls)[0]):
        assert close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))
    y = logits(model)
    model.merge_adapter()
    assert close(logits(model), y)
    model.unmerge_adapter()
    assert close(logits(model.merge_and_unload()), y, 0.3)  # what 4 bits cost


def test_lora_ga_takes_gradients_of_the_dense_model(tmp_path: Path) -> None:
    """A quantized weight has no gradient; `cache_file` brings those of the unquantized model."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    model, dense = made("hqq")
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    with pytest.raises(ModelError, match="frozen") as caught:
        preprocess_loraga(model, config, lambda: model(X).square().sum().backward())
    assert "cache_file" in str(caught.value)
    file = str(tmp_path / "gradients" / "file")
    preprocess_loraga(dense, config, lambda: dense(X).square().sum().backward(), cache_file=file)
    preprocess_loraga(model, config, lambda: None, cache_file=file)
    torch.manual_seed(2)  # its decomposition starts at random
    facade = get_peft_model(model, config)
    torch.manual_seed(2)
    stock = get_peft_model(dense, config)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            assert close(facade.get_parameter(name), parameter, 1e-4)
