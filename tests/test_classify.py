"""Classifiers and reward models: heads that are made, trained, saved, merged and loaded again."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.labelled import load_labelled
from quantadapt.data.preferences import load_preferences
from quantadapt.errors import DataError, ModelError, PlanRefused
from quantadapt.testing.small_demo import small_model

torch.set_num_threads(1)
TEXTS = [("It is red.", "colour"), ("Go north now.", "way"), ("Two and three.", "number"),
         ("It is blue, or green.", "colour"), ("West.", "way"), ("One.", "number")]  # fmt: skip
LABELS = ("colour", "number", "way")
WORDS = [(["Go", "north", "redly"], ["o", "way", "colour"]), (["One", "red"], ["o", "colour"])]
TRAIN = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 3, "optim": "sgd",
         "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
         "max_grad_norm": 0.0}  # fmt: skip


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


def texts(folder: Path, rows: Any = TEXTS, name: str = "texts.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return file


def words(folder: Path, rows: Any = WORDS) -> Path:
    file = folder / "words.jsonl"
    file.write_text("\n".join(json.dumps({"tokens": w, "labels": t}) for w, t in rows))
    return file


def read(file: Path, kind: Any = "sequence", **data: Any) -> Any:
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file), **data}).data
    return load_labelled(spec, tokenizer(), kind=kind, seed=0)


def classifier(source: str, **options: Any) -> Any:
    model = qa.quantize(source, "none", head="sequence", labels=LABELS)
    return qa.attach(model, "lora", **options)


def logits(model: Any, text: str = "It is red, I think.") -> torch.Tensor:
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# --- data ----------------------------------------------------------------------------------------


def test_texts_are_tokenized_as_the_tokenizer_does_it(tmp_path) -> None:
    data = read(texts(tmp_path))
    assert data.labels == LABELS
    for row, (text, label) in zip(data.train, TEXTS, strict=True):
        assert row["input_ids"] == tokenizer()(text)["input_ids"]
        assert row["label"] == label


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([10, 9, 2], ("2", "9", "10")), ([True, False, True], ("False", "True")),
     (["b", "a", "b"], ("a", "b")), ([1.0, 0.0, 1], ("0", "1"))],
)  # fmt: skip
def test_labels_stand_in_their_order(tmp_path, labels, expected) -> None:
    rows = [(text, label) for (text, _), label in zip(TEXTS, labels, strict=False)]
    assert read(texts(tmp_path, rows)).labels == expected


def test_the_first_token_of_a_word_has_its_label(tmp_path) -> None:
    (first, second) = read(words(tmp_path), "token").train
    known = tokenizer()
    pieces = [known.decode([i]).strip() for i in first["input_ids"]]
    labelled = {piece: label for piece, label in zip(pieces, first["labels"], strict=True) if label}
    assert list(labelled.values()) == WORDS[0][1]
    assert all(word.startswith(piece) for word, piece in zip(WORDS[0][0], labelled, strict=True))
    assert len(first["input_ids"]) > 3  # "redly" is several
    assert [label for label in second["labels"] if label] == WORDS[1][1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "2: the column 'label' is missing"),
        ({"text": "a", "label": None}, "2: 'label' is null, expected a label"),
        ({"text": "a", "label": " "}, "2: 'label' is an empty text, expected a label"),
        ({"text": "a", "label": 0.5}, "2: 'label' is 0.5, no whole number, expected a label"),
        ({"text": "a", "label": ["x"]}, "2: 'label' is a list, expected a label"),
        ({"text": 1, "label": "x"}, "2: 'text' is a number, expected text"),
    ],
)
def test_a_row_without_a_label_is_refused_with_its_line(tmp_path, row, says) -> None:
    file = texts(tmp_path, TEXTS[:1])
    file.write_text(file.read_text() + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"texts.jsonl:{says}"):
        read(file)


@pytest.mark.parametrize(
    ("row", "says"),
    [((["a", "b"], ["x"]), "2 words and 1 labels"), (("a", ["x"]), "'tokens' cannot be read"),
     ((["a"], None), "expected a list of words"), ((["a"], [None]), "is null, expected a label")],
)  # fmt: skip
def test_words_without_a_label_each_are_refused(tmp_path, row, says) -> None:
    with pytest.raises(DataError, match=says):
        read(words(tmp_path, [*WORDS, row]), "token")


def test_rows_without_words_are_dropped_and_counted(tmp_path) -> None:
    with pytest.warns(qa.DataWarning, match=r"2 dropped \(2 with an empty text\)"):
        found = read(words(tmp_path, [*WORDS, ([], [])]), "token")
    assert len(found.train) == len(WORDS)


def test_labels_are_compared_without_space_around_them(tmp_path) -> None:
    rows = [("a", " --1"), ("b", "--1 "), ("c", "--2")]
    assert read(texts(tmp_path, rows)).labels == ("--1", "--2")


def test_all_rows_that_cannot_be_used_are_told_at_once(tmp_path) -> None:
    """One by one they would take a run each."""
    rows = [{"text": "a", "label": label} for label in ("x", None, "y", "", None)]
    rows += [{"text": 1, "label": "x"}, *({"text": "a", "label": None} for _ in range(9))]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as found:
        read(file)
    null, empty, number = found.value.problems
    assert null.where == f"{file}:2"
    assert "'label' is null" in null.what
    assert null.what.endswith("; likewise at 5, 7, 8, 9, 10 and 5 more")
    assert (empty.where, number.where) == (f"{file}:4", f"{file}:6")
    assert str(found.value).startswith("the data cannot be used, 3 problems:\n  - ")
    assert all(str(problem) in str(found.value) for problem in found.value.problems)


def test_what_cannot_be_told_apart_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="all training examples have the label 'colour'"):
        read(texts(tmp_path, [TEXTS[0], TEXTS[3]]))


def test_labels_that_training_does_not_have_are_told(tmp_path) -> None:
    train, held_out = texts(tmp_path), texts(tmp_path, [*TEXTS[:1], ("x", "odd")], "held_out.jsonl")
    with pytest.warns(qa.DataWarning, match="with the label 'odd', which no training example has"):
        data = read(train, eval_path=str(held_out))
    assert data.eval["label"] == ["colour"]
    none = texts(tmp_path, [("x", "odd")], "none.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl: no example is left of .*'odd'"):
        read(train, eval_path=str(none))


def test_long_texts_are_cut_and_counted(tmp_path) -> None:
    rows = [*TEXTS, ("word " * 30, "way")]
    long = [text for text, _ in rows if len(tokenizer()(text)["input_ids"]) > 8]
    with pytest.warns(qa.DataWarning, match="cut to 8 tokens"):
        data = read(texts(tmp_path, rows), max_length=8)
    assert data.cut == 2 * len(long)  # the file is held out, too
    assert max(map(len, data.train["input_ids"])) == 8


# --- trained -------------------------------------------------------------------------------------


def by_hand(model: Any, start: dict[str, torch.Tensor]) -> list[float]:
    """Three steps of a loop over all texts, one at a time, with stock transformers and PEFT."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for _ in range(3):
        total = torch.zeros(())
        for text, label in TEXTS:
            ids = torch.tensor([tokenizer()(text)["input_ids"]])
            target = torch.tensor([LABELS.index(label)])
            total = total + cross_entropy(model(input_ids=ids).logits, target) / len(TEXTS)
        total.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= TRAIN["learning_rate"] * parameter.grad
                parameter.grad = None
        losses.append(float(total.detach()))
    return losses


def stock(source: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=3, dtype=torch.float32, pad_token_id=tokenizer().pad_token_id
    )


def test_losses_and_weights_are_those_of_stock_peft(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    file, source = texts(tmp_path), str(small_model())
    model = classifier(source, r=4)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert sum("score" in name for name in start) == 1
    found = qa.train(
        model, read(file).train, objective="classify", **TRAIN | {"per_device_train_batch_size": 6}
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=targets, task_type="SEQ_CLS")
    theirs = get_peft_model(stock(source), lora)
    losses = [loss for _, loss in found.losses]
    assert losses == pytest.approx(by_hand(theirs, start), rel=1e-6, abs=1e-6)
    weights = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter, weights[name], atol=1e-6), name
            assert not torch.equal(parameter, start[name])
    qa.save(model, tmp_path / "saved")
    again = PeftModel.from_pretrained(stock(source), tmp_path / "saved" / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert torch.equal(logits(qa.load(tmp_path / "saved")), logits(model))


@pytest.mark.slow
def test_batches_in_parts_are_the_same(tmp_path) -> None:
    file, source, found = texts(tmp_path), str(small_model()), []
    for size, accumulated in ((6, 1), (2, 3)):
        model = classifier(source)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        result = qa.train(model, read(file).train, objective="classify", **TRAIN | options)
        found.append([loss for _, loss in result.losses])
    assert found[0] == pytest.approx(found[1], abs=2e-6)


def test_the_evaluation_counts_by_hand(tmp_path) -> None:
    model, file = classifier(str(small_model())), texts(tmp_path)
    qa.train(model, read(file).train, objective="classify", **TRAIN | {"learning_rate": 0.3})
    found = qa.evaluate(model, file, evaluation="classification", batch_size=4)
    guesses = [LABELS[int(logits(model, text).argmax())] for text, _ in TEXTS]
    right = [label for _, label in TEXTS]
    assert found["accuracy"] == pytest.approx(sum(map(str.__eq__, guesses, right)) / len(TEXTS))
    scores = []
    for label in sorted({*guesses, *right}):
        hits = sum(a == b == label for a, b in zip(guesses, right, strict=True))
        scores.append(2 * hits / (guesses.count(label) + right.count(label)))
        assert found[f"f1 {label}"] == pytest.approx(scores[-1])
    assert found["macro-f1"] == pytest.approx(sum(scores) / len(scores))
    for one in {*guesses, *right}:
        for other in {*guesses, *right} - {one}:
            times = sum(a == other and b == one for a, b in zip(guesses, right, strict=True))
            assert found[f"{one} taken for {other}"] == times


def test_a_run_from_text_to_merged_files(tmp_path) -> None:
    """All is read from disk again: adapter, merged model, their labels, and the report."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        texts(data, TEXTS, name)
    spec = qa.Spec(
        model=str(small_model()), backend="hqq", objective="classify", data=str(data),
        train=TRAIN, output=str(tmp_path / "run"), adapter={"name": "lora", "r": 4},
    )  # fmt: skip
    notes: list[str] = []
    result = qa.run(
        spec, listener=lambda event, data: event == "note" and notes.append(data["text"])
    )
    assert any("begins at random" in note and "score" in note for note in notes)
    values = result.metrics["evaluations"]["classification"]["accuracy"]["values"]
    assert set(values) == {"unquantized", "quantized", "tuned", "merged"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "macro-f1" in report
    assert "nats per example" in report
    expected = logits(result.model)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged")
    assert merged.config.id2label == dict(enumerate(LABELS))
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    again = qa.load(tmp_path / "run")
    assert torch.equal(logits(again), expected)
    assert again.config.label2id["way"] == 2
    figures = qa.evaluate(again, data, evaluation="classification")
    assert figures["accuracy"] == pytest.approx(values["tuned"])


def test_words_are_classified(tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(small_model(), source)
    config = json.loads((source / "config.json").read_text()) | {"classifier_dropout": 0.0}
    (source / "config.json").write_text(json.dumps(config))
    model = qa.quantize(str(source), "none", head="token", labels=["colour", "o", "way"])
    start = {name: value.clone() for name, value in model.score.named_parameters()}
    tuned = qa.attach(model, "lora")
    file = words(tmp_path)
    options = TRAIN | {"learning_rate": 0.5, "max_steps": 8, "per_device_train_batch_size": 2}
    found = qa.train(tuned, read(file, "token").train, objective="classify-tokens", **options)
    first, last = (loss for _, loss in (found.losses[0], found.losses[-1]))
    assert last < first
    figures = qa.evaluate(tuned, file, evaluation="classification")
    assert figures["labels counted"] == 5
    plain = AutoModelForTokenClassification.from_pretrained(source, num_labels=3).eval()
    plain.score.load_state_dict(start)
    total, count = 0.0, 0
    for one, tags in WORDS:
        given = tokenizer()(one, is_split_into_words=True, return_tensors="pt")
        places = given.word_ids()
        with torch.no_grad():
            log_p = plain(input_ids=given["input_ids"]).logits[0].log_softmax(-1)
        for word, tag in enumerate(tags):
            total -= float(log_p[places.index(word), ["colour", "o", "way"].index(tag)])
            count += 1
    assert first == pytest.approx(total / count, rel=1e-6, abs=1e-6)


SIZES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}


def bert(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, hidden_dropout_prob=0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("backend", ["hqq", pytest.param("none", marks=pytest.mark.slow)])
def test_all_that_begins_at_random_is_trained(tmp_path, backend) -> None:
    """A masked language model has no pooler: it stays dense, and is trained with the head."""
    model = qa.quantize(bert(tmp_path / "bert"), backend, head="sequence", labels=LABELS)
    assert model.quantadapt.begun_at_random == ("bert.pooler.dense", "classifier")
    tuned = qa.attach(model, "lora")
    qa.train(tuned, texts(tmp_path), objective="classify", **TRAIN)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad and "lora_" not in n]
    assert sum("pooler.dense" in name for name in trained) == 2
    assert sum("classifier" in name for name in trained) == 2
    qa.save(tuned, tmp_path / "saved")
    assert torch.equal(logits(qa.load(tmp_path / "saved")), logits(tuned))


def test_a_checkpoint_with_a_head_keeps_it(tmp_path) -> None:
    source = tmp_path / "classifier"
    own = stock(str(small_model()))
    own.config.id2label = {0: "way", 1: "colour", 2: "number"}
    own.config.label2id = {name: place for place, name in own.config.id2label.items()}
    own.save_pretrained(source)
    tokenizer().save_pretrained(source)
    model = qa.quantize(str(source), "none", head="sequence", labels=LABELS)
    assert model.quantadapt.begun_at_random == ()
    assert model.config.id2label == {0: "way", 1: "colour", 2: "number"}
    assert torch.allclose(logits(model), logits(own), atol=1e-6)
    with pytest.raises(ModelError, match="its head tells 'way', 'colour', 'number' apart"):
        qa.quantize(str(source), "none", head="sequence", labels=["way", "other"])


@pytest.mark.slow
def test_outputs_without_names_get_those_of_the_data(tmp_path) -> None:
    stock(str(small_model())).save_pretrained(tmp_path / "classifier")
    tokenizer().save_pretrained(tmp_path / "classifier")
    source = str(tmp_path / "classifier")
    model = qa.quantize(source, "none", head="sequence", labels=LABELS)
    assert model.config.id2label == dict(enumerate(LABELS))
    numbered = [(text, LABELS.index(label)) for text, label in TEXTS]
    tuned = qa.attach(qa.quantize(source, "none"), "lora")
    assert qa.train(tuned, texts(tmp_path, numbered), objective="classify", **TRAIN).steps == 3


def test_labels_that_a_model_does_not_know_are_refused(tmp_path) -> None:
    model = classifier(str(small_model()))
    file = texts(tmp_path, [*TEXTS, ("?", "odd")])
    with pytest.raises(DataError, match=r"no output for the label 'odd'(.|\n)*labels="):
        qa.train(model, read(file).train, objective="classify", **TRAIN)
    with pytest.raises(qa.QuantadaptError, match="no output for the label 'odd'"):
        qa.evaluate(model, file, evaluation="classification")


def test_the_plan_refuses_what_does_not_go_together(tmp_path) -> None:
    def refusal(**values: Any) -> str:
        with pytest.raises(PlanRefused) as error:
            qa.plan(qa.Spec(backend="none", **values), check_output=False)
        return str(error.value)

    assert "leave train.packing out" in refusal(objective="classify", train={"packing": True})
    assert "task-loss-adalora" in refusal(objective="reward", adapter="adalora")
    config = json.loads((demo.MODEL_DIR / "config.json").read_text()) | {"is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanRefused, match="head-encoder-decoder"):
        qa.plan(qa.Spec(model=str(tmp_path), backend="none", objective="classify"), weights=False)


# --- rewards -------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": f"Say {word}.\n", "chosen": f"{word}, gladly.", "rejected": f"No {word}."}
    for word in ("red", "blue", "north", "south")
]


def pairs(folder: Path) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


def test_rewards_are_trls(tmp_path) -> None:
    """Against TRL's RewardTrainer on stock PEFT: losses, and the weights that SGD leaves."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import RewardConfig, RewardTrainer

    class Tokenized(RewardTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    source, file = str(small_model()), pairs(tmp_path)
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file)}).data
    model = qa.attach(qa.quantize(source, "none", head="sequence", labels=["reward"]), "lora", r=4)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    objective = {"name": "reward", "center_rewards_coefficient": 0.01}
    options = TRAIN | {"per_device_train_batch_size": 4}
    logs: list[dict[str, Any]] = []
    made = load_preferences(spec, tokenizer(), seed=0).train
    qa.train(model, made, objective=objective, on_log=logs.append, **options)

    base = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer().pad_token_id
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=targets, task_type="SEQ_CLS")
    theirs = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    data = Dataset.from_dict(
        {"chosen_ids": made["input_ids"], "rejected_ids": made["rejected_ids"]}
    )
    config = {name: value for name, value in options.items() if name != "warmup_ratio"}
    args = RewardConfig(
        **config, output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", max_length=None,
        center_rewards_coefficient=0.01, disable_dropout=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Tokenized(theirs, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    expected = [log for log in trainer.state.log_history if "loss" in log]
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert log["rewards/margins"] == pytest.approx(other["margin"], abs=1e-5)
        assert log["rewards/accuracies"] == pytest.approx(other["accuracy"])
    weights = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = float((weights[name] - start[name]).detach().norm())
            assert float((parameter - weights[name]).norm()) < 1e-3 * moved, name
    figures = qa.evaluate(model, file, evaluation="rewards", batch_size=3)
    ids = [[made[column][i] for column in ("input_ids", "rejected_ids")] for i in range(4)]
    with torch.no_grad():
        scores = torch.tensor(
            [
                [float(theirs.eval()(input_ids=torch.tensor([i])).logits) for i in both]
                for both in ids
            ]
        )
    assert figures["margin"] == pytest.approx(float((scores[:, 0] - scores[:, 1]).mean()), abs=1e-4)


@pytest.mark.slow
def test_a_language_model_gives_no_rewards(tmp_path) -> None:
    with pytest.raises(qa.QuantadaptError, match="gives no single score"):
        qa.evaluate(qa.quantize(str(small_model()), "none"), pairs(tmp_path), evaluation="rewards")
