"""An adapter knows its base: another one is refused in a sentence unless it is forced."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantadapt as qa
from quantadapt import cli
from quantadapt.errors import MergeRefused, ModelError, PlanRefused
from quantadapt.exporting.manifest import MANIFEST
from quantadapt.exporting.same_base import BaseMismatchWarning, UnknownBaseWarning
from quantadapt.folders import written
from quantadapt.inputs.fingerprints import Fingerprint, difference, fingerprint_of
from quantadapt.testing.small_demo import small_model

TARGETS = ["q_proj", "down_proj"]


def edit(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **values}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the small model that a test may change."""
    return Path(shutil.copytree(small_model(), tmp_path / "base"))


def retrained(folder: Path) -> None:
    """Change one of the tensors, as training does."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapter_on(base: Any, folder: Path, backend: str = "hqq", **options: Any) -> Path:
    model = qa.attach(qa.quantize(base, backend, device="cpu", **options), target_modules=TARGETS)
    return qa.save(model, folder)


def test_a_base_is_the_same_in_shards_in_another_dtype_and_as_a_copy(tmp_path: Path) -> None:
    source = small_model()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for name, dtype, size in (
        ("bf16", torch.bfloat16, "5GB"),
        ("f32", torch.float32, "5GB"),
        ("f64", torch.float64, "5GB"),
        ("shards", torch.bfloat16, "500KB"),
    ):
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=size)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found = [fingerprint_of(str(tmp_path / name)) for name in ("bf16", "f32", "f64", "shards")]
    assert found[0] is not None
    assert found == found[:1] * 4
    half = model.to(torch.float16)
    half.save_pretrained(tmp_path / "f16")
    half.float().save_pretrained(tmp_path / "f16-as-f32")
    assert fingerprint_of(str(tmp_path / "f16")) == fingerprint_of(str(tmp_path / "f16-as-f32"))


def test_a_hub_id_and_a_copy_of_its_folder_are_one_base(tmp_path, monkeypatch) -> None:
    commit = "0" * 39 + "1"
    repo = tmp_path / "hub" / "models--some--base"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in small_model().iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fingerprint_of("some/base") == fingerprint_of(str(small_model()))
    assert fingerprint_of("some/other") is None


def test_it_knows_a_config_by_what_is_computed(base: Path) -> None:
    then = fingerprint_of(str(base))
    edit(base / "config.json", transformers_version="9", use_cache=False, eos_token_id=7, x=None)
    now = fingerprint_of(str(base))
    assert difference(then, now) == ""
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {**config, "rope_theta": rope["rope_theta"]}  # as transformers 4 wrote it
    (base / "config.json").write_text(json.dumps(old))
    assert difference(then, fingerprint_of(str(base))) == ""
    edit(base / "config.json", rope_theta=5e5)
    assert difference(then, fingerprint_of(str(base))) == "the same weights, but another config"


def test_it_is_known_without_torch() -> None:
    code = (
        "import sys; from quantadapt.inputs.fingerprints import fingerprint_of;"
        f"assert fingerprint_of({str(small_model())!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("backend", ["hqq", "none", "bnb-nf4"])
def test_a_base_that_was_trained_since_is_refused(backend, base, tmp_path) -> None:
    run = adapter_on(str(base), tmp_path / "run", backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownBaseWarning)
        qa.load(run, device="cpu")
    retrained(base)
    told = r"(?s)is not the base that the adapter was.*other weights.*put back the files"
    with pytest.raises(ModelError, match=told):
        qa.load(run, device="cpu")
    assert qa.load(run, device="cpu", force_base=True).active_adapters == ["default"]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("finegrained-fp8", {}),
        ("finegrained-fp8", {"weight_block_size": (64, 32)}),
        ("compressed-tensors", {"group_size": 32}),
    ],
)
def test_the_same_base_is_the_same(backend, options, base, tmp_path) -> None:
    """Options in JSON have lists where Python has tuples."""
    run = adapter_on(str(base), tmp_path / "run", backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qa.load(run, device="cpu")
        qa.load(run, base=qa.quantize(str(base), backend, device="cpu", **options))
    other = {"finegrained-fp8": {"weight_block_size": (32, 32)}}.get(backend, {"group_size": 64})
    with pytest.warns(BaseMismatchWarning, match="another base: options"):
        qa.load(run, base=qa.quantize(str(base), backend, device="cpu", **other))


def test_another_base_is_refused_and_a_copy_is_not(base, tmp_path) -> None:
    run = adapter_on(str(small_model()), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qa.load(run, base=str(base), device="cpu")  # a copy, elsewhere: no word of it
    edit(base / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ModelError, match="the same weights, but another config") as told:
        qa.load(run, base=qa.quantize(str(base), "hqq", device="cpu"))
    assert "--force-base" in told.value.problems[0].fix
    assert str(small_model()) in told.value.problems[0].fix


def test_a_quantized_checkpoint_knows_what_it_was_made_from(base, tmp_path) -> None:
    quantized, other = tmp_path / "quantized", tmp_path / "other"
    qa.save(qa.quantize(str(base), "hqq", device="cpu"), quantized)
    run = adapter_on(str(quantized), tmp_path / "run")
    known = json.loads((run / "quantadapt.json").read_text())["fingerprint"]
    assert known["quantized"]
    assert known["original"] == fingerprint_of(str(base)).weights
    shutil.copytree(base, other)
    retrained(other)
    with pytest.raises(MergeRefused, match="is not what the adapter's base was made from"):
        qa.merge_onto(run, str(other), tmp_path / "out", check=False)
    assert qa.merge_onto(run, str(base), tmp_path / "out", check=False)["kind"] == "onto"
    # the same options, other codes: the quantized checkpoint of another model
    qa.save(qa.quantize(str(other), "hqq", device="cpu"), tmp_path / "quantized-other")
    with pytest.raises(ModelError, match="other weights"):
        qa.load(run, base=str(tmp_path / "quantized-other"), device="cpu")
    # and a fresh quantization of the original is no other base
    qa.load(run, base=qa.quantize(str(base), "hqq", device="cpu"))


def test_merging_onto_another_base_is_refused_before_any_work(base, tmp_path, capsys) -> None:
    run = adapter_on(str(small_model()), tmp_path / "run")
    retrained(base)
    command = [
        "merge",
        str(run),
        "--onto",
        str(base),
        "--output",
        str(tmp_path / "o"),
        "--no-check",
    ]
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "is not what the adapter's base was made from" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--force-base"])
    assert (tmp_path / "o" / "merged" / "model.safetensors").exists()
    export = ["export", str(run), "onto-base", "--set", f"base={base}", "--set", "check=false"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*export, "--output", str(tmp_path / "o2"), "--force-base"])
    assert (tmp_path / "o2" / "merged" / "model.safetensors").exists()
    # the same in a spec, where the plan knows both
    spec = {"formats": [{"name": "onto-base", "base": str(base)}], "merge": "never"}
    with pytest.raises(PlanRefused, match="is not what the adapter's base was made from"):
        qa.plan(qa.Spec(model=str(small_model()), export=spec, output=str(tmp_path / "run2")))
    spec["formats"][0]["force_base"] = True
    assert qa.plan(qa.Spec(model=str(small_model()), export=spec, output=str(tmp_path / "run2")))


def test_nothing_noted_is_told_and_taken(base, tmp_path) -> None:
    run = adapter_on(str(base), tmp_path / "run")
    manifest = json.loads((run / "quantadapt.json").read_text())
    del manifest["fingerprint"]
    (run / "quantadapt.json").write_text(json.dumps(manifest))
    retrained(base)
    with pytest.warns(UnknownBaseWarning, match="nothing was noted when it was saved"):
        qa.load(run, device="cpu")
    with pytest.warns(UnknownBaseWarning, match="nothing was noted when it was saved"):
        qa.merge_onto(run, str(base), tmp_path / "out", check=False)


def test_a_live_module_is_known_by_the_weights_that_are_quantized(tmp_path) -> None:
    def live(scale: float = 1.0, head: float = 1.0) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            small_model(), dtype=torch.float32, tie_word_embeddings=False
        )
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight *= scale
            model.lm_head.weight *= head
        return model

    run = adapter_on(live(), tmp_path / "run")
    again = qa.quantize(
        live(head=2.0), "hqq", device="cpu"
    )  # a head of its own, as of a classifier
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qa.load(run, base=again)
    with pytest.raises(ModelError, match=r"the module is not the base .* other weights"):
        qa.load(run, base=qa.quantize(live(scale=1.5), "hqq", device="cpu"))
    with pytest.warns(UnknownBaseWarning, match="live module"):
        qa.load(run, base=qa.quantize(str(small_model()), "hqq", device="cpu"))


def test_a_live_module_that_came_quantized_does_not_show_its_weights(tmp_path) -> None:
    """So another one is no reason to refuse, and the same one none for silence."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def live(**options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            small_model(), dtype=torch.float32, device_map="cpu", **options
        )
        return qa.quantize(model, "bnb-nf4", device="cpu", dtype="float32")

    for number, first in enumerate((live(), live(quantization_config=nf4))):
        run = qa.save(qa.attach(first, target_modules=TARGETS), tmp_path / str(number))
        with pytest.warns(UnknownBaseWarning, match="quantized already does not show its weights"):
            qa.load(run, base=live(quantization_config=nf4))
    then = Fingerprint(kind="module", config="", weights="a", quantized=True)
    assert difference(then, then.model_copy(update={"weights": "b"})) == "other weights"


def test_options_that_are_no_json_are_the_same_once_written(tmp_path) -> None:
    """A pair of sizes is a list in a file."""
    run = adapter_on(str(small_model()), tmp_path / "run", "finegrained-fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        qa.load(run, device="cpu")


def test_a_run_is_not_resumed_on_another_base(base, tmp_path) -> None:
    values: dict[str, Any] = {
        "model": str(base),
        "output": str(tmp_path / "run"),
        "train": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1},
        "data": {"max_examples": 8, "max_length": 128},
        "evaluate": {"max_examples": 2, "samples": 0, "unquantized": False},
        "export": {"merge": "never"},
        "device": "cpu",
    }
    qa.run(qa.Spec(**values), verbose=False)
    noted = json.loads((tmp_path / "run" / "plan.json").read_text())["fingerprint"]
    assert noted["weights"] == fingerprint_of(str(base)).weights
    values["train"] = {**values["train"], "max_steps": 3, "resume": True}
    qa.plan(qa.Spec(**values))
    retrained(base)
    with pytest.raises(
        PlanRefused, match=r"not the base that the run was begun with.*other weights"
    ):
        qa.plan(qa.Spec(**values))
    made = qa.run(qa.Spec(**values, force_base=True), verbose=False)
    assert made.metrics["train"]["resumed_from"]
    kept = qa.Spec.load(tmp_path / "run" / "spec.yaml")
    assert not kept.force_base


# A base of its own, beside the adapter ------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with an adapter and the base that its start has rewritten, as runs that calibrate
    have one, too."""
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "pissa", target_modules=TARGETS)
    qa.save(model, tmp_path / "run")
    return tmp_path / "run"


def flipped(file: Path) -> None:
    """Change one bit of the first weight of the last norm, at the same size."""
    found = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(found[:8], "little")
    place = json.loads(found[8:start])["model.norm.weight"]["data_offsets"][0]
    found[start + place + 2] ^= 0x10
    file.write_bytes(found)


def test_an_own_base_that_was_altered_is_told_at_the_same_size(own: Path, capsys) -> None:
    """Its fingerprint lies beside it, so nothing but its files tells."""
    weights = next((own / "base").glob("*.safetensors"))
    before = said_by(qa.load(own, device="cpu"))
    flipped(weights)
    what = f"{weights.name} is not as when the adapter was trained on it"
    with pytest.raises(ModelError, match=what):
        qa.load(own, device="cpu")
    out = own.parent / "out"
    commands = [
        ("eval", own),
        ("generate", own, "--prompt", "one"),
        ("merge", own, "-o", out),
        ("export", own, "adapter", "-o", out),
        ("export", own, "merged-dense", "-o", out),
        ("serve", own, "--port", "0"),
    ]
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main([str(word) for word in command])
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.count(what) == 1, command
        assert "--force-base" in shown, command
    assert not (out / "adapter").exists()
    assert not (out / "base").exists()
    with pytest.warns(BaseMismatchWarning, match=what) as warned:
        qa.load(own, device="cpu", force_base=True)
    assert len([w for w in warned if what in str(w.message)]) == 1
    flipped(weights)  # back again
    assert torch.equal(said_by(qa.load(own, device="cpu")), before)


def said_by(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 17, 33, 65]])).logits.float()


def test_what_computes_nothing_of_an_own_base_is_a_warning(own: Path) -> None:
    edit(own / "base" / "tokenizer_config.json", model_max_length=99)
    with pytest.warns(BaseMismatchWarning, match=r"tokenizer_config\.json is not as when"):
        qa.load(own, device="cpu")
    edit(own / "base" / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ModelError, match=r"config\.json, tokenizer_config\.json are not as when"):
        qa.load(own, device="cpu")


def test_checksums_are_read_where_times_differ_and_then_once(own: Path, monkeypatch) -> None:
    read: list[str] = []
    checksum = written._checksum
    monkeypatch.setattr(written, "_checksum", lambda f: read.append(f.name) or checksum(f))
    qa.load(own, device="cpu")
    assert read == []
    copy = own.parent / "copy"
    shutil.copytree(own, copy, copy_function=shutil.copyfile)  # as cp does: with new times
    names = {file.name for file in (copy / "base").iterdir()} - {written.LIST, MANIFEST}
    qa.load(copy, device="cpu")
    assert sorted(read) == sorted(names)
    qa.load(copy, device="cpu")
    assert sorted(read) == sorted(names)
    (copy / "base" / "generation_config.json").unlink()
    with pytest.warns(BaseMismatchWarning, match=r"generation_config\.json is missing"):
        qa.load(copy, device="cpu")
