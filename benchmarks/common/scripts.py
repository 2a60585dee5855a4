"""What the scripted services are asked: each request says when its frames shall come."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Final

from benchmarks.common.client import request

TARGET: Final = "/v1/chat/completions"


def scripted(model: str, first_s: float, gaps_s: Sequence[float]) -> bytes:
    """A request whose first frame with content comes after `first_s`, and another one after each of `gaps_s`."""
    body = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": "Say it as the script has it."}],
        "script": {"first_s": first_s, "gaps_s": list(gaps_s)},
    }
    return request(TARGET, json.dumps(body).encode())


def drawn(seed: int, count: int, models: Sequence[str]) -> Iterator[bytes]:
    """Yield requests with log-normal waits: 40 ms to the first token, 12 ms between tokens, 2 to 61 tokens."""
    rng = Random(seed)
    for _ in range(count):
        gaps = [_log_normal(rng, 0.012, 0.5) for _ in range(rng.randint(1, 60))]
        yield scripted(rng.choice(models), _log_normal(rng, 0.040, 0.7), gaps)


def endless(model: str, frames: int) -> Iterator[bytes]:
    """Yield requests for `frames` frames with content, as fast as the service can."""
    ask = scripted(model, 0.0, [0.0] * (frames - 1))
    while True:
        yield ask


def paced(seed: int, model: str, streams: int, frames: int, rate: float) -> Iterator[bytes]:
    """Yield a request for each of `streams`: `frames` frames with content, `rate` of them a second, none in step."""
    rng = Random(seed)
    for _ in range(streams):
        yield scripted(model, rng.uniform(0.1, 1.1), [rng.uniform(0.5, 1.5) / rate for _ in range(frames - 1)])


def roleplay(seed: int, models: Sequence[str], *, prompt_bytes: int, max_tokens: int) -> Iterator[bytes]:
    """Yield requests to the role-play service, the models in turn: prompts of one length that share no beginning.

    Each generates `max_tokens` whatever the model says, so that every stretch of the run has the same work to do.
    """
    rng = Random(seed)
    number = 0
    while True:
        text = f"{rng.getrandbits(64):016x} " + "the lantern of the harbour " * (prompt_bytes // 27)
        body = {
            "model": models[number % len(models)],
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": text[:prompt_bytes]}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": rng.getrandbits(31),
        }
        number += 1
        yield request(TARGET, json.dumps(body).encode())


def _log_normal(rng: Random, median: float, sigma: float) -> float:
    return rng.lognormvariate(math.log(median), sigma)
