"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from examples.roleplay.model import Floats
from examples.roleplay.tokens import END


@dataclass(frozen=True, slots=True)
class Choice:
    """How the next token of one sequence is chosen.

    `temperature` 0 takes the likeliest token; `top_p` in (0, 1] keeps the likeliest tokens up to that probability;
    `may_end` false never chooses `END`. `random` gives the one number that a choice needs.
    """

    temperature: float
    top_p: float
    may_end: bool
    random: Random


def sample(logits: Floats, choices: Sequence[Choice]) -> list[int]:
    """Return one token for each row of `logits` (rows, vocabulary), chosen as the same place of `choices` says."""
    barred = [row for row, choice in enumerate(choices) if not choice.may_end]
    logits = logits.copy()
    logits[barred, END] = -np.inf
    # Greedy rows are sampled at 1 and then overwritten: no division by 0.
    heat = np.array([choice.temperature or 1.0 for choice in choices], dtype=np.float32)[:, None]
    logits /= heat
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    for row, choice in enumerate(choices):
        if choice.top_p < 1.0:
            _keep_nucleus(weights[row], choice.top_p)
    ladder = weights.cumsum(axis=1)
    tokens = []
    for row, choice in enumerate(choices):
        if choice.temperature == 0.0:
            tokens.append(int(logits[row].argmax()))
            continue
        # "right" never lands on a token of weight 0. random() < 1, but in float32 the product can reach the top.
        token = int(ladder[row].searchsorted(choice.random.random() * float(ladder[row, -1]), side="right"))
        tokens.append(token if token < ladder.shape[1] else int(logits[row].argmax()))
    return tokens


def _keep_nucleus(weights: Floats, top_p: float) -> None:
    """Zero all but the likeliest of `weights` whose sum first reaches `top_p` of the total."""
    order = np.argsort(weights)[::-1]
    reached = weights[order].cumsum()
    kept = int(reached.searchsorted(top_p * float(reached[-1]))) + 1
    weights[order[kept:]] = 0.0
