"""GPTQ (https://arxiv.org/abs/2210.17323) and AWQ (https://arxiv.org/abs/2306.00978) in the formats
of gptqmodel, which transformers and vLLM load.

gptqmodel's GPTQ solves one layer at a time, and its layer classes hold the result. Models are
walked through in `quantadapt_gptqmodel_walk`, which says why, and AWQ's scales are searched in
`quantadapt_gptqmodel_awq`. Packed weights are read with plain torch: gptqmodel's faster kernels are
compiled when they are first called, some repack their buffers then, and some have no backward.
"""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError

from quantadapt.capabilities import Merge, Rule
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget
from quantadapt.records import Backend

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from quantadapt_gptqmodel_walk import Block
    from torch import Tensor, nn

# gptqmodel wants two workers, and gives itself one on two cores; it looks when it is imported.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


class _GPTQModel(LayerwiseQuantizer):
    method: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    multiples: ClassVar[tuple[int, int]]
    """What in_features and out_features have to be multiples of."""
    index_bits: ClassVar[int] = 0
    """Of what says for each input in which group it is."""

    if TYPE_CHECKING:
        bits: int
        group_size: int
        sym: bool

    @cached_property
    def target(self) -> PackedTarget:
        return PackedTarget(self)

    @abstractmethod
    def _quantize_block(self, block: Block) -> dict[str, nn.Module]:
        """Return vendor modules for the linear layers of `block`."""

    @abstractmethod
    def _vendor_class(self) -> Any:
        """Return gptqmodel's class of layers."""

    @abstractmethod
    def _pack(
        self, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor
    ) -> dict[str, Tensor]:
        """Return the vendor's tensors for codes [out, in], scales and zeros [out, groups]."""

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        from quantadapt_gptqmodel_walk import walk

        from quantadapt.loading import from_pretrained, linear_layers, skipped_modules

        model = from_pretrained(source, dtype=dtype) if isinstance(source, str) else source
        for parameter in model.parameters() if model is source else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        linears = dict(linear_layers(model, skipped_modules(model, skip_modules)))
        with _quiet():
            walk(model, linears, calibration or [], device, self._quantize_block, self.target)
        return model

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Round to nearest, without data."""
        from quantadapt_gptqmodel_layers import groups_of, nearest

        weight = linear.weight.float()
        g_idx = groups_of(linear.in_features, self.group_size, weight.device)
        found = nearest(weight, g_idx, self.bits, self.sym)
        return self._packed(linear, self.bits, *found, g_idx)

    def _packed(self, linear: nn.Linear, bits: int, *found: Tensor) -> nn.Module:
        state = self._pack(bits, *found)
        if linear.bias is not None:
            state["bias"] = linear.bias.detach()
        return self._module(linear, bits, state)

    def _module(self, linear: nn.Linear, bits: int, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_gptqmodel_layers import plain
        from torch import nn

        module: Any = plain(self._vendor_class())(
            bits=bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=getattr(self, "desc_act", False),
            in_features=linear.in_features,
            out_features=linear.out_features,
            register_buffers=False,
        )
        bias = state.pop("bias", None)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name, tensor in state.items():
            module.register_buffer(name, tensor)
        vendor: nn.Module = module
        return vendor

    def misfit(self, in_features: int, out_features: int) -> str | None:
        if self.group_size != -1 and in_features % self.group_size:
            return f"groups of {self.group_size} do not divide its {in_features} inputs"
        sizes = {"inputs": in_features, "outputs": out_features}
        for (what, size), multiple in zip(sizes.items(), self.multiples, strict=True):
            if size % multiple:
                return f"its {size} {what} are no multiple of {multiple}, which packing them takes"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        group = in_features if self.group_size == -1 else self.group_size
        return self.bits + (self.bits + 16) / group + self.index_bits / out_features

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Self | None:
        if quantization_config.get("quant_method") != cls.method:
            return None
        if (layout := _layout(quantization_config)) not in (None, *cls.layouts):
            what = f"{cls.method} checkpoints in the layout {layout} are not read"
            fix = f"convert it with gptqmodel to the layout {cls.layouts[0]}"
            raise ModelError(what, fix=fix, where="quantization_config")
        known = {k: v for k, v in quantization_config.items() if k in cls.model_fields}
        try:
            return cls(**{name: value for name, value in known.items() if value is not None})
        except ValidationError as error:
            detail = error.errors()[0]
            expected = detail.get("ctx", {}).get("expected") or detail["msg"]
            what = f"its {detail['loc'][0]} is {detail['input']}; gptqmodel can read {expected}"
            fix = f"quantize the original model again, with one of these as {detail['loc'][0]}"
            raise ModelError(what, fix=fix, where="quantization_config") from None

    @classmethod
    def from_model(cls, model: nn.Module) -> Self | None:
        from quantadapt_gptqmodel_layers import method_of

        for name, module in model.named_modules():
            if method_of(module) == cls.method:
                _check_readable(name, module)
                vendor: Any = module
                found = {k: getattr(vendor, k) for k in cls.model_fields if hasattr(vendor, k)}
                return cls(**{**found, "group_size": vendor.requested_group_size})
        return None


class GPTQ(_GPTQModel):
    """Rounds column by column and lets the columns to come make up for the error."""

    method = "gptq"
    layouts = ("gptq", "gptq_v2")
    multiples = (32, 32)
    index_bits = 32

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = Field(
        128, description="weights along in_features that share a scale; -1: all of a row"
    )
    desc_act: bool = Field(
        False, description="act-order: columns with large inputs first; groups are then scattered"
    )
    sym: bool = Field(True, description="levels symmetric around zero, which fast kernels want")
    damp_percent: float = Field(
        0.05, gt=0, lt=1, description="share of its mean added to the diagonal of the Hessian"
    )

    def _quantize_block(self, block: Block) -> dict[str, nn.Module]:
        import torch
        from gptqmodel.quantization.gptq import GPTQ as Solver  # noqa: N811
        from quantadapt_gptqmodel_layers import codes_of

        solvers = {name: Solver(lin, self._config()) for name, lin in block.linears.items()}
        with ExitStack() as hooks:
            for name, solver in solvers.items():
                solver.quantizer.configure(perchannel=True)
                hook = block.linears[name].register_forward_hook(
                    lambda _, args, output, add=solver.add_batch: add(args[0], output)
                )
                hooks.callback(hook.remove)
            block.run_all()
        found = {}
        for name, solver in solvers.items():
            linear = block.linears[name]
            linear.weight.data = linear.weight.data.float()  # the result gets the weight's dtype
            weight, scales, zeros, g_idx, *_ = solver.quantize()
            solver.free()
            g_idx = g_idx.to(weight.device, torch.long)
            scales, zeros = scales.float(), zeros.float()
            codes = codes_of(weight, scales[:, g_idx], zeros[:, g_idx], self.bits)
            found[name] = self._packed(linear, self.bits, codes, scales, zeros, g_idx)
        return found

    def _config(self) -> Any:
        from gptqmodel.quantization import QuantizeConfig

        return QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
            act_group_aware=self.group_size != -1 and not self.desc_act,
            sym=self.sym,
            damp_percent=self.damp_percent,
            offload_to_disk=False,
        )

    def _vendor_class(self) -> Any:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        return TorchLinear

    def _pack(
        self, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor
    ) -> dict[str, Tensor]:
        from quantadapt_gptqmodel_layers import pack

        return {
            "qweight": pack(codes, bits).t().contiguous(),
            "qzeros": pack(zeros.t(), bits),
            "scales": scales.t().contiguous().half(),
            "g_idx": g_idx.int(),
        }

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_gptqmodel_layers import groups_of

        qweight, count = state["qweight"], len(state["scales"])
        bits = len(qweight) * 32 // linear.in_features  # some checkpoints vary them
        if "g_idx" not in state:
            size = -(-linear.in_features // count)
            state["g_idx"] = groups_of(linear.in_features, size, qweight.device).int()
        if int(state["g_idx"].max()) >= count:
            what = f"its columns are in more groups than the {count} that have a scale"
            raise ModelError(what, fix="make or download the checkpoint again", where="g_idx")
        return self._module(linear, bits, state)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from quantadapt_gptqmodel_layers import add_to_packed

        from quantadapt.loading import read_config

        model = super().load(path, device=device, dtype=dtype)
        if _layout(read_config(path).quantization_config) != "gptq_v2":
            for _, vendor in self._layers(model):
                vendor.qzeros = add_to_packed(vendor.qzeros, vendor.bits, 1)
        return model

    def save(self, model: nn.Module, path: Path) -> None:
        layers = [vendor for _, vendor in self._layers(model)]
        with _zeros_less_one(layers if self._saved_layout == "gptq" else []):
            super().save(model, path)
        file = path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        found = config["quantization_config"]
        if "dynamic" in found:  # vLLM and gptqmodel go by that, transformers by this
            found["modules_in_block_to_quantize"] = [[name for name, _ in self._layers(model)]]
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yield the vendor modules in `model`, from behind their facades if they have any."""
        from quantadapt.facade import QuantLinear

        for name, module in model.named_modules():
            vendor = module.vendor if isinstance(module, QuantLinear) else module
            if self.target.matches(vendor):
                yield name, vendor

    @property
    def _saved_layout(self) -> str:
        """The first layout holds zeros less one, and so no zero of 0, which may come up where
        levels are not symmetric."""
        return "gptq" if self.sym else "gptq_v2"

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            **self.model_dump(),
            "checkpoint_format": self._saved_layout,
            "lm_head": False,
            "pack_dtype": "int32",
            "static_groups": False,
            "true_sequential": False,
        }

    def left_dense(self, names: list[str]) -> dict[str, Any]:
        return {"dynamic": {f"-:^{re.escape(name)}$": {} for name in names}}


class AWQ(_GPTQModel):
    """Rounds to nearest, after making room for the weights that meet large inputs.

    Scales move from norms and linear layers into the layers behind them. So what stays dense is
    not quite what it was, and adapters fit this base only, not the one that it was made from.
    """

    method = "awq"
    layouts = ("gemm",)
    multiples = (8, 8)

    bits: Literal[4] = Field(4, description="bits per weight")
    group_size: Literal[-1, 16, 32, 64, 128] = Field(
        128, description="weights along in_features that share a scale; -1: all of a row"
    )
    sym: bool = Field(False, description="levels symmetric around zero")

    def _quantize_block(self, block: Block) -> dict[str, nn.Module]:
        from quantadapt_gptqmodel_awq import rescale_and_clip
        from quantadapt_gptqmodel_layers import rounded

        rescale_and_clip(block, self.group_size, lambda w: rounded(w, self.bits, self.sym))
        return {name: self.quantize_linear(linear) for name, linear in block.linears.items()}

    def _vendor_class(self) -> Any:
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        return AwqTorchLinear

    def _pack(
        self, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor
    ) -> dict[str, Tensor]:
        from quantadapt_gptqmodel_layers import AWQ_ORDER, pack

        return {
            "qweight": pack(codes.t(), bits, AWQ_ORDER),
            "qzeros": pack(zeros.t(), bits, AWQ_ORDER),
            "scales": scales.t().contiguous().half(),
        }

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        return self._module(linear, self.bits, state)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        _check_activations(path)
        return super().load(path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        with _scales_of_activations(model):
            super().save(model, path)

    def quantization_config(self) -> dict[str, Any]:
        options = self.model_dump()  # zero points are stored for symmetric levels, too
        return {"quant_method": "awq", **options, "zero_point": True, "version": "gemm"}

    def left_dense(self, names: list[str]) -> dict[str, Any]:
        return {"modules_to_not_convert": names}


class PackedTarget(LayerwiseTarget):
    """gptqmodel's layers of one method, as long as they hold what a checkpoint holds."""

    def __init__(self, quantizer: _GPTQModel) -> None:
        super().__init__(quantizer)
        self.packer = quantizer

    def matches(self, module: nn.Module) -> bool:
        from quantadapt_gptqmodel_layers import method_of

        return method_of(module) == self.packer.method

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_gptqmodel_layers import dequantized

        return dequantized(module)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Round to nearest, without data. A group keeps the grid it has where that is closer."""
        from quantadapt_gptqmodel_layers import g_idx_of, groups_of, nearest, unpacked
        from torch import nn

        vendor: Any = module
        bits, old = vendor.bits, (vendor.scales.t().float(), unpacked(vendor)[1].float())
        g_idx = g_idx_of(vendor)
        if g_idx is None:
            g_idx = groups_of(vendor.in_features, vendor.in_features // len(vendor.scales))
        g_idx = g_idx.to(weight.device).long()
        found = nearest(weight.float(), g_idx, bits, self.packer.sym, old)
        linear: Any = nn.Linear(vendor.in_features, vendor.out_features, False, device="meta")
        linear.bias = None if vendor.bias is None else nn.Parameter(vendor.bias.detach())
        return self.packer._packed(linear, bits, *found, g_idx).train(module.training)


_READABLE = re.compile(
    "Torch(Aten|Fused)?(Awq)?Linear|TritonV2Linear|AwqTorchLinear|AwqGEMM(Triton)?Linear"
)


def _check_readable(name: str, module: nn.Module) -> None:
    """Raise ModelError where the kernel of a live layer keeps weights in an order of its own."""
    kind = next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("gptqmodel"))
    repacked = "inference" in str(getattr(module, "linear_mode", None)).lower()
    if not _READABLE.fullmatch(kind) or repacked or getattr(module, "planar", False):
        what = f"{name} is a {kind}, which keeps its weights in an order of its own"
        fix = "load it with gptqmodel's backend 'torch', or pass the path of the checkpoint"
        raise ModelError(what, fix=fix, where="model")


def _layout(config: Any) -> str | None:
    """Return the layout that a `quantization_config` names, under one of three keys."""
    keys = ("checkpoint_format", "format", "version")
    return next((str(config[key]).lower() for key in keys if config.get(key)), None)


@contextmanager
def _zeros_less_one(layers: list[Any]) -> Iterator[None]:
    """Let `layers` hold their zeros less one for a moment."""
    from quantadapt_gptqmodel_layers import add_to_packed

    before = [layer.qzeros for layer in layers]
    try:
        for layer in layers:
            layer.qzeros = add_to_packed(layer.qzeros, layer.bits, -1)
        yield
    finally:
        for layer, zeros in zip(layers, before, strict=True):
            layer.qzeros = zeros


def _check_activations(path: str) -> None:
    """Raise ModelError where an AWQ checkpoint divides the outputs of activation functions, as some
    of old architectures do."""
    from safetensors import safe_open

    from quantadapt.loading import local_folder

    for file in local_folder(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(("act.scales", "gelu_impl.scales")):
                    scales = opened.get_tensor(key)
                    if not bool((scales == 1).all()):
                        what = f"{key}: activations that are rescaled cannot be loaded"
                        fix = "quantize the original model again"
                        raise ModelError(what, fix=fix, where=path)


@contextmanager
def _scales_of_activations(model: nn.Module) -> Iterator[None]:
    """Add scales of 1 to the activation functions of some architectures for a moment: transformers
    does not load their AWQ checkpoints without."""
    import torch
    from torch import nn
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    config: Any = model.config
    names = AWQ_SCALES_MAPPINGS.get(config.model_type, {})
    changed: list[nn.Module] = []
    for module in model.modules() if names else ():
        before, act = (getattr(module, names[k], None) for k in ("layer_before_act", "act"))
        if isinstance(before, nn.Linear) and isinstance(act, nn.Module):
            act.register_parameter("scales", nn.Parameter(torch.ones(before.out_features)))
            changed.append(act)
    try:
        yield
    finally:
        for act in changed:
            act._parameters.pop("scales", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep gptqmodel's log off the screen, and its CUDA extension, which it would compile, out."""
    from gptqmodel.utils.logger import setup_logger

    name, log = "GPTQMODEL_DISABLE_GPTQ_CUDA", setup_logger()
    level, before = log.level, os.environ.get(name)
    log.setLevel("ERROR")
    os.environ[name] = "1"
    try:
        yield
    finally:
        log.setLevel(level)
        del os.environ[name]
        os.environ |= {} if before is None else {name: before}


AWQ_ONTO = Rule(
    "awq-onto",
    {"action": ("onto",)},
    "AWQ moves scales between the layers of its base, and the adapter learned behind them",
    "merge it dense into its own base, which is exact (--kind dense)",
)


def _backend(
    name: str, summary: str, quantizer: type[_GPTQModel], rules: tuple[Rule, ...] = ()
) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        requires=("gptqmodel>=7.6", "optimum>=1.24"),  # PEFT refuses to work with one alone
        imports=("gptqmodel",),
        extra="quantadapt[gptqmodel]",
        calibration=True,
        merge=Merge.REQUANTIZE,
        rules=rules,
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        _backend("gptq", "GPTQ, 2-8 bits, calibrated layer by layer", GPTQ),
        _backend("awq", "AWQ, 4 bits, scales searched on calibration data", AWQ, (AWQ_ONTO,)),
    ]
