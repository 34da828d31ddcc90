"""The campaign of `benchmarks.faults`: a part of it with the slow tests, all of it by hand.

A class for each share, so that workers of xdist take them side by side. Bad inputs have a test of
their own. CI takes them where `quantadapt.folders`, `quantadapt.exporting` or `benchmarks` change.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parents[1]


def faults(*options: str) -> None:
    """Run the campaign in a process of its own, for it forks."""
    command = [sys.executable, "-m", "benchmarks.faults", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-1000:]
    assert " 0 with something wrong" in ended.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, /proc")
@pytest.mark.slow
@pytest.mark.timeout(1200)
class Share:
    parts: ClassVar[tuple[str, ...]]

    def test_a_part(self) -> None:
        faults("--share", "0.04", *(word for part in self.parts for word in ("--part", part)))


class TestKilledAndDamaged(Share):
    parts = ("killed", "damaged", "threads")


class TestSignalledAndTwoWriters(Share):
    parts = ("signalled", "two writers")


class TestWriteFails(Share):
    parts = ("write fails",)


class TestFullDisk(Share):
    parts = ("full disk",)


@pytest.mark.campaign
@pytest.mark.timeout(20000)
def test_all_faults() -> None:
    faults()
