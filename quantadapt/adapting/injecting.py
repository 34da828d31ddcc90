"""PEFT puts its layers into a model: where the adapter's config says, or nowhere at all.

PEFT reads the targets of some mixtures of experts in its own way: names that transformers 4 had for
experts are sent to the fused experts of transformers 5, also where ordinary layers have such names
(DeepSeek-V3's shared experts), and a regular expression becomes the last parts of what it matches.
Here a config whose targets are there is taken at its word, and compared with what was adapted.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dependencies import unchanged_process
from ..errors import PlanRefused, Problem, warn
from ..model.patches import patched
from .several import tokens_by_owner

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

_ELSEWHERE = "load the adapter with quantadapt.load, or merge it"
_CONVERSION = "convert_peft_config_for_transformers"


class TargetsWarning(UserWarning):
    """PEFT by itself would not put a saved adapter into the layers that it was trained in."""


def injected(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Return a PeftModel with a new adapter, in exactly the modules that `config` names.

    What PEFT raises comes through; then, and if it adapted anything else, `model` is as it was.

    Raises:
        PlanRefused: PEFT adapted other modules than are named.
    """
    from peft import get_peft_model

    tuned = _exactly(model, config, lambda: get_peft_model(model, config))  # type: ignore[arg-type]
    if not _taken_by_conv1d(config, tuned):
        text = "PEFT by itself does not put this adapter onto the Conv1D layers of this model"
        warn(f"{text}: {_ELSEWHERE}", TargetsWarning, stacklevel=4)
    return tuned


def reloaded(
    model: nn.Module,
    folder: str | Path,
    config: PeftConfig | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> tuple[PeftModel, Any]:
    """Return a PeftModel with the adapter saved in `folder`, see `injected`, and what PEFT tells of
    the keys: `missing_keys` and `unexpected_keys`, which `PeftModel.from_pretrained` keeps to
    itself.

    Args:
        config: that of the folder, which is read where it is missing.
        is_trainable: whether the adapter can be trained further.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

    read = config or PeftConfig.from_pretrained(str(folder))
    read.inference_mode = not is_trainable
    kind: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(read.task_type, PeftModel)  # type: ignore[call-overload]
    told: list[Any] = []

    def load() -> PeftModel:
        tuned: PeftModel = kind(model, read, adapter_name)
        mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        told.append(loaded_beside(tuned, folder, adapter_name, is_trainable, key_mapping=mapping))
        return tuned

    return _exactly(model, read, load), told[0]


def loaded_beside(
    tuned: PeftModel, folder: str | Path, name: str, is_trainable: bool, **options: Any
) -> Any:
    """Load the adapter saved in `folder` as `name`, and return what PEFT tells of the keys. Weights
    are those of the file: PEFT makes room in the dtype of the base for what an AdaLoRA has left
    after pruning, and would round them to it."""
    tuner: Any = tuned.base_model
    resize = getattr(tuner, "resize_modules_by_rank_pattern", None)

    def resized(pattern: Any, adapter: str) -> None:
        assert resize is not None
        resize(pattern, adapter)
        for layer, key, held in _parameters_of(tuned):
            if key in layer.adapter_layer_names and adapter in held and held[adapter].itemsize == 2:
                held[adapter].data = held[adapter].data.float()

    own = {} if resize is None else {"resize_modules_by_rank_pattern": resized}
    with patched(tuner, **own), tokens_by_owner(tuned):
        told = tuned.load_adapter(str(folder), name, is_trainable=is_trainable, **options)
    _freeze_what_only_counts(tuned)
    place_where_it_computes(tuned)
    return told


def _parameters_of(tuned: PeftModel) -> Iterator[tuple[Any, str, nn.ParameterDict]]:
    """Yield layer, name and value of what PEFT's layers keep in dictionaries of parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    for layer in tuned.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in (*layer.adapter_layer_names, *layer.other_param_names):
                if isinstance(held := getattr(layer, name, None), nn.ParameterDict):
                    yield layer, name, held


def _exactly(model: nn.Module, config: PeftConfig, inject: Callable[[], PeftModel]) -> PeftModel:
    """Call `inject`, with our layers in the place of PEFT's."""
    from .fused import use_fused_layers

    use_fused_layers(config)
    literal = _names_what_is_there(model, config)
    expected = set(matched(model, config)) if literal else set()
    misread = literal and _would_convert(model, config)
    with all_or_nothing(model):
        # PEFT imports libraries of quantizers, of other models' too.
        with unchanged_process(), _taken_literally(literal), warnings.catch_warnings():
            # It looks at modules alone; patterns of ranks may name parameters, and were looked at.
            warnings.filterwarnings("ignore", "The following .*_pattern keys did not match any")
            tuned = inject()
        _freeze_what_only_counts(tuned)
        place_where_it_computes(tuned)
        if literal and (wrong := expected ^ set(adapted(tuned.get_base_model()))):
            some = ", ".join(sorted(wrong)[:3])
            what = f"PEFT does not adapt what is named: {len(wrong)} modules differ, e.g. {some}"
            fix = "name other layers in target_modules, or use another adapter"
            raise PlanRefused([Problem(what, fix, where="adapter.target_modules")])
    if misread:
        text = "PEFT by itself takes these target_modules for the fused experts of this model"
        warn(f"{text}: {_ELSEWHERE}", TargetsWarning, stacklevel=5)
    return tuned


def _freeze_what_only_counts(tuned: PeftModel) -> None:
    """Freeze parameters that PEFT's layers keep beside what they train, and that it never saves.

    AdaLoRA holds the number of its ranks so. PEFT freezes it, and on a base in 16 bits casts it
    into another one, which is trained: what was saved was then not what had learnt.
    """
    for layer, name, held in _parameters_of(tuned):
        if name in layer.other_param_names:
            held.requires_grad_(False)


def place_where_it_computes(tuned: PeftModel) -> None:
    """Move adapters of a streamed base to the device: PEFT puts them where it finds a layer's codes
    (`qweight`, `W_q`), and those are in CPU memory."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    from ..streaming import streamer_of

    if (streamer := streamer_of(tuned)) is None:
        return
    for layer in tuned.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in (*layer.adapter_layer_names, *layer.other_param_names):
                if isinstance(part := getattr(layer, name, None), nn.Module):
                    part.to(streamer.device)


def _taken_by_conv1d(config: PeftConfig, tuned: PeftModel) -> bool:
    """Say whether PEFT itself takes the layers that are `Conv1D` in the model's own class, if any
    are adapted; only the facade in front of them is an `nn.Linear`."""
    import torch
    from peft import get_peft_model
    from torch import nn

    from ..model.linears import as_conv1d

    modules = tuned.get_base_model()
    bases = (modules.get_submodule(name).get_base_layer() for name in adapted(modules))  # type: ignore[operator]
    layer = next((base for base in bases if getattr(base, "conv1d", False)), None)
    if layer is None:
        return True
    one = type(config)(target_modules=["layer"])  # type: ignore[call-arg]
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            linear = nn.Linear(layer.in_features, layer.out_features)
            get_peft_model(nn.ModuleDict({"layer": as_conv1d(linear)}), one)  # type: ignore[arg-type]
    except Exception as error:  # others are about the meta device, or sizes
        return "Conv1D" not in str(error)
    return True


def matched(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return the names of the modules of `model` that `config` names as targets."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    method: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type, BaseTuner)  # type: ignore[call-overload]
    is_target = method._check_target_module_exists
    return [name for name, _ in model.named_modules() if name and is_target(config, name)]


def adapted(base: nn.Module) -> list[str]:
    """Return the names of the modules of `base` that an adapter stands in front of. Parameters,
    tokens and modules that are trained whole are named by other options, so they are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = dict(base.named_modules())
    aside = [f"{n}." for n, m in modules.items() if isinstance(m, AuxiliaryTrainingWrapper)]
    return [
        name
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer)
        and not hasattr(module, "parameter_name")
        and not name.startswith(tuple(aside))
    ]


def _names_what_is_there(model: nn.Module, config: PeftConfig) -> bool:
    """Say whether every target is a module of `model`, so that none is meant for an older one."""
    wanted = getattr(config, "target_modules", None)
    if not wanted:
        return False
    if isinstance(wanted, str):
        return bool(matched(model, config))
    names = [f".{name}" for name, _ in model.named_modules()]
    return all(any(name.endswith(f".{target}") for name in names) for target in wanted)


def _would_convert(model: nn.Module, config: PeftConfig) -> bool:
    """Say whether PEFT by itself would read the targets otherwise."""
    convert = getattr(_conversions(), _CONVERSION, None)
    if convert is None or not hasattr(config, "target_parameters"):
        return False
    converted: Any = copy.deepcopy(config)
    try:
        convert(converted, model=model, conversions=None)
    except Exception:  # it refuses some of them
        return True
    return bool(set(converted.target_parameters or ()) - set(config.target_parameters or ()))


@contextmanager
def _taken_literally(literal: bool) -> Iterator[None]:
    """Inside, PEFT leaves the targets of its configs as they are, if `literal`."""
    conversions = _conversions()
    convert = getattr(conversions, _CONVERSION, None)
    if convert is None or not literal:
        yield
        return
    setattr(conversions, _CONVERSION, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(conversions, _CONVERSION, convert)


def _conversions() -> Any:
    try:
        from peft.utils import transformers_weight_conversion
    except ImportError:  # a release without it, which converts nothing
        return None
    return transformers_weight_conversion


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put `model` back as it was where the body raises: its modules, attributes and parameters."""
    from torch import Tensor

    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    # The dictionaries of modules, parameters, hooks and so on, which are changed in place.
    contents = [{n: dict(v) for n, v in a.items() if isinstance(v, dict)} for a in attributes]
    plain = [p for p in model.parameters() if type(p.data) is Tensor]
    data = [(parameter, parameter.data) for parameter in plain]
    # What a file holds of the base itself, biases and norms, is copied in place.
    written = [(values, values.clone()) for _, values in data if values.ndim == 1]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    settings_before = dict(settings)
    try:
        yield
    except BaseException:
        for module, before, inside in zip(modules, attributes, contents, strict=True):
            _refill(vars(module), before)
            for name, content in inside.items():
                _refill(before[name], content)
        for parameter, values in data:
            parameter.data = values
        for values, as_they_were in written:
            values.copy_(as_they_were)
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)
        _refill(settings, settings_before)
        raise


def _refill(mapping: dict[str, Any], content: dict[str, Any]) -> None:
    mapping.clear()
    mapping.update(content)
