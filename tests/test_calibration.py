"""The walk through a model: what it measures is what plain forward hooks measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantadapt.calibration import recording
from quantadapt.calibration.walk import walk_blocks
from quantadapt.loading import from_pretrained
from quantadapt.model.modules import decoder_blocks
from quantadapt.testing.small_demo import calibration_examples, small_model
from quantadapt.testing.tensors import relative

EXAMPLES = 6


def examples():
    return calibration_examples()[:EXAMPLES]


def demo():
    return from_pretrained(str(small_model()), dtype=torch.float32).eval()


def tiny(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 2048,
        "max_position_embeddings": 64,
    }
    if kind == "gemma3":  # sliding and full attention take turns, each with masks of its own
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
        config = transformers.Gemma3TextConfig(**sizes, sliding_window=8, layer_types=types)
        return transformers.Gemma3ForCausalLM(config).eval()
    if kind == "opt":  # a projection in front of the blocks, learned positions
        config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=16)
        return transformers.OPTForCausalLM(config).eval()
    if kind == "neox":
        config = transformers.GPTNeoXConfig(**sizes, intermediate_size=48)
        return transformers.GPTNeoXForCausalLM(config).eval()
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=2048
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def walk(model, shown, **options):
    """Return name -> LayerInputs, in the order of the walk."""
    found = {}
    walk_blocks(model, shown, on_layer=lambda n, _, i: found.update({n: i}), **options)
    return found


def hooked(model, names, shown):
    """Return name -> (X^T X in float64, rows), by plain hooks in whole forward passes."""
    moments, rows, hooks = {}, dict.fromkeys(names, 0), []
    for name in names:

        def add(_, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            moments[name] = moments.get(name, 0) + x.t() @ x
            rows[name] += len(x)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        for example in shown:
            model(**example)
    for hook in hooks:
        hook.remove()
    return {name: (moments[name], rows[name]) for name in names}


def assert_measured(found, model, shown):
    for name, (moment, rows) in hooked(model, found, shown).items():
        assert found[name].rows == rows, name
        assert found[name].second_moment.dtype == torch.float32
        error = (found[name].second_moment.double() - moment).norm() / moment.norm()
        assert error < 1e-5, name


def blocks_linears(model):
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    return {n for n in names if any(n.startswith(f"{b}.") for b in decoder_blocks(model))}


def test_second_moments_are_those_of_plain_hooks() -> None:
    model = demo()
    before = model(**examples()[0]).logits
    found = walk(model, examples())
    assert set(found) == blocks_linears(model)
    assert len(found) == 14
    assert_measured(found, model, examples())
    assert torch.equal(model(**examples()[0]).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["gemma3", "opt", "neox"])
def test_other_decoders(kind) -> None:
    model = tiny(kind)
    found = walk(model, examples())
    assert set(found) == blocks_linears(model)
    assert_measured(found, model, examples())


def test_an_encoder_decoder_has_two_stacks_of_blocks() -> None:
    model, done = tiny("t5"), []
    shown = [
        {**e, "decoder_input_ids": e["input_ids"][:, : 9 + n]} for n, e in enumerate(examples())
    ]
    assert decoder_blocks(model) is None
    found = walk(model, shown, on_block=done.append)
    assert done == [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in (0, 1)] + [""]
    assert len(found) > 20
    assert_measured(found, model, shown)


def test_the_encoder_as_it_became_feeds_its_next_blocks() -> None:
    before, found = walk(tiny("t5"), examples()), {}

    def on_layer(name, linear, inputs):
        found[name] = inputs
        linear.weight.data = (linear.weight * 4).round() / 4

    walk_blocks(tiny("t5"), examples(), on_layer=on_layer)
    first, last = (
        f"encoder.block.{n}.layer.{p}"
        for n, p in ((0, "0.SelfAttention.q"), (1, "1.DenseReluDense.wi"))
    )
    assert torch.equal(found[first].second_moment, before[first].second_moment)
    assert relative(found[last].second_moment, before[last].second_moment) > 0.05


def test_layers_come_in_the_order_of_computation_and_share_what_they_share() -> None:
    found = walk(demo(), examples())
    order = [name.removeprefix("model.layers.0.").rpartition(".")[2] for name in found][:7]
    assert order == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    moments = [inputs.second_moment.data_ptr() for inputs in found.values()][:7]
    assert len(set(moments)) == 4


def test_later_layers_see_what_became_of_earlier_ones() -> None:
    model, found, done = demo(), {}, []

    def on_layer(name, linear, inputs):
        found[name] = inputs
        linear.weight.data = (linear.weight * 32).round() / 32

    before = walk(demo(), examples())
    walk_blocks(model, examples(), on_layer=on_layer, on_block=done.append)
    assert done == ["model.layers.0", "model.layers.1", ""]
    assert_measured(found, model, examples())
    first, last = (
        f"model.layers.{n}.{p}" for n, p in ((0, "self_attn.q_proj"), (1, "mlp.up_proj"))
    )
    assert torch.equal(found[first].second_moment, before[first].second_moment)
    assert relative(found[last].second_moment, before[last].second_moment) > 0.05


def test_a_returned_module_stands_where_the_layer_stood() -> None:
    model = demo()
    name = "model.layers.0.mlp.down_proj"
    mine = nn.Sequential(model.get_submodule(name))
    walk_blocks(model, examples(), names=[name], on_layer=lambda *_: mine)
    assert model.get_submodule(name) is mine


def test_named_layers_only_and_the_head_after_all_blocks() -> None:
    model = tiny("neox")
    (head,) = (n for n, m in model.named_modules() if m is model.get_output_embeddings())
    names = ["gpt_neox.layers.1.mlp.dense_h_to_4h", head]
    found = walk(model, examples(), names=names)
    assert list(found) == names
    assert_measured(found, model, examples())


def test_masked_tokens_do_not_count() -> None:
    padded = []
    for example in examples():
        ids = example["input_ids"]
        mask = torch.ones_like(ids)
        mask[:, 40:] = 0
        padded.append({"input_ids": ids, "attention_mask": mask})
    found = walk(demo(), padded)
    short = walk(demo(), [{"input_ids": e["input_ids"][:, :40]} for e in examples()])
    for name, inputs in short.items():
        assert found[name].rows == inputs.rows == 40 * EXAMPLES
        assert relative(found[name].second_moment, inputs.second_moment) < 1e-5


class Expert(nn.Module):
    """A block as few libraries write them: hidden states by name, a tuple returned, a layer that
    is reached by large inputs only, and one that is never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rarely, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, *, hidden_states, scale):
        y = self.always(hidden_states) * scale
        if hidden_states.abs().max() > 4:
            y = y + self.rarely(hidden_states)
        return hidden_states + y, None


class Experts(nn.Module):
    def __init__(self, between: float = 1.0) -> None:
        super().__init__()
        self.between = between
        self.layers = nn.ModuleList(Expert() for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(hidden_states=x, scale=torch.tensor(0.5))
            x = x if self.between == 1 else x * self.between
        return self.head(x)


@pytest.mark.parametrize("between", [1.0, 2.0], ids=["chain", "no chain"])
def test_layers_that_examples_reach_now_and_then(between) -> None:
    torch.manual_seed(0)
    model = Experts(between).eval()
    shown = [{"x": size * torch.randn(1, 5, 8)} for size in (0.1, 9.0, 0.1)]
    found = walk(model, shown)
    assert len(found) == 6
    reached = {n: i for n, i in found.items() if "never" not in n}
    assert_measured(reached, model, shown)
    assert found["layers.0.rarely"].rows == 5
    for name in found.keys() - reached.keys():
        assert found[name].rows == 0
        assert not found[name].second_moment.any()


class Beside(nn.Module):
    """Blocks that hand on something of their own beside the hidden states, as T5's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.layers[0].forward = lambda x, bias=None: (self.layers[0][0](x), x.mean())
        self.layers[1].forward = lambda x, bias=None: (self.layers[1][0](x + bias), bias)

    def forward(self, x):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


def test_what_blocks_hand_on_beside_is_that_of_the_same_example() -> None:
    torch.manual_seed(0)
    model = Beside().eval()
    shown = [{"x": size * torch.randn(1, 5, 8)} for size in (0.1, 9.0, 0.1)]
    assert_measured(walk(model, shown), model, shown)


def test_a_module_without_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    shown = [{"input": torch.randn(7, 6)} for _ in range(3)]
    assert decoder_blocks(model) is None
    found = walk(model, shown)
    assert list(found) == ["0", "2"]
    assert_measured(found, model, shown)


@pytest.mark.cuda
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("kind", ["neox", "t5"])
def test_a_gpu_measures_the_same(kind, fits, monkeypatch) -> None:
    """Whether or not all of the model may be there while its calls are recorded."""
    monkeypatch.setattr(recording, "_fits", lambda *_: fits)
    on_cpu = walk(tiny(kind), examples())
    found = walk(tiny(kind), examples(), device="cuda")
    assert list(found) == list(on_cpu)
    for name, inputs in found.items():
        assert inputs.second_moment.is_cuda
        assert relative(inputs.second_moment.cpu(), on_cpu[name].second_moment) < 1e-4, name
