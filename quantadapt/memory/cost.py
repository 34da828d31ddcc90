"""About how long a training step takes under a setting, from sizes alone: enough to tell which of
two that fit is the faster. What a run chooses in the end, it has measured.

Times are in products: of one number with one number, as matrix products do them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .experts import STACKS

if TYPE_CHECKING:
    from .setting import Setting
    from .workload import Workload

DEQUANTIZED = 300
"""Making a weight of its code takes as long as multiplying it with so many tokens: it goes through
memory, where a product stays inside of the chip. Measured on an H200 with nf4: 0.65 ps in stacks of
experts, 0.8 to 1.3 in layers, and 3.2 fs for a product, so 200 to 400 tokens."""
ATTENTION = 1.5
"""So many times as long a product takes within attention: on an H200 cuDNN reached 450 TFLOP/s of
rows of 2,048 tokens, linear layers 690."""
BEGUN = 2**39
"""A pass through a layer takes at least so long: Python starts its kernels one by one. On an H200
that is a millisecond or two; passes that are recorded as CUDA graphs start as one."""


def step_cost(work: Workload, setting: Setting) -> float:
    """Return about how long a step takes. Each micro-batch goes through all layers, and each pass
    through a layer dequantizes its weights, those of all experts, too."""
    tokens = work.tokens_of(setting)
    least = 0 if work.records(setting) else BEGUN
    if work.part_of(setting.offload):
        least *= 2  # to know whose rows are where, Python waits for the GPU
    left, total = setting.recomputed_layers, 0.0
    for count, layer in work.kinds:
        again = min(left, count)
        left -= again
        once = max(_products(layer, tokens), least)
        # A weight that is kept from the recomputation is not made again for the backward.
        kept = 0 if setting.offload else layer.recompute_bytes(tokens) / layer.dtype_bytes
        total += 2 * count * once + again * (once - min(DEQUANTIZED * kept, once - least))
        attention = _attention(layer, tokens)
        total += 0 if setting.attention else again * attention
        # Of layers that share an input, all but the last run once more.
        total += again * (1 - 1 / setting.input_every) * (once + attention)
    return total * work.batch / setting.micro_batch


def _attention(layer: Workload, tokens: int) -> float:
    """Return how long a layer's attention takes the GPU, forward; half of all pairs of tokens see
    each other, in two products."""
    return ATTENTION * tokens * layer.row * layer.shape.queries


def _products(layer: Workload, tokens: int) -> float:
    """Return how long a pass through a layer takes the GPU, but for attention."""
    experts, found = layer.shape.experts, 0.0
    for name, (inputs, outputs) in layer.shape.linears.items():
        stacked = experts if name in STACKS else None
        rows = tokens * stacked.chosen / stacked.count if stacked else tokens
        made = 0 if name in layer.dense else DEQUANTIZED
        found += inputs * outputs * (rows + made)
    return found
