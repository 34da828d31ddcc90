"""HTML that escapes itself: everything on the report page goes through `el`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **{code: f"\\u{code:04x}" for code in _TURNING},
}


class Html(str):
    """Text that is HTML already. `el` escapes every other string."""


Child = Html | str


def el(tag: str, *children: Child, **attributes: str) -> Html:
    """Return an element. `class_` becomes class, other underscores become hyphens."""
    named = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    ]
    start = f"<{tag}{''.join(named)}>"
    if tag in ("meta", "link"):
        return Html(start)
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"{start}{inner}</{tag}>")


def escape(text: str) -> Html:
    """Escape text for HTML; control characters become visible, and so do those that turn the
    direction of all that follows, which what stands behind the text would obey, too."""
    return Html(html.escape(str(text).replace("\r\n", "\n").translate(_VISIBLE)))


def document(title: str, *body: Child, style: str = "") -> str:
    """Return a page that needs nothing beside it: no script, no network, light and dark.

    Args:
        style: more rules beside those of `report.css`.
    """
    rules = styles("charts.css", "report.css") + style
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", title),
        el("link", rel="icon", href=_ICON),
        el("style", Html(rules)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', *body), lang='en')}\n"


def styles(*names: str) -> str:
    """Return the rules of CSS files in this folder."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath fill='%230072b2' d='M2 2h4v12H2zM10 9h4v5h-4z'/%3E%3C/svg%3E"
)


def section(title: str, *children: Child, name: str = "") -> Html:
    """Return a section with a heading, labelled by it; `name` is its id, if not its title."""
    name = name or title.lower().replace(" ", "-")
    return el("section", el("h2", title, id=name), *children, aria_labelledby=name)


def figures_list(figures: Sequence[tuple[str, str]]) -> Html:
    """Return pairs of (value, label), the values large; nothing if there are none."""
    items = [el("div", el("dt", label), el("dd", value)) for value, label in figures]
    return el("dl", *items, class_="figures") if items else Html()


def facts_table(rows: Iterable[tuple[str, Child]]) -> Html:
    """Return a table of two columns, a name and a value."""
    lines = [
        el("tr", el("th", key.replace("_", " "), scope="row"), el("td", value))
        for key, value in rows
    ]
    return el("table", el("tbody", *lines), class_="facts")


def numbers_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """Return numbers as a table."""
    head = el("thead", el("tr", *[el("th", heading, scope="col") for heading in headings]))
    lines = [el("tr", *[el("td", cell) for cell in row]) for row in rows]
    return el("table", head, el("tbody", *lines), class_="numbers")


def details(summary: str, *children: Child) -> Html:
    """Return a part that the reader can fold out."""
    return el("details", el("summary", summary), *children)


def capital(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
