"""The page that a run leaves behind: `report.html`, made from the files in the run folder alone.

One file, no scripts, no network, light and dark. Whatever the folder lacks is left out of the page.
Everything goes through `el`, which escapes all text; nothing else makes HTML.
"""

from __future__ import annotations

from pathlib import Path

from ..folders.run_folder import RunFolder
from .headline import headline, lede
from .html import Html, el
from .run import Run, text
from .sections import SECTIONS


def write_report(folder: RunFolder) -> Path:
    """Make `report.html` from the files in the folder, and return its path."""
    return folder.write_text("report.html", render(Run.read(folder)))


def render(run: Run) -> str:
    """Return the whole page."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", headline(run)),
        el("link", rel="icon", href=_ICON),
        el("style", Html(style)),
    )
    sections = [section for make in SECTIONS if (section := make(run))]
    body = el("body", el("main", _header(run), *sections), _footer(run))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _header(run: Run) -> Html:
    state, started = text(run.marker, "state"), text(run.marker, "started")
    eyebrow = el(
        "p",
        el("span", "quantadapt", class_="brand"),
        el("span", state, class_=f"state {state}") if state else "",
        el("time", f"{started[:16].replace('T', ' ')} UTC", datetime=started) if started else "",
        class_="eyebrow",
    )
    cell, _, result = headline(run).partition(": ")
    result = result.replace(" → ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
    title = el("h1", cell, el("span", result, class_="result") if result else "")
    words = lede(run)
    return el("header", eyebrow, title, el("p", words, class_="lede") if words else "")


def _footer(run: Run) -> Html:
    version = text(run.marker, "version")
    made = f"Made by quantadapt {version}".strip()
    return el("footer", el("p", f"{made} from the files beside this page."))


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath fill='%230072b2' d='M2 2h4v12H2zM10 9h4v5h-4z'/%3E%3C/svg%3E"
)
