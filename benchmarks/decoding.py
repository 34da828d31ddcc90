"""Decoding: the vendors' kernels against dequantizing and a matrix product.

    python benchmarks/decoding.py --compiled 14336x4096      # single layers, every backend
    python benchmarks/decoding.py --model 1b                 # tokens/s of a whole model

Layers have the shapes of Llama 8B and random weights, rounded to nearest where a backend would
calibrate. The tables give microseconds by the number of tokens: `vendor` is the target's forward,
with a star where `AdapterTarget.decodes` says that it runs; `dequantize` is what runs elsewhere.
`--compiled SHAPE` adds, for that shape, `compiled`: dequantizing in one kernel, as in training;
and, for one token, `one kernel`: dequantizing and product together. The error is that of the
vendor's outputs against those of the dequantized weight, relative, the largest of all counts; where
it is large, the vendor quantizes activations.

A model decodes 64 tokens greedily, one sequence, with `decodes` as declared and with it off, with
`--compiled` as off, but with dequantizing compiled, and as declared with LoRA r=16 on all layers.
The model case `peft-nf4` is what transformers, bitsandbytes and PEFT do.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from random_models import random_aqlm
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, checkpoint
from speed_cases import PROJECTIONS
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers_nf4 import transformers_nf4
from versions import versions

from quantadapt import compiling
from quantadapt.adapting.fused import use_fused_layers
from quantadapt.facade import QuantLinear, wrap
from quantadapt.layerwise import quantize_layerwise
from quantadapt.registry import registry

LAYERS = ("4096x4096", "14336x4096", "4096x14336")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
WARM_UP, ROUNDS, ROUND_SECONDS, MOST_CALLS = 3, 5, 0.003, 20
PROMPT, NEW_TOKENS = 32, 64
PACKAGES = (
    *("torch", "triton", "transformers", "bitsandbytes", "hqq", "torchao", "optimum-quanto"),
    *("gptqmodel", "auto-round", "aqlm", "eetq"),
)


@dataclass(frozen=True)
class Case:
    """A backend with options, and the dtype that its vendor's kernel wants."""

    backend: str
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.bfloat16

    def quantizer(self) -> Any:
        """Return the backend's quantizer. Raises PluginError where it is not installed."""
        return registry().backend(self.backend).quantizer(**dict(self.options))

    def layer(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor's layer for `linear`."""
        quantizer = self.quantizer()
        if self.backend != "aqlm":
            return quantizer.quantize_linear(linear)  # type: ignore[no-any-return]
        return random_aqlm(quantizer, linear)


CASES = {
    "nf4": Case("bnb-nf4"),
    "fp4": Case("bnb-fp4"),
    "bnb-int8": Case("bnb-int8"),
    "hqq4": Case("hqq"),
    "torchao-int8": Case("torchao-int8"),
    "torchao-int4": Case("torchao-int4"),
    "torchao-intx": Case("torchao-intx"),
    "torchao-fp8": Case("torchao-fp8"),
    "gptq": Case("gptq"),
    "awq": Case("awq"),
    "awq-fp16": Case("awq", dtype=torch.float16),
    "autoround": Case("autoround"),
    "aqlm-2x8": Case("aqlm"),
    "aqlm-1x16": Case("aqlm", (("num_codebooks", 1), ("nbits_per_codebook", 16))),
    "quanto8": Case("quanto"),
    "quanto4": Case("quanto", (("weights", "int4"),)),
    "eetq": Case("eetq", dtype=torch.float16),
}
PEFT = "peft-nf4"


# Layers ----------------------------------------------------------------------------------------


@torch.no_grad()
def measure_layer(
    case: Case, shape: str, counts: list[int], device: str, compiled: bool
) -> dict[str, Any]:
    """Return microseconds of each way by tokens, for a layer of shape "OUTxIN", and the error."""
    out_features, in_features = map(int, shape.split("x"))
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": device, "dtype": case.dtype}
    dense = nn.Linear(in_features, out_features, bias=False, **like)
    dense.requires_grad_(False)
    facade = QuantLinear(case.layer(dense), case.quantizer().target, case.dtype)
    del dense
    target, vendor = facade.target, facade.vendor
    found: dict[str, Any] = {"vendor": {}, "dequantize": {}, "decodes": [], "error": 0.0}
    for tokens in counts:
        x = torch.randn(1, tokens, in_features, **like)
        ways: dict[str, Callable[[], Tensor]] = {
            "vendor": lambda x=x: target.forward(vendor, x),  # type: ignore[misc]
            "dequantize": lambda x=x: linear(x, facade.dequantize()),  # type: ignore[misc]
        }
        got, wanted = (way().float() for way in ways.values())
        found["error"] = max(found["error"], float((got - wanted).norm() / wanted.norm()))
        found["decodes"] += [tokens] * (target.quantizes_activations or target.decodes(vendor, x))
        for name, run in ways.items():
            found[name][tokens] = microseconds(run, device)
    if compiled:  # from here on kernels are there
        found["compiled"] = {}
        for tokens in counts:
            x = torch.randn(1, tokens, in_features, **like)
            with compiling.compiled_functions():
                run = lambda x=x: linear(x, facade.dequantize())  # type: ignore[misc] # noqa: E731
                found["compiled"][tokens] = microseconds(run, device)
    if compiled:
        found["one kernel"] = {1: time_one_kernel(facade, device)}
    return found


def microseconds(run: Callable[[], Any], device: str) -> float:
    """Return the median time of a call, without waiting for the device between calls."""
    for _ in range(WARM_UP):
        seconds = _seconds(run, 1, device)
    calls = max(1, min(MOST_CALLS, int(ROUND_SECONDS / seconds)))
    return 1e6 * statistics.median(_seconds(run, calls, device) / calls for _ in range(ROUNDS))


def _seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - started
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def time_one_kernel(facade: QuantLinear, device: str) -> float | None:
    """Return microseconds of Inductor's kernel for dequantizing and one token's product; None
    where the target's `dequantize` is no single function, or there is no compiler."""
    parts: list[Any] = []

    def note(function: Any, tensors: Any, static: Any) -> Any:
        parts.append((function, tensors, static))

    with patch.object(compiling, "_kernel", note):
        facade.dequantize()
    if not parts:
        return None
    function, tensors, static = parts[0]
    x = torch.randn(facade.in_features, device=device, dtype=facade.compute_dtype)
    kernel = compiling._compile(_product, (x, *tensors), (function, static))
    return None if kernel is None else microseconds(lambda: kernel(x, *tensors), device)


def _product(x: Tensor, *rest: Any) -> Tensor:
    *tensors, function, static = rest
    weight = function(*tensors, *static).to(x.dtype)
    product: Tensor = (weight.float() * x.float()).sum(-1)
    return product.to(x.dtype)


def table_of_layers(shape: str, counts: list[int], rows: dict[str, dict[str, Any]]) -> Table:
    """Return the table of one shape."""
    table = Table("backend", "way", title=f"{shape}, microseconds", box=MARKDOWN)
    for tokens in counts:
        table.add_column(str(tokens), justify="right")
    table.add_column("error", justify="right")
    for name, found in rows.items():
        if "failed" in found:
            table.add_row(name, found["failed"])
            continue
        for way in ("vendor", "dequantize", "compiled", "one kernel"):
            times = found.get(way, {})
            if not any(times.values()):
                continue
            cells = ["" if times.get(n) is None else f"{times[n]:.0f}" for n in counts]
            if way == "vendor":
                cells = [
                    f"{cell} *" if n in found["decodes"] else cell
                    for n, cell in zip(counts, cells, strict=True)
                ]
            error = f"{found['error']:.1e}" if way == "vendor" else ""
            table.add_row(name if way == "vendor" else "", way, *cells, error)
    return table


# Models ----------------------------------------------------------------------------------------


def measure_model(case: Case, path: Path, device: str, compiled: bool) -> dict[str, Any]:
    """Return tokens per second of each way, and how many tokens are those of the first."""
    quantizer = case.quantizer()
    model = quantize_layerwise(quantizer, str(path), device=device, dtype=case.dtype)
    target = quantizer.target
    wrap(model, target, case.dtype).eval()
    declared, tokens = tokens_per_second(model, device)
    with patch.object(target, "decodes", lambda module, x: False):
        off, others = tokens_per_second(model, device)
        found = {"declared": declared, "off": off, "same": int((tokens == others).sum())}
        if compiled:
            with compiling.compiled_functions():
                found["compiled"], _ = tokens_per_second(model, device)
    return found | {"lora": tokens_per_second(with_lora(model), device)[0]}


def measure_peft(path: Path, device: str) -> dict[str, Any]:
    """Return tokens per second of transformers' model with bitsandbytes, without and with LoRA."""
    model = transformers_nf4(path, device).eval()
    declared, _ = tokens_per_second(model, device)
    return {"declared": declared, "lora": tokens_per_second(with_lora(model), device)[0]}


def with_lora(model: Any) -> Any:
    """Return the model with LoRA, over facades by the fused function."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=PROJECTIONS)
    use_fused_layers(config)
    return get_peft_model(model, config).eval()


def tokens_per_second(model: Any, device: str) -> tuple[float, Tensor]:
    """Decode one sequence greedily; return the speed, the median of three times, and the new
    tokens, int64 [NEW_TOKENS]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=generator).to(device)
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    seconds = []
    with torch.no_grad():
        model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, **how)
        for _ in range(3):
            started = time.perf_counter()
            found = model.generate(
                input_ids=ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **how
            )
            tokens = found[0, PROMPT:].cpu()
            seconds.append(time.perf_counter() - started)
    return NEW_TOKENS / statistics.median(seconds), tokens


def table_of_models(shape: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Return the table of one model."""
    table = Table("backend", title=f"Llama-{shape} shape, tokens/s", box=MARKDOWN)
    for column in ("as declared", "decodes off", "compiled", "with LoRA", "same tokens"):
        table.add_column(column, justify="right")
    for name, found in rows.items():
        if "failed" in found:
            table.add_row(name, found["failed"])
            continue
        ways = (found.get(way) for way in ("declared", "off", "compiled", "lora"))
        same = f"{found['same']} of {NEW_TOKENS}" if "same" in found else ""
        table.add_row(name, *("" if way is None else f"{way:.1f}" for way in ways), same)
    return table


# The script ------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print the tables and write the JSON."""
    given = arguments()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, Any] = {
        "hardware": hardware(given.device),
        "versions": versions(*PACKAGES),
        "layers": {},
        "models": {},
    }
    console = Console(width=160)
    for shape in given.shapes:
        rows = results["layers"].setdefault(shape, {})
        for name in given.case:
            compiled = shape == given.compiled
            how = (shape, given.tokens, given.device, compiled)
            rows[name] = attempt(measure_layer, CASES[name], *how)
            save(given.out, results)
        console.print(table_of_layers(shape, given.tokens, rows))
    if given.model:
        path = checkpoint(given.model, given.folder)
        rows = results["models"].setdefault(given.model, {})
        for name in given.model_case or given.case:
            if name.startswith("aqlm"):  # making one takes hours
                continue
            if name == PEFT:
                rows[name] = attempt(measure_peft, path, given.device)
            else:
                how = (CASES[name], path, given.device, bool(given.compiled))
                rows[name] = attempt(measure_model, *how)
            save(given.out, results)
        console.print(table_of_models(given.model, rows))
    console.print("\n* the target decodes with the vendor's forward")
    console.print(f"{results['hardware']}; {results['versions']}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=LAYERS, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--compiled", metavar="OUTxIN", help="one of the shapes")
    parser.add_argument("--model", choices=SHAPES)
    parser.add_argument(
        "--model-case", nargs="+", choices=[PEFT, *CASES], help="where not those of --case"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    return parser.parse_args()


def attempt(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what `measure` finds, or why it failed: other rows are worth having."""
    try:
        return measure(*args)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def save(out: Path | None, results: dict[str, Any]) -> None:
    """Write what there is so far."""
    if out is not None:
        out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def hardware(device: str) -> str:
    """Return what the tables are measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
