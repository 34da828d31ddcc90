"""AutoRound: rounding tuned by signed gradient descent, 2 to 8 bits
(https://arxiv.org/abs/2309.05516, https://github.com/intel/auto-round).

The library's own quantizer tunes one transformer block after the other; linear layers outside the
blocks stay dense, as they do there. The codes go into its PyTorch layer, and checkpoints are its
own: `auto_round:auto_gptq` where codes are symmetric, else `auto_round`. transformers loads ours,
and existing ones load here, if all their quantized layers have the same options. The exception is
`auto_round:auto_awq`, which the library writes for 4 asymmetric bits.

A single layer that is quantized again, for which there is no data, is rounded to the nearest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantadapt.capabilities import Merge, Rule
from quantadapt.compiling import one_kernel
from quantadapt.errors import DataError, ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget
from quantadapt.records import Backend

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

BLOCK = 32
"""Codes that are packed together along the inputs, and zero points along the outputs."""
DECODING = 128
"""Tokens up to which auto-round's Triton kernel beats dequantizing and a matrix product on CUDA."""
TRACE = 5
"""The level of `logging.Logger.trace`, as auto-round and neural-compressor have it."""
LONGEST = 2048
"""Tokens in a calibration row, at most."""
FORMATS = {True: ("auto_round:auto_gptq", "auto_round:gptq"), False: ("auto_round",)}
"""What the packing is called, by symmetry; the first name is the one that is written."""
DENSE = {"bits": 16, "data_type": "float"}


class AutoRound(LayerwiseQuantizer):
    """Options of auto-round's `SignRoundConfig`."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        128, ge=16, multiple_of=16, description="weights that share a scale; null: a whole row"
    )
    sym: bool = Field(True, description="symmetric codes, without zero points")
    iters: int = Field(200, ge=1, description="steps of signed gradient descent for each block")

    @cached_property
    def target(self) -> AutoRoundTarget:
        return AutoRoundTarget(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % BLOCK:
                return f"auto-round packs {BLOCK} at a time: {BLOCK} does not divide {size} {what}"
        if self.group_size and in_features % self.group_size:
            return f"group_size {self.group_size} does not divide {in_features} inputs"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return self.bits + (self.bits + 16) / (self.group_size or in_features)

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        from quantadapt import loading

        model = source
        if isinstance(model, str):
            model = loading.from_pretrained(model, dtype=dtype)
        model.requires_grad_(False)
        _cast(model, dtype)
        skip = loading.skipped_modules(model, skip_modules)
        names = {name for name, _ in loading.linear_layers(model, skip)}
        with _restored(model):
            tuned = self._tune(model, names, _rows(calibration or []), device, dtype)
        for name, (scales, zeros) in tuned.items():
            linear: Any = model.get_submodule(name).to(device)
            vendor = self._packed(linear, scales, zeros)
            loading.set_submodule(model, name, vendor.train(linear.training))
        _cast(model, dtype)
        return model.to(device)

    def _tune(
        self, model: nn.Module, names: set[str], rows: list[Tensor], device: str, dtype: torch.dtype
    ) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Let auto-round tune the layers `names`, whose weights it replaces by rounded ones, and
        return the scales and zero points of those that are in its blocks."""
        import torch
        from auto_round import AutoRound as Tuner
        from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
        from auto_round.utils import SUPPORTED_LAYER_TYPES

        from quantadapt.facade import is_skipped
        from quantadapt.loading import skipped_modules

        kinds, heads = tuple(SUPPORTED_LAYER_TYPES), skipped_modules(model, None)
        dense = [
            name
            for name, module in model.named_modules()
            if isinstance(module, kinds) and name not in names and not is_skipped(name, heads)
        ]
        config = SignRoundConfig(
            bits=self.bits, group_size=self.group_size or -1, sym=self.sym, iters=self.iters
        )
        try:
            tuner = Tuner(
                model,
                tokenizer=SimpleNamespace(),  # asked for, but not needed for tokenized data
                alg_configs=config,
                dataset=rows,
                seqlen=rows[0].shape[-1],
                nsamples=len(rows),
                batch_size=min(8, len(rows)),
                device_map=device,
                amp=device != "cpu" and dtype != torch.float32,
                enable_torch_compile=False,
                low_cpu_mem_usage=False,
                layer_config=dict.fromkeys(dense, DENSE),
            )
            with torch.enable_grad():
                tuner.quantize()
        except SystemExit as error:
            what = "auto-round gave up on this model; what it said before tells why"
            raise ModelError(what, fix="choose another backend") from error
        left = {name: vars(model.get_submodule(name)) for name in sorted(names)}
        tuned = {name: (own["scale"], own["zp"]) for name, own in left.items() if "scale" in own}
        if not tuned:
            what = "auto-round found no transformer block with a layer to quantize"
            raise ModelError(what, fix="choose another backend")
        return tuned

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from auto_round.data_type import QUANT_FUNC_WITH_DTYPE

        nearest = QUANT_FUNC_WITH_DTYPE["int_sym" if self.sym else "int_asym"]
        weight = linear.weight.detach().float()
        _, scales, zeros = nearest(weight, bits=self.bits, group_size=self.group_size or -1)
        return self._packed(linear, scales, zeros)

    def _packed(self, linear: nn.Linear, scales: Tensor, zeros: Tensor | int) -> nn.Module:
        """Return auto-round's layer for a weight [out, in], scales and zeros of [out, groups]."""
        import torch
        from auto_round.utils.bit_packing import pack_bitstream

        weight = linear.weight.detach().float()
        scales = scales.reshape(len(weight), -1).to(weight.device)
        zeros = torch.as_tensor(zeros, dtype=torch.float32, device=weight.device)
        zeros = zeros.reshape(len(weight), -1) if zeros.numel() > 1 else zeros.expand_as(scales)
        groups = weight.view(*scales.shape, -1)
        codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
        codes = codes.clamp(0, 2**self.bits - 1).reshape(weight.shape)
        module = self._empty(linear)
        module.qweight = pack_bitstream(codes.int(), self.bits, dim=1).t().contiguous()
        module.qzeros = pack_bitstream((zeros.t() - _offset(module)).int(), self.bits, dim=1)
        module.scales = scales.t().half().contiguous()
        module.bias = None if linear.bias is None else linear.bias.detach()
        vendor: nn.Module = module
        return vendor

    def _empty(self, linear: nn.Linear) -> Any:
        """Return auto-round's layer of that size; the symmetric one counts zero points from 1."""
        from auto_round_extension.torch import (  # type: ignore[import-untyped]
            qlinear_torch,
            qlinear_torch_zp,
        )

        _give_logging_back()
        kind: Any = (qlinear_torch_zp if self.sym else qlinear_torch).QuantLinear
        sizes = linear.in_features, linear.out_features
        module = kind(self.bits, self.group_size or -1, *sizes, linear.bias is not None)
        module.iters = self.iters
        return module

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        module = self._empty(linear)
        for name in ("qweight", "qzeros", "scales"):
            setattr(module, name, state[name])
        if "bias" in state:
            module.bias = state["bias"].to(linear.weight.dtype)
        vendor: nn.Module = module
        return vendor

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "auto-round",
            "packing_format": FORMATS[self.sym][0],
            "data_type": "int",
            **self.model_dump(),
            "group_size": self.group_size or -1,
        }

    def save(self, model: nn.Module, path: Path) -> None:
        from torch import nn

        super().save(model, path)
        file = path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        config["quantization_config"]["extra_config"] = dict.fromkeys(dense, DENSE)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> AutoRound | None:
        config = quantization_config
        bits, group_size = config.get("bits"), config.get("group_size")
        sym, others = bool(config.get("sym")), config.get("extra_config") or {}
        if (
            config.get("quant_method") != "auto-round"
            or config.get("packing_format") not in FORMATS[sym]
            or config.get("data_type", "int") != "int"
            or bits not in (2, 3, 4, 8)
            or any(other.get("bits", bits) < 16 for other in others.values())
        ):
            return None
        group_size = None if group_size == -1 else group_size
        return cls(bits=bits, group_size=group_size, sym=sym, iters=config.get("iters") or 200)

    @classmethod
    def from_model(cls, model: nn.Module) -> AutoRound | None:
        for module in model.modules():
            if _is_autoround(module):
                vendor: Any = module
                whole = vendor.group_size == vendor.infeatures
                group_size = None if whole else vendor.group_size
                made = {"bits": vendor.bits, "group_size": group_size, "sym": bool(_offset(vendor))}
                return cls(**made, iters=getattr(vendor, "iters", 200))
        return None


class AutoRoundTarget(LayerwiseTarget):
    """`auto_round_extension.torch.qlinear_torch.QuantLinear`, and that in qlinear_torch_zp."""

    def matches(self, module: nn.Module) -> bool:
        return _is_autoround(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        vendor: Any = module
        return vendor.infeatures, vendor.outfeatures

    def dequantize(self, module: nn.Module) -> Tensor:
        vendor: Any = module
        tensors = (vendor.qweight, vendor.qzeros, vendor.scales)
        packing = (vendor.bits, _offset(vendor))
        if vendor.bits == 3:  # auto-round's own unpacking cannot be traced
            return _dequantize(*tensors, *packing)
        return one_kernel(_dequantize, *tensors, static=packing)

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether auto-round's Triton kernel is there and the faster one for `x`."""
        return x.numel() <= DECODING * x.shape[-1] and _has_kernel(module, x)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run auto-round's Triton kernel where it runs, else the module's forward."""
        output: Tensor = _product(module, x) if _has_kernel(module, x) else module(x)
        return output


def _has_kernel(vendor: Any, x: Tensor) -> bool:
    return x.is_cuda and vendor.bits != 3 and find_spec("triton") is not None


def _product(vendor: Any, x: Tensor) -> Tensor:
    """Dequantize in auto-round's kernel, and multiply."""
    kernels = "triton_utils_zp" if _offset(vendor) else "triton_utils"
    dequant248 = import_module(f"auto_round_extension.triton.{kernels}.dequant").dequant248
    groups = _groups(vendor.infeatures, vendor.group_size, x.device)
    tensors = vendor.qweight, vendor.scales, vendor.qzeros, groups
    weight: Tensor = dequant248(*tensors, vendor.bits, input_dtype=x.dtype)
    return x @ weight if vendor.bias is None else x @ weight + vendor.bias.to(x.dtype)


@cache
def _groups(in_features: int, group_size: int, device: torch.device) -> Tensor:
    """Return the group of each column."""
    import torch

    return torch.arange(in_features, dtype=torch.int32, device=device) // group_size


def _dequantize(packed: Tensor, zeros: Tensor, scales: Tensor, bits: int, offset: int) -> Tensor:
    codes, zeros = _unpack(packed, bits, 0), _unpack(zeros, bits, 1) + offset
    groups = codes.view(len(zeros), -1, codes.shape[1]) - zeros[:, None]
    return (scales[:, None] * groups).flatten(0, 1).t()


def _is_autoround(module: nn.Module) -> bool:
    return type(module).__module__.startswith("auto_round_extension.torch.qlinear_torch")


def _offset(vendor: Any) -> int:
    """Return what is taken off zero points before they are packed."""
    return int(type(vendor).__module__.endswith("_zp"))


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes that are packed along dimension 0 or 1 of an int32 matrix."""
    import torch

    if bits == 3:  # some lie in two words
        from auto_round.utils.bit_packing import unpack_bitstream

        codes: Tensor = unpack_bitstream(packed, bits, dim=dim)
    else:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        shifts = shifts[:, None] if dim == 0 else shifts
        codes = (packed.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
        codes = codes.flatten(dim, dim + 1)
    return codes


def _rows(calibration: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the examples' tokens as rows of one length, which is what auto-round can batch."""
    import torch

    if any("input_ids" not in example for example in calibration):
        fix = "pass examples that hold input_ids"
        raise DataError("auto-round is shown tokens only", fix=fix, where="calibration")
    ids = [example["input_ids"].flatten() for example in calibration]
    length = min(max(len(row) for row in ids), LONGEST)
    tokens = torch.cat(ids).long()
    count = len(tokens) // length
    return list(tokens[: count * length].view(count, 1, length))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a live model the compute dtype; buffers keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Undo what auto-round does beside quantizing: it seeds every generator, changes how tensors
    are printed, keeps the model, and leaves attributes on it, among them `forward` functions that a
    copy would share with the original. And spare it most of its time: it collects garbage after
    each step, here only its own."""
    import gc

    import numpy
    import torch
    from auto_round.context.compress import CompressContext
    from auto_round.context.model import ModelContext

    before = {id(module): set(vars(module)) for module in model.modules()}
    training = model.training
    states = random.getstate(), numpy.random.get_state()
    gc.freeze()
    try:
        with torch.random.fork_rng(), torch._tensor_str.printoptions():
            yield
    finally:
        _give_logging_back()
        gc.unfreeze()
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        ModelContext.reset_context()
        CompressContext.reset_context()
        for module in model.modules():
            for name in set(vars(module)) - before.get(id(module), set(vars(module))):
                delattr(module, name)
        model.train(training)


def _give_logging_back() -> None:
    """Importing auto-round makes warnings of all of transformers its own, and shows them; and it
    takes `trace` from every logger of others, such as neural-compressor's, which gives more."""
    import logging

    from transformers.utils import logging as of_transformers

    for name in ("warning_once", "info_once"):
        if hasattr(of_transformers, name):
            setattr(logging.Logger, name, getattr(of_transformers, name))

    def trace(self: logging.Logger, message: str, *args: Any, **kwargs: Any) -> None:
        if self.isEnabledFor(TRACE):
            self._log(TRACE, message, args, **{"stacklevel": 2, **kwargs})

    logging.Logger.trace = trace  # type: ignore[attr-defined]


@hookimpl
def quantadapt_backends() -> list[Backend]:
    no_zeros = Rule(
        "autoround-8bit-asym",
        {"backend.bits": (8,), "backend.sym": (False,)},
        "auto-round has no asymmetric codes of 8 bits",
        "use sym: true, or fewer bits",
    )
    return [
        Backend(
            name="autoround",
            summary="auto-round 2-8 bits, rounding tuned on calibration data",
            quantizer=AutoRound,
            requires=("auto-round>=0.16",),
            imports=("auto_round",),
            extra="quantadapt[auto-round]",
            calibration=True,
            merge=Merge.REQUANTIZE,
            rules=(no_zeros,),
        )
    ]
