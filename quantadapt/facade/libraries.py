"""What is changed of PEFT and transformers where they meet quantized layers, once each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .counting import counting_dense
from .parameters import beside_the_layer
from .peft_experts import with_lent_lora
from .saving import saving_as_quantized
from .unloading import keeping_what_is_merged

_waiting: dict[tuple[str, str, str], Callable[[Any], Any]] = {
    ("peft.peft_model", "PeftModel", "get_nb_trainable_parameters"): counting_dense,
    ("peft.mixed_model", "PeftMixedModel", "get_nb_trainable_parameters"): counting_dense,
    ("transformers.modeling_utils", "PreTrainedModel", "num_parameters"): counting_dense,
    ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained"): saving_as_quantized,
    ("peft.tuners.tuners_utils", "BaseTuner", "merge_and_unload"): keeping_what_is_merged,
    ("peft.tuners.tuners_utils", "BaseTuner", "unload"): keeping_what_is_merged,
    ("peft.tuners.lora.layer", "ParamWrapper", "forward"): beside_the_layer,
    ("peft.tuners.lora.layer", "ParamWrapper", "_activate_lora"): with_lent_lora,
}
"""Module, class and method -> what to make of it; what is changed already is taken out."""


def meet_libraries() -> None:
    """Change what of the libraries does not know quantized layers, as far as it is imported by now;
    models without such layers are treated as before. To be called wherever a layer meets them."""
    for method, changed in list(_waiting.items()):
        module, kind, name = method
        cls = getattr(sys.modules.get(module), kind, None)
        if hasattr(cls, name) and _waiting.pop(method, None) is not None:
            setattr(cls, name, changed(getattr(cls, name)))
