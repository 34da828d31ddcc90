"""Continued pretraining: text from many sources, never whole in memory, packed without leaks."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.data import streams
from quantadapt.data.batches import PackedCollator
from quantadapt.data.files import Row
from quantadapt.data.streams import load_stream, survey_stream
from quantadapt.errors import DataError, PlanRefused, SpecError
from quantadapt.machine import Machine
from quantadapt.objectives.pretrain import Pretrain
from quantadapt.planning.stage import plan
from quantadapt.spec import DataSpec, Spec, TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training.stage import train

TRAIN = {"logging_steps": 1, "per_device_train_batch_size": 2, "warmup_ratio": 0.0,
         "learning_rate": 1e-3}  # fmt: skip


def lines(path: Path, start: int, count: int, word: str = "line") -> Path:
    texts = [f"{word} {n} of a file that is about {n * n}" for n in range(start, start + count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path


def data_of(**values: Any) -> Any:
    return Spec(data={"max_length": 32, **values}).data


def texts_in(dataset: Any, tokenizer: Any) -> str:
    return "".join(tokenizer.decode(row) for row in dataset["input_ids"])


def test_no_token_is_lost_and_none_is_there_twice(tmp_path: Path, tokenizer: Any) -> None:
    """Rows are the documents in some order, each between bos and eos as stock tokenizing has it."""
    path = lines(tmp_path / "a.jsonl", 0, 50)
    made = load_stream(data_of(path=str(path), eval_examples=4), tokenizer, seed=1)
    assert {len(ids) for ids in made.train["input_ids"][:-1]} == {32}
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in made.train)
    assert all(all(row["completion_mask"]) for row in made.train)
    flat = [token for row in made.train["input_ids"] for token in row]
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    wanted = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
    assert sorted(made.eval["input_ids"]) == sorted(ids[:32] for ids in wanted[:4])
    found, rest = [], list(flat)
    while rest:
        end = rest.index(tokenizer.eos_token_id) + 1
        found.append(rest[:end])
        rest = rest[end:]
    assert sorted(found) == sorted(wanted[4:])
    assert found != wanted[4:]  # shuffled


def test_a_row_for_each_document_without_packing(tmp_path: Path, tokenizer: Any) -> None:
    spec = data_of(path=str(lines(tmp_path / "a.jsonl", 0, 9)), eval_examples=1, max_length=8)
    made = load_stream(spec, tokenizer, seed=0, packed=False)
    assert all(row["seq_lengths"] == [len(row["input_ids"])] for row in made.train)
    assert max(map(len, made.train["input_ids"])) == 8


def test_it_is_never_whole_in_memory(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    """Counts the rows that are alive while 3000 are read."""
    monkeypatch.setattr(streams, "SHUFFLED", 50)
    alive, most, total = 0, 0, 0
    real = Row.__init__

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(self: Row, *args: Any, **kwargs: Any) -> None:
        nonlocal alive, most, total
        real(self, *args, **kwargs)
        weakref.finalize(self, gone)
        alive, total = alive + 1, total + 1
        most = max(most, alive)

    monkeypatch.setattr(Row, "__init__", counted)
    for ending in ("jsonl", "csv", "parquet", "txt"):
        path = tmp_path / f"many.{ending}"
        rows = [f"text number {n}" for n in range(3000)]
        if ending == "parquet":
            table = pyarrow.table({"text": rows})
            pyarrow.parquet.write_table(table, path, row_group_size=100)
        elif ending == "jsonl":
            path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        else:
            path.write_text("\n".join(["text", *rows]))
        gc.collect()
        alive = most = total = 0
        made = load_stream(data_of(path=str(path), eval_examples=10), tokenizer, seed=0)
        assert total > 3000
        assert most < 400, ending
        first = load_stream(data_of(path=str(path), eval_examples=10), tokenizer, seed=0, rows=3)
        assert first.train["input_ids"] == made.train["input_ids"][:3]


def test_it_reads_no_further_than_it_has_to(tmp_path: Path, tokenizer: Any) -> None:
    """A broken line behind what the steps take is never reached."""
    path = lines(tmp_path / "a.jsonl", 0, 3000)
    path.write_text(path.read_text() + "{broken")
    with pytest.raises(DataError, match="not valid JSON"):
        load_stream(data_of(path=str(path)), tokenizer, seed=0)
    assert len(load_stream(data_of(path=str(path)), tokenizer, seed=0, rows=8).train) == 8


def test_files_of_a_pattern_and_of_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    lines(tmp_path / "a.jsonl", 0, 10, "first")
    lines(tmp_path / "b.jsonl", 0, 10, "second")
    lines(tmp_path / "test.jsonl", 0, 3, "held")
    made = load_stream(data_of(path=f"{tmp_path}/[ab].jsonl"), tokenizer, seed=0)
    assert "first" in (text := texts_in(made.train, tokenizer))
    assert "second" in text
    folder = load_stream(data_of(path=str(tmp_path)), tokenizer, seed=0)
    assert "held" not in texts_in(folder.train, tokenizer)
    assert len(folder.eval) == 3
    apart = load_stream(data_of(path=f"{tmp_path}/a.jsonl", eval_path=f"{tmp_path}/b.jsonl"),
                        tokenizer, seed=0)  # fmt: skip
    assert "second" not in texts_in(apart.train, tokenizer)
    assert len(apart.eval) == 10


def test_weights_are_shares_of_the_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """One source is small and begun again and again."""
    large = lines(tmp_path / "large.jsonl", 0, 400, "large")
    small = lines(tmp_path / "small.jsonl", 0, 10, "tiny")
    sources = [{"path": str(large), "weight": 3}, {"path": str(small), "weight": 1}]
    made = load_stream(data_of(sources=sources, eval_examples=4), tokenizer, seed=0, rows=100)
    assert len(made.train) == 100
    flat = [token for row in made.train["input_ids"] for token in row]
    starts = [place for place, token in enumerate(flat) if token == tokenizer.bos_token_id]
    tokens, documents = {"large": 0, "tiny": 0}, Counter[str]()
    for start, end in zip(starts, [*starts[1:], len(flat)], strict=True):
        text = tokenizer.decode(flat[start:end], skip_special_tokens=True)
        kind = "large" if text.startswith("la") else "tiny"
        tokens[kind] += end - start
        documents[kind] += 1
    assert tokens["large"] / tokens["tiny"] == pytest.approx(3, rel=0.02)
    again = {Path(file.file).name: file.remarks["begun again"] for file in made.report.files}
    # Two of its ten texts are held out.
    assert again == {"large.jsonl": 0, "small.jsonl": -(-documents["tiny"] // 8) - 1}
    held = texts_in(made.eval, tokenizer)
    assert "large 0" in held
    assert "tiny 0" in held


def test_the_same_seed_gives_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    spec = data_of(path=str(lines(tmp_path / "a.jsonl", 0, 60)))
    made = [load_stream(spec, tokenizer, seed=seed).train["input_ids"] for seed in (5, 5, 6)]
    assert made[0] == made[1]
    assert made[0] != made[2]


# --- training ------------------------------------------------------------------------------------


def test_documents_of_a_row_do_not_see_each_other(tmp_path: Path, tokenizer: Any) -> None:
    """The loss of packed rows is that of each part by itself, by stock transformers."""
    spec = data_of(path=str(lines(tmp_path / "a.jsonl", 0, 12)), eval_examples=1)
    rows = load_stream(spec, tokenizer, seed=0).train
    assert any(len(row["seq_lengths"]) > 1 for row in rows)
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", seed=0)
    batch = PackedCollator(0)([rows[0], rows[1]])
    task = Pretrain()
    found = float(task.loss(model.eval(), dict(batch), float(task.count(batch))).detach())
    dense = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for row in (rows[0], rows[1]):
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            start += length
            if length > 1:
                with torch.no_grad():
                    total += float(dense(input_ids=ids, labels=ids).loss) * (length - 1)
                tokens += length - 1
    assert task.count(batch) == tokens
    assert found == pytest.approx(total / tokens, rel=1e-5)


def trained(data: Any, output: Path, steps: list[int], **options: Any) -> list[torch.Tensor]:
    for count in steps:
        model = qa.attach(qa.quantize(str(small_model()), "hqq"), "lora", seed=0)
        given = {**TRAIN, "max_steps": count, "save_steps": 1, "lr_scheduler_type": "constant"}
        qa.train(model, data, objective="pretrain", output=output, max_length=32,
                 **{"resume": count != steps[0], **given, **options})  # fmt: skip
    return [p.detach() for p in model.parameters() if p.requires_grad]


def test_a_resumed_run_gets_the_same_batches(tmp_path: Path) -> None:
    """Bit for bit, also where the run that is resumed is to be longer than it was."""
    sources = [{"path": str(lines(tmp_path / "a.jsonl", 0, 30)), "weight": 2},
               {"path": str(lines(tmp_path / "b.jsonl", 50, 8)), "weight": 1}]  # fmt: skip
    whole = trained(sources, tmp_path / "whole", [4])
    twice = trained(sources, tmp_path / "twice", [2, 4])
    assert all(one.equal(other) for one, other in zip(whole, twice, strict=True))


def test_other_data_are_noticed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 0, 60)
    trained(str(path), tmp_path / "run", [1])
    lines(path, 70, 60)
    with pytest.raises(qa.errors.TrainingError, match="not those of"):
        trained(str(path), tmp_path / "run", [2], resume=True)


# --- the plan ------------------------------------------------------------------------------------


def planned(**values: Any) -> Any:
    spec = Spec(**{"model": str(small_model()), "objective": "pretrain", **values})
    return plan(spec, machine=Machine(), check_output=False)


def test_the_plan_packs_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    path = str(lines(tmp_path / "a.jsonl", 0, 9))
    made = planned(data={"path": path}, train={"max_steps": 10})
    assert made.spec.train.packing is True
    size = Path(path).stat().st_size
    told = f"10 steps read 80 rows of 512 tokens of 1 file of {size} bytes in each process"
    assert any(told in note for note in made.notes)
    made = planned(data=path)
    assert any("is known once they are read" in note for note in made.notes)
    assert planned(data=path, train={"packing": False}).spec.train.packing is False
    assert planned(data=path, objective="sft").spec.train.packing is False


def test_packing_counts_pieces_of_documents_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    """A document that goes on in the next row was told as one example more."""
    path, eos, notes = lines(tmp_path / "a.jsonl", 0, 40), tokenizer.eos_token_id, list[str]()
    rows = load_stream(data_of(path=str(path), eval_examples=2), tokenizer, seed=0).train
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora")
    spec = TrainSpec(packing=True, max_steps=1, per_device_train_batch_size=2)
    given: Any = {"output": tmp_path / "run", "seed": 0, "on_note": notes.append}
    found = train(model, tokenizer, rows, spec, task=Pretrain(), **given).packed
    ids = rows["input_ids"]
    assert sum(row.count(eos) for row in ids) == 38
    assert found.examples == 38 + sum(row[-1] != eos for row in ids[:-1]) > 38
    words = f"packing: {found.examples} pieces of documents in {len(rows)} rows"
    assert any(note.startswith(words) for note in notes)


def test_what_does_not_go_is_refused_at_once(tmp_path: Path) -> None:
    path = str(lines(tmp_path / "a.jsonl", 0, 9))

    def refusal(**values: Any) -> str:
        with pytest.raises((PlanRefused, SpecError)) as error:
            planned(**values)
        return str(error.value)

    weighted = [{"path": path, "weight": 1}, {"path": path, "weight": 2}]
    assert "set train.max_steps" in refusal(data=weighted)
    assert "set train.max_steps" in refusal(data="owner/name")
    assert "some have none" in refusal(data=[weighted[0], path], train={"max_steps": 1})
    assert "both say" in refusal(data={"path": path, "sources": [path]})
    assert "reads one source" in refusal(data=[path], objective="sft")
    assert "no file fits" in refusal(data=f"{tmp_path}/*.csv")
    assert "does not exist" in refusal(data=["./nowhere.txt"])
    assert "greater than 0" in refusal(data=[{"path": path, "weight": 0}])
    both = refusal(data=[weighted[0], "./nowhere.txt"], objective="sft")
    assert "reads one source" in both
    assert "does not exist" in both


def test_a_source_that_is_empty_is_told(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="only one document"):
        load_stream(data_of(path=str(tmp_path / "one.jsonl")), tokenizer, seed=0)
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(DataError, match="there is no document"):
        load_stream(data_of(path=str(tmp_path / "none.txt")), tokenizer, seed=0)
    (tmp_path / "odd.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    with pytest.raises(DataError, match=r"data\.columns"):
        load_stream(data_of(path=str(tmp_path / "odd.jsonl")), tokenizer, seed=0)


def test_a_plan_counts_no_rows_that_it_has_not_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    report = survey_stream(DataSpec(path=str(path)))
    assert report.words() == [f"{path}: text, read row by row"]
