"""What stays dense of a model, and how much of it is quantized."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import PlanRefused, Problem, warn
from ..inputs.model_config import towers_in
from ..planning.planned import Plan
from ..planning.refusals import misfit_problems
from ..planning.share import BEGINNING, Share, is_expert_bias, part_of
from ..protocols import Quantizer
from ..registry.blame import blaming

if TYPE_CHECKING:
    from torch import nn


_DECIDING = ("stays_dense", "misfit")
"""What a backend decides by which layers stay dense."""


class MostlyDenseWarning(UserWarning):
    """Few of a model's weights are quantized."""


def tell_kept(plan: Plan, model: nn.Module) -> list[str]:
    """Warn of the layers of a quantized model that its backend had to leave dense, and return what
    was told."""
    from ..model.dense import dense_by_default, skipped_modules

    default = dense_by_default(model, wanted_skip(plan), plan.spec.towers)
    with blaming(plan.backend, "deciding what stays dense"):
        kept = plan.quantizer.stays_dense(model, skipped_modules(model, default))
    if not kept:
        return []
    text = (
        f"{plan.backend.name} leaves {len(kept)} linear layers dense ({kept[0]} is the first):"
        " transformers could not load them from a checkpoint if they were quantized"
    )
    warn(text, MostlyDenseWarning, stacklevel=5)
    return [text]


def tell_share(model: nn.Module, skip: tuple[str, ...], plan: Plan) -> str:
    """Return how much of the weights is quantized, and what stays dense; warn where it is little,
    and the plan has not told it."""
    from ..model.towers import other_towers

    share = share_of(model, skip)
    if not plan.adopt and other_towers(model, plan.spec.towers):
        share = replace(share, of=tuple(plan.spec.towers))
    if share.is_low and not any(note.startswith(BEGINNING) for note in plan.notes):
        warn(share.words, MostlyDenseWarning, stacklevel=4)
    return share.words


def share_of(model: nn.Module, skip: tuple[str, ...] = ()) -> Share:
    """Return how much of a quantized model's weights is quantized.

    Args:
        model: with facades.
        skip: the modules that were left dense on purpose.
    """
    from torch import nn

    from ..facade import facades
    from ..model.modules import is_skipped

    found = dict(facades(model))
    dense: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or is_skipped(name, (*skip, *found)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.ndim > 1 and not is_expert_bias(full):
                dense[part_of(full) or type(module).__name__] += parameter.numel()
    return Share(sum(f.in_features * f.out_features for f in found.values()), dense)


def nothing_quantized(model: nn.Module) -> PlanRefused:
    """Say which layers the model has in place of linear ones, which alone are quantized; or that
    those that it has are all left dense."""
    from ..model.linears import is_linear

    head = getattr(model, "get_output_embeddings", lambda: None)()
    if any(is_linear(m) and m is not head for m in model.modules()):
        what = "nothing is quantized: all linear layers of the model are left dense"
        fix = "name fewer layers in skip_modules, or other options of the backend if skip_misfits"
        return PlanRefused([Problem(what, f"{fix} leaves them out", where="model")])
    matrices = (m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2)
    others = {type(m).__name__ for m in matrices} - {"Linear", "Embedding"}
    what = "the model has no linear layer to quantize"
    if others:
        what += f": nn.Linear and Conv1D are quantized, its layers are {', '.join(sorted(others))}"
    fix = "use another model, or name fewer layers in skip_modules"
    return PlanRefused([Problem(what, fix, where="model")])


def wanted_skip(plan: Plan) -> tuple[str, ...] | None:
    """Return what the spec leaves dense; None where it leaves that to the default."""
    wanted = plan.spec.skip_modules
    return None if wanted is None else tuple(wanted)


def skip_for(plan: Plan, module: nn.Module | None = None) -> tuple[str, ...] | None:
    """Return what is left dense, layers that do not fit included; None means the default.

    Looks at the architecture only. Raises PlanRefused, with a line for each layer whose size the
    backend cannot quantize, unless the spec says `skip_misfits`.
    """
    from ..loading.heads import head_names, wants_head
    from ..loading.reading import architecture
    from ..model.dense import dense_by_default, skipped_modules
    from ..model.experts import expert_stacks
    from ..model.modules import linear_layers
    from ..model.towers import LANGUAGE

    skip, quantizer = wanted_skip(plan), plan.quantizer
    towers = plan.spec.towers
    if towers_in(plan.config or {}) and (skip is not None or towers != [LANGUAGE]):
        skip = dense_by_default(
            architecture(plan.model) if module is None else module, skip, towers
        )
    if wants_head() and module is None and skip is None:
        # A pooler may be new, and what starts at random is trained, not quantized.
        model = architecture(plan.model)
        skip = (*skipped_modules(model, None), *head_names(model))
    if all(getattr(type(quantizer), name) is getattr(Quantizer, name) for name in _DECIDING):
        return skip  # everything fits
    model = architecture(plan.model) if module is None else module
    default = skipped_modules(model, skip)
    with blaming(plan.backend, "deciding what stays dense"):
        dense = quantizer.stays_dense(model, default)
        left = (*default, *dense)
        sizes = {
            name: (linear.in_features, linear.out_features)
            for name, linear in linear_layers(model, left)
        }
        stacks = expert_stacks(model, left)
        sizes |= {stack.name: (stack.in_features, stack.rows) for stack in stacks}
        problems, misfits = misfit_problems(quantizer, sizes)
    if problems and not plan.spec.skip_misfits:
        raise PlanRefused(problems)
    return (*default, *dense, *misfits) if dense or misfits else skip
