"""How well tokens were chosen: other kernels round otherwise, and turn ties the other way."""

from __future__ import annotations

from typing import Any

import torch


def shortfall(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Return by how much the logit of a token in `tokens` lies below the best one's at most, where
    `model` reads all of them at once after `prompt`; in standard deviations of the logits."""
    ids = torch.tensor([[*prompt, *tokens]], device=next(model.parameters()).device)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float(((logits.max(-1).values - chosen) / logits.std(-1)).max())
