"""GGUF files, read by stock transformers and the `gguf` package and compared with what PEFT makes.

They were compared with those of llama.cpp's converter as well: byte for byte the same tensors.
"""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import quantadapt as qa
from quantadapt import cli
from quantadapt.demo import MODEL_DIR
from quantadapt.errors import ModelError, NumbersError, PlanRefused
from quantadapt.exporting.gguf.families import (
    FAMILIES,
    context_length,
    gguf_name,
    rope_factors,
    unknown_in,
)
from quantadapt.exporting.gguf.files import GGUFFile, keys_of, tensors_of
from quantadapt.exporting.gguf.model import rotated, write_model
from quantadapt.exporting.gguf.vocabulary import kind_of, vocabulary
from quantadapt.exporting.tuned import Tuned
from quantadapt.planning.exports import export_of
from quantadapt.testing.small_demo import small_model

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {
    **{"vocab_size": 2050, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
LLAMA31 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
WINDOWS: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
MODELS = {
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=32),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA31),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=32),
    "gemma2": Gemma2Config(**SIZES, **WINDOWS),
    "gemma3": Gemma3TextConfig(**SIZES | {"num_hidden_layers": 7}, **WINDOWS),
}


def made(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def read(path: Path, config: Any = None) -> Any:
    if config is not None and config.model_type == "mistral":  # llama.cpp's name of it is llama
        config = None
    options = {"gguf_file": path.name, "config": config, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_model_that_was_written(name, tokenizer, tmp_path) -> None:
    model, path = made(MODELS[name]), tmp_path / "model.gguf"
    write_model(model, tokenizer, path, "f32", "it")
    ids = torch.randint(0, 2048, (2, 40))
    with torch.no_grad():
        expected, found = model(ids).logits, read(path, MODELS[name])(ids).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.std()))
    keys = keys_of(path)
    kind = keys["general.architecture"]
    assert (keys[f"{kind}.context_length"], keys[f"{kind}.attention.head_count_kv"]) == (256, 2)
    base = {"llama 3.1": 5e5, "gemma3": 1e6}.get(name, 1e4)
    assert keys[f"{kind}.rope.freq_base"] == base
    tied = not MODELS[name].tie_word_embeddings
    assert ("output.weight" in dict(tensors_of(path))) == tied


@pytest.mark.parametrize(
    ("numbers", "error"), [("f16", 2**-10), ("bf16", 2**-7), ("q8_0", 1 / 254)]
)
def test_numbers_are_rounded_as_their_format_says(numbers, error, tokenizer, tmp_path) -> None:
    model, path = made(MODELS["qwen3"]), tmp_path / "model.gguf"
    write_model(model, tokenizer, path, numbers, "it")
    read_back = dict(tensors_of(path))
    meant = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    found = read_back["blk.1.ffn_down.weight"]
    largest = np.abs(meant.reshape(-1, 32)).max(axis=1) if numbers == "q8_0" else np.abs(meant)
    apart = np.abs(found - meant).reshape(-1, 32) if numbers == "q8_0" else np.abs(found - meant)
    limit = largest[:, None] if numbers == "q8_0" else largest
    assert apart.max() > 0
    assert (apart <= limit * error * 1.1 + 1e-7).all()
    assert np.array_equal(read_back["output_norm.weight"], model.model.norm.weight.detach().numpy())


def test_what_does_not_fit_or_was_not_written_is_told(tokenizer, tmp_path) -> None:
    model = made(MODELS["qwen2"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(
        NumbersError, match=r"blk.0.ffn_up.weight holds numbers .* too large for f16"
    ):
        write_model(model, tokenizer, tmp_path / "a.gguf", "f16", "it")
    file = GGUFFile(tmp_path / "b.gguf", "llama", "f32")
    file.add("x", (2, 2), lambda: torch.ones(2, 2))
    file.write()
    file.meant["x"] = lambda: torch.full((2, 2), 1.001)
    with pytest.raises(ModelError, match="not what was meant: x"):
        file.refuse_other()


def test_rows_are_turned_as_llama_cpp_turns_them() -> None:
    """By the rotary embedding itself: halves of a head here, neighbours there."""
    heads, size = 2, 8
    weight = torch.randn(heads * size, 4)
    x, angle = torch.randn(4), torch.arange(size // 2) * 0.3 + 0.1
    half = (weight @ x).view(heads, size)
    first, second = half[:, : size // 2], half[:, size // 2 :]
    turned = torch.cat(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], 1
    )
    pairs = (rotated(weight, heads) @ x).view(heads, size // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    by_pairs = torch.stack(
        [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1
    )
    expected = turned.view(heads, 2, size // 2).transpose(1, 2)
    assert torch.allclose(by_pairs, expected, atol=1e-6)


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = MODELS["llama 3.1"]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    found = torch.tensor(rope_factors(config.to_dict()))
    assert torch.allclose(plain / found, expected, rtol=1e-5)


def test_names_and_windows() -> None:
    llama, gemma = FAMILIES["llama"], FAMILIES["gemma3_text"]
    assert gguf_name(llama, "model.layers.11.self_attn.k_proj.bias") == "blk.11.attn_k.bias"
    assert gguf_name(llama, "model.layers.1.mlp.experts.gate_up_proj") is None
    assert gguf_name(llama, "model.layers.x.mlp.up_proj.weight") is None
    assert gguf_name(llama, "lm_head.weight") == "output.weight"
    assert gguf_name(gemma, "lm_head.weight") is None
    window = {**MODELS["mistral"].to_dict(), "sliding_window": 64}
    assert (context_length(window), context_length(MODELS["mistral"].to_dict())) == (64, 256)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_is_written_as_the_gguf_package_names_it(name, tokenizer, tmp_path) -> None:
    """Its norms as llama.cpp multiplies by them, and what it knows only from a file."""
    model, path = made(MODELS[name]), tmp_path / "model.gguf"
    write_model(model, tokenizer, path, "f32", "it")
    found, state = dict(tensors_of(path)), model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 7)
    state.pop("lm_head.weight")
    for key, value in state.items():
        own = names.get_name(key, try_suffixes=(".weight",))
        meant = value + 1 if key.endswith("norm.weight") else value
        assert np.array_equal(found.pop(own), meant.numpy())
    assert not found
    keys = keys_of(path)
    assert keys[f"{name}.attention.sliding_window"] == 8
    caps = [keys.get(f"{name}.{part}_logit_softcapping") for part in ("attn", "final")]
    assert caps == ([50.0, 30.0] if name == "gemma2" else [None, None])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"tie_word_embeddings": False}, "head is another tensor"),
        ({"query_pre_attn_scalar": 32}, "scaled by 32, not by 16"),
        ({"layer_types": ["full_attention"] * 7}, "every 6th layer"),
        ({"layer_types": None, "sliding_window_pattern": 3}, "every 6th layer"),
        ({"hidden_activation": "silu"}, "activation is 'silu'"),
        ({"attn_logit_softcapping": 50.0}, "capped otherwise"),
        ({"rope_parameters": None, "rope_local_base_freq": 1e5}, "rotary embedding of its layers"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
    ],
)
def test_a_gemma_that_llama_cpp_would_compute_otherwise_is_refused(changed, why) -> None:
    config = MODELS["gemma3"].to_dict()
    assert unknown_in(config) == []
    assert any(why in text for text in unknown_in(config | changed))
    older = {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert unknown_in(config | older | {"layer_types": None, "sliding_window_pattern": 6}) == []
    of_27b = {"num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32}
    of_27b |= {"layer_types": None, "head_dim": 128, "query_pre_attn_scalar": 168}
    assert unknown_in(config | of_27b) == []


# Tokenizers ---------------------------------------------------------------------------------------


def contents_of(folder: Path = MODEL_DIR) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer.json").read_text()))


def split_by(pattern: str, **more: Any) -> dict[str, Any]:
    values = contents_of()
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    values["model"] |= more
    return values


def test_tokenizers_are_known_by_how_they_split() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert kind_of(contents_of()).pre == "gpt-2"
    assert kind_of(split_by(PRETOKENIZE_REGEX)).pre == "qwen2"
    llama3 = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert kind_of(split_by(llama3, ignore_merges=True)).pre == "llama-bpe"
    assert kind_of(split_by(llama3)) is None  # llama.cpp would keep whole words
    assert kind_of(split_by(r"\w+")) is None
    assert kind_of({**contents_of(), "model": {"type": "Unigram", "vocab": []}}) is None
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    model = {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": [], "unk_token": "<unk>"}
    both = {"type": "Sequence", "normalizers": [prepend, spaces]}
    assert kind_of({"model": model, "normalizer": both}).space_prefix
    assert not kind_of({"model": model, "normalizer": spaces}).space_prefix
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    gemma = {"model": model, "normalizer": spaces, "pre_tokenizer": split}
    assert kind_of(gemma) == kind_of({"model": model, "normalizer": spaces})
    assert kind_of({"model": model, "pre_tokenizer": split}) is None
    meta = {"type": "Metaspace", "prepend_scheme": "first", "split": False}
    first = kind_of({"model": model, "pre_tokenizer": meta})
    assert (first.model, first.space_prefix, first.at_start) == ("llama", True, True)
    always = kind_of({"model": model, "pre_tokenizer": {**meta, "prepend_scheme": "always"}})
    assert (always.space_prefix, always.at_start) == (True, False)
    lower = {"normalizer": {"type": "Lowercase"}}
    assert kind_of({**contents_of(), "normalizer": {"type": "NFC"}}).pre == "gpt-2"
    assert kind_of(contents_of() | lower) is None  # llama.cpp would keep capitals
    nested = {"type": "Sequence", "normalizers": [{"type": "NFC"}, lower["normalizer"]]}
    assert kind_of(contents_of() | {"normalizer": nested}) is None
    assert kind_of({"model": model, "normalizer": {"type": "NFKC"}}) is None


def test_a_vocabulary_has_a_row_for_each_of_the_embedding() -> None:
    values = contents_of()
    found = vocabulary(values, kind_of(values), 2050)
    assert (found.tokens[:3], found.types[:4]) == (["<s>", "</s>", "<pad>"], [3, 3, 3, 1])
    assert (found.tokens[-1], found.types[-1]) == ("[PAD2049]", 5)
    assert found.merges[0] == "\u0120 \u0120"
    with pytest.raises(ModelError, match="has a token 2047, and the embedding has 2000 rows"):
        vocabulary(values, kind_of(values), 2000)
    pieces = ["<unk>", "<0x0A>", "a", "b", "ab"]
    model = {
        **{"type": "BPE", "byte_fallback": True, "unk_token": "<unk>"},
        **{"vocab": {t: i for i, t in enumerate(pieces)}, "merges": [["a", "b"]]},
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    values = {"model": model, "normalizer": spaces, "added_tokens": []}
    assert vocabulary(values, kind_of(values), 5).types == [2, 6, 1, 1, 1]
    values["added_tokens"] = [{"id": 5, "content": "\u2581\u2581", "special": False}]
    found = vocabulary(values, kind_of(values), 6)
    assert (found.tokens[5], found.types[5]) == ("  ", 4)  # two spaces, as text has them


TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("scheme", "template", "prefix"),
    [
        ("first", TURNS, False),
        ("first", None, True),
        ("first", TURNS.replace("{{ bos_token }}{%", "Hello, {%", 1), True),
        ("first", "{{ raise_exception('no') }}", True),
        ("always", TURNS, True),
        ("never", None, False),
    ],
)
def test_a_space_is_put_where_the_tokenizer_puts_one(scheme, template, prefix, tmp_path) -> None:
    """llama.cpp puts one in front of each text after a special token, or of none; with "first" the
    texts of a chat that begins with one have none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"])}
    merges = [("\u2581", "a")]
    made_of = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(made_of)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, extra_special_tokens=["[INST]"], **names
    )
    path = tmp_path / "model.gguf"
    write_model(made(MODELS["llama, tied"]), tokenizer, path, "f16", "it")
    assert keys_of(path)["tokenizer.ggml.add_space_prefix"] == prefix
    if template == TURNS:  # one space, which is that of the template
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=True)
        tokens = tokenizer.convert_ids_to_tokens(chat["input_ids"])
        assert tokens[:3] == ["<s>", "[INST]", "\u2581a"]


@pytest.mark.parametrize("form", ["alpaca", "messages"])
def test_a_chat_begins_as_it_was_learnt(form, tokenizer, tmp_path) -> None:
    """The demo's template writes no beginning of text, which its tokenizer puts before others."""
    run = tuned(tmp_path / "run", base=MODEL_DIR)
    metrics = {"data": {"files": [{"format": form}]}}
    (run.parent / "metrics.json").write_text(json.dumps(metrics))
    assert command("export", run, "gguf", "--set", "check=false", "-o", tmp_path) == 0
    adds = keys_of(tmp_path / "gguf" / "model.gguf")["tokenizer.ggml.add_bos_token"]
    chat = [{"role": "user", "content": "Hi"}]
    learnt = {"messages": tokenizer.apply_chat_template(chat, return_dict=True).input_ids}
    learnt["alpaca"] = tokenizer("### Instruction:\nHi").input_ids
    assert adds == (learnt[form][0] == tokenizer.bos_token_id) == (form == "alpaca")


def test_transformers_reads_the_tokenizer(tokenizer, tmp_path) -> None:
    write_model(made(MODELS["llama, tied"]), tokenizer, tmp_path / "model.gguf", "f16", "it")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.get_vocab().items() <= again.get_vocab().items()
    text = "def f(x):\n    return x + 1  # \u00e9\u4e2d</s>"
    if Version(version("transformers")) >= Version("5.20"):  # before, it read no add_bos
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template


# Exports ------------------------------------------------------------------------------------------


def tuned(
    folder: Path,
    adapter: str = "lora",
    base: Path | None = None,
    backend: str = "hqq",
    **options: Any,
) -> Path:
    """Save an adapter with random weights."""
    model = qa.quantize(str(base or small_model()), backend, device="cpu")
    layers = ["q_proj", "k_proj", "down_proj"]
    model = qa.attach(model, adapter, **{"r": 4, "target_modules": layers, **options})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.02)
    return qa.save(model, folder)


def command(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_merged_model_in_one_file(tmp_path, capsys) -> None:
    run = tuned(tmp_path / "run")
    assert command("export", run, "gguf", "--set", "dtype=f32", "-o", tmp_path) == 0
    assert "KL to the adapter" in capsys.readouterr().out
    folder = tmp_path / "gguf"
    assert {"model.gguf", "quantadapt.json"} < {file.name for file in folder.iterdir()}
    loaded = qa.load(run, device="cpu").eval()
    ids = torch.randint(0, 2048, (2, 24))
    with torch.no_grad():
        expected, found = loaded(ids).logits, read(folder / "model.gguf")(ids).logits
    assert torch.allclose(found, expected, atol=2e-3)
    said = keys_of(folder / "model.gguf")["general.name"]
    assert "/" not in said


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_a_disk_without_room_is_told_before_the_merge(dtype, tmp_path, monkeypatch, capsys) -> None:
    """What is needed is what is written, but for the tokenizer."""
    run = tuned(tmp_path / "run")
    how = ("--set", f"dtype={dtype}", "--set", "check=false", "-o", tmp_path)
    assert command("export", run, "gguf", *how) == 0
    written = (tmp_path / "gguf" / "model.gguf").stat().st_size
    needed = export_of("gguf", {"dtype": dtype}).exporter.needed(Tuned(saved=run))
    assert needed == pytest.approx(written - 65_000, rel=0.05)
    nearly_full = namedtuple("usage", "free")(needed - 1)
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    monkeypatch.setattr(Tuned, "merged", None)  # it is not asked for
    assert command("export", run, "gguf", *how, "--overwrite") == 1
    assert "are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    ],
)
def test_the_adapter_in_one_file_adds_what_pefts_does(options, tmp_path) -> None:
    from peft import PeftModel

    run = tuned(tmp_path / "run", **options)
    assert command("export", run, "gguf-adapter", "-o", tmp_path) == 0
    path = tmp_path / "gguf-adapter" / "adapter.gguf"
    keys, factors = keys_of(path), dict(tensors_of(path))
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, str(run)).merge_and_unload().state_dict()
    for name, value in after.items():
        key = gguf_name(FAMILIES["llama"], name)
        if torch.equal(value, before[name]):
            assert f"{key}.lora_a" not in factors
            continue
        first, second = factors.pop(f"{key}.lora_a"), factors.pop(f"{key}.lora_b")
        # llama.cpp's: alpha / rank, the rank by the shape
        added = torch.from_numpy(second @ first * keys["adapter.lora.alpha"] / first.shape[0])
        meant = value - before[name]
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        meant = meant if heads is None else rotated(meant, heads)
        assert torch.allclose(added, meant, atol=1e-6)
    assert not factors


@pytest.mark.parametrize(
    ("adapter", "options", "why"),
    [
        ("ia3", {"r": None}, "llama.cpp knows LoRA alone"),
        ("dora", {}, "llama.cpp has no use_dora"),
        ("lora", {"modules_to_save": ["lm_head"]}, "llama.cpp has no modules_to_save"),
        ("pissa", {}, "has changed the base"),
    ],
)
def test_an_adapter_that_llama_cpp_does_not_know_is_refused(adapter, options, why) -> None:
    named = {"name": adapter, **{"r": 4, **options}}
    named = {key: value for key, value in named.items() if value is not None}
    export = {"formats": ["gguf-adapter"], "merge": "never"}
    spec = qa.Spec(model=str(small_model()), adapter=named, export=export)
    with pytest.raises(PlanRefused, match=why):
        qa.plan(spec, check_output=False)


def test_a_model_that_is_not_known_takes_the_converter(tmp_path, monkeypatch, capsys) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    monkeypatch.setenv("PATH", str(tmp_path))
    base = tmp_path / "phi"
    Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=2)).save_pretrained(base)
    for file in MODEL_DIR.glob("*token*"):
        shutil.copy(file, base)
    run = tuned(tmp_path / "run", base=base, target_modules=["down_proj"])
    formats = {"formats": ["gguf"], "merge": "never"}
    with pytest.raises(PlanRefused, match=r"models of type 'phi3' .*\n.*llama.cpp's converter"):
        qa.plan(qa.Spec(model=str(base), export=formats), check_output=False)
    sources = tmp_path / "llama.cpp"
    sources.mkdir()
    script = sources / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys, json, pathlib, gguf\n"
        "source, _, out, _, kind = sys.argv[1:]\n"
        "config = json.loads(pathlib.Path(source, 'config.json').read_text())\n"
        "assert pathlib.Path(source, 'tokenizer.json').exists()\n"
        "w = gguf.GGUFWriter(out, config['model_type']); w.add_string('made.as', kind)\n"
        "w.write_header_to_file(); w.write_kv_data_to_file(); w.close()\n"
    )
    wanted = ["--set", f"converter={sources}", "--set", "check=false", "-o", tmp_path]
    assert command("export", run, "gguf", *wanted) == 0
    assert keys_of(tmp_path / "gguf" / "model.gguf")["made.as"] == "f16"
    monkeypatch.setenv("LLAMA_CPP", str(sources))
    assert qa.plan(qa.Spec(model=str(base), export=formats), check_output=False)
    script.write_text("raise ValueError('cannot do phi')")
    assert command("export", run, "gguf", *wanted, "--overwrite") == 1
    assert "convert_hf_to_gguf.py failed: ValueError: cannot do phi" in capsys.readouterr().err
    assert keys_of(tmp_path / "gguf" / "model.gguf")["made.as"] == "f16"  # as it was
    script.write_text("import a_module_of_its_own.part")
    assert command("export", run, "gguf", *wanted, "--overwrite") == 1
    assert "pip install a_module_of_its_own" in capsys.readouterr().err
    wanted[1] = f"converter={tmp_path}"
    assert command("export", run, "gguf", *wanted, "--overwrite") == 2
    assert "holds no convert_hf_to_gguf.py" in capsys.readouterr().err
