"""The plan's part on memory: what a run will need, on which cards it fits, and what else would.

As pure as the plan: reads the model's config alone, imports neither torch nor a vendor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Problem
from ..memory import rules
from ..memory.changes import ways_out
from ..memory.experts import STACKS
from ..memory.shape import Shape
from ..memory.towers import Tower
from ..memory.workload import CONTEXT, GIB, Setting, Workload, card_for, usable
from ..protocols import Quantizer, Task
from ..records import Adapter
from ..spec import Spec
from .context_parallel import row_shares
from .on_disk import quantization_in

ERROR = 0.1
"""How far predictions may be off: a run is refused only where it cannot fit all the same."""

MERGE_IN_LESS = (
    "merge afterwards, in CPU memory (quantadapt merge RUN --device cpu) or shard by shard onto"
    " the unquantized base (quantadapt merge RUN --onto BASE)"
)
"""What to do where a GPU does not hold a merged model beside the model."""

_NOT_CONVERTED = ("modules_to_not_convert", "ignore", "skip_modules", "llm_int8_skip_modules")
"""What lists of the layers that are not quantized are called in `quantization_config`."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
UNFUSED = (
    *("lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("use_bdlora", "velora_config"),
)
"""Options of LoRA that `adapting.fused` leaves to PEFT, beside a start that PEFT calls MiCA."""


@dataclass(frozen=True)
class OnCard:
    """What a card of `gib` GiB means for a run.

    Attributes:
        setting: what the run is expected to begin with; where nothing fits, what needs the least.
        needed: bytes that takes.
        budget: bytes that can be allocated, with a reserve.
        most: bytes that can be allocated if nothing is lost.
        ways_out: where nothing fits, what would.
        streamed: what of the base lies in CPU memory then: "none", "experts" or "all".
        longest: how many tokens an example may have that is alone in its batch, by what is streamed
            of the base.
    """

    gib: float
    setting: Setting
    needed: int
    budget: int
    most: int
    ways_out: tuple[str, ...] = ()
    streamed: str = "none"
    longest: Mapping[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the prediction stays within the card."""
        return self.needed <= self.budget

    @property
    def hopeless(self) -> bool:
        """Whether it would be too much even if the prediction is off and nothing is lost."""
        return self.needed * (1 - ERROR) > self.most

    @property
    def fix(self) -> str:
        """The way out where nothing fits."""
        larger = f"a GPU of {card_for(self.needed) / GIB:.1f} GiB"
        return "what fits: " + ", or ".join([*self.ways_out, larger])


@dataclass(frozen=True)
class MemoryPlan:
    """What training will need.

    Attributes:
        work: what that depends on.
        limit: bytes that `train.memory` allows, or None.
        given: the setting that the spec asks for, or None where it is left to the card.
        cards: the machine's card, or those that were asked about.
        unshared: why several GPUs cannot share the base; empty if they can.
        streams: what may be streamed of the base where it does not fit otherwise, least first.
    """

    work: Workload
    limit: int | None = None
    given: Setting | None = None
    cards: tuple[OnCard, ...] = ()
    unshared: tuple[Problem, ...] = ()
    streams: tuple[str, ...] = ()

    def on(self, card: float) -> OnCard:
        """Return what a card of so many bytes means."""
        budget, most = usable(card, limit=self.limit), int(card) - CONTEXT
        most = most if self.limit is None else min(most, self.limit)
        works = [self.work, *(replace(self.work, streamed=which) for which in self.streams)]
        longest = {work.streamed: work.longest(budget) for work in works}
        for work in works:
            # What was asked for is lowered when memory runs out.
            given = self.given if self.given and work.peak(self.given) <= budget else None
            if setting := given or work.fit(budget):
                needed, way = work.peak(setting), work.streamed
                return OnCard(card / GIB, setting, needed, budget, most, (), way, longest)
        work = min(works, key=lambda work: work.peak(work.least()))
        least, ways = work.least(), tuple(ways_out(work, budget))
        needed, way = work.peak(least), work.streamed
        return OnCard(card / GIB, least, needed, budget, most, ways, way, longest)

    def with_cards(self, cards: Sequence[float]) -> MemoryPlan:
        """Return the plan for cards of so many bytes."""
        return replace(self, cards=tuple(self.on(card) for card in cards))

    def shared_by(self, count: int) -> MemoryPlan:
        """Return the plan for that many GPUs, each of which has a share of the base."""
        shared = replace(self, work=replace(self.work, shards=count))
        return shared.with_cards([card.gib * GIB for card in self.cards])

    def streamed_as(self, which: str) -> MemoryPlan:
        """Return the plan with that much of the base in CPU memory."""
        streamed = replace(self, work=replace(self.work, streamed=which), streams=())
        return streamed.with_cards([card.gib * GIB for card in self.cards])

    def fits_better_than(self, other: MemoryPlan) -> OnCard | None:
        """Return the first card on which this plan fits and another for the same cards does not."""
        pairs = zip(self.cards, other.cards, strict=True)
        return next((mine for mine, its in pairs if mine.fits and not its.fits), None)

    @property
    def why_whole(self) -> str:
        """Why several GPUs cannot share the base, with the rules that say so."""
        reasons = (f"{reason.what} [rule {reason.rule}]" for reason in self.unshared)
        return f"several GPUs cannot share the base, because {'; '.join(reasons)}"

    def peak_gib(self, setting: Setting, length: int) -> float:
        """Return the prediction for a run whose longest example has `length` tokens."""
        return replace(self.work, length=length).peak(setting) / GIB

    # --- what it comes to --------------------------------------------------------------------

    def problems(self, measures_dense: bool) -> list[Problem]:
        """Return why a run on these cards cannot work; empty if it may.

        Args:
            measures_dense: whether the run also measures the base before it is quantized.
        """
        found = [self.problem(card) for card in self.cards if card.hopeless]
        for card in self.cards:
            if measures_dense and self.work.unquantized_bytes > card.gib * GIB - CONTEXT:
                needed = self.work.unquantized_bytes / GIB
                what = f"the base takes {needed:.1f} GiB before it is quantized, more than the GPU"
                fix = "set evaluate.unquantized: false, so that it is not measured"
                found.append(Problem(what, fix, where="evaluate.unquantized"))
        return found

    def merge_problem(self) -> Problem | None:
        """Return why no card holds a dense merged model beside the model; None if one may."""
        return self._merge_problem(self.work.unquantized_bytes, "dense")

    def requantize_problem(self) -> Problem | None:
        """Return why no card holds a merged model that is quantized again beside a streamed one,
        whose merged layers are not streamed; None if one may."""
        whole = replace(self.work, streamed="none")
        return self._merge_problem(whole.quantized_bytes + whole.dense_bytes, "merged")

    def _merge_problem(self, merged: int, kind: str) -> Problem | None:
        needed = self._model_bytes + merged
        if not self.cards or any(needed * (1 - ERROR) <= c.gib * GIB - CONTEXT for c in self.cards):
            return None
        what = f"merging takes {needed / GIB:.1f} GiB, the {kind} model beside the quantized one"
        return Problem(what, MERGE_IN_LESS, "export.merge", "merge-needs-memory")

    @property
    def _model_bytes(self) -> int:
        """The model and its adapter, when nothing is done with them."""
        return self.work.quantized_bytes + self.work.dense_bytes + 4 * self.work.trained

    def problem(self, card: OnCard) -> Problem:
        """Return the refusal for a card on which nothing fits."""
        what = f"a GPU of {card.gib:.4g} GiB is too small: {self._shortage(card)}"
        if self.unshared:
            what += f"; {self.why_whole}"
        return Problem(what, card.fix, where="train.memory")

    def notes(self, evaluated: int) -> list[str]:
        """Return what else a run on these cards should tell.

        Args:
            evaluated: examples per forward pass when the model is evaluated.
        """
        notes = []
        work = self.work
        needed = work.evaluation_bytes(evaluated)
        for card in self.cards:
            if self._model_bytes + needed > card.budget:
                words = f"evaluating {evaluated} examples at a time needs {needed / GIB:.1f} GiB"
                notes.append(f"{words} more than the model; lower evaluate.batch_size")
            if not card.fits:
                notes.append(f"memory may not suffice: {self._shortage(card)}; {card.fix}")
            elif self.given and card.setting != self.given:
                words = self.describe(self.given)
                notes.append(f"memory may not suffice for what the spec asks for ({words})")
        return notes

    def host_notes(self, host: int | None) -> list[str]:
        """Return what a run on these cards should tell of `host` bytes of CPU memory, where it is
        known how many there are."""
        notes = []
        for card in self.cards if host is not None else ():
            inputs = self.work.offloaded_bytes(card.setting)
            if host is not None and inputs > host:
                words = f"inputs of layers take {inputs / GIB:.1f} GiB of it"
                free = f"{host / GIB:.1f} are free; lower data.max_length"
                notes.append(f"CPU memory may not suffice: {words}, and {free}")
        return notes

    def words(self) -> list[str]:
        """Return one line per card; without any, what a GPU would need."""
        if self.cards:
            return [self._card_words(card) for card in self.cards]
        first, least = self.given or self.work.settings()[0], self.work.least()
        lines = [f"on a GPU {self._needs(first)}"]
        if self.work.peak(least) < self.work.peak(first):
            lines.append(f"at least {self._needs(least)}")
        return lines

    def describe(self, setting: Setting) -> str:
        """Return a setting in words."""
        return setting.describe(self.work.shape.layers, self.work.batch)

    def _needs(self, setting: Setting) -> str:
        return f"{self.work.peak(setting) / GIB:.2f} GiB: {self.describe(setting)}"

    def _on_card(self, card: OnCard) -> str:
        """Return a card's setting in words."""
        words = self.describe(card.setting)
        if card.streamed == "none":
            return words
        return f"{words}, {streamed_words(replace(self.work, streamed=card.streamed))}"

    def _card_words(self, card: OnCard) -> str:
        if card.fits:
            needed = f"{card.needed / GIB:.1f} GiB"
            words = f"fits {card.gib:.4g} GiB: yes, with {self._on_card(card)}: {needed}"
            return f"{words}; {self._longest_words(card)}"
        return f"fits {card.gib:.4g} GiB: no, {self._shortage(card)}; {card.fix}"

    def _longest_words(self, card: OnCard) -> str:
        """Say how long the longest example may be that fits, and what of CPU memory that takes."""
        found = []
        for way, tokens in card.longest.items():
            work = replace(self.work, streamed=way, batch=1, length=tokens)
            host = work.host_bytes + work.offloaded_bytes(work.settings()[-1])
            if tokens:
                how = "" if way == "none" else f"{streamed_of(way)} streamed, "
                found.append(f"{tokens:,} tokens ({how}{host / GIB:.1f} GiB of CPU memory)")
        return f"longest example, alone in its batch: {' or '.join(found)}"

    def _shortage(self, card: OnCard) -> str:
        needed, there = card.needed / GIB, card.budget / GIB
        return (
            f"training needs at least {needed:.1f} GiB ({self._on_card(card)}) of the"
            f" {there:.1f} GiB that it can have there"
        )

    def _parts_gib(self, card: OnCard) -> dict[str, float]:
        parts = replace(self.work, streamed=card.streamed).parts(card.setting)
        return {name: size / GIB for name, size in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "batch": self.work.batch,
            "length": self.work.length,
            "layers": self.work.shape.layers,
            "words": self.words(),
            "cards": [
                {
                    "gib": card.gib,
                    "fits": card.fits,
                    "peak_gib": card.needed / GIB,
                    "setting": vars(card.setting),
                    "streamed": card.streamed,
                    "longest": dict(card.longest),
                    "parts_gib": self._parts_gib(card),
                    "ways_out": list(card.ways_out),
                }
                for card in self.cards
            ],
        }


def streamed_words(work: Workload) -> str:
    """Say what of the base is streamed, and from where."""
    place = "on disk" if work.from_disk else "of CPU memory"
    size = f"{work.streamed_bytes / GIB:.1f} GiB {place}"
    return f"{streamed_of(work.streamed)} streamed from {size}"


def streamed_of(which: str) -> str:
    """Return what is streamed, in words."""
    return "the experts" if which == "experts" else "the base"


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
    beside: int = 0,
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
        beside: how many weights the model has beside its language model.
        streamable: whether the base can be kept in CPU memory.
    """
    shape, its_teacher = Shape.of(config), task.teacher_config(config)
    teacher = None if its_teacher is None else Shape.of(its_teacher)
    if shape is None or (its_teacher is not None and teacher is None):
        return None
    left = _left_dense(spec, quantizer, shape, config if adopt else {})
    dense = left if quantizer.quantizes_experts else (*left, *STACKS)
    bits = _bits(quantizer, shape, dense, dtype)
    if bits is None:
        return None
    train = spec.train
    lora = adapter.peft_type == "LORA"
    seen = (config, spec.data.max_length, spec.data.max_pixels)
    tower = Tower.of(*seen) if "vision" in spec.towers else None
    length = train.row_length or spec.data.max_length
    work = Workload(
        shape=shape,
        bits=bits,
        targets=_targets(shape, options, left, experts=adapter.experts),
        rank=int(options.get("init_r") or options.get("r") or 0),
        optim=train.optim,
        dtype_bytes=_bytes(dtype),
        batch=train.per_device_train_batch_size,
        length=length,
        dropout=bool(options.get("lora_dropout")),
        fused_adapter=lora and not _is_unfused(options),
        dora=lora and bool(options.get("use_dora")),
        fused_kernels=rules.fused_kernels(train),
        splits=rules.splits(
            *(task, train),
            adds_to_loss=adapter.peft_type == "ADALORA",
            routers=bool(config.get("output_router_logits")),
        ),
        accumulates=train.gradient_accumulation_steps > 1,
        dense=dense,
        shardable=not unshared,
        streamable=streamable,
        from_disk=train.stream_folder is not None,
        prefetches=train.memory != "min",
        graphs=rules.records(task, train),
        sequences=task.sequences,
        whole_logits=task.logits == "whole",
        teacher=teacher,
        beside=beside,
        tower=tower,
        rounds=train.merge_aware,
        float8=train.compute == "fp8",
        packed=bool(train.packing),
        contexts=train.context_parallel_size,
        in_parts=quantizer.target.reads_rows,
        row_shares=row_shares(train, task, config, options, length),
    )
    given = rules.given(train, shape.layers, shape.layers - 1, offloads=True)
    return MemoryPlan(work, rules.limit(train), given, unshared=tuple(unshared))


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
    for name in (str(name) for names in lists if isinstance(names, list) for name in names):
        of_layer = re.search(r"\.(\d+)\.", name)
        numbers = [of_layer[1]] if of_layer else map(str, range(layers))
        found.setdefault(name.rpartition(".")[2], set()).update(numbers)
    return {kind for kind, numbers in found.items() if len(numbers) >= layers}


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the sizes of the linear layers of all kinds of decoder layers."""
    return shape.of_plain_layers.linears | shape.linears if shape.plain_layers else shape.linears


def _bits(
    quantizer: Quantizer, shape: Shape, dense: Sequence[str], dtype: str
) -> dict[str, float] | None:
    """Return the bits per weight of each linear layer; None where the backend does not tell."""
    found: dict[str, float] = {}
    for name, size in _linears(shape).items():
        if name in dense:
            found[name] = 8.0 * _bytes(dtype)
            continue
        bits = quantizer.bits_per_weight(*size, device="cuda", dtype=dtype)
        if bits is None:
            return None
        found[name] = bits
    return found


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


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return name.rpartition(".")[2] in {str(ending).rpartition(".")[2] for ending in endings}


def _parent(name: str) -> str:
    return "self_attn" if name in _ATTENTION else "mlp"


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
