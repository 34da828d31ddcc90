"""The table of built-in commands, and the overview that `quantadapt --help` prints from it.

It imports nothing, so that the overview appears at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import typer


class Entry(NamedTuple):
    """A command: the module that holds it, the panel that it is listed in, what it does, and what
    cannot be done where its options are wrong; empty where those are of a spec."""

    module: str
    panel: str
    help: str
    cannot: str = ""


TRACEBACK = "QUANTADAPT_TRACEBACK"
"""The variable that has the traceback of an error shown."""
_TUNE, _MODEL, _LOOK = "Fine-tune", "Work with one model", "Look around"
_EXTEND = "Extend"

COMMANDS = {
    "init": Entry(
        "init", _TUNE, "Write a commented config for a use, or list the uses.",
        "cannot write a config",
    ),
    "run": Entry("run", _TUNE, "Quantize, attach, train, evaluate and export, as one run."),
    "plan": Entry("plan", _TUNE, "Show what a run would do, or why it is refused; does nothing."),
    "compare": Entry("compare", _TUNE, "Find out which quantization and which adapter to take."),
    "data": Entry(
        "data", _TUNE, "Show what is learnt of a data file, and what is cut or dropped.",
        "cannot show what is learnt",
    ),
    "schema": Entry("plan", _TUNE, "Print the JSON schema of a run's YAML file, for editors."),
    "quantize": Entry(
        "quantize", _MODEL, "Quantize a model and save the checkpoint.", "cannot quantize"
    ),
    "merge": Entry("merge", _MODEL, "Merge a trained adapter into its base.", "cannot merge"),
    "export": Entry("export", _MODEL, "Write a tuned model in another form.", "cannot export"),
    "eval": Entry("evaluate", _MODEL, "Measure a model, a run or an adapter.", "cannot measure"),
    "generate": Entry(
        "generate", _MODEL, "Answer prompts, or a file of them.", "cannot generate"
    ),
    "chat": Entry("chat", _MODEL, "Talk with a model.", "cannot chat"),
    "serve": Entry("serve", _MODEL, "Serve a model as OpenAI's API does.", "cannot serve"),
    "judge": Entry(
        "judge", _MODEL, "Let a model judge which of two models answers better.", "cannot judge"
    ),
    "people": Entry(
        "people", _MODEL, "Let people vote which of two answers is better.",
        "cannot ask for votes",
    ),
    "demo": Entry(
        "demo", _MODEL, "Let base and tuned model answer side by side, in the browser.",
        "cannot show the demo",
    ),
    "studio": Entry(
        "studio", _TUNE, "Plan runs, start and watch them, and talk with them, in the browser.",
        "cannot open the studio",
    ),
    "backends": Entry(
        "catalog", _LOOK, "List the ways to quantize, or show one with its options.",
        "cannot show backends",
    ),
    "adapters": Entry(
        "catalog", _LOOK, "List the adapters, or show one with its options.",
        "cannot show adapters",
    ),
    "objectives": Entry(
        "catalog", _LOOK, "List what can be learnt, or show one with its options.",
        "cannot show objectives",
    ),
    "evaluations": Entry(
        "catalog", _LOOK, "List what can be measured, or show one.", "cannot show evaluations"
    ),
    "exports": Entry(
        "catalog", _LOOK, "List what a tuned model can be written as, or show one.",
        "cannot show exports",
    ),
    "matrix": Entry(
        "matrix", _LOOK, "Show which backend goes with which adapter.", "cannot show the matrix"
    ),
    "doctor": Entry(
        "doctor", _LOOK, "Check this installation and say what to install.",
        "cannot check this installation",
    ),
    "plugin": Entry(
        "plugin", _EXTEND, "Start a plugin: a backend or an adapter of your own.",
        "cannot start a plugin",
    ),
}  # fmt: skip

_OPTIONS = {
    "--help, -h": "Show this page, or after a command, its options and examples.",
    "--version": "Print the version.",
    "--traceback": f"Show the traceback of an error (or set {TRACEBACK}=1).",
    "--install-completion": "Install completion for the current shell.",
}

_EXAMPLES = (
    "quantadapt run                                  the bundled demo, hqq + lora",
    "quantadapt run --model PATH --data train.jsonl --backend bnb-nf4 --adapter dora",
    "quantadapt run config.yaml --set backend.bits=3 --set adapter.r=8",
    "quantadapt backends show hqq",
)

_FOOT = (
    "Exit codes: 0 done, 1 failed, 2 refused or misused (nothing was touched), 130 interrupted.",
    "Installed plugins may add commands; `quantadapt doctor` lists them.",
)


def add(app: typer.Typer, name: str, function: Callable[..., None], *examples: str) -> None:
    """Add a command to `app`, with its docstring as help and example command lines below."""
    app.command(
        name,
        help=unwrapped(function.__doc__ or ""),
        epilog=epilog(*examples),
        rich_help_panel=COMMANDS[name].panel,
    )(function)


def unwrapped(text: str) -> str:
    """Return a docstring with each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def epilog(*lines: str) -> str:
    """Return example command lines in the markup of a help page."""
    escaped = [line.replace("[", r"\[") for line in lines]
    return "\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in escaped)])


def overview() -> str:
    """Return the page that `quantadapt --help` prints."""
    width = _width()
    parts = ["", " Usage: quantadapt COMMAND [OPTIONS]", ""]
    parts += [" Fine-tune any quantized language model with any adapter.", ""]
    for panel in dict.fromkeys(entry.panel for entry in COMMANDS.values()):
        rows = {name: entry.help for name, entry in COMMANDS.items() if entry.panel == panel}
        parts += _panel(panel, rows, width)
    parts += _panel("Options", _OPTIONS, width)
    parts += ["", " Examples:", *(f"   {line}" for line in _EXAMPLES), ""]
    parts += [f" {line}" for line in _FOOT]
    return "\n".join(parts) + "\n\n"


def _panel(title: str, rows: dict[str, str], width: int) -> list[str]:
    """Draw a box as typer does for the other help pages."""
    left = max(len(name) for name in rows) + 3
    room = max(width - left - 5, 20)
    lines = []
    for name, text in rows.items():
        for index, line in enumerate(_wrapped(text, room)):
            lines.append(f"{name if not index else '':<{left}}{line:<{room}}")
    a, b, c, d, h, v = "╭╮╰╯─│" if _speaks_utf8() else "++++-|"
    top = f"{a}{h} {title} ".ljust(left + room + 3, h) + b
    return [top, *(f"{v} {line} {v}" for line in lines), f"{c}{h * (left + room + 2)}{d}"]


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _width() -> int:
    try:
        return max(60, min(os.get_terminal_size(sys.stdout.fileno()).columns, 100))
    except (OSError, ValueError, AttributeError):
        return 80


def _speaks_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
