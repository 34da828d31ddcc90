"""AdaLoRA's rank budget: its schedule, its updates, and what a checkpoint has to keep of it.

PEFT wants `update_and_allocate` called at each optimizer step, which Trainer does not do, and
its adapter file lacks what a resumed run needs. https://arxiv.org/abs/2303.10512
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..dependencies import moved

ADALORA_FILE = "adalora.pt"
_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def tuner_of(model: Any) -> Any:
    """Return the tuner that allocates ranks, or None for every other method. Raises TrainingError
    where it is AdaLoRA's and cannot."""
    configs = getattr(model, "peft_config", {})
    if not any(config.peft_type == "ADALORA" for config in configs.values()):
        return None
    if not hasattr(model.base_model, "update_and_allocate"):
        what = "has no update_and_allocate in its AdaLoRA"
        raise moved(("peft",), what, "all directions would keep the rank that they begin with")
    return model.base_model


def set_schedule(tuner: Any, total: int) -> None:
    """Fit the schedule to the real number of steps; keep tinit and tfinal where they fit."""
    config = tuner.peft_config[tuner.trainable_adapter_name]
    config.total_step = total
    if not (config.tinit < total - config.tfinal and total - config.tfinal >= 2):
        config.tinit, config.tfinal = total // 10, total // 4


def allocate_ranks(tuner: Any, step: int) -> None:
    """Update importances and ranks; the gradients of `step` are still there."""
    config = tuner.peft_config[tuner.trainable_adapter_name]
    if _prunes(tuner) and config.total_step - config.tfinal >= 2:
        tuner.update_and_allocate(step)


def _prunes(tuner: Any) -> bool:
    return bool(tuner.rankallocator.init_bgt > tuner.rankallocator.target_bgt)


def bytes_to_come(model: Any) -> int:
    """Return what importances will take, which come with the first step: `Method.importances`."""
    tuner = tuner_of(model)
    if tuner is None or not _prunes(tuner) or tuner.rankallocator.ipt:
        return 0
    trained = (p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    # Of what is trained in 16 bits they are of what the optimizer sees, in float32.
    counts = [int(p.numel()) * max(int(p.element_size()), 4) for p in trained]
    return len(_IMPORTANCES) * sum(counts)


def save_ranks(model: Any, folder: Path) -> None:
    """Save what PEFT's adapter file lacks: the pruned directions and the importances."""
    tuner = tuner_of(model)
    if tuner is None:
        return
    import torch

    allocator = tuner.rankallocator
    state = {
        "parameters": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
        "rank_pattern": tuner.peft_config[tuner.trainable_adapter_name].rank_pattern,
        "importance": {name: getattr(allocator, name) for name in _IMPORTANCES},
    }
    torch.save(state, folder / ADALORA_FILE)


def load_ranks(model: Any, folder: Path) -> bool:
    """Load what `save_ranks` saved; say whether this is AdaLoRA."""
    tuner = tuner_of(model)
    if tuner is None:
        return False
    import torch

    device = next(p.device for p in model.parameters() if p.requires_grad)
    state = torch.load(folder / ADALORA_FILE, map_location=device, weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = state["rank_pattern"]
    for name in _IMPORTANCES:
        setattr(tuner.rankallocator, name, state["importance"][name])
    return True
