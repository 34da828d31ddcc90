"""The model card: what a README.md says of a tuned model, from what the run knows of it.

Whatever comes from elsewhere (names of files, columns, plugins, figures) is escaped, and of a local
path only the last part is told.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError
from ..folders.metrics import MODELS, direction, many, with_unit
from ..inputs.documents import read_object
from ..inputs.plain_yaml import YAMLError, parse, to_yaml
from ..paths import is_local_path, local_file
from ..protocols import Figure
from ..records import as_call
from ..registry.discovery import registry

Content = Literal["adapter", "merged", "requantized"]
README = "README.md"
_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$])")
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def write_card(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    content: Content = "adapter",
    title: str = "",
    base: str = "",
    metrics: Mapping[str, Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Write `README.md` into `folder`; arguments as for `card`."""
    text = card(manifest, content=content, title=title, base=base, metrics=metrics, figures=figures)
    (folder / README).write_text(text, encoding="utf-8")


def card(
    manifest: Mapping[str, Any],
    *,
    content: Content = "adapter",
    title: str = "",
    base: str = "",
    metrics: Mapping[str, Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """Return the model card of a tuned model.

    Args:
        manifest: what `quantadapt.json` says of it.
        content: what lies beside the card.
        title: what it is called; a repository's id, so that the card can say how to load it.
        base: hub id of the base, where it was trained from a local copy.
        metrics: `metrics.json` of the run, as far as there is one.
        figures: of the merge.
    """
    metrics = metrics or {}
    name = base or public_name(manifest["base"])
    sections = [
        _front(manifest, content, base, metrics),
        f"# {escaped(title or f'{name}, tuned')}",
        _lede(manifest, content, name),
        _made(manifest, name),
        _data(metrics),
        _figures(metrics),
        _merge(figures or {}),
        _loading(manifest, content, title, name),
        _license(manifest["base"], base),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escaped(text: object) -> str:
    """Return text as Markdown and HTML show it: on one line, without anything that they obey."""
    line = " ".join(str(text).split())
    return html.escape(_SPECIAL.sub(r"\\\1", line), quote=False)


def public_name(source: str) -> str:
    """Return a hub id, or the last part of a local path."""
    if not source:
        return "a model of its own"
    return Path(source).expanduser().resolve().name if is_local(source) else source


def is_local(source: str) -> bool:
    """Say whether a base is a folder of this machine, and no hub id."""
    found = is_local_path(source) or Path(source).expanduser().exists()
    return found or (_HUB_ID.fullmatch(source) is None and "/" in source)


def license_of(source: str) -> str:
    """Return the license that a checkpoint's own README.md names, as far as it is here."""
    file = local_file(source, README) if source else None
    if file is None or file.stat().st_size > 2**20:
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    try:
        values = parse(front[1]) if front else {}
    except YAMLError:
        return ""
    found = values.get("license") if isinstance(values, Mapping) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,64}", found) else ""


def _front(
    manifest: Mapping[str, Any], content: Content, base: str, metrics: Mapping[str, Any]
) -> str:
    """Return what the hub reads: YAML in front."""
    adapter = content == "adapter"
    values: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    named = base or ("" if is_local(manifest["base"]) else manifest["base"])
    if named:
        relations = {"adapter": "adapter", "merged": "finetune", "requantized": "quantized"}
        values |= {"base_model": named, "base_model_relation": relations[content]}
    if license := license_of(manifest["base"]):
        values["license"] = license
    if "loss" in _evaluations(metrics).get("perplexity", {}):
        values["pipeline_tag"] = "text-generation"
    values["tags"] = ["quantadapt", manifest["backend"], str(manifest["adapter"])]
    return f"---\n{to_yaml(values)}---"


def _lede(manifest: Mapping[str, Any], content: Content, name: str) -> str:
    adapter, backend = escaped(manifest["adapter"]), escaped(manifest["backend"])
    what = {
        "adapter": f"A {adapter} adapter",
        "merged": f"A model with a {adapter} adapter merged in",
        "requantized": f"A model with a {adapter} adapter merged in, quantized again",
    }[content]
    return f"{what}, trained with quantadapt on {escaped(name)}, quantized by {backend}."


def _made(manifest: Mapping[str, Any], name: str) -> str:
    """Return a table of what it was made with."""
    versions = manifest.get("versions") or {}
    rows = {
        "base": name,
        "quantizer": as_call(manifest["backend"], manifest["options"]),
        "computed in": manifest["dtype"],
        "adapter": as_call(str(manifest["adapter"]), manifest.get("adapter_options") or {}),
        "longest example": f"{n} tokens" if (n := manifest.get("max_length")) else "",
        "versions": ", ".join(f"{library} {version}" for library, version in versions.items()),
    }
    return _table(["", ""], [[key, value] for key, value in rows.items() if value])


def _data(metrics: Mapping[str, Any]) -> str:
    data = metrics.get("data")
    files = data.get("files") if isinstance(data, Mapping) else None
    if not isinstance(files, Sequence) or not files:
        return ""
    counts = ("rows", "examples", "held_out", "tokens", "learnt")
    rows = [
        [_data_name(str(file.get("file", ""))), *(_count(file, key) for key in counts)]
        for file in files
        if isinstance(file, Mapping)
    ]
    head = ["data", "rows", "examples", "held out", "tokens", "learnt from"]
    train = metrics.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    taken = f"\n\n{many(steps, 'step')} of training." if isinstance(steps, int) and steps else ""
    return f"## Data\n\n{_table(head, rows)}{taken}"


def _count(file: Mapping[str, Any], key: str) -> Any:
    """Return a count; none of learnt tokens where it is no text that is learnt."""
    found = file.get(key, "")
    return "" if key == "learnt" and not found else found


def _data_name(file: str) -> str:
    """Return a hub id, or the name of a local file."""
    return Path(file).name if is_local(file) else file


def _evaluations(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = metrics.get("evaluations")
    items = found.items() if isinstance(found, Mapping) else ()
    return {name: figures for name, figures in items if isinstance(figures, Mapping)}


def _figures(metrics: Mapping[str, Any]) -> str:
    """Return what was measured on held-out data, before and after."""
    rows, models = [], [name for name in MODELS if any(_measured(metrics, name))]
    for evaluation, figures in _evaluations(metrics).items():
        for name, figure in figures.items():
            values, unit = figure.get("values") or {}, str(figure.get("unit", ""))
            label = name if name == evaluation else f"{evaluation} {name}"
            better = direction(str(figure.get("better", "")))
            shown = [_value(values.get(model), unit) for model in models]
            rows.append([label, *shown, _change(values), better])
    if not rows:
        return ""
    head = ["figure", *models, "change by training", ""]
    told = "\n".join(f"- {name}: {MODELS[name]}" for name in models)
    warned = metrics.get("warnings")
    warnings = [f"**Warning:** {escaped(w)}" for w in (warned if isinstance(warned, list) else ())]
    parts = ["## Figures", "On held-out data:", _table(head, rows), told, *warnings]
    return "\n\n".join(parts)


def _measured(metrics: Mapping[str, Any], model: str) -> Iterator[bool]:
    for figures in _evaluations(metrics).values():
        for figure in figures.values():
            yield model in (figure.get("values") or {})


def _value(value: Any, unit: str) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return with_unit(value, unit, "{:.4g}".format) if known else ""


def _change(values: Mapping[str, Any]) -> str:
    """Return by how much training changed a figure, in percent of what it was."""
    before, after = values.get("quantized"), values.get("tuned")
    if not (isinstance(before, int | float) and isinstance(after, int | float)) or not before:
        return ""
    found = (after - before) / abs(before)
    return f"{found:+.1%}" if math.isfinite(found) and found else ""


def _merge(figures: Mapping[str, Figure]) -> str:
    """Return how far what was merged is from the adapter on its base."""
    rows = [[name.replace("_", " "), str(figure)] for name, figure in figures.items()]
    table = _table(["figure", ""], rows)
    return f"## Merge\n\nCompared with the adapter:\n\n{table}" if rows else ""


def _loading(manifest: Mapping[str, Any], content: Content, title: str, name: str) -> str:
    """Return how to load it: with quantadapt, and with transformers and PEFT alone."""
    place = title if _HUB_ID.fullmatch(title) else "FOLDER"
    by_name = "" if place == "FOLDER" else "from huggingface_hub import snapshot_download\n\n"
    folder = json.dumps(place)
    own = f"snapshot_download({folder})" if by_name else folder
    code = _code(f"import quantadapt\n{by_name}model = quantadapt.load({own})")
    ours = f"With the base as it was quantized (`pip install quantadapt`):\n\n{code}"
    if content == "adapter":
        others = _adapter_elsewhere(manifest, folder, name)
    else:
        others = _model_elsewhere(manifest, folder, content)
    return "\n\n".join(["## Load it", ours, *others])


def _adapter_elsewhere(manifest: Mapping[str, Any], folder: str, name: str) -> list[str]:
    """Return how PEFT loads an adapter onto the base called `name`, and what differs then."""
    base = json.dumps(name if _HUB_ID.fullmatch(name) else "BASE")
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        f"{_by_peft(folder, manifest.get('active') or ())}"
    )
    note = (
        "It was trained on a quantized base: on the unquantized one, or one that is quantized "
        "otherwise, answers differ a little."
    )
    if manifest.get("merge_aware"):
        note += (
            " It was trained through the quantizer: quantadapt rounds what it adds to the base "
            "as in training, PEFT alone does not, and answers differ a little."
        )
    return [f"With transformers and PEFT alone:\n\n{_code(code)}", note]


def _model_elsewhere(manifest: Mapping[str, Any], folder: str, content: Content) -> list[str]:
    """Return how transformers loads a whole model, and whether it knows the backend."""
    backend = escaped(manifest["backend"])
    if content == "requantized" and not registry().backend(manifest["backend"]).serves:
        return [
            f"transformers alone is not known to read checkpoints of {backend}: it may start "
            "layers at random, and no more than report missing keys."
        ]
    code = (
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder})"
    )
    alone = f"With transformers alone:\n\n{_code(code)}"
    if content != "requantized":
        return [alone]
    return [alone, f"transformers alone loads it where it knows {backend}."]


def _by_peft(folder: str, active: Sequence[str]) -> str:
    """Return what puts the adapters called `active`, the first in `folder` itself, on `base`."""
    first, *others = map(json.dumps, active or ("default",))
    named = f", adapter_name={first}" if others else ""
    lines = [f"model = PeftModel.from_pretrained(base, {folder}{named})"]
    lines += [f"model.load_adapter({folder}, {name}, subfolder={name})" for name in others]
    if others:
        lines.append(f"model.base_model.set_adapter({json.dumps([*active])})")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _license(source: str, base: str) -> str:
    known = license_of(source)
    said = f"{escaped(known)}, that of the base" if known else "that of the base, which see"
    return f"## License\n\n{said}."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metrics_beside(adapter: Path) -> dict[str, Any]:
    """Return `metrics.json` of the run that an adapter lies in; empty where there is none."""
    try:
        return read_object(adapter.parent / "metrics.json")
    except ModelError:
        return {}
