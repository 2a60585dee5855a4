"""The API's side of an engine: limits, ends, and an engine that dies or talks nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np
import pytest

from examples.roleplay.engines import Broke, EngineLink, Generation, Options
from examples.roleplay.errors import ApiError
from examples.roleplay.protocol import Abort, Finished, Frames, Gauges, Generate, Ready, Step, encode

PROMPT = np.arange(5, dtype=np.uint16)
OPTIONS = Options(max_tokens=7, temperature=1.0, top_p=1.0, seed=3, may_end=True)


class Wire(asyncio.WriteTransport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False
        self._frames = Frames()
        self._written: list[Generate | Abort] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        decoder = msgspec.msgpack.Decoder(Generate | Abort)
        self._written += [decoder.decode(body) for body in self._frames.feed(bytes(data))]

    def abort(self) -> None:
        self.aborted = True

    def aborts(self) -> list[Abort]:
        return [message for message in self._written if isinstance(message, Abort)]


def step(*tokens: tuple[int, int], ends: tuple[int, ...] = ()) -> bytes:
    finished = [Finished(number, "length", 5, 7, 0, 0.0, 0.0, 0.0) for number in ends]
    return encode(Step(1, 0, 0, 0, list(tokens), finished, Gauges(1, 0, 0.5)))


def with_link(use: Callable[[EngineLink, Wire], Awaitable[None]], *, max_waiting: int = 2) -> None:
    async def run() -> None:
        link, wire = EngineLink("tiny", max_waiting, lambda *_: None), Wire()
        link.connection_made(wire)
        link.data_received(encode(Ready(17)))
        assert await link.ready == 17
        await asyncio.wait_for(asyncio.ensure_future(use(link, wire)), 30)

    asyncio.run(run())


async def tokens_of(generation: Generation) -> list[int]:
    return [token async for token in generation]


def test_tokens_go_to_the_request_they_belong_to() -> None:
    async def use(link: EngineLink, _: Wire) -> None:
        one, two = link.generate(PROMPT, OPTIONS), link.generate(PROMPT, OPTIONS)
        link.data_received(step((1, 10), (2, 20)) + step((1, 11), (99, 5), ends=(2,)) + step((1, 12), ends=(1,)))
        assert await tokens_of(one) == [10, 11, 12]
        assert await tokens_of(two) == [20]
        assert one.finished is not None
        assert one.broke is None

    with_link(use)


def test_only_so_many_wait() -> None:
    async def use(link: EngineLink, _: Wire) -> None:
        link.generate(PROMPT, OPTIONS)
        link.generate(PROMPT, OPTIONS)
        with pytest.raises(ApiError) as refused:
            link.generate(PROMPT, OPTIONS)
        assert refused.value.status == 429
        # The first one has begun: it waits no more. Its end frees nothing twice.
        link.data_received(step((1, 10)) + step((1, 11), ends=(1,)))
        link.generate(PROMPT, OPTIONS)
        with pytest.raises(ApiError):
            link.generate(PROMPT, OPTIONS)

    with_link(use)


def test_an_abandoned_request_shows_nothing_more_and_is_aborted_once() -> None:
    async def use(link: EngineLink, wire: Wire) -> None:
        generation = link.generate(PROMPT, OPTIONS)
        link.data_received(step((1, 10)) + step((1, 11)))
        generation.abandon()
        generation.abandon()
        assert await tokens_of(generation) == []
        assert wire.aborts() == [Abort(1, stopped=False)]

    with_link(use)


def test_completing_waits_for_the_engine_s_word() -> None:
    async def use(link: EngineLink, wire: Wire) -> None:
        generation = link.generate(PROMPT, OPTIONS)
        completing = asyncio.create_task(generation.complete())
        await asyncio.sleep(0)
        assert wire.aborts() == [Abort(1, stopped=True)]
        link.data_received(step((1, 10)) + step(ends=(1,)))
        await completing
        assert generation.finished is not None

    with_link(use)


def test_an_engine_that_dies_breaks_every_request_and_takes_no_more() -> None:
    async def use(link: EngineLink, _: Wire) -> None:
        generation = link.generate(PROMPT, OPTIONS)
        link.data_received(step((1, 10)))
        link.connection_lost(None)
        assert await tokens_of(generation) == [10]
        assert generation.broke is Broke.ENGINE_DIED
        assert link.lost.done()
        with pytest.raises(ApiError) as refused:
            link.generate(PROMPT, OPTIONS)
        assert refused.value.status == 503

    with_link(use)


@pytest.mark.parametrize("nonsense", [b"\xff" * 9, (3).to_bytes(4, "little") + b"abc", encode(Abort(1, stopped=True))])
def test_an_engine_that_talks_nonsense_is_let_go(nonsense: bytes) -> None:
    async def use(link: EngineLink, wire: Wire) -> None:
        link.data_received(nonsense)
        assert wire.aborted

    with_link(use)
