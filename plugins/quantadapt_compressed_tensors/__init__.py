"""compressed-tensors, the checkpoints of LLM Compressor and vLLM
(https://github.com/vllm-project/compressed-tensors): integers of 4 and 8 bits, FP8, NVFP4, MXFP4.

Existing checkpoints are adopted and stay packed in memory; here, a weight is rounded to nearest.
Where a scheme says that what goes into layers is rounded as well, it is, in training, too: what is
trained is what is served. Gradients pass straight through. Files are those of the library, which
transformers and vLLM read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from quantadapt.capabilities import Merge
from quantadapt.errors import ModelError, warn
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt.records import Backend, Export, Serving
from quantadapt_compressed_tensors.config import left_out, schemes_in
from quantadapt_compressed_tensors.export import CompressedExport
from quantadapt_compressed_tensors.schemes import SIZES, Name, Scheme, named, sized
from quantadapt_compressed_tensors.target import CompressedTarget

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    Examples = list[dict[str, Tensor]]

METHOD = EXTRA = "compressed-tensors"
REQUIRES = ("compressed-tensors>=0.19",)


class LeftOutWarning(UserWarning):
    """Something that a checkpoint says is not done here."""


class CompressedTensors(LayerwiseQuantizer):
    """A scheme by its name; or groups as a checkpoint has them."""

    scheme: Name | None = Field(
        "W4A16", description="the scheme by the library's name: bits of weights and of inputs"
    )
    group_size: int | None = Field(
        None, ge=-1, description="of integer schemes of groups: inputs that share a scale; -1: rows"
    )
    config_groups: dict[str, Any] | None = Field(
        None, description="in place of a scheme: config_groups of a checkpoint; one, to quantize"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> CompressedTensors:
        if (self.scheme is None) == (self.config_groups is None):
            raise ValueError("give either a scheme or config_groups (and scheme: null)")
        if self.group_size == 0 or (self.group_size and self.scheme not in SIZES):
            raise ValueError(f"a group_size goes with {', '.join(SIZES)} alone")
        if self.config_groups is not None:
            try:
                _ = self.schemes
            except ModelError as error:
                raise ValueError(error.problems[0].what) from None
        return self

    @cached_property
    def schemes(self) -> list[Scheme]:
        """Return how the layers are rounded, a scheme for each group."""
        if self.scheme is not None:
            return [sized(self.scheme, self.group_size)]
        return schemes_in({"config_groups": self.config_groups})

    @cached_property
    def target(self) -> CompressedTarget:
        return CompressedTarget(self)

    @property
    def needs_data(self) -> bool:
        """Scales of inputs that are kept in the files are found by calibration; groups are those of
        files that have them."""
        return self.scheme is not None and self.schemes[0].has_input_scale

    @property
    def quantizes_experts(self) -> bool:
        return not self.needs_data

    def misfit(self, in_features: int, out_features: int) -> str | None:
        return self.schemes[0].misfit(in_features, out_features)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        scale = 32 if dtype == "float32" else 16
        return self.schemes[0].bits(out_features, in_features, scale)

    def notes(self, device: str) -> tuple[str, ...]:
        if not any(scheme.inputs for scheme in self.schemes):
            return ()
        return (
            "what goes into quantized layers is rounded as the scheme says, in training, too;"
            " what goes into stacks of experts is not",
        )

    # Quantizing --------------------------------------------------------------------------------

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: Examples | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        if self.needs_data:
            from quantadapt_compressed_tensors.inputs import with_ranges

            source = with_ranges(source, calibration or [], device, dtype, skip_modules)
        return super().quantize(source, device=device, dtype=dtype, skip_modules=skip_modules)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from quantadapt_compressed_tensors.inputs import input_scales
        from quantadapt_compressed_tensors.rows import quantized

        scheme, *others = self.schemes
        if others:
            what = "these config_groups are several, and nothing says which is for which layer"
            raise ModelError(what, fix="give one group, or a scheme", where=METHOD)
        if misfit := scheme.misfit(linear.in_features, linear.out_features):
            raise ModelError(misfit, fix="leave such layers dense: skip_misfits: true")
        vendor: Any = quantized(scheme, linear)
        for name, tensor in input_scales(scheme, linear).items():
            vendor.register_parameter(name, tensor)
        made: nn.Module = vendor
        return made

    # Checkpoints -------------------------------------------------------------------------------

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from quantadapt.loading.reading import read_config

        config = getattr(read_config(path), "quantization_config", None) or {}
        config = config if isinstance(config, Mapping) else config.to_dict()
        for text in left_out(config):
            warn(text, LeftOutWarning, stacklevel=2)
        return super().load(path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        from quantadapt.loading.writing import experts_apart, name_bfloat16
        from quantadapt_compressed_tensors.rows import split

        with experts_apart(model, split):
            super().save(model, path)
        if any(scheme.has_small_scales for scheme in self.schemes):
            name_bfloat16(path)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        from quantadapt_compressed_tensors.rows import joined

        return joined(layers)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_compressed_tensors.files import loaded

        return loaded(self.schemes, linear, state)

    def quantization_config(self) -> dict[str, Any]:
        from compressed_tensors import __version__

        schemes = self.schemes
        formats = {scheme.format for scheme in schemes}
        groups = self.config_groups or {"group_0": schemes[0].said(["Linear"])}
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": __version__,
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"ignore": names}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> CompressedTensors | None:
        if quantization_config.get("quant_method") != METHOD:
            return None
        schemes = schemes_in(quantization_config)
        groups = quantization_config["config_groups"].values()
        targets = [group["targets"] if isinstance(group, Mapping) else group for group in groups]
        return cls._of(schemes, targets)

    @classmethod
    def from_model(cls, model: nn.Module) -> CompressedTensors | None:
        from quantadapt_compressed_tensors.live import schemes_of

        schemes = schemes_of(model)
        return cls._of(schemes, [["Linear"]] * len(schemes)) if schemes else None

    @classmethod
    def _of(cls, schemes: list[Scheme], targets: list[list[str]]) -> CompressedTensors:
        """Return the quantizer of layers that are there already."""
        found = named(schemes[0])
        if len(schemes) == 1 and found and not schemes[0].has_input_scale:
            return cls(scheme=found[0], group_size=found[1])
        pairs = enumerate(zip(schemes, targets, strict=True))
        groups = {f"group_{n}": scheme.said(list(names)) for n, (scheme, names) in pairs}
        return cls(scheme=None, config_groups=groups)


@hookimpl
def quantadapt_exports() -> list[Export]:
    return [
        Export(
            METHOD,
            "the adapter merged on any base, in a scheme of compressed-tensors, as vLLM serves it",
            CompressedExport,
            requires=REQUIRES,
            extra=EXTRA,
        )
    ]


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name=METHOD,
            summary="compressed-tensors, as vLLM serves it: W4A16, W8A8, FP8, NVFP4 and the like",
            quantizer=CompressedTensors,
            requires=REQUIRES,
            imports=("compressed_tensors",),
            extra=f"quantadapt[{EXTRA}]",
            calibration=True,
            merge=Merge.REQUANTIZE,
            serves=(Serving("vllm", "vllm>=0.8", adapters=True),),
        )
    ]
