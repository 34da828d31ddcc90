"""Embeddings and rerankers against sentence-transformers, from data to saved adapters."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.retrieval import load_embedding, load_reranking
from quantadapt.errors import DataError, NumbersError, PlanRefused
from quantadapt.evaluation.held_out import held_out
from quantadapt.evaluation.retrieval import Retrieval, ranking
from quantadapt.model.pooling import vectors
from quantadapt.objectives.embed import Embed
from quantadapt.objectives.rerank import Rerank
from quantadapt.planning.stage import plan
from quantadapt.protocols import Given
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model

TEXTS = ["add two numbers", "return the larger of both", "open a file", "sort a list of words"]
CODE = ["def add(a, b): return a + b", "def larger(a, b): return max(a, b)", "open(name)", "sorted"]
TRAIN = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd",
         "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip
ROWS = [{"anchor": text, "positive": code, "negative": CODE[place - 1]}
        for place, (text, code) in enumerate(zip(TEXTS, CODE, strict=True))]  # fmt: skip
SCORED = [{"sentence1": text, "sentence2": CODE[place // 2], "score": place / 3}
          for place, text in enumerate(TEXTS)]  # fmt: skip
PAIRS = [{"query": text, "passage": code, "label": int(i == j)}
         for i, text in enumerate(TEXTS) for j, code in enumerate(CODE)]  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]], times: int = 2) -> Any:
    """Return a data spec of rows that are to be learnt and the same, held out."""
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text * times)
    (folder / "test.jsonl").write_text(text)
    return Spec(data={"path": str(folder), "max_length": 48}).data


def file_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Return a file of rows."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def encoder(kind: str = "BertModel") -> Path:
    """A tiny BERT of random weights with the demo's words."""
    return Path(_encoder(kind).name)


@cache
def _encoder(kind: str) -> tempfile.TemporaryDirectory[str]:
    import transformers
    from tokenizers import Tokenizer
    from transformers import BertConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    kept = tempfile.TemporaryDirectory(prefix="quantadapt-test-")
    folder = Path(kept.name)
    config = BertConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=2, pad_token_id=2,
                        num_attention_heads=2, intermediate_size=64, num_labels=1)  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)
    words = Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", cls_token="<s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return kept


def sentence_transformer(model: Any, folder: Path, pooling: str) -> Any:
    """Return sentence-transformers' own model around stock modules of transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    first = Transformer(str(folder), max_seq_length=48)
    if first.tokenizer.pad_token is None:
        first.tokenizer.pad_token = first.tokenizer.eos_token
    first.tokenizer.padding_side = "right"
    if model is not None:
        first.model = model
    return SentenceTransformer(modules=[first, Pooling(model_width(folder), pooling)], device="cpu")


def model_width(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def dense_model(folder: Path) -> Any:
    return qa.quantize(str(folder), "none")


def group_batch(task: Embed, model: Any, dataset: Any) -> dict[str, Any]:
    tokenizer = SimpleNamespace(pad_token_id=2, eos_token_id=1)
    setup: Any = SimpleNamespace(model=model, dataset=dataset, pad_token_id=2, tokenizer=tokenizer)
    return task.collator(setup)([dataset[place] for place in range(len(dataset))])


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize(
    ("kind", "pooling", "rows"),
    [("ranking", "mean", ROWS), ("triplet", "lasttoken", ROWS), ("cosent", "cls", SCORED),
     ("cosine", "mean", SCORED)],
)  # fmt: skip
def test_losses_are_those_of_sentence_transformers(
    family: str, kind: str, pooling: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """From texts to the loss: theirs tokenizes, embeds and pools by itself, on a dense model."""
    from sentence_transformers.sentence_transformer import losses

    folder = small_model() if family == "decoder" else encoder()
    model = dense_model(folder).eval()
    task = Embed(loss_type=kind, pooling=pooling, margin=0.5)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = task.read(written(tmp_path / "data", rows), tokenizer, seed=0)
    batch = group_batch(task, model, data.eval)
    with torch.no_grad():
        found = float(task.loss(model, batch, float(task.count(batch))))
    theirs = sentence_transformer(None, folder, pooling).eval()
    loss: Any = {
        "ranking": lambda: losses.MultipleNegativesRankingLoss(theirs),
        "triplet": lambda: losses.TripletLoss(theirs, triplet_margin=0.5),
        "cosent": lambda: losses.CoSENTLoss(theirs),
        "cosine": lambda: losses.CosineSimilarityLoss(theirs),
    }[kind]()
    names = [name for name in rows[0] if name != "score"]
    features = [theirs.preprocess([row[name] for row in rows]) for name in names]
    labels = torch.tensor([float(row.get("score", 0)) for row in rows])
    with torch.no_grad():
        wanted = float(loss(features, labels))
    assert found == pytest.approx(wanted, rel=5e-6, abs=1e-6)
    assert found > 0


@pytest.mark.parametrize("pooling", [pytest.param("mean", marks=pytest.mark.slow), "lasttoken"])
def test_a_saved_adapter_gives_equal_vectors_in_stock_peft(pooling: str, tmp_path: Path) -> None:
    """Written to disk, read by stock transformers, PEFT and sentence-transformers."""
    from peft import PeftModel

    data = written(tmp_path / "data", ROWS)
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", seed=0)
    qa.train(model, str(data.path), objective={"name": "embed", "pooling": pooling}, **TRAIN)
    saved = qa.save(model, tmp_path / "saved")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32), saved
    )
    theirs = sentence_transformer(stock.get_base_model().model, small_model(), pooling)
    wanted = torch.tensor(theirs.encode(TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(small_model(), padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = vectors(model.eval(), batch["input_ids"], batch["attention_mask"], pooling)
        seen = batch["input_ids"], batch["attention_mask"]
        plain = vectors(dense_model(small_model()), *seen, pooling)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - plain).norm()) > 0.01


@pytest.mark.parametrize("family", [pytest.param("decoder", marks=pytest.mark.slow), "encoder"])
def test_embedding_learns(family: str, tmp_path: Path) -> None:
    folder = small_model() if family == "decoder" else encoder()
    data = written(tmp_path / "data", ROWS, times=8)
    model = qa.attach(qa.quantize(str(folder), "hqq"), "lora", seed=0)
    given = {**TRAIN, "max_steps": 25, "optim": "adamw_torch", "learning_rate": 3e-3}
    result = qa.train(model, str(data.path), objective="embed", **given)
    assert result.losses[-1][1] < 0.7 * result.losses[0][1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = load_embedding(data, tokenizer, seed=0, pooling="mean").eval
    assert Retrieval().measure(model, Given(held_out))["accuracy@1"].value == 1.0


# --- rerank --------------------------------------------------------------------------------------


def test_reranking_is_the_loss_of_a_cross_encoder(tmp_path: Path) -> None:
    """The head starts at random, so theirs gets ours."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import losses

    folder = encoder("BertForSequenceClassification")
    model, task = dense_model(folder).eval(), Rerank()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = task.read(written(tmp_path / "data", PAIRS), tokenizer, seed=0)
    batch = group_batch(task, model, data.eval)  # type: ignore[arg-type]
    with torch.no_grad():
        found = float(task.loss(model, batch, float(task.count(batch))))
    theirs = CrossEncoder(str(folder), num_labels=1, max_length=48, device="cpu").eval()
    texts = [[row[name] for row in PAIRS] for name in ("query", "passage")]
    with torch.no_grad():
        labels = torch.tensor([float(row["label"]) for row in PAIRS])
        wanted = float(losses.BinaryCrossEntropyLoss(theirs)(texts, labels))
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_reranking_learns(tmp_path: Path) -> None:
    data = written(tmp_path / "data", PAIRS, times=4)
    spec = Spec(
        model=str(small_model()), objective="rerank", data=data, output=str(tmp_path / "run"),
        train={**TRAIN, "max_steps": 25, "optim": "adamw_torch", "learning_rate": 3e-3,
               "per_device_train_batch_size": 16},
        export={"merge": "never"}, evaluate={"unquantized": False},
    )  # fmt: skip
    result = qa.run(spec, verbose=False)
    values = result.metrics["evaluations"]["retrieval"]["ndcg@10"]["values"]
    assert values["tuned"] > values["quantized"]
    assert values["tuned"] > 0.95


# --- figures -------------------------------------------------------------------------------------


def test_figures_are_those_of_sentence_transformers() -> None:
    """Their evaluator computes them from its own vectors; ours from scores."""
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    torch.manual_seed(5)
    queries, texts = torch.randn(7, 8), torch.randn(30, 8)
    relevant = {str(q): {str(int(t)) for t in torch.randperm(30)[: 1 + q % 3]} for q in range(7)}
    measure = InformationRetrievalEvaluator(
        {str(q): str(q) for q in range(7)}, {str(t): str(t) for t in range(30)}, relevant,
        ndcg_at_k=[10], mrr_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[10],
    )  # fmt: skip
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(texts).T
    hits = [[{"corpus_id": str(t), "score": float(row[t])} for t in range(30)] for row in scores]
    wanted = measure.compute_metrics(hits)
    belongs = [torch.tensor([str(t) in relevant[str(q)] for t in range(30)]) for q in range(7)]
    found = ranking(list(zip(scores, belongs, strict=True)), 10)
    assert found["ndcg@10"].value == pytest.approx(wanted["ndcg@k"][10])
    assert found["mrr@10"].value == pytest.approx(wanted["mrr@k"][10])
    assert found["accuracy@1"].value == pytest.approx(wanted["accuracy@k"][1])
    assert found["recall@10"].value == pytest.approx(wanted["recall@k"][10])


@pytest.mark.parametrize("at", [2, 3, 10])
@pytest.mark.parametrize("scores", [[0, 0, 0, 0, 0], [1, 2, 2, 0, 2], [3, 1, 1, 1, 0]])
def test_of_texts_with_equal_scores_each_order_counts(scores: list[float], at: int) -> None:
    """The mean over all orders, of what sentence-transformers and scikit-learn say of each; not
    that of the order in the data, where those that belong to a query often stand first."""
    from itertools import permutations

    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )
    from sklearn.metrics import ndcg_score

    belongs = [True, True, False, False, False]
    measure = InformationRetrievalEvaluator(
        {"q": "q"}, {str(t): str(t) for t in range(5)}, {"q": {"0", "1"}},
        ndcg_at_k=[at], mrr_at_k=[at], accuracy_at_k=[1], precision_recall_at_k=[at],
    )  # fmt: skip
    orders = []
    for places in permutations(range(5)):
        apart = [score - place / 100 for score, place in zip(scores, places, strict=True)]
        hits = [{"corpus_id": str(t), "score": score} for t, score in enumerate(apart)]
        orders.append(measure.compute_metrics([hits]))
    wanted = {
        "ndcg": sum(each["ndcg@k"][at] for each in orders) / len(orders),
        "mrr": sum(each["mrr@k"][at] for each in orders) / len(orders),
        "recall": sum(each["recall@k"][at] for each in orders) / len(orders),
    }
    found = ranking([(torch.tensor(scores).double(), torch.tensor(belongs))], at)
    for name, value in wanted.items():
        assert found[f"{name}@{at}"].value == pytest.approx(value)
    first = sum(each["accuracy@k"][1] for each in orders) / len(orders)
    assert found["accuracy@1"].value == pytest.approx(first)
    assert found[f"ndcg@{at}"].value == pytest.approx(ndcg_score([belongs], [scores], k=at))


def test_a_model_that_answers_nan_has_no_figures(tmp_path: Path) -> None:
    """All texts would be as near, and those that belong to a query stand first in the data."""
    model, tokenizer = dense_model(small_model()), AutoTokenizer.from_pretrained(small_model())
    ranker = qa.quantize(str(small_model()), "none", head="sequence", labels=("score",))
    for each in (model, ranker):
        each.base_model.norm.weight.data[0] = torch.inf
    for rows in (ROWS, SCORED):
        data = load_embedding(written(tmp_path / "d", rows), tokenizer, seed=0, pooling="mean")
        with pytest.raises(NumbersError, match="no number"):
            Retrieval().measure(model, Given(data.eval))
    pairs = load_reranking(written(tmp_path / "e", PAIRS), tokenizer, seed=0)
    with pytest.raises(NumbersError, match="no number"):
        Retrieval().measure(ranker, Given(pairs.eval))


def test_scores_are_compared_by_rank(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    model = dense_model(small_model())
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    data = load_embedding(written(tmp_path / "d", SCORED), tokenizer, seed=0, pooling="mean")
    found = Retrieval().measure(model, Given(data.eval))["spearman"].value
    theirs = sentence_transformer(None, small_model(), "mean")
    both = [torch.tensor(theirs.encode([row[name] for row in SCORED])) for name in
            ("sentence1", "sentence2")]  # fmt: skip
    cosines = torch.cosine_similarity(*both)
    wanted = spearmanr(cosines.numpy(), [row["score"] for row in SCORED]).statistic
    assert found == pytest.approx(wanted)


def test_pairs_whose_scores_are_equal_have_no_order(tmp_path: Path) -> None:
    """One pair alone, as a small file holds out: scipy's correlation is no number."""
    rows = [dict(row, score=0.5) for row in SCORED]
    given = held_out(str(file_of(tmp_path, rows)), AutoTokenizer.from_pretrained(small_model()))
    with pytest.raises(DataError, match="all held-out pairs have one score"):
        Retrieval().measure(dense_model(small_model()), Given(given.examples))


def test_data_that_are_named_are_measured_as_the_model_was_trained(tmp_path: Path) -> None:
    """With its own pooling, which its adapter remembers; sentence-transformers ranks alike."""
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    file = file_of(tmp_path, ROWS)
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", seed=0)
    objective = {"name": "embed", "pooling": "lasttoken"}
    qa.train(model, str(file), objective=objective, **TRAIN)
    again = qa.load(qa.save(model, tmp_path / "saved").parent)
    body = model.get_base_model().model
    theirs = sentence_transformer(body, small_model(), "lasttoken")
    texts = dict(enumerate(CODE))
    measure = InformationRetrievalEvaluator(
        {str(q): text for q, text in enumerate(TEXTS)}, {str(t): c for t, c in texts.items()},
        {str(q): {str(q)} for q in range(len(TEXTS))},
        ndcg_at_k=[10], mrr_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[10],
    )  # fmt: skip
    wanted = {key: value for key, value in measure(theirs).items() if "cosine_ndcg@10" in key}
    for each in (model, again):
        found = qa.evaluate(each, file, evaluation="retrieval")
        assert found["ndcg@10"] == pytest.approx(*wanted.values())
        other = qa.evaluate(each, file, evaluation="retrieval", pooling="mean")
        assert other["ndcg@10"] != pytest.approx(found["ndcg@10"])


def test_passages_that_are_named_are_measured_and_texts_are_no_passages(tmp_path: Path) -> None:
    from scipy.special import expit  # of what a cross-encoder says

    model = qa.quantize(str(small_model()), "none", head="sequence", labels=["relevance"])
    file = file_of(tmp_path, PAIRS)
    found = qa.evaluate(model, file, evaluation="retrieval")
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    with torch.no_grad():
        scores = [float(model(**tokenizer(q["query"], q["passage"], return_tensors="pt")).logits)
                  for q in PAIRS]  # fmt: skip
    rows = torch.tensor(expit(scores)).view(len(TEXTS), len(CODE))
    firsts = (rows.argmax(1) == torch.arange(len(TEXTS))).double()
    assert found["accuracy@1"] == pytest.approx(float(firsts.mean()))
    with pytest.raises(DataError, match="has a head, and so makes no vectors"):
        qa.evaluate(model, file_of(tmp_path, ROWS), evaluation="retrieval")


# --- data ----------------------------------------------------------------------------------------


def test_the_demo_and_names_of_ones_own(tmp_path: Path, tokenizer: Any) -> None:
    made = load_embedding(Spec().data, tokenizer, seed=0, pooling="cls")
    assert len(made.train) == 1520
    assert made.train["pooling"][0] == "cls"
    asked = load_reranking(Spec().data, tokenizer, seed=0)
    assert set(asked.train["score"]) == {0.0, 1.0}
    rows = [{"q": text, "doc": code, "negatives": CODE[:2]} for text, code in
            zip(TEXTS, CODE, strict=True)]  # fmt: skip
    spec = written(tmp_path / "own", rows)
    spec = spec.model_copy(update={"columns": {"anchor": "q", "positive": "doc"}})
    assert "text_3_ids" in load_embedding(spec, tokenizer, seed=0, pooling="mean").train.features


def test_all_of_a_query_are_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "data"
    written(folder, PAIRS, times=1)
    (folder / "test.jsonl").unlink()
    data = Spec(data={"path": str(folder), "eval_fraction": 0.3}).data
    made = load_reranking(data, tokenizer, seed=0)
    assert len(made.eval) % len(CODE) == 0
    assert len(made.train) + len(made.eval) == len(PAIRS)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"anchor": "a"}] * 2, "no column 'positive'"),
        ([{"text": "a"}] * 2, "no column 'anchor'"),
        ([{"sentence1": "a", "sentence2": "b", "score": 7}] * 2, "a number from -1 to 1"),
        ([{"anchor": "a", "positive": 5}] * 2, "expected text"),
        ([{"anchor": "a", "positive": "b", "negatives": "c"}] * 2, "negatives"),
        (
            [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d", "negative": "e"}],
            r"train\.jsonl:2: 'negative' stands here, and not in the first row",
        ),
        (
            [{"anchor": "a", "positive": "b", "negatives": ["c"] * n} for n in (1, 2)],
            "texts and",
        ),
        ([{"anchor": " ", "positive": " "}] * 2, "no example is left"),
        (
            [{"anchor": "a", "positive": "b", "negative": "b"}] * 2,
            r"4 dropped \(4 with a negative that is the positive\)",
        ),
        ([{"anchor": a, "positive": "b"} for a in "cd"], "all positives are equal"),
        ([{"sentence1": a, "sentence2": "b", "score": 0.5} for a in "cd"], "all scores are equal"),
    ],
)
def test_bad_rows_are_refused(rows: Any, what: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=what):
        load_embedding(written(tmp_path / "bad", rows), tokenizer, seed=0, pooling="mean")


def test_data_and_loss_have_to_fit(tmp_path: Path, tokenizer: Any) -> None:
    def refusal(rows: Any, kind: Any) -> str:
        with pytest.raises(DataError) as error:
            Embed(loss_type=kind).read(written(tmp_path / "d", rows), tokenizer, seed=0)
        return str(error.value)

    assert "with a score" in refusal(ROWS, "cosent")
    assert "hold scores" in refusal(SCORED, "ranking")
    assert "one negative" in refusal([{k: r[k] for k in ("anchor", "positive")} for r in ROWS],
                                     "triplet")  # fmt: skip
    same = written(tmp_path / "d", [{**row, "label": 1} for row in PAIRS])
    with pytest.raises(DataError, match="one label"):
        load_reranking(same, tokenizer, seed=0)


def test_what_does_not_go_is_refused_by_the_plan() -> None:
    def refusal(**values: Any) -> str:
        with pytest.raises(PlanRefused) as error:
            plan(Spec(output="nowhere", **values))
        return str(error.value)

    assert "AdaLoRA" in refusal(objective="embed", adapter="adalora")
    assert "packing" in refusal(objective="embed", train={"packing": True})
    assert "use one of" in refusal(objective={"name": "embed", "pooling": "max"})
    assert "sees no other" in refusal(objective={"name": "embed", "pooling": "cls"})
