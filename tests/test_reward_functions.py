"""Reward functions: what they may do, how they are ended, and how they are found and imported."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantadapt.errors import RewardError
from quantadapt.inputs.patience import TooLate, within
from quantadapt.rewarding.functions import functions_of, problems
from quantadapt.rewarding.scoring import Scorer

HEAD = "import os, re, signal, sys, time\n\n\n"


def imported(folder: Path, body: str) -> Callable[..., Any]:
    file = folder / "rewards.py"
    file.write_text(f"{HEAD}def reward(prompts, completions, **_):\n    {body}\n")
    (function,) = functions_of([f"{file}:reward"], 60).values()
    return function


def scored(*functions: Callable[..., Any], seconds: float = 30.0) -> list[list[float]]:
    named = {f"{place}": function for place, function in enumerate(functions)}
    scorer = Scorer(named, (1.0,) * len(named), seconds)
    found: list[list[float]] = scorer.scores(["p"] * 2, ["a", "bb"], [[1], [2, 3]], {}).tolist()
    return found


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


HANGS = {
    "waits": "time.sleep(60)",
    "computes": "[1 for _ in iter(int, 1)]",
    "keeps Python's lock": 're.match(r"(a+)+$", "a" * 40 + "b")',
    "catches exceptions": """
    for _ in completions:
        try:
            time.sleep(60)
        except Exception:
            pass""",
    "catches all": """
    try:
        time.sleep(60)
    except BaseException:
        return [0.0] * len(completions)""",
}


@pytest.mark.parametrize("kind", HANGS)
def test_one_that_hangs_is_ended(kind, tmp_path) -> None:
    function, before = imported(tmp_path, HANGS[kind]), signal.getsignal(signal.SIGVTALRM)
    started = time.monotonic()
    with pytest.raises(RewardError, match="has not returned after"):
        scored(function, seconds=0.5)
    assert time.monotonic() - started < 20  # a busy machine
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert not [thread for thread in threading.enumerate() if "watch" in thread.name]


def test_timer_and_thread_together_end_it_once() -> None:
    """What comes while all is put back would leave the handler and the thread behind."""
    ended: list[int] = []

    def call() -> None:
        try:
            time.sleep(60)
        except TooLate:
            for count in range(100):
                signal.raise_signal(signal.SIGVTALRM)
                ended.append(count)
            raise

    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TooLate):
        within(0.2, call)
    assert len(ended) == 100
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_in_another_thread_one_that_waits_is_left_behind(tmp_path) -> None:
    function = imported(tmp_path, "time.sleep(5)")
    error = in_a_thread(lambda: scored(function, seconds=0.2))
    assert isinstance(error, RewardError)
    assert "has not returned after 0.2 s" in str(error)


def test_it_may_use_signals(tmp_path) -> None:
    """As math-verify does, which runs in the main thread alone."""
    body = "signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(0); return [1, 2]"
    assert scored(imported(tmp_path, body)) == [[1], [2]]


def test_it_may_fork(tmp_path) -> None:
    """What it forked and came back is no second run."""
    body = "os.fork(); return [1, 2]"
    assert scored(imported(tmp_path, body)) == [[1], [2]]


def test_what_it_sets_of_gradients_or_removes_of_lists_is_its_own(tmp_path) -> None:
    def sets(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        torch.set_grad_enabled(False)
        prompts.clear()
        completions.clear()
        return [1, 2]

    def lengths(completions: list[Any], **_: Any) -> list[float]:
        return [len(one) for one in completions]

    assert scored(sets, lengths) == [[1, 1], [2, 2]]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("beside", [False, True], ids=["main thread", "another"])
@pytest.mark.parametrize("body", ["sys.exit(3)", "raise GeneratorExit", "raise KeyError('a')"])
def test_one_that_ends_or_raises_is_told(body, beside, tmp_path) -> None:
    function = imported(tmp_path, body)

    def call() -> Any:
        with pytest.raises(RewardError, match="the reward function failed with") as found:
            scored(function)
        return found.value

    error = in_a_thread(call) if beside else call()
    assert "let it take **columns" in error.problems[0].fix


@pytest.mark.parametrize(
    ("body", "says"),
    [("sys.exit(9)", "SystemExit: 9"), ("import not_there_at_all", "ModuleNotFoundError")],
)
def test_a_file_that_cannot_be_imported_is_told(body, says, tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"{HEAD}{body}\n\n\ndef reward(**_):\n    pass\n")
    assert not problems([f"{file}:reward"], "rewards")
    with pytest.raises(RewardError, match=f"cannot be imported: {says}"):
        functions_of([f"{file}:reward"], 60)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [("waits", False), ("waits", True), ("computes", False), ("keeps Python's lock", False)],
)
def test_a_file_that_hangs_while_it_is_imported_is_told(kind, beside, tmp_path) -> None:
    file, before = tmp_path / "rewards.py", signal.getsignal(signal.SIGVTALRM)
    ends = HANGS[kind].replace("time.sleep(60)", "time.sleep(3)") if beside else HANGS[kind]
    file.write_text(f"{HEAD}{ends}\n\n\ndef reward(**_):\n    pass\n")

    def call() -> str:
        with pytest.raises(RewardError, match=r"not been imported after 0.3 s") as found:
            functions_of([f"{file}:reward"], 0.3)
        return str(found.value)

    started = time.monotonic()
    assert "raise reward_timeout" in (in_a_thread(call) if beside else call())
    assert time.monotonic() - started < 20  # a busy machine
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_functions_below_an_if_or_a_try_are_found(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "try:\n    import gone\nexcept ImportError:\n    def one(**_):\n        pass\n"
        "if True:\n    async def two(**_):\n        pass\n"
    )
    found = problems([f"{file}:{name}" for name in ("one", "two", "three")], "rewards")
    assert [p.what.split(" in ")[0] for p in found] == ["two", "there is no function 'three'"]


def test_a_module_that_is_not_there_is_refused_by_the_plan() -> None:
    (problem,) = problems(["not_there_at_all:reward", "json:loads"], "objective.rewards")
    assert problem.what == "there is no module 'not_there_at_all'"


def test_a_function_of_the_script_itself_is_there(monkeypatch) -> None:
    """`__main__` has no spec, nor has a module that is made by hand."""
    monkeypatch.setitem(sys.modules, "made_by_hand", module := ModuleType("made_by_hand"))
    module.reward = scored  # type: ignore[attr-defined]
    assert problems(["made_by_hand:reward"], "objective.rewards") == []
    assert functions_of(["made_by_hand:reward"], 30.0) == {"reward": scored}
