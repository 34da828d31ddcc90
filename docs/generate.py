"""Writes the reference pages and the README's matrix from the code, so that they cannot drift.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 if one is out of date, or if the verified
                                       results do not agree with what is declared; changes nothing

Only what the distribution itself provides is described; other installed plugins are left out.
Neither torch nor a vendor is imported.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import quantadapt
from quantadapt import errors, hookspecs, matrix, protocols, records, registry
from quantadapt.capabilities import Rule
from quantadapt.exporting.tuned import Tuned
from quantadapt.matrix import results, tables
from quantadapt.objectives.sft import SFT
from quantadapt.planning import resuming
from quantadapt.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
MARK = "<!-- matrix: written by docs/generate.py -->"
END = "<!-- end of matrix -->"
NOTE = "<!-- Written by docs/generate.py. Change the code, not this page. -->"

START = {
    records.Start.ZERO: "unchanged",
    records.Start.ROUNDING: "changed by rounding",
    records.Start.CHANGED: "changed",
}


def pages() -> dict[Path, str]:
    """Return the text of every generated file."""
    known = _own_plugins()
    found = {
        "spec.md": spec_page(),
        "resuming.md": resuming_page(),
        "backends.md": backends_page(known),
        "adapters.md": adapters_page(known),
        "evaluations.md": evaluations_page(known),
        "exports.md": exports_page(known),
        "objectives.md": objectives_page(known),
        "hooks.md": hooks_page(),
        "backend-api.md": backend_api_page(),
        "cli.md": cli_page(),
        "errors.md": errors_page(),
    }
    paths = {REFERENCE / name: text for name, text in found.items()}
    paths[ROOT / "docs" / "matrix.md"] = matrix_page(known)
    made = {path: f"{NOTE}\n\n{text.strip()}\n" for path, text in paths.items()}
    made[ROOT / "README.md"] = readme((ROOT / "README.md").read_text(encoding="utf-8"), known)
    return made


def stale() -> dict[Path, str]:
    """Return the generated files that are missing or differ from what the code says, and what it
    says."""
    return {
        path: text
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def _own_plugins() -> registry.Registry:
    """Return a registry with the plugins of this distribution alone.

    Raises:
        RuntimeError: one of them does not work, as where a busy machine imports it too slowly: the
            pages would be silent about what it provides.
    """
    before = os.environ.pop(registry.ONLY, None)
    try:
        known = registry.discover()
    finally:
        if before is not None:
            os.environ[registry.ONLY] = before
    for broken in known.broken:
        origin = broken.provenance
        if origin.distribution == "quantadapt" or origin.plugin in registry.BUILTIN:
            raise RuntimeError(f"no page is written without plugin {origin}: {broken.reason}")
    ours = {
        name
        for name, origin in known.plugins.items()
        if origin.distribution == "quantadapt" or name in registry.BUILTIN
    }
    return known.only_of(ours)


# Spec ------------------------------------------------------------------------------------------


def spec_page() -> str:
    """Return every key of the YAML file."""
    schema = Spec.model_json_schema()
    parts = [
        "# The spec",
        "A spec says everything that a run is told. The YAML file, the flags of `quantadapt run` "
        "and `quantadapt.Spec` in Python all make the same record. An unknown key is an error "
        "that suggests the nearest known one. On the command line, `--set train.max_steps=100` "
        "sets any key.",
        "`quantadapt schema` prints the same as a JSON schema, for editors.",
        _section("Top level", schema, schema["$defs"]),
    ]
    for key, field in schema["properties"].items():
        part = _resolved(field, schema["$defs"])
        if part.get("type") == "object":
            parts.append(_section(f"`{key}`", part, schema["$defs"]))
    return "\n\n".join(parts)


def _section(title: str, part: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    rows = []
    for name, field in part["properties"].items():
        kind = _resolved(field, definitions)
        nested = "properties" in kind
        type_ = f"see [{name}](#{name})" if nested else _code(_type(field))
        empty = {"array": [], "object": {}}.get(field.get("type"))
        default = "" if nested else _code(_json(field.get("default", empty)))
        rows.append((_code(name), type_, default, field.get("description", "")))
    text = "" if title == "Top level" else _prose(part.get("description", ""))
    table = _table(("key", "type", "default", "meaning"), rows)
    return "\n\n".join(filter(None, [f"## {title}", text, table]))


def _resolved(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a `$ref`."""
    name = str(field.get("$ref", "")).rpartition("/")[2]
    found: Mapping[str, Any] = definitions[name] if name else field
    return found


def _type(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema's type as users would write it."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "$ref" in schema:  # of the records that a spec names
        return "name | {name: ..., option: ...}"
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "object":
        return "mapping"
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = {
        "minimum": ">= {}",
        "exclusiveMinimum": "> {}",
        "maximum": "<= {}",
        "exclusiveMaximum": "< {}",
        "multipleOf": "multiple of {}",
    }
    found = [text.format(schema[key]) for key, text in limits.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(found)]).strip()


RESUMING = {
    "may": ("may change", "It counts from there on."),
    "more": (
        "may grow",
        "More epochs or steps go on; fewer than were done are refused. A schedule that decays is "
        "that of the longer run from there on.",
    ),
    "must not": (
        "must not change",
        "Adapter, optimizer, schedule and the place in the data come from it: refused, with the "
        "value to resume with.",
    ),
    "no effect": ("has no effect", "It made the base, which is in the run folder. A note says so."),
    "not kept": ("not kept", "Says where and how this call writes."),
}
"""What `planning.resuming.on_resume` says -> how the page calls it, and what that means."""


def resuming_page() -> str:
    """Return which keys may change when a run is resumed."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in RESUMING}
    for key in resuming.keys_of(Spec):
        by_kind[resuming.on_resume(key)].append(_code(key))
    rows = [(word, text, ", ".join(by_kind[kind])) for kind, (word, text) in RESUMING.items()]
    return "\n\n".join(
        [
            "# What may change on resume",
            "`quantadapt run --resume` goes on with a run, see "
            "[Resume a killed run](../how-to/resume.md). What the spec says then is compared with "
            "`spec.yaml` and `plan.json` in the run folder, the options of backend, adapter and "
            "objective included. The number of processes must not change, either, and the examples "
            "have to be the same: a checkpoint knows how many there were, and how long.",
            _table(("on resume", "what happens", "keys"), rows),
        ]
    )


# Records ---------------------------------------------------------------------------------------


def backends_page(known: registry.Registry) -> str:
    """Return every built-in backend with its options and rules."""
    parts = [
        "# Backends",
        "A backend is a way to quantize. Name one with `--backend` or `backend:`; its options go "
        "beside the name, `backend: {name: hqq, bits: 3}`, or on the command line "
        "`--set backend.bits=3`. `quantadapt backends` lists what is installed here, plugins of "
        "third parties included.",
        _table(
            ("backend", "what", "install"),
            [
                (f"[{b.name}](#{b.name})", b.summary, _code(f"pip install '{b.extra}'"))
                if b.extra
                else (f"[{b.name}](#{b.name})", b.summary, "nothing")
                for b in known.backends()
            ],
        ),
    ]
    return "\n\n".join([*parts, *(_backend(backend) for backend in known.backends())])


def _backend(backend: records.Backend) -> str:
    facts = [
        ("needs", ", ".join(map(_code, backend.requires)) or "nothing else"),
        ("devices", ", ".join(backend.devices)),
        ("dtypes", ", ".join(backend.dtypes)),
        ("calibration data", "needed" if backend.calibration else "not needed"),
        ("[stacks of experts](../how-to/experts.md)", _experts(backend.quantizes_experts())),
        ("merge", backend.merge.words),
        ("served by", ", ".join(map(_serving, backend.serves)) or "its dense merge alone"),
    ]
    return "\n\n".join(
        [
            f"## {backend.name}",
            f"{backend.summary}.",
            _options(backend.quantizer),
            _facts(facts),
            *_rules(backend.rules),
        ]
    )


def _serving(serving: records.Serving) -> str:
    beside = ", adapters beside the base too" if serving.adapters else ""
    needs = f", with {serving.needs}" if serving.needs else ""
    return f"[{serving.server}](../how-to/serve.md#vllm) (`{serving.requires}`{needs}{beside})"


def _experts(quantized: bool) -> str:
    return "quantized" if quantized else "left dense"


def adapters_page(known: registry.Registry) -> str:
    """Return every built-in adapter."""
    found = known.adapters()
    rows = [
        (
            _code(adapter.name),
            adapter.summary,
            adapter.peft_type,
            ", ".join(_code(f"{k}: {_json(v)}") for k, v in adapter.defaults.items()),
            START[adapter.start],
            _adapter_merge(adapter),
        )
        for adapter in found
    ]
    rules = [rule for adapter in found for rule in adapter.rules]
    parts = [
        "# Adapters",
        "An adapter is a PEFT method under a short name. Its options are the fields of PEFT's own "
        "config class, under PEFT's names: `adapter: {name: lora, r: 8}`. "
        "`quantadapt adapters show lora` lists them all, with types and defaults. Plugins bring "
        "methods that PEFT does not ship: [Write an adapter](../how-to/write-an-adapter.md).",
        "Columns: *defaults* are those that differ from PEFT's own. *Start* says what attaching "
        "does to the outputs before any training. *Merge* is the most that the adapter allows: "
        "requantize (into dense weights, or quantized again), dense, or never. A combination "
        "gets the smaller of what backend and adapter allow.",
        _table(("adapter", "what", "PEFT type", "defaults", "start", "merge"), rows),
        *_rules(rules),
    ]
    return "\n\n".join(parts)


def exports_page(known: registry.Registry) -> str:
    """Return every built-in export with its options and rules."""
    found = known.records(records.Export)
    parts = [
        "# Exports",
        "An export is what is written from a tuned model. A run saves the adapter first, writes a "
        "merged model where that is allowed (`export.merge`), and whatever `export.formats` names: "
        "`export: {formats: [merged-requantized]}`, or with options "
        "`{name: onto-base, base: ORG/NAME}`. `quantadapt export RUN NAME --set option=value` "
        "writes one later. `quantadapt exports` lists what is installed here, plugins of third "
        "parties included.",
        "Each gets a folder of its own, whole or not at all. One that fails is told, and neither "
        "the adapter nor another export is lost by it. What is known of it is in `metrics.json` "
        "under `exports`.",
        _table(("export", "what"), [(f"[{e.name}](#{e.name})", e.summary) for e in found]),
    ]
    return "\n\n".join([*parts, *(_export(export) for export in found)])


def _export(export: records.Export) -> str:
    parts = [
        f"## {export.name}",
        _prose(export.exporter.__doc__ or ""),
        _options(export.exporter),
    ]
    if export.requires:
        parts.append(_facts([("needs", ", ".join(map(_code, export.requires)))]))
    return "\n\n".join([*parts, *_rules(export.rules)])


def _options(options: type[Any]) -> str:
    """Return the fields of an options class as a table."""
    schema = options.model_json_schema()
    needed = schema.get("required", [])
    rows = [
        (
            _code(name),
            _code(_type(field)),
            "required" if name in needed else _code(_json(field.get("default"))),
            field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(("option", "type", "default", "meaning"), rows) if rows else "No options."


def _adapter_merge(adapter: records.Adapter) -> str:
    refused = any(tuple(rule.when) == ("adapter",) for rule in adapter.rules)
    return "refused altogether" if refused else adapter.merge.name.lower()


def evaluations_page(known: registry.Registry) -> str:
    """Return every built-in evaluation, and what one of a plugin's works with."""
    found = known.records(records.Evaluation)
    parts = [
        "# Evaluations",
        "An evaluation is what is measured on the models of a run, before and after training. Name "
        "those that you want in `evaluate.evaluations`, options beside the name: "
        "`evaluations: [perplexity, {name: exact-match, first: 50}]`. "
        "`quantadapt eval RUN --evaluation NAME` measures a model that is there. `quantadapt "
        "evaluations` lists what is installed here, plugins of third parties included.",
        _table(
            ("evaluation", "what", "install"),
            [
                (e.name, e.summary, _code(f"pip install '{e.extra}'") if e.extra else "nothing")
                for e in found
            ],
        ),
    ]
    for evaluation in found:
        parts += [f"## {evaluation.name}", *_docstring(evaluation.evaluator.__doc__ or "")]
        parts += [_options(evaluation.evaluator), *_rules(evaluation.rules)]
    parts += [
        "## One of your own",
        "A plugin returns it from [quantadapt_evaluations](hooks.md#quantadapt_evaluations). "
        "[Measure something else](../how-to/measure-something-else.md) makes one.",
    ]
    for part in (protocols.Evaluator, protocols.Given, protocols.Figure):
        parts += [f"### {part.__name__}", *_docstring(part.__doc__ or "")]
        for name, method in vars(part).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                signature = f"def {name}{inspect.signature(method)}: ...".replace("'", "")
                parts += [_fence(signature, "python"), *_docstring(method.__doc__ or "")]
    return "\n\n".join(parts)


def objectives_page(known: registry.Registry) -> str:
    """Return every built-in objective with its options and rules, and what a new one implements."""
    found = known.records(records.Objective)
    parts = [
        "# Objectives",
        "An objective says what is learnt: how examples become batches and a loss. Name one with "
        "`objective:`, options beside the name, or on the command line `--objective NAME` and "
        "`--set objective.OPTION=VALUE`. `quantadapt objectives` lists what is installed here, "
        "plugins of third parties included.",
    ]
    for one in found:
        needs = ", ".join(map(_code, one.requires)) or "nothing else"
        parts += [f"## {one.name}", f"{one.summary}.", _options(one.task), f"Needs {needs}."]
        measured = ", ".join(map(_code, one.evaluations))
        parts.append(f"Where the spec does not say what is measured: {measured}.")
        parts += _rules(one.rules)
    parts += [
        "## An objective of your own",
        "One file and one record, see [quantadapt_objectives](hooks.md#quantadapt_objectives).",
    ]
    for cls in (protocols.Task, SFT):
        parts += [f"### quantadapt.{cls.__name__}", *_docstring(cls.__doc__ or ""), _members(cls)]
    return "\n\n".join(parts)


def _members(cls: type[Any]) -> str:
    """Return a table of what a subclass may override, with the first paragraph on each."""
    rows = []
    for name, value in vars(cls).items():
        member = value.fget if isinstance(value, property) else value
        if name.startswith("_") or not inspect.isfunction(member):
            continue
        signature = f": {inspect.signature(member).return_annotation}"
        if not isinstance(value, property):
            signature = str(inspect.signature(member)).replace("self, ", "", 1)
        kept = "has to" if getattr(value, "__isabstractmethod__", False) else ""
        text = _prose((member.__doc__ or "").strip().split("\n\n")[0])
        shown = f"{name}{signature}".replace("'", "").replace("|", "\\|")
        rows.append((_code(shown), kept, text))
    return _table(("member", "override", "what"), rows)


def _rules(rules: Iterable[Rule]) -> list[str]:
    rows = [
        (
            _code(rule.id),
            "; ".join(f"{key} is {' or '.join(map(str, v))}" for key, v in rule.when.items()),
            rule.reason,
            rule.fix,
        )
        for rule in rules
    ]
    return ["Rules:", _table(("rule", "refused when", "because", "instead"), rows)] if rows else []


# Hooks, command line, errors -------------------------------------------------------------------


def hooks_page() -> str:
    """Return every hook with its signature."""
    parts = ["# Hooks", *_docstring(hookspecs.__doc__ or "")]
    for name, hook in vars(hookspecs).items():
        if name.startswith("quantadapt_"):
            signature = f"def {name}{inspect.signature(hook)}".replace("'", "")
            parts += [f"## {name}", _fence(signature, "python"), *_docstring(hook.__doc__ or "")]
    parts += ["## Records", "What the hooks named after them return, and what they are made of."]
    shown = (protocols.Exporter, Tuned)
    for record in (*records.KINDS.values(), *shown, Rule):
        parts += [f"### {record.__name__}", *_docstring(record.__doc__ or "")]
    return "\n\n".join(parts)


BACKEND_API: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "What a backend implements": (
        (
            "protocols.backends",
            ("Quantizer", "LayerwiseQuantizer", "AdapterTarget", "LayerwiseTarget"),
        ),
    ),
    "What calibration hands over": (
        ("calibration.walk", ("LayerInputs", "walk_blocks")),
        ("calibration.blocks", ("each_block", "Block")),
        ("calibration.experts", ("open_experts", "close_experts", "round_experts", "Opened")),
        ("calibration.recording", ("Pass",)),
    ),
    "What helps": (
        ("loading.reading", ("from_pretrained", "load_native")),
        ("model.modules", ("linear_layers", "set_submodule")),
        ("model.dense", ("skipped_modules",)),
        ("layerwise", ("save_layerwise",)),
        ("compiling", ("one_kernel",)),
        ("probe", ("dequantize_by_probe",)),
    ),
}
"""Title -> module, and the classes and functions of it that authors of backends use."""
IMPORTED_FROM = {
    "calibration.*": "calibration",
    "loading.*": "loading",
    "model.modules": "loading",
    "protocols.*": "protocols",
}
"""Modules whose names are imported from a package, which is what authors write."""


def backend_api_page() -> str:
    """Return the signatures of what a backend implements and is handed, read from the source."""
    parts = [
        "# The Python API of a backend",
        "What a backend implements, what it is handed, and what helps. "
        "[What a backend can declare](../how-to/write-a-backend.md) says when to use which; "
        "`quantadapt plugin new` writes backends that use it: one that takes a layer at a time, "
        "one that calibrates (`--calibrated`), and one that rounds activations (`--activations`).",
    ]
    for title, modules in BACKEND_API.items():
        parts.append(f"## {title}")
        for module, names in modules:
            file = ROOT / "quantadapt" / f"{module.replace('.', '/')}.py"
            nodes = ast.parse(file.read_text(encoding="utf-8")).body
            found = {getattr(node, "name", ""): node for node in nodes}
            for name in names:
                parts += _described(found[name], f"quantadapt.{_imported_from(module)}")
    return "\n\n".join(parts)


def _imported_from(module: str) -> str:
    package = module.partition(".")[0]
    return IMPORTED_FROM.get(module) or IMPORTED_FROM.get(f"{package}.*") or module


def _described(node: Any, module: str) -> list[str]:
    """Return a function, or a class with its methods, from its syntax tree."""
    text = _docstring(ast.get_docstring(node) or "")
    if isinstance(node, ast.FunctionDef):
        return [f"### {node.name}", f"In `{module}`.", _signature(node), *text]
    parts = [f"### {node.name}", f"In `{module}`.", *text]
    for field, meaning in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(meaning, ast.Expr):
            parts.append(
                f"- {_code(ast.unparse(field))}: {_prose(ast.literal_eval(meaning.value))}"
            )
    methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name[0] != "_"]
    for method in methods:
        if text := _docstring(ast.get_docstring(method) or ""):
            parts += [f"#### {node.name}.{method.name}", _signature(method), *text]
    if done := [_code(m.name) for m in methods if not ast.get_docstring(m)]:
        parts.append(f"It does {', '.join(done)} for you.")
    return parts


def _signature(node: ast.FunctionDef) -> str:
    """Return a definition without its body, an argument a line where it is long."""
    marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
    kept = [mark for mark in marks if mark in ("@property", "@classmethod", "@abstractmethod")]
    arguments, returns = _arguments(node.args), ast.unparse(node.returns or ast.Constant(None))
    line = f"def {node.name}({', '.join(arguments)}) -> {returns}: ..."
    if len(line) > 90:
        listed = "".join(f"    {argument},\n" for argument in arguments)
        line = f"def {node.name}(\n{listed}) -> {returns}: ..."
    return _fence("\n".join([*kept, line]), "python")


def _arguments(arguments: ast.arguments) -> list[str]:
    """Return arguments as they are written, each by itself."""
    depth, found = 0, [""]
    for letter in ast.unparse(arguments).replace("'", '"'):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += " = " if letter == "=" and depth == 0 else letter
    return [text.strip() for text in found]


def cli_page() -> str:
    """Return every command with its flags and examples."""
    import typer

    from quantadapt.cli.app import build_app
    from quantadapt.cli.commands import COMMANDS

    group: Any = typer.main.get_command(build_app())
    parts = [
        "# Command line",
        "Every command takes `--help`. Commands with `--json` print one JSON document on stdout "
        "and everything else on stderr. `--traceback`, anywhere, shows the traceback of an error.",
        _table(
            ("command", "what"),
            [(f"[{name}](#quantadapt-{name})", entry.help) for name, entry in COMMANDS.items()],
        ),
    ]
    for name in COMMANDS:
        command = group.commands[name]
        parts.append(_command(f"quantadapt {name}", command))
        for sub, subcommand in getattr(command, "commands", {}).items():
            parts.append(_command(f"quantadapt {name} {sub}", subcommand))
    return "\n\n".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    options = [p for p in command.params if p.opts[0].startswith("-")]
    shown = " ".join(p.metavar if p.required else f"[{p.metavar}]" for p in arguments)
    parts = [
        f"## {name}",
        command.help or "",
        _fence(f"{name} {shown} [OPTIONS]".replace("  ", " ")),
    ]
    rows = [(_code(p.metavar), p.help or "", "") for p in arguments]
    rows += [(", ".join(map(_code, _names(p))), p.help or "", _default(p)) for p in options]
    if rows:
        parts.append(_table(("argument or flag", "meaning", "default"), rows))
    lines = [line.strip() for line in (command.epilog or "").replace(r"\[", "[").splitlines()]
    if examples := [line for line in lines if line and not line.startswith("[bold]")]:
        parts.append(_fence("\n".join(examples), "sh"))
    return "\n\n".join(parts)


def _names(option: Any) -> list[str]:
    names = [*option.opts, *option.secondary_opts]
    if option.is_flag:
        return names
    choices = getattr(option.type_descriptor, "choices", None)
    value = "|".join(choices) if choices else option.metavar or option.name.upper()
    return [*names[:-1], f"{names[-1]} {value}"]


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.required:
        return "required"
    if option.is_flag:
        return "on" if option.default else ""
    return "" if option.default is None else str(option.default)


def errors_page() -> str:
    """Return exit codes and exception classes."""
    from quantadapt.cli.session import INTERRUPTED

    codes = [
        (str(errors.EXIT_OK), "Done."),
        (str(errors.EXIT_FAILURE), "Failed while working. The message says what, and what to do."),
        (
            str(errors.EXIT_REFUSED),
            "Refused or misused, before any work: nothing was touched. So is a folder in which "
            "another process is writing.",
        ),
        (
            str(errors.EXIT_OUT_OF_TIME),
            "`train.max_time` is over: a checkpoint is written, `--resume` goes on.",
        ),
        ("129, 143", "The same after SIGHUP or SIGTERM; a signal outside training just ends it."),
        (
            str(INTERRUPTED),
            "Interrupted with Ctrl-C. Where that came too late, the message says so: all was done, "
            "and what was written is whole.",
        ),
    ]
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.QuantadaptError)
    ]
    rows = [
        (
            _code(cls.__name__),
            _code(cls.__bases__[0].__name__),
            str(cls.exit_code),
            _prose(cls.__doc__ or ""),
        )
        for cls in classes
    ]
    return "\n\n".join(
        [
            "# Errors and exit codes",
            "A message says what is wrong, where, and what to do. Python raises the same errors "
            "that the command line prints; `except quantadapt.QuantadaptError` catches them all, "
            "and `error.problems` lists every `Problem` with `what`, `fix`, `where` and `rule`. "
            "A traceback on the screen means a bug; please report it.",
            "## Exit codes",
            _table(("code", "meaning"), codes),
            "## Exceptions",
            "They live in `quantadapt.errors`.",
            _table(("class", "subclass of", "exit code", "meaning"), rows),
        ]
    )


# Matrix ----------------------------------------------------------------------------------------


def matrix_page(known: registry.Registry) -> str:
    """Return the declared and the verified matrix."""
    cells = matrix.declared(known.backends(), known.adapters())
    text = tables.to_markdown(cells, _verified(known)).replace("### ", "## ")
    return "\n\n".join(
        [
            "# Which backend goes with which adapter",
            "*Declared* is what backends and adapters say about themselves, for a CPU and default "
            "options; `quantadapt plan` goes by it. *Verified* is what the conformance suite "
            "found, where and with which versions. `quantadapt matrix` prints the same for your "
            "installation, and `quantadapt matrix --verify` finds it out for your machine. "
            "*requantize* means that merged weights may be quantized again; what a merge keeps of "
            "the gain depends on how far the adapter moved, so each one is measured, and written "
            "only if it keeps `export.min_gain`.",
            text,
        ]
    )


def readme(text: str, known: registry.Registry) -> str:
    """Return the README with its matrix written anew."""
    before, mark, rest = text.partition(MARK)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"README.md lacks the lines {MARK} and {END}")
    return f"{before}{MARK}\n{_excerpt(known)}\n{END}{after}"


def _excerpt(known: registry.Registry) -> str:
    """Return the main adapters on every backend."""
    cells = matrix.declared(known.backends(), [known.adapter(name) for name in matrix.MAIN])
    verified = _verified(known)
    head, *rows = tables.summary(cells, verified)
    table = _table(head, rows)
    origins = [f"on {part.where()}: {_in_short(part.generated)}" for part in verified]
    return f"{table}\n\nVerified {'; '.join(origins)}." if origins else table


def _in_short(generated: Mapping[str, Any]) -> str:
    versions = generated.get("versions") or {}
    facts = [generated.get("device"), generated.get("date")]
    facts += [f"{name} {versions[name]}" for name in results.PACKAGES[:3] if name in versions]
    return ", ".join(str(fact) for fact in facts if fact)


def _verified(known: registry.Registry) -> list[results.Verified]:
    """Return the verified results that come with the distribution."""
    names = {backend.name for backend in known.backends()}
    return [part.only(lambda cell: cell.backend in names) for part in results.bundled()]


def disagreements() -> list[str]:
    """Return where the verified results and what is declared now do not agree."""
    known = _own_plugins()
    return results.disagreements(results.bundled(), known.backends(), known.adapters())


# Markdown --------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(tables.markdown_table(head, rows))


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _code(text: str) -> str:
    return f"`{text}`"


def _fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def _json(value: Any) -> str:
    return json.dumps(value)


def _prose(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


def _docstring(text: str) -> list[str]:
    """Return a docstring as Markdown paragraphs: indented code fenced, arguments listed."""
    blocks: list[str] = []
    for block in inspect.cleandoc(text).split("\n\n") if text else ():
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            code = "\n".join(line[4:] for line in lines)
            if blocks and blocks[-1].startswith("```"):  # a blank line within the code
                gap = "\n\n\n" if code.startswith(("@", "def ", "class ")) else "\n\n"
                blocks[-1] = f"{blocks[-1].removesuffix('```').rstrip()}{gap}{code}\n```"
            else:
                blocks.append(_fence(code, "python"))
        elif lines[0].startswith("- "):
            blocks.append(block)
        elif lines[0] in ("Args:", "Attributes:"):
            items: list[str] = []
            for line in dedent("\n".join(lines[1:])).splitlines():
                if line.startswith(" "):
                    items[-1] += f" {line.strip()}"
                else:
                    name, _, rest = line.partition(": ")
                    items.append(f"- `{name}`: {rest}")
            blocks.append("\n".join(items))
        else:
            blocks.append(_prose(block))
    return blocks


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` say which are out of date, and what disagrees."""
    found = stale()
    wrong = disagreements()
    for line in wrong:
        print(f"matrix: {line}")
    for path, text in found.items():
        name = path.relative_to(ROOT)
        if "--check" in arguments:
            print(f"{name} is out of date; run: python docs/generate.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if wrong:
        print(
            f"verify these cells again with `{results.HOW}`, into quantadapt/matrix/matrix-*.json"
        )
    if not found and not wrong:
        print(f"everything is up to date with quantadapt {quantadapt.__version__}")
    return 1 if (found or wrong) and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
