"""Eight threads of one process that call at once: each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .commands import Bench, losses, make_inputs, pair, tensors, unexpected
from .processes import call
from .trials import Trial

PART = "threads"
THREADS = 8

Work = Callable[[str, Path], Any]
"""Takes a model and a folder to write; returns what has to be the same in each thread."""


def quantize(model: str, out: Path) -> Any:
    """Quantize and save."""
    import quantadapt as qa

    qa.save(qa.quantize(model, "hqq", device="cpu", group_size=32), out)
    return tensors(out)


def tune(model: str, out: Path) -> Any:
    """Quantize, attach, train, save, load and merge."""
    import quantadapt as qa

    base = qa.quantize(model, "hqq", device="cpu", group_size=32)
    tuned = qa.attach(base, "pissa", r=2)
    data = str(Path(model).parent / "data.jsonl")
    given = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    result = qa.train(tuned, data, **given)
    qa.save(tuned, out)
    qa.merge(qa.load(out, device="cpu"), out, data=data)
    return result.losses, pair(out), tensors(out / "merged")


def run(model: str, out: Path) -> Any:
    """Do a run."""
    import quantadapt as qa

    train = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    qa.run(
        qa.Spec(
            model=model,
            data=str(Path(model).parent / "data.jsonl"),
            backend={"name": "hqq", "group_size": 32},
            evaluate={"evaluations": [], "samples": 0, "unquantized": False},
            device="cpu",
            train=train,
            output=str(out),
        ),
        verbose=False,
    )
    return losses(out)


def fail(model: str, out: Path) -> Any:
    """Ask for what is refused, half of the time."""
    import quantadapt as qa

    if int(out.name) % 2:
        return tensors(qa.save(qa.quantize(model, "none", device="cpu"), out)) and None
    try:
        qa.quantize(f"{model}-nowhere", "none")
    except qa.QuantadaptError:
        return None
    raise AssertionError("it was not refused")


def replace(model: str, out: Path) -> Any:
    """Replace one folder, all of them the same."""
    import quantadapt as qa

    out = out.with_name("one")
    qa.save(qa.quantize(model, "hqq", device="cpu", group_size=32), out, overwrite=True)
    return sorted(tensors(out))


WORKS: tuple[Work, ...] = (quantize, tune, run, fail, replace)


def trials(bench: Bench) -> Iterator[Trial]:
    """Let eight threads begin at once, for each kind of work."""
    make_inputs(bench)
    for work in WORKS:
        yield Trial(PART, work.__name__, "in eight threads", _trial(bench, work))


def _trial(bench: Bench, work: Work) -> Callable[[], list[str]]:
    model = str(bench.inputs / "model")

    def act() -> int:
        alone = work(model, bench.root / "100")
        barrier = threading.Barrier(THREADS)

        def begin(number: int) -> Any:
            barrier.wait(60)
            return work(model, bench.root / str(number))

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(begin, range(THREADS)))
        return 0 if all(one == alone for one in found) else 1

    def wrong() -> list[str]:
        bench.empty()
        ended = call(act, bench.root)
        return unexpected(ended) or ([] if ended.code == 0 else ["they differ from one alone"])

    return wrong
