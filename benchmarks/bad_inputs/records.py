"""Records: `quantadapt.json`, and what lies in a run folder."""

from __future__ import annotations

from collections.abc import Iterator

from .cases import (
    EVAL,
    EVAL_QUANTIZED,
    GENERATE,
    MERGE,
    MISSING,
    ONTO,
    RESUME,
    RUN,
    WRONG,
    Case,
    at,
    documents,
    with_value,
    words,
    written,
)

ADAPTER_RECORD, BASE_RECORD = f"{RUN}/adapter/quantadapt.json", "quantized/quantadapt.json"
_COMMANDS = (EVAL, MERGE, ONTO)


def cases() -> Iterator[Case]:
    yield from _manifests()
    yield from _run_folders()


def _manifests() -> Iterator[Case]:
    for index, (name, damage) in enumerate(documents()):
        command = _COMMANDS[index % len(_COMMANDS)]
        yield Case("quantadapt.json", name, command, at(ADAPTER_RECORD, damage))
        wanted = "works" if name == "missing" else "refused"  # it is one that stock hqq loads
        yield Case(
            "quantadapt.json of a base", name, EVAL_QUANTIZED, at(BASE_RECORD, damage), wanted
        )
    for key in ("format", "base", "backend", "options", "dtype", "skip_modules", "adapter",
                "adapter_options", "max_length"):  # fmt: skip
        for index, value in enumerate(WRONG):
            command = _COMMANDS[index % len(_COMMANDS)]
            damage = with_value(ADAPTER_RECORD, key, value)
            name = f"{key} is {words(value)}"
            yield Case("quantadapt.json", name, command, damage, _wanted(key, value))
    for value in (2, 99, "1", 1.0, 1.5):
        damage = with_value(ADAPTER_RECORD, "format", value)
        yield Case("quantadapt.json", f"format is {value!r}", EVAL, damage)
    options = {
        "of another backend": {"bits": 4, "nonsense": 1},
        "that cannot be": {"bits": 1000},
        "of the wrong type": {"bits": "four"},
        "named device": {"device": "cuda"},
        "named backend": {"backend": "none"},
        "named source": {"source": "/etc"},
        "with an empty name": {"": 1},
        "not a number": {"group_size": float("nan")},
    }
    for name, value in options.items():
        for command in (EVAL, MERGE, ONTO):
            damage = with_value(ADAPTER_RECORD, "options", value)
            yield Case("quantadapt.json", f"options {name}", command, damage)
    bases = ("/dev/null", "/etc/passwd", "../../..", "model/../nowhere", "\n", "a" * 300,
             "model/config.json", "x/y", "https://example.com/model", ".")  # fmt: skip
    for base in bases:
        damage = with_value(ADAPTER_RECORD, "base", base)
        yield Case("quantadapt.json", f"base is {words(base)}", EVAL, damage)
    for key, value in (("more", {"x": 1}), ("versions", None), ("versions", []), ("versions", {})):
        damage = with_value(ADAPTER_RECORD, key, value)
        yield Case("quantadapt.json", f"{key} is {value}", EVAL, damage, "either")
    yield Case(
        "quantadapt.json", "of another adapter", EVAL, with_value(ADAPTER_RECORD, "adapter", "vera")
    )


def _wanted(key: str, value: object) -> str:
    if key == "max_length" and value in (None, MISSING, 10**12, 10**400):
        return "either"  # however much it is, it cuts nothing
    if key == "base" and value == "text":
        return "either"  # a merge onto another base does not look at it
    if key in ("options", "adapter_options") and value == {}:
        return "either"
    if key == "skip_modules" and value in ([], ["a"]):
        return "either"  # which layers are packed stands in the weights
    if key in ("adapter_options",) and value is MISSING:
        return "either"
    return "refused"


def _run_folders() -> Iterator[Case]:
    marker, spec = f"{RUN}/quantadapt-run.json", f"{RUN}/spec.yaml"
    for name, damage in documents():
        yield Case("quantadapt-run.json", name, RESUME, at(marker, damage))
        yield Case("plan.json", name, RESUME, at(f"{RUN}/plan.json", damage), "either")
        yield Case("spec.yaml", name, EVAL[:2], at(spec, damage), _spec(name))
        yield Case("metrics.json", name, EVAL, at(f"{RUN}/metrics.json", damage), "either")
        yield Case("metrics.jsonl", name, RESUME, at(f"{RUN}/metrics.jsonl", damage), "either")
    for key in ("backend", "adapter", "objective", "exports"):
        for value in (None, [], "text", {"name": 3}, {"options": []}, {"name": "x", "options": 1}):
            damage = with_value(f"{RUN}/plan.json", key, value)
            yield Case("plan.json", f"{key} is {words(value)}", RESUME, damage, "either")
    texts = {
        "of a newer version": "model: model\nnew_key: 1\n",
        "that is a list": "- a\n- b\n",
        "with a wrong value": "model: model\ntrain: {max_steps: many}\n",
        "without data": "model: model\ndata: nowhere.jsonl\n",
    }
    for name, text in texts.items():
        for command in (EVAL[:2], ("merge", RUN, "--output", "out")):
            yield Case("spec.yaml", name, command, written(spec, text))
    state = f"{RUN}/checkpoints/checkpoint-2/trainer_state.json"
    for name, damage in documents():
        yield Case("trainer_state.json", name, RESUME, at(state, damage), "either")
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = f"{RUN}/checkpoints/checkpoint-2/{name}"
        for how, content in (("empty", b""), ("random bytes", bytes(range(256)) * 8)):
            yield Case(f"checkpoint: {name}", how, RESUME, written(file, content), "either")
    yield Case(
        "run folder",
        "without an adapter",
        GENERATE,
        lambda folder: (folder / RUN / "adapter").rename(folder / "gone"),
    )


def _spec(name: str) -> str:
    whole = ("empty", "null", "missing", "no object inside", "cut in half")
    return "either" if name in whole else "refused"
