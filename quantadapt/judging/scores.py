"""What verdicts and votes come to: win rates, agreement and Elo, with bootstrap intervals."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from .verdicts import Verdict

Outcome = Literal["a", "b", "tie"]
RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
_OF_GAMES = 200
"""How many of them are enough for ratings, each of which takes longer."""
_SCORE: dict[Outcome, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}
_ELO = 400 / math.log(10)
_MEAN_ELO = 1000.0


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval: 95% of the resamplings, seeded, lie in it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What a judge found.

    Attributes:
        pairs: how many there are.
        wins_a, wins_b, ties: of those that were judged; a pair counts as won only where the verdict
            is the same in both orders.
        unreadable: verdicts that could not be read; their pairs are not among those.
        consistent: pairs with the same verdict in both orders.
        first, last: pairs where the answer shown first, or last, was preferred both times.
        win_rate: of a, ties counting half; None where nothing was judged.
    """

    pairs: int
    wins_a: int
    wins_b: int
    ties: int
    unreadable: int
    consistent: int
    first: int
    last: int
    win_rate: Interval | None

    @property
    def judged(self) -> int:
        """Pairs with two verdicts that could be read."""
        return self.wins_a + self.wins_b + self.ties


def summary_of(verdicts: Sequence[tuple[Verdict, Verdict]]) -> Summary:
    """Return what the verdicts on pairs come to.

    Args:
        verdicts: of each pair, in the orders "ab" and "ba".
    """
    read = [pair for pair in verdicts if "unreadable" not in pair]
    outcomes = [outcome_of(*pair) for pair in read]
    counts, both = Counter(outcomes), Counter(read)
    return Summary(
        pairs=len(verdicts),
        wins_a=counts["a"],
        wins_b=counts["b"],
        ties=counts["tie"],
        unreadable=sum(pair.count("unreadable") for pair in verdicts),
        consistent=sum(one == other for one, other in read),
        first=both["a", "b"],
        last=both["b", "a"],
        win_rate=win_rate(outcomes) if outcomes else None,
    )


def outcome_of(one: Verdict, other: Verdict) -> Outcome:
    """Return what two verdicts on a pair come to: a win if both say so, else a tie."""
    return one if one == other and one != "unreadable" else "tie"


def win_rate(outcomes: Sequence[Outcome]) -> Interval:
    """Return the share of wins of a, ties counting half."""
    import numpy as np

    scores = np.array([_SCORE[outcome] for outcome in outcomes])
    return bootstrapped(len(scores), lambda drawn: float(scores[drawn].mean()))


def bootstrapped(count: int, statistic: Callable[[Any], float]) -> Interval:
    """Return a statistic over `count` units and its interval; it gets an array of indices."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    drawn = [statistic(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [edge, 100 - edge])
    return Interval(statistic(np.arange(count)), float(low), float(high))


# People -------------------------------------------------------------------------------------------


def cohens_kappa(one: Mapping[str, Outcome], other: Mapping[str, Outcome]) -> float | None:
    """Return how far two voters agree beyond chance on what both have voted on: 1 always, 0 no more
    than by chance; None where they share nothing, or chance alone would always agree."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    same = sum(int(one[pair] == other[pair]) for pair in shared) / len(shared)
    mine, theirs = Counter(one[p] for p in shared), Counter(other[p] for p in shared)
    chance = sum(mine[kind] * theirs[kind] for kind in _SCORE) / len(shared) ** 2
    return None if chance == 1 else (same - chance) / (1 - chance)


def fleiss_kappa(votes: Mapping[str, Sequence[Outcome]]) -> float | None:
    """Return how far any number of voters agree beyond chance, over the pairs that have the most
    votes alike in number, two at least; None where there are none, or chance would always agree."""
    sizes = Counter(len(given) for given in votes.values() if len(given) > 1)
    if not sizes:
        return None
    size = max(sizes, key=lambda number: (sizes[number] * number, number))
    tables = [Counter(given) for given in votes.values() if len(given) == size]
    pairs = size * (size - 1)
    agreed = sum(sum(n * (n - 1) for n in table.values()) / pairs for table in tables)
    mean, total = agreed / len(tables), len(tables) * size
    shares = [sum(table[kind] for table in tables) / total for kind in _SCORE]
    chance = sum(share**2 for share in shares)
    return None if chance == 1 else (mean - chance) / (1 - chance)


def agreements(
    by_voter: Mapping[str, Mapping[str, Outcome]],
) -> dict[tuple[str, str], float | None]:
    """Return Cohen's kappa of each two voters."""
    names = sorted(by_voter)
    return {(a, b): cohens_kappa(by_voter[a], by_voter[b]) for a, b in combinations(names, 2)}


@dataclass(frozen=True)
class Game:
    """A vote as a game between two models; `score` is 1 where `a` won, 0.5 for a tie."""

    a: str
    b: str
    score: float


def elo(games: Sequence[Game]) -> dict[str, Interval]:
    """Return the Elo ratings of models with intervals over resampled games, 1000 on average.

    They are those of the Bradley-Terry model, which depend on no order of the games. Each two that
    met get a tie more, so that who never lost gets no infinite rating.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    ratings, drawn = _ratings(games), defaultdict[str, list[float]](list)
    for _ in range(_OF_GAMES):
        chosen = [games[index] for index in generator.integers(0, len(games), len(games))]
        for name, rating in _ratings(chosen, of=ratings).items():
            drawn[name].append(rating)
    edge = 100 * (1 - LEVEL) / 2
    found = {}
    for name, rating in ratings.items():
        low, high = np.percentile(drawn[name], [edge, 100 - edge])
        found[name] = Interval(rating, float(low), float(high))
    return found


def _ratings(games: Iterable[Game], of: Iterable[str] = ()) -> dict[str, float]:
    """Return Bradley-Terry ratings, by the iteration of Zermelo."""
    wins: dict[tuple[str, str], float] = defaultdict(float)
    for game in games:
        wins[game.a, game.b] += game.score
        wins[game.b, game.a] += 1 - game.score
    for a, b in list(wins):
        wins[a, b] += 0.5
    names = sorted({*of, *(name for pair in wins for name in pair)})
    strength = dict.fromkeys(names, 1.0)
    for _ in range(500):
        before = dict(strength)
        for name in names:
            met = [(b, wins[a, b] + wins[b, a]) for a, b in list(wins) if a == name]
            if met:
                won = sum(wins[name, other] for other, _ in met)
                expected = sum(n / (strength[name] + strength[other]) for other, n in met)
                strength[name] = won / expected
        scale = math.exp(sum(map(math.log, strength.values())) / len(names))
        strength = {name: value / scale for name, value in strength.items()}
        if max(abs(math.log(strength[n] / before[n])) for n in names) < 1e-9:
            break
    return {name: _MEAN_ELO + _ELO * math.log(value) for name, value in strength.items()}
