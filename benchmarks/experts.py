"""Training speed and memory of LoRA on mixtures of experts, against what else a user would run.

    python benchmarks/experts.py --shape qwen3-30b --layers 12 --case unsloth peft ours-nf4

Cases: `peft` (attention in nf4, experts in bf16, LoRA on both through `target_parameters`: PEFT
quantizes no experts), `unsloth` (experts in nf4), `ours-BACKEND:MEMORY` as in speed.py; with
`+eager` behind it without CUDA graphs. LoRA r=16 on attention and experts, AdamW, in processes of
their own; `--adapt attention` leaves the experts as they are. The weights are random and made on
the spot, block by block (for Unsloth, in a checkpoint first), so `load peak` is the quantized model
and one dense block. Backends that calibrate round to nearest here, and aqlm's codes are random: a
step takes as long whatever the values are, as it goes by the layout alone. So their losses tell
nothing of the method, and their loading nothing of how long it takes.

Prints a Markdown table: tokens per second (median of groups of four steps, after four), their ratio
to the first case; GiB in use at most and what PyTorch held for it; GiB after loading, and at most
while loading; trained weights; the share of layers computed again; the first and last loss.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speed import RESULT, device_name, last_words
from speed_cases import (
    OURS,
    PROJECTIONS,
    RANK,
    WARM_UP,
    Watch,
    _batches,
    _import,
    _memory,
    _peak_gib,
    _reserved_gib,
    _synchronize,
    our_loop,
    plain_loop,
    unsloth_model,
)
from tables import case_rows
from versions import versions

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel"),
    *("hqq", "torchao", "optimum-quanto", "unsloth"),
)
COLUMNS = {
    "tokens/s": ("tokens_per_second", ",.0f"),
    "ratio": ("ratio", ".3f"),
    "peak GiB": ("peak_gib", ".2f"),
    "reserved GiB": ("reserved_gib", ".2f"),
    "loaded GiB": ("loaded_gib", ".2f"),
    "load peak GiB": ("load_peak_gib", ".2f"),
    "load s": ("load_seconds", ".1f"),
    "trained M": ("trained", ".1f"),
    "recomputed": ("recomputed", ".0%"),
}
EAGER = "+eager"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, and the batch that it is trained on: `batch` rows of `length`."""

    kind: str
    layers: int
    vocab_size: int
    sizes: dict[str, Any]
    batch: int = 4
    length: int = 2048

    def config(self) -> Any:
        """Return transformers' config."""
        import transformers

        return getattr(transformers, self.kind)(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.layers,
            max_position_embeddings=4096,
            **self.sizes,
        )

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.length


SHAPES = {
    "demo": Experts(
        "Qwen3MoeConfig",
        2,
        2048,
        {
            **{"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
            **{"num_experts": 8, "num_experts_per_tok": 2},
        },
        batch=2,
        length=64,
    ),
    "qwen3-30b": Experts(
        "Qwen3MoeConfig",
        48,
        151936,
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
            **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
            **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        },
    ),
    "gpt-oss-demo": Experts(
        "GptOssConfig",
        2,
        2048,
        {
            **{"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        },
        batch=2,
        length=64,
    ),
    "gpt-oss-20b": Experts("GptOssConfig", 24, 201088, {"num_local_experts": 32}),
}


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    results = case_rows(
        given.case, lambda case: run_apart(case, given, Path(__file__)), COLUMNS, given.out
    )
    sys.path.append(given.unsloth_site or "")
    shape = shape_of(given)
    what = f"{given.shape}, {shape.layers} layers, {shape.batch} x {shape.length} tokens"
    print(f"\n{what}, LoRA on {given.adapt}; {device_name(given.device)}; {versions(*PACKAGES)}")
    for found in results:
        for key in ("setting", "tables"):
            if found.get(key):
                print(f"\n{found['case']}: {found[key]}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--adapt", choices=("all", "attention"), default="all")
    parser.add_argument("--case", nargs="+", type=check, default=["peft", "ours-nf4"])
    parser.add_argument("--steps", type=int, default=20, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-experts"))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--profile", action="store_true", help="also print kernels of two steps")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--unsloth-site", help="folder that Unsloth is installed in, if apart")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps has to be more than {WARM_UP}")
    given.folder = given.folder.resolve()
    return given


def check(case: str) -> str:
    """Return the case. Raises ArgumentTypeError if there is none of that name."""
    name, _, memory = case.removesuffix(EAGER).partition(":")
    if case not in ("peft", "unsloth") and (name not in OURS or _memory(memory) is None):
        raise argparse.ArgumentTypeError(f"{case}: take one of {['peft', 'unsloth', *OURS]}")
    return case


def shape_of(given: argparse.Namespace) -> Experts:
    """Return the shape, with what the command line changes."""
    shape = SHAPES[given.shape]
    layers, batch = given.layers or shape.layers, given.batch or shape.batch
    return Experts(shape.kind, layers, shape.vocab_size, shape.sizes, batch, shape.length)


def run_apart(case: str, given: argparse.Namespace, script: Path) -> dict[str, Any]:
    """Run a case of `script` in another process; what went wrong there becomes `error`."""
    own = ["--one", case, *sys.argv[1:]]
    command = [sys.executable, str(script.resolve()), *own]
    environment = dict(os.environ)
    if given.unsloth_site and case == "unsloth":
        path = [environment.get("PYTHONPATH", ""), given.unsloth_site]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment}
    try:
        # Unsloth writes what it compiles into the working folder
        done = subprocess.run(command, timeout=given.timeout, cwd=given.folder, **options)
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"{case}: not done after {given.timeout:.0f} s\n"}
    line = next((x for x in done.stdout.splitlines() if x.startswith(RESULT)), None)
    if line is not None:
        found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
        return found
    words = last_words(done.stderr)
    return {"case": case, "error": f"{case}: failed ({done.returncode})\n{words}\n"}


def run_here(given: argparse.Namespace) -> dict[str, Any]:
    """Load, train a few steps, and return the figures; those of a GPU are None without one."""
    import time

    case, shape, device = given.one, shape_of(given), given.device
    _import(case)
    from kernel_table import Profile

    path = checkpoint(shape, given) if case == "unsloth" else None
    _synchronize(device)
    _peak_gib(device)
    started = time.perf_counter()
    model = load(case, shape, device, path, given.adapt == "all")
    _synchronize(device)
    found: dict[str, Any] = {"case": case, "load_seconds": time.perf_counter() - started}
    found["load_peak_gib"] = _peak_gib(device)
    found["loaded_gib"] = _peak_gib(device)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    watch = Watch(given.steps, Profile(device) if given.profile else None)
    batches = _batches(shape, watch.steps)  # type: ignore[arg-type]
    if case.startswith("ours-"):
        name, _, memory = case.removesuffix(EAGER).partition(":")
        options = {**(_memory(memory) or {}), "cuda_graphs": not case.endswith(EAGER)}
        found |= our_loop(model, batches, watch, OURS[name], options)
    else:
        found |= plain_loop(model, batches, watch, recomputed=1.0)
    times = sorted(watch.times)
    median = times[len(times) // 2]
    return found | {
        "tokens_per_second": shape.tokens / median,
        "step_seconds": median,
        "trained": sum(trained) / 1e6,
        "reserved_gib": _reserved_gib(device),
        "peak_gib": _peak_gib(device),
        "losses": [watch.losses[0], watch.losses[-1]],
        "tables": watch.tables,
    }


def load(case: str, shape: Experts, device: str, path: Path | None, whole: bool) -> Any:
    """Return the model of a case, with LoRA on attention, and on experts if `whole`."""
    if case == "unsloth":
        targets = [*PROJECTIONS, "gate_up_proj"] if whole else ATTENTION
        return unsloth_model(path, shape.length, targets, "unsloth")
    return (peft if case == "peft" else partial(ours, case))(shape, device, whole)


def ours(case: str, shape: Experts, device: str, whole: bool) -> Any:
    import torch
    from random_models import random_aqlm, random_model

    import quantadapt as qa
    from quantadapt.registry import registry

    options = dict(OURS[case.removesuffix(EAGER).partition(":")[0]])
    name = options.pop("backend")
    quantizer = registry().backend(name).quantizer(**options)
    fits = name != "aqlm"  # which takes hours
    quantize = quantizer.quantize_linear if fits else partial(random_aqlm, quantizer)
    model = random_model(shape.config(), quantize, device, torch.bfloat16)
    model = qa.quantize(model, name, **options, device=device, dtype="bfloat16")
    targets = {} if whole else {"target_modules": ATTENTION}
    return qa.attach(model, "lora", r=RANK, lora_alpha=RANK, **targets)


def peft(shape: Experts, device: str, whole: bool) -> Any:
    """Return what the PEFT documentation tells to write, without the cast of what is not quantized
    to float32, which the experts would be, too."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from random_models import random_model

    def quantize(linear: torch.nn.Linear) -> Any:
        made = Linear4bit(
            *(linear.in_features, linear.out_features, linear.bias is not None),
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        made.load_state_dict(linear.state_dict())
        return made.to(device)

    model = random_model(shape.config(), quantize, device, torch.bfloat16, stacks=False)
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=ATTENTION,
        target_parameters=STACKS if whole else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def checkpoint(shape: Experts, given: argparse.Namespace) -> Path:
    """Write the dense random weights, once, and return their folder. The tokenizer beside them is
    the demo's: some libraries load no model without one."""
    import torch
    from random_models import random_model
    from transformers import AutoTokenizer

    from quantadapt import demo

    path = given.folder / f"{given.shape}-{shape.layers}"
    partial = Path(f"{path}.partial")
    if path.exists():
        return path
    shutil.rmtree(partial, ignore_errors=True)
    model = random_model(
        shape.config(), lambda linear: linear, given.device, torch.bfloat16, stacks=False
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(partial)
    os.replace(partial, path)
    del model
    if given.device == "cuda":
        torch.cuda.empty_cache()
    return path


if __name__ == "__main__":
    main()
