"""The phases of a training step in which memory may peak, and what is there in each of them.

Forward ends at the loss. Backward goes from the last layer to the first: inputs and what layers
keep go as gradients come, and the layers that are recomputed, the first ones, begin when what the
others kept is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .setting import Setting
    from .workload import Workload

WORKSPACE = 2**25
"""What cuBLAS allocates for itself, on Hopper, for each thread and stream that computes. Forward
and backward are two threads; where passes are recorded, that is done on a stream of its own."""


class Phase(NamedTuple):
    """Bytes beside those that are there all the time.

    Attributes:
        name: of the phase.
        inputs: of recomputed layers, and what attention returned in them, where that is kept.
        activations: what layers keep for backward.
        working: what comes and goes, workspaces included.
        gradients: of the trained weights.
    """

    name: str
    inputs: int
    activations: int
    working: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[1:])


def phases(work: Workload, setting: Setting) -> list[Phase]:
    """Return the phases of a step. Where passes are recorded as CUDA graphs, the first ones are
    not, which compute as ever; a recording ends before the loss; and once it is there what it works
    with lies in memory that PyTorch holds for it, and does not count as allocated."""
    recorded, several = work.records(setting), work.has_several(setting)
    usual = _phases(work, setting, several)
    found = [phase._replace(working=phase.working + 2 * WORKSPACE) for phase in usual]
    if recorded:
        found += [phase._replace(working=phase.working + 4 * WORKSPACE) for phase in usual[1:]]
        tokens = work.tokens_of(setting)
        loss = work.loss_bytes(tokens) + work.input_bytes(tokens) + 4 * WORKSPACE
        # Those of the passes before are copied out of the memory of the recording.
        found.append(Phase("replayed", 0, 0, loss, 4 * work.trained * (2 if several else 1)))
    return found


def _phases(work: Workload, setting: Setting, several: bool) -> list[Phase]:
    """Return the loss, which comes first, and the phases of backward."""
    tokens = work.tokens_of(setting)
    count, single = setting.recomputed_layers, work.input_bytes(tokens)
    single += work.attention_bytes(tokens) if setting.attention else 0
    tiled, offload = work.tiles(setting, tokens), setting.offload
    each = [
        (layers, kind, kind.kept_bytes(tokens, tiled), kind.kept_always(tokens, offload))
        for layers, kind in work.kinds
    ]
    layers = [(kind, kept, always) for n, kind, kept, always in each for _ in range(n)]
    layers[count:] = [(k, kept + k.low_bytes(tokens), always) for k, kept, always in layers[count:]]
    stays = [always for _, _, always in layers]
    seeing = work.seeing_bytes(setting)
    # One that is fetched from CPU memory, and the next, which is under way.
    inputs = single * (min(count, 2) if offload else count)

    def gradients(layer: int) -> int:
        """What is there of them in the backward of a layer, counted from 0."""
        come = 0 if several or work.early_gradients else layer
        return 4 * work.trained * (len(layers) - come) // len(layers)

    def backward() -> Iterator[Phase]:
        kept = sum(kept for _, kept, _ in layers[count:]) + seeing
        working = work.layer_bytes(tokens, setting)
        last = len(layers) - 1
        if count <= last and (forward := work.forward_bytes(tokens)):
            yield Phase("forward", inputs + sum(stays), kept, forward, gradients(len(layers)))
        yield Phase("last layer", inputs + sum(stays), kept, working, gradients(last))
        if count <= last:
            kind, kept, _ = layers[count]
            working = kind.layer_bytes(tokens, setting)
            left = inputs + sum(stays[: count + 1])
            yield Phase("last that is kept", left, kept + seeing, working, gradients(count))
        # Where inputs go to CPU memory, little is to be kept, and the second last has another.
        for at in {count - 1, min(count - 1, 1), 0} if count else ():
            kind, kept, _ = layers[at]
            working = kind.layer_bytes(tokens, setting)
            working += 0 if offload else kind.recompute_bytes(tokens) + kind.product_bytes(tokens)
            left = min(inputs, (at + 1) * single) + sum(stays[: at + 1])
            yield Phase("recomputed", left, kept - single + seeing, working, gradients(at))

    kept = sum(kept for _, kept, _ in layers[count:]) + seeing
    loss = Phase("loss", inputs + sum(stays), kept, work.head_bytes(tokens), gradients(len(layers)))
    shared = work.shared_bytes(setting)
    return [phase._replace(working=phase.working + shared) for phase in (loss, *backward())]
