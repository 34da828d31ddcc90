"""What the studio shows of a form before anything is started: the plan, memory, the data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .. import demo
from ..data.looking import Shown
from ..errors import QuantadaptError
from ..objectives.surveying import looked_at, surveyed
from ..planning.words import plan_remarks, plan_rows
from ..quantizing.tokenizer import load_tokenizer
from ..remote_code import trusting
from ..reporting.html import Html, el, facts_table
from .form import Form
from .parts import problem_list

CARDS = {
    "8 GiB": 8.0,
    "12 GiB (RTX 3060)": 12.0,
    "16 GiB (T4, RTX 4080)": 16.0,
    "24 GiB (RTX 3090, RTX 4090, A10)": 24.0,
    "32 GiB (RTX 5090)": 32.0,
    "40 GiB (A100)": 40.0,
    "48 GiB (L40S, RTX 6000 Ada)": 48.0,
    "80 GiB (A100, H100)": 80.0,
    "96 GiB (RTX PRO 6000)": 96.0,
    "141 GiB (H200)": 141.0,
}
"""Cards to ask about -> what `quantadapt plan --card` is told."""
_EXAMPLES = 4


def plan_html(form: Form, cards: Sequence[float]) -> Html:
    """Return the plan, as `quantadapt plan` has it, or all that is wrong.

    Args:
        cards: GiB of the cards to say whether it fits.
    """
    try:
        made = form.plan()
        rows = plan_rows(made, surveyed(made))
    except QuantadaptError as error:
        return problem_list(error.problems, "This cannot be run")
    remarks = [el("li", text) for text in plan_remarks(made)]
    return el(
        "div",
        el("p", "This can be run.", class_="good"),
        facts_table(rows),
        *_fits(form, cards),
        el("ul", *remarks, class_="note") if remarks else Html(),
        el("h2", "The same on the command line"),
        el("pre", _command(form), class_="boxed"),
        class_="qa",
    )


def _command(form: Form) -> str:
    """Return the command line of a run, an option a line."""
    name, *options = form.arguments()
    return " \\\n    ".join([f"quantadapt {name}", *map(shlex.quote, options)])


def _fits(form: Form, cards: Sequence[float]) -> list[Html]:
    """Say whether the run fits other cards, where somebody asks."""
    if not cards:
        return []
    try:
        memory = form.plan(sorted(cards)).memory
    except QuantadaptError as error:
        return [problem_list(error.problems, "On another card it cannot be run")]
    unknown = ["What training needs cannot be predicted for this model and backend."]
    words = memory.words() if memory else unknown
    return [el("h2", "On another card"), el("ul", *(el("li", line) for line in words))]


def data_html(form: Form) -> Html:
    """Return the first examples as the form's objective reads them, with what is learnt of them,
    and the counts, as `quantadapt data` has them."""
    try:
        form.keep_pasted()
        spec = form.spec()
        with trusting(form.trust_remote_code):
            tokenizer = load_tokenizer(spec.model or str(demo.MODEL_DIR))
        found, report = looked_at(spec, tokenizer, _EXAMPLES)
    except QuantadaptError as error:
        return problem_list(error.problems, "The data cannot be read")
    lost = [el("p", text, class_="problem") for _, text in report.warnings()]
    legend = ["Coloured is what is ", el("span", "learnt", class_="learnt")]
    if any(example.against for example in found):
        legend += [", and what is ", el("span", "to be avoided", class_="avoid")]
    if not any(map(sum, (example.mask for example in found))):
        legend = ["Nothing of the text itself is learnt, it is given"]
    return el(
        "div",
        *lost,
        el("ul", *(el("li", words) for words in report.words())),
        *(_example(example, tokenizer) for example in found),
        el("p", *legend, "; the rest is given." if len(legend) > 1 else ".", class_="note"),
        class_="qa",
    )


def _example(example: Shown, tokenizer: object) -> Html:
    counts = "avoid" if example.against else "learnt"
    spans = [
        el("span", text, class_=counts if learnt else "given")
        for learnt, text in example.stretches(tokenizer)  # type: ignore[arg-type]
    ]
    if example.cut:
        spans.append(el("span", f"\n… {example.cut:,} more tokens are cut", class_="cut"))
    place = f"{example.where}{', ' if example.title else ''}{example.title}"
    heading = el("p", f"{place}: {example.words}")
    return el("div", heading, el("pre", *spans, dir="auto"), class_="example")
