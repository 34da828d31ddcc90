"""PEFT's own test suite over facades.

    pytest --pyargs quantadapt.testing --backend hqq --peft-suite=peft-0.21.2

PEFT's sdist holds its tests (`pip download --no-binary :all: --no-deps peft`). They build or load a
model, and before PEFT sees it, every `nn.Linear` in it becomes a facade of the backend. Layers that
the backend cannot quantize become facades of `none`; those of PEFT's small models suit hqq with
`--backend-options group_size=null`. Small models of the hub are made here, see `stand_ins`. What
merge_and_unload quantizes again has other numbers, which PEFT's tests do not expect: these failures
are counted by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from ..errors import QuantadaptError
from ..facade import QuantLinear, wrap
from ..matrix.verify import parse_options
from ..model.dense import skipped_modules
from ..model.modules import linear_layers, set_submodule
from ..planning.on_disk import quantization_of
from ..protocols import LayerwiseQuantizer
from ..registry.discovery import registry
from .stand_ins import write_stand_ins

FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_seq_classifier.py",
)
DOWNLOAD, REFUSED = "needs a download", "refused in a sentence"
CLASS, FLAT = "PEFT wants nn.Linear itself", "FSDP 1 flattens no packed integers"
NUMBERS, ELSE = "other numbers", "something else"


class _Cached(Counter[str]):
    """How often each model was asked for, as PEFT's tests count it: no model is asked for first."""

    def __contains__(self, name: object) -> bool:
        return True


class PeftSuite:
    """Collects PEFT's tests in place of ours, and counts how they end.

    Args:
        path: the unpacked sdist, or the folder `tests` in it.
        backend: its name; it quantizes layer by layer.
        options: of the backend.
    """

    def __init__(self, path: str, backend: str, options: dict[str, Any]) -> None:
        folder = Path(path).expanduser()
        folder = folder / "tests" if (folder / "tests").is_dir() else folder
        found = [name for name in FILES if (folder / name).is_file()]
        if not found:
            raise pytest.UsageError(f"--peft-suite: {folder} holds none of {', '.join(FILES)}")
        self.package = TemporaryDirectory(prefix="peft-suite-")  # the sdist's tests are none
        package = Path(self.package.name, "tests")  # as PEFT calls it
        package.mkdir()
        (package / "__init__.py").touch()
        for file in folder.iterdir():
            (package / file.name).symlink_to(file.resolve())
        self.files = [str(package / name) for name in found]
        self.cache = Path(self.package.name, "hub")
        write_stand_ins(self.cache, [Path(file).read_text("utf-8") for file in self.files])
        self.backend = backend
        self.quantizer = registry().backend(backend).quantizer(**options)
        if not isinstance(self.quantizer, LayerwiseQuantizer):
            raise pytest.UsageError(f"--peft-suite: {backend} does not quantize layer by layer")
        self.dense = registry().backend("none").quantizer()
        self.ended: Counter[str] = Counter()

    @classmethod
    def asked(cls, given: Any) -> PeftSuite:
        """Return the suite that the options of the command line ask for."""
        if len(given.backend or ()) != 1:
            raise pytest.UsageError("--peft-suite takes one backend: --backend NAME")
        try:
            return cls(
                given.peft_suite, given.backend[0], parse_options(given.backend_options or ())
            )
        except QuantadaptError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.fixture(autouse=True)
    def _over_facades(self, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put facades into each model that PEFT's tests build or load."""
        from transformers import PreTrainedModel

        ours, to, load = request.module.__name__, nn.Module.to, PreTrainedModel.from_pretrained

        def moved(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = to(module, *args, **kwargs)
            return self.put_facades(result) if type(module).__module__ == ours else result

        def loaded(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(PreTrainedModel, "from_pretrained", classmethod(load.__func__))  # type: ignore[attr-defined]
                if quantization_of(str(name)):  # a test saved it; transformers knows few methods
                    model = self.quantizer.load(str(name), device="cpu", dtype=torch.float32)
                    return wrap(model, self.quantizer.target, torch.float32)
                return self.put_facades(load.__func__(cls, name, *args, **kwargs))  # type: ignore[attr-defined]

        monkeypatch.setattr(nn.Module, "to", moved)
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loaded))
        wrapper = getattr(request.module, "MockTransformerWrapper", None)
        if wrapper is not None:
            mock = wrapper.from_pretrained
            monkeypatch.setattr(
                wrapper, "from_pretrained", lambda *a, **k: self.put_facades(mock(*a, **k))
            )

    @pytest.fixture(autouse=True)
    def _offline(self, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the stand-ins found, and keep PEFT's tests from asking the hub."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        utils = import_module(f"{request.module.__package__}.testing_utils")
        monkeypatch.setattr(utils, "_HUB_MODEL_ACCESSES", _Cached())

    def put_facades(self, model: nn.Module) -> nn.Module:
        """Put facades where quantadapt would in `model`, unless PEFT is there already."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, (BaseTunerLayer, QuantLinear)) for module in model.modules()):
            return model
        for name, linear in list(linear_layers(model, skipped_modules(model, None))):
            if name and linear is model.get_submodule(
                name
            ):  # no Conv1D, which PEFT's tests look for
                dtype = getattr(model, "dtype", linear.weight.dtype)  # one for all layers
                set_submodule(model, name, self._facade(linear.to(dtype)))
        return model

    def _facade(self, linear: nn.Linear) -> QuantLinear:
        fits = self.quantizer.misfit(linear.in_features, linear.out_features) is None
        quantizer: Any = self.quantizer if fits else self.dense
        with torch.no_grad():
            vendor = quantizer.quantize_linear(linear)
        return QuantLinear(vendor, quantizer.target, linear.weight.dtype)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        """Count how each test ends."""
        report = yield
        if report.when == "call" or report.outcome != "passed":
            if report.failed:
                statement = str(call.excinfo.traceback[-1].statement)
                self.ended[why(call.excinfo.value, statement)] += 1
            elif report.when != "teardown":
                self.ended[report.outcome] += 1
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say how many ended how."""
        terminalreporter.section(f"PEFT's own tests over {self.backend}")
        for name, count in self.ended.most_common():
            terminalreporter.write_line(f"{count:6}  {name}")


def why(error: BaseException, statement: str = "") -> str:
    """Return in a few words what kind of failure `error` is, raised by `statement`."""
    text = str(error)
    if "huggingface.co" in text or "offline" in text.lower() or "cached files" in text:
        return DOWNLOAD
    if isinstance(error, QuantadaptError):
        return REFUSED
    if "not a plain torch.nn.Linear" in text:
        return CLASS
    if "flatten integer" in text or "flatten tensors with uniform dtype" in text:
        return FLAT
    if isinstance(error, AssertionError) and "close" in text + statement:
        return NUMBERS
    return ELSE
