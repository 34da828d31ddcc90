"""Whether a model learns to predict the next token from those before it: tried out before it does,
where its attention does not say so.

Classes that are for causal models are encoders where their config does not say otherwise
(`is_decoder` of BERT's like), or always (XLNet, XLM, CPM-Ant without their own masks): they see
each token that they are to predict, and learn to copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.pixels import TYPES
from ..errors import QuantadaptError, TrainingError
from ..inputs.documents import reason
from .packing import differ

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = 8
WHERE = "model"
_SWITCHES = {
    **{"is_causal": True, "use_bidirectional_attention": False},
    **{"is_decoder": True, "causal": True},
}
"""What configs call it that tokens see none after them, and what it is then: any model's masks,
Gemma's attention, BERT's like, and XLM."""
_CAUSAL = "is_causal"
"""What attention says of itself, and what masks heed in configs of transformers."""
_SPECIAL = ("_token_id", "_token_index", "pad_index")
"""How configs call the ids of tokens that are no text."""

OnNote = Callable[[str], None]


def refuse_foresight(model: Any, on_note: OnNote, columns: Iterable[str] = ()) -> None:
    """Raise TrainingError where what a model says of a token changes with later ones, or where it
    says nothing of each token. The decoders of encoder-decoder models are not asked.

    Args:
        model: a PeftModel, on its device.
        on_note: told where a model takes no text alone, so that it cannot be tried out.
        columns: those of the data; some tell what kind each token is, which masks may go by.
    """
    import torch

    from ..evaluation.predictions import device_of, is_encoder_decoder, without_head

    kinds = [name for name in columns if name.endswith(TYPES)]
    if is_encoder_decoder(model) or (_says_causal(model) and not kinds):
        return
    *row, other = _tokens(model, _LENGTH + 1)
    ids = torch.tensor([row, [*row[:-1], other]], device=device_of(model))
    given = {"input_ids": ids, "use_cache": False}
    given |= {name: torch.zeros_like(ids) for name in kinds}  # as text is called in a batch
    with without_head(model):  # logits, or what they are made of
        logits = _tried(model, lambda: model(**given).logits, on_note)
    if logits is None:
        return
    if logits.ndim != 3 or logits.shape[1] < _LENGTH:
        what = f"{_name(model)} does not give the logits of each token"
        raise TrainingError(what, fix="use a causal language model", where=WHERE)
    if differ(model, *logits[:, :-1].float()):
        what = f"{_name(model)} sees the tokens after each, so it would learn to copy the next one"
        raise TrainingError(what, fix=_fix(model.config), where=WHERE)


def refuse_unshifted(
    model: Any, loss: Callable[[dict[str, Tensor]], Tensor], on_note: OnNote
) -> None:
    """Raise TrainingError where a loss that is the model's own changes with the label of the first
    token, which none before it predicts.

    Args:
        loss: gives that of a batch of `input_ids`, `attention_mask` and `labels` [1, length].
        on_note: as of `refuse_foresight`.
    """
    import torch

    from ..evaluation.predictions import device_of

    *row, other = _tokens(model, _LENGTH + 1)

    def of(first: int) -> Tensor:
        ids = torch.tensor([row], device=device_of(model))
        labels = ids.clone()
        labels[0, 0] = first
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return loss(whole).float()

    found = _tried(model, lambda: (of(row[0]), of(other)), on_note)
    if found is not None and differ(model, *found):
        what = f"the loss of {_name(model)} compares what it says of a token with that token"
        fix = "give its forward the labels of the next tokens, or take the patch of it off"
        raise TrainingError(f"{what}, not with the next", fix=fix, where=WHERE)


def _says_causal(model: Any) -> bool:
    """Say whether all attention says that it is causal, and no config that masks are not."""
    said = {module.is_causal for module in model.modules() if hasattr(module, _CAUSAL)}
    configs = (getattr(module, "config", None) for module in model.modules())
    return said == {True} and all(getattr(config, _CAUSAL, True) for config in configs)


def _tried(model: Any, run: Callable[[], Any], on_note: OnNote) -> Any:
    """Return what `run` does, without gradients and dropout; None, and a note, where the model
    fails with no more than text: it may want pictures beside it, which training gives it."""
    import torch

    from ..evaluation.predictions import evaluating
    from ..model.ulysses import alone

    try:
        with evaluating(model), alone(model), torch.no_grad():
            return run()
    except QuantadaptError:
        raise
    except Exception as error:  # of models that want more, or take other arguments
        on_note(
            f"whether {_name(model)} learns the next token of those before it alone could not be"
            f" tried out, as it does not take a text by itself: {reason(error)}"
        )
        return None


def _tokens(model: Any, count: int) -> list[int]:
    """Return so many token ids, the last another than the one before; none is that of padding, nor
    stands for a picture or the like, unless there are too few others."""
    text = model.config.get_text_config()
    special = {
        value
        for config in (model.config, text)
        for name, value in config.to_dict().items()
        if name.endswith(_SPECIAL) and isinstance(value, int)
    }
    size = getattr(text, "vocab_size", None)
    ids = range(count + len(special) if not isinstance(size, int) else size)
    plain = list(islice((token for token in ids if token not in special), count))
    plain = plain if len(plain) > 1 else list(ids)
    return [plain[place % len(plain)] for place in range(count)]


def _name(model: Any) -> str:
    return type(getattr(model, "get_base_model", lambda: model)()).__name__


def _fix(config: Any) -> str:
    texts = (config, config.get_text_config())
    off = [
        f"set {name} to {str(wanted).lower()} in its config.json, or "
        for name, wanted in _SWITCHES.items()
        if any(getattr(text, name, None) is (not wanted) for text in texts)
    ]
    return f"{off[0] if off else ''}use a causal language model"
