"""What this machine can do, found out without importing torch."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The devices that torch can use here.

    Attributes:
        cuda: the compute capability (major, minor) of each usable CUDA device.
        memory: the bytes that each of them has; empty where that is not known.
        host: the bytes of CPU memory that were free, see `host_memory`.
    """

    cuda: tuple[tuple[int, int], ...] = ()
    memory: tuple[int, ...] = ()
    host: int | None = None

    @property
    def default_device(self) -> str:
        """cuda where there is one, else cpu."""
        return "cuda" if self.cuda else "cpu"

    def default_dtype(self, device: str) -> str:
        """bfloat16 on cards that compute in it, float16 on older ones, float32 elsewhere."""
        if not device.startswith("cuda"):
            return "float32"
        return "bfloat16" if self.cuda and self.cuda[0] >= (8, 0) else "float16"


@cache
def this_machine() -> Machine:
    """Return what this machine has. A torch built without CUDA means no CUDA."""
    driver, host = _cuda_driver() if _torch_has_cuda() else None, host_memory()
    if driver is None:
        return Machine(host=host)
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Machine(host=host)
    devices = range(count.value)
    return Machine(
        cuda=tuple(_capability(driver, index) for index in devices),
        memory=tuple(_memory(driver, index) for index in devices),
        host=host,
    )


def host_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes of CPU memory this process can still have: what the system has free or
    can free, and no more than its control group leaves it. None where that is not known.

    Args:
        root: where `proc` and `sys` are.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found is None:
        return None
    free = 1024 * int(found[1])
    groups = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    # Inside a container its own group is the root of what it sees.
    for group in {groups, groups / (own[1] if own else "")}:
        most, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
        if most.isdigit() and used.isdigit():
            cache = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
            free = min(free, int(most) - int(used) + int(cache[1] if cache else 0))
    first = groups / "memory"  # of version 1
    most, used = (_text(first / f"memory.{k}_in_bytes").strip() for k in ("limit", "usage"))
    if most.isdigit() and used.isdigit():
        free = min(free, int(most) - int(used))
    return max(free, 0)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    file = Path(spec.submodule_search_locations[0]) / "version.py"
    found = re.search(r"^cuda\b.*=\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found is not None and found.group(1).strip() != "None"


def _cuda_driver() -> ctypes.CDLL | None:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _capability(driver: ctypes.CDLL, index: int) -> tuple[int, int]:
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    value = ctypes.c_int()
    numbers = []
    for attribute in (major, minor):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
        numbers.append(value.value)
    return numbers[0], numbers[1]


def _memory(driver: ctypes.CDLL, index: int) -> int:
    size = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), index)
    return size.value


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return _version(distribution)
    except PackageNotFoundError:
        return None


@cache  # of what is there: it may still be installed
def _version(distribution: str) -> str:
    return version(distribution)


def run_python(code: str, arguments: Sequence[str], timeout: float | None) -> tuple[str, str]:
    """Run Python code in a process of its own. Returns what went wrong, or nothing, and stdout.

    Output goes to files: a process that hangs with children holding a pipe could not be left.
    """
    command = [sys.executable, "-c", code, *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end after {timeout:g} s", ""
        except OSError as error:
            return f"Python cannot be started: {error}", ""
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return ending(done.returncode, texts[1]), texts[0]


def ending(code: int, errors: str) -> str:
    """Return what went wrong in a process of Python, by its exit status and what it wrote to
    stderr; nothing where all went well."""
    if code == 0:
        return ""
    if code < 0:
        return f"it crashes Python (signal {-code})"
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {code}"
