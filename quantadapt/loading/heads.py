"""Read a language model as a classifier: the same layers below a new head.

transformers has a class for that of most families. Its head starts at random, and is trained with
the adapter; a checkpoint that has such a head already keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError

ENDINGS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
"""What a head classifies -> how transformers' classes with one are called."""
_GENERIC = "LABEL_"


@dataclass(frozen=True)
class NewHead:
    """What is wanted of a checkpoint.

    Attributes:
        kind: a key of `ENDINGS`.
        labels: what it tells apart, in the order of its outputs; none leaves that to the config.
    """

    kind: str
    labels: tuple[str, ...] = ()


_wanted: ContextVar[NewHead | None] = ContextVar("head", default=None)


@contextmanager
def with_head(kind: str, labels: Sequence[str] = ()) -> Iterator[None]:
    """Inside, checkpoints are read with a head of that kind; as they are where it is empty."""
    if not kind:
        yield
        return
    token = _wanted.set(NewHead(kind, tuple(labels)))
    try:
        yield
    finally:
        _wanted.reset(token)


def wants_head() -> bool:
    """Say whether checkpoints are to be read with a head of a certain kind."""
    return _wanted.get() is not None


def as_wanted(config: Any, source: str) -> Any:
    """Return a config of transformers as the head that is wanted has it.

    Raises:
        ModelError: transformers has no such class, or the checkpoint's head knows other labels.
    """
    if (wanted := _wanted.get()) is None:
        return config
    name = (getattr(config, "architectures", None) or [""])[0] or ""
    if not name.endswith(ENDINGS[wanted.kind]):
        config.architectures = [_class_for(config, wanted.kind, source)]
        if wanted.labels:
            _set_labels(config, wanted.labels)
        return config
    own = labels_of(config)
    if not wanted.labels or set(wanted.labels) <= set(own):
        return config
    if len(own) != len(wanted.labels) or not all(label.startswith(_GENERIC) for label in own):
        what = f"its head tells {_few(own)} apart, and the data {_few(wanted.labels)}"
        fix = "rename the labels in the data, or start from a checkpoint without a head"
        raise ModelError(what, fix=fix, where=source)
    _set_labels(config, wanted.labels)  # which nobody has named
    return config


def labels_of(config: Any) -> list[str]:
    """Return the names of a head's outputs, in their order."""
    names = getattr(config, "id2label", None) or {}
    return [str(names[key]) for key in sorted(names, key=int)]


def label_ids(config: Any) -> dict[str, int]:
    """Return the output of each label; where the config only counts them, its number is one."""
    names = labels_of(config)
    return {name.removeprefix(_GENERIC): place for place, name in enumerate(names)} | {
        name: place for place, name in enumerate(names)
    }


def head_names(model: Any) -> tuple[str, ...]:
    """Return the modules that a classifier has and a language model may not have: what stands
    beside its encoder or decoder, and a pooler."""
    base = model.base_model
    beside = [name for name, child in model.named_children() if child is not base]
    return (*beside, *(name for name, _ in base.named_children() if name == "pooler"))


def new_modules(missing: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that tensors called `missing` belong to."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in sorted(missing)))


def _class_for(config: Any, kind: str, source: str) -> str:
    import transformers

    auto: Any = getattr(transformers, f"AutoModel{ENDINGS[kind]}")
    found = auto._model_mapping.get(type(config), None)
    if isinstance(found, type):
        return found.__name__
    what = f"transformers has no {ENDINGS[kind].removeprefix('For')} for {config.model_type} models"
    raise ModelError(what, fix="use a model of another family", where=source)


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: place for place, label in enumerate(labels)}


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:4]))
    return f"{shown} and {len(labels) - 4} more" if len(labels) > 4 else shown
