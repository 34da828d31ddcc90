"""What lies on the studio's desk: the runs, and the model that is open to be talked with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ModelError, QuantadaptError
from ..exporting.manifest import ADAPTER, MANIFEST
from ..folders.run_folder import RunFolder
from ..generation.prompts import PromptWriter, layout_of
from ..generation.questions import Question, held_out_questions
from ..planning.stage import plan
from ..spec import Spec
from .running import Runs
from .speaking import Speaker

_MOST_QUESTIONS = 24


class Desk:
    """The runs in a folder, and one open model.

    Args:
        root: the folder that runs lie in.
        trust: whether code that comes with models may run.

    Attributes:
        speaker: the open model; None where there is none.
    """

    def __init__(self, root: Path, *, trust: bool = False) -> None:
        self.runs, self.trust = Runs(root), trust
        self.speaker: Speaker | None = None
        self._turn = threading.Lock()

    def start(self, arguments: Sequence[str], folder: Path) -> None:
        """Start a run; the open model is put away, as its memory is needed."""
        self.runs.start(arguments, folder)
        self.close()

    def resume(self, folder: RunFolder) -> None:
        """Go on with a run. Raises what its plan is refused for."""
        file = folder.path / "spec.yaml"
        spec = Spec.load(file)
        train = spec.train.model_copy(update={"resume": True})
        how = {"output": str(folder.path), "train": train, "trust_remote_code": self.trust}
        plan(spec.model_copy(update=how))
        more = ["--trust-remote-code"] if self.trust else []
        where = f"--output={folder.path}"
        self.start(["run", str(file), where, "--resume", *more], folder.path)

    def talkers(self) -> list[str]:
        """Return the names of the runs that have an adapter to talk with, the latest first."""
        root = self.runs.root
        return [n for n in self.runs.names() if (root / n / ADAPTER / MANIFEST).is_file()]

    def open(self, name: str | None) -> str:
        """Open a run's model in place of the one that is open; returns a sentence about it.

        Raises:
            ModelError: there is no such run, or a run trains on the GPU.
        """
        from ..exporting.loading import load
        from ..machine import this_machine
        from ..quantizing.state import state_of

        if name not in self.talkers():
            raise ModelError("no run with an adapter is chosen", fix="choose one", where="run")
        if self.runs.running is not None and this_machine().cuda:
            what = "a run is training on the GPU, whose memory it needs"
            raise ModelError(what, fix="wait until it has ended, or stop it")
        self.close()
        folder = self.runs.root / name
        with self._turn:
            model = load(folder, trust_remote_code=self.trust)
            tokenizer = state_of(model).tokenizer
            if tokenizer is None:
                raise ModelError("the model has no tokenizer", where=str(folder))
            writer = PromptWriter(tokenizer, layout_of(folder, tokenizer))
            asked = _questions(folder)
            self.speaker = Speaker.open(model, writer, name=name, questions=asked)
            return f"{name} is open. {self.speaker.told}"

    def close(self) -> None:
        """Put the open model away, so that its memory is free."""
        with self._turn:
            if self.speaker is not None:
                self.speaker.close()
                self.speaker = None
                _free_memory()


def _questions(folder: Path) -> list[Question]:
    with suppress(QuantadaptError, OSError):  # data may have gone since
        spec = Spec.load(folder / "spec.yaml")
        return held_out_questions(spec.data, seed=spec.seed, most=_MOST_QUESTIONS)
    return []


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
