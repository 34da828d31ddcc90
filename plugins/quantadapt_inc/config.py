"""What Intel Neural Compressor is told: its configs, and what its loader reads in a checkpoint."""

from __future__ import annotations

import re
import tempfile
from typing import TYPE_CHECKING, Any

from quantadapt.errors import ModelError
from quantadapt_inc.layers import is_fp8

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantadapt_inc import INC

HP_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
"""INC's names of the compute dtypes."""


def config_for(
    quantizer: INC, model: nn.Module, names: list[str], method: str, dtype: torch.dtype
) -> Any:
    """Return INC's config.

    Args:
        quantizer: the options.
        model: what will be prepared, on its device.
        names: the layers to quantize, which INC is shown alone.
        method: fp8, rtn, gptq or awq; a single layer is rounded whatever the quantizer's is.
        dtype: compute dtype.
    """
    from neural_compressor.torch import quantization

    if quantizer.fp8_format:
        return quantization.FP8Config(
            fp8_config=quantizer.fp8_format.upper(),
            hp_dtype=HP_DTYPES[str(dtype)],
            allowlist={"names": [], "types": ["Linear"]},
            dump_stats_path=f"{tempfile.gettempdir()}/stats",
            **_mode(use_qdq=next(model.parameters()).device.type != "hpu"),
        )
    options: dict[str, Any] = {
        "bits": quantizer.bits,
        "group_size": quantizer.group_size,
        "use_sym": quantizer.symmetric,
        "use_layer_wise": False,
        "quant_lm_head": True,  # what stays dense is not INC's decision
    }
    if method == "gptq":
        options["quant_lm_head"] = False  # it means what follows the blocks
        options["model_path"] = tempfile.gettempdir()  # or INC looks for it on the hub
    if method == "awq":
        # Each layer scales its own inputs. INC would rather move scales into the layer before,
        # but then no adapter fits the quantized and the dense model alike.
        options["absorb_layer_dict"] = {n: n for n in in_blocks(names, model, method)}
    return getattr(quantization, f"{method.upper()}Config")(**options)


def in_blocks(names: list[str], model: nn.Module, method: str) -> list[str]:
    """Return what the layers `names` are called within each block of the model.

    Raises:
        ModelError: INC's GPTQ or AWQ would break, or leave layers out silently.
    """
    from torch import nn

    stacks = [n for n, m in model.named_modules() if type(m) in (nn.ModuleList, nn.Sequential)]
    blocks: dict[str, list[str]] = {}
    for name in names:
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        block, _, rest = name.removeprefix(f"{stack}.").partition(".")
        blocks.setdefault(f"{stack}.{block}" if stack else name, []).append(rest)
    first, *others = list(blocks.values()) or [[]]
    if len(stacks) == 1 and all(first) and all(other == first for other in others):
        return first
    what = f"INC's {method} wants one stack of blocks with the same layers, and none outside it; "
    what += f"here are {', '.join(list(blocks)[:3])}, ..."
    raise ModelError(what, fix="use method: fp8 or rtn, or other skip_modules")


def _mode(use_qdq: bool) -> dict[str, Any]:
    """Return what in INC's FP8 config depends on the device."""
    return {"use_qdq": use_qdq, "scale_method": "maxabs_arbitrary" if use_qdq else "maxabs_hw"}


def fp8_details(model: nn.Module) -> dict[str, Any]:
    """Return what INC's loader has to know of an FP8 model beside its format."""
    from torch import nn

    modules = {name: getattr(m, "vendor", m) for name, m in model.named_modules()}
    layer: Any = next((m for m in modules.values() if is_fp8(m)), None)
    if layer is None:
        return {}
    dense = [f"^{re.escape(name)}$" for name, m in modules.items() if type(m) is nn.Linear]
    return {
        **{key: str(value) for key, value in _mode(layer.use_qdq).items()},
        "hp_dtype": HP_DTYPES[str(layer.hp_dtype)],
        "allowlist": {"names": [], "types": ["Linear"]},
        "blocklist": {"names": dense, "types": []},
    }
