"""The bundled demo: small, whole, reproducible where it can be, and really pretrained."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

from quantadapt import demo


def test_the_folder_is_under_8_mb() -> None:
    files = [f for f in demo.DEMO_DIR.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 8_000_000


def test_the_instructions_are_made_by_the_script_byte_for_byte(tmp_path) -> None:
    command = [sys.executable, "-m", "quantadapt.demo.make_instructions", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    for file in (demo.TRAIN_FILE, demo.EVAL_FILE):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_pairs_are_made_by_the_script_byte_for_byte(tmp_path) -> None:
    command = [sys.executable, "-m", "quantadapt.demo.make_preferences", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (demo.PREFERENCES / name).read_bytes()


def test_the_labelled_examples_are_made_by_the_script_byte_for_byte(tmp_path) -> None:
    command = [sys.executable, "-m", "quantadapt.demo.make_labelled", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    files = [file.relative_to(demo.LABELLED) for file in demo.LABELLED.rglob("*.jsonl")]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / file).read_bytes() == (demo.LABELLED / file).read_bytes()


def test_train_and_eval_have_no_function_in_common() -> None:
    def names(file) -> set[str]:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["output"].split("(")[0] for line in lines}

    train, held_out = names(demo.TRAIN_FILE), names(demo.EVAL_FILE)
    assert len(held_out) > 30
    assert not train & held_out


def test_the_readme_names_these_weights() -> None:
    weights = (demo.MODEL_DIR / "model.safetensors").read_bytes()
    readme = (demo.DEMO_DIR / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(weights).hexdigest() in readme


def test_the_model_is_pretrained() -> None:
    """Perplexity on source files that it has never seen; an untrained model is above 2000."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    text = demo.TEXT_FILE.read_text(encoding="utf-8")[:12_000]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 6 * 512]).view(6, 512)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.exp() < 13
