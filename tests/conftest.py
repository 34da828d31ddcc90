"""Fixed seeds, one thread, nothing from the network, quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("QUANTADAPT_STRICT", "1")
# Tiny matrices: a second thread costs more than it brings, five times more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="quantadapt-cache-")
os.environ["QUANTADAPT_CACHE"] = _CACHE.name  # backends are to work, not to remember

pytest_plugins = ("quantadapt.testing.plugin",)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whatever ran before; torch is not loaded for it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
