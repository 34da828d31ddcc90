"""The quantize stage: calibration data, layers that do not fit, and backends that misbehave."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from few_rows import few_rows
from test_conformance_catches import Absmax, AbsmaxTarget, Plugin, make  # noqa: F401 (a fixture)
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import DataError, PlanRefused, PluginError
from quantadapt.facade import facades
from quantadapt.pipeline import run
from quantadapt.quantizing.examples import check_vocabulary, choose, examples_from
from quantadapt.registry import registry
from quantadapt.registry.discovery import Provenance
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import calibration_examples, small_model

SMALL = str(small_model())
IDS = torch.arange(70)[None]
TORCHAO = ("torchao-int8", "torchao-int4", "torchao-intx", "torchao-fp8")


# Calibration data ---------------------------------------------------------------------------------

BAD = [
    ([], "there is no example"),
    ([{"input_ids": IDS[:, :5]}], "5 tokens are too few"),
    ([{"input_ids": IDS.float()}], "float32, which are no token ids"),
    ([{"input_ids": IDS[0]}], r"shape \[70\], expected \[1, length\]"),
    ([{"input_ids": IDS[:, :0]}], r"shape \[1, 0\]"),
    ([{"input_ids": [1, 2, 3]}], "are a list, not a tensor|holds no tensor"),
    (["some text"], "example 0 is a str"),
    ({"input_ids": IDS}, "a dict, not a list"),
    (3, "an int, not a list"),
]


@pytest.mark.parametrize(("examples", "message"), BAD)
def test_bad_examples_are_named(examples, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        examples_from(examples, None)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"ids": IDS}, "no input_ids, but 'ids'"),
        ({"input_ids": IDS + 1}, r"the token id 70\n.*0 to 69"),
        ({"input_ids": IDS - 1}, "the token id -1"),
    ],
)
def test_examples_of_another_tokenizer_are_named(example, message) -> None:
    check_vocabulary([{"input_ids": IDS}], 70)
    with pytest.raises(DataError, match=f"example 1 has {message}"):
        check_vocabulary([{"input_ids": IDS}, example], 70)


def test_files_and_data_sets_become_examples(tmp_path) -> None:
    from datasets import Dataset

    from quantadapt.quantizing import load_tokenizer

    tokenizer = load_tokenizer(SMALL)
    found = examples_from(str(demo.TRAIN_FILE), tokenizer)
    assert len(found) == 128
    assert found[0]["input_ids"].dtype == torch.int64
    data = Dataset.from_dict({"input_ids": [list(range(40))] * 5})
    assert len(choose(data, count=3)) == 3
    with pytest.raises(DataError, match="no column input_ids"):
        choose(Dataset.from_dict({"text": ["a"]}))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        examples_from(str(tmp_path / "empty.jsonl"), tokenizer)


class Seeing(Absmax):
    """Calibrates: the scale of a layer depends on how much data it was shown."""

    seen: ClassVar[list] = []

    def quantize(self, source, *, device, dtype, calibration=None, skip_modules=None):
        self.seen.append(calibration)
        return super().quantize(source, device=device, dtype=dtype, skip_modules=skip_modules)


@pytest.fixture
def seeing(make):  # noqa: F811
    Seeing.seen.clear()
    make(Plugin(Seeing, calibration=True))
    return Seeing.seen


def test_a_backend_that_calibrates_gets_data_or_says_so(seeing) -> None:
    with pytest.raises(PlanRefused, match=r"'absmax' calibrates.*\n.*pass calibration="):
        qa.quantize(SMALL, "absmax")
    qa.quantize(SMALL, "absmax", calibration=str(demo.TRAIN_FILE))
    qa.quantize(SMALL, "absmax", calibration=calibration_examples())
    qa.quantize(None, "absmax")  # the demo has its own
    assert [len(examples) for examples in seeing] == [128, 24, 128]


def test_a_run_calibrates_and_keeps_the_base(seeing, tmp_path) -> None:
    train = {"max_steps": 1, "per_device_train_batch_size": 2}
    spec = {"model": SMALL, "backend": "absmax", "train": train, "device": "cpu"}
    spec |= {"evaluate": {"max_examples": 4, "samples": 0, "unquantized": False}}
    spec |= {"data": {"calibration_examples": 5, "path": few_rows()}}
    done = run(Spec(**spec, output=str(tmp_path / "run"), export={"merge": "requantize"}))
    assert [len(examples) for examples in seeing] == [5, 5]  # the base, and the merged weights
    loaded = qa.load(tmp_path / "run")
    assert len(seeing) == 2  # the base was read, not made again
    with torch.no_grad():
        expected, found = (m.eval()(input_ids=IDS).logits for m in (done.model, loaded))
    assert torch.equal(found, expected)
    merged = qa.load(tmp_path / "run" / "merged")
    assert len(list(facades(merged))) == 14


def test_bad_calibration_data_leaves_no_run_folder(seeing, tmp_path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "hi"}\n')
    data = {"calibration_path": str(tmp_path / "c.jsonl"), "path": few_rows()}
    with pytest.raises(DataError, match="too few"):
        run(Spec(model=SMALL, backend="absmax", data=data, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    missing = {"calibration_path": "nowhere.jsonl"}
    with pytest.raises(PlanRefused, match=r"data\.calibration_path: nowhere\.jsonl does not exist"):
        qa.plan(Spec(backend="absmax", data=missing))


# Layers that do not fit ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> str:
    """A model with 96 inputs in most layers and 256 in down_proj."""
    folder = tmp_path_factory.mktemp("odd")
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in small_model().glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def test_misfits_are_listed_before_any_weight_is_read(odd, monkeypatch, tmp_path) -> None:
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("quantadapt.loading.reading.from_pretrained", read)
    message = r"layers\.0\.self_attn\.q_proj and 5 more: groups of 128 do not divide 96 inputs"
    with pytest.raises(PlanRefused, match=message) as caught:
        qa.quantize(odd, "torchao-intx", group_size=128)
    assert "skip_misfits" in str(caught.value)
    spec = Spec(model=odd, backend={"name": "torchao-intx", "group_size": 128})
    with pytest.raises(PlanRefused, match=message):
        run(spec.model_copy(update={"output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_misfits_stay_dense_if_the_user_allows(odd, tmp_path) -> None:
    model = qa.quantize(odd, "torchao-intx", group_size=128, skip_misfits=True)
    assert [name for name, _ in facades(model)] == ["model.layers.0.mlp.down_proj"]
    qa.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(qa.load(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tuned = qa.attach(model, "lora")
    again = qa.load(qa.save(tuned, tmp_path / "tuned"))
    assert len(list(facades(again.get_base_model()))) == 1


# Backends that misbehave --------------------------------------------------------------------------


class Raises(Absmax):
    def quantize_linear(self, linear):
        raise KeyError("W_q")


class LyingTarget(AbsmaxTarget):
    def shape(self, module):
        return module.in_features, 2 * module.out_features


class Lies(Absmax):
    @cached_property
    def target(self):
        return LyingTarget(self)


def test_a_backend_that_raises_is_named(make) -> None:  # noqa: F811
    make(Plugin(Raises))
    with pytest.raises(PluginError, match=r"backend absmax: it failed.*KeyError.*W_q") as caught:
        qa.quantize(SMALL, "absmax")
    assert "tell its authors (absmax)" in str(caught.value)
    assert "test_quantizing.py:" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


class BreakingTarget(AbsmaxTarget):
    broken = False

    def dequantize(self, module):
        if self.broken:
            raise KeyError("scale")
        return super().dequantize(module)


class Breaks(Absmax):
    @cached_property
    def target(self):
        return BreakingTarget(self)

    def save(self, model, path):
        raise KeyError("scale")

    def notes(self, device):
        if BreakingTarget.broken:
            raise KeyError("scale")
        return ()


TOKENS = Dataset.from_dict({"input_ids": [[5] * 20] * 4, "completion_mask": [[1] * 20] * 4})


@pytest.mark.parametrize("call", ["plan", "attach", "train", "evaluate", "merge", "save"])
def test_whatever_of_a_plugin_breaks_is_named(call, make, monkeypatch, tmp_path) -> None:  # noqa: F811
    make(Plugin(Breaks))
    theirs = Provenance("absmax", "test_quantizing", "others", "1.0")
    monkeypatch.setitem(registry().plugins, "absmax", theirs)
    model = qa.quantize(SMALL, "absmax")
    if call not in ("plan", "attach", "save"):
        model = qa.attach(model, r=2)
    monkeypatch.setattr(BreakingTarget, "broken", True)
    calls = {
        "plan": lambda: qa.plan(Spec(model=SMALL, backend="absmax"), check_output=False),
        "attach": lambda: qa.attach(model, r=2, init_lora_weights="pissa"),
        "train": lambda: qa.train(model, TOKENS, max_steps=1),
        "evaluate": lambda: qa.evaluate(model, TOKENS),
        "merge": lambda: qa.merge(model, tmp_path / "merged", data=TOKENS),
        "save": lambda: qa.save(model, tmp_path / "saved"),
    }
    with pytest.raises(
        PluginError, match=r"^plugin absmax: it failed: KeyError: 'scale'"
    ) as caught:
        calls[call]()
    assert "tell its authors (absmax (others 1.0)): " in str(caught.value)
    assert "test_quantizing.py:" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    if call == "attach":
        assert qa.attach(qa.quantize(SMALL, "hqq"), r=2).active_adapters == ["default"]


def test_what_is_no_fault_of_a_plugin_stays_as_it_is(make, monkeypatch) -> None:  # noqa: F811
    make(Plugin(Breaks))
    theirs = Provenance("absmax", "test_quantizing", "others", "1.0")
    monkeypatch.setitem(registry().plugins, "absmax", theirs)
    model = qa.attach(qa.quantize(SMALL, "absmax"), r=2)

    with pytest.raises(TypeError, match="not callable"):
        qa.train(model, TOKENS, max_steps=1, on_log=3)

    def full(self, module):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(BreakingTarget, "dequantize", full)
    with pytest.raises(torch.OutOfMemoryError):
        qa.attach(model.unload(), r=2, init_lora_weights="pissa")


class ReturnsNothing(Absmax):
    def quantize(self, *args, **kwargs):
        return None


def test_a_backend_that_returns_no_module_is_named(make) -> None:  # noqa: F811
    make(Plugin(ReturnsNothing))
    with pytest.raises(PluginError, match="backend absmax: it returned None, which is no module"):
        qa.quantize(SMALL, "absmax")


def test_a_backend_that_lies_about_its_shape_is_caught_at_once(make) -> None:  # noqa: F811
    make(Plugin(Lies))
    with pytest.raises(PluginError, match=r"q_proj: LyingTarget\.dequantize returned \(\d+, \d+\)"):
        qa.quantize(SMALL, "absmax")


# What is torch's ---------------------------------------------------------------------------------


def settings() -> dict[str, object]:
    """What changes the numbers or the speed of everything else in the process."""
    from torch._inductor import config

    return {
        "float32 products": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "tuning": config.coordinate_descent_tuning,
    }


@pytest.mark.parametrize("backend", ["bnb-nf4", "eetq", "hqq", "quanto", *TORCHAO])
def test_quantizing_leaves_torchs_settings_alone(backend) -> None:
    before = settings()
    linear = torch.nn.Linear(256, 128).requires_grad_(False)
    registry().backend(backend).quantizer().quantize_linear(linear)
    assert settings() == before


def test_a_model_without_linear_layers_says_what_it_has_instead() -> None:
    model = torch.nn.Sequential(torch.nn.Bilinear(4, 4, 4), OnlyNamedSo(4, 4))
    with pytest.raises(PlanRefused, match="its layers are OnlyNamedSo"):
        qa.quantize(model, "hqq", device="cpu", dtype="float32")


class OnlyNamedSo(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()
