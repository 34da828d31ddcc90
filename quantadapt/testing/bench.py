"""What the tests of one backend share: the plan, one quantized model, one training per adapter.

Everything is made once, when the first test asks for it; tests that change a model get a copy.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import demo
from ..capabilities import Merge
from ..planning.planned import Plan
from ..planning.refusals import attach_refusals, merge_refusals, onto_refusals
from ..planning.stage import plan
from ..records import Adapter, Backend
from ..registry.discovery import registry
from ..spec import Spec
from .short_training import Trained, train
from .small_demo import biased, calibration_examples, demo_tokens, small_model
from .small_experts import small_experts
from .tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor, nn

    from ..facade import QuantLinear
    from .suite import Suite

Adapters = Mapping[str, Mapping[str, Any]]

SMALL: Adapters = {
    # A schedule that really moves the budget within the few steps taken here.
    "adalora": {"total_step": 5, "tinit": 1, "tfinal": 2, "deltaT": 1},
}
"""Options that the suite gives to adapters."""


class Bench:
    """One backend with its options on one device, ready to be measured."""

    def __init__(self, suite: type[Suite]) -> None:
        self.suite = suite
        self.figures: dict[str, dict[str, float]] = {}
        self._experts: dict[tuple[str, bool], nn.Module] = {}
        self._trained: dict[str, Trained | Exception] = {}
        self._tracebacks: dict[str, TracebackType | None] = {}

    # Declarations: nothing heavy is imported.

    @cached_property
    def record(self) -> Backend:
        """The backend's record."""
        return registry().backend(self.suite.backend)

    def spec(self, adapter: str = "lora", /, **values: Any) -> Spec:
        """Return a spec of this backend with `adapter` as the suite trains it."""
        options = {**SMALL.get(adapter, {}), **self.suite.adapter_options.get(adapter, {})}
        defaults: dict[str, Any] = {
            "model": str(demo.MODEL_DIR),
            "backend": {"name": self.suite.backend, **self.suite.options},
            "adapter": {"name": adapter, **options},
            "device": self.suite.device,
            "dtype": self.suite.dtype,
            # never made, and nothing of the user's
            "output": str(Path(tempfile.gettempdir()) / f"quantadapt-suite-{os.getpid()}"),
        }
        return Spec(**{**defaults, **values})

    def cell_of(self, adapter: str) -> tuple[Any, Adapter]:
        """Return the facts about the cell with `adapter`, and the adapter's record."""
        from ..planning.refusals import make_cell

        spec = self.spec(adapter)
        record = registry().adapter(adapter)
        quantizer = self.record.quantizer(**self.suite.options)
        options = {**record.defaults, **spec.adapter.options}
        cell = make_cell(
            self.record, quantizer, record, options, self.suite.device, self.suite.dtype
        )
        return cell, record

    def refusals(self, adapter: str, action: str) -> list[Any]:
        """Return why a rule refuses to "attach", merge "dense", "requantize", or merge "onto" the
        unquantized base with `adapter`."""
        cell, record = self.cell_of(adapter)
        found = attach_refusals(cell, self.record, record)
        if action in ("dense", "requantize") and not found:
            found = merge_refusals(cell, self.record, record, action)  # type: ignore[arg-type]
        if action == "onto" and not found:
            found = onto_refusals(self.record, record, cell, str(demo.MODEL_DIR))
        return found

    def adapters_for(self, wanted: str) -> list[str]:
        """Return the suite's adapters for which `wanted` is allowed; all of them for "all"."""
        names = self.suite.adapters
        return [n for n in names if wanted == "all" or not self.refusals(n, wanted)]

    def declared(self, adapter: str) -> str:
        """Return what the cell declares: DENSE, REQUANTIZE, NEVER or refused."""
        if self.refusals(adapter, "attach"):
            return "refused"
        if self.refusals(adapter, "dense"):
            return Merge.NEVER.name
        refused = self.refusals(adapter, "requantize")
        return Merge.DENSE.name if refused else Merge.REQUANTIZE.name

    def note(self, adapter: str, **figures: float) -> None:
        """Remember figures of a cell, or of the backend itself where `adapter` is empty."""
        self.figures.setdefault(adapter, {}).update(figures)

    # Models.

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="quantadapt-")

    def folder(self) -> Path:
        """Return a new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self._scratch.name))

    def close(self) -> None:
        """Drop the models and the folders."""
        if "_scratch" in vars(self):
            self._scratch.cleanup()
        self._trained.clear()
        self._experts.clear()
        for name in ("base", "biased", "dense", "_scratch"):
            vars(self).pop(name, None)

    @property
    def source(self) -> str:
        """The checkpoint folder of the small model."""
        return str(small_model())

    @cached_property
    def plan(self) -> Plan:
        """The plan for the small model with the first adapter."""
        return plan(self.spec(model=self.source))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.suite.dtype)
        return dtype

    @cached_property
    def dense(self) -> nn.Module:
        """The small model, unquantized."""
        from ..loading.reading import from_pretrained

        device_map = {"": self.suite.device}
        return from_pretrained(self.source, dtype=self.torch_dtype, device_map=device_map).eval()

    @cached_property
    def base(self) -> nn.Module:
        """The small model, quantized from disk; not to be changed."""
        return self.quantize(self.plan)

    @cached_property
    def biased(self) -> nn.Module:
        """The small model with a random bias in each layer, quantized but for the layers called
        `skipped`; not to be changed."""
        from ..quantizing.state import state_of

        skip = [*state_of(self.base).skip_modules, self.skipped]
        model = self.quantize(plan(self.spec(model=self.source, skip_modules=skip)), biased(self))
        state_of(model).tokenizer = state_of(self.base).tokenizer
        return model

    def experts(self, kind: str) -> nn.Module:
        """The small mixture of experts of that kind, quantized; not to be changed."""
        if (kind, True) not in self._experts:
            made = plan(self.spec(model=self.source))
            self._experts[kind, True] = self.quantize(made, copy.deepcopy(self.dense_experts(kind)))
        return self._experts[kind, True]

    def dense_experts(self, kind: str) -> nn.Module:
        """The same, unquantized."""
        if (kind, False) not in self._experts:
            self._experts[kind, False] = small_experts(self, kind)
        return self._experts[kind, False]

    @property
    def skipped(self) -> str:
        """What the last layer is called in its block; some vendors want all blocks alike."""
        return list(self.facades())[-1].rpartition(".")[2]

    def quantize(self, made: Plan, module: nn.Module | None = None) -> nn.Module:
        """Quantize what the plan `made` names, or a live `module` by the same spec, calibrated
        where the backend wants it."""
        from ..quantizing.stage import quantize_plan

        if module is not None:
            spec = made.spec.model_copy(update={"model": None})
            made = plan(spec, module=module, check_output=False)
        examples = calibration_examples() if made.calibrates else None
        return quantize_plan(made, module=module, calibration=examples).eval()

    def fresh(self) -> nn.Module:
        """Return a copy of the quantized base."""
        return copy.deepcopy(self.base)

    def vendor_model(self) -> nn.Module:
        """Return the quantized model as its vendor made it, without facades."""
        from ..facade import unwrap

        model = unwrap(self.fresh())
        del model.quantadapt
        return model

    def facades(self) -> dict[str, QuantLinear]:
        """Return name -> facade of the base."""
        from ..facade import linear_facades

        return dict(linear_facades(self.base))

    @property
    def widest(self) -> str:
        """The name of the first layer with the most inputs: what tests of one layer look at."""
        return max(self.facades().items(), key=lambda item: item[1].in_features)[0]

    def some_facade(self) -> QuantLinear:
        """Return a copy of the widest facade."""
        return copy.deepcopy(self.facades()[self.widest])

    def original(self, name: str) -> Tensor:
        """Return the unquantized weight of a layer."""
        weight: Any = self.dense.get_submodule(name).weight
        return weight.detach()  # type: ignore[no-any-return]

    @cached_property
    def tolerance(self) -> Tolerance:
        """The row of the tolerance table."""
        target: Any = self.plan.quantizer.target
        return tolerance(
            self.bits(),
            self.suite.dtype,
            activation_error=target.activation_error if target.quantizes_activations else 0.0,
            calibrates=self.plan.calibrates,
        )

    @property
    def rescales(self) -> bool:
        """Whether quantizing moves scales between layers, so that single layers differ from the
        original by more than rounding: then merging onto the original is refused, too."""
        return any("onto" in rule.when.get("action", ()) for rule in self.record.rules)

    def reload_tolerance(self, adapter: str) -> float:
        """Return how far the logits of a reloaded adapter may be off: not at all, as a rule."""
        return self.tolerance.vendor if adapter in self.suite.reshaped else 0.0

    def bits(self) -> float:
        """Return bits per weight: as the suite says, as the options say, or as stored."""
        option = getattr(self.plan.quantizer, "bits", None)
        declared = self.suite.bits if self.suite.bits is not None else option
        return self.stored_bits() if declared is None else float(declared)

    def stored_bits(self) -> float:
        """Return how many bits the layers store for a weight, scales and the like included."""
        found = self.facades().values()
        stored = sum(weight_bytes(facade) for facade in found)
        return 8 * stored / sum(f.in_features * f.out_features for f in found)

    def bits_in_words(self) -> str:
        """Say where the bits come from that the tolerances go by, and how to declare others."""
        bits, option = self.bits(), getattr(self.plan.quantizer, "bits", None)
        source = "the layers store"
        if self.suite.bits is not None or option is not None:
            who = "`bits` of the suite" if self.suite.bits is not None else "the option `bits`"
            source = f"{who} says; the layers store {self.stored_bits():.3g}"
        text = f"Tolerances are those of {bits:.3g} bits, which {source}"
        return f"{text}. If it is another precision, set `bits` in the class of the suite"

    @property
    def ids(self) -> Tensor:
        """Token ids of demo data, [4, SEQUENCE]."""
        return demo_tokens().to(self.suite.device)

    def input_of(self, facade: QuantLinear) -> Tensor:
        """Return activations for one layer, the same ones each time."""
        import torch

        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 7, facade.in_features, generator=generator)
        return x.to(self.suite.device, self.torch_dtype)

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits on the fixed tokens, in float32."""
        import torch

        with torch.no_grad():
            output: Tensor = model.eval()(input_ids=self.ids).logits.float()
        return output

    @cached_property
    def base_logits(self) -> Tensor:
        """The logits of the quantized base."""
        return self.logits(self.base)

    # Adapters.

    def attach(self, adapter: str, model: nn.Module | None = None, **options: Any) -> PeftModel:
        """Attach `adapter` to a copy of the base, past every rule."""
        from transformers import set_seed

        from ..adapting.stage import attach_adapter
        from ..quantizing.state import state_of

        model = self.fresh() if model is None else model
        record = registry().adapter(adapter)
        set_seed(0)
        given = {**self.spec(adapter).adapter.options, **options}
        return attach_adapter(model, state_of(model), record, given)

    def trained(self, adapter: str) -> Trained:
        """Return `adapter`, attached and trained; made once."""
        if adapter not in self._trained:
            try:
                self._trained[adapter] = train(self, adapter)
            except Exception as error:
                self._trained[adapter] = error
                self._tracebacks[adapter] = error.__traceback__
        found = self._trained[adapter]
        if isinstance(found, Exception):
            # Without the frames of the tests that met it before.
            raise found.with_traceback(self._tracebacks[adapter])
        return found

    def loss(self, model: nn.Module) -> float:
        """Return the loss on the fixed tokens."""
        import torch

        with torch.no_grad():
            return float(model.eval()(input_ids=self.ids, labels=self.ids).loss)


def weight_bytes(facade: QuantLinear) -> float:
    """Return the size of what is stored for a layer's weight."""
    from ..evaluation.sizes import size_mib

    bias = 0 if facade.bias is None else facade.bias.nbytes
    return size_mib(facade) * 2**20 - bias
