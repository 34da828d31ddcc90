"""What was trained on a streamed base is loaded, measured and asked in the same way."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen import shortfall

import quantadapt as qa
from quantadapt import cli
from quantadapt.cli.flags import SpecFlags
from quantadapt.cli.models import open_model
from quantadapt.cli.run_models import opened_models
from quantadapt.errors import QuantadaptError, SpecError
from quantadapt.evaluation.predictions import evaluating
from quantadapt.exporting import loading
from quantadapt.exporting.loading import StreamedWarning, as_trained
from quantadapt.exporting.manifest import MANIFEST
from quantadapt.generation import Sampling
from quantadapt.generation.rows import Row, Rows
from quantadapt.machine import Machine
from quantadapt.planning import plan, streaming
from quantadapt.quantizing import quantize_plan
from quantadapt.quantizing.state import state_of
from quantadapt.spec import Spec
from quantadapt.streaming import streamer_of
from quantadapt.streaming.rows import OnDisk

IDS = torch.arange(3, 27).reshape(2, 12)
TOLD = "streamed from CPU memory, as while it was trained"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU streams as a GPU would: blocks are copied all the same."""

    def choose(spec: Spec, *_: Any, **__: Any) -> Any:
        return spec.train.stream if spec.train.stream != "auto" else "none"

    monkeypatch.setattr(streaming, "choose", choose)
    monkeypatch.setattr(loading, "this_machine", lambda: Machine(cuda=((9, 0),)))


def trained(folder: Path, stream: Any, backend: str = "torchao-int8") -> Path:
    """Save an adapter that does something, on a base that was streamed."""
    made = plan(Spec(backend=backend, device="cpu"), check_output=False)
    model = qa.attach(quantize_plan(replace(made, stream=stream)), "lora", r=4)
    for n, (name, weight) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            weight.data.copy_(torch.linspace(-n, n, weight.numel()).sin().view(weight.shape) / 9)
    qa.save(model, folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("stream", ["all", "none"])
def test_it_is_loaded_as_it_was_trained(tmp_path: Path, as_on_a_gpu: None, stream: str) -> None:
    folder = trained(tmp_path, stream)
    assert json.loads((folder / "adapter" / MANIFEST).read_text())["stream"] == stream
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = qa.load(folder)
    found = [w for w in told if issubclass(w.category, StreamedWarning)]
    assert len(found) == (stream == "all")
    assert (streamer_of(model) is not None) == (stream == "all")
    assert state_of(model).stream == stream
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamedWarning)
        other = qa.load(folder, stream="none" if stream == "all" else "all")
    assert (streamer_of(other) is None) == (stream == "all")
    assert torch.equal(logits(model), logits(other))


def test_without_a_gpu_nothing_is_streamed_and_nothing_told(tmp_path: Path) -> None:
    folder = trained(tmp_path, "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamedWarning)
        model = qa.load(folder)
    assert streamer_of(model) is None
    assert state_of(model).stream == "none"
    assert as_trained("auto", "all", "cpu") == "none"
    assert as_trained("auto", "experts", "cuda:1") == "experts"
    assert as_trained("none", "all", "cuda") == "none"


def test_what_older_versions_wrote_is_not_streamed(tmp_path: Path, as_on_a_gpu: None) -> None:
    file = trained(tmp_path, "all") / "adapter" / MANIFEST
    noted = json.loads(file.read_text())
    del noted["stream"]
    file.write_text(json.dumps(noted))
    assert streamer_of(qa.load(tmp_path)) is None
    file.write_text(json.dumps(noted | {"stream": "half"}))
    with pytest.raises(QuantadaptError, match="stream"):
        qa.load(tmp_path)


def test_a_base_that_is_there_stays_as_it_is(tmp_path: Path, as_on_a_gpu: None) -> None:
    folder = trained(tmp_path, "all")
    base = qa.quantize(None, "torchao-int8", device="cpu")
    with pytest.raises(QuantadaptError, match="the adapter goes onto its base as it is"):
        qa.load(folder, base=base, stream="all")
    for wrong in (lambda **how: qa.load(folder, **how), lambda **how: qa.quantize(None, **how)):
        with pytest.raises(SpecError, match="'half' is not possible"):
            wrong(stream="half")
    assert streamer_of(qa.load(folder, base=base)) is None


def test_a_whole_model_is_streamed_where_that_is_said(tmp_path: Path, as_on_a_gpu: None) -> None:
    qa.save(qa.quantize(None, "torchao-int8", device="cpu"), tmp_path / "whole")
    whole = qa.load(tmp_path / "whole")
    assert streamer_of(whole) is None
    model = qa.load(tmp_path / "whole", stream="all")
    assert streamer_of(model) is not None
    assert torch.equal(logits(model), logits(whole))


def test_a_disk_keeps_the_base_where_that_is_said(
    tmp_path: Path, as_on_a_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """In Python and on the command line, of an adapter and of what a run was made from."""
    folder, disk = trained(tmp_path / "run", "all"), tmp_path / "disk"
    disk.mkdir()
    expected = logits(qa.load(folder, stream="none"))
    with pytest.warns(StreamedWarning, match=f"streamed from {disk}, as while it was trained"):
        model = qa.load(folder, stream_folder=str(disk))
    asked = [
        model,
        qa.load(folder, stream="all", stream_folder=str(disk)),
        open_model(str(folder), "cpu", stream=f"all:{disk}"),
    ]
    for one in asked:
        rows = streamer_of(one)._rows
        assert isinstance(rows, OnDisk)
        assert rows.folder == disk
        assert torch.equal(logits(one), expected)
    how = {"force_base": False, "stream": f"all:{disk}"}
    for name, one in opened_models(str(folder), ["unquantized", "tuned"], "cpu", **how):
        assert isinstance(streamer_of(one)._rows, OnDisk), name
    with pytest.raises(QuantadaptError, match="nowhere"):
        open_model(str(folder), "cpu", stream="all:nowhere")
    base = qa.quantize(None, "torchao-int8", device="cpu")
    with pytest.raises(QuantadaptError, match=r"stream_folder=.* has no effect: the adapter goes"):
        qa.load(folder, base=base, stream_folder=str(disk))


def test_a_run_takes_the_folder_in_the_same_way() -> None:
    train = SpecFlags(stream="experts:/mnt/nvme").spec().train
    assert (train.stream, train.stream_folder) == ("experts", "/mnt/nvme")
    train = SpecFlags(stream="all").spec().train
    assert (train.stream, train.stream_folder) == ("all", None)


def test_the_base_without_quantization_is_streamed_beside_it(
    tmp_path: Path, as_on_a_gpu: None
) -> None:
    folder = str(trained(tmp_path, "all"))
    for stream, streams in (("auto", True), ("none", False)):
        opened = opened_models(folder, ["unquantized"], None, force_base=False, stream=stream)
        _, model = next(opened)
        assert state_of(model).backend.name == "none"
        assert (streamer_of(model) is not None) == streams


@pytest.mark.slow
def test_commands_answer_and_measure_the_same(
    tmp_path: Path, as_on_a_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def ask(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words])
        return (int(ended.value.code or 0), *capfd.readouterr())

    folder = str(trained(tmp_path, "all"))
    prompts = ("--prompt", "Write a Python function", "--max-new-tokens", "8")
    streamed = ask("generate", folder, *prompts)
    whole = ask("generate", folder, *prompts, "--stream", "none")
    assert streamed[0] == whole[0] == 0, streamed[2] + whole[2]
    assert streamed[1] == whole[1] != ""
    assert streamed[2].count(TOLD) == 1
    assert TOLD not in whole[2]
    measured = [
        ask(
            "eval",
            folder,
            "--max-examples",
            "4",
            "--json",
            "--models",
            "unquantized,quantized,tuned",
            *more,
        )
        for more in ((), ("--stream", "none"))
    ]
    assert [code for code, *_ in measured] == [0, 0], measured[0][2]
    first, second = (json.loads(out) for _, out, _ in measured)
    assert first == second
    code, _, words = ask("generate", folder, *prompts, "--stream", "half")
    assert code != 0
    assert "--stream: 'half' cannot be streamed" in words
    assert "use one of auto, none, experts, all" in words


@pytest.mark.cuda
def test_on_a_gpu_it_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    base = qa.quantize(None, "bnb-nf4", device="cuda", stream="all")
    model = qa.attach(base, "lora", r=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    qa.save(model, tmp_path)
    with pytest.warns(StreamedWarning, match=TOLD):
        again = qa.load(tmp_path)
    assert streamer_of(again) is not None
    whole = qa.load(tmp_path, stream="none")
    assert streamer_of(whole) is None
    with torch.no_grad():
        found, right = (m.eval()(input_ids=IDS.cuda()).logits for m in (again, whole))
    assert torch.equal(found, right)
    row = Row(IDS[0].tolist(), Sampling().chooser(0), limit=8)
    with evaluating(again):
        batch = Rows(again)
        batch.add([row])
        while batch.rows:
            batch.step()
    assert len(row.tokens) == 8
    assert shortfall(whole, row.prompt, row.tokens) < 0.1


def asked(model: Any) -> tuple[Any, list[str]]:
    return state_of(model).tokenizer, ["def add(a, b):"]
