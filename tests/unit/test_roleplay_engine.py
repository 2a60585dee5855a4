"""The engine over its socket: what goes in as a request comes out as tokens and one end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.roleplay.engine import Engine, serve
from examples.roleplay.kv_cache import BlockPool
from examples.roleplay.model import ModelShape, Transformer
from examples.roleplay.protocol import (
    MAX_MESSAGE,
    Abort,
    Finished,
    Frames,
    Gauges,
    Generate,
    ProtocolError,
    Ready,
    Step,
    encode,
)
from examples.roleplay.scheduler import Scheduler

SHAPE = ModelShape("tiny", layers=1, heads=2, kv_heads=1, head_width=8, context=128, kv_tokens=512)


def generate(number: int, size: int = 20, *, max_tokens: int = 7, may_end: bool = False) -> Generate:
    prompt = np.arange(size, dtype="<u2").tobytes()
    return Generate(number, prompt, max_tokens, 1.0, 1.0, number, may_end)


def engine() -> Engine:
    pool = BlockPool(SHAPE.blocks)
    return Engine(Transformer(SHAPE), Scheduler(pool, step_tokens=32, max_running=8, clock=time.monotonic_ns))


def run_dry(subject: Engine) -> list[Step]:
    steps = []
    while subject.busy:
        steps.append(subject.step())
    return steps


def test_each_request_gets_its_tokens_and_one_end() -> None:
    subject = engine()
    for number in (1, 2, 3):
        subject.take(generate(number))
    steps = run_dry(subject)
    tokens = [number for step in steps for number, _ in step.tokens]
    assert {number: tokens.count(number) for number in tokens} == {1: 7, 2: 7, 3: 7}
    ends = [finished for step in steps for finished in step.finished]
    assert sorted((one.number, one.reason, one.prompt_tokens, one.completion_tokens) for one in ends) == [
        (number, "length", 20, 7) for number in (1, 2, 3)
    ]
    assert all(one.queued_s is not None and one.decode_s is not None and one.decode_s > 0 for one in ends)
    # All three prompts and all tokens but each last one; 16 tokens of two prompts may be shared.
    assert sum(step.computed_tokens for step in steps) == 3 * (20 + 6) - sum(step.prefix_hits for step in steps)
    assert sum(step.prefix_queries for step in steps) == 60
    assert steps[-1].gauges == Gauges(0, 0, 0.0)


def test_equal_seeds_give_equal_replies() -> None:
    replies = []
    for _ in range(2):
        subject = engine()
        subject.take(generate(13, max_tokens=31))
        replies.append([token for step in run_dry(subject) for _, token in step.tokens])
    assert replies[0] == replies[1]


@pytest.mark.parametrize(("stopped", "reason"), [(False, "abort"), (True, "stop")])
def test_an_abort_ends_a_request_that_runs_and_one_that_waits(stopped: bool, reason: str) -> None:
    subject = engine()
    subject.take(generate(1, max_tokens=50))
    subject.step()
    subject.take(generate(2))
    for number in (1, 2, 3):
        subject.take(Abort(number, stopped))
    (step,) = run_dry(subject)
    assert [(one.number, one.reason, one.completion_tokens) for one in step.finished] == [
        (1, reason, 1),
        (2, reason, 0),
    ]
    assert step.finished[1].queued_s is None
    assert not step.computed_tokens


def test_it_serves_its_socket_until_the_other_side_closes() -> None:
    ours, theirs = socket.socketpair()
    subject = threading.Thread(target=serve, args=(engine(), theirs))
    subject.start()
    with ours, theirs:
        ours.settimeout(30)
        ours.sendall(encode(generate(1)) + encode(generate(2)))
        ends = [finished.number for step in until_ended(ours, 2) for finished in step.finished]
        assert sorted(ends) == [1, 2]
        # It sleeps now, and wakes for the next one.
        ours.sendall(encode(generate(3)))
        assert sum(len(step.tokens) for step in until_ended(ours, 1)) == 7
        ours.shutdown(socket.SHUT_WR)
        subject.join(30)
    assert not subject.is_alive()


def until_ended(connection: socket.socket, count: int) -> Iterator[Step]:
    frames, decoder = Frames(), msgspec.msgpack.Decoder(Step)
    while count:
        data = connection.recv(1 << 16)
        assert data, "the engine closed"
        for body in frames.feed(data):
            step = decoder.decode(body)
            count -= len(step.finished)
            yield step


MESSAGES: list[Generate | Abort | Ready | Step] = [
    Ready(17),
    generate(1),
    Abort(5, stopped=True),
    Step(3, 20, 16, 1, [(1, 97), (2, 98)], [Finished(1, "stop", 5, 2, 0, 0.5, None, None)], Gauges(1, 2, 0.25)),
]


@given(st.lists(st.integers(0, 400), max_size=8))
def test_messages_survive_every_cut(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    frames = Frames()
    bodies = [body for start, end in pairwise(edges) for body in frames.feed(stream[start:end])]
    decoder = msgspec.msgpack.Decoder(Generate | Abort | Ready | Step)
    assert [decoder.decode(body) for body in bodies] == MESSAGES


def test_a_message_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        Frames().feed((MAX_MESSAGE + 1).to_bytes(4, "little"))
