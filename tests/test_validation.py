"""Validation while training: stock numbers, the best step kept, early stopping, also after a
resume and on several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from processes import in_processes
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import quantadapt as qa
from quantadapt import planning
from quantadapt.data.batches import CausalCollator
from quantadapt.distributed.talking import PeerLost, peers_in_words
from quantadapt.errors import PlanRefused, QuantadaptError, TrainingError
from quantadapt.evaluation import perplexity
from quantadapt.reporting.charts import Curve, line_chart
from quantadapt.spec import DataSpec, Spec, TrainSpec
from quantadapt.training import train
from quantadapt.training.validation import best_of, waited

TARGETS = ["q_proj", "v_proj", "down_proj"]
FAST = {"adalora": {"learning_rate": 0.3}}
"""What overfits within 24 steps, where it is not the usual rate."""
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS),
    "norm": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "adalora": lambda: AdaLoraConfig(init_r=6, target_r=2, total_step=999, target_modules=TARGETS),
}


def adapted(name: str = "lora") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    config = CONFIGS[name]()
    config.task_type = "CAUSAL_LM"
    return get_peft_model(base, config)


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    """9 examples of random tokens, of several lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 24, (9,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict(
        {"input_ids": ids, "completion_mask": [[0] * 2 + [1] * (n - 2) for n in lengths]}
    )


def spec(**options: Any) -> TrainSpec:
    defaults = {"max_steps": 12, "logging_steps": 1, "per_device_train_batch_size": 4}
    schedule = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return TrainSpec(**{**defaults, **schedule, "eval_steps": 3, **options})


@pytest.fixture
def run(tokenizer, random_data, held_out, tmp_path) -> Any:
    """Train on random tokens, which overfits."""

    def trained(model: Any, *, folder: str = "run", on_log: Any = None, **options: Any) -> Any:
        notes: list[str] = []
        result = train(
            *(model, tokenizer, random_data, spec(**options)),
            output=tmp_path / folder,
            seed=0,
            held_out=held_out,
            on_log=on_log,
            on_note=notes.append,
        )
        return result, notes

    return trained


def stock_loss(model: Any, examples: Dataset, folder: Path) -> float:
    """Return transformers' own eval_loss, of one batch: it weighs batches, not tokens."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=len(examples),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    padded = CausalCollator(pad_token_id=0)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = padded(rows)
        batch.pop("counted")
        return batch

    trainer = Trainer(model=model, args=args, eval_dataset=examples, data_collator=collator)
    return float(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_stock_transformers(name, run, held_out, tmp_path) -> None:
    model = adapted(name)
    result, _ = run(model)
    assert [step for step, _ in result.validation] == [3, 6, 9, 12]
    assert result.validation[-1][1] == pytest.approx(
        stock_loss(model, held_out, tmp_path), rel=1e-6
    )
    if name != "adalora":  # which adds something to the model's loss, there as here
        assert result.validation[-1][1] == pytest.approx(perplexity(model, held_out).loss, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"packing": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_how_training_saves_memory_does_not_matter(options, run, held_out) -> None:
    model = adapted()
    result, _ = run(model, **options)
    assert result.validation[-1][1] == pytest.approx(perplexity(model, held_out).loss, rel=1e-6)


def test_an_encoder_decoder_model_is_measured(tokenizer, random_data, held_out, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, **tokens))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    given = {"output": tmp_path, "seed": 0, "held_out": held_out}
    result = train(model, tokenizer, random_data, spec(), **given)
    assert result.validation[-1][1] == pytest.approx(perplexity(model, held_out).loss, rel=1e-5)


def test_training_is_the_same_with_and_without_it(run) -> None:
    """Dropout draws random numbers: measuring must not."""
    measured, _ = run(adapted())
    alone, _ = run(adapted(), folder="alone", eval_steps=None)
    assert measured.losses == alone.losses
    assert alone.validation == []
    assert (alone.best_step, alone.kept_step, alone.stopped_early) == (None, 12, False)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_best_step_is_kept(name, run, held_out, tmp_path) -> None:
    model = adapted(name)
    options = {"max_steps": 24, **FAST.get(name, {})}
    found, notes = run(model, load_best_model_at_end=True, **options)
    step, lowest = min(found.validation, key=lambda pair: pair[1])
    assert step < 24, "the data do not overfit"
    assert (found.best_step, found.kept_step, found.steps) == (step, step, 24)
    assert stock_loss(model, held_out, tmp_path) == pytest.approx(lowest, rel=1e-6)
    assert any(f"the adapter of step {step} is kept" in note for note in notes)
    other, notes = run(adapted(name), folder="last", **options)
    assert other.kept_step == 24
    assert any("load_best_model_at_end would keep" in note for note in notes)


def test_epochs(run) -> None:
    result, _ = run(
        adapted(), eval_steps=None, eval_strategy="epoch", max_steps=-1, num_train_epochs=2
    )
    assert [step for step, _ in result.validation] == [8, 16]


def test_the_last_step_is_measured_whatever_eval_steps_is(run) -> None:
    calls: list[dict[str, Any]] = []
    result, _ = run(adapted(), eval_steps=5, on_log=calls.append)
    assert [step for step, _ in result.validation] == [5, 10, 12]
    told = [(call["step"], call["eval_loss"]) for call in calls if "eval_loss" in call]
    assert told == result.validation
    assert [call["step"] for call in calls if "loss" in call] == list(range(1, 13))
    assert all(call["max_steps"] == 12 and call["seconds"] > 0 for call in calls)


SEQUENCES = [
    [3.0, 2.0, 1.0, 1.0, 1.0],
    [3.0, 2.9, 2.8, 2.75, 2.74],
    [1.0, 2.0, 0.95, 0.94, 3.0],
    [2.0, math.nan, 1.0, math.nan, 1.5],
]


@pytest.mark.parametrize("losses", SEQUENCES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_patience_is_counted_as_transformers_does(losses, threshold, tmp_path) -> None:
    callback = EarlyStoppingCallback(99, threshold)
    args = TrainingArguments(str(tmp_path), metric_for_best_model="eval_loss", use_cpu=True)
    args.greater_is_better = False
    state, control, measured = TrainerState(), TrainerControl(), []
    for step, loss in enumerate(losses):
        callback.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        measured.append((step, loss))
        assert waited(measured, threshold) == callback.early_stopping_patience_counter


def test_the_best_of_no_numbers_is_none() -> None:
    assert best_of([]) is None
    assert best_of([(1, math.nan), (2, math.inf)]) is None
    assert best_of([(1, math.nan), (2, 2.0), (3, 2.0), (4, 3.0)]) == 2


def test_early_stopping(run) -> None:
    options = {"early_stopping_patience": 2, "max_steps": 60, "load_best_model_at_end": True}
    result, notes = run(adapted(), **options)
    steps = [step for step, _ in result.validation]
    assert result.stopped_early
    assert result.steps == steps[-1] == result.best_step + 2 * 3 < 60
    assert result.kept_step == result.best_step
    assert result.losses[-1][0] == result.steps  # the last step is logged, here too
    assert any("stopped early" in note and "for 2 validations" in note for note in notes)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_resumed_run_knows_what_was_measured_before(name, run, tmp_path) -> None:
    options = {"save_steps": 6, "load_best_model_at_end": True, "max_steps": 24}
    options |= FAST.get(name, {})
    model = adapted(name)
    whole, _ = run(model, folder="whole", **options)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(adapted(name), folder="cut", on_log=stop, **options)
    again = adapted(name)
    resumed, _ = run(again, folder="cut", resume=True, **options)
    assert resumed.resumed_from == 18
    assert dict(resumed.validation) == pytest.approx(dict(whole.validation), abs=1e-5)
    assert resumed.kept_step == whole.kept_step < 24
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in weights)


def test_a_run_that_ends_with_an_epoch_has_measured_it(run) -> None:
    """The checkpoint of its last step was written before, and the resumed run began the next."""
    options = {"eval_steps": None, "eval_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"save_steps": 4, "max_steps": -1, "num_train_epochs": 2.5}
    model = adapted()
    whole, _ = run(model, folder="whole", **options)
    assert [step for step, _ in whole.validation] == [8, 16, 20]
    assert whole.kept_step == 8  # what is to be found again

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(adapted(), folder="cut", on_log=stop, **options)
    again = adapted()
    resumed, _ = run(again, folder="cut", resume=True, **options)
    assert resumed.resumed_from == 8
    assert resumed.validation == whole.validation
    assert resumed.kept_step == 8
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(one.equal(other) for one, other in weights)


def test_a_run_that_stopped_early_does_not_go_on(run) -> None:
    options = {"early_stopping_patience": 1, "max_steps": 60, "save_steps": 3}
    options |= {"load_best_model_at_end": True}
    model = adapted()
    first, _ = run(model, **options)
    again = adapted()
    resumed, _ = run(again, resume=True, **options)
    assert resumed.steps == first.steps < 60
    assert resumed.kept_step == first.kept_step < first.steps
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(one.equal(other) for one, other in weights)


def test_best_weights_that_a_checkpoint_lacks_are_missed(run) -> None:
    run(adapted(), save_steps=6)
    with pytest.raises(TrainingError, match="not in this checkpoint"):
        run(adapted(), save_steps=6, max_steps=18, resume=True, load_best_model_at_end=True)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "fix"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "set train.eval_steps"),
        ({"early_stopping_patience": 2}, "early_stopping_patience", "set train.eval_steps"),
        (
            {"early_stopping_threshold": 0.1, "eval_steps": 2},
            "early_stopping_threshold",
            "set train.early_stopping_patience",
        ),
        ({"eval_strategy": "epoch", "eval_steps": 2}, "eval_steps", "leave one"),
        ({"eval_strategy": False, "eval_steps": 2}, "eval_steps", "leave one"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused_by_the_plan(options, where, fix) -> None:
    with pytest.raises(PlanRefused) as refused:
        qa.plan(qa.Spec(backend="none", train=options))
    (problem,) = refused.value.problems
    assert problem.where == f"train.{where}"
    assert fix in problem.fix


def test_without_held_out_data_it_is_refused(tokenizer, random_data, held_out, tmp_path) -> None:
    with pytest.raises(TrainingError, match="no held-out examples"):
        train(adapted(), tokenizer, random_data, spec(), output=tmp_path, seed=0)
    model = qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=2)
    with pytest.raises(TrainingError, match="no held-out examples"):
        qa.train(model, random_data, max_steps=2, eval_steps=1)
    with pytest.raises(QuantadaptError, match="eval_data has no effect"):
        qa.train(model, random_data, eval_data=held_out, max_steps=2)
    result = qa.train(
        model, random_data, eval_data=held_out, max_steps=2, eval_steps=1, learning_rate=1e-3
    )
    assert result.validation[-1][1] == pytest.approx(perplexity(model, held_out).loss, rel=1e-6)


TEXTS = {
    "sft": lambda i: {"prompt": f"{i}?", "completion": " yes" * (1 + i % 3)},
    "dpo": lambda i: {"prompt": f"{i}?", "chosen": " yes" * (1 + i % 3), "rejected": " no"},
    "embed": lambda i: {"anchor": f"number {i}", "positive": str(i), "negative": str(i + 1)},
}


@pytest.mark.parametrize("objective", TEXTS)
def test_a_file_to_measure_on_leaves_all_data_to_be_learnt(objective, tmp_path) -> None:
    """A part of `data` was held out beside it, and neither learnt nor measured; and it was read as
    text, whatever the objective reads."""
    files = [tmp_path / name for name in ("train.jsonl", "measured.jsonl")]
    for file, numbers in zip(files, (range(8), range(20, 23)), strict=True):
        file.write_text("".join(json.dumps(TEXTS[objective](i)) + "\n" for i in numbers))
    data, measured = files
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    found = []
    for given in (str(data), "tokenized"):
        torch.manual_seed(0)
        model = qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=2)
        if given == "tokenized":
            task = planning.task_for(Spec(objective=objective))
            both = DataSpec(path=str(data), eval_path=str(measured))
            given = task.read(both, model.quantadapt.tokenizer, seed=0).train
        notes: list[str] = []
        found.append(
            qa.train(
                *(model, given),
                objective=objective,
                eval_data=measured,
                eval_steps=8,
                on_note=notes.append,
                **options,
            )
        )
        assert found[-1].steps == 8
    assert found[0].validation == found[1].validation
    assert len(found[0].validation) == 1


def test_examples_that_nobody_learns_are_told(held_out, tmp_path) -> None:
    """Of a file, where what is measured on comes tokenized."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(TEXTS["sft"](i)) + "\n" for i in range(8)))
    model, notes = qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=2), list[str]()
    options = {"max_steps": 1, "eval_steps": 1, "on_note": notes.append}
    qa.train(model, str(data), eval_data=held_out, **options)
    assert "data: eval_data is measured on, and not the 1 held out" in notes


class Weighted(qa.SFT):
    """A task whose loss reads a column that held-out examples do not have."""

    def columns(self, row: Any) -> dict[str, float]:
        return {"importance": 1.0}

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Any:
        weight = batch.pop("importance").mean()
        return weight * super().loss(model, batch, count)


def test_a_column_that_is_missing_is_named_before_any_step(
    tokenizer, random_data, held_out, tmp_path
) -> None:
    data = random_data.add_column("importance", [1.0] * len(random_data))
    steps: list[Any] = []
    with pytest.raises(TrainingError, match=r"held-out examples: KeyError: 'importance'"):
        train(
            *(adapted(), tokenizer, data, spec()),
            task=Weighted(),
            output=tmp_path,
            seed=0,
            held_out=held_out,
            on_log=steps.append,
        )
    assert steps == []


# Several processes --------------------------------------------------------------------------------


def in_two(folder: Path, parallel: str) -> list[tuple[int, float]]:
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    base = qa.quantize(None, "none", device="cpu")
    start("cpu")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", r=4)
    data = _demo_examples(21)  # an odd number of batches: one process has a batch less
    result = qa.train(
        *(model, data.select(range(16))),
        eval_data=data.select(range(16, 21)),
        max_steps=2,
        eval_steps=1,
        per_device_train_batch_size=2,
        output=folder / parallel,
    )
    return result.validation


def _demo_examples(count: int) -> Dataset:
    from transformers import AutoTokenizer

    from quantadapt import demo
    from quantadapt.data import load_data
    from quantadapt.spec import DataSpec

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    return load_data(DataSpec(), tokenizer, seed=0).train.select(range(count))


def both(folder: Path) -> list[Any]:
    return [in_two(folder, "ddp"), in_two(folder, "fsdp")]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path) -> None:
    found = in_processes(2, both, tmp_path, tmp_path)
    assert found[0] == found[1]
    model = qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=4)
    data = _demo_examples(21)
    alone = qa.train(
        *(model, data.select(range(16))),
        eval_data=data.select(range(16, 21)),
        max_steps=2,
        eval_steps=1,
        per_device_train_batch_size=4,
    )
    for measured in found[0]:
        assert dict(measured) == pytest.approx(dict(alone.validation), rel=1e-5)


class Full:
    """Raises out-of-memory errors in one process, in passes of so many rows or more."""

    def __init__(self, rank: int, rows: int, *, training: bool) -> None:
        self.rank, self.rows, self.training, self.raised = rank, rows, training, 0

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        from quantadapt.distributed import world

        here = world().rank == self.rank and module.training == self.training
        if here and len(args[0]) >= self.rows:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def full_in_two(folder: Path, parallel: str, full: Full | None) -> tuple[Any, list[str]]:
    """What was measured, or the error, and what was noted."""
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    base = qa.quantize(None, "none", device="cpu")
    start("cpu")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", r=4)
    if full is not None:
        model.get_base_model().model.layers[-1].mlp.register_forward_pre_hook(full)
    data, notes = _demo_examples(25), []
    try:
        with peers_in_words():
            result = qa.train(
                *(model, data.select(range(16))),
                eval_data=data.select(range(16, 25)),
                max_steps=2,
                eval_steps=1,
                per_device_train_batch_size=4,
                output=folder,
                on_note=notes.append,
            )
    except QuantadaptError as error:
        return error, notes
    return result.validation, notes


def out_of_memory_apart(folder: Path) -> dict[str, Any]:
    """Nobody waits for anybody within a pass."""
    found = {"expected": full_in_two(folder / "expected", "ddp", None)}
    for rank in (0, 1):
        for name, training in (("validation", False), ("step", True)):
            full = Full(rank, 2, training=training)
            found[f"{name} {rank}"] = full_in_two(folder / f"{name}{rank}", "ddp", full)
    return found


@pytest.mark.slow
def test_memory_that_runs_out_in_one_of_two_processes_changes_no_loss(tmp_path) -> None:
    first, second = in_processes(2, out_of_memory_apart, tmp_path, tmp_path)
    expected, no_notes = first.pop("expected")
    assert second.pop("expected") == (expected, no_notes)
    assert len(expected) == 2
    for name, (measured, notes) in first.items():
        what, _, rank = name.partition(" ")
        assert measured == second[name][0], name
        assert dict(measured) == pytest.approx(dict(expected), rel=1e-5), name
        others = " (process 1)" if rank == "1" else ""
        if what == "validation":
            words = "out of memory in validation: from here on {} examples at a time"
            assert notes == [words.format(2) + others, words.format(1) + others]
        else:  # micro-batches of another size than the other process has
            assert notes[-1] == f"{second[name][1][-1]}{others}" if others else notes[-1]
            assert "micro-batches of 1" in notes[-1]


@pytest.mark.parametrize("packing", [False, True])
def test_what_memory_does_not_hold_at_once_is_measured_in_parts(packing, tmp_path) -> None:
    """Held-out examples are not packed, whatever those are that are learnt from."""
    data, found, notes = _demo_examples(25), [], []
    for full in (None, Full(0, 3, training=False)):
        model = qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=4)
        if full is not None:
            model.get_base_model().model.layers[-1].mlp.register_forward_pre_hook(full)
        result = qa.train(
            *(model, data.select(range(16))),
            eval_data=data.select(range(16, 25)),
            **{"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4},
            packing=packing,
            on_note=notes.append,
        )
        found.append(dict(result.validation))
    assert full.raised == 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    (note,) = [note for note in notes if "out of memory" in note]
    assert note == "out of memory in validation: from here on 2 examples at a time"


def out_of_memory_together(folder: Path) -> tuple[Any, list[str]]:
    return full_in_two(folder, "fsdp", Full(1, 2, training=False))


@pytest.mark.slow
def test_memory_that_runs_out_where_processes_wait_is_told_with_what_to_set(tmp_path) -> None:
    (first, _), (second, notes) = in_processes(2, out_of_memory_together, tmp_path, tmp_path)
    assert "out of memory in validation" in second.problems[0].what
    assert "train.per_device_train_batch_size" in second.problems[0].fix
    assert isinstance(first, PeerLost)
    assert notes == []


# A whole run --------------------------------------------------------------------------------------


def test_a_run_tells_it_in_metrics_log_and_report(tmp_path) -> None:
    events: list[tuple[str, Any]] = []
    wanted = qa.Spec(
        backend="none",
        train={"max_steps": 6, "eval_steps": 2, "load_best_model_at_end": True,
               "per_device_train_batch_size": 2, "logging_steps": 2},
        evaluate={"max_examples": 4, "samples": 0, "unquantized": False},
        export={"merge": "never"},
        output=str(tmp_path / "run"),
    )  # fmt: skip
    result = qa.run(wanted, listener=lambda event, data: events.append((event, dict(data))))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
    measured = [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line]
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert metrics["train"]["validation"] == measured
    assert [step for step, _ in measured] == [2, 4, 6]
    assert [data["step"] for event, data in events if event == "validation"] == [2, 4, 6]
    assert all("loss" in data for event, data in events if event == "log")
    kept = dict(map(tuple, measured))[metrics["train"]["kept_step"]]
    tuned = metrics["evaluations"]["perplexity"]["loss"]["values"]["tuned"]
    assert tuned == pytest.approx(kept, rel=1e-6)
    page = (result.folder / "report.html").read_text()
    assert "held-out" in page
    assert f"The adapter of step {metrics['train']['kept_step']} is kept." in page


def test_the_chart_shows_both_curves_and_the_step_that_is_kept() -> None:
    curve = Curve([(1, 3.0), (9, 1.0)], [(3, 2.5), (6, 2.0), (9, 2.2)], kept=6)
    drawn = line_chart(curve)
    assert drawn.count('class="curve held-out"') == 2  # wide and narrow
    assert drawn.count('class="mark"') == 6
    assert ">kept<" in drawn
    assert "On held-out data from 2.50 to 2.20." in drawn
    plain = line_chart(Curve([(1, 3.0), (9, 1.0)]))
    assert "held-out" not in plain
    assert ">kept<" not in plain
