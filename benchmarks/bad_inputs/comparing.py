"""What `compare` is given: grids, options, and a folder that was begun before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cases import DATA, MODEL, Case, at, documents, with_value, words, written

OUT = "out"
MARKER = f"{OUT}/quantadapt-compare.json"
COMPARE = ("compare", "--model", MODEL, "--data", DATA, "--backends", "hqq", "--adapters", "lora,dora",
           "--no-reference", "--max-steps", "1", "--device", "cpu", "--output", OUT)  # fmt: skip
_LOOK = (*COMPARE, "--dry-run")
_ESCAPE = "\x1b[31m\x1b]0;mine\x07"


def cases() -> Iterator[Case]:
    yield from _options()
    yield from _grids()
    yield from _folders()


def _options() -> Iterator[Case]:
    for flag, values in {
        "--backends": ("", ",", "(", "hqq(", "hqq(bits)", "hqq(bits=x)", "hqq(bits=nan)", "odd",
                       "hqq,hqq", "hqq(bits=99)", _ESCAPE, "hqq(__class__=1)", "../hqq"),
        "--adapters": ("", "odd", "lora(r=-1)", "lora(r=inf)", "lora,lora", _ESCAPE),
        "--set": ("train.learning_rate=[]", "train.learning_rate=[nan]", "train.learning_rate=[x]",
                  "x.y=[1,2]", "seed=[1,1]", "seed=[-1]", "train.max_time=[1,2]", "output=[a,b]",
                  "adapter.r=[1,!!python/name:os.system]", "model=[model,data.jsonl]"),
        "--seeds": ("0", "-1", "x", "100000"),
        "--budget": ("0", "-1", "nan", "inf", "x"),
        "--within": ("1", "-1", "nan"),
        "--prefer": ("odd", ""),
        "--by": ("odd", _ESCAPE),
        "--gpus": ("0", "x"),
        "--output": (MODEL, f"{MODEL}/out", DATA, "a" * 300),
        "--model": (_ESCAPE,),
    }.items():  # fmt: skip
        for value in values:
            wanted = (
                "either" if (flag, value) in (("--by", "odd"), ("--by", _ESCAPE)) else "refused"
            )
            yield Case(
                "compare: options", f"{flag} {value!r}", (*_LOOK, flag, value), wanted=wanted
            )


def _grids() -> Iterator[Case]:
    texts = {
        "a list": "- a\n",
        "a grid that is a list": "grid: [1]\n",
        "a grid of numbers": "grid: {backend: 3}\n",
        "an axis of mappings": "grid: {backend: {a: 1}}\n",
        "an axis that is no key": "grid: {odd: [1, 2]}\n",
        "an axis of nothing": "grid: {adapter: []}\n",
        "an axis of null": "grid: {adapter: [null]}\n",
        "compare that is a list": "compare: [1]\n",
        "compare of unknown keys": "compare: {odd: 1}\n",
        "seeds that are a text": "compare: {seeds: many}\n",
        "seeds that are true": "compare: {seeds: true}\n",
        "a budget that is true": "compare: {budget: true}\n",
        "anchors that expand": "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\ngrid: {seed: *d}\n",
        "a python object": "grid: !!python/object/apply:os.system [true]\n",
    }
    config = ("compare", "grid.yaml", "--model", MODEL, "--data", DATA, "--dry-run")
    for name, text in texts.items():
        yield Case("compare: YAML", name, config, written("grid.yaml", text))


def begun(folder: Path) -> None:
    """Write the folder of a comparison of which all has been run."""
    from quantadapt.comparing.folder import WHOLE, opened
    from quantadapt.comparing.grid import comparison

    common: dict[str, Any] = {"model": MODEL, "data": {"path": DATA}, "device": "cpu"}
    made = comparison(
        {**common, "train": {"max_steps": 1}},
        {"backend": ["hqq"], "adapter": ["lora", "dora"]},
        reference=False,
    )
    figure = {"unit": "", "better": "lower", "values": {"quantized": 3.0, "tuned": 2.0}}
    result = {"steps": 1, "evaluations": {"perplexity": {"perplexity": figure}}, "data": []}
    with opened(folder / OUT, made, overwrite=False) as opened_:
        for run in made.runs:
            record = opened_.record(run.name)
            record.state, record.results[WHOLE] = "finished", {**result, "warnings": []}
        opened_.save()


def _with(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in (begun, *damages)]


def _folders() -> Iterator[Case]:
    yield Case("compare: folder", "that is whole", COMPARE, _with(), "works")
    for name, damage in documents():
        wanted = "either" if name in ("missing", "empty") else "refused"
        yield Case("compare: journal", name, COMPARE, _with(at(MARKER, damage)), wanted)
    for key in ("version", "started", "state", "comparison", "runs", "rungs", "machine", "remarks"):
        for value in (None, True, 3, -1, "text", [1], {"a": 1}, float("nan"), 10**400):
            damage = _with(with_value(MARKER, key, value))
            wanted = "either" if isinstance(value, str) or value in ([1], {"a": 1}) else "refused"
            yield Case("compare: journal", f"{key} is {words(value)}", COMPARE, damage, wanted)
    for key, value in _hostile().items():
        damage = _with(lambda folder, value=value: _in_result(folder, value))
        yield Case("compare: journal", key, COMPARE, damage, "either")


def _hostile() -> dict[str, dict[str, Any]]:
    """Return what may stand in the result of a run."""
    figure = {"unit": "", "better": "lower", "values": {"tuned": 2.0}}
    named = {"perplexity": {"perplexity": figure}}
    return {
        "figures of escapes": {"evaluations": {_ESCAPE: {"<b>x</b>": {**figure, "unit": _ESCAPE}}}},
        "warnings of escapes": {"evaluations": named, "warnings": [_ESCAPE + "<script>"]},
        "figures that are lists": {"evaluations": {"perplexity": {"perplexity": [1]}}},
        "figures that are numbers": {"evaluations": {"perplexity": 3}},
        "values that are texts": {
            "evaluations": {"p": {"p": {**figure, "values": {"tuned": "x"}}}}
        },
        "values that are huge": {
            "evaluations": {"p": {"p": {**figure, "values": {"tuned": 1e308}}}}
        },
        "a direction of its own": {"evaluations": {"p": {"p": {**figure, "better": "sideways"}}}},
        "steps that are a text": {"evaluations": named, "steps": "many"},
        "steps that are infinite": {"evaluations": named, "steps": float("inf")},
        "numbers that are lists": {"evaluations": named, "memory_gib": [1], "trained": {}},
        "data that are a number": {"evaluations": named, "data": 3},
        "nothing": {},
    }


def _in_result(folder: Path, value: dict[str, Any]) -> None:
    file = folder / MARKER
    journal = json.loads(file.read_text())
    for record in journal["runs"].values():
        record["results"] = {"all": value}
    file.write_text(json.dumps(journal))
