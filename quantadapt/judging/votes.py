"""Votes of people on pairs: which is shown to whom, in what order, and what they said."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import DataError, OutputError
from ..folders.lines import lines_of
from ..inputs.documents import parsed
from .pairs import Pair
from .scores import Game, Interval, Outcome, agreements, elo, fleiss_kappa

VOTES = "votes.jsonl"
JUDGE = "the judge"
"""What a judge is called among the voters."""
_BEGIN = b'{"pair": '
"""How a line of the file begins."""
Side = Literal["left", "right", "tie"]
_SCORE: dict[str, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Vote:
    """What somebody says of a pair.

    Attributes:
        pair: its id.
        vote: which answer is better.
        left: which answer stood on the left.
        time: when, in UTC.
    """

    pair: str
    voter: str
    vote: Outcome
    left: Literal["a", "b"]
    time: str = ""


class Votes:
    """A file of votes, a line each; every one is on the disk before the next is shown.

    One process at a time may hold it; threads may share it.

    Raises:
        DataError: a line is no vote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._votes = {(vote.voter, vote.pair): vote for vote in read_votes(path)}

    def of(self, voter: str) -> set[str]:
        """Return the pairs that somebody has voted on."""
        with self._lock:
            return {pair for name, pair in self._votes if name == voter}

    def add(self, vote: Vote) -> bool:
        """Write a vote down; not if there is one of the same voter on the same pair.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            if (vote.voter, vote.pair) in self._votes:
                return False
            self._append(
                f"{json.dumps(asdict(vote), ensure_ascii=False)}\n".encode(
                    errors="backslashreplace"
                )
            )
            self._votes[vote.voter, vote.pair] = vote
            return True

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                start = file.tell()
                whole = self.path.read_bytes().rfind(b"\n") + 1
                if whole != start:  # half a line of a process that died
                    file.truncate(whole)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(whole)
                    raise
        except OSError as error:
            what = f"a vote cannot be written: {(error.strerror or str(error)).lower()}"
            raise OutputError(what, fix="make room", where=str(self.path)) from None


def read_votes(path: Path) -> list[Vote]:
    """Return the votes of a file; none where there is no file. Half a line at the end is none.

    Raises:
        DataError: a line is no vote.
    """
    if not os.path.lexists(path):
        return []
    *lines, half = lines_of(path, DataError)
    found = [_vote(line) for line in lines]
    if not half.startswith(_BEGIN[: len(half)]):  # it would be cut off as half a vote
        found.append(None)
    if None in found:
        fix, number = "remove the line, or name another file with --votes", found.index(None) + 1
        raise DataError("it is no vote", fix=fix, where=f"{path}:{number}")
    return [vote for vote in found if vote is not None]


def _vote(line: bytes) -> Vote | None:
    """Return the vote that a line is, or None."""
    try:
        vote = Vote(**parsed(line))
    except (ValueError, TypeError):
        return None
    words = all(isinstance(value, str) for value in asdict(vote).values())
    return vote if words and vote.vote in get_args(Outcome) and vote.left in ("a", "b") else None


@dataclass(frozen=True)
class Ballot:
    """The pairs, as each voter gets them: in an order and with sides of their own, by the seed.

    Pairs whose answers are the same are shown to nobody.
    """

    pairs: Mapping[str, Pair]
    seed: int = 0

    @classmethod
    def of(cls, pairs: Iterable[Pair], seed: int = 0) -> Ballot:
        """Return the ballot of pairs, which may come from several files."""
        return cls({p.id: p for p in pairs if p.answer_a != p.answer_b}, seed)

    def next_for(self, voter: str, done: set[str]) -> Pair | None:
        """Return what to show to a voter who has voted on `done`; None at the end."""
        order = sorted(self.pairs)
        random.Random(f"{self.seed} {voter}").shuffle(order)
        return next((self.pairs[pair] for pair in order if pair not in done), None)

    def left(self, voter: str, pair: Pair) -> Literal["a", "b"]:
        """Return which answer stands on the left for a voter."""
        return "a" if random.Random(f"{self.seed} {voter} {pair.id}").random() < 0.5 else "b"

    def vote(self, voter: str, pair: Pair, side: Side) -> Vote:
        """Return what a voter says who prefers a side."""
        left = self.left(voter, pair)
        other: Literal["a", "b"] = "b" if left == "a" else "a"
        vote: Outcome = {"left": left, "right": other, "tie": "tie"}[side]  # type: ignore[assignment]
        return Vote(pair.id, voter, vote, left, datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Tally:
    """What votes come to.

    Attributes:
        votes: how many there are on the pairs.
        others: how many there are on other pairs, which do not count.
        by_voter: how many each has given.
        ratings: Elo by model.
        kappas: Cohen's kappa of each two voters, with the number of pairs that both voted on.
        fleiss: Fleiss' kappa of all people; None where no pair has several votes.
        left: share of the votes for a side that were for the left.
    """

    votes: int
    others: int
    by_voter: Mapping[str, int]
    ratings: Mapping[str, Interval]
    kappas: Mapping[tuple[str, str], tuple[float | None, int]]
    fleiss: float | None
    left: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        kappas = [
            {"voters": list(names), "kappa": kappa, "pairs": count}
            for names, (kappa, count) in self.kappas.items()
        ]
        ratings = {name: asdict(rating) for name, rating in self.ratings.items()}
        return {**asdict(self), "ratings": ratings, "kappas": kappas}


def tally(
    pairs: Iterable[Pair], votes: Sequence[Vote], judged: Mapping[str, Outcome] | None = None
) -> Tally:
    """Return what votes come to.

    Args:
        judged: what a judge made of the pairs, which counts for agreement alone.
    """
    known = {pair.id: pair for pair in pairs}
    given = [vote for vote in votes if vote.pair in known]
    by_voter: dict[str, dict[str, Outcome]] = {}
    by_pair: dict[str, list[Outcome]] = {}
    for vote in given:
        by_voter.setdefault(vote.voter, {})[vote.pair] = vote.vote
        by_pair.setdefault(vote.pair, []).append(vote.vote)
    voters = {**by_voter, **({JUDGE: judged} if judged else {})}
    kappas = {
        names: (kappa, count)
        for names, kappa in agreements(voters).items()
        if (count := len(voters[names[0]].keys() & voters[names[1]].keys()))
    }
    games = [Game(known[v.pair].a, known[v.pair].b, _SCORE[v.vote]) for v in given]
    sides = [vote.vote == vote.left for vote in given if vote.vote != "tie"]
    return Tally(
        votes=len(given),
        others=len(votes) - len(given),
        by_voter={name: len(found) for name, found in by_voter.items()},
        ratings=elo(games) if games else {},
        kappas=kappas,
        fleiss=fleiss_kappa(by_pair),
        left=sum(sides) / len(sides) if sides else None,
    )
