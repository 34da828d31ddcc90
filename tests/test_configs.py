"""Every file in configs/ parses and plans as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.spec import Spec

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_plans(file) -> None:
    made = plan(Spec.load(file), machine=Machine())
    assert made.spec.output == f"runs/{file.stem}"


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 5
