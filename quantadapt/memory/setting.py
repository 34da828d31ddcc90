"""How a training step trades time for memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a training step trades time for memory.

    Attributes:
        recomputed_layers: so many layers, counted from the first, are computed again in backward.
        offload: whether the inputs of those live in CPU memory from forward to backward, and long
            rows go through MLPs in tiles.
        micro_batch: examples per forward pass; a batch is split into so large parts.
        attention: whether what attention returned in recomputed layers is kept, so that it is not
            computed again; with `offload` in CPU memory.
        input_every: with `offload`, so many layers share one input that waits in CPU memory: 1, or
            2, where that of the second is made again from the first.
    """

    recomputed_layers: int
    offload: bool
    micro_batch: int
    attention: bool = False
    input_every: int = 1

    def describe(self, layers: int, batch: int) -> str:
        """Return it in words, for a model of so many layers and batches of so many examples."""
        count = self.recomputed_layers
        words = f"{count} of {layers} layers recomputed" if count else "no layer recomputed"
        if count and self.attention:
            words += " but for attention"
        if self.offload:
            which = "their inputs" if self.input_every == 1 else "the input of every second one"
            words += f", {which} in CPU memory"
        if self.micro_batch < batch:
            words += f", micro-batches of {self.micro_batch}"
        return words


def halves(batch: int) -> list[int]:
    """Return the sizes of micro-batches: `batch`, half of it, and so on down to 1."""
    return [batch >> shift for shift in range(batch.bit_length())]
