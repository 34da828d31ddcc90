"""llama.cpp's own converters, where they are: they know more models than are known here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ...errors import ModelError, Problem

MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
CONVERT = (
    "use llama.cpp's converter: git clone https://github.com/ggml-org/llama.cpp, and --set "
    "converter=PATH, or LLAMA_CPP=PATH in the environment"
)
PLACE = "LLAMA_CPP"
"""The variable of the environment that names llama.cpp's folder."""


def find_converter(script: str, folder: str | None) -> Path | None:
    """Return where a script of llama.cpp's is: in `folder`, where $LLAMA_CPP says, or on PATH."""
    for place in (folder, os.environ.get(PLACE)):
        if place and (found := Path(place).expanduser() / script).is_file():
            return found
    on_path = None if folder else shutil.which(script)
    return Path(on_path) if on_path else None


def converter_problem(script: str, folder: str | None) -> Problem | None:
    """Return why a folder that was named cannot be used; None if it can, or none was."""
    if folder is None or (Path(folder).expanduser() / script).is_file():
        return None
    what = f"{folder} holds no {script}"
    return Problem(what, "name the folder of llama.cpp's sources", "converter")


def convert(script: Path, source: Path, path: Path, numbers: str, *more: str) -> None:
    """Have a script of llama.cpp's write `path` from the folder `source`.

    Raises:
        ModelError: it failed, with the last that it said.
    """
    command = [sys.executable, str(script), str(source), "--outfile", str(path)]
    done = subprocess.run(
        [*command, "--outtype", numbers, *more], capture_output=True, text=True, check=False
    )
    if done.returncode or not path.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        what = f"{script.name} failed: {said[-1].strip() if said else 'it said nothing'}"
        lacking = re.search(r"No module named '(\w+)", what)
        fix = "see whether that llama.cpp knows the model"
        if lacking:
            fix = f"install what llama.cpp's scripts import: pip install {lacking[1]}"
        raise ModelError(what, fix=fix, where=str(script))
