"""Calls from Python and notebooks: progress where somebody looks, libraries kept quiet, short
names for what comes back."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from few_rows import few_rows
from rich.console import Console

import quantadapt as qa
from quantadapt.folders.metrics import many
from quantadapt.registry import registry
from quantadapt.showing.display import RunDisplay
from quantadapt.showing.notebook import NotebookDisplay
from quantadapt.showing.python import display
from quantadapt.showing.quietly import logged, quiet, quietly
from quantadapt.showing.screen import Screen
from quantadapt.testing.small_demo import small_model
from quantadapt.training.progress import Progress

TRAIN = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}


# Progress -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return qa.attach(qa.quantize(None, "none", device="cpu"), "lora", r=2)


def test_nothing_is_shown_where_nobody_looks(model, random_data, capfd) -> None:
    qa.train(model, random_data, max_steps=1)
    qa.evaluate(model, random_data, max_examples=2)
    qa.quantize(None, "none", device="cpu")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "✓" not in shown.err


def test_each_stage_shows_itself(capsys) -> None:
    notes: list[str] = []
    model = qa.attach(qa.quantize(small_model(), "none", device="cpu", verbose=True), "lora", r=2)
    qa.train(model, few_rows(), verbose=True, on_note=notes.append, **TRAIN)
    found = qa.evaluate(model, few_rows(), max_examples=2, verbose=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    for text in ("✓ quantize", "✓ train", "✓ evaluate"):
        assert any(line.startswith(text) for line in lines)
    assert "none" in next(line for line in lines if line.startswith("✓ quantize"))
    assert any(line.startswith("  train step 2/4   held-out loss") for line in lines)
    assert f"perplexity {found['perplexity']:#.4g}" in shown.err
    assert any(note in line for note in notes for line in lines)  # the data, said to both


def test_a_run_shows_itself_or_is_quiet(tmp_path, capsys) -> None:
    def run(name: str, **options: Any) -> str:
        spec = qa.Spec(
            model=str(small_model()),
            data={"path": few_rows()},
            backend="none",
            train={"max_steps": 1},
            evaluate={"max_examples": 2, "samples": 0, "unquantized": False},
            export={"merge": "never"},
            output=str(tmp_path / name),
        )
        qa.run(spec, **options)
        return str(capsys.readouterr().err)

    events: list[str] = []
    told = run("a", verbose=True, listener=lambda event, data: events.append(event))
    for name in ("plan", "quantize", "attach", "train", "evaluate", "export"):
        assert f"✓ {name}" in told
    assert {"stage", "figures", "log", "note"} <= set(events)
    assert "✓" not in run("b", verbose=False)


class _Handle:
    def __init__(self) -> None:
        self.said: list[str] = []

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        self.said.append(data["text/plain"])


def test_a_notebook_has_one_line_that_changes(monkeypatch) -> None:
    handle = _Handle()

    def first(data: dict[str, str], *, raw: bool, display_id: bool) -> _Handle:
        handle.update(data, raw=raw)
        return handle

    module: Any = ModuleType("IPython.display")
    module.display = first
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    screen = io.StringIO()
    with NotebookDisplay(Console(file=screen, width=100, force_jupyter=False)) as shown:
        shown("stage", {"name": "train", "state": "start"})
        shown("log", {"step": 5, "max_steps": 20, "loss": 2.0, "learning_rate": 1e-3,
                      "seconds": 10.0, "seconds_left": 30.0})  # fmt: skip
        shown("validation", {"step": 5, "max_steps": 20, "eval_loss": 1.5, "best": True})
        shown("log", {"step": 10, "max_steps": 20, "loss": 1.0, "learning_rate": 1e-3,
                      "seconds": 20.0, "seconds_left": 20.0})  # fmt: skip
        shown("stage", {"name": "train", "state": "done", "seconds": 40.0})
    bars = [text for text in handle.said if " 10/20 " in text]
    assert len(bars) == 1
    assert "loss 1.0000" in bars[0]
    assert "held-out loss 1.5000" in bars[0]
    assert "20 s left" in bars[0]
    assert handle.said[-1] == ""
    assert screen.getvalue().splitlines() == [
        "✓ train       40.0 s   10 steps   loss 1.0000   held-out loss 1.5000"
    ]


LOGS = [
    {"step": 5, "max_steps": 1000, "loss": 2.0, "learning_rate": 1e-3, "seconds": 10.0,
     "tokens": 1000, "peak_memory_gib": 0.751, "seconds_left": 3000.0},
    {"step": 110, "max_steps": 1000, "loss": 1.0, "learning_rate": 1e-3, "seconds": 20.0,
     "tokens": 30_000, "peak_memory_gib": 0.751, "seconds_left": 3029.0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "told", "left_out"),
    [
        (40, ["loss 1.0000"], ["left"]),
        (60, ["loss 1.0000", "50 min left"], ["GiB", "held-out"]),
        (80, ["loss 1.0000", "2,900 tokens/s", "769 MiB", "50 min left"], ["held-out", "lr"]),
        (120, ["held-out loss 1.5000   lr 1.00e-03   2,900 tokens/s   769 MiB   50 min left"], []),
    ],
)
def test_a_line_of_progress_says_what_matters_and_fits(width, told, left_out) -> None:
    terminal = Screen(io.StringIO(), width=width, force_terminal=True)
    with RunDisplay(terminal) as shown:
        shown("stage", {"name": "train", "state": "start"})
        shown("log", LOGS[0])
        shown("validation", {"step": 5, "max_steps": 1000, "eval_loss": 1.5, "best": True})
        shown("log", LOGS[1])
        drawn = Screen(io.StringIO(), width=width)
        drawn.print(shown._live)
    (line,) = drawn.file.getvalue().splitlines()
    assert len(line) <= width
    assert "110/1000" in line
    assert all(text in line for text in told), line
    assert not any(text in line for text in left_out), line


def test_one_of_them_is_told_as_one(capsys) -> None:
    display = RunDisplay(Console(width=100))
    display.on_stage({"name": "train", "state": "start"})
    display.on_log({"step": 1, "max_steps": 1, "loss": 2.5, "learning_rate": 1e-3})
    display.on_stage({"name": "train", "state": "done", "seconds": 1.0})
    assert "1 step   loss 2.5000" in capsys.readouterr().out
    assert [many(count, "row") for count in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]


def test_plain_lines_have_all_of_it() -> None:
    screen = io.StringIO()
    with RunDisplay(Screen(screen, width=60)) as shown:
        shown("stage", {"name": "train", "state": "start"})
        for log in LOGS:
            shown("log", log)
    numbers = "loss 1.0000   lr 1.00e-03   2,900 tokens/s   769 MiB   50 min left"
    assert screen.getvalue().splitlines() == [f"  train step 110/1000   {numbers}"]


def test_the_time_left_goes_by_what_steps_take_after_the_first() -> None:
    progress = Progress(first_step=101, seconds=30.0)  # resumed, and 28 s went into compiling
    assert progress.seconds_left(101, 200) == pytest.approx(30 * 99)
    progress.seconds = 50.0
    assert progress.seconds_left(111, 200) == pytest.approx(2 * 89)
    progress.seconds = 228.0
    assert progress.seconds_left(200, 200) == 0


def test_a_notebook_is_known_by_its_kernel(monkeypatch, capsys) -> None:
    module: Any = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(kernel=object())
    said = _Handle()
    shows: Any = ModuleType("IPython.display")
    shows.display = lambda data, **_: said
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    with display(None) as tell:
        tell("note", {"text": "here"})
    assert "note: here" in capsys.readouterr().out
    module.get_ipython = lambda: SimpleNamespace()  # IPython on a terminal that is none
    with display(None) as tell:
        tell("note", {"text": "there"})
    assert "there" not in capsys.readouterr().out


# Libraries ----------------------------------------------------------------------------------------


def warn_as(module: str, text: str) -> None:
    """Warn as if from a file of `module`."""
    warnings.warn_explicit(text, UserWarning, f"{module}.py", 1, module=module)


def test_libraries_are_quiet_and_then_as_they_were(caplog) -> None:
    import datasets
    from transformers.utils import logging as of_transformers

    of_transformers.enable_progress_bar()
    datasets.enable_progress_bars()
    logger, ours = logging.getLogger("peft"), logging.getLogger("somebody")
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with quietly(), quietly():
            assert not of_transformers.is_progress_bar_enabled()
            assert datasets.are_progress_bars_disabled()
            logger.warning("noise")
            logger.error("it broke")
            ours.warning("heard")
            warn_as("transformers.modeling_utils", "noise")
            warn_as("peft", "noise")
            warn_as("transformers_of_mine", "of a user's")
            warnings.warn("of ours", qa.DataWarning, stacklevel=1)
        assert warnings.filters == before
    assert [str(warning.message) for warning in caught] == ["of a user's", "of ours"]
    assert [record.message for record in caplog.records] == ["it broke", "heard"]
    assert logger.level == logging.INFO
    assert of_transformers.is_progress_bar_enabled()
    assert not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", ["neural_compressor", "autoround"])
def test_a_library_that_is_imported_meanwhile_is_quiet(name, caplog) -> None:
    """Some give their logger a level and a handler then."""
    logger = logging.getLogger(name)
    level, handlers = logger.level, logger.handlers[:]
    try:
        with quietly():
            logger.handlers[:] = [caplog.handler]
            logger.setLevel(logging.INFO)
            with quietly():
                logger.warning("noise")
            logger.warning("noise")
            logger.error("it broke")
        logger.setLevel(logging.INFO)
        logger.warning("heard again")
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    found = [record.message for record in caplog.get_records("call") if record.name == name]
    assert list(dict.fromkeys(found)) == ["it broke", "heard again"]


def test_what_libraries_say_is_in_the_log_where_there_is_one() -> None:
    with warnings.catch_warnings(record=True) as caught, logged(), quietly():
        warn_as("peft.tuners", "merging may give other outputs")
        assert logging.getLogger("peft").getEffectiveLevel() < logging.ERROR
    assert [str(warning.message) for warning in caught] == ["merging may give other outputs"]


def test_they_are_as_they_were_after_an_error_too() -> None:
    from transformers.utils import logging as of_transformers

    of_transformers.enable_progress_bar()

    @quiet
    def breaks(number: int) -> int:
        return number // 0

    with pytest.raises(ZeroDivisionError):
        breaks(1)
    assert of_transformers.is_progress_bar_enabled()


def test_no_bar_of_a_library_reaches_the_screen(capfd) -> None:
    from transformers.utils import logging as of_transformers

    of_transformers.enable_progress_bar()
    qa.quantize(None, "hqq", device="cpu")
    shown = capfd.readouterr()
    assert "%|" not in shown.out + shown.err
    assert of_transformers.is_progress_bar_enabled()


# Names --------------------------------------------------------------------------------------------


def test_what_comes_back_has_a_short_name(model, random_data, tmp_path) -> None:
    trained = qa.train(model, random_data, max_steps=2, logging_steps=1)
    plan = qa.plan(qa.Spec(backend={"name": "hqq", "bits": 3}, adapter={"name": "dora", "r": 4}))
    shown = {
        repr(trained): ["TrainResult", "2 steps", f"loss {trained.losses[0][1]:.4g} to"],
        repr(plan): ["Plan", "dora(r=4", "hqq(bits=3", "on cpu in float32", "runs/hqq-dora"],
        repr(model.quantadapt): ["ModelState", "none", "lora(r=2"],
        repr(registry().backends()[0]): ["<Backend ", registry().backends()[0].summary],
        repr(registry().adapters()[0]): ["<Adapter "],
        repr(qa.Spec(train={"max_steps": 3})): ["Spec(train=TrainSpec(max_steps=3))"],
        repr(qa.RunResult(model, tmp_path, plan, {})): ["<RunResult ", str(tmp_path)],
    }
    for text, parts in shown.items():
        assert len(text) < 250, text
        for part in parts:
            assert part in text


def test_a_result_says_what_came_of_it(model, tmp_path) -> None:
    plan = qa.plan(qa.Spec(backend="none"))
    values = {"unquantized": 9.0, "quantized": 16.0, "tuned": 2048.0, "merged": None}
    figures = {"perplexity": {"perplexity": {"unit": "", "better": "lower", "values": values}}}
    metrics = {"evaluations": figures, "warnings": ["training made the model worse"]}
    text = repr(qa.RunResult(model, tmp_path, plan, metrics))
    assert "perplexity 16 to 2048" in text
    assert "warning: training made the model worse" in text
