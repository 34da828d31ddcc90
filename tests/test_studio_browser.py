"""Both pages in a real browser: the whole path, nothing from elsewhere, nothing that is run."""

import json
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantadapt import demo

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
UGLY = "<img src=x onerror=alert(1)><script>alert(2)</script>${alert(3)}{{alert(4)}}</pre></div>"
OPTIONS = """\
train.logging_steps=1
evaluate.unquantized=false
evaluate.max_examples=8
evaluate.samples=1
export.merge=never"""
MINUTES = 4 * 60_000
"""Milliseconds that the browser waits: the machine may be busy."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium and no Chrome"),
]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page that remembers what it asked for, what it ran, and what went wrong."""

    def __init__(self, chromium, address: str) -> None:
        self.address, self.asked, self.alerts = address, list[str](), list[str]()
        self.page = chromium.new_context(viewport={"width": 1200, "height": 900}).new_page()
        self.page.set_default_timeout(MINUTES)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on(
            "dialog", lambda dialog: (self.alerts.append(dialog.message), dialog.dismiss())
        )
        self.page.goto(address)

    def _alert(self, dialog) -> None:
        self.alerts.append(dialog.message)
        dialog.dismiss()

    def check(self) -> None:
        """Nothing came from elsewhere, and nothing that was written was run."""
        assert len(self.asked) > 20
        asked = (url for url in self.asked if not url.startswith(("data:", "blob:", "about:")))
        assert [url for url in asked if not url.startswith(self.address)] == []
        assert self.alerts == []
        assert self.page.locator("img[src='x']").count() == 0


@contextmanager
def command(*arguments: str, folder: Path):
    """Run a command that serves a page; yields its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    started = [sys.executable, "-m", "quantadapt", *arguments, "--port", port]
    with subprocess.Popen(started, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while "Ctrl-C" not in "".join(lines[-1:]):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            _, rest = process.communicate()
            assert process.returncode == 0, rest
            assert "stopped" in rest


def settled(visit: Visit) -> None:
    visit.page.wait_for_selector("#ask:not([disabled])")


def test_the_studio_from_the_plan_to_the_chat(chromium, tmp_path) -> None:
    rows = [json.loads(line) for line in demo.TRAIN_FILE.read_text().splitlines()[:40]]
    rows[0]["instruction"], rows[1]["output"] = UGLY, UGLY
    ugly = tmp_path / "a<b>&'"
    ugly.mkdir()
    with command("studio", str(ugly / "runs"), folder=tmp_path) as address:
        visit = Visit(chromium, address)
        page = visit.page
        page.wait_for_selector("#plan .good")
        assert "the bundled demo" in page.inner_text("#plan")

        page.fill("#steps textarea", "none")
        page.fill("#model textarea", f"/no/{UGLY}")
        page.click("#start")
        # The first of both fields is planned while the second is filled in.
        shows = "text => document.querySelector('#plan').innerText.includes(text)"
        page.wait_for_function(shows, arg="/no/<img src=x onerror=alert(1)>")
        assert "train.max_steps" in page.inner_text("#plan")

        page.fill("#model textarea", "")
        page.fill("#steps textarea", "24")
        page.click("#paste button")
        page.fill("#pasted textarea", "\n".join(map(json.dumps, rows)))
        page.click("#more button")
        page.fill("#set textarea", OPTIONS)
        page.fill("#name textarea", "first")
        page.click("#look")
        page.wait_for_selector("#seen .example")
        assert page.inner_text("#seen .learnt >> nth=0").startswith("def ")
        assert UGLY in page.inner_text("#seen")
        page.wait_for_selector("#plan .good")

        page.click("#start")
        page.wait_for_selector("#watched .bar")
        page.reload()  # in the middle of the run
        page.wait_for_selector("#watched .bar")
        page.wait_for_selector("#watched svg.wide .curve")
        assert "tokens per second" in page.inner_text("#watched")
        page.click("#stop-run:not([disabled])")
        page.wait_for_selector("#watched .state.interrupted")
        assert (ugly / "runs" / "first" / "checkpoints").is_dir()
        page.click("#resume:not([disabled])")
        page.wait_for_selector("#watched .state.finished")
        assert "24 of 24" in page.inner_text("#watched")

        page.click("#report button")
        frame = page.frame_locator("#report-page iframe")
        assert "hqq 4-bit" in frame.locator("h1").inner_text()
        assert page.get_attribute("#report-page iframe", "sandbox") == ""

        page.get_by_role("tab", name="Chat").click()
        # The run is chosen by an answer to the click on the tab, which may take a while.
        page.wait_for_function("document.querySelector('#talker input')?.value == 'first'")
        page.click("#open")
        settled(visit)
        page.fill("#question textarea", UGLY)
        page.click("#how button")
        page.fill("#max-new-tokens input[type=number]", "12")
        page.press("#max-new-tokens input[type=number]", "Tab")
        page.click("#ask")
        page.wait_for_selector("#right .turn.assistant:not(.coming)")
        settled(visit)
        for side in ("#left", "#right"):
            assert page.inner_text(f"{side} .turn.user") == UGLY
            assert re.search(r"\d+ tokens?", page.inner_text(f"{side} .turn.assistant"))
        visit.check()


def test_the_demo_answers_on_both_sides(chromium, tmp_path) -> None:
    subprocess.run(
        [sys.executable, "-m", "quantadapt", "run", "--max-steps", "2", "-o", "run",
         "--merge", "never", "--set", "evaluate.max_examples=4", "--set", "evaluate.samples=1",
         "--set", "evaluate.unquantized=false"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    with command("demo", "run", "--max-new-tokens", "200", folder=tmp_path) as address:
        visit = Visit(chromium, address)
        page = visit.page
        settled(visit)
        page.locator("#examples button").first.click()
        page.wait_for_function("document.querySelector('#question textarea').value.length > 9")
        page.press("#question textarea", "Enter")
        page.wait_for_selector("#left .turn.assistant.coming")
        page.wait_for_selector("#right .turn.assistant")
        page.click("#stop:not([disabled])")
        settled(visit)
        assert page.locator("#expected pre").count() == 1
        page.fill("#question textarea", f"{UGLY}\n" * 90)
        page.press("#question textarea", "Enter")
        page.wait_for_selector("#left .problem")
        assert "the model takes 512 with the answer" in page.inner_text("#left .problem")
        page.click("#anew")
        page.wait_for_selector("#left .empty")
        visit.check()
