"""Take the pictures in docs/images: what we show, in a headless browser.

    python docs/screenshots.py            # all of them
    python docs/screenshots.py report     # one

It needs playwright and Chromium or Chrome. One picture more is one function in `PICTURES`, which
gets the browser and the file to write.
"""

from __future__ import annotations

import os
import re
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


def make_smaller(file: Path) -> None:
    """Write a picture again with 128 colours: flat areas and text need no more."""
    from PIL import Image

    with Image.open(file) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


@contextmanager
def served(*arguments: str, folder: Path) -> Iterator[str]:
    """Run a command that serves a page; yields its address."""
    command = [sys.executable, "-m", "quantadapt", *arguments, "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            yield next(found[0] for line in process.stderr if (found := _ADDRESS.search(line)))
        finally:
            process.terminate()


_ADDRESS = re.compile(r"http://\S+")
_MINUTES = 600_000
"""Milliseconds that something may take on a busy machine."""


def opened_page(opened: Any, address: str, width: int, height: int) -> Any:
    """Return a page at `address`, in light colours."""
    page = opened.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=1.25, color_scheme="light"
    )
    page.set_default_timeout(_MINUTES)
    page.goto(address)
    return page


def demo(opened: Any, file: Path) -> None:
    """A held-out question, answered by the base and by the tuned demo."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantadapt("run", "--output", "runs/hqq-lora", folder=folder)
        how = ("--max-new-tokens", "32")
        with served("demo", "runs/hqq-lora", *how, folder=folder) as address:
            page = opened_page(opened, address, 1100, 860)
            page.locator("#examples button").first.click()
            page.wait_for_function("document.querySelector('#question textarea').value.length > 9")
            page.press("#question textarea", "Enter")
            page.wait_for_selector("#left .turn.assistant:not(.coming) .note")
            page.wait_for_selector("#ask:not([disabled])")
            page.screenshot(path=file)


@contextmanager
def studio(opened: Any) -> Iterator[Any]:
    """Yield the studio's page with the demo's data as files of its own."""
    from quantadapt.demo import EVAL_FILE, TRAIN_FILE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for source, target in ((TRAIN_FILE, "train.jsonl"), (EVAL_FILE, "validation.jsonl")):
            shutil.copy(source, folder / "data" / target)
        with served("studio", folder=folder) as address:
            page = opened_page(opened, address, 1180, 960)
            page.wait_for_selector("#plan .good")
            page.fill("#data textarea", "data")
            page.fill("#steps textarea", "60")
            page.press("#steps textarea", "Tab")
            page.wait_for_selector("#plan :text('data/train.jsonl')")
            yield page


def studio_plan(opened: Any, file: Path) -> None:
    """The studio: a plan, cards, and data with what is learnt in colour."""
    with studio(opened) as page:
        page.click("#cards input")
        page.get_by_role("option", name="24 GiB").click()
        page.keyboard.press("Escape")
        page.wait_for_selector("#plan :text('fits 24 GiB')")
        page.click("#look")
        page.wait_for_selector("#seen .example")
        page.set_viewport_size({"width": 1180, "height": 1280})
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=file)


def studio_run(opened: Any, file: Path) -> None:
    """The studio: a run in the middle of its training."""
    with studio(opened) as page:
        page.click("#more button")
        page.fill("#set textarea", "train.logging_steps=1\nevaluate.unquantized=false")
        page.click("#start")
        page.wait_for_selector("#watched :text-matches('^4[0-9] of 60$')")
        page.screenshot(path=file)
        page.click("#stop-run")
        page.wait_for_selector("#watched .state:not(.running)")


PICTURES: dict[str, Callable[[Any, Path], None]] = {
    "report": report,
    "demo": demo,
    "studio-plan": studio_plan,
    "studio-run": studio_run,
}
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
            make_smaller(file)
            print(f"{file.name}: {file.stat().st_size:,} bytes")
            if file.stat().st_size > LARGEST:
                raise SystemExit(f"{file.name} is larger than {LARGEST:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
