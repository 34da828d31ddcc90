"""Facades: `QuantLinear`, an `nn.Linear` in front of one vendor module, and `QuantStack`, in front
of a stack of experts, so that PEFT never meets a vendor.

The facade shares the vendor module's parameter and buffer dictionaries: `named_parameters`, `to`,
FSDP and `state_dict` see the vendor's own tensors under the vendor's own names, while the module
tree holds one `nn.Linear` per layer and nothing behind it. `weight` is a `LazyWeight`: shape,
dtype and device are free, the dequantized numbers are made when somebody computes with it.
"""

from .brought import BroughtTarget
from .expert_norms import row_norms
from .experts import QuantExperts, QuantStack, read_in_parts
from .frozen import comes_again, is_recomputing, recomputed_later, recomputing
from .grouped import lora_change
from .keeping import kept, taken
from .lazy_weight import LazyWeight
from .linear import QuantLinear
from .peft_experts import single_stack_lora, stack_wrappers
from .quant_weight import QuantWeight
from .wrapping import (
    densify,
    facades,
    linear_facades,
    mark_conv1d,
    replace,
    stack_facades,
    unwrap,
    wrap,
)

__all__ = [
    "BroughtTarget",
    "LazyWeight",
    "QuantExperts",
    "QuantLinear",
    "QuantStack",
    "QuantWeight",
    "comes_again",
    "densify",
    "facades",
    "is_recomputing",
    "kept",
    "linear_facades",
    "lora_change",
    "mark_conv1d",
    "read_in_parts",
    "recomputed_later",
    "recomputing",
    "replace",
    "row_norms",
    "single_stack_lora",
    "stack_facades",
    "stack_wrappers",
    "taken",
    "unwrap",
    "wrap",
]
