"""What a plugin implements: the options class of a record, whose methods do the work.

A backend has a `Quantizer`, and the `AdapterTarget` that it produces; an objective has a `Task`, an
evaluation an `Evaluator`, an export an `Exporter`. Nothing here imports torch: plugins are imported
to list them, and only asked to work later. Most backends subclass `LayerwiseQuantizer`, implement
`quantize_linear` and `load_linear`, and get quantize-on-load, saving, loading and re-quantization
from the core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from .capabilities import Cell, Merge
from .errors import PluginError, Problem

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from .data.reading import Data, Prompt
    from .exporting.tuned import Tuned
    from .records import Adapter, Backend
    from .spec import DataSpec
    from .training.trainer import Setup


class Options(BaseModel):
    """The options of a record: frozen, with every field something that users set.

    Field types, defaults and descriptions are what users see in `quantadapt backends show NAME` and
    the like, in the reference and in error messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Figure:
    """A number that an evaluation or an export found.

    Attributes:
        value: the number; nan or inf where there is none.
        unit: what it is counted in, e.g. "nats per token" or "MiB"; "share" is shown in percent;
            empty where it has no unit.
        better: which way is better, "lower" or "higher"; empty where neither is.
    """

    value: float
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{self.value:.1%}"
        return f"{self.value:.4g} {self.unit}".strip()


@runtime_checkable
class AdapterTarget(Protocol):
    """How the core sees one quantized linear layer of a vendor."""

    quantizes_activations: bool = False
    """True where the vendor's forward also quantizes activations (int8, fp8): it is then run as
    it is, and only the backward pass (straight-through) uses the dequantized weight."""

    straight_through: bool = True
    """False where training, unlike evaluation, leaves such a forward out and multiplies with the
    dequantized weight as elsewhere: adapters need not learn to live with a rounding so small."""

    def matches(self, module: nn.Module) -> bool:
        """Say whether `module` is a quantized linear layer of this backend."""
        ...

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return (in_features, out_features); packed weights cannot tell."""
        vendor: Any = module
        return int(vendor.in_features), int(vendor.out_features)

    def dequantize(self, module: nn.Module) -> Tensor:
        """Return the weight as a float tensor of shape [out_features, in_features]."""
        ...

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the vendor's forward with bias: [..., in_features] -> [..., out_features]."""
        output: Tensor = module(x)
        return output

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether `forward`, the vendor's kernel, is faster for `x` than dequantizing and a
        matrix product; it has to give the same but for rounding."""
        return False

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Return a new vendor module holding `weight` [out_features, in_features], quantized as
        `module` was. Called only where the backend declares `Merge.REQUANTIZE`."""
        name = type(self).__name__
        raise PluginError(f"{name} has no requantize", fix="declare Merge.DENSE, or implement it")


class Quantizer(Options, ABC):
    """The options of a backend, e.g. `HQQ(bits=4, group_size=64)`."""

    @property
    @abstractmethod
    def target(self) -> AdapterTarget:
        """The view of the layers that this quantizer makes."""
        ...

    @property
    def needs_data(self) -> bool:
        """False where these very options need no data, of a backend that calibrates with others."""
        return True

    @abstractmethod
    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        """Load and quantize `source`, a checkpoint folder or hub id, or quantize a live module.

        Args:
            source: path, hub id, or a module, which is changed in place.
            device: where the quantized model goes: "cpu", "cuda", "cuda:1", ...
            dtype: dtype of everything that is not quantized, and of the computation.
            calibration: tokenized examples (`input_ids` int64 [1, length], on the CPU). Never None
                or empty where the backend's record says that it calibrates.
            skip_modules: names left dense; None means the output head and what is tied to it.
        """
        ...

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Say why a layer of this size cannot be quantized ("128 does not divide its 320
        inputs"), or return None. Asked before any weight is loaded."""
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float | None:
        """Return how many bits a weight of a layer of this size takes in memory, scales, zero
        points and the like included; None (the default) if it is not known. Plans predict memory
        from it.

        Args:
            device: where the layer will be: "cpu", "cuda", ...
            dtype: torch's name of the compute dtype, e.g. "bfloat16".
        """
        return None

    def notes(self, device: str) -> tuple[str, ...]:
        """Return what a plan for `device` should tell, e.g. which kernel will run."""
        return ()

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        """Load a checkpoint that is already quantized with this backend. By default transformers
        does it, from the checkpoint's own `quantization_config`."""
        from .loading.reading import load_native

        return load_native(path, device=device, dtype=dtype)

    @abstractmethod
    def save(self, model: nn.Module, path: Path) -> None:
        """Write the quantized base in the vendor's or transformers' own format into `path`."""
        ...

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Quantizer | None:
        """Return the quantizer that made a checkpoint with this `quantization_config` (the dict in
        its config.json), or None if it is not one of this backend's."""
        return None

    @classmethod
    def from_model(cls, model: nn.Module) -> Quantizer | None:
        """Return the quantizer for a live module that is already quantized, or None."""
        return None


class LayerwiseTarget(AdapterTarget):
    """A target whose layers can be quantized again by the quantizer that made them."""

    def __init__(self, quantizer: LayerwiseQuantizer) -> None:
        self.quantizer = quantizer

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from torch import nn

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module.bias, nn.Parameter):
            linear.bias = module.bias
        elif module.bias is not None:  # some vendors keep it as a plain tensor
            linear.bias = nn.Parameter(module.bias, requires_grad=False)  # type: ignore[arg-type]
        return self.quantizer.quantize_linear(linear).train(module.training)


class LayerwiseQuantizer(Quantizer):
    """A quantizer that needs one linear layer at a time and no calibration data.

    Implement `target`, `quantize_linear` and `quantization_config`; and `load_linear`, unless
    transformers itself loads your checkpoints: then override `load` with `Quantizer.load`.
    """

    @abstractmethod
    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor module for `linear`, whose weight is on the target device and in the
        compute dtype. The caller drops `linear` afterwards; take its bias over."""
        ...

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the vendor module for `linear` (on the meta device: only its sizes, dtype and
        whether it has a bias count) from the tensors that were saved for it, without prefix."""
        name = type(self).__name__
        fix = "implement load_linear, or override load with Quantizer.load"
        raise PluginError(f"{name} has no load_linear", fix=fix)

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """What goes into the checkpoint's config.json under `quantization_config`; it must hold
        `quant_method`, and `from_checkpoint` must be able to read it back."""
        ...

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        """Return what `quantization_config` says where the linear layers `names` stay dense, for
        loaders that cannot tell from the tensors.

        Args:
            names: all of them, in order.
            head: the name of the output head if that is one of them; formats may imply it.
        """
        return {}

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        from .layerwise import quantize_layerwise

        return quantize_layerwise(self, source, device=device, dtype=dtype, skip=skip_modules)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from .layerwise import load_layerwise

        return load_layerwise(self, path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        from .layerwise import save_layerwise

        save_layerwise(self, model, path)


class Task(Options, ABC):
    """The options of an objective: how examples become batches and a loss.

    A subclass says how to read, to batch and to score; all else has a default. An objective that
    learns from the tokens of a text is less work: subclass `quantadapt.SFT` and override what
    differs.

    Attributes:
        sequences: how many sequences an example sends through the model; in a batch they are
            neighbours.
        adds_up: whether the loss of a batch is a sum over its examples, divided by a count: then a
            batch may go through the model in parts.
        repeats: whether every step does the same with batches of one shape, so that passes through
            the decoder may be recorded as CUDA graphs.
        packs: whether several examples may share a row (`train.packing`).
        logits: who makes logits, and how many are held. "model": the model, with its own loss;
            "chunks": `loss`, some at a time; "whole": `loss`, all of a batch. A loss that is not
            the model's lacks what a PEFT method adds to that (AdaLoRA does).
    """

    sequences: ClassVar[int] = 1
    adds_up: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "whole"

    @abstractmethod
    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Read and tokenize what `spec` names, and hold a part out.

        The columns of `train` are the task's own; backends calibrate on `input_ids`. Evaluations
        read `input_ids` and `completion_mask` of `eval`. Raises DataError.
        """
        ...

    @abstractmethod
    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of examples: tensors with a row for each sequence or example,
        among them `input_ids`."""
        ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            model: a PeftModel in training mode.
            batch: what `collator` made, on the model's device; may be changed.
            count: the `count` of all batches of a step, a float32 scalar, to divide a sum by; on
                several processes their mean. None only where `logits` is "model" and the model does
                not take one: its loss is a mean then.
        """
        ...

    def trainer(self, setup: Setup) -> Any:
        """Return what trains: by default transformers' own Trainer, which is told to use `loss`."""
        from transformers import Trainer, TrainingArguments

        return setup.trainer(Trainer, TrainingArguments, self.collator(setup))

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return what the loss of a batch is divided by: the number of its examples."""
        return len(batch["input_ids"]) // self.sequences

    def tokens(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return how many tokens without padding a batch sends through the model, an int or a
        scalar tensor, which need not be waited for."""
        seen = batch.get("attention_mask")
        return batch["input_ids"].numel() if seen is None else seen.sum()

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens each example has, in the longest of its sequences. Memory is
        planned for the longest."""
        import pyarrow.compute as pc

        found: list[int] = []
        for table in dataset.with_format("arrow").iter(10_000):  # makes no Python lists of them
            found += pc.list_value_length(table["input_ids"]).to_pylist()
        return found

    def parts(self, batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
        """Yield a batch in parts of `size` examples, where it `adds_up`."""
        rows, each = len(batch["input_ids"]), self.sequences
        steps = {rows: size * each, rows // each: size}  # of what has a row a sequence, an example
        for part in range(-(-rows // (size * each))):
            yield {
                name: value[part * step : (part + 1) * step]
                if getattr(value, "ndim", 0) and (step := steps.get(len(value)))
                else value
                for name, value in batch.items()
            }


@dataclass(frozen=True)
class Given:
    """What an evaluator is given beside the model.

    Attributes:
        examples: held-out examples, tokenized: columns `input_ids` and `completion_mask`, 1 where
            the loss counts.
        prompts: held-out prompts, each with its `text` and what the data says after it, its
            `reference`; none where the data came tokenized.
        tokenizer: the model's; None for a live module that has none.
        batch_size: how many examples or prompts to take at a time.
        max_new_tokens: longest answer, in tokens.
        split: whether each process of a run may take its part of the examples. All of them measure
            then, and each has to return the result of all.
    """

    examples: Dataset
    prompts: Sequence[Prompt] = ()
    tokenizer: Any = None
    batch_size: int = 8
    max_new_tokens: int = 64
    split: bool = False


class Evaluator(Options, ABC):
    """What measures; its fields are the evaluation's options."""

    def wants(self, model: str) -> bool:
        """Say whether to measure this model of a run: the "unquantized" base, the "quantized" one
        before training, the "tuned" one with its adapter, or the "merged" one."""
        return True

    @abstractmethod
    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Return figures of `model` by name, the one that matters most first.

        The model keeps its weights, its mode and its device. What is raised here costs no run: it
        is told once, and the evaluation is left out from then on. Only where several processes
        measure together does the run end, with the trained adapter saved.
        """
        ...


class Exporter(Options, ABC):
    """What is written from a tuned model; its fields are the export's options.

    Implement `write`, and `merges` where that works with merged weights: a combination that does
    not allow it is then refused when a run is planned, in the words of its rules.
    """

    @property
    def merges(self) -> Merge:
        """What it does with the adapter: NEVER (the default) leaves it beside the base, DENSE
        merges it into dense weights, REQUANTIZE has them quantized again."""
        return Merge.NEVER

    @property
    def folder(self) -> str:
        """The folder that is written, in that of the run; empty: called as the export is."""
        return ""

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> Iterable[Problem]:
        """Return what else is wrong with this export of this combination. Asked before any work
        starts: look at options and the files that they name, load and download nothing."""
        return ()

    @property
    def planned(self) -> str:
        """What will be written, in a few words, e.g. "dense merged model"; empty: its name."""
        return ""

    @property
    def refused(self) -> str:
        """What is not written where it is refused; empty: "no" and `planned`."""
        return ""

    def done(self, figures: Mapping[str, Figure]) -> str:
        """Return what became of it, as half a sentence about what `write` returned; empty: the
        figures with their names."""
        return ""

    def needed(self, tuned: Tuned) -> int | None:
        """Return the bytes that `write` will take on the disk, where that is known; it is refused
        at once if they are not free."""
        return None

    @abstractmethod
    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        """Write everything into `folder`, which is empty, and return figures about it by name.

        The folder gets its own name when this returns. If this raises, it is removed, and what an
        earlier export left is as it was.
        """
        ...
