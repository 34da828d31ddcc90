"""What a pass through a model keeps and works with, in a layer and at the head, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from .experts import STACKS
from .resident import Resident
from .setting import Setting
from .shape import head_groups

HEAD_CHUNK = 2**27
"""Logits that are there at a time while the loss is computed, in bytes (see `model.head`)."""
DIVERGENCE_CHUNK = 2**26
"""Logits of a student that are there at a time in float32, in bytes (see `model.divergence`)."""
FACTORS_FROM = 2
"""With so many tokens to a rank VeRA and AdaLoRA make factors, which then take no more memory than
PEFT's copies of the inputs (see `adapting.low_rank`)."""
RANKS = 8
"""Of so many ranks LoRA on experts takes a multiple."""
LENGTH_MULTIPLE = 64
"""On CUDA, examples are padded to a multiple of so many tokens: cuDNN plans attention for each
length."""
LEAST_TILE = 1024
"""Tokens of which smaller models do not make fewer tiles than they are worth."""
HEAD = "lm_head"
"""What the head is called among the layers that are adapted beside the decoder's."""
GATE_UP = "gate_up_proj"
"""What one layer for gate and up is called, as `Shape` has it."""
MLP = ("gate_proj", "up_proj", GATE_UP, "down_proj")
"""The linear layers of an MLP, as `Shape` calls them."""


@dataclass(frozen=True)
class Passes(Resident):
    """What comes and goes in a pass, beside what is there all the time."""

    @property
    def row(self) -> int:
        """How many tokens of a row are on one GPU, padded."""
        return -(-self.length // self._multiple) * LENGTH_MULTIPLE

    @property
    def _multiple(self) -> int:
        """What the length of a row is padded to a multiple of."""
        return LENGTH_MULTIPLE * self.contexts

    def tiles(self, setting: Setting, tokens: int) -> bool:
        """Say whether so many tokens go through MLPs in tiles, see `training.tiling`."""
        long = tokens > 2 * tile_of(self.shape.hidden)
        draws = self.dropout and bool({*MLP} & {*self.targets})
        return setting.offload and long and not draws and not self.shape.experts

    def kept_bytes(self, tokens: int, tiled: bool = False) -> int:
        """What one layer that is not recomputed keeps until its backward.

        Args:
            tiled: whether its MLP keeps its input alone.
        """
        shape, half = self.shape, self.dtype_bytes == 2
        numbers: float = shape.kept(self.fused_kernels, half)
        if shape.scores:
            numbers += shape.scores.kept(self.row, half)
        layers = [name for name in self.targets if name in shape.linears and name not in STACKS]
        inputs = sum(shape.linears[name][0] for name in layers)
        if self.dropout:  # each adapter sees its own, and keeps a mask
            numbers += inputs * (1 + 1 / self.dtype_bytes)
        if self._scales:
            numbers += self._scaled_numbers
        elif half and not self._fuses(tokens):  # PEFT keeps a float32 copy of each input
            numbers += 2 * inputs
        if tiled:  # attention of several groups of heads is put together in a copy
            numbers += (shape.queries if self._groups > 1 else 0) - self._kept_inside
        kept = int(numbers * tokens * self.dtype_bytes) + self._kept_by_experts(tokens)
        if not shape.scores:  # by attention, of each head's scores
            kept += 4 * tokens * (shape.queries // shape.head)
        kept += tokens * shape.masks(self.fused_kernels, tiled)
        if self.method and self._makes_factors(tokens):
            kept += self.method.factor_bytes(self._adapted(1), self.dtype_bytes)
        return kept + (self._rounded_bytes if self._rounds_in_graph else 0)

    def low_bytes(self, tokens: int) -> int:
        """What the adapters of one layer that is not recomputed keep beside: x Aᵀ."""
        if not self.fused_adapter or self._method.kind != "LORA" or self.rounds or self.dora:
            return 0
        adapted = {name for name in self.targets if name in self.shape.linears} - {*STACKS}
        return sum(map(self._method.rank, adapted)) * tokens * self.dtype_bytes

    def _fuses(self, tokens: int) -> bool:
        """Whether the adapter is computed as plain LoRA is, so that its layers keep their input
        alone, or what they scale."""
        return self.fused_adapter or self._makes_factors(tokens) or self._scales

    @property
    def _scales(self) -> bool:
        return self.method is not None and self.method.scales and not self.rounds

    @property
    def _scaled_numbers(self) -> int:
        """How many numbers per token a layer keeps of what is scaled, beside what it keeps anyway:
        outputs of the base, or inputs, which else nobody has but attention's output."""
        assert self.method is not None
        shape, numbers = self.shape, 0
        fed = {name for name in self.targets if self.method.scaled_input(name)}
        for name in self.targets:
            if name in shape.linears and name not in STACKS and name not in fed:
                numbers += shape.linears[name][1]
        last = {name.rpartition(".")[2] for name in fed}
        numbers -= 0 if last & {"q_proj", "k_proj", "v_proj", shape.qkv} else shape.hidden
        numbers -= 0 if last & {"gate_proj", "up_proj", GATE_UP} else shape.hidden
        return numbers - (0 if "down_proj" in last else shape.mlp)

    @property
    def _scales_inside(self) -> bool:
        """Whether what comes into an MLP's product of gate and up is scaled after it is made."""
        method, made = self.method, {"gate_proj", "up_proj", GATE_UP} & set(self.targets)
        if method is None or not self._scales:
            return False
        return any(not method.scaled_input(name) for name in made)

    def _makes_factors(self, tokens: int) -> bool:
        ranks = self.method.factors if self.method and not self.rounds else 0
        return 0 < FACTORS_FROM * ranks <= tokens

    @property
    def _rounds_in_graph(self) -> bool:
        """Whether what is rounded waits for its backward: only a fused LoRA makes it again."""
        return self.rounds and (self.dora or self.dropout or not self.fused_adapter)

    @property
    def _rounded_bytes(self) -> int:
        """The rounded weights of one layer, of stacks of experts in float32."""
        sizes = {name: i * o for name, (i, o) in self.shape.linears.items() if name in self.targets}
        each = (n * (4 if name in STACKS else self.dtype_bytes) for name, n in sizes.items())
        return sum(each)

    @property
    def _rounding_bytes(self) -> int:
        """What rounding the largest adapted weight takes beside the result: the weight that it was
        and what is added to it, in float32; and where PEFT merges, what it makes of them."""
        adapted = [i * o for name, (i, o) in self.shape.linears.items() if name in self.targets]
        if not self.rounds or not adapted:
            return 0
        return max(adapted) * (16 if self._rounds_in_graph else 8)

    def kept_always(self, tokens: int, offload: bool) -> int:
        """What a layer keeps until its backward even if it is recomputed: what the A of a LoRA on
        experts makes of each row, and the norms of a DoRA, in float32."""
        experts, adapted = self.shape.experts, set(STACKS) & set(self.targets)
        plain = not (self.rounds or set(STACKS) & set(self.dense))
        if experts is None or not plain or not adapted:
            return 0
        norms = 4 * experts.norms(self.shape.hidden) if self.dora else 0
        if offload or self.streamed != "none":
            return norms
        ranks = -(-self.rank // RANKS) * RANKS
        return norms + len(adapted) * tokens * experts.chosen * ranks * self.dtype_bytes

    def _kept_by_experts(self, tokens: int) -> int:
        experts, hidden = self.shape.experts, self.shape.hidden
        if experts is None:
            return 0
        numbers = 0
        if set(STACKS) <= set(self.dense):
            adapted = bool(set(STACKS) & set(self.targets))
            numbers = experts.dense_numbers(tokens, hidden, adapted=adapted)
        return experts.kept_bytes(tokens) + numbers * self.dtype_bytes

    def attention_bytes(self, tokens: int) -> int:
        """What attention returns in a layer, and each head's sums, in float32."""
        heads = self.shape.queries // self.shape.head
        return tokens * (self.shape.queries * self.dtype_bytes + 4 * heads)

    def input_bytes(self, tokens: int) -> int:
        """The input of a layer."""
        return tokens * self.shape.hidden * self.dtype_bytes

    def working_bytes(self, tokens: int, setting: Setting) -> int:
        """What a layer's backward works with beside what it keeps. Where its MLP is tiled that is
        in the MLP, or in attention, when what the MLP kept is gone."""
        tiled, scores = self.tiles(setting, tokens), self._scores_backward(tokens)
        if not tiled:
            inside = self._kept_inside * tokens * self.dtype_bytes
            return max(self.backward_bytes(tokens, setting.offload), scores - inside)
        shape = self.shape
        # Inputs of the second norm and of the MLP are gone then, and what was put together.
        per_token = shape.attention_backward(self._groups) - shape.hidden
        per_token -= shape.queries if self._groups > 1 else 0
        numbers = tokens * per_token + self._largest_weight
        return max(self.tiled_mlp_bytes(tokens), numbers * self.dtype_bytes, scores)

    def _scores_backward(self, tokens: int) -> int:
        """What the backward of attention works with where it makes scores: beside theirs, the
        gradients of the residual, of what it returns and of values. What the norms behind it kept
        is gone then, and the input of the MLP."""
        shape, half = self.shape, self.dtype_bytes == 2
        if not shape.scores:
            return 0
        copied = half and shape.squares and not self.fused_kernels
        gone = (1 + shape.norms // 2 * (2 if copied else 1)) * shape.hidden
        others = shape.hidden + 2 * shape.queries - gone
        return tokens * (shape.scores.backward(self.row, half) + others) * self.dtype_bytes

    @property
    def _groups(self) -> int:
        """In how many groups of heads attention goes through a long row."""
        return 1 if self.packed or self.contexts > 1 else head_groups(self.shape.key_heads)

    def tiled_mlp_bytes(self, tokens: int) -> int:
        """What the backward of a tiled MLP works with: the gradients of its output and input, and
        all that one tile keeps and works with but for those."""
        tile = tile_of(self.shape.hidden)
        in_tile = self._kept_inside * tile * self.dtype_bytes + self.backward_bytes(tile)
        return 2 * self.input_bytes(tokens) + in_tile - self.input_bytes(tile)

    @property
    def _kept_inside(self) -> int:
        """How many numbers per token are kept inside an MLP that can be tiled."""
        shape, names = self.shape, {*MLP} & {*self.targets}
        inputs = sum(shape.linears[name][0] for name in names if name in shape.linears)
        copied = self.dtype_bytes == 2 and not self._fuses(tile_of(shape.hidden))
        return shape.kept_inside(self.fused_kernels) + (2 * inputs if copied else 0)

    def backward_bytes(self, tokens: int, offload: bool = False) -> int:
        """What a layer's backward works with: gradients and a dequantized weight, and where it is
        rounded what that takes. With `offload` experts are dequantized in parts."""
        shape = self.shape
        inside = (0 if self.fused_kernels else 2) + (0 if self._fuses(tokens) else 1)
        if self._scales_inside:  # Liger's gradients lie where its inputs were, IA3's nowhere yet
            inside = max(inside, 1)
        if not shape.gated:  # Liger has no kernels for what has no gate
            inside = max(inside, shape.activation.gradients)
        # DoRA's product with the base, and its gradient after it, take the place of inputs.
        gradients = shape.hidden + shape.mlp * inside
        numbers = tokens * gradients + self._largest_weight
        if shape.gate_up:
            numbers = self._backward_of_one(tokens, inside)
        if shape.experts:  # the gradients of their output and of their input
            parts = self.part_of(offload)
            dora = self.dora and bool(set(STACKS) & set(self.targets))
            inside = shape.experts.backward_numbers(tokens, shape.hidden, parts, dora=dora)
            numbers = max(numbers, tokens * 2 * shape.hidden + inside)
        # What codes a gradient has, and a product that is added to another; codes of a weight and
        # of its transpose take as much as the weight.
        codes = tokens * (shape.mlp + shape.hidden * self.dtype_bytes) if self.float8 else 0
        return numbers * self.dtype_bytes + codes + self._rounding_bytes

    def _backward_of_one(self, tokens: int, inside: int) -> int:
        """How many numbers that is where gate and up are one layer: in the product of down; or in
        that with the weight of both, when what came into down is gone. Liger copies both, and what
        they were made as is there until down has been computed; that is recomputed, too, where its
        output is normed."""
        shape = self.shape
        alone, both = tokens * shape.hidden, shape.hidden * 2 * shape.mlp
        others = max(n for n in self._weights if n != both)
        again = alone + self._copied_by_liger(tokens)
        return max(
            alone + tokens * shape.mlp * inside + others,
            alone + tokens * shape.mlp * (inside - 1) + both,
            again + (shape.mlp * shape.hidden if shape.sandwiched else 0),
        )

    def _copied_by_liger(self, tokens: int) -> int:
        return tokens * 2 * self.shape.mlp if self.shape.gate_up and self.fused_kernels else 0

    def forward_bytes(self, tokens: int) -> int:
        """What the forward pass of a layer works with where Liger copies gate and up; else less
        than the backward does, so 0."""
        copied, weight = self._copied_by_liger(tokens), self.shape.mlp * self.shape.hidden
        return (copied + tokens * self.shape.hidden + weight) * self.dtype_bytes if copied else 0

    def part_of(self, offload: bool) -> int:
        """The bytes of a number where stacks of experts are dequantized in parts: where inputs
        leave for CPU memory, or the base is streamed."""
        adapted = set(STACKS) & set(self.targets)
        whole = not self.in_parts or self.shards > 1 or (adapted and self.rounds)
        short = offload or self.streamed != "none"
        return 0 if whole or not short else self.dtype_bytes

    @property
    def _largest_weight(self) -> int:
        """Of the layers beside stacks of experts."""
        return max(self._weights)

    @property
    def _weights(self) -> list[int]:
        return [i * o for name, (i, o) in self.shape.linears.items() if name not in STACKS]

    def recompute_bytes(self, tokens: int) -> int:
        """The weights that a recomputation keeps for the backward that follows: those that are
        smaller than their input. The last matrix product is not computed again, or needs its
        weight at once."""
        *others, _ = self.shape.linears.items()
        sizes = (size for name, size in others if name not in STACKS)
        each = 1 if self.float8 and not self.dora else self.dtype_bytes
        return sum(i * o * each for i, o in sizes if o * each < tokens * self.dtype_bytes)

    def product_bytes(self, tokens: int) -> int:
        """The outputs of the base that a recomputation keeps, too, for DoRA's backward."""
        *others, _ = self.shape.linears.items()
        layers = [(name, size) for name, size in others if name not in STACKS]
        outputs = sum(size[1] for name, size in layers if name in self.targets)
        return outputs * tokens * self.dtype_bytes if self.dora else 0

    def loss_bytes(self, tokens: int) -> int:
        """What the loss works with: logits, what the last norm gets and gives, the hidden states
        that count, and their gradient. Logits are a chunk, or all of them with their gradient and a
        chunk, or all in float32, with their logarithms and gradients; in 16 bits PEFT adds what an
        adapter of the head makes, in float32, to what the head does."""
        logits = tokens * self.shape.vocab
        held = min(logits * self.dtype_bytes, HEAD_CHUNK)
        if self.made_logits:
            held += 2 * logits * self.dtype_bytes
        if self.whole_logits:
            adapted = any(layer.name == HEAD for layer in self.also)
            held = (14 if adapted and self.dtype_bytes == 2 else 12) * logits
        if self.teacher is not None:  # logits of both, their logarithms, and what is made of them
            held = 8 * min(4 * logits, DIVERGENCE_CHUNK)
            held += 2 * tokens * self.teacher.hidden * self.dtype_bytes
        copied = self.dtype_bytes == 2 and not self.fused_kernels  # by the norm, in float32
        return held + (5 if copied else 4) * self.input_bytes(tokens)

    def evaluation_bytes(self, examples: int) -> int:
        """What evaluating so many examples at a time needs beside the model: inside a layer, or
        for the logits, of which a chunk is there at a time unless the model scales them."""
        shape, tokens = self.shape, examples * self.length
        inside = tokens * (2 * shape.hidden + (3 if shape.gated else 2) * shape.mlp)
        inside += self._largest_weight
        if shape.experts:
            parts = self.part_of(offload=False)
            in_experts = shape.experts.forward_numbers(tokens, shape.hidden, parts)
            inside = max(inside, tokens * 2 * shape.hidden + in_experts)
        if shape.scores:
            in_attention = 2 * shape.hidden + shape.scores.forward(
                self.length, self.dtype_bytes == 2
            )
            inside = max(inside, tokens * in_attention)
        logits = tokens * shape.vocab * self.dtype_bytes
        logits = 2 * logits if shape.scaled else min(logits, HEAD_CHUNK)
        # a block, and the next one, as it comes and in its place
        in_layer = inside * self.dtype_bytes + self._rounding_bytes + 3 * self._gathered_block
        at_head = logits + 2 * self.input_bytes(tokens) + self._gathered_table
        return max(in_layer, at_head)

    @property
    def _gathered_block(self) -> int:
        """One layer of a sharded base, whole."""
        return self.block_bytes if self.shards > 1 and not self.gathered else 0

    @property
    def _gathered_table(self) -> int:
        """Embedding or head of a sharded base, whole."""
        comes = self.shards > 1 and not self.gathered and not self.shape.tied
        return self.table_bytes if comes else 0


def tile_of(hidden: int) -> int:
    """Return how many tokens go through an MLP at a time where inputs are offloaded, if there are
    more than two tiles of them: so many that what is inside is about as large as its weights."""
    return max(hidden, LEAST_TILE)
