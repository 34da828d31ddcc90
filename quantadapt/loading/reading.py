"""Read models through transformers, find their linear layers, and put others in their place.

Weights are read from safetensors only, never from pickles.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, PlanRefused, QuantadaptError
from ..inputs.documents import reason
from ..inputs.model_config import config_problems
from ..inputs.weights import refuse_pickles
from ..model.experts import SUFFIX, expert_stacks, set_stack, stacks_of
from ..model.linears import as_linear, is_conv1d, other_linears
from ..model.modules import cast_parameters, wanted_dtype
from ..model.numbers import refuse_not_numbers_in
from ..paths import ADAPTER_CONFIG, out_of_reach
from ..remote_code import code_problems, refusal, trusted
from .accounting import OwnReport, account, repeatable
from .heads import as_wanted
from .lacking import lacking, wrong_tensors
from .mxfp4 import dequantizing, is_mxfp4
from .tensors import Checkpoint


def model_class(config: Any) -> Any:
    """Return the class of a checkpoint's model: what its config names in `architectures`; else, or
    where transformers has no such class, seq2seq for encoder-decoders and causal LM for others."""
    import transformers

    own = trusted() and getattr(config, "auto_map", None)  # the classes that it names come first
    for name in () if own else (getattr(config, "architectures", None) or ())[:1]:
        found: Any = getattr(transformers, name, None)
        fits = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if fits and (found.config_class is None or isinstance(config, found.config_class)):
            return found
    auto: Any = transformers.AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        auto = transformers.AutoModelForSeq2SeqLM
    kind = auto._model_mapping.get(type(config), None)
    return kind if isinstance(kind, type) else auto


def read_config(source: str) -> Any:
    """Return transformers' config of a checkpoint. Raises ModelError where there is none, or one
    whose sizes cannot be."""
    from transformers import AutoConfig, PretrainedConfig

    fix = "pass a folder with config.json and *.safetensors, or the id of a model on the hub"
    try:
        values, _ = PretrainedConfig.get_config_dict(source)
        if found := config_problems(values):
            raise ModelError(f"config.json: {'; '.join(found)}", fix=fix, where=source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted())
    except QuantadaptError:
        raise
    except Exception as error:  # what is in the file decides what transformers does
        refuse_code(source, error)
        away, get_it = out_of_reach(source)
        what = f"{away or 'no model can be read here'}: {reason(error)}"
        raise ModelError(what, fix=get_it or fix, where=source) from error
    refuse_code(source)  # of a hub id, whose files are here only now
    return as_wanted(config, source)


def architecture(source: str, device: str = "meta", dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a checkpoint without its weights, by default names and shapes only, in
    the dtype that its config names."""
    config, options = read_config(source), {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device(device):
            found = model_class(config)
            if hasattr(found, "from_config"):
                made = found.from_config(config, trust_remote_code=trusted(), **options)
            else:
                made = found._from_config(config, **options)
            model: nn.Module = made
    except Exception as error:
        refuse_code(source, error)
        raise _load_error(source, error) from error
    return model


def refuse_code(source: str, error: Exception | None = None) -> None:
    """Raise PlanRefused if a checkpoint needs code that is not trusted: its files say so, or
    transformers' `error` does."""
    found = code_problems(source)
    if not found and "trust_remote_code" in str(error) and not trusted():
        found = [refusal(source)]
    if found:
        raise PlanRefused(found) from None


def from_pretrained(
    source: str,
    *,
    config: Any = None,
    consumed: Collection[str] = (),
    mismatched: Collection[Any] = (),
    plain: Collection[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Return the model of a checkpoint, read through transformers from safetensors only. Its
    linear layers are `nn.Linear`, or `Conv1D`.

    Args:
        source: folder or hub id.
        config: that of transformers, if it is not to be read from `source`.
        consumed: names of tensors that somebody else uses; may be filled while the model is loaded.
        mismatched: (name, shape, expected shape) of tensors that somebody else refused, likewise.
        plain: names of the tensors in the files where the layers that lack a weight among them are
            quantized: each of those is made an `nn.Linear`, a `Conv1D` too. So is each stack of
            experts that is a module in the files.
        kwargs: as for transformers' `from_pretrained`.

    Raises:
        WrongTensors: its tensors are not those of the model. ModelError: it cannot be read.
    """
    config = config or read_config(source)
    stored = is_mxfp4(config)
    if stored and "quantization_config" in kwargs:  # which has the conversions
        config = copy.deepcopy(config)
        del config.quantization_config
    elif stored:
        kwargs["quantization_config"] = dequantizing()
    report = OwnReport()
    try:
        with report, repeatable():
            model, info = _plain_class(model_class(config), plain).from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trusted(),
                **kwargs,
            )
    except QuantadaptError:
        raise
    except Exception as error:  # what is in the files decides what transformers does
        refuse_code(source, error)
        wrong = wrong_tensors(source, partial(architecture, source), report.broken)
        raise wrong or _load_error(source, error) from error
    if hasattr(model, "peft_config"):  # of a hub id, whose files are here only now
        what = f"it holds an adapter ({ADAPTER_CONFIG}), which transformers has put into the model"
        raise ModelError(what, fix="use the id of the model without it", where=source)
    info["mismatched_keys"] = {*info["mismatched_keys"], *mismatched}
    without_weights = partial(architecture, source)
    account(model, source, info, consumed, partial(lacking, source, without_weights))
    refuse_not_numbers_in(model, where=source)
    found: nn.Module = unmarked(model) if stored else model
    if stored and (dtype := kwargs.get("dtype")):  # older transformers always makes bfloat16
        cast_parameters(found, dtype)
    return found


def _plain_class(found: Any, stored: Collection[str] | None) -> Any:
    """Return a model class whose instances hold `nn.Linear` in place of subclasses of it, for
    loaders that look for that class alone; see `from_pretrained` for `stored`."""
    kinds = [k for k in vars(sys.modules[found.__module__]).values() if isinstance(k, type)]
    own = any(issubclass(kind, nn.Linear) and kind is not nn.Linear for kind in kinds)
    conv1d = stored is not None and any(kind.__name__ == "Conv1D" for kind in kinds)
    stacks = any(f"{SUFFIX}." in name for name in stored or ())
    if hasattr(found, "from_config") or not (own or conv1d or stacks):
        return found

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        found.__init__(self, *args, **kwargs)
        self.__class__ = found
        for name, module in list(other_linears(self)):
            if not is_conv1d(module) or not (stored is None or f"{name}.weight" in stored):
                self.set_submodule(name, as_linear(module))
        if stacks:
            renamed = {renaming(self)(name) for name in stored or ()}
            for stack in list(expert_stacks(self, ())):
                if any(name.startswith(f"{stack.module}.") for name in renamed):
                    set_stack(self, stack, nn.Linear(stack.in_features, stack.rows, bias=False))

    names = {name: getattr(found, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(found.__name__, (found,), {"__init__": init, **names})


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Return what transformers makes of a key in a checkpoint: some models call modules otherwise
    there."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    return lambda key: rename_source_key(key, renamings, [])[0]


def _load_error(source: str, error: Exception) -> ModelError:
    """Say why transformers could not make a model of a checkpoint."""
    folder = Path(source)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        fix = "use a smaller model, or a device with more memory"
        return ModelError("memory does not suffice to load it", fix=fix, where=source)
    if type(error).__name__ == "SafetensorError":
        fix = "download the checkpoint again; a file of it is damaged or cut short"
        return ModelError(f"the weights cannot be read: {error}", fix=fix, where=source)
    if folder.is_dir():
        try:
            refuse_pickles(folder, "*.safetensors")
        except ModelError as found:
            return found
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = f"the model cannot be loaded: {first}"
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        what = f"transformers cannot make a model of config.json: {type(error).__name__}: {first}"
    fix = "check that config.json and the weights are whole and belong together"
    return ModelError(what, fix=fix, where=source)


def load_native(path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a quantized checkpoint whose format transformers knows. See `Quantizer.load`."""
    stored = Checkpoint(path).files
    model = from_pretrained(path, dtype=dtype, device_map={"": device}, plain=stored)
    if getattr(model, "hf_quantizer", None) is not None:
        _cast(model, architecture(path, dtype=dtype), dtype)
    remember_stacks(model)
    return unmarked(model)


def _cast(model: nn.Module, empty: nn.Module, dtype: torch.dtype) -> None:
    """Cast the dense weights of a quantized model, in place, to what they have in one that is not,
    `empty`: transformers leaves what is called like a packed weight as it is stored."""
    kept = wanted_dtype(model, dtype)
    made = {name: parameter.dtype for name, parameter in empty.named_parameters()}
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        if plain and parameter.is_floating_point() and name in made:
            wanted = kept(name) if made[name] == dtype else made[name]
            parameter.data = parameter.data.to(wanted)


def unmarked(model: nn.Module) -> nn.Module:
    """Take transformers' marks of a quantized model off again: the facades make it an ordinary one,
    and its Trainer refuses marked models that it has no entry for."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]
    config: Any = model.config
    for name in ("quantization_config", "_is_quantized"):
        if name in vars(config):
            delattr(config, name)
    if conversions := vars(model).get("_weight_conversions"):
        # Saving runs them backwards, which those that unpacked a quantized checkpoint cannot.
        kept = [one for one in conversions if _is_reversible(one)]
        model._weight_conversions = kept  # type: ignore[assignment]
    return model


@contextmanager
def stacks_as_they_are(model: nn.Module) -> Iterator[None]:
    """Inside, saving does not convert quantized stacks of experts, of which it would take the
    packed parts for dense ones. What else a checkpoint is converted from, it is converted to."""
    before = vars(model).get("_weight_conversions")
    if not (stacks := _stacks(model)):
        yield
        return
    conversions = _conversions(model) if before is None else before
    kept = [one for one in conversions if not _makes(one, stacks)]
    model._weight_conversions = kept  # type: ignore[assignment]
    try:
        yield
    finally:
        vars(model)["_weight_conversions"] = before
        if before is None:
            del model._weight_conversions


def remember_stacks(model: nn.Module) -> None:
    """Have a model whose stacks of experts were read as they are saved know how checkpoints of its
    kind hold them: dense weights that are made of it are saved so."""
    used, stacks = vars(model).get("_weight_conversions"), _stacks(model)
    if used is None or not stacks:
        return
    unused = [one for one in _conversions(model) if _makes(one, stacks)]
    known = [one.target_patterns for one in used]
    unused = [one for one in unused if one.target_patterns not in known]
    model._weight_conversions = [*used, *unused]  # type: ignore[assignment]


def _conversions(model: nn.Module) -> list[Any]:
    """Return the conversions with which transformers saves a model that it did not load."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    return [one for one in found if type(one).__name__ != "PrefixChange"]


def _stacks(model: nn.Module) -> list[str]:
    return [s.name for module in model.modules() for s in stacks_of(module).values()]


def _makes(conversion: Any, names: Collection[str]) -> bool:
    """Say whether a conversion makes one of the tensors called `names`."""
    if not hasattr(conversion, "operations"):
        return False
    patterns = [pattern.rstrip("$") for pattern in conversion.target_patterns]
    return any(pattern in name for pattern in patterns for name in names)


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
