"""The longest context that trains on a card, beside what `quantadapt plan --card` says.

    python benchmarks/long_context.py --shape 8b --cards 8 12 16 24

For each card it asks the plan for the longest example, holds PyTorch's allocator to what such a
card leaves of itself, and trains LoRA r=32 on all linear layers with `memory: min` on one row of
that length, and on rows that are longer by `--factors`; a short row is trained first, so that the
optimizer's states are there. Where the base is too large for the card beside a long row it is
streamed from CPU memory, as the plan says (`--stream`: in any case, or never). Weights are random,
made and quantized block by block.

Seconds of a long step on an H200 that does nothing else: 8b 621 for 384,000 tokens. By the
arithmetic alone (linear layers at 500, attention at 400 TFLOP/s), which is too little: 10 for
45,000, 32 for 86,000, 105 for 169,000; 70b 130 for 90,000. Inputs of layers take 0.25 MiB of CPU
memory for each token of 8b, 1.25 of 70b, or half of that where it has no room for more.

Prints a Markdown table: tokens of the plan and of the row; whether it trained; GiB that tensors
asked for at most, and that were in use (the allocator's blocks are larger than tensors), foreseen
for that length, and what PyTorch held, of so many that it may; tokens per second; and the
ratio of the row to what Unsloth publishes for the card (https://unsloth.ai/blog/llama3-3).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import SHAPES
from speed import RESULT, device_name, last_words
from speed_cases import LEARNING_RATE, OURS, _peak_gib, _reserved_gib
from streaming import Case, build
from versions import versions

RANK = 32
PUBLISHED = {
    "8b": {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 48: 191_728, 80: 342_733},
    "70b": {48: 12_106, 80: 89_389},
}
"""Unsloth's, tokens by GiB of the card."""
SHORT = 256
"""Tokens of the row that is trained first."""
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")
HEADER = (
    "| card GiB | base | plan: tokens | row: tokens | trains | asked for GiB | peak GiB "
    "| foreseen GiB | reserved GiB | may GiB | tokens/s | of Unsloth's |"
)


def main() -> None:
    """Run the cards and print the table."""
    given = arguments()
    if given.one:
        run_here(given)
        return
    print(f"{HEADER}\n| ---: | --- | {'---: | ' * 2}--- | {'---: | ' * 7}", flush=True)
    for card in given.cards:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", str(card), *sys.argv[1:]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(RESULT):  # a row is told as soon as it is done
                    print(row_of(json.loads(line.removeprefix(RESULT)), given.shape), flush=True)
        if process.returncode:
            print(f"\nthe process for {card:g} GiB ended with {process.returncode}\n", flush=True)
    print(f"\n{given.shape}, {given.backend}, {device_name(given.device)}; {versions(*PACKAGES)}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cards", type=float, nargs="+", default=[8, 12, 16, 24], metavar="GIB")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.05])
    parser.add_argument("--length", type=int, help="tokens of the row, instead of the plan's")
    parser.add_argument("--stream", choices=("auto", "none", "all"), default="auto")
    parser.add_argument("--backend", choices=OURS, default="ours-nf4")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_here(given: argparse.Namespace) -> None:
    """Train on one card, and print a result for each row."""
    import torch

    from quantadapt.memory.cards import CONTEXT, GIB

    shape = replace(SHAPES[given.shape], batch=1)
    if given.layers:
        shape = replace(shape, num_hidden_layers=given.layers)
    memory = planned(shape, given)
    (card,) = memory.cards
    way = chosen(given, card.longest)
    work = replace(memory.work, streamed=way, batch=1)
    if given.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((given.one * GIB - CONTEXT) / total)
    tokens = given.length or card.longest[way]
    if not tokens:
        print(RESULT + json.dumps({"card": given.one, "base": way, "plan": 0}), flush=True)
        return
    case = Case(replace(shape, length=int(tokens * max(given.factors))), given.one)
    model = build(case, given, way, RANK)
    for factor in given.factors:
        length = int(tokens * factor)
        found = {"card": given.one, "base": way, "plan": card.longest[way], "row": length}
        found |= train(model, shape.vocab_size, length, given)
        setting = replace(work, length=length).settings()[-1]
        found["foreseen"] = replace(work, length=length).peak(setting) / GIB
        found["may"] = given.one - CONTEXT / GIB
        print(RESULT + json.dumps(found), flush=True)
        if not found["trains"]:
            return


def planned(shape: Any, given: argparse.Namespace) -> Any:
    """Return what the plan foresees, from the config alone."""
    from quantadapt.planning import plan
    from quantadapt.spec import Spec

    options = dict(OURS[given.backend])
    with tempfile.TemporaryDirectory() as folder:
        shape.config().save_pretrained(folder)
        spec = Spec(
            model=folder,
            backend={"name": options.pop("backend"), **options},
            adapter={"name": "lora", "r": RANK},
            train={"per_device_train_batch_size": 1, "memory": "min", "optim": given.optim},
            dtype="bfloat16",
        )
        made = plan(spec, check_output=False, cards=[given.one], weights=False)
    return made.memory


def chosen(given: argparse.Namespace, longest: dict[str, int]) -> str:
    """Return what of the base is streamed: as asked, or what gives the longer row."""
    if given.stream != "auto":
        return str(given.stream)
    return max(longest, key=lambda way: (longest[way], way == "none"))


def train(model: Any, vocabulary: int, length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train on a short row and on one of `length` tokens; return what that took."""
    import torch
    from datasets import Dataset
    from several_gpus import rows_in_order
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    rows = [torch.randint(vocabulary, (n,)).tolist() for n in (SHORT, length)]
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(r) for r in rows]})
    logs: list[dict[str, Any]] = []
    if given.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        with rows_in_order():
            qa.train(
                model,
                data,
                tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
                on_log=logs.append,
                max_steps=2,
                per_device_train_batch_size=1,
                learning_rate=LEARNING_RATE,
                logging_steps=1,
                memory="min",
                optim=given.optim,
            )
    except qa.errors.TrainingError as error:
        print(last_words(str(error)), file=sys.stderr)
        return {"trains": False, "seconds": time.perf_counter() - started}
    seconds = logs[1]["seconds"] - logs[0]["seconds"]
    on_gpu = given.device == "cuda"
    asked = torch.cuda.memory_stats()["requested_bytes.all.peak"] / 2**30 if on_gpu else None
    return {
        "trains": True,
        "asked": asked,
        "speed": length / seconds,
        "peak": _peak_gib(given.device),
        "reserved": _reserved_gib(given.device),
    }


def row_of(found: dict[str, Any], shape: str) -> str:
    """Return the line of a row."""
    published = PUBLISHED.get(shape, {}).get(int(found["card"]))
    if "row" not in found:
        return f"| {found['card']:g} | {found['base']} | 0 | {'| ' * 9}"

    def cell(key: str, style: str) -> str:
        return "" if found.get(key) is None else format(found[key], style)

    ratio = f"{found['row'] / published:.2f}" if published and found["trains"] else ""
    cells = [
        *(f"{found['card']:g}", "whole" if found["base"] == "none" else "streamed"),
        *(cell("plan", ",d"), cell("row", ",d"), "yes" if found["trains"] else "no"),
        *(cell("asked", ".2f"), cell("peak", ".2f"), cell("foreseen", ".2f")),
        cell("reserved", ".2f"),
        *(cell("may", ".2f"), cell("speed", ",.0f"), ratio),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
