"""How TRL's own trainers run where a test compares with them."""

import pytest

PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}
"""In float32 on the CPU, writing nothing."""


def skip_without_triton() -> None:
    """TRL 1.15 computes log-probabilities by Triton alone, which wants a GPU; 1.16 anywhere."""
    from trl.trainer import utils

    if getattr(utils, "_ChunkedLogProbFunction", "") is None:
        pytest.skip(
            "nothing to compare with: the trainers of this TRL (1.15) need Triton and a GPU"
        )
