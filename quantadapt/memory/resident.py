"""What is in a GPU's memory all the time while it trains: the model, the adapter, its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from . import rules
from .adapters import Layer, Method, Size
from .experts import STACKS
from .optimizers import between_passes
from .shape import Shape
from .towers import Tower

SLOTS = 2
"""For so many decoder layers of a streamed base a GPU has room: the one that computes, the next."""


@dataclass(frozen=True)
class Resident:
    """All that the memory of a training run depends on, and what of it is there all the time.

    Attributes:
        shape: the model's sizes.
        bits: bits per weight of each linear layer, by the names in `shape.linears`.
        targets: names of the linear layers that get an adapter.
        rank: of a LoRA; 0 where nothing of the kind is trained.
        optim: transformers' name of the optimizer.
        dtype_bytes: of the compute dtype.
        batch, length: examples per step and tokens per example.
        dropout: whether the adapter has one.
        fused_adapter: whether it is plain LoRA or DoRA, which keep their input alone.
        dora: whether it is DoRA.
        fused_kernels: whether Liger's kernels run.
        splits: whether a batch can be split.
        accumulates: whether gradients of several passes add up in a step.
        dense: names of the linear layers that are left as they are.
        shards: so many GPUs share the base; `sharding` says how.
        shardable: whether several GPUs may share it.
        prefetches: whether a layer of a shared base is gathered while the one before it works.
        gathered: whether a shared base is whole on each GPU while it trains, beside the GPU's
            share of it.
        keeps_dense: whether dequantized weights stay while it trains.
        graphs: whether passes are recorded as CUDA graphs, where they can be.
        streamed: what of the quantized layers lies in CPU memory: "none", "experts" or "all".
        streamable: whether anything of them may.
        from_disk: whether what is streamed lies on a disk instead.
        sequences: how many an example sends through the model.
        whole_logits: whether the loss holds all logits of a batch in float32.
        made_logits: whether the model makes all of them, of which ours takes chunks.
        teacher: the sizes of a dense model that the loss compares with, whole on each GPU.
        beside: how many dense weights the model has beside its language model: what sees pictures.
        others: (weights, bits of each) of the quantized layers beside those of the decoder's
            layers: of towers, and of the head.
        packs_head: whether the head is among them.
        tower: what sees pictures, where it is adapted, too.
        rounds: whether adapted layers compute with the rounded weights that a merge keeps.
        float8: whether products with the base are in 8-bit floats.
        packed: whether a row may hold several examples.
        contexts: so many GPUs share each example, a part of its tokens each.
        in_parts: whether stacks of experts can be dequantized in parts.
        row_shares: how many could.
        method: the adapter's, with its options; None of a LoRA of `rank`.
        also: layers beside the decoder's that get an adapter: embedding, head, those of towers.
        whole: how many weights of copied modules are trained, in the compute dtype; exactly
            while the optimizer works.
        keeps_casts: whether a fused adapter is there in the compute dtype, too.
        host_free: bytes of CPU memory that are known to be free.
    """

    shape: Shape
    bits: Mapping[str, float]
    targets: tuple[str, ...]
    rank: int
    optim: str
    dtype_bytes: int
    batch: int
    length: int
    dropout: bool = False
    fused_adapter: bool = True
    dora: bool = False
    fused_kernels: bool = True
    splits: bool = True
    accumulates: bool = False
    dense: tuple[str, ...] = ()
    shards: int = 1
    shardable: bool = True
    prefetches: bool = True
    gathered: bool = False
    keeps_dense: bool = False
    graphs: bool = False
    streamed: str = "none"
    streamable: bool = False
    from_disk: bool = False
    sequences: int = 1
    whole_logits: bool = False
    made_logits: bool = False
    teacher: Shape | None = None
    beside: int = 0
    others: tuple[tuple[int, float], ...] = ()
    packs_head: bool = False
    tower: Tower | None = None
    rounds: bool = False
    float8: bool = False
    packed: bool = False
    contexts: int = 1
    in_parts: bool = False
    row_shares: tuple[int, ...] = ()
    method: Method | None = None
    also: tuple[Layer, ...] = ()
    whole: int = 0
    keeps_casts: bool = True
    host_free: int = 0

    @property
    def quantized_bytes(self) -> int:
        """The linear layers of the decoder; of those that are quantized, one GPU's share, and of
        those that are streamed, the room for two layers. Quantized layers beside them are whole."""
        there = sum(
            count * (work._whole + (work._shared - work._streamed) // self.shards)
            for count, work in self.kinds
        )
        others = sum(int(weights * bits / 8) for weights, bits in self.others)
        return there + others + SLOTS * max(work._streamed for _, work in self.kinds)

    @property
    def checkpoint_bytes(self) -> int:
        """What the quantized base takes on a disk: all of it, wherever it is in memory."""
        whole = replace(self, shards=1, streamed="none")
        return whole.quantized_bytes + whole.dense_bytes

    @property
    def host_bytes(self) -> int:
        """What of the quantized layers lies in CPU memory; of those on a disk, the largest one."""
        if self.from_disk:
            return max(work._streamed for _, work in self.kinds)
        return self.streamed_bytes

    @property
    def streamed_bytes(self) -> int:
        """What of the quantized layers is streamed."""
        return sum(count * work._streamed for count, work in self.kinds)

    @property
    def kinds(self) -> list[tuple[int, Self]]:
        """How many decoder layers are of one kind, and the workload whose shape is theirs: in a
        mixture of experts the first ones may have none. This workload is the last."""
        plain = self.shape.plain_layers
        of_plain = [(plain, replace(self, shape=self.shape.of_plain_layers))] if plain else []
        return [*of_plain, (self.shape.layers - plain, self)]

    @property
    def block_bytes(self) -> int:
        """The quantized layers of one decoder layer, whole; of the largest one."""
        return max(work._shared for _, work in self.kinds)

    @property
    def _shared(self) -> int:
        return sum(self._linear_bytes(n) for n in self.shape.linears if n not in self.dense)

    @property
    def _streamed(self) -> int:
        """Of `_shared`, what is streamed."""
        if self.streamed != "experts":
            return self._shared if self.streamed == "all" else 0
        stacks = (n for n in STACKS if n in self.shape.linears and n not in self.dense)
        return sum(self._linear_bytes(name) for name in stacks)

    @property
    def _whole(self) -> int:
        return sum(self._linear_bytes(n) for n in self.shape.linears if n in self.dense)

    def _linear_bytes(self, name: str) -> int:
        inputs, outputs = self.shape.linears[name]
        return int(inputs * outputs * self.bits[name] / 8)

    @property
    def table_bytes(self) -> int:
        """The embedding, which is as large as the head."""
        return self.shape.vocab * self.shape.hidden * self.dtype_bytes

    @property
    def dense_bytes(self) -> int:
        """Embedding, head, norms and routers, and what the model has beside its language model, as
        far as it is not quantized. A head that is the embedding is not shared with other GPUs."""
        shape = self.shape
        tables = self.table_bytes if shape.tied else self._tables * self.table_bytes // self.shards
        experts = shape.experts.count if shape.experts else 0
        rows = 2 * shape.layers + 1 + (shape.layers - shape.plain_layers) * experts
        return tables + (rows * shape.hidden + self.beside) * self.dtype_bytes

    @property
    def _tables(self) -> int:
        """How many matrices of an untied embedding and head are dense."""
        return 1 if self.packs_head else 2

    @property
    def gathered_bytes(self) -> int:
        """What a shared base takes where it stays gathered: all of it that is shared."""
        blocks = sum(count * work._shared for count, work in self.kinds)
        tables = 0 if self.shape.tied else self._tables * self.table_bytes
        return blocks + tables if self.shards > 1 else 0

    @property
    def dequantized_bytes(self) -> int:
        """What the dequantized weights take that may stay, see `facade.dense_weights`: all but
        those of experts, and of layers that are dense as they are."""
        sizes = [(count, work.shape.linears.items()) for count, work in self.kinds]
        whole = 8 * self.dtype_bytes
        beside = {*STACKS, *self.dense, *(n for n, bits in self.bits.items() if bits >= whole)}
        weights = (c * i * o for c, layers in sizes for n, (i, o) in layers if n not in beside)
        others = sum(weights for weights, bits in self.others if bits < whole)
        return (sum(weights) + others) * self.dtype_bytes

    def kept_in(self, room: int) -> Self:
        """Return the workload as a run finds it with so many bytes to allocate: a shared base stays
        gathered there, or does not."""
        model = self.quantized_bytes + self.dense_bytes + self.teacher_bytes + self.held_bytes
        ample = rules.stays_gathered(self.gathered_bytes, room - model)
        return replace(self, gathered=self.shards > 1 and self.prefetches and ample)

    @property
    def unquantized_bytes(self) -> int:
        """The whole base in the compute dtype."""
        sizes = [(count, work.shape.linears.values()) for count, work in self.kinds]
        weights = sum(count * sum(i * o for i, o in layers) for count, layers in sizes)
        weights += sum(others for others, _ in self.others)
        return weights * self.dtype_bytes + replace(self, shards=1).dense_bytes

    @property
    def teacher_bytes(self) -> int:
        """The teacher, in the compute dtype."""
        if self.teacher is None:
            return 0
        return replace(self, shape=self.teacher, others=(), packs_head=False).unquantized_bytes

    @cached_property
    def adapter(self) -> Size:
        """What is trained, and what the adapter holds beside it."""
        layers = self._adapted_layers
        return self._method.size([*layers, *self.also], self.dtype_bytes)

    @property
    def _method(self) -> Method:
        return self.method or Method("LORA", {"r": self.rank, "use_dora": self.dora})

    @property
    def _adapted_layers(self) -> list[Layer]:
        return [layer for count, work in self.kinds for layer in work._adapted(count)]

    @property
    def casts_bytes(self) -> int:
        """A and B of fused layers as products want them, from step to step."""
        if not (self.keeps_casts and self.fused_adapter and self.dtype_bytes < 4):
            return 0
        fused = [layer for layer in self._adapted_layers if layer.name not in STACKS]
        return self.dtype_bytes * self._method.size(fused, self.dtype_bytes).trained

    def _adapted(self, count: int) -> list[Layer]:
        """Return the layers of `count` equal decoder layers that are adapted."""
        shape = self.shape
        sizes = {name: shape.linears[name] for name in self.targets if name in shape.linears}
        return [Layer(n, i, o, shape.stacked(n), count) for n, (i, o) in sizes.items()]

    @property
    def trained(self) -> int:
        """How many weights are trained."""
        return self.adapter.trained

    @property
    def held_bytes(self) -> int:
        """The adapter as it is when nothing is done with it, and what is trained whole."""
        trained, fixed = self.adapter
        return 4 * trained + fixed + self.whole * self.dtype_bytes

    @property
    def adapter_bytes(self) -> int:
        """The adapter, and what a step keeps beside it and its gradients; those of what is trained
        whole, too."""
        kept = between_passes(self.trained, self.optim, accumulates=self.accumulates)
        kept += self.method.importances * self.trained if self.method else 0
        whole = between_passes(self.whole, self.optim, accumulates=self.accumulates)
        whole += self.dtype_bytes * self.whole
        if self.dtype_bytes < 4:  # `training.exact_weights`: weights and gradients, exactly
            whole += 8 * self.whole
        return self.held_bytes + self.casts_bytes + kept + whole
