"""What GPTQ and AWQ have in common: the walk through a model, and how layers are made."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ValidationError

from quantadapt.errors import ModelError
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt_gptqmodel.checkpoints import check_readable, layout_of
from quantadapt_gptqmodel.target import PackedTarget

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantadapt.calibration.blocks import Block


class GPTQModel(LayerwiseQuantizer):
    """A method of gptqmodel."""

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

    @property
    def quantizes_experts(self) -> bool:
        return True

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
        import torch

        from quantadapt.loading import cast_parameters, from_pretrained
        from quantadapt_gptqmodel.vendor import quiet

        if isinstance(source, str):
            model = from_pretrained(source, dtype=dtype)
        else:
            cast_parameters(model := source, dtype)
        training = model.training
        with quiet(), torch.no_grad():
            self._walk(model.eval(), calibration or [], device, skip_modules)
        return model.to(device).train(training)

    def _walk(
        self,
        model: nn.Module,
        examples: list[dict[str, Tensor]],
        device: str,
        skip_modules: tuple[str, ...] | None,
    ) -> None:
        """Quantize block by block, each fed by what the quantized ones before it return."""
        from quantadapt.calibration.blocks import each_block
        from quantadapt.calibration.experts import close_experts, open_experts, round_experts
        from quantadapt.loading import linear_layers, skipped_modules

        skip = skipped_modules(model, skip_modules)
        opened = open_experts(model, skip, self.misfit)
        names = [name for name, _ in linear_layers(model, skip)]
        made: dict[str, nn.Module] = {}
        for block in each_block(model, examples, names=names, device=device):
            _put(model, made)
            dtypes = {name: linear.weight.dtype for name, linear in block.linears.items()}
            made = self._quantize_block(block)
            for name, vendor in made.items() if block.name else ():
                # Until its block has fed the next one, the dense layer computes, which is quicker.
                dense = self.target.dequantize(vendor).to(dtypes[name])
                block.linears[name].weight.data = dense
        _put(model, made)
        close_experts(model, opened, lambda _, layers: self.join_rows(layers))
        round_experts(model, skip, self, device)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Round to nearest, without data."""
        from quantadapt_gptqmodel.codes import groups_of, nearest

        weight = linear.weight.float()
        g_idx = groups_of(linear.in_features, self.group_size, weight.device)
        found = nearest(weight, g_idx, self.bits, self.sym)
        return self._packed(linear, self.bits, *found, g_idx)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        import torch
        from torch import nn

        vendors: list[Any] = layers
        bits = vendors[0].bits
        orders: list[Any] = [getattr(vendor, "g_idx", None) for vendor in vendors]
        state = {
            name: torch.cat([getattr(vendor, name) for vendor in vendors], 1)
            for name in ("qweight", "qzeros", "scales")
        }
        if orders[0] is not None:
            if not all(torch.equal(order, orders[0]) for order in orders):
                what = "its experts have their columns in different groups (desc_act)"
                fix = "use a checkpoint that was made with desc_act: false"
                raise ModelError(what, fix=fix, where=self.method)
            state["g_idx"] = orders[0]
        rows = sum(vendor.out_features for vendor in vendors)
        linear = nn.Linear(vendors[0].in_features, rows, bias=False, device="meta")
        return self._module(linear, bits, state)

    def _packed(self, linear: nn.Linear, bits: int, *found: Tensor) -> nn.Module:
        state = self._pack(bits, *found)
        if linear.bias is not None:
            state["bias"] = linear.bias.detach()
        return self._module(linear, bits, state)

    def _module(self, linear: nn.Linear, bits: int, state: dict[str, Tensor]) -> nn.Module:
        from torch import nn

        import quantadapt_gptqmodel.vendor  # noqa: F401 (before gptqmodel itself)
        from quantadapt_gptqmodel.layers import plain

        if missing := {"qweight", "qzeros", "scales"} - state.keys():
            what = f"a layer has no {', '.join(sorted(missing))}"
            raise ModelError(what, fix="make or download the checkpoint again", where=self.method)
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
        if (layout := layout_of(quantization_config)) not in (None, *cls.layouts):
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
        from quantadapt_gptqmodel.layers import method_of

        for name, module in model.named_modules():
            if method_of(module) == cls.method:
                check_readable(name, module)
                vendor: Any = module
                found = {k: getattr(vendor, k) for k in cls.model_fields if hasattr(vendor, k)}
                return cls(**{**found, "group_size": vendor.requested_group_size})
        return None


def _put(model: nn.Module, vendors: dict[str, nn.Module]) -> None:
    from quantadapt.loading import set_submodule

    for name, vendor in vendors.items():
        set_submodule(model, name, vendor)
