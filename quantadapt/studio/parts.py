"""Pieces of HTML that several parts of the pages show."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Problem
from ..reporting.html import Html, el


def heading(title: str, words: str = "") -> Html:
    """Return what a page begins with."""
    lede = el("p", words, class_="lede") if words else ""
    brand = el("span", "quantadapt", class_="brand")
    return el("div", brand, el("h1", title), lede, class_="qa")


def problem_list(problems: Sequence[Problem], title: str) -> Html:
    """Return what is wrong, each with where and the way out."""
    return el("div", el("h2", title), *map(_problem, problems), class_="qa", role="alert")


def _problem(problem: Problem) -> Html:
    rule = f" (rule {problem.rule})" if problem.rule else ""
    where = [el("p", problem.where, class_="where")] if problem.where else []
    fix = [el("p", f"Way out: {problem.fix}", class_="fix")] if problem.fix else []
    return el("div", *where, el("p", f"{problem.what}{rule}"), *fix, class_="problem")


def note(text: str) -> Html:
    """Return a sentence."""
    return el("div", el("p", text, class_="note"), class_="qa")
