"""Every registered PEFT method on one quantized base, and the variants of LoRA."""

import json
import subprocess
import sys

import pytest

from quantadapt.errors import MergeRefused, PlanRefused
from quantadapt.registry import registry
from quantadapt.testing import AdapterSuite, Bench, RefusalSuite
from quantadapt.testing.short_training import train
from quantadapt.testing.suite import ADAPTERS
from quantadapt.testing.tensors import change, relative

OTHERS = tuple(a.name for a in registry().adapters() if a.name not in ADAPTERS)


class TestOtherAdapters(AdapterSuite, RefusalSuite):
    """Most of them are slow, see conftest.py."""

    backend = "hqq"
    options = {"bits": 4}  # noqa: RUF012 (as in test_conformance, so that the results join)
    adapters = OTHERS


@pytest.fixture(scope="module")
def bench():
    class Suite(AdapterSuite):
        backend = "hqq"

    made = Bench(Suite)
    yield made
    made.close()


def targets(model) -> set[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    return {n for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)}


def test_all_registered_methods_are_covered():
    assert len(OTHERS) + len(ADAPTERS) == len(registry().adapters()) >= 37


def test_rank_pattern(bench):
    model = train(
        bench, "lora", r=4, rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}
    ).model
    ranks = {
        name: module.r["default"]
        for name, module in model.get_base_model().named_modules()
        if name in targets(model)
    }
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.1.mlp.down_proj"] == 2
    assert ranks["model.layers.0.mlp.down_proj"] == 4


def test_target_modules_as_a_list(bench):
    model = bench.attach("lora", target_modules=["q_proj", "mlp.down_proj"])
    endings = {name.split("layers.")[1][2:] for name in targets(model)}
    assert endings == {"self_attn.q_proj", "mlp.down_proj"}


def test_target_modules_as_a_regular_expression(bench):
    model = bench.attach("lora", target_modules=r".*layers\.1\..*(q|v)_proj")
    expected = {f"model.layers.1.self_attn.{part}_proj" for part in "qv"}
    assert targets(model) == expected


def test_all_linear_is_every_quantized_layer(bench):
    assert targets(bench.attach("lora", target_modules="all-linear")) == set(bench.facades())


def test_target_modules_that_match_nothing_are_refused(bench):
    with pytest.raises(PlanRefused, match=r"(?s)q_prj.*did you mean 'q_proj'"):
        bench.attach("lora", target_modules=["q_prj"])


def test_pissa_takes_its_part_out_of_the_base(bench):
    """The base holds what is left, quantized: base and adapter together are near the original."""
    trained = bench.trained("pissa")
    assert trained.base_at["start"] != trained.base_at["before"]
    assert trained.base_at["start"] == trained.base_at["end"]
    start = relative(trained.start, bench.logits(bench.dense))
    with trained.model.disable_adapter():
        without = relative(bench.logits(trained.model), bench.logits(bench.dense))
    assert start < 0.5 * without


def test_pissa_reloads_from_the_recorded_base(bench):
    import quantadapt as qa

    trained = bench.trained("pissa")
    loaded = qa.load(qa.save(trained.model, bench.folder()))
    assert change(bench.logits(loaded), trained.tuned) == 0
    again = qa.load(qa.save(loaded, bench.folder()))
    assert change(bench.logits(again), trained.tuned) == 0


def test_saved_adapter_is_a_plain_peft_folder(bench):
    import quantadapt as qa

    folder = qa.save(bench.trained("lora").model, bench.folder())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (folder / "adapter_model.safetensors").exists()
    record = json.loads((folder / "quantadapt.json").read_text())
    assert record["backend"] == "hqq"
    assert record["options"]["bits"] == 4


def test_loading_onto_another_base_warns(bench):
    import quantadapt as qa
    from quantadapt import BaseMismatchWarning

    folder = qa.save(bench.trained("lora").model, bench.folder())
    other = qa.quantize(bench.source, "hqq", bits=8)
    with pytest.warns(BaseMismatchWarning, match=r"options .*'bits': 4.*now .*'bits': 8"):
        qa.load(folder, base=other)


def test_a_merge_is_refused_before_torch_is_loaded():
    code = (
        "import sys\n"
        "from quantadapt import plan, Spec\n"
        "for adapter in ('beft', 'lily'):\n"
        "    spec = Spec(adapter=adapter, device='cpu', export={'merge': 'dense'})\n"
        "    try:\n"
        "        plan(spec)\n"
        "    except Exception as error:\n"
        "        rules = [p.rule for p in error.problems]\n"
        "        print(type(error).__name__, *rules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{MergeRefused.__name__} {adapter}-no-merge False" for adapter in ("beft", "lily")
    ]
