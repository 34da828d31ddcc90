"""How INC replaces the layers of a model: it is told, shows itself examples, and is checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.errors import ModelError
from quantadapt_inc.config import config_for
from quantadapt_inc.layers import complete, divides_by_zero
from quantadapt_inc.vendor import home, running, showing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantadapt_inc import INC

    Examples = list[dict[str, Tensor]]


def replace_layers(
    quantizer: INC,
    model: nn.Module,
    names: list[str],
    method: str,
    dtype: torch.dtype,
    examples: Examples,
    device: torch.device,
) -> None:
    """Let INC replace the layers `names` of `model`, which is on `device` afterwards.

    Args:
        quantizer: the options.
        model: changed in place.
        method: fp8, rtn, gptq or awq; a single layer is rounded whatever the quantizer's is.
        dtype: compute dtype.
        examples: what INC calibrates with; of rtn, it is shown the first.

    Raises:
        ModelError: INC does not know layers that the examples did not reach, or showed zeros alone.
    """
    import torch

    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    with running(device), torch.no_grad():
        model.to(home(device))
        with showing(model, names):
            _convert(quantizer, model, names, method, dtype, examples, device)
        model.to(device)
        made = {name: model.get_submodule(name) for name in names}
        _refuse(
            [name for name, vendor in made.items() if not quantizer.target.matches(vendor)],
            "calibration did not reach {layers} ({count} layers)",
        )
        for name, layer in layers.items():
            bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
            complete(made[name].train(layer.training), bias, quantizer)
        _refuse(
            [name for name, vendor in made.items() if divides_by_zero(vendor)],
            "calibration showed {layers} nothing but zeros ({count} layers), and FP8 needs a scale"
            " for what goes in",
        )


def _convert(
    quantizer: INC,
    model: nn.Module,
    names: list[str],
    method: str,
    dtype: torch.dtype,
    examples: Examples,
    device: torch.device,
) -> None:
    """Prepare the model as INC wants it, run the examples through it, and convert it."""
    import torch
    from neural_compressor.torch.quantization import convert, prepare

    config = config_for(quantizer, model, names, method, dtype)
    any_input = next(v for v in examples[0].values() if isinstance(v, torch.Tensor))
    prepared = prepare(model, config, example_inputs=any_input)
    if method == "fp8":
        looking_on(prepared, device)
    like = next(prepared.parameters())
    for example in () if method == "rtn" else examples:
        prepared(**{key: _moved(value, like) for key, value in example.items()})
    convert(prepared.to(home(device)))


def _refuse(layers: list[str], what: str) -> None:
    """Raise ModelError where there are any layers of which `what` is true."""
    if layers:
        what = what.format(layers=", ".join(layers[:3]), count=len(layers))
        raise ModelError(what, fix="give examples that use them, or add to skip_modules")


def looking_on(model: nn.Module, device: torch.device) -> None:
    """Move a model that INC prepared for FP8 to `device`, and what keeps the largest inputs."""
    for module in model.to(device).modules():
        found: Any = getattr(module, "_mod_extra_config", None)
        for observer in () if found is None else (*found.inputs, *(found.outputs or ())):
            observer.state = observer.state.to(device)


def _moved(value: Any, like: Tensor) -> Any:
    """Return an argument of the model on its device and, if it is a float tensor, in its dtype."""
    if not hasattr(value, "is_floating_point"):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert, in place, what is not quantized; codes in float8 are floats, too, and stay."""
    import torch

    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
    return model
