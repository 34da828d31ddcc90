"""The notebook runs from top to bottom, and its numbers are those of plain transformers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from quantadapt import demo

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "first-run.ipynb"
ANSWER = '''\
def get_area(width, height):
    """Return width times height."""
    return width * height
'''
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_no_output_is_kept() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) > 10
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_its_links_lead_somewhere_and_one_opens_it_on_colab() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(map(source, CELLS)))
    (colab,) = [link for link in links if "colab" in link and link.endswith(".ipynb")]
    assert colab.endswith(f"/blob/main/{NOTEBOOK.relative_to(ROOT)}")
    for link in links:
        assert link.startswith("https://") or (NOTEBOOK.parent / link).resolve().exists(), link


def test_it_asks_what_the_tutorial_asks() -> None:
    """Whose answers are those that the notebook gets below."""
    (question,) = re.findall(r'^QUESTION = "(.+)"$', "\n".join(map(source, CELLS)), re.MULTILINE)
    tutorial = (ROOT / "docs" / "tutorial" / "first-run.md").read_text(encoding="utf-8")
    assert tutorial.count(f'--prompt "{question}"') == 2
    assert f"```python\n{ANSWER}" in tutorial


def perplexity(folder: Path) -> float:
    """Of the held-out answers, by plain transformers in float64, one text after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in demo.EVAL_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
        before = len(tokenizer(prompt).input_ids)
        ids = [*tokenizer(prompt + row["output"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, before - 1 : -1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[before:]), reduction="sum"
        )
        total, count = total + float(losses), count + len(ids) - before
    return math.exp(total / count)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    told = re.search(
        r"^perplexity ([\d.]+) before, ([\d.]+) after$", "".join(printed), re.MULTILINE
    )
    assert told, printed
    before, after = map(float, told.groups())
    assert after == pytest.approx(perplexity(tmp_path / "first-run" / "merged"), abs=1e-3)
    assert before == pytest.approx(16.4, abs=0.2)
    right = [text for text in printed if ANSWER in text]
    assert len(right) == 2  # the tuned model, and what plain transformers loads
    chat = printed[-1]
    assert "return [x for x in items if x != code]" in chat
    assert "return length < width" in chat
