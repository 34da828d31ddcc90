"""A model that nobody holds any more is gone, with all of its memory, whatever was done with it."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import quantadapt as qa
from quantadapt.dependencies import import_requirements, unchanged_process
from quantadapt.testing.small_demo import small_model


class Model:
    """Somebody's, who imports something."""


KEEPING = """
try:
    import there_is_no_such_library
except ImportError as error:
    WHY_NOT = error
"""


def by_unchanged_process(name: str) -> None:
    with unchanged_process():
        __import__(name)


def as_a_requirement(name: str) -> None:
    import_requirements(SimpleNamespace(imports=(name,), name="it", extra=""))


@pytest.mark.parametrize("by", [by_unchanged_process, as_a_requirement])
def test_a_library_that_keeps_why_an_import_failed_keeps_no_model(
    by, tmp_path, monkeypatch
) -> None:
    name = f"keeps_{by.__name__}"
    (tmp_path / f"{name}.py").write_text(KEEPING)
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> weakref.ref:
        model = Model()
        by(name)
        return weakref.ref(model)

    left = work()
    gc.collect()
    assert left() is None
    error = sys.modules.pop(name).WHY_NOT
    assert "there_is_no_such_library" in str(error)


def test_an_error_that_comes_through_says_where_it_came_from(tmp_path, monkeypatch) -> None:
    (tmp_path / "fails_itself.py").write_text(KEEPING + "raise ValueError('it fails') from WHY_NOT")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="it fails") as raised:
        by_unchanged_process("fails_itself")
    assert raised.traceback[-1].path.name == "fails_itself.py"
    assert raised.value.__cause__.__traceback__ is not None


def bytes_there() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [one for one in gc.get_objects() if type(one) in kinds and one.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def train_and_drop(adapter: str) -> list[weakref.ref]:
    tuned = qa.attach(qa.quantize(str(small_model()), "hqq"), adapter)
    qa.train(tuned, max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True)
    return [weakref.ref(module) for module in tuned.modules()]


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera", "adalora", "ia3"])
def test_nothing_of_a_model_that_was_trained_stays(adapter) -> None:
    """Nor of what it trained with. The first one fills what libraries keep for all."""
    train_and_drop(adapter)
    before = bytes_there()
    left = train_and_drop(adapter)
    gc.collect()
    assert [type(ref()).__name__ for ref in left if ref() is not None] == []
    assert bytes_there() - before <= 4096


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="keeps why llama_cpp is not there")
def test_peft_may_import_all_quantizers_while_it_attaches() -> None:
    code = """
import gc, sys, weakref
import quantadapt as qa
from quantadapt.testing.small_demo import small_model
tuned = qa.attach(qa.quantize(str(small_model()), "hqq"), "vera", r=8)
left = weakref.ref(tuned)
del tuned
gc.collect()
print("imported" if "gptqmodel" in sys.modules else "not imported", left() is None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "imported True", done.stdout
