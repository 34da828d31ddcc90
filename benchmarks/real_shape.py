"""A model of real size on every backend: time to quantize, size, and perplexity.

    python benchmarks/real_shape.py --model DIR [--make 300] [--backend NAME ...]

`--make STEPS` first trains a model with the shape of Llama 3.2 1B (with the demo's vocabulary) for
so many steps on the Python standard library and writes it to DIR, so that perplexities mean
something. Needs a CUDA device. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from versions import versions

import quantadapt as qa
from quantadapt import demo
from quantadapt.facade import facades

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("hqq", {"bits": 8}),
    ("hqq", {"bits": 4}),
    ("hqq", {"bits": 3}),
    ("hqq", {"bits": 2}),
    ("hqq", {"bits": 2, "group_size": 16}),
    ("bnb-nf4", {}),
    ("bnb-fp4", {}),
    ("bnb-int8", {}),
    ("torchao-int8", {}),
    ("torchao-int4", {}),
    ("torchao-fp8", {}),
    ("eetq", {}),
    ("quanto", {"weights": "int4"}),
    ("gptq", {"bits": 4}),
    ("gptq", {"bits": 3}),
    ("gptq", {"bits": 2}),
    ("awq", {}),
    ("aqlm", {"beam_size": 1, "max_epochs": 2}),
)
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LENGTH, BATCH = 512, 32
PACKAGES = ("torch", "transformers", "bitsandbytes", "hqq", "torchao", "gptqmodel", "aqlm")


def make(folder: Path, steps: int) -> None:
    """Train the model for `steps` steps of 16,384 tokens and save it in bfloat16."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from quantadapt.demo.pretrain import build_corpus

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    texts = build_corpus(Path(sysconfig.get_paths()["stdlib"])).train
    ids = torch.tensor([i for text in tokenizer(texts)["input_ids"] for i in (*text, 1)])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps, last loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "calibration.txt").write_text("\n".join(texts[:2000]), encoding="utf-8")


def row(folder: str, backend: str, options: dict[str, Any]) -> str:
    """Quantize, measure, and return a row of the table."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    calibration = None
    if qa_backend(backend).calibration:
        calibration = str(Path(folder) / "calibration.txt")
    started = time.perf_counter()
    model = qa.quantize(folder, backend, device="cuda", calibration=calibration, **options)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30
    weights = sum(f.in_features * f.out_features for _, f in facades(model))
    with tempfile.TemporaryDirectory() as saved:
        path = qa.save(model, saved)
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    dense = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n)
    bits = 8 * (stored - 2 * dense) / weights
    perplexity = qa.evaluate(model, str(demo.TEXT_FILE), max_examples=64)["perplexity"]
    name = " ".join([backend, *(f"{key}={value}" for key, value in options.items())])
    return f"| {name} | {perplexity:.3f} | {bits:.2f} | {seconds:.1f} | {peak:.2f} |"


def qa_backend(name: str) -> qa.Backend:
    """Return the record of a backend."""
    from quantadapt.registry import registry

    return registry().backend(name)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--make", type=int, metavar="STEPS")
    parser.add_argument("--backend", action="append")
    given = parser.parse_args()
    if given.make:
        make(given.model, given.make)
    print("| backend | perplexity | bits per weight on disk | quantize s | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for backend, options in ROWS:
        if given.backend and backend not in given.backend:
            continue
        try:
            print(row(str(given.model), backend, options), flush=True)
        except qa.QuantadaptError as error:
            print(f"| {backend} | {str(error).splitlines()[0]} | | | |", flush=True)
    print(f"\n{torch.cuda.get_device_name()}, {platform.machine()}; {versions(*PACKAGES)}")


if __name__ == "__main__":
    main()
