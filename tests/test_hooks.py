"""Every hook has an example in the reference, and every example does what the page says."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from few_rows import few_rows

from quantadapt import cli, hookspecs
from quantadapt.registry import registry
from quantadapt.registry.checks import HOOKS
from quantadapt.testing.small_demo import small_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "reference" / "hooks.md"
PROOFS: dict[str, list[str]] = defaultdict(list)


def proves(hook: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test that runs the example of `hook`."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        PROOFS[hook].append(test.__name__)
        return pytest.mark.parametrize("example", [hook], indirect=True)(test)

    return mark


def code_of(hook: str) -> str:
    """Return the example of a hook, as it stands in the reference."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {hook}\n")
    section = re.split(r"^##+ ", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "hookimpl" in block]
    return str(found)


@pytest.fixture
def example(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution whose plugin is the example, installed."""
    (tmp_path / "hook_example.py").write_text(code_of(request.param))
    info = tmp_path / "hook_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hook-example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantadapt]\nexample = hook_example\n")
    monkeypatch.syspath_prepend(str(DOCS / "tutorial" / "quantadapt-absmax" / "src"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "none,example")
    monkeypatch.chdir(tmp_path)
    registry.cache_clear()
    assert not registry().broken
    yield
    registry.cache_clear()
    sys.modules.pop("hook_example", None)


# Every hook --------------------------------------------------------------------------------------


def test_every_hook_has_an_example_and_a_test() -> None:
    declared = [name for name in vars(hookspecs) if name.startswith("quantadapt_")]
    documented = re.findall(r"^## (quantadapt_\w+)$", PAGE.read_text(), re.MULTILINE)
    assert list(HOOKS) == declared == documented
    assert set(PROOFS) == set(declared)
    assert all(name in globals() for names in PROOFS.values() for name in names)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_example_implements_its_hook_and_no_other(hook: str) -> None:
    text = code_of(hook)
    assert re.findall(r"def (quantadapt_\w+)", text) == [hook]
    assert text.count("@hookimpl") == 1


# The examples ------------------------------------------------------------------------------------


@proves("quantadapt_backends")
def test_a_backend(example) -> None:
    import torch

    import quantadapt as qa
    from quantadapt.facade import facades

    record = registry().backend("absmax8")
    assert str(registry().provenance(record)) == "example (hook-example 1.0)"
    assert qa.plan(qa.Spec(backend="absmax8")).backend is record
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    dense = model[0].weight.detach().clone()
    (facade,) = [facade for _, facade in facades(qa.quantize(model, "absmax8"))]
    error = (facade.weight + 0 - dense).norm() / dense.norm()
    assert 0 < error < 0.01


@proves("quantadapt_adapters")
def test_an_adapter(example) -> None:
    import quantadapt as qa
    from quantadapt import demo
    from quantadapt.facade import facades

    plan = qa.plan(qa.Spec(backend="none", adapter="lora-qv"))
    assert plan.adapter_options == {
        **plan.adapter_options, "r": 4, "target_modules": ["q_proj", "v_proj"]
    }  # fmt: skip
    model = qa.attach(qa.quantize(str(demo.MODEL_DIR), "none"), "lora-qv")
    adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    assert len(adapted) == 2 * model.config.num_hidden_layers
    assert len(dict(facades(model))) > len(adapted)


@proves("quantadapt_objectives")
def test_an_objective(example, tmp_path: Path) -> None:
    """Of two examples one weighs nothing: what is left of the loss is twice that of the other."""
    import quantadapt as qa

    learnt = {"prompt": "Add one to one.\n", "completion": "two"}
    ignored = {"prompt": "Name a fruit.\n", "completion": "a yellow banana"}
    files = {
        "both/train.jsonl": [learnt | {"importance": 2.0}, ignored | {"importance": 0}],
        "one/train.jsonl": [learnt],
    }
    for name, rows in files.items():
        folder = (tmp_path / name).parent
        folder.mkdir()
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        (folder / "eval.jsonl").write_text(json.dumps(ignored))

    def loss(folder: str, **objective: str) -> float:
        model = qa.attach(qa.quantize(None, "none"), "lora")
        found = qa.train(model, tmp_path / folder, objective=objective, max_steps=1)
        return found.losses[0][1]

    tokenizer = qa.quantize(None, "none").quantadapt.tokenizer
    texts = [row["completion"] for row in (learnt, ignored)]
    tokens = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    alone = loss("one", name="sft") * tokens[0]
    weighted = loss("both", name="weighted", column="importance") * sum(tokens)
    assert weighted == pytest.approx(2 * alone, rel=1e-5)


@proves("quantadapt_evaluations")
def test_an_evaluation(example, tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import quantadapt as qa
    from quantadapt import demo
    from quantadapt.data import read_held_out

    model = qa.quantize(None, "none", device="cpu", dtype="float32")
    held_out = read_held_out(None, tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    prompt, other = held_out.prompts[:2]
    ids = tokenizer(prompt.text, return_tensors="pt")
    answer = stock.generate(**ids, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    known = replace(prompt, reference=tokenizer.decode(answer, skip_special_tokens=True))
    held_out = replace(held_out, prompts=[known, other])
    found = qa.evaluate(model, held_out, evaluation="exact-match", max_new_tokens=8)
    assert found == {"exact-match": 0.5}
    found = qa.evaluate(model, held_out, evaluation="exact-match", max_new_tokens=8, first=1)
    assert found == {"exact-match": 1.0}


@proves("quantadapt_exports")
def test_an_export(example, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    import quantadapt as qa
    from quantadapt.exporting.saving import save

    save(qa.attach(qa.quantize(str(small_model()), "none"), "lora"), tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path), "flat", "--set", "dtype=float64"])
    assert not ended.value.code
    base = load_file(small_model() / "model.safetensors")
    found = load_file(tmp_path / "flat" / "flat.safetensors")
    assert base.keys() <= found.keys()
    for name, value in base.items():  # an untrained LoRA adds nothing
        torch.testing.assert_close(found[name], value.double())


@proves("quantadapt_commands")
def test_a_command(example, capsys) -> None:
    from quantadapt import demo

    with pytest.raises(SystemExit) as ended:
        cli.main(["size", str(demo.MODEL_DIR)])
    weights = sum(file.stat().st_size for file in Path(demo.MODEL_DIR).glob("*.safetensors"))
    assert (ended.value.code or 0, capsys.readouterr().out) == (0, f"{weights / 2**20:.1f}\n")
    with pytest.raises(SystemExit):
        cli.main(["size", "--help"])
    assert "Print the size of a checkpoint in MiB." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--no-imports"])
    told = capsys.readouterr().out
    assert re.search(r"Commands of plugins\n +example \(hook-example 1\.0\)\n", told)


@proves("quantadapt_stage_done")
def test_a_stage(example, tmp_path: Path) -> None:
    import quantadapt as qa

    told: list[tuple[str, str]] = []

    class Listener:
        @hookspecs.hookimpl
        def quantadapt_stage_done(self, stage: str, value: object) -> None:
            told.append((stage, type(value).__name__))

    registry().manager.register(Listener())
    spec = qa.Spec(
        model=str(small_model()),
        data={"path": few_rows()},
        backend="none",
        train={"max_steps": 2, "per_device_train_batch_size": 1},
        evaluate={"max_examples": 2, "samples": 0, "unquantized": False},
        export={"merge": "never"},
        output=str(tmp_path / "run"),
    )
    result = qa.run(spec)
    steps, seconds, loss = (tmp_path / "trainings.csv").read_text().strip().split(",")
    assert int(steps) == 2
    assert float(seconds) == result.metrics["train"]["seconds"]
    assert float(loss) > 0
    assert told == [
        ("plan", "Plan"),
        ("quantize", type(result.model.get_base_model()).__name__),
        ("attach", type(result.model).__name__),
        ("train", "TrainResult"),
        ("evaluate", "dict"),
        ("export", "dict"),
    ]


@proves("quantadapt_stage_done")
def test_a_hook_may_leave_out_arguments(example, tmp_path: Path) -> None:
    seen: list[str] = []

    class Listener:
        @hookspecs.hookimpl
        def quantadapt_stage_done(self, stage: str) -> None:
            seen.append(stage)

    registry().manager.register(Listener())
    registry().manager.hook.quantadapt_stage_done(stage="quantize", value=None)
    assert seen == ["quantize"]
    assert not (tmp_path / "trainings.csv").exists()
