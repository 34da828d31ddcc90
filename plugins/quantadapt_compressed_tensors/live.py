"""Models in memory that compressed-tensors made: through transformers, or through its own calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.config import schemes_in
from quantadapt_compressed_tensors.layers import SCHEME, scheme_of
from quantadapt_compressed_tensors.schemes import Scheme


def schemes_of(model: nn.Module) -> list[Scheme]:
    """Return how the layers of a model are rounded, each scheme once; none where nothing is.
    The library's layers are marked with theirs, and stay packed from then on.

    Raises:
        ModelError: its layers hold floats: it has run, or was never compressed.
    """
    for name, module in model.named_modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None or SCHEME in vars(module):
            continue
        status = str(getattr(module, "quantization_status", ""))
        if not status.lower().endswith(".compressed"):
            what = f"{name} holds floats: compressed-tensors unpacks a model when it first runs"
            fix = "load it from its folder, or give it before it has run"
            raise ModelError(what, fix=fix)
        group = scheme.model_dump(mode="json")
        setattr(module, SCHEME, schemes_in({"config_groups": {"group_0": group}})[0])
    if (hook := getattr(model, "ct_decompress_hook", None)) is not None:
        hook.remove()
        del model.ct_decompress_hook
    found = (scheme_of(module) for module in model.modules() if SCHEME in vars(module))
    return list(dict.fromkeys(found))
