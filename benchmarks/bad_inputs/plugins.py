"""Plugins that misbehave: one must break neither the command nor another plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .cases import DATA, EVAL, MODEL, QUANTIZED, TRAIN, Case

_HEAD = """
from quantadapt.hookspecs import hookimpl
from quantadapt.records import Backend, Adapter, Evaluation, Export
from quantadapt.capabilities import Merge, Rule
from quantadapt.protocols import Evaluator, Exporter, Figure
from quantadapt_none import *
import quantadapt_none
Base = next(b for b in quantadapt_none.quantadapt_backends() if b.name == "none").quantizer
"""
_BACKEND = """
class Bad(Base):
    {body}

@hookimpl
def quantadapt_backends():
    import dataclasses
    record = next(b for b in quantadapt_none.quantadapt_backends() if b.name == "none")
    return [dataclasses.replace(record, name="bad", quantizer=Bad)]
"""
_RAISES = "raise RuntimeError('I am bad')"


def cases() -> Iterator[Case]:
    broken = {
        "does not import": "import no_such_module",
        "has a syntax error": "def (",
        "exits": "raise SystemExit(3)",
        "is interrupted": "raise KeyboardInterrupt",
        "recurses": "def f():\n    f()\nf()",
        "hangs": "import time\ntime.sleep(60)",
        "changes the folder": "import os\nos.chdir('/')",
        "closes stdout": "import os, sys\nsys.stdout.close()",
        "returns a number": _HEAD + "@hookimpl\ndef quantadapt_backends():\n    return 3",
        "returns numbers": _HEAD + "@hookimpl\ndef quantadapt_backends():\n    return [3]",
        "raises in its hook": _HEAD + f"@hookimpl\ndef quantadapt_backends():\n    {_RAISES}",
        "claims a taken name": _HEAD + "@hookimpl\ndef quantadapt_backends():\n    return quantadapt_none.quantadapt_backends()",
        "has an unknown hook": _HEAD + "@hookimpl\ndef quantadapt_backendz():\n    return []",
        "raises in a property": _HEAD + _BACKEND.format(body=f"@property\n    def target(self):\n        {_RAISES}"),
    }  # fmt: skip
    for name, code in broken.items():
        wanted = "either" if "taken name" in name else "works"
        yield Case("plugins", name, _run("hqq"), before=_plugin(code), wanted=wanted)
        yield Case(
            "plugins",
            name,
            ("plan", "--model", QUANTIZED, "--data", DATA),
            before=_plugin(code),
            wanted=wanted,
        )
    bodies = {
        "from_checkpoint raises": f"@classmethod\n    def from_checkpoint(cls, config):\n        {_RAISES}",
        "from_checkpoint exits": "@classmethod\n    def from_checkpoint(cls, config):\n        raise SystemExit(3)",
        "from_checkpoint returns a number": "@classmethod\n    def from_checkpoint(cls, config):\n        return 3",
    }
    for name, body in bodies.items():
        code = _HEAD + _BACKEND.format(body=body)
        for arguments in (
            EVAL,
            ("eval", QUANTIZED, "--data", DATA, "--max-examples", "2"),
            ("plan", "--model", QUANTIZED, "--data", DATA),
        ):
            yield Case("plugins", name, arguments, before=_plugin(code), wanted="works")
        yield Case(
            "plugins",
            f"{name}, another backend asked",
            ("plan", "--model", QUANTIZED, "--backend", "bnb-nf4"),
            before=_plugin(code),
        )
        yield Case(
            "plugins",
            f"{name}, asked itself",
            ("plan", "--model", QUANTIZED, "--backend", "bad"),
            before=_plugin(code),
        )
    asked = {
        "quantize raises": f"def quantize(self, *a, **k):\n        {_RAISES}",
        "quantize returns nothing": "def quantize(self, *a, **k):\n        return None",
        "quantize exits": "def quantize(self, *a, **k):\n        raise SystemExit(0)",
        "misfit raises": f"def misfit(self, *a):\n        {_RAISES}",
        "notes raise": f"def notes(self, *a):\n        {_RAISES}",
        "save raises": f"def save(self, *a, **k):\n        {_RAISES}",
        "target raises": f"@property\n    def target(self):\n        {_RAISES}",
        "bits_per_weight raises": f"@property\n    def bits_per_weight(self):\n        {_RAISES}",
        "needs_data raises": f"@property\n    def needs_data(self):\n        {_RAISES}",
    }
    for name, body in asked.items():
        code = _HEAD + _BACKEND.format(body=body)
        wanted = "either" if name.startswith(("bits", "save", "needs")) else "refused"
        yield Case("plugins", name, _run("bad"), before=_plugin(code), wanted=wanted)
        yield Case(
            "plugins", f"{name}, elsewhere", _run("hqq"), before=_plugin(code), wanted="works"
        )
        quantize = ("quantize", MODEL, "--backend", "bad", "--output", "out")
        yield Case("plugins", name, quantize, before=_plugin(code), wanted="either")
    measures = {
        "an evaluation raises": _RAISES,
        "an evaluation returns nothing": "return {}",
        "an evaluation returns NaN": "return {'x': Figure(float('nan'))}",
        "an evaluation returns text": "return {'x': 'y'}",
    }
    for name, body in measures.items():
        code = (
            _HEAD
            + f"""
class E(Evaluator):
    def measure(self, model, given):
        {body}

@hookimpl
def quantadapt_evaluations():
    return [Evaluation("odd", "odd", E)]
"""
        )
        yield Case("plugins", name, (*EVAL, "--evaluation", "odd"), before=_plugin(code))
    for name, body in (("a command raises", _RAISES), ("a command exits", "raise SystemExit(3)")):
        code = _HEAD + f"@hookimpl\ndef quantadapt_commands(app):\n    {body}\n"
        yield Case("plugins", name, ("nothing",), before=_plugin(code))
        yield Case("plugins", name, ("plan",), before=_plugin(code), wanted="works")
    stage = _HEAD + f"@hookimpl\ndef quantadapt_stage_done(stage, value):\n    {_RAISES}\n"
    yield Case("plugins", "a listener raises", _run("hqq"), before=_plugin(stage), wanted="works")
    for name, text in (("no text", b"\xff\xfe"), ("no section", b"a = b"), ("no module", b"[quantadapt]\nx = \n"),
                       ("odd names", b"[quantadapt]\n = x\n"), ("a folder", None)):  # fmt: skip
        yield Case(
            "plugins",
            f"entry_points.txt with {name}",
            ("plan",),
            before=_entry_points(text),
            wanted="works",
        )


def _run(backend: str) -> tuple[str, ...]:
    return (*TRAIN, "--backend", backend, "--merge", "never")


def _plugin(code: str) -> Callable[[Path], object]:
    """Return what installs a plugin for the process."""

    def before(folder: Path) -> None:
        _install(folder, b"[quantadapt]\nbad = bad_plugin\n")
        (folder / "tmp-site" / "bad_plugin.py").write_text(code)

    return before


def _entry_points(text: bytes | None) -> Callable[[Path], object]:
    return lambda folder: _install(folder, text)


def _install(folder: Path, entry_points: bytes | None) -> None:
    import sys

    from quantadapt.registry.discovery import registry

    info = folder / "tmp-site" / "bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    file = info / "entry_points.txt"
    file.mkdir() if entry_points is None else file.write_bytes(entry_points)
    sys.path.insert(0, str(folder / "tmp-site"))
    registry.cache_clear()
