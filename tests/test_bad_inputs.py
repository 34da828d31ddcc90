"""Bad files and values: refused in a sentence, in time, and nothing is harmed."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantadapt as qa
from quantadapt import demo
from quantadapt.cli.models import checked_output, inputs_of
from quantadapt.data import templates
from quantadapt.errors import (
    DataError,
    ModelError,
    NumbersError,
    OutputError,
    PlanRefused,
    SpecError,
)
from quantadapt.exporting.manifest import read_manifest
from quantadapt.inputs import patterns
from quantadapt.inputs.documents import read_object
from quantadapt.inputs.model_config import config_problems
from quantadapt.inputs.patience import TooSlow, at_most
from quantadapt.inputs.patterns import pattern_problems
from quantadapt.inputs.weights import check_weights, file_in, read_header
from quantadapt.loading.tensors import Checkpoint
from quantadapt.paths import INDEX, path_problem
from quantadapt.planning.exports import MERGES, export_of

ROOT = Path(__file__).parents[1]


def campaign(*arguments: str, timeout: float) -> str:
    """Run bad inputs; what must not be fails the test and is listed."""
    command = [sys.executable, "-m", "benchmarks.bad_inputs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_one_in_two_hundred_bad_inputs_is_refused_or_right() -> None:
    assert "cases in" in campaign("--every", "200", timeout=250)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_every_bad_input_is_refused_or_right() -> None:
    assert "cases in" in campaign(timeout=7000)


# Names in files ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, and files beside it that are not its own."""
    made = tmp_path / "model"
    made.mkdir()
    for name, key in (("one.safetensors", "a"), ("two.safetensors", "b")):
        save_file({key: torch.ones(2, 3)}, made / name)
    weights = {"a": "one.safetensors", "b": "two.safetensors"}
    (made / INDEX).write_text(json.dumps({"weight_map": weights}))
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "victim.safetensors")
    return made


def mapped(folder: Path, name: Any) -> None:
    weights = {"a": name, "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    "name",
    [
        "../victim.safetensors",
        "sub/../../victim.safetensors",
        "..\\victim.safetensors",
        "ABSOLUTE",
        "..",
        ".",
        "",
        " ",
        "a\0b",
        "a\nb",
        "a" * 300,
        "C:victim.safetensors",
        3,
        None,
        ["one.safetensors"],
    ],
)
def test_an_index_names_files_of_its_folder_alone(name: Any, folder: Path) -> None:
    victim = folder.parent / "victim.safetensors"
    before = victim.read_bytes()
    mapped(folder, str(victim) if name == "ABSOLUTE" else name)
    with pytest.raises(ModelError, match="no plain file name"):
        Checkpoint(str(folder))
    assert victim.read_bytes() == before


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to(folder.parent / "victim.safetensors")
    with pytest.raises(ModelError, match=r"a link that leads out of the folder, to .*victim"):
        check_weights(folder)


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("one.safetensors")
    with pytest.raises(ModelError, match=r"one.safetensors"):
        check_weights(folder)


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert [*check_weights(snapshot)] == ["a", "b"]
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to("../../../victim.safetensors")
    with pytest.raises(ModelError, match="out of the folder"):
        check_weights(snapshot)


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / "one.safetensors").rename(folder / "stored")
    (folder / "one.safetensors").symlink_to("stored")
    assert file_in(folder, "one.safetensors").is_file()
    assert torch.equal(Checkpoint(str(folder)).read("a"), torch.ones(2, 3))


def test_a_shard_that_lacks_what_the_index_says_is_refused(folder: Path) -> None:
    mapped(folder, "two.safetensors")
    with pytest.raises(ModelError, match="holds no"):
        check_weights(folder)


def test_an_index_cannot_make_a_merge_write_elsewhere(folder: Path) -> None:
    mapped(folder, "../victim.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PlanRefused, match="no plain file name"):
        qa.plan(qa.Spec(model=str(folder)), check_output=False)


# safetensors files -------------------------------------------------------------------------------


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randint(9, (7,)),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(1.0, dtype=torch.bfloat16),
        "e": torch.ones(6, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: part["shape"] for name, part in header.items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("length", [0, 7, 8, 40, -1])
def test_a_file_that_is_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(30, 5)}, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"cut short|damaged"):
        read_header(file)


# config.json -------------------------------------------------------------------------------------

EMPTY = ("esm", "rag", "wav2vec2-bert", "wav2vec2-conformer")
"""Their classes have no vocabulary until a checkpoint gives them one."""
PARTS = ("lxmert",)
"""Counts its layers by part."""


@pytest.mark.slow
def test_the_configs_of_transformers_are_right() -> None:
    """Every class of config, as it is written, passes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    wrong, seen = {}, 0
    for name in set(CONFIG_MAPPING_NAMES) - {*EMPTY, *PARTS}:
        try:
            text = CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except Exception:  # some cannot be made without arguments
            continue
        seen += 1
        if found := config_problems(json.loads(text)):
            wrong[name] = found
    assert not wrong
    assert seen > 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_hidden_layers", 10_000_000),
        ("num_hidden_layers", 0),
        ("num_attention_heads", [4]),
        ("vocab_size", 2.5),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-6),
        ("tie_word_embeddings", "no"),
        ("quantization_config", ["hqq"]),
        ("quantization_config", {"quant_method": 3}),
        ("text_config", {"hidden_size": "big"}),
    ],
)
def test_a_config_of_wrong_types_is_refused_by_the_plan(
    key: str, value: Any, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 10, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    save_file({"x": torch.ones(64, 10)}, tmp_path / "model.safetensors")
    named = re.escape(key if key != "text_config" else "text_config: hidden_size")
    with pytest.raises(PlanRefused, match=f"{named}|quant_method"):
        qa.plan(qa.Spec(model=str(tmp_path)), check_output=False)


def test_a_config_that_announces_more_than_there_is_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 10, "num_hidden_layers": 900}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(64, 10)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanRefused, match="num_hidden_layers is 900, and its files hold 1 tensors"):
        qa.plan(qa.Spec(model=str(tmp_path)), check_output=False)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 1, "vocab_size": 10**6})
    )
    with pytest.raises(PlanRefused, match="more than its files hold"):
        qa.plan(qa.Spec(model=str(tmp_path)), check_output=False)


# quantadapt.json ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder of the demo."""
    model = qa.attach(qa.quantize(backend="none"), "lora", r=2, target_modules=["q_proj"])
    return qa.save(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_newer_format_is_refused(adapter: Path) -> None:
    assert read_manifest(adapter)["format"] == 1
    changed(adapter / "quantadapt.json", format=2)
    with pytest.raises(ModelError, match="a newer quantadapt wrote it: its format is 2"):
        qa.load(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"format": "1"},
        {"backend": 3},
        {"options": {"nonsense": 1}},
        {"options": []},
        {"dtype": "float8"},
        {"skip_modules": "lm_head"},
        {"adapter": []},
        {"adapter_options": {"r": "two"}},
        {"max_length": -1},
        {"base": "a\nb"},
    ],
)
def test_a_damaged_record_is_refused_by_key(values: dict[str, Any], adapter: Path) -> None:
    changed(adapter / "quantadapt.json", **values)
    with pytest.raises(ModelError, match="cannot be used") as error:
        qa.load(adapter)
    (key,) = values
    said = {"options": "option", "adapter_options": "adapter option r"}.get(key, key)
    assert said in str(error.value)


# Adapters ----------------------------------------------------------------------------------------


def test_an_adapter_of_another_type_is_refused(adapter: Path) -> None:
    changed(adapter / "adapter_config.json", peft_type="LOHA")
    with pytest.raises(ModelError, match='its peft_type is "LOHA", and lora was trained'):
        qa.load(adapter)


@pytest.mark.parametrize("values", [{"r": "2"}, {"r": 0}, {"r": True}, {"lora_alpha": None}])
def test_an_adapter_config_of_wrong_types_is_refused(values: dict[str, Any], adapter: Path) -> None:
    changed(adapter / "adapter_config.json", **values)
    with pytest.raises(ModelError, match=rf"\b{next(iter(values))}\b"):
        qa.load(adapter)


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4", "torchao-int8", "quanto"])
def test_tensors_that_a_layer_has_no_place_for_are_told(backend: str) -> None:
    """An adapter's of layers that its config leaves out, for one."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    model = qa.quantize(layers, backend, skip_modules=())
    stray = {"0.lora_A.weight": torch.ones(2, 64), "0.more": torch.ones(1)}
    assert sorted(model.load_state_dict(stray, strict=False).unexpected_keys) == sorted(stray)
    whole = model.load_state_dict({**model.state_dict(), **stray}, strict=False)
    assert sorted(whole.unexpected_keys) == sorted(stray)
    assert not whole.missing_keys


def test_an_adapter_that_is_a_pickle_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickles \(adapter_model.bin\)"):
        qa.load(adapter)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_adapter_that_holds_no_numbers_is_refused_by_name(value: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[7] = float(value)
    save_file(tensors, file)
    with pytest.raises(NumbersError, match=re.escape(name)):
        qa.load(adapter)
    with pytest.raises(NumbersError, match=re.escape(name)):
        qa.merge_onto(adapter, str(demo.MODEL_DIR), adapter.parent / "out", check=False)
    assert not (adapter.parent / "out" / "merged").exists()


def test_nothing_is_written_into_the_base_that_it_is_made_of(adapter: Path, tmp_path: Path) -> None:
    """Beside the base's config a folder `merged` would be loaded in its place."""
    base = Path(shutil.copytree(demo.MODEL_DIR, tmp_path / "base"))
    changed(adapter / "quantadapt.json", base=str(base))
    read = inputs_of(export_of(MERGES["dense"], {}), str(adapter))
    refused = pytest.raises(PlanRefused, match="the folder is inside")
    with refused, checked_output(base / "merged", False, read):
        pass
    with pytest.raises(OutputError, match="the folder is inside"):
        qa.merge(qa.load(adapter), base / "merged")
    assert not (base / "merged").exists()


# Numbers -----------------------------------------------------------------------------------------


def broken_llama(folder: Path, key: str, value: float) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    with torch.no_grad():
        model.get_parameter(key).view(-1)[11] = value
    model.save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4", "bnb-int8", "torchao-int8"])
@pytest.mark.parametrize("key", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_quantize_stops_at_a_weight_that_is_no_number(
    backend: str, key: str, tmp_path: Path
) -> None:
    folder = broken_llama(tmp_path, key, float("nan"))
    with pytest.raises(NumbersError, match=f"{re.escape(key)} holds values that are no numbers"):
        qa.quantize(str(folder), backend)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_live_module_with_a_weight_that_is_no_number_is_refused(value: float) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with torch.no_grad():
        layers[1].bias[3] = value
    with pytest.raises(NumbersError, match=r"1.bias"):
        qa.quantize(layers, "hqq", skip_modules=())


def test_evaluating_stops_where_predictions_are_no_numbers() -> None:
    model = qa.quantize(backend="none")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumbersError, match="NaN"):
        qa.evaluate(model, max_examples=2)


# Time --------------------------------------------------------------------------------------------


def test_the_time_is_over() -> None:
    started = time.process_time()
    with pytest.raises(TooSlow), at_most(0.2):
        re.fullmatch("(.+)+(.+)+(.+)+z", "a" * 60)
    assert time.process_time() - started < 2


def test_the_time_limit_is_taken_back() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with at_most(30):
        pass
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def in_a_thread(call: Any) -> Any:
    """Return what `call` returns or raises in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def test_the_time_is_over_in_other_threads_too() -> None:
    def work() -> None:
        with at_most(0.1):
            for _ in itertools.count():
                pass

    with pytest.raises(TooSlow):
        in_a_thread(work)


def test_what_is_done_in_time_is_left_alone_in_other_threads() -> None:
    def work() -> int:
        for _ in range(100):
            with at_most(0.5):
                pass
        return sum(range(10**6))

    assert in_a_thread(work) == 499999500000


def test_a_pattern_that_takes_for_ever_is_refused_in_other_threads(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "PATIENCE", 0.2)
    (problem,) = in_a_thread(lambda: pattern_problems({"target_modules": "(.+)+(.+)+(.+)+z"}))
    assert "takes for ever" in problem.what


def test_a_usual_pattern_is_fine_in_other_threads() -> None:
    assert not in_a_thread(lambda: pattern_problems({"target_modules": r".*\.(q|v)_proj"}))


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"(.+)+(.+)+(.+)+(.+)+z": 2}},
        pytest.param({"target_modules": "(.+)+(.+)+(.+)+(.+)+z"}, marks=pytest.mark.slow),
        pytest.param({"exclude_modules": r"(.*a?)*(.*b?)*(.*c?)*y"}, marks=pytest.mark.slow),
    ],
)
def test_a_pattern_that_takes_for_ever_is_refused(options: dict[str, Any]) -> None:
    (problem,) = pattern_problems(options)
    assert "takes for ever" in problem.what


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(q|v)_proj", r"model\.layers\.\d+\.(self_attn|mlp)\.(up|down|q|k)_proj", "all-linear"],
)
def test_usual_patterns_are_fine(pattern: str) -> None:
    assert not pattern_problems({"target_modules": pattern, "rank_pattern": {pattern: 4}})


ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
ANSWERS = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"


def chats_with(template: str, tokenizer: Any, folder: Path, rows: int = 4) -> Any:
    from quantadapt.data import load_data
    from quantadapt.spec import DataSpec

    templated = copy.deepcopy(tokenizer)
    templated.chat_template = template
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * rows)
    return load_data(DataSpec(path=str(folder / "chats.jsonl")), templated, seed=0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "takes more than"),
        ("{{ 10 ** (10 ** 10) }}", "raises to a power"),
        ("{% set n = messages | length %}{{ n** 10000000000 }}", "raises to a power"),
        ("{{ (9)\n**\n9999999999 }}", "raises to a power"),
        ("{{ 'a' * 10000000000 }}", "multiplies"),
        ("{{ 10000000000 * 'a' }}", "multiplies"),
        ("{% set n = messages | length %}{{ n * n }}", "multiplies"),
        ("{{ '%10000000000d' % 1 }}", "GiB of memory"),
        ("{{ 'a' | center(10000000000) }}", "GiB of memory"),
        ("{{ 'a'.ljust(10000000000) }}", "GiB of memory"),
    ],
)
def test_an_endless_chat_template_is_refused(
    template: str, said: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=said):
        chats_with(template, tokenizer, tmp_path)


def test_a_chat_template_that_is_slow_for_each_chat_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "IN_ALL", 0.1)
    monkeypatch.setattr(templates, "EACH", 0)
    slow = f"{{% for i in range(60000) %}}{{% set x = i %}}{{% endfor %}}{ANSWERS}"
    with pytest.raises(DataError, match="for each chat"):
        chats_with(slow, tokenizer, tmp_path, rows=100)


def test_a_template_is_limited_in_other_threads(
    tmp_path: Path, tokenizer: Any, monkeypatch
) -> None:
    monkeypatch.setattr(templates, "ONCE", 0.2)
    with pytest.raises(DataError, match="takes too long"):
        in_a_thread(lambda: chats_with(ENDLESS + ANSWERS, tokenizer, tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_the_limit_of_memory_is_taken_back(tmp_path: Path, tokenizer: Any) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    chats_with(ANSWERS, tokenizer, tmp_path)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "more", ["{{ '=' * 20 }}", "**{{ '**' }}**", "{{ dict(**{'a': 1}).a }}", "{# a ** b #}"]
)
def test_stars_that_are_no_power_are_fine(more: str, tmp_path: Path, tokenizer: Any) -> None:
    assert len(chats_with(more + ANSWERS, tokenizer, tmp_path).train) > 0


# Documents and paths -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"null", b"3", b'"a"', b"{", b"\xff\xfe", b"\0" * 9, b"[" * 10**5,
     b'{"a": ' + b"9" * 6000 + b"}"],
)  # fmt: skip
def test_what_is_no_object_is_refused_in_a_sentence(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"x\.json: (it is|it holds|not valid JSON)"):
        read_object(tmp_path / "x.json")


def test_a_run_whose_spec_is_a_broken_link_is_not_measured_on_other_data(tmp_path: Path) -> None:
    from quantadapt.cli.models import calibration_of, held_out_of

    (tmp_path / "spec.yaml").symlink_to("spec.yaml")
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        held_out_of(str(tmp_path), None, None)
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        calibration_of(str(tmp_path), None, None)


@pytest.mark.parametrize(
    ("path", "said"),
    [("a" * 256, "longer"), ("a\nb", "sign"), ("loop/x", "symbolic"), ("~nobody-there/x", "home")],
)
def test_paths_that_cannot_be_are_refused_together(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert said in path_problem(path)
    spec = qa.Spec(model=path, data={"path": path, "calibration_path": path}, output=path)
    with pytest.raises(PlanRefused) as error:
        qa.plan(spec)
    places = {problem.where for problem in error.value.problems}
    assert places >= {"model", "data.path", "data.calibration_path", "output"}
