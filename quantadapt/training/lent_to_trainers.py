"""What a trainer is lent, beside what its model is (`lent`): a loss, its clipping, silence."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..distributed.talking import average_gradients
from ..model.head import Head, aligned, counting
from ..model.patches import patched, restored
from ..showing.quietly import quietly

if TYPE_CHECKING:
    from torch import nn


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
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return False
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

        given, divisor = kwargs.pop("labels"), kwargs.pop("num_items_in_batch")
        after = kwargs.pop("shift_labels", None)  # of rows that several processes share
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        hidden, labels = aligned(hidden, given, after)
        where = counting(labels, counted)
        loss = head.losses(hidden[where], labels[where]).sum()
        return CausalLMOutput(loss=loss / (max(len(where), 1) if divisor is None else divisor))

    base.forward = types.MethodType(forward, base)
    return True


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
