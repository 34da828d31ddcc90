"""What a trainer is lent, beside what its model is (`lent`): a loss, its clipping, silence."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..adapting.adalora import tuner_of
from ..distributed.talking import average_gradients
from ..memory.shape import SCALED_LOGITS, TRL_SCALES
from ..model.head import Head, aligned, counting, is_alone, is_its_weight
from ..model.logits import next_token_loss
from ..model.patches import patched, restored
from ..showing.quietly import quietly

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_head_loss(base: Any) -> bool:
    """Let `base(..., labels=..., fused_lm_head=True)` return the loss alone; say if it can.

    It can where a frozen plain head turns the decoder's last hidden states into logits. Takes the
    arguments, and gives the `loss`, of a model that TRL's `add_fused_lm_head` was applied to; and
    `counted`, the number of labels that count, without which the device is waited for. `given_back`
    takes it off again.
    """
    head = Head.of(base)
    if head is None or head.linear.weight.requires_grad:
        return False
    if balances_routers(base) or _adds_to_loss(base):
        return False

    def hidden_states(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.base_model(*args, **kwargs).last_hidden_state
        return hidden

    def loss(
        hidden: Tensor, labels: Tensor, *, after: Tensor | None, divisor: Any, counted: int | None
    ) -> Tensor:
        hidden, labels = aligned(hidden, labels, after)
        where = counting(labels, counted)
        total: Tensor = head.losses(hidden[where], labels[where]).sum()
        return total / (max(len(where), 1) if divisor is None else divisor)

    _lend_loss(base, hidden_states, loss)
    return True


def add_trl_loss(base: Any) -> bool:
    """Let `base(..., labels=..., fused_lm_head=True)` return TRL's loss; say if that is the one of
    the model's own forward.

    It calls nothing but the decoder: it takes the head's weight and bias, and of scales, caps and
    losses on routers those that it knows.
    """
    from trl.trainer.utils import add_fused_lm_head

    text, head = base.config.get_text_config(), base.get_output_embeddings()
    unknown = (name for name in SCALED_LOGITS if name not in TRL_SCALES)
    scaled = any(getattr(text, name, None) is not None for name in unknown)
    if scaled or _adds_to_loss(base) or not is_its_weight(head) or not is_alone(base, head):
        return False
    with restored([base], "forward"):
        add_fused_lm_head(base)
        lent = vars(base)["forward"]
        if balances_routers(base) and not _balances_alike(base):
            return False
    base.forward = lent
    return True


def add_logits_loss(base: Any) -> bool:
    """As `add_head_loss`, of the logits that the model makes; say if the loss of its own forward
    has no other part. Of labels that a forward takes it may make anything, so it gets none."""
    if balances_routers(base) or _adds_to_loss(base):
        return False

    original = base.forward

    def whole(_: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = original(*args, **(kwargs | {"return_dict": True})).logits
        return logits

    def loss(logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
        # Those of virtual tokens come first, and have no labels.
        return next_token_loss(logits[:, -labels.shape[1] :], labels, **given)

    _lend_loss(base, whole, loss)
    return True


def _lend_loss(base: Any, outputs: Callable[..., Tensor], loss: Callable[..., Tensor]) -> None:
    """Let `base(..., labels=..., fused_lm_head=True)` return a loss of its own.

    Args:
        outputs: makes what it is computed of, of the model and of what else forward is given.
        loss: of those outputs and the labels; `after`, `divisor` and `counted` are those of
            `next_token_loss`.
    """
    original = base.forward

    @wraps(type(base).forward)  # generate checks its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        counted: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutput

        labels, divisor = kwargs.pop("labels"), kwargs.pop("num_items_in_batch")
        after = kwargs.pop("shift_labels", None)  # of rows that several processes share
        made = outputs(self, *args, **kwargs)
        return CausalLMOutput(
            loss=loss(made, labels, after=after, divisor=divisor, counted=counted)
        )

    base.forward = types.MethodType(forward, base)


def balances_routers(model: Any) -> bool:
    """Say if the model's loss has a part that balances its routers."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def adds_to_loss(model: Any) -> bool:
    """Say if the model, or its adapter, adds a part of its own to the loss of each pass, whatever
    that is divided by: what balances routers, AdaLoRA's, Bamba's."""
    own = balances_routers(model) or _adds_to_loss(model)
    return own or tuner_of(model) is not None


def _adds_to_loss(base: Any) -> bool:
    """Say if the model's loss has a part made of all logits, as Bamba's may."""
    return bool(getattr(base.config.get_text_config(), "z_loss_coefficient", 0))


def _balances_alike(base: Any) -> bool:
    """Say if TRL's loss on routers, which is Mixtral's, is the model's own. Found by trying."""
    import torch

    from ..evaluation.predictions import device_of, evaluating

    if not hasattr(base.config.get_text_config(), "router_aux_loss_coef"):
        return False
    ids = torch.arange(8, device=device_of(base))[None]
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    with evaluating(base), torch.no_grad():
        own = getattr(base(**batch), "aux_loss", None)
        try:
            found = base(**batch, fused_lm_head=True).aux_loss
        except Exception:  # of configs and routers that are not like Mixtral's
            return False
    return own is not None and bool((found - own).abs() <= 0.01 * own.abs())


@contextmanager
def with_adapted_heads() -> Iterator[None]:
    """Let SFTTrainer take a model whose head is adapted: its own loss would not see that, ours is
    of the logits that the model makes."""
    from trl.trainer import sft_trainer

    with patched(sft_trainer, BaseTunerLayer=()):  # which nothing is an instance of
        yield


@contextmanager
def without_statistics(model: Any) -> Iterator[None]:
    """Take out again the head that SFTTrainer patches in: it makes statistics at every step. And
    the loss on routers that it switches on: the model's config says whether there is one."""
    text = model.config.get_text_config()
    with restored([model.get_base_model()], "forward"), restored([text], "output_router_logits"):
        yield


def clip_what_is_trained(accelerator: Any, trained: list[nn.Parameter]) -> None:
    """Clip the adapter's gradients without a walk through all modules; several processes average
    them first, once a step. The accelerator is one trainer's, and goes with it.

    That is in place of DistributedDataParallel, so that the model stays what it is: adapters are
    whole on every process, and a base that is sharded gathers itself.
    """
    prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

    def prepared(model: Any, *_: Any, **__: Any) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    def clipped(_: Any, *args: Any, **kwargs: Any) -> Any:
        average_gradients(trained)
        return clip(trained, *args, **kwargs)

    accelerator.clip_grad_norm_ = clipped
    accelerator.prepare_model = prepared  # a launcher's single process would be wrapped as well


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the screen, and let them send no
    telemetry; errors, and what makes us slower, still come through."""
    from huggingface_hub import constants

    with quietly(), patched(constants, HF_HUB_DISABLE_TELEMETRY=True):
        yield
