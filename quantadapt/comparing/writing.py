"""The files of a comparison's table: `compare.json`, `compare.csv` and the page `compare.html`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..folders.run_folder import json_ready
from .folder import CompareFolder
from .grid import Comparison
from .page import Shown, render
from .results import Row, Stat, Table
from .verdict import COSTS, Verdict, front, noise_of, verdict


def write_tables(
    folder: CompareFolder, comparison: Comparison, table: Table, command: str = ""
) -> None:
    """Write all three. Each is whole at any time."""
    found = verdict(table, comparison.options)
    document = document_of(folder, comparison, table, found)
    folder.write("compare.json", json.dumps(json_ready(document), indent=1, ensure_ascii=False))
    folder.write("compare.csv", csv_of(table))
    shown = Shown(folder.journal, comparison, table, found, command)
    folder.write("compare.html", render(shown))


def document_of(
    folder: CompareFolder, comparison: Comparison, table: Table, found: Verdict
) -> dict[str, Any]:
    """Return what `compare.json` holds."""
    journal, quality, rows = folder.journal, table.quality, table.judged()
    noise = noise_of(rows, quality) if quality else None
    fronts = {
        name: [row.label for row in front(rows, quality, cost)] if quality else []
        for name, cost in COSTS.items()
    }
    return {
        "version": journal.version,
        "started": journal.started,
        "state": journal.state,
        "comparison": comparison.to_dict(),
        "judged_by": quality and asdict(quality),
        "recommended": found.row.label if found.row else None,
        "words": found.words,
        "tied": list(found.tied),
        "noise": noise and asdict(noise),
        "fronts": fronts,
        "rungs": journal.rungs,
        "seconds": journal.seconds,
        "remarks": table.remarks,
        "shared": table.shared,
        "rows": [_row(row) for row in table.rows],
        "runs": {run.name: _run(folder, run.name) for run in comparison.runs},
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "settings": dict(row.cell.settings) if row.cell else None,
        "reference": row.reference,
        "state": row.state,
        "reason": row.reason,
        "steps": row.steps,
        "runs": row.names,
        "before": {name: _stat(stat) for name, stat in row.before.items()},
        "after": {name: _stat(stat) for name, stat in row.after.items()},
        "errors": {name: _stat(stat) for name, stat in row.errors.items()},
        "numbers": {name: _stat(stat) for name, stat in row.numbers.items()},
        "warnings": row.warnings,
    }


def _stat(stat: Stat) -> dict[str, Any]:
    return {"mean": stat.mean, "spread": stat.spread, "values": list(stat.values)}


def _run(folder: CompareFolder, name: str) -> dict[str, Any]:
    record = folder.record(name)
    told = record.model_dump(include={"state", "reason", "seconds"})
    return told | {"folder": f"runs/{name}", "results": record.results}


NUMBERS = (
    *("gain_kept", "memory_gib", "tokens_per_second", "base_mib", "adapter_mib", "size_mib"),
    *("train_seconds", "quantize_seconds", "quantize_memory_gib", "seconds", "trained"),
)
"""Columns of the CSV beside the figures of evaluations; means over the seeds."""


def csv_of(table: Table) -> str:
    """Return the table as CSV, one line for each row."""
    rows = [_csv_row(row, table) for row in table.rows]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(row: Row, table: Table) -> dict[str, Any]:
    found: dict[str, Any] = {"cell": _plain(row.label)}
    found |= {key: _plain(value) for key, value in (row.cell.settings if row.cell else {}).items()}
    found |= {"reference": row.reference, "state": row.state, "reason": _plain(row.reason)}
    found |= {"runs": len(row.names), "steps": row.steps}
    for name in table.qualities:
        found |= dict(_columns(f"{name} before", row.before.get(name)))
        found |= dict(_columns(f"{name} after", row.after.get(name)))
    for name in NUMBERS:
        stat: Stat | None = row.numbers.get(name)
        found[name] = stat.mean if stat else None
    return found


def _columns(name: str, stat: Stat | None) -> Iterator[tuple[str, float | None]]:
    yield name, stat.mean if stat else None
    yield f"{name} spread", stat.spread if stat else None


def _plain(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula."""
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(json_ready(value), ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
