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
from typing import Any

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="quantadapt-cache-")
os.environ["QUANTADAPT_CACHE"] = _CACHE.name  # backends are to work, not to remember

pytest_plugins = ("quantadapt.testing.plugin",)


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Away from the checkout: a user's `runs/` there is none of a test's business."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The demo's."""
    from transformers import AutoTokenizer

    from quantadapt.demo import MODEL_DIR

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="session")
def random_data() -> Any:
    """32 examples of 6 to 19 random tokens below 64; the first three of each are the prompt."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (32,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]
    masks = [[0] * 3 + [1] * (n - 3) for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whatever ran before; torch is not loaded for it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
