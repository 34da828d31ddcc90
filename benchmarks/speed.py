"""Training speed and memory of LoRA on a quantized Llama, against what a user would run instead.

    python benchmarks/speed.py --shape 8b --case ours-nf4 peft-nf4 [--steps 10]

Cases are run one after the other in processes of their own, on random weights of the given shape,
batch 4 x 2048, LoRA r=16 on all seven projections, AdamW, checkpointing on unless said. Prints a
Markdown table: tokens per second (median step), peak GiB, and the losses, which have to agree.
Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from versions import versions

SHAPES: dict[str, dict[str, int]] = {
    "demo": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
BATCH, LENGTH, RANK = 4, 2048, 16
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "hqq", "torchao")


def checkpoint(shape: str, folder: Path) -> Path:
    """Write random bfloat16 weights of `shape`, once, and return their folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = folder / f"llama-{shape}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=LENGTH, rope_theta=500000.0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    return path


def ours(path: Path, options: dict[str, Any]) -> Any:
    """Return the model as quantadapt makes it, and its quantizing time."""
    import quantadapt as qa
    from quantadapt.state import state_of

    state_options = {k: v for k, v in options.items() if k not in ("backend", "memory")}
    made = _without_tokenizer(qa.quantize, str(path), options["backend"], **state_options)
    tuned = qa.attach(made, "lora", r=RANK, lora_alpha=RANK)
    assert state_of(tuned)
    return tuned


def _without_tokenizer(quantize: Any, *args: Any, **kwargs: Any) -> Any:
    """Random weights come without a tokenizer."""
    from unittest.mock import patch

    with patch("quantadapt.quantizing.load_tokenizer", return_value=None):
        return quantize(*args, device="cuda", dtype="bfloat16", **kwargs)


def peft_nf4(path: Path) -> Any:
    """Return what the PEFT documentation tells to write."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


OURS = {
    "ours-none": {"backend": "none"},
    "ours-nf4": {"backend": "bnb-nf4"},
    "ours-hqq": {"backend": "hqq"},
    "ours-int8": {"backend": "torchao-int8"},
    "ours-int4": {"backend": "torchao-int4"},
    "ours-fp8": {"backend": "torchao-fp8"},
    "ours-eetq": {"backend": "eetq"},
    "ours-quanto4": {"backend": "quanto", "weights": "int4"},
}


def run_case(case: str, path: Path, steps: int) -> dict[str, Any]:
    """Train a few steps through the trainer that the case's user would have."""
    import torch

    started = time.perf_counter()
    model = peft_nf4(path) if case == "peft-nf4" else ours(path, OURS[case])
    torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    load_peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    batches = torch.randint(vocabulary, (steps, BATCH, LENGTH), generator=generator)
    train = plain_loop if case == "peft-nf4" else our_loop
    times, losses = train(model, batches)
    times = sorted(times[2:])
    return {
        "case": case,
        "tokens_per_second": BATCH * LENGTH / times[len(times) // 2],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "load_seconds": loaded,
        "load_peak_gib": load_peak,
        "losses": [losses[0], losses[-1]],
    }


def plain_loop(model: Any, batches: Any) -> tuple[list[float], list[float]]:
    """The steps of Trainer with bf16 autocast, by hand."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()
    times, losses = [], []
    for batch in batches:
        ids = batch.cuda()
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    return times, losses


def our_loop(model: Any, batches: Any) -> tuple[list[float], list[float]]:
    """`quantadapt.train` on the same batches, as a user calls it."""
    import tempfile

    from datasets import Dataset

    from quantadapt.spec import TrainSpec
    from quantadapt.training import train

    rows = batches.flatten(0, 1).tolist()
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * LENGTH] * len(rows)})
    spec = TrainSpec(
        max_steps=len(batches),
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        gradient_checkpointing=True,
        logging_steps=1,
    )
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(model, _NoTokenizer(), data, spec, output=Path(folder), seed=0, on_log=entries.append)
    seconds = [entry["seconds"] for entry in entries]
    steps = [b - a for a, b in zip([0.0, *seconds], seconds, strict=False)]
    return steps, [entry["loss"] for entry in entries]


def _NoTokenizer() -> Any:  # noqa: N802 (stands for a class)
    from transformers import AutoTokenizer

    from quantadapt import demo

    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--case", nargs="+", default=["ours-nf4", "peft-nf4"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    path = checkpoint(given.shape, given.folder)
    if given.one:
        print("RESULT " + json.dumps(run_case(given.one, path, given.steps)))
        return
    print("| case | tokens/s | peak GiB | load s | load peak GiB | first and last loss |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for case in given.case:
        print(_row(case, given), flush=True)
    print(f"\n{given.shape}; {platform.machine()}; {versions(*PACKAGES)}")


def _row(case: str, given: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--shape", given.shape, "--steps", str(given.steps)]
    command += ["--folder", str(given.folder), "--one", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        return f"| {case} | failed: {done.stderr.strip().splitlines()[-1:]} | | | | |"
    found = json.loads(line.removeprefix("RESULT "))
    cells = (
        f"{found['tokens_per_second']:,.0f}",
        f"{found['peak_gib']:.2f}",
        f"{found['load_seconds']:.1f}",
        f"{found['load_peak_gib']:.2f}",
        ", ".join(f"{loss:.3f}" for loss in found["losses"]),
    )
    return f"| {case} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
