"""What the memory of a run depends on, from its spec and the model's config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.positions import made_for
from ..errors import Problem
from ..evaluation.reference import adds_nothing
from ..memory import rules
from ..memory.adapters import Layer, Method
from ..memory.experts import STACKS
from ..memory.passes import HEAD
from ..memory.shape import SCALED_LOGITS, TRL_ROUTERS, TRL_SCALES, Shape, language_config
from ..memory.towers import Tower
from ..memory.workload import Workload
from ..protocols import Quantizer, Task
from ..records import Adapter
from ..spec import Spec
from .beside import Beside
from .context_parallel import row_shares
from .memory import MemoryPlan
from .names import is_all_linear
from .on_disk import quantization_in
from .peft_options import option_values
from .share import tower_of

_NOT_CONVERTED = ("modules_to_not_convert", "ignore", "skip_modules", "llm_int8_skip_modules")
"""What lists of the layers that are not quantized are called in `quantization_config`."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "o_proj")
_EMBEDDING = "embed_tokens"
UNFUSED = (
    *("lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("use_bdlora", "velora_config"),
)
"""Options of LoRA that `adapting.fused` leaves to PEFT, beside a start that PEFT calls MiCA."""


def memory_plan(
    spec: Spec,
    config: Mapping[str, Any],
    quantizer: Quantizer,
    adapter: Adapter,
    options: Mapping[str, Any],
    task: Task,
    *,
    dtype: str,
    adopt: bool = False,
    unshared: Sequence[Problem] = (),
    beside: Beside | None = None,
    dense_experts: bool = False,
    streamable: bool = False,
) -> MemoryPlan | None:
    """Return what training on a GPU needs; None where the architecture is not known or the
    backend does not tell its bits per weight.

    Args:
        config: the model's config.json.
        options: the adapter's.
        task: the objective's options.
        dtype: compute dtype on the GPU.
        adopt: whether the model is quantized already, as its config says.
        unshared: why several GPUs cannot share the base; empty if they can.
        beside: what the model has beside its decoder's layers.
        dense_experts: whether a model that is quantized already has its experts dense.
        streamable: whether the base can be kept in CPU memory.
    """
    shape, its_teacher = Shape.of(config), task.teacher_config(config)
    teacher = None if its_teacher is None else Shape.of(its_teacher)
    if shape is None or (its_teacher is not None and teacher is None):
        return None
    left = _left_dense(spec, quantizer, shape, config if adopt else {})
    packs = quantizer.quantizes_experts and not dense_experts
    dense = left if packs else (*left, *STACKS)
    beside = beside or Beside()
    bits = _bits(quantizer, _linears(shape), dense, dtype)
    others = _others(quantizer, beside, shape, dtype)
    if bits is None or others is None:
        return None
    train = spec.train
    lora = adapter.peft_type == "LORA"
    seen = (config, spec.data.max_length, spec.data.max_pixels)
    tower = Tower.of(*seen) if "vision" in beside.towers else None
    tables = _tables(shape, options, packs_head=beside.head)
    length = train.row_length or spec.data.max_length
    language = language_config(config)
    own_loss = task.logits == "model" and _has_own_loss(language)
    work = Workload(
        shape=shape,
        bits=bits,
        targets=_targets(shape, options, left, experts=adapter.experts),
        rank=int(options.get("init_r") or options.get("r") or 0),
        optim=train.optim,
        dtype_bytes=_bytes(dtype),
        batch=train.per_device_train_batch_size,
        length=length,
        dropout=_drops(options),
        fused_adapter=lora and not _is_unfused(options),
        dora=lora and bool(options.get("use_dora")),
        fused_kernels=rules.fused_kernels(train),
        splits=rules.splits(
            *(task, train),
            adds_to_loss=adapter.peft_type == "ADALORA" or rules.adds_to_loss(language),
        ),
        accumulates=train.gradient_accumulation_steps > 1,
        dense=dense,
        shardable=not unshared,
        streamable=streamable,
        from_disk=train.stream_folder is not None,
        prefetches=train.memory != "min",
        graphs=rules.records(task, train),
        sequences=task.sequences,
        whole_logits=task.logits == "whole" or own_loss or any(t.name == HEAD for t in tables),
        made_logits=task.logits == "model" and _makes_logits(shape, options, language),
        teacher=teacher,
        beside=beside.dense,
        others=others,
        packs_head=beside.head,
        tower=tower,
        rounds=train.merge_aware,
        float8=train.compute == "fp8",
        packed=bool(train.packing),
        contexts=train.context_parallel_size,
        in_parts=quantizer.target.reads_rows,
        row_shares=row_shares(train, task, config, options, length),
        method=Method(adapter.peft_type, option_values(adapter, options)),
        also=(*tables, *_of_towers(beside, tower, options)),
        whole=_trained_whole(shape, options),
        keeps_casts=train.memory != "min",
    )
    given = rules.given(train, shape.layers, shape.layers - 1, offloads=True)
    positions, may = made_for(config), rules.may_keep_dense(train)
    plan = MemoryPlan(work, rules.limit(train), given, unshared=tuple(unshared))
    kept = task.compares and not adds_nothing(adapter, {**adapter.defaults, **options})
    copied = 4 * work.trained + work.whole * work.dtype_bytes if kept else 0
    return replace(plan, positions=positions, may_keep_dense=may, copied=copied)


def _drops(options: Mapping[str, Any]) -> bool:
    """Say whether the adapter drops some of its inputs, which methods call after themselves."""
    of_weights = ("module_dropout", "rank_dropout")
    return any(v for n, v in options.items() if n.endswith("_dropout") and n not in of_weights)


def _is_unfused(options: Mapping[str, Any]) -> bool:
    return options.get("init_lora_weights") == "mica" or any(map(options.get, UNFUSED))


def _left_dense(
    spec: Spec, quantizer: Quantizer, shape: Shape, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the names of the linear layers that are left dense by name or size.

    Args:
        config: of a model that is quantized already; else empty.
    """
    skipped = {skip.rpartition(".")[2] for skip in spec.skip_modules or ()}
    skipped |= _not_converted(config, shape.layers)
    return tuple(
        name
        for name, size in _linears(shape).items()
        if skipped & {*name.split("."), _parent(name)}
        or (spec.skip_misfits and quantizer.misfit(*size))
    )


def _not_converted(config: Mapping[str, Any], layers: int) -> set[str]:
    """Return what is called alike in all decoder layers, and not quantized, as a checkpoint's
    config.json has it."""
    found: dict[str, set[str]] = {}
    lists = [(quantization_in(config) or {}).get(key) for key in _NOT_CONVERTED]
    names = [str(name) for names in lists if isinstance(names, list) for name in names]
    for name in names:
        if tower_of(f"{name}.") != "language":
            continue  # whose layers are often called alike
        of_layer = re.search(r"\.(\d+)\.", name)
        numbers = [of_layer[1]] if of_layer else map(str, range(layers))
        found.setdefault(name.rpartition(".")[2], set()).update(numbers)
    return {kind for kind, numbers in found.items() if len(numbers) >= layers}


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the sizes of the linear layers of all kinds of decoder layers."""
    return shape.of_plain_layers.linears | shape.linears if shape.plain_layers else shape.linears


def _bits(
    quantizer: Quantizer, layers: Mapping[str, tuple[int, int]], dense: Sequence[str], dtype: str
) -> dict[str, float] | None:
    """Return the bits per weight of each linear layer; None where the backend does not tell."""
    found: dict[str, float] = {}
    for name, size in layers.items():
        if name in dense:
            found[name] = 8.0 * _bytes(dtype)
            continue
        bits = quantizer.bits_per_weight(*size, device="cuda", dtype=dtype)
        if bits is None:
            return None
        found[name] = bits
    return found


def _others(
    quantizer: Quantizer, beside: Beside, shape: Shape, dtype: str
) -> tuple[tuple[int, float], ...] | None:
    """Return (weights, bits of each) of the quantized layers beside those of the decoder, as
    `_bits`."""
    counts = {f"{i} x {o}": (i * o * count, (i, o)) for (i, o), count in beside.quantized.items()}
    if beside.head:
        counts[HEAD] = (shape.hidden * shape.vocab, (shape.hidden, shape.vocab))
    bits = _bits(quantizer, {name: size for name, (_, size) in counts.items()}, (), dtype)
    if bits is None:
        return None
    return tuple((int(weights), bits[name]) for name, (weights, _) in counts.items())


def _targets(
    shape: Shape, options: Mapping[str, Any], left: Sequence[str], *, experts: bool
) -> tuple[str, ...]:
    """Return the linear layers that the adapter's options name; all of them where the names are
    those of another architecture. Without `experts` the adapter goes onto none of those; nor onto
    layers that are `left` dense, unless it names them."""
    wanted, parameters = options.get("target_modules"), options.get("target_parameters") or ()
    names = tuple(name for name in _linears(shape) if experts or name not in STACKS)
    named = {name for name in names if name in STACKS and _ends_in(name, parameters)}
    if isinstance(wanted, str) and wanted != "all-linear":
        pattern = re.compile(wanted)
        found = tuple(n for n in names if pattern.fullmatch(f"model.layers.0.{_parent(n)}.{n}"))
    elif wanted and wanted != "all-linear":
        layers = [name for name in names if name not in STACKS]
        endings = {str(name).rpartition(".")[2] for name in wanted}
        of_layers = {name for name in layers if _ends_in(name, endings)}
        # A name that layers and experts share stands for the layers.
        rest = endings - {name.rpartition(".")[2] for name in of_layers}
        of_stacks = {n for n in names if n in STACKS and rest & set(n.split("."))}
        found = tuple(name for name in names if name in of_layers | of_stacks | named)
    else:
        found = tuple(name for name in names if name not in left)
    return found or names


def _tables(
    shape: Shape, options: Mapping[str, Any], *, packs_head: bool = False
) -> tuple[Layer, ...]:
    """Return the embedding and the head where the adapter's options name them in a list; a head
    that is quantized is one of all linear layers."""
    wanted = options.get("target_modules")
    names = [] if wanted is None or isinstance(wanted, str) else wanted
    if packs_head and (wanted is None or is_all_linear(wanted)):
        names = [HEAD]
    both = (Layer(_EMBEDDING, shape.vocab, shape.hidden), Layer(HEAD, shape.hidden, shape.vocab))
    return tuple(layer for layer in both if _ends_in(layer.name, names))


def _of_towers(beside: Beside, tower: Tower | None, options: Mapping[str, Any]) -> Iterable[Layer]:
    """Return the layers of towers that the adapter's options stand for; all of one that sees where
    they name some, whose names are not known here."""
    wanted = options.get("target_modules")
    if not (wanted is None or is_all_linear(wanted)):
        return tower.adapted if tower else []
    sizes = enumerate(beside.quantized.items())
    return [Layer(f"tower.{n}", i, o, blocks=round(count)) for n, ((i, o), count) in sizes]


def _makes_logits(shape: Shape, options: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Say if the model itself makes all logits, as tokens of the head are trained, or it scales
    them in a way that TRL's loss does not know."""
    unknown = (name for name in SCALED_LOGITS if name not in TRL_SCALES)
    tokens = shape.tied and options.get("trainable_token_indices")
    return bool(tokens) or any(config.get(name) is not None for name in unknown)


def _has_own_loss(config: Mapping[str, Any]) -> bool:
    """Say if the loss of a model with this config has parts that only its own forward makes."""
    routers = config.get("output_router_logits") and config.get("model_type") not in TRL_ROUTERS
    return bool(routers or config.get("z_loss_coefficient"))


def _trained_whole(shape: Shape, options: Mapping[str, Any]) -> int:
    """Return how many weights the modules have that `modules_to_save` names; of those that are not
    known here, none."""
    sizes = dict.fromkeys((_EMBEDDING, HEAD), shape.vocab * shape.hidden)
    layers = {name.rpartition(".")[2]: i * o for name, (i, o) in shape.linears.items()}
    sizes |= {name: shape.layers * numbers for name, numbers in layers.items()}
    names = {str(name).rpartition(".")[2] for name in options.get("modules_to_save") or ()}
    return sum(sizes.get(name, 0) for name in names)


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return name.rpartition(".")[2] in {str(ending).rpartition(".")[2] for ending in endings}


def _parent(name: str) -> str:
    return "self_attn" if name in _ATTENTION else "mlp"


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
