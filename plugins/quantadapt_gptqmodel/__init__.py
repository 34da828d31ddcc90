"""GPTQ (https://arxiv.org/abs/2210.17323) and AWQ (https://arxiv.org/abs/2306.00978) in the formats
of gptqmodel, which transformers and vLLM load.

gptqmodel's GPTQ solves one layer at a time, and its layer classes hold the result. Its pipeline is
not used: that reads models from disk only, knows them by name, and its AWQ, which needs CUDA, looks
at the last example alone where lengths differ. Models are walked through by
`quantadapt.calibration`, and AWQ's scales are searched in `awq`.

Packed weights are read with plain torch: gptqmodel's faster kernels are compiled when they are
first called, some repack their buffers then, and some have no backward.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantadapt.capabilities import Merge, Rule
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.records import Backend, Serving
from quantadapt_gptqmodel.base import GPTQModel
from quantadapt_gptqmodel.checkpoints import (
    SCALES_OF_ACTIVATIONS,
    check_activations,
    layout_of,
    scales_of_activations,
    zeros_less_one,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from quantadapt.calibration.blocks import Block

# gptqmodel wants two workers, and gives itself one on two cores. It looks when it is imported,
# which PEFT may do first.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


class GPTQ(GPTQModel):
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
        False,
        description="act-order: columns with large inputs first; groups are then scattered. Not in"
        " stacks of experts, whose columns share one order",
    )
    sym: bool = Field(True, description="levels symmetric around zero, which fast kernels want")
    damp_percent: float = Field(
        0.05, gt=0, lt=1, description="share of its mean added to the diagonal of the Hessian"
    )

    def _quantize_block(self, block: Block) -> dict[str, nn.Module]:
        from gptqmodel.quantization.gptq import GPTQ as Solver  # noqa: N811

        solvers = {
            name: Solver(linear, self._config(self.desc_act and name not in block.of_experts))
            for name, linear in block.linears.items()
        }
        with ExitStack() as hooks:
            for name, solver in solvers.items():
                solver.quantizer.configure(perchannel=True)
                hook = block.linears[name].register_forward_hook(
                    lambda _, args, output, add=solver.add_batch: add(args[0], output)
                )
                hooks.callback(hook.remove)
            block.run_all()
        return {name: self._solved(block.linears[name], one) for name, one in solvers.items()}

    def _solved(self, linear: nn.Linear, solver: Any) -> nn.Module:
        """Return the vendor module for a layer of which `solver` has seen the inputs."""
        import torch

        from quantadapt_gptqmodel.codes import codes_of

        linear.weight.data = linear.weight.data.float()  # the result gets the weight's dtype
        weight, scales, zeros, g_idx, *_ = solver.quantize()
        solver.free()
        g_idx = g_idx.to(weight.device, torch.long)
        scales, zeros = scales.float(), zeros.float()
        codes = codes_of(weight, scales[:, g_idx], zeros[:, g_idx], self.bits)
        return self._packed(linear, self.bits, codes, scales, zeros, g_idx)

    def _config(self, desc_act: bool) -> Any:
        from gptqmodel.quantization import QuantizeConfig

        return QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            desc_act=desc_act,
            act_group_aware=self.group_size != -1 and not desc_act,
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
        from quantadapt_gptqmodel.codes import pack

        return {
            "qweight": pack(codes, bits).t().contiguous(),
            "qzeros": pack(zeros.t(), bits),
            "scales": scales.t().contiguous().half(),
            "g_idx": g_idx.int(),
        }

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_gptqmodel.codes import groups_of

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
        from quantadapt.loading import read_config
        from quantadapt_gptqmodel.codes import add_to_packed

        model = super().load(path, device=device, dtype=dtype)
        if layout_of(read_config(path).quantization_config) != "gptq_v2":
            for _, vendor in self._layers(model):
                vendor.qzeros = add_to_packed(vendor.qzeros, vendor.bits, 1)
        return model

    def save(self, model: nn.Module, path: Path) -> None:
        layers = [vendor for _, vendor in self._layers(model)]
        with zeros_less_one(layers if self._saved_layout == "gptq" else []):
            super().save(model, path)
        file = path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        found = config["quantization_config"]
        if "dynamic" in found:  # vLLM and gptqmodel go by that, transformers by this
            found["modules_in_block_to_quantize"] = [[name for name, _ in self._layers(model)]]
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yield the vendor modules in `model`, from behind their facades if they have any."""
        from quantadapt.facade import QuantWeight

        for name, module in model.named_modules():
            vendor = module.vendor if isinstance(module, QuantWeight) else module
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

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        left: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in names if name != head}
        return {"dynamic": left} if left else {}


class AWQ(GPTQModel):
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
        from quantadapt_gptqmodel.awq import rescale_and_clip
        from quantadapt_gptqmodel.codes import rounded

        rescale_and_clip(block, self.group_size, lambda w: rounded(w, self.bits, self.sym))
        return {name: self.quantize_linear(linear) for name, linear in block.linears.items()}

    def _vendor_class(self) -> Any:
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        return AwqTorchLinear

    def _pack(
        self, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor
    ) -> dict[str, Tensor]:
        from quantadapt_gptqmodel.codes import AWQ_ORDER, pack

        return {
            "qweight": pack(codes.t(), bits, AWQ_ORDER),
            "qzeros": pack(zeros.t(), bits, AWQ_ORDER),
            "scales": scales.t().contiguous().half(),
        }

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        return self._module(linear, self.bits, state)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from quantadapt.loading import expecting

        check_activations(path)
        with expecting(unused=SCALES_OF_ACTIVATIONS):
            return super().load(path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        with scales_of_activations(model):
            super().save(model, path)

    def stays_dense(self, model: nn.Module, skip_modules: tuple[str, ...]) -> tuple[str, ...]:
        from quantadapt.loading import not_converted

        return not_converted(model, skip_modules)

    def quantization_config(self) -> dict[str, Any]:
        options = self.model_dump()  # zero points are stored for symmetric levels, too
        return {"quant_method": "awq", **options, "zero_point": True, "version": "gemm"}

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        left = [name for name in names if name != head]
        return {"modules_to_not_convert": left} if left else {}


AWQ_ONTO = Rule(
    "awq-onto",
    {"action": ("onto",)},
    "AWQ moves scales between the layers of its base, and the adapter learned behind them",
    "merge it dense into its own base, which is exact (--kind dense)",
)


def _backend(
    name: str, summary: str, quantizer: type[GPTQModel], rules: tuple[Rule, ...] = ()
) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        requires=("gptqmodel>=7.6", "optimum>=1.24"),  # PEFT refuses to work with one alone
        imports=("quantadapt_gptqmodel.vendor",),
        extra="quantadapt[gptqmodel]",
        calibration=True,
        merge=Merge.REQUANTIZE,
        serves=(Serving("vllm", "vllm>=0.7", adapters=True),),
        rules=rules,
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        _backend("gptq", "GPTQ, 2-8 bits, calibrated layer by layer", GPTQ),
        _backend("awq", "AWQ, 4 bits, scales searched on calibration data", AWQ, (AWQ_ONTO,)),
    ]
