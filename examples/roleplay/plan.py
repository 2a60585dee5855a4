"""What users will do, drawn from a seed: when they come, whom they talk to, what they say, when they leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from random import Random
from typing import Final

MAX_TURNS: Final = 8
# A geometric law: after each turn the user goes on with this probability, up to MAX_TURNS.
_GO_ON: Final = 0.6
MEAN_TURNS: Final = (1 - _GO_ON**MAX_TURNS) / (1 - _GO_ON)
_ZIPF_EXPONENT: Final = 1.1
# Bytes: median, sigma of the logarithm, least, most.
_STORY: Final = (180.0, 0.9, 0, 2000)
_MESSAGE: Final = (70.0, 0.8, 8, 800)
_REPLY: Final = (90.0, 0.6, 8)
_THINK_SECONDS: Final = (1.5, 0.7, 0.1, 15.0)
_PATIENCE_SIGMA: Final = 0.5
_TEXT: Final = """
the a and but then lantern harbour ledger she he they we said asked whispered kept lost found old salt brass velvet
door letter storm map key throne engine river coat train clock rumour debt promise winter under behind between never
always perhaps tell me about your ship name sister plan night before after why did you leave what do we do now
"""
_WORDS: Final = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Habits:
    """How users behave.

    `rate` is mean requests per second; `patience_s` the median wait that they bear for a first token; `leave` the part
    of replies that is left half-read; `max_tokens` the most that they ask for.
    """

    rate: float
    patience_s: float
    leave: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that a user says. `leaves_after` is after how many frames of the reply the user is gone; None stays.

    `think_s` passes before the turn.
    """

    text: str
    max_tokens: int
    patience_s: float
    leaves_after: int | None
    think_s: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user. `model` and `persona` count from 0 in the service's lists; `at_s` is seconds after the beginning."""

    number: int
    at_s: float
    model: int
    persona: int
    turns: tuple[Turn, ...]


def conversations(habits: Habits, seed: int, models: int, personas: int) -> Iterator[Conversation]:
    """Yield conversations without end, by the time at which they begin.

    Each is drawn from `seed` and its own number alone: what one user does never depends on how fast others were served.
    """
    arrivals = Random(f"{seed} arrivals")
    popularity = list(accumulate(zipf_weights(personas)))
    at_s = 0.0
    for number in count():
        at_s += arrivals.expovariate(habits.rate / MEAN_TURNS)
        rng = Random(f"{seed} {number}")
        model = rng.randrange(models)
        (persona,) = rng.choices(range(personas), cum_weights=popularity) if personas else (0,)
        yield Conversation(number, at_s, model, persona, tuple(_turns(rng, habits)))


def zipf_weights(size: int) -> list[float]:
    """Return the popularity of `size` things by rank, most popular first."""
    return [(rank + 1) ** -_ZIPF_EXPONENT for rank in range(size)]


def log_normal(rng: Random, median: float, sigma: float, least: float, most: float) -> float:
    """Return a log-normal number, held between `least` and `most`."""
    return min(max(rng.lognormvariate(math.log(median), sigma), least), most)


def trim(history: Sequence[tuple[str, str]], room: int) -> list[tuple[str, str]]:
    """Return the end of `history` that has at most `room` bytes and begins with what a user said.

    The last turn is kept whatever its size. Role-play front ends do the same when a story outgrows the context: it
    costs them the prefix cache.
    """
    kept = list(history)
    while len(kept) > 1 and sum(len(text) + 2 for _, text in kept) > room:
        del kept[:2]
    return kept


def _turns(rng: Random, habits: Habits) -> Iterator[Turn]:
    for index in range(MAX_TURNS):
        story = log_normal(rng, *_STORY) if index == 0 else 0
        text = _text(rng, int(story + log_normal(rng, *_MESSAGE)))
        tokens = int(log_normal(rng, *_REPLY, habits.max_tokens))
        leaves = rng.random() < habits.leave
        after = rng.randint(1, max(1, tokens // 2))
        patience = rng.lognormvariate(math.log(habits.patience_s), _PATIENCE_SIGMA)
        think = log_normal(rng, *_THINK_SECONDS) if index else 0.0
        yield Turn(text, min(max(1, tokens), habits.max_tokens), patience, after if leaves else None, think)
        if rng.random() >= _GO_ON:
            return


def _text(rng: Random, size: int) -> str:
    words: list[str] = []
    length = 0
    while length < size:
        words.append(rng.choice(_WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)[: max(1, size)]
