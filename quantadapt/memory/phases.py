"""The phases of a training step in which memory may peak, and what is there in each of them.

Forward ends at the loss. Backward goes from the last layer to the first: inputs and what layers
keep go as gradients come, and the layers that are recomputed, the first ones, begin when what the
others kept is gone.
"""

from __future__ import annotations

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
    step = _Step.of(work, setting, several)
    tokens, count, layers = step.tokens, setting.recomputed_layers, len(step.layers)
    found = [step.before_backward("loss", work.head_bytes(tokens), layers)]
    if count < layers and (forward := work.forward_bytes(tokens)):
        found.append(step.before_backward("forward", forward, layers))
    found.append(step.before_backward("last layer", work.layer_bytes(tokens, setting), layers - 1))
    if count < layers:
        found.append(step.last_kept())
    # Where inputs go to CPU memory, little is to be kept, and the second last has another.
    found += [step.recomputed(at) for at in ({count - 1, min(count - 1, 1), 0} if count else ())]
    shared = work.shared_bytes(setting)
    return [phase._replace(working=phase.working + shared) for phase in found]


class _Layer(NamedTuple):
    """A decoder layer in a step, in bytes.

    Attributes:
        kind: the workload whose shape is its.
        kept: what it keeps until its backward, from its forward on or from its recomputation.
        stays: what it keeps until then even if it is recomputed.
    """

    kind: Workload
    kept: int
    stays: int


class _Step(NamedTuple):
    """A step under a setting, which recomputes its first layers. Layers are counted from 0.

    Attributes:
        tokens: of a pass, on one GPU.
        early: whether all gradients are there when backward begins.
    """

    work: Workload
    setting: Setting
    tokens: int
    layers: list[_Layer]
    early: bool

    @classmethod
    def of(cls, work: Workload, setting: Setting, several: bool) -> _Step:
        """Return the step of a workload; `several`: of several passes, whose gradients add up."""
        tokens = work.tokens_of(setting)
        tiled, layers = work.tiles(setting, tokens), []
        for count, kind in work.kinds:
            kept = kind.kept_bytes(tokens, tiled)
            layers += [_Layer(kind, kept, kind.kept_always(tokens, setting.offload))] * count
        first = setting.recomputed_layers
        layers[first:] = [
            layer._replace(kept=layer.kept + layer.kind.low_bytes(tokens))
            for layer in layers[first:]
        ]
        return cls(work, setting, tokens, layers, several or work.early_gradients)

    @property
    def single(self) -> int:
        """What waits for the backward of a recomputed layer: its input, and what attention returned
        where that is kept."""
        attention = self.work.attention_bytes(self.tokens) if self.setting.attention else 0
        return self.work.input_bytes(self.tokens) + attention

    @property
    def inputs(self) -> int:
        """That of all recomputed layers when backward begins."""
        count = self.setting.recomputed_layers
        if self.setting.offload:  # one that is fetched from CPU memory, and the next, under way
            count = min(count, 2)
        return count * self.single

    @property
    def seeing(self) -> int:
        """What an adapted tower keeps."""
        return self.work.seeing_bytes(self.setting)

    def stays(self, layers: int) -> int:
        """What the first so many layers keep even if they are recomputed."""
        return sum(layer.stays for layer in self.layers[:layers])

    def gradients(self, layer: int) -> int:
        """The gradients that are there in the backward of a layer; of their number: before it."""
        come = 0 if self.early else layer
        return 4 * self.work.trained * (len(self.layers) - come) // len(self.layers)

    def before_backward(self, name: str, working: int, layer: int) -> Phase:
        """A phase in which all is there that layers keep; `layer`: whose gradients come next."""
        kept = sum(one.kept for one in self.layers[self.setting.recomputed_layers :])
        inputs = self.inputs + self.stays(len(self.layers))
        return Phase(name, inputs, kept + self.seeing, working, self.gradients(layer))

    def last_kept(self) -> Phase:
        """The backward of the first layer that is not recomputed."""
        at = self.setting.recomputed_layers
        kind, kept, _ = self.layers[at]
        working = kind.layer_bytes(self.tokens, self.setting)
        inputs = self.inputs + self.stays(at + 1)
        return Phase("last that is kept", inputs, kept + self.seeing, working, self.gradients(at))

    def recomputed(self, at: int) -> Phase:
        """The backward of a layer that is recomputed."""
        (kind, kept, _), tokens = self.layers[at], self.tokens
        working, single = kind.layer_bytes(tokens, self.setting), self.single
        if not self.setting.offload:
            working += kind.recompute_bytes(tokens) + kind.product_bytes(tokens)
        inputs = min(self.inputs, (at + 1) * single) + self.stays(at + 1)
        kept += self.seeing - single
        return Phase("recomputed", inputs, kept, working, self.gradients(at))
