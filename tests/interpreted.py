"""Kernels of Triton's on the CPU, where its interpreter runs them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module `name`, imported anew, with kernels that take tensors on the CPU."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    others = builder.create_fp_trunc

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        """As a GPU does: the interpreter cuts bfloat16 off instead of rounding to nearest."""
        if kind.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return others(self, source, kind)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_fp_trunc", rounded)
    monkeypatch.setitem(sys.modules, name, None)  # what is undone afterwards
    del sys.modules[name]
    return importlib.import_module(name)


def calls_of(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows with what the module's function of that name is called with."""
    calls: list[Any] = []
    function = getattr(module, name)

    def called(*given: Any) -> Any:
        calls.append(given)
        return function(*given)

    monkeypatch.setattr(module, name, called)
    return calls


def cuda_tests_interpreted(file: str, names: str) -> str:
    """Return what pytest says of a file's `cuda` tests of such names on the CPU. In a process of
    its own: Triton looks whether it interprets when it is imported."""
    command = [sys.executable, "-m", "pytest", file, "-m", "cuda", "-k", names]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout
