"""Nothing has to be free on a card for what was learnt to be saved: all of it is copied to the CPU
first, and what PEFT does with it is done there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parameters import slow_but
from peft.utils import get_peft_model_state_dict
from processes import in_processes
from test_memory_fit import Notes
from test_rescue import FULL, fails_from
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quantadapt as qa
from quantadapt.adapting.several import weights_to_save
from quantadapt.errors import TrainingError
from quantadapt.exporting.adapters import save_adapters
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model
from quantadapt.training import rescue, stage
from quantadapt.training.loop import TrainingLoop

ADAPTERS = [
    adapter.name
    for adapter in registry().adapters()
    if not any(rule.id == f"{adapter.name}-not-supported" for rule in adapter.rules)
]
OPTIONS: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 16, "num_vectors": 8, "topk": 2}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("dora", {"r": 2}),
    "adalora": ("adalora", {"init_r": 6, "target_r": 3}),
    "ia3": ("ia3", {}),
    "vera": ("vera", {"r": 4}),
    "vblora-topk": ("vblora", OPTIONS["vblora"] | {"save_only_topk_weights": True}),
    "whole": ("lora", {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "tokens": ("lora", {"r": 2, "trainable_token_indices": [3, 5]}),
    "bias": ("lora", {"r": 2, "bias": "all"}),
}


def attached(adapter: str, backend: str = "none", device: str = "cpu", **options: Any) -> Any:
    """The small model with an adapter that computes something."""
    base = qa.quantize(str(small_model()), backend, device=device)
    torch.manual_seed(0)
    model = qa.attach(base, adapter, **OPTIONS.get(adapter, {}) | options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.01 * torch.randn_like(weight))
    return model


def assert_as_peft_saves(model: Any) -> None:
    """Compare with what PEFT saves of the model as it stands."""
    expected = get_peft_model_state_dict(model)
    found = get_peft_model_state_dict(model, state_dict=weights_to_save(model))
    assert expected
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype
        # VBLoRA's top k are softmaxes, which a GPU rounds otherwise.
        exact = weight.device == expected[name].device
        close = torch.equal if exact else torch.allclose
        assert close(weight.cpu(), expected[name].cpu()), name


@pytest.mark.parametrize("adapter", slow_but(ADAPTERS, "lora", "adalora", "vera"))
def test_what_peft_is_handed_is_what_it_saves(adapter: str) -> None:
    assert_as_peft_saves(attached(adapter))


@pytest.mark.parametrize("case", slow_but(CASES, "adalora", "whole", "tokens"))
def test_so_it_is_with_other_things_that_are_trained(case: str) -> None:
    adapter, options = CASES[case]
    model = attached(adapter, "bnb-nf4", **options)
    if adapter == "adalora":  # as after pruning
        config = model.peft_config["default"]
        layers = [name for name, _ in model.named_parameters() if "lora_E" in name]
        names = [name.removeprefix("base_model.model.") for name in layers]
        config.rank_pattern = {name: [True, False, True, False, True, False] for name in names}
    assert_as_peft_saves(model)


class _Device(TorchDispatchMode):
    """Takes all tensors for a GPU's but what `Tensor.cpu` returns and what is made of that, or of
    nothing, and notes the operations that would make new ones there."""

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, Any] = {}
        self.made: list[str] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_storage(t): t for t in _tensors((args, kwargs))}
        new = [t for t in _tensors(result) if _storage(t) not in given]
        # Lists that index become tensors unseen, where the indexed one is.
        if all(key in self.host for key, t in given.items() if t.is_floating_point()):
            self.host |= {_storage(t): t.untyped_storage() for t in new}
        else:
            self.made += [str(function)] * len(new)
        return result


class _Factories(TorchFunctionMode):
    """Notes what is made where somebody says."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance((kwargs or {}).get("device"), torch.device):
            self.made.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def _tensors(found: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def device_watched() -> Iterator[list[str]]:
    """Yield what would be allocated on a GPU inside, if all were there that is on the CPU now."""
    factories, device = _Factories(), _Device()
    made: list[str] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        with torch._C._DisableTorchDispatch():
            copy = tensor.detach().clone()
        device.host[_storage(copy)] = copy.untyped_storage()
        return copy

    with patch.object(torch.Tensor, "cpu", cpu), factories, device:
        yield made
    made += device.made + factories.made


def test_the_watch_sees_what_is_made() -> None:
    weight = torch.ones(4)
    with device_watched() as made:
        weight.cpu().clone()
        torch.zeros(3)
        weight.view(2, 2).detach()
        float(weight[0])
    assert made == []
    with device_watched() as made:
        weight[[True, False, True, False]]
        torch.zeros(3, device=weight.device)
    assert set(made) == {"aten.index.Tensor", "zeros"}


@contextmanager
def rescue_watched() -> Iterator[list[str]]:
    """Yield what saving after a failed step would allocate on a GPU."""
    found: list[str] = []
    save = rescue.save_what_is_done

    def watched(*args: Any) -> None:
        with device_watched() as made:
            save(*args)
        found.extend(made)

    with patch.object(stage, "save_what_is_done", watched):
        yield found


STEPS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1}


@pytest.mark.parametrize("case", slow_but(["lora", *CASES], "lora", "adalora"))
def test_a_checkpoint_is_written_without_memory_on_the_device(case: str, tmp_path: Path) -> None:
    adapter, options = CASES.get(case, ("lora", {"r": 2}))
    model, notes = attached(adapter, "bnb-nf4", **options), Notes()
    with rescue_watched() as made, fails_from(3, FULL), pytest.raises(TrainingError):
        qa.train(model, output=tmp_path, on_note=notes, **STEPS)
    assert notes[-1] == "checkpoint-2 is saved, go on with --resume"
    assert made == []
    again = attached(adapter, "bnb-nf4", **options)
    assert qa.train(again, output=tmp_path, resume=True, **STEPS).resumed_from == 2


@pytest.mark.parametrize("case", slow_but(CASES, "adalora", "vblora-topk"))
def test_an_adapter_is_saved_without_memory_on_the_device(case: str, tmp_path: Path) -> None:
    adapter, options = CASES[case]
    model = attached(adapter, "bnb-nf4", **options)
    with device_watched() as made:
        save_adapters(model, tmp_path)
    assert made == []
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0


def test_what_the_failed_step_holds_is_let_go_of(tmp_path: Path) -> None:
    """What its frames hold, also those of an error that it was raised after, and gradients."""
    model = attached("lora", r=2)
    held: list[Any] = []
    seen: list[Any] = []
    save = TrainingLoop._save_checkpoint

    def fail(*_: Any) -> None:
        local = torch.ones(3)
        held.append(weakref.ref(local))
        if len(held) > 4:  # two passes of two batches
            try:
                raise FULL
            except torch.OutOfMemoryError:
                other = torch.ones(3)
                held.append(weakref.ref(other))
                raise torch.OutOfMemoryError("CUDA out of memory, again") from None

    def saving(self: Any, *args: Any) -> None:
        seen.append([ref() is None for ref in held])
        seen.append([w.grad is None for w in model.parameters() if w.requires_grad])
        save(self, *args)

    model.get_base_model().model.layers[-1].register_forward_hook(fail)
    with patch.object(TrainingLoop, "_save_checkpoint", saving), pytest.raises(TrainingError):
        qa.train(model, output=tmp_path, gradient_accumulation_steps=2, **STEPS)
    assert len(seen) == 2
    assert all(seen[0])
    assert all(seen[1])


def launched(folder: str, own: bool) -> tuple[list[str], bool, int]:
    """Let a step fail where a launcher started this process alone, and processes cannot talk."""
    if own:  # a program of its own may have asked accelerate before
        from accelerate import PartialState

        PartialState(cpu=True)
    talks = ("barrier", "all_gather", "all_gather_into_tensor", "all_reduce", "broadcast")
    save, notes, model = rescue.save_what_is_done, Notes(), attached("lora", r=2)

    def alone(*args: Any) -> None:
        with ExitStack() as stack:
            for name in talks:
                stack.enter_context(patch.object(torch.distributed, name, side_effect=FULL))
            save(*args)

    saving = patch.object(stage, "save_what_is_done", alone)
    with saving, fails_from(3, FULL), pytest.raises(TrainingError):
        qa.train(model, output=folder, on_note=notes, **STEPS)
    joined = torch.distributed.is_initialized()
    found = qa.train(attached("lora", r=2), output=folder, resume=True, **STEPS)
    return list(notes), joined, found.resumed_from


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_a_launchers_single_process_does_not_talk_to_itself(own: bool, tmp_path: Path) -> None:
    ((notes, joined, resumed_from),) = in_processes(1, launched, tmp_path, str(tmp_path / "r"), own)
    assert notes[-1] == "checkpoint-2 is saved, go on with --resume"
    assert joined == own
    assert resumed_from == 2


def allocations() -> int:
    """How often memory of the GPU was asked for so far."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["lora", *CASES])
def test_saving_asks_for_no_memory_of_a_gpu(case: str, tmp_path: Path) -> None:
    adapter, options = CASES.get(case, ("lora", {"r": 2}))
    model = attached(adapter, "bnb-nf4", device="cuda", **options)
    asked: list[int] = []
    save = TrainingLoop._save_checkpoint

    def counted(self: Any, *args: Any) -> None:
        before = allocations()
        save(self, *args)
        asked.append(allocations() - before)

    with patch.object(TrainingLoop, "_save_checkpoint", counted):
        qa.train(model, output=tmp_path / "run", save_steps=2, **STEPS)
    before = allocations()
    save_adapters(model, tmp_path)
    assert [*asked, allocations() - before] == [0, 0, 0]
    assert_as_peft_saves(model)
