"""What a run depends on: machine, Python and versions. It imports nothing heavy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..machine import installed_version

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def environment(distributions: Iterable[str] = ()) -> dict[str, Any]:
    """Return what this run depends on: machine, Python and versions; null is "not installed"."""
    return {
        "quantadapt": installed_version("quantadapt"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "versions": versions(distributions),
    }


def versions(distributions: Iterable[str] = ()) -> dict[str, str | None]:
    """Return the versions of the libraries, and of what `distributions` require; null as above."""
    names = [re.split(r"[^\w.-]", item.strip(), maxsplit=1)[0] for item in distributions]
    return {name: installed_version(name) for name in dict.fromkeys([*LIBRARIES, *names])}


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # asked only if somebody has loaded it anyway
    if torch is not None:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(names.stdout.split("\n")).strip(", ") or None
