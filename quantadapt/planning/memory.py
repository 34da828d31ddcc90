"""The plan's part on memory: what a run will need, on which cards it fits, and what else would.

As pure as the plan: reads the model's config alone, imports neither torch nor a vendor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Problem
from ..memory import rules
from ..memory.cards import CONTEXT, FRAGMENTATION, GIB, LONG_ROWS, card_for, size_words, usable
from ..memory.changes import ways_out
from ..memory.setting import Setting
from ..memory.workload import Workload

ERROR = 0.1
"""How far predictions may be off: a run is refused only where it cannot fit all the same."""

MERGE_IN_LESS = (
    "merge afterwards, in CPU memory (quantadapt merge RUN --device cpu) or shard by shard onto"
    " the unquantized base (quantadapt merge RUN --onto BASE)"
)
"""What to do where a GPU does not hold a merged model beside the model."""


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
        recorded: whether passes are recorded as CUDA graphs, where they can be.
        gathered: whether a base that GPUs share stays whole on each while it trains.
        keeps_dense: whether dequantized weights stay while it trains.
        longest: how many tokens of an example memory holds that is alone in its batch, by what is
            streamed of the base; the model may have fewer positions.
    """

    gib: float
    setting: Setting
    needed: int
    budget: int
    most: int
    ways_out: tuple[str, ...] = ()
    streamed: str = "none"
    gathered: bool = False
    recorded: bool = False
    keeps_dense: bool = False
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
        lost = LONG_ROWS if self.setting.offload else FRAGMENTATION
        larger = f"a GPU of {card_for(self.needed, lost) / GIB:.1f} GiB"
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
        may_keep_dense: whether dequantized weights may stay where a card has room.
        copied: bytes of CPU memory that a copy of the adapter's start takes, as a reference.
        positions: tokens that the model has been made for; None where that is not known.
    """

    work: Workload
    limit: int | None = None
    given: Setting | None = None
    cards: tuple[OnCard, ...] = ()
    unshared: tuple[Problem, ...] = ()
    streams: tuple[str, ...] = ()
    may_keep_dense: bool = False
    copied: int = 0
    positions: int | None = None

    def on(self, card: float) -> OnCard:
        """Return what a card of so many bytes means."""
        budget, most = usable(card, limit=self.limit), int(card) - CONTEXT
        least = usable(card, limit=self.limit, lost=LONG_ROWS)
        room = {False: budget, True: least}
        most = most if self.limit is None else min(most, self.limit)
        works = [self.work, *(replace(self.work, streamed=which) for which in self.streams)]
        works = [work.kept_in(most) for work in works]
        longest = {work.streamed: work.longest(least) for work in works}

        def made(work: Workload, setting: Setting, ways: Sequence[str] = ()) -> OnCard:
            there, can = (card / GIB, setting, work.peak(setting)), room[setting.offload]
            how = (work.gathered, work.graphs, work.keeps_dense)
            return OnCard(*there, can, most, tuple(ways), work.streamed, *how, longest)

        for work in works:
            # What was asked for is lowered when memory runs out.
            given = work.in_host_memory(self.given) if self.given else None
            for way in (work, replace(work, graphs=False)) if given else ():
                if given and way.needed(given) <= room[given.offload]:
                    return made(way, given)
            if found := work.fitted(budget, least):
                chosen, setting = found
                if self.may_keep_dense:
                    chosen = chosen.with_dense(setting, budget)
                return made(chosen, setting)
        works = [replace(work, graphs=False) for work in works]
        work = min(works, key=lambda work: work.peak(work.least()))
        return made(work, work.least(), ways_out(work, budget))

    def work_on(self, card: OnCard) -> Workload:
        """Return what training depends on there, with what `on` chose."""
        how = replace(self.work, streamed=card.streamed, gathered=card.gathered)
        return replace(how, graphs=card.recorded, keeps_dense=card.keeps_dense)

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
        work = self.work_on(self.cards[0]) if self.cards else self.work
        return replace(work, length=length).peak(setting) / GIB

    # --- what it comes to --------------------------------------------------------------------

    def problems(self, measures_dense: bool) -> list[Problem]:
        """Return why a run on these cards cannot work; empty if it may.

        Args:
            measures_dense: whether the run also measures the base before it is quantized.
        """
        found = [self.problem(card) for card in self.cards if card.hopeless]
        for card in self.cards:
            if measures_dense and self.work.unquantized_bytes > card.gib * GIB - CONTEXT:
                needed = size_words(self.work.unquantized_bytes)
                what = f"the base takes {needed} before it is quantized, more than the GPU"
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
        what = f"merging takes {size_words(needed)}, the {kind} model beside the quantized one"
        return Problem(what, MERGE_IN_LESS, "export.merge", "merge-needs-memory")

    @property
    def _model_bytes(self) -> int:
        """The model and its adapter, when nothing is done with them."""
        return self.work.quantized_bytes + self.work.dense_bytes + self.work.held_bytes

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
            if card.gathered:
                notes.append(rules.stays_gathered_words(work.gathered_bytes))
            if self._model_bytes + needed > card.budget:
                words = f"evaluating {evaluated} examples at a time needs {size_words(needed)}"
                notes.append(f"{words} more than the model; lower evaluate.batch_size")
            if not card.fits:
                notes.append(f"memory may not suffice: {self._shortage(card)}; {card.fix}")
            elif self.given and card.setting != self.given:
                words = self.describe(self.given)
                notes.append(f"memory may not suffice for what the spec asks for ({words})")
        return notes

    def host_notes(self, host: int | None, processes: int = 1) -> list[str]:
        """Return what a run on these cards should tell of CPU memory.

        Args:
            host: bytes of it that are free; None where they are not known.
            processes: how many of this machine keep a base there, if it is streamed, and inputs.
        """
        notes = []
        for card in self.cards if host is not None else ():
            work = self.work_on(card)
            inputs = processes * work.offloaded_bytes(card.setting)
            bases, copies = processes * work.host_bytes, processes * self.copied
            taken = inputs + bases + copies + rules.BESIDE
            if host is not None and (inputs or copies) and taken > host:
                parts = {
                    "inputs of layers take": inputs,
                    "what is streamed": bases,
                    "the adapter's start, as a reference": copies,
                    "the process": rules.BESIDE,
                }
                words = [f"{name} {size_words(size)}" for name, size in parts.items() if size]
                words[0] += " of it"
                free = f"{size_words(host)} are free"
                free += "; lower data.max_length" if inputs else ""
                notes.append(f"CPU memory may not suffice: {', '.join(words)}, and {free}")
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
        return f"{size_words(self.work.peak(setting))}: {self.describe(setting)}"

    def _on_card(self, card: OnCard) -> str:
        """Return a card's setting in words."""
        words, work = self.describe(card.setting), self.work_on(card)
        if card.gathered:
            words += f", the base gathered while it trains ({size_words(work.gathered_bytes)})"
        if card.keeps_dense:
            words += f", dequantized weights kept ({size_words(work.dequantized_bytes)})"
        return words if card.streamed == "none" else f"{words}, {streamed_words(work)}"

    def _card_words(self, card: OnCard) -> str:
        if card.fits:
            needed = size_words(card.needed)
            words = f"fits {card.gib:.4g} GiB: yes, with {self._on_card(card)}: {needed}"
            return f"{words}; {self._longest_words(card)}"
        return f"fits {card.gib:.4g} GiB: no, {self._shortage(card)}; {card.fix}"

    def _longest_words(self, card: OnCard) -> str:
        """Say how long the longest example may be that fits, what of CPU memory that takes, and
        how long the model has been made for."""
        found, most = [], 0
        for way, tokens in card.longest.items():
            work = replace(self.work, streamed=way, batch=1, length=tokens)
            host = work.host_bytes + work.offloaded_bytes(work.settings()[-1])
            if tokens > most:  # streaming that makes room for no more is no way to more
                most = tokens
                how = "" if way == "none" else f"{streamed_of(way)} streamed, "
                found.append(f"{tokens:,} tokens ({how}{size_words(host)} of CPU memory)")
        words = f"longest example, alone in its batch: {' or '.join(found)}"
        if self.positions is None:
            return words
        return f"{words}; the model has been made for {self.positions:,} positions"

    def _shortage(self, card: OnCard) -> str:
        return (
            f"training needs at least {size_words(card.needed)} ({self._on_card(card)}) of the"
            f" {size_words(card.budget)} that it can have there"
        )

    def _parts_gib(self, card: OnCard) -> dict[str, float]:
        parts = self.work_on(card).parts(card.setting)
        return {name: size / GIB for name, size in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "batch": self.work.batch,
            "length": self.work.length,
            "layers": self.work.shape.layers,
            "positions": self.positions,
            "words": self.words(),
            "cards": [
                {
                    "gib": card.gib,
                    "fits": card.fits,
                    "peak_gib": card.needed / GIB,
                    "setting": vars(card.setting),
                    "streamed": card.streamed,
                    "gathered": card.gathered,
                    "recorded": card.recorded,
                    "keeps_dense": card.keeps_dense,
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
    size = f"{size_words(work.streamed_bytes)} {place}"
    return f"{streamed_of(work.streamed)} streamed from {size}"


def streamed_of(which: str) -> str:
    """Return what is streamed, in words."""
    return "the experts" if which == "experts" else "the base"
