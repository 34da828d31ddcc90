"""The layout that gpt-oss is released in: `experts.down_proj_blocks`, [experts, out_features,
blocks, 16], and `experts.down_proj_scales`, [experts, out_features, blocks], both uint8; all else
dense."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from quantadapt.loading.mxfp4 import METHOD, PARTS
from quantadapt.model.experts import Stack, expert_stacks, stacks_of

from .arithmetic import MX_BLOCK
from .layers import FP4Linear

_MODEL = "gpt_oss"


class Released:
    """Says what goes into config.json, as `layerwise.save_layerwise` asks a quantizer."""

    def quantization_config(self) -> dict[str, Any]:
        return {"quant_method": METHOD}

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
        return {"modules_to_not_convert": [*kinds]}


def holds_released(model: nn.Module) -> bool:
    """Say whether a model is quantized where gpt-oss was released so, and nowhere else."""
    config: Any = model.config
    stacks = {stack.module for stack in _stacks(model)}
    if config.model_type != _MODEL or not stacks or next(expert_stacks(model, ()), None):
        return False
    return stacks == {name for name, module in model.named_modules() if _is_fp4(module)}


def released_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of such a model by the names, and in the shapes, of this layout."""
    state: dict[str, Tensor] = model.state_dict()
    for stack in _stacks(model):
        shape = stack.experts, stack.out_features, stack.in_features // MX_BLOCK
        for ending, part in PARTS.items():
            tensor = state.pop(f"{stack.module}.{part}")
            state[f"{stack.name}_{ending}"] = tensor.view(*shape, -1).squeeze(-1)
    return state


def _stacks(model: nn.Module) -> list[Stack]:
    return [stack for module in model.modules() for stack in stacks_of(module).values()]


def _is_fp4(module: Any) -> bool:
    return isinstance(getattr(module, "vendor", module), FP4Linear)
