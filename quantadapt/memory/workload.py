"""Memory as a budget: what training will need, computed from the model's config alone.

Sizes are those that `torch.cuda.max_memory_allocated` counts; the CUDA context and what the
allocator loses between blocks are held in reserve where it is asked whether a card suffices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Self

from . import rules
from .cost import step_cost
from .passes import LENGTH_MULTIPLE, Passes, tile_of
from .phases import phases
from .setting import Setting, halves

_LONGEST = 24
"""No row has more than 2 to this power multiples of so many tokens."""


@dataclass(frozen=True)
class Workload(Passes):
    """What the memory of a training run depends on, and what it comes to."""

    def parts(self, setting: Setting) -> dict[str, int]:
        """Return the peak of a training step in bytes, by what takes it."""
        most = max(phases(self, setting), key=lambda phase: phase.total)
        return {
            "quantized": self.quantized_bytes,
            "gathered": self.gathered_bytes if self.gathered else 0,
            "dequantized": self.dequantized_bytes if self.keeps_dense else 0,
            "dense": self.dense_bytes + self.teacher_bytes,
            "adapter": self.adapter_bytes + most.gradients,
            "inputs": most.inputs,
            "activations": most.activations,
            "working": most.working,
        }

    def tokens_of(self, setting: Setting) -> int:
        """How many tokens a pass has on one GPU, padded."""
        return setting.micro_batch * self.sequences * self.row

    def layer_bytes(self, tokens: int, setting: Setting) -> int:
        """What the backward of a layer works with, what is gathered of a shared base included."""
        block = self._gathered_block
        ahead = block if self.prefetches else 0
        return max(self.working_bytes(tokens, setting) + block, 2 * block) + ahead

    def head_bytes(self, tokens: int) -> int:
        """What the loss works with, a gathered head included."""
        return self.loss_bytes(tokens) + self._gathered_table

    @property
    def early_gradients(self) -> bool:
        """Whether all gradients are there when backward reaches the first layer, see `Method`."""
        return self.method is not None and self.method.early_gradients

    def shared_bytes(self, setting: Setting) -> int:
        """What all layers share: sines and cosines of the positions in a row, and the masks of
        scores, which recomputed layers keep."""
        tokens, scores = self.tokens_of(setting), self.shape.scores
        positions = 2 * self.shape.head * self.dtype_bytes * tokens // setting.micro_batch
        if scores is None or not setting.recomputed_layers:
            return positions
        return positions + scores.masks(self.row) * tokens * self.dtype_bytes

    def seeing_bytes(self, setting: Setting) -> int:
        """What an adapted tower keeps of the pictures."""
        tower = self.tower
        return tower.kept_bytes(setting.micro_batch, self.dtype_bytes) if tower else 0

    def records(self, setting: Setting) -> bool:
        """Say whether passes can be recorded, see `cuda_graphs.can_record`."""
        alone = (self.shards == 1 or self.gathered) and self.streamed == "none"
        plain = self.fused_adapter and not self.dropout and not self._rounds_in_graph
        return self.graphs and plain and alone and not setting.offload

    def has_several(self, setting: Setting) -> bool:
        """Say whether a step has several passes."""
        return self.accumulates or setting.micro_batch < self.batch

    def peak(self, setting: Setting) -> int:
        """Return the most bytes that are allocated at a time."""
        return sum(self.parts(setting).values())

    def needed(self, setting: Setting) -> int:
        """Return how many bytes have to be free. Where passes are recorded as CUDA graphs what a
        step works with has to be there twice, see `cuda_graphs.Graphs`."""
        peak = self.peak(setting)
        there = (self.quantized_bytes, self.dense_bytes, self.teacher_bytes, self.adapter_bytes)
        held = sum(there) + (self.gathered_bytes if self.gathered else 0)
        held += self.dequantized_bytes if self.keeps_dense else 0
        return 2 * peak - held if self.records(setting) else peak

    def with_dense(self, setting: Setting, budget: int) -> Self:
        """Return the workload as a run has it that may keep its weights dense: it does where there
        is room beside `setting`."""
        alone = self.shards == 1 and self.streamed == "none"
        room = budget - self.needed(setting) if alone else 0
        return replace(self, keeps_dense=rules.stays_dense(self.dequantized_bytes, room))

    # --- what fits ---------------------------------------------------------------------------

    def fit(self, budget: int, least: int = 0) -> Setting | None:
        """Return the setting that stays within `budget` bytes and costs the least time."""
        found = self.fitted(budget, least)
        return None if found is None else found[1]

    def fitted(self, budget: int, least: int = 0) -> tuple[Self, Setting] | None:
        """Return that setting, and the workload as it is then: passes are recorded where that fits,
        too.

        Args:
            least: bytes for settings that keep inputs in CPU memory, where those are more.
        """
        eager = replace(self, graphs=False)
        ways = (self, eager) if self.graphs else (self,)
        both = sorted(product(ways, self.settings()), key=lambda pair: step_cost(*pair))
        most = {False: budget, True: max(budget, least)}
        return next(((work, s) for work, s in both if work.needed(s) <= most[s.offload]), None)

    def settings(self) -> list[Setting]:
        """Return all settings: the largest micro-batches and the least recomputation first."""
        sizes = halves(self.batch) if self.splits else [self.batch]
        most = self.shape.layers - 1
        found: list[Setting] = []
        for size in sizes:
            found += (Setting(count, False, size) for count in range(most + 1))
            if self.keeps_attention:
                found += (Setting(count, False, size, True) for count in range(1, most + 1))
                found += filter(self._has_host_room, [Setting(most + 1, True, size, True)])
            if most:  # the last layer's activations would be there beside the loss
                found.append(self.in_host_memory(Setting(most + 1, True, size)))
        return found

    def in_host_memory(self, setting: Setting) -> Setting:
        """Return `setting` with as many inputs in CPU memory as that has room for."""
        if not setting.offload or setting.attention:
            return setting
        every = rules.input_every(self.offloaded_bytes(setting), self._host_room)
        return replace(setting, input_every=every)

    @property
    def keeps_attention(self) -> bool:
        """Whether layers that are recomputed may keep what attention returned."""
        stock = not (self.shape.scores or self.packed) and self.contexts == 1
        return stock and rules.keeps_attention(self.row)

    def _has_host_room(self, setting: Setting) -> bool:
        return rules.has_host_room(self.offloaded_bytes(setting), self._host_room)

    @property
    def _host_room(self) -> int:
        """CPU memory that what is streamed and the process leave; 0 where that is not known."""
        left = self.host_free - self.host_bytes - rules.BESIDE
        return max(left, 1) if self.host_free else 0

    def longest(self, budget: int) -> int:
        """Return how many tokens a single example may have within `budget` bytes; 0 where not even
        a short one fits. A setting of `settings` is tried that needs the least memory of long
        rows, so that the run itself finds it."""

        def fits(multiples: int) -> bool:
            work = replace(self, batch=1, length=multiples * self._multiple)
            return work.peak(work.settings()[-1]) <= budget

        # Where tiles begin, a longer row may fit though a shorter one does not.
        tiles = 2 * tile_of(self.shape.hidden) // LENGTH_MULTIPLE + 1
        tried = (*(1 << power for power in range(_LONGEST)), tiles)
        low = max((count for count in tried if fits(count)), default=0)
        high = 1 << low.bit_length()
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * self._multiple

    def offloaded_bytes(self, setting: Setting) -> int:
        """Return the CPU memory that inputs of recomputed layers take, and what attention returned
        in them."""
        tokens = self.tokens_of(setting)
        each = self.input_bytes(tokens)
        each += self.attention_bytes(tokens) if setting.attention else 0
        count = -(-setting.recomputed_layers // setting.input_every)
        return count * each if setting.offload else 0

    def least(self) -> Setting:
        """Return the setting that needs the least memory."""
        return min(self.settings(), key=self.peak)
