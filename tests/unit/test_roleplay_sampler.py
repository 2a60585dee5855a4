"""Tokens are chosen with the probabilities that temperature and top-p leave."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from examples.roleplay.sampler import Choice, sample
from examples.roleplay.tokens import END, VOCABULARY


def logits_of(**probabilities: float) -> np.ndarray:
    logits = np.full((1, VOCABULARY), -np.inf, dtype=np.float32)
    for name, probability in probabilities.items():
        logits[0, END if name == "END" else ord(name)] = np.log(probability)
    return logits


def shares(logits: np.ndarray, count: int, **choice: float) -> dict[str, float]:
    rng = Random(23)
    rows = np.repeat(logits, count, axis=0)
    options = Choice(choice.get("temperature", 1.0), choice.get("top_p", 1.0), bool(choice.get("may_end", True)), rng)
    tokens = sample(rows, [options] * count)
    return {("END" if token == END else chr(token)): tokens.count(token) / count for token in set(tokens)}


def test_shares_follow_the_probabilities() -> None:
    seen = shares(logits_of(a=0.5, b=0.3, c=0.2), 20011)
    assert seen == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2}, abs=0.015)


def test_temperature_sharpens_and_zero_is_the_likeliest() -> None:
    cold = shares(logits_of(a=0.5, b=0.3, c=0.2), 20011, temperature=0.5)
    total = 0.25 + 0.09 + 0.04
    assert cold == pytest.approx({"a": 0.25 / total, "b": 0.09 / total, "c": 0.04 / total}, abs=0.015)
    assert shares(logits_of(a=0.2, b=0.5, c=0.3), 101, temperature=0.0) == {"b": 1.0}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert shares(logits_of(a=0.5, b=0.3, c=0.2), 2003, top_p=0.4) == {"a": 1.0}
    assert set(shares(logits_of(a=0.5, b=0.3, c=0.2), 2003, top_p=0.7)) == {"a", "b"}


def test_the_end_can_be_barred() -> None:
    assert shares(logits_of(END=0.9, a=0.1), 101, may_end=0.0) == {"a": 1.0}
    assert shares(logits_of(END=0.9, a=0.1), 101, may_end=0.0, temperature=0.0) == {"a": 1.0}


def test_the_same_seed_chooses_the_same() -> None:
    logits = np.repeat(logits_of(a=0.5, b=0.5), 50, axis=0)
    runs = [sample(logits, [Choice(1.0, 1.0, True, Random(3))] * 50) for _ in range(2)]
    assert runs[0] == runs[1]


def test_no_rows_give_no_tokens() -> None:
    assert sample(np.empty((0, VOCABULARY), dtype=np.float32), []) == []
