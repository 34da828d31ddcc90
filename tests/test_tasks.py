"""Tasks of lm-evaluation-harness, on models in memory: the figures are those of lm-eval's own."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.benchmarking.task_files import known_tasks, manager_of, task_problems
from quantadapt.benchmarking.tasks import Tasks
from quantadapt.errors import ModelError, NumbersError, PlanRefused
from quantadapt.planning import plan
from quantadapt.protocols import Figure, Given
from quantadapt.quantizing.state import state_of

ANSWER = 12
"""Tokens of an answer, as the model's own config has it, which counts for more than the task's."""
QUESTION = r'"### Instruction:\n{{instruction}}\n\n### Response:\n"'
DATA = f"""
dataset_path: json
dataset_kwargs: {{data_files: {demo.EVAL_FILE}}}
test_split: train
fewshot_split: train
target_delimiter: ""
"""
FILES = {
    "choice.yaml": f"""
include: data
"task": 'demo_choice'
tag: [demo_all]
output_type: multiple_choice
doc_to_text: {QUESTION}
doc_to_choice: "{{{{[output, output.replace('return', 'print'), instruction, 'def f(): pass']}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "answer.yaml": f"""
include: data
task: demo_answer
tag:
  - demo_all
output_type: generate_until
doc_to_text: {QUESTION}
doc_to_target: "{{{{output}}}}"
generation_kwargs: {{until: ["\\n\\n", "return"], max_gen_toks: 24}}
metric_list:
  - {{metric: !function measures.length, aggregation: mean, higher_is_better: false}}
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
    "sampled.yaml": """
include: answer.yaml
task: demo_sampled
tag: demo_other
generation_kwargs: {until: ["return"], max_gen_toks: 8, do_sample: true, temperature: 0.8}
""",
    "text.yaml": """
include: data
task: demo_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{output}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "group.yaml": """
group: demo_group
task: [demo_choice, {group: inner, task: [demo_answer]}]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""",
    "unsafe.yaml": "include: data\ntask: demo_unsafe\nunsafe_code: true\n",
    "pictures.yaml": "include: data\ntask: demo_pictures\ndoc_to_image: [image]\n",
    "absent.yaml": "task: demo_absent\ndataset_path: somebody/not_here\n",
    "gone.yaml": "task: demo_gone\ndataset_path: json\ndataset_kwargs: {data_files: /no/x.jsonl}",
    "data": DATA,
    "measures.py": "def length(references, predictions, **_):\n    return len(predictions[0])\n",
}
"""`!function` is code of the folder, which lm-eval runs; a plan does not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("tasks")
    for name, text in FILES.items():
        (made / name).write_text(text)
    (made / "choice.yaml").write_text(FILES["choice.yaml"])
    return str(made)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo with a LoRA that changes what it says, and the folder of that adapter."""
    torch.manual_seed(0)
    model = qa.attach(qa.quantize(None, "none"), "lora", r=4, init_lora_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.3)
    model.get_base_model().generation_config.max_new_tokens = ANSWER
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return model.eval(), str(path)


def stock(model: Any, folder: str, tasks: list[str], **options: Any) -> Any:
    """Return what lm-eval's own command finds of a model that transformers and PEFT have loaded."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    given = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=folder, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # takes seconds
        return lm_eval.evaluator.simple_evaluate(
            given, tasks=tasks, task_manager=manager, bootstrap_iters=100, **options
        )


def assert_same(found: Any, expected: Any) -> None:
    """Compare every figure, standard error and answer."""
    kept = [n for n in expected["results"] if "sample_len" in expected["results"][n]]
    assert found["results"].keys() == expected["results"].keys()
    for name in kept:
        for key, value in expected["results"][name].items():
            same = found["results"][name][key]
            assert same == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    for name, samples in expected["samples"].items():
        ours = {
            (row["doc_id"], row["filter"]): row["filtered_resps"] for row in found["samples"][name]
        }
        for row in samples:
            answers = ours[row["doc_id"], row["filter"]]
            for one, other in zip(answers, row["filtered_resps"], strict=True):
                loose = isinstance(other, tuple | float)
                assert one == (pytest.approx(other, rel=1e-4) if loose else other)


def given_for(model: Any, batch_size: int = 3) -> Given:
    return Given(None, (), state_of(model).tokenizer, batch_size)  # type: ignore[arg-type]


def test_figures_and_answers_are_those_of_lm_eval(tuned, folder: str) -> None:
    from peft import PeftModel

    model, path = tuned
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    base.generation_config.max_new_tokens = ANSWER
    options: dict[str, Any] = {"limit": 4, "num_fewshot": 1}
    names = ["demo_group", "demo_text"]
    expected = stock(PeftModel.from_pretrained(base, path), folder, names, **options)
    tasks = Tasks(tasks=names, include_path=[folder], bootstrap_iters=100, **options)
    assert_same(tasks.results(model, given_for(model)), expected)

    figures = tasks.measure(model, given_for(model))
    assert list(figures)[:2] == ["demo_group acc", "demo_text word_perplexity"]
    choice = expected["results"]["demo_choice"]
    acc, length = figures["demo_choice acc_norm"], figures["demo_answer length"]
    assert (acc.value, acc.error) == (choice["acc_norm,none"], choice["acc_norm_stderr,none"])
    assert (acc.unit, acc.better, len(acc.scores)) == ("share", "higher", 4)
    assert length.better == "lower"
    assert length.value > 1
    texts = [row["filtered_resps"][0] for row in expected["samples"]["demo_answer"]]
    assert length.scores == tuple(float(len(text)) for text in texts)
    assert not figures["demo_text word_perplexity"].scores  # no mean of what single texts have
    assert figures["demo_group acc"].scores == figures["demo_choice acc"].scores


def test_a_model_that_answers_nan_has_no_figures(folder: str) -> None:
    """lm-eval takes the first of all choices for the likeliest then."""
    model = qa.quantize(None, "none")
    model.model.norm.weight.data[0] = math.inf
    for name in ("demo_choice", "demo_text"):
        tasks = Tasks(tasks=[name], include_path=[folder], bootstrap_iters=0, limit=2)
        with pytest.raises(NumbersError, match="no number"):
            tasks.results(model, given_for(model))


def test_greedy_answers_are_made_our_way_and_others_by_lm_eval(
    tuned, folder: str, monkeypatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    model, _ = tuned
    called: list[int] = []
    theirs = HFLM.generate_until
    monkeypatch.setattr(
        HFLM, "generate_until", lambda s, r, **k: called.append(len(r)) or theirs(s, r, **k)
    )
    found = {}
    for name in ("demo_answer", "demo_sampled"):
        tasks = Tasks(tasks=[name], include_path=[folder], limit=3)
        rows = tasks.results(model, given_for(model))["samples"][name]
        found[name] = [row["filtered_resps"][0] for row in rows]
    assert called == [3]
    plain = Tasks(tasks=["demo_answer"], include_path=[folder], limit=3)
    model.get_base_model().generation_config.repetition_penalty = 1.3  # which HFLM obeys
    try:
        penalized = plain.results(model, given_for(model))["samples"]["demo_answer"]
    finally:
        model.get_base_model().generation_config.repetition_penalty = None
    assert called == [3, 3]
    assert [row["filtered_resps"][0] for row in penalized] != found["demo_answer"]
    assert all("return" not in text for text in found["demo_answer"])


def test_nothing_of_model_tokenizer_and_random_numbers_changes(tuned, folder: str) -> None:
    model, _ = tuned
    base, tokenizer = model.get_base_model(), state_of(model).tokenizer
    head = base.lm_head.weight
    base.lm_head.weight = torch.nn.Parameter(head.detach() * 0.5, requires_grad=False)  # untied
    pad, training = tokenizer.pad_token, [m.training for m in model.modules()]
    model.train()
    random.seed(3), torch.manual_seed(3)
    drawn = random.random(), float(torch.rand(1))
    random.seed(3), torch.manual_seed(3)
    try:
        Tasks(tasks=["demo_choice"], include_path=[folder], limit=1).measure(
            model, given_for(model)
        )
        assert (random.random(), float(torch.rand(1))) == drawn
        assert base.lm_head.weight is not base.get_input_embeddings().weight
        assert tokenizer.pad_token == pad
        assert all(module.training for module in model.modules())
        assert "tie_weights" not in vars(model)
    finally:
        base.lm_head.weight = head
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was


def test_the_error_of_a_change_is_that_of_the_differences() -> None:
    before = Figure(0.5, "share", "higher", 0.25, (0.0, 1.0, 0.0, 1.0))
    after = Figure(0.75, "share", "higher", 0.2, (1.0, 1.0, 0.0, 1.0))
    change = after.since(before)  # differences 1, 0, 0, 0: variance 0.25 with n - 1
    assert (change.value, change.error) == (0.25, pytest.approx(math.sqrt(0.25 / 4)))
    apart = Figure(0.75, "share", "higher", 0.2).since(before)
    assert apart.error == pytest.approx(math.hypot(0.25, 0.2))
    assert Figure(1.0).since(before).error is None
    assert before.to_dict() == {"value": 0.5, "unit": "share", "better": "higher", "error": 0.25}


def test_what_changed_stands_with_the_figures_and_is_shown() -> None:
    import io

    from rich.console import Console

    from quantadapt.cli.progress import show_errors
    from quantadapt.evaluation.verdict import warnings_of
    from quantadapt.folders.metrics import add_figures

    metrics: dict[str, Any] = {"evaluations": {}}
    scores = {"quantized": (1.0, 1.0, 0.0, 1.0), "tuned": (1.0, 0.0, 0.0, 0.0)}
    earlier: dict[str, dict[str, Figure]] = {}
    for model, given in scores.items():
        found = {"x acc": Figure(sum(given) / 4, "share", "higher", 0.25, given)}
        add_figures(metrics, "tasks", model, found, earlier)
        earlier[model] = found
    acc = metrics["evaluations"]["tasks"]["x acc"]
    error = math.sqrt(1 / 3 / 4)  # differences 0, -1, 0, -1
    assert acc["errors"] == {"quantized": 0.25, "tuned": 0.25}
    assert acc["changes"] == {
        "tuned": {"since": "quantized", "value": -0.5, "error": pytest.approx(error)}
    }
    screen = io.StringIO()
    show_errors(Console(file=screen, width=100), metrics["evaluations"]["tasks"])
    assert "75.0 ± 25.0%" in screen.getvalue()
    assert f"-50.0 ± {100 * error:.1f}%" in screen.getvalue()
    assert warnings_of(metrics, []) == []  # less than two standard errors is noise
    acc["changes"]["tuned"]["error"] = 0.1
    assert "training made tasks x acc worse" in warnings_of(metrics, [])[0]


# What is refused before any work ------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once(folder: str, monkeypatch) -> None:
    names = ["demo_choise", "gsm8", "demo_unsafe", "demo_pictures", "demo_absent", "demo_gone"]
    spec = qa.Spec(evaluate={
        "tasks": names, "evaluations": {"name": "tasks", "include_path": folder, "num_fewshot": 2}
    }, trust_remote_code=True)  # fmt: skip
    with pytest.raises(PlanRefused) as caught:
        plan(spec, check_output=False)
    told = {problem.what: problem.fix for problem in caught.value.problems}
    assert told["there is no task 'demo_choise'"] == "did you mean 'demo_choice'?"
    assert "'gsm8k'" in told["there is no task 'gsm8'"]
    text = str(caught.value)
    for words in (
        "'demo_unsafe': it runs the Python code",
        "'demo_pictures': it shows images",
        "'demo_absent': its data, somebody/not_here, are not in the cache",
        "'demo_gone': its data cannot be read",
    ):
        assert words in text
    assert len(told) == 6


def test_files_of_other_tasks_are_code_that_has_to_be_trusted(folder: str, capsys) -> None:
    options = {"name": "tasks", "tasks": ["demo_answer"], "include_path": folder}
    for call_ in (
        lambda: plan(qa.Spec(evaluate={"evaluations": [options]}), check_output=False),
        lambda: qa.evaluate(torch.nn.Linear(1, 1), evaluation="tasks", tasks="demo_answer",
                            include_path=folder),
    ):  # fmt: skip
        with pytest.raises(PlanRefused, match="files of tasks are code") as caught:
            call_()
        assert [problem.where for problem in caught.value.problems] == [folder]
    model = str(demo.MODEL_DIR)
    assert call("eval", model, "--tasks", "demo_answer", "--include-path", folder) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_a_folder_that_is_none_and_options_that_are_wrong() -> None:
    wrong = {"name": "tasks", "tasks": [], "limit": 0, "num_fewshot": -1, "fewshots": 2}
    with pytest.raises(PlanRefused) as caught:
        plan(qa.Spec(evaluate={"evaluations": [wrong]}), check_output=False)
    where = {problem.where for problem in caught.value.problems}
    assert where >= {f"evaluation.{n}" for n in ("tasks", "limit", "num_fewshot", "fewshots")}
    (problem,) = task_problems(["x"], ["/no/such/folder"], confirmed=False)
    assert problem.where == "evaluation.include_path"


def test_files_that_include_each_other_come_to_an_end(tmp_path: Path) -> None:
    for one, other in (("one", "other"), ("other", "one"), ("self", "self")):
        (tmp_path / f"{one}.yaml").write_text(f"task: {one}\ninclude: {other}.yaml\n")
    assert {"one", "other", "self"} <= known_tasks([str(tmp_path)]).keys()


@pytest.mark.slow
def test_a_plan_with_tasks_loads_no_torch_and_runs_no_code_of_the_folder(folder: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys, quantadapt as qa\n"
        "from quantadapt.planning.stage import evaluators\n"
        "from quantadapt.remote_code import trusting\n"
        f"options = {{'tasks': ['demo_group'], 'include_path': [{folder!r}]}}\n"
        "with trusting(True):\n"
        "    evaluators([{'name': 'tasks', **options}])\n"
        f"sys.exit('torch' in sys.modules or {folder + '/measures'!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_library_the_extra_is_named(monkeypatch) -> None:
    from quantadapt import dependencies

    monkeypatch.setattr(dependencies, "installed_version", lambda name: None)
    with pytest.raises(PlanRefused, match=r"needs lm-eval, which is not installed") as caught:
        plan(qa.Spec(evaluate={"tasks": ["anything"]}), check_output=False)
    assert "quantadapt[tasks]" in str(caught.value)


def test_what_only_the_model_tells(tuned, folder: str) -> None:
    model, _ = tuned
    tasks = Tasks(tasks=["demo_choice"], include_path=[folder], apply_chat_template=True)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        tasks.measure(model, Given(None, (), tokenizer))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="tokenizer"):
        tasks.measure(model, Given(None))  # type: ignore[arg-type]


# Names --------------------------------------------------------------------------------------------


def test_groups_and_tags_are_found_with_all_of_their_parts(folder: str) -> None:
    loaded = manager_of(["demo_all", "demo_group"], [folder]).load(["demo_all"])
    assert loaded["tasks"].keys() == {"demo_choice", "demo_answer"}
    assert {"demo_other", "demo_sampled", "demo_text"} <= known_tasks(
        [folder], ["demo_text"]
    ).keys()
    other = manager_of(["math_word_problems"], [])  # tasks in many folders have this tag
    assert {"gsm8k", "asdiv_cot_llama"} & other.task_index["math_word_problems"].tags


@pytest.mark.slow
def test_names_are_those_of_lm_evals_own_index() -> None:
    from lm_eval.tasks import TaskManager

    theirs = TaskManager()
    assert known_tasks().keys() == set(theirs.all_tasks)
    for name in ("mmlu", "leaderboard", "math_word_problems"):
        tags = theirs.task_index[name].tags
        assert manager_of([name], []).task_index[name].tags == tags


# In runs and on the command line ------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Any:
    spec = qa.Spec(
        train={"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2},
        evaluate={
            "tasks": "demo_choice",
            "evaluations": [{"name": "tasks", "include_path": folder, "limit": 4}],
            "samples": 0,
        },
        output=str(tmp_path_factory.mktemp("run") / "run"),
        trust_remote_code=True,
    )
    return qa.run(spec, verbose=False)


@pytest.mark.slow
def test_a_run_measures_its_models_and_what_changed(run) -> None:
    figures = json.loads((run.folder / "metrics.json").read_text())["evaluations"]["tasks"]
    acc = figures["demo_choice acc"]
    assert (
        list(acc["values"])
        == list(acc["errors"])
        == ["unquantized", "quantized", "tuned", "merged"]
    )
    since = {model: change["since"] for model, change in acc["changes"].items()}
    assert since == {"quantized": "unquantized", "tuned": "quantized", "merged": "tuned"}
    change = acc["changes"]["tuned"]
    assert change["value"] == pytest.approx(acc["values"]["tuned"] - acc["values"]["quantized"])
    assert change["error"] is not None
    page = (run.folder / "report.html").read_text()
    assert "tuned since quantized" in page
    assert "±" in page
    spec = qa.Spec.load(run.folder / "spec.yaml")  # runs again as it stands
    assert spec.evaluate.tasks == []
    assert spec.evaluate.evaluations[0].options["tasks"] == ["demo_choice"]


@pytest.mark.slow
def test_the_merged_model_is_measured_as_lm_eval_measures_its_files(run, folder: str) -> None:
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "merged", dtype=torch.float32)
    expected = stock(merged, folder, ["demo_choice"], limit=4)["results"]["demo_choice"]
    figures = run.metrics["evaluations"]["tasks"]
    for metric in ("acc", "acc_norm"):
        found = figures[f"demo_choice {metric}"]
        assert found["values"]["merged"] == expected[f"{metric},none"]
        assert found["errors"]["merged"] == pytest.approx(expected[f"{metric}_stderr,none"])


def call(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def asking(folder: str, limit: str) -> tuple[str, ...]:
    trusted = ("--include-path", folder, "--trust-remote-code")
    return ("--tasks", "demo_choice", *trusted, "--limit", limit)


@pytest.mark.slow
def test_eval_measures_the_models_of_a_run_again(run, folder: str, capsys) -> None:
    with_tasks = asking(folder, "4")
    assert call("eval", str(run.folder), *with_tasks, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    before = run.metrics["evaluations"]["tasks"]
    for name, figure in found["models"]["tasks"].items():
        assert figure["values"] == pytest.approx(before[name]["values"]), name
        assert figure["changes"].keys() == before[name]["changes"].keys()
    assert found["evaluations"]["tasks"]["demo_choice acc"]["error"] is not None


@pytest.mark.slow
def test_eval_shows_one_model_or_a_table(run, folder: str, capsys) -> None:
    with_tasks = asking(folder, "2")
    assert call("eval", str(run.folder), *with_tasks, "--models", "quantized,tuned") == 0
    out = capsys.readouterr().out
    assert "tuned since quantized" in " ".join(out.split())
    assert call("eval", str(run.folder), *with_tasks, "--models", "tuned") == 0
    assert "tasks demo_choice acc_norm" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_refuses_before_loading(run, folder: str, capsys) -> None:
    assert call("eval", str(run.folder), "--num-fewshot", "2", "--include-path", folder) == 2
    err = capsys.readouterr().err
    assert err.count("add --tasks NAMES") == 2
    (run.folder / "merged").rename(run.folder / "elsewhere")
    try:
        assert call("eval", str(run.folder), "--models", "tunde,merged") == 2
    finally:
        (run.folder / "elsewhere").rename(run.folder / "merged")
    err = capsys.readouterr().err
    assert "did you mean 'tuned'?" in err
    assert "there is no merged model: the run wrote none" in err
    assert call("eval", str(Path(demo.MODEL_DIR)), "--models", "tuned") == 2
    assert "is no run" in capsys.readouterr().err
