"""Speed of GRPO with LoRA on a quantized Llama, against what a user would run instead.

    python benchmarks/rewards.py --shape 8b --steps 3

`ours-nf4` and `ours-hqq` train by `objective: grpo`; `trl` is TRL's GRPOTrainer with transformers'
`generate`, PEFT, and bitsandbytes' nf4; `trl-continuous` lets transformers' continuous batching
make its answers. Each is a process of its own on the same random weights, made on the spot, with
the same prompts of 128 tokens, answers of `--length` tokens (random weights end none), as many to
a step, and the defaults of its library where nothing is said here. The first step does not count,
the median of the others does. A sample is an answer: drawn, scored and learnt from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from shapes import SHAPES
from versions import versions

PROMPT = 128
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
RESULT = "RESULT "
TIMEOUT = 240
CASES = ("trl", "trl-continuous", "ours-nf4", "ours-hqq")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "hqq")


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given.one, given)))
        return
    print("| case | samples/s | ratio | s/step | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    first: float | None = None
    for case in given.case:
        found = run_apart(case)
        if "failed" in found:
            print(f"| {case} | {found['failed']} |", flush=True)
            continue
        rate = given.batch / found["seconds"]
        first = first or rate
        cells = (f"{rate:.2f}", f"{rate / first:.2f}", f"{found['seconds']:.1f}")
        print(f"| {case} | {' | '.join(cells)} | {found['peak']:.1f} |", flush=True)
    words = f"{given.batch} answers of {given.length} tokens a step, {given.group} to a prompt"
    print(f"\n{given.shape}, {words}; {versions(*PACKAGES)}")


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="8b")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["trl", "ours-nf4", "ours-hqq"])
    parser.add_argument("--batch", type=int, default=64, help="answers a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.length = min(given.length, SHAPES[given.shape].length // 2)
    return given


def run_apart(case: str) -> dict[str, Any]:
    """Return what a case found, in a process of its own."""
    command = [sys.executable, *sys.argv, "--one", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
        return found
    print(done.stderr[-4000:], file=sys.stderr)
    return {"failed": (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]}


def run_here(case: str, given: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a step and the peak of memory."""
    import torch

    seconds = (of_trl if case.startswith("trl") else of_ours)(case, given)
    on_gpu = given.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"seconds": statistics.median(seconds[1:] or seconds), "peak": peak}


def prompts(given: argparse.Namespace) -> list[str]:
    """Return as many texts of about `PROMPT` tokens as a few steps take."""
    from quantadapt import demo

    tokenizer, most = tokenizer_of(), SHAPES[given.shape].length
    length = min(PROMPT, most // 2)
    ids = tokenizer(demo.TEXT_FILE.read_text(encoding="utf-8"))["input_ids"]
    count = given.steps * given.batch // given.group
    starts = range(1, 1 + count * 37, 37)
    return [tokenizer.decode(ids[start : start + length - 1]) for start in starts]


def tokenizer_of() -> Any:
    """Return the demo's tokenizer, whose tokens every shape has."""
    from transformers import AutoTokenizer

    from quantadapt import demo

    return AutoTokenizer.from_pretrained(demo.MODEL_DIR, padding_side="left")


def dense(given: argparse.Namespace) -> Any:
    """Return a model of the shape, the same random weights in each case, where it trains."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    with torch.device(given.device):
        return AutoModelForCausalLM.from_config(SHAPES[given.shape].config(), dtype=dtype)


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Return a reward that costs nothing."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def of_ours(case: str, given: argparse.Namespace) -> list[float]:
    """Return the seconds of each step."""
    import quantadapt as qa

    backend = {"ours-nf4": "bnb-nf4", "ours-hqq": "hqq"}[case]
    options = {"double_quant": True} if backend == "bnb-nf4" else {}
    model = qa.quantize(dense(given), backend, device=given.device, **options)
    tuned = qa.attach(model, "lora", **LORA)
    ends = [0.0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts(given)))
        objective = {
            "name": "grpo",
            "rewards": [f"{Path(__file__).resolve()}:vowels"],
            "num_generations": given.group,
            "max_completion_length": given.length,
        }
        qa.train(
            tuned,
            file,
            objective=objective,
            per_device_train_batch_size=given.batch,
            max_steps=given.steps,
            tokenizer=tokenizer_of(),
            logging_steps=1,
            learning_rate=1e-5,
            on_log=lambda log: ends.append(log["seconds"]),
            verbose=False,
        )
    return [after - before for before, after in pairwise(ends)]


def of_trl(case: str, given: argparse.Namespace) -> list[float]:
    """Return the seconds of each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers_nf4 import quantized_here
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    on_gpu, model = given.device.startswith("cuda"), dense(given)
    model = quantized_here(model, model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=given.batch,
            num_generations=given.group,
            max_completion_length=given.length,
            max_steps=given.steps,
            learning_rate=1e-5,
            use_transformers_continuous_batching=case == "trl-continuous",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=vowels,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts(given)]),
            processing_class=tokenizer_of(),
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    return [after - before for before, after in pairwise(ends)]


if __name__ == "__main__":
    main()
