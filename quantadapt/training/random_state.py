"""Where the generators of random numbers stand, so that the same ones can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """That of torch's own generators, on the CPU and on one GPU."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """Return where they stand now."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def is_now(self) -> bool:
        """Say whether nothing was drawn since."""
        now = RandomState.of(self.device)
        same = self.cuda is None or now.cuda is None or torch.equal(self.cuda, now.cuda)
        return same and torch.equal(self.cpu, now.cpu)

    def put_back(self) -> None:
        """Draw on from there."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
