"""Take the pictures in docs/images: what we show, in a headless browser.

    python docs/screenshots.py            # all of them
    python docs/screenshots.py report     # one

It needs playwright and Chromium or Chrome. One picture more is one function in `PICTURES`, which
gets the browser and the file to write.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent / "images"
LARGEST = 200_000
"""Bytes: pages with pictures are to open at once."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser() -> Iterator[Any]:
    """Yield playwright's browser: that of this machine, else playwright's own."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def quantadapt(*arguments: str, folder: Path) -> None:
    """Run a command of ours in `folder`, offline. Raises CalledProcessError."""
    command = [sys.executable, "-m", "quantadapt", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def report(opened: Any, file: Path) -> None:
    """The head of the demo's report: figures, and an answer before and after."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantadapt("run", "demo", "--set", "evaluate.max_new_tokens=32", folder=folder)
        page = opened.new_page(viewport={"width": 860, "height": 700}, device_scale_factor=1.5)
        page.goto((folder / "runs" / "demo" / "report.html").as_uri())
        box = page.locator(".sample").first.bounding_box()
        clip = {"x": 40, "y": 0, "width": 780, "height": box["y"] + box["height"] + 12}
        page.screenshot(path=file, clip=clip, full_page=True)


PICTURES: dict[str, Callable[[Any, Path], None]] = {"report": report}
"""The name of a PNG file -> what takes it."""


def main(names: Sequence[str]) -> int:
    """Take the pictures called `names`, or all."""
    if unknown := set(names) - set(PICTURES):
        print(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
        return 2
    IMAGES.mkdir(exist_ok=True)
    with browser() as opened:
        for name in names or PICTURES:
            file = IMAGES / f"{name}.png"
            PICTURES[name](opened, file)
            print(f"{file.name}: {file.stat().st_size:,} bytes")
            if file.stat().st_size > LARGEST:
                raise SystemExit(f"{file.name} is larger than {LARGEST:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
