"""Whether a model learns to predict the next token from those before it: tried out before it does,
where its attention does not say so.

Classes that are for causal models are encoders where their config does not say otherwise
(`is_decoder` of BERT's like), or always (XLNet, XLM, CPM-Ant without their own masks): they see
each token that they are to predict, and learn to copy it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from .packing import differ

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = 8
WHERE = "model"
_SWITCHES = ("is_decoder", "causal")
"""What configs call it that tokens see none after them: those of BERT's like, and XLM's."""


def refuse_foresight(model: Any) -> None:
    """Raise TrainingError where what a model says of a token changes with later ones, or where it
    says nothing of each token. The decoders of encoder-decoder models are not asked.

    Args:
        model: a PeftModel, on its device.
    """
    import torch

    from ..evaluation.predictions import device_of, evaluating, is_encoder_decoder, without_head
    from ..model.ulysses import alone

    said = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if said == {True} or is_encoder_decoder(model):
        return
    *row, other = _tokens(model, _LENGTH + 1)
    ids = torch.tensor([row, [*row[:-1], other]], device=device_of(model))
    with evaluating(model), alone(model), torch.no_grad(), without_head(model):
        logits = model(input_ids=ids, use_cache=False).logits  # or what they are made of
    if logits.ndim != 3 or logits.shape[1] < _LENGTH:
        what = f"{_name(model)} does not give the logits of each token"
        raise TrainingError(what, fix="use a causal language model", where=WHERE)
    one, other = logits[:, :-1].float()
    if differ(model, one, other):
        what = f"{_name(model)} sees the tokens after each, so it would learn to copy the next one"
        raise TrainingError(what, fix=_fix(model.config), where=WHERE)


def refuse_unshifted(model: Any, loss: Any) -> None:
    """Raise TrainingError where a loss that is the model's own changes with the label of the first
    token, which none before it predicts.

    Args:
        loss: gives that of a batch of `input_ids`, `attention_mask` and `labels` [1, length].
    """
    import torch

    from ..evaluation.predictions import device_of, evaluating
    from ..model.ulysses import alone

    *row, other = _tokens(model, _LENGTH + 1)

    def of(first: int) -> Tensor:
        ids = torch.tensor([row], device=device_of(model))
        labels = ids.clone()
        labels[0, 0] = first
        with evaluating(model), alone(model), torch.no_grad():
            found: Tensor = loss(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            )
        return found.float()

    if differ(model, of(row[0]), of(other)):
        what = f"the loss of {_name(model)} compares what it says of a token with that token"
        fix = "give its forward the labels of the next tokens, or take the patch of it off"
        raise TrainingError(f"{what}, not with the next", fix=fix, where=WHERE)


def _tokens(model: Any, count: int) -> list[int]:
    """Return so many token ids; that of padding is none of them."""
    text = model.config.get_text_config()
    padding = {getattr(text, name, None) for name in ("pad_token_id", "pad_index")}
    return [token for token in range(count + 2) if token not in padding][:count]


def _name(model: Any) -> str:
    return type(getattr(model, "get_base_model", lambda: model)()).__name__


def _fix(config: Any) -> str:
    off = [name for name in _SWITCHES if getattr(config, name, None) is False]
    switched = f"set {off[0]} to true in its config.json, or " if off else ""
    return f"{switched}use a causal language model"
