"""Users are drawn from their seed, and what they report is what happened."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.roleplay.errors import Refusal
from examples.roleplay.http_client import Address, Connection, ResponseError
from examples.roleplay.plan import MAX_TURNS, MEAN_TURNS, Habits, conversations, trim, zipf_weights
from examples.roleplay.summary import Outcome, Sample, Summary
from examples.roleplay.users import Crowd

HABITS = Habits(rate=5.0, patience_s=20.0, leave=0.1, max_tokens=200)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def test_equal_seeds_give_equal_users_and_others_do_not() -> None:
    first, second, other = (list(islice(conversations(HABITS, seed, 2, 7), 53)) for seed in (7, 7, 8))
    assert first == second
    assert first != other


def test_requests_come_at_the_rate_that_was_asked_for() -> None:
    plans = list(takewhile(lambda plan: plan.at_s < 2000, conversations(HABITS, 7, 2, 7)))
    requests = sum(len(plan.turns) for plan in plans)
    assert requests / 2000 == pytest.approx(HABITS.rate, rel=0.05)
    gaps = np.diff([0.0, *(plan.at_s for plan in plans)])
    # Of a Poisson process: gaps are exponential, so their deviation is their mean.
    assert gaps.mean() == pytest.approx(MEAN_TURNS / HABITS.rate, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_personas_follow_zipf_and_lengths_a_log_normal_within_bounds() -> None:
    plans = list(islice(conversations(HABITS, 7, 2, 7), 5003))
    seen = Counter(plan.persona for plan in plans)
    weights = zipf_weights(7)
    for rank in range(7):
        assert seen[rank] / len(plans) == pytest.approx(weights[rank] / sum(weights), abs=0.02)
    turns = [turn for plan in plans for turn in plan.turns]
    later = np.array([len(turn.text) for plan in plans for turn in plan.turns[1:]])
    assert np.median(later) == pytest.approx(70, rel=0.1)
    assert np.log(later).std() == pytest.approx(0.8, rel=0.1)
    assert max(len(turn.text) for turn in turns) <= 2800
    assert all(1 <= turn.max_tokens <= 200 for turn in turns)
    assert max(len(plan.turns) for plan in plans) == MAX_TURNS
    leaving = sum(turn.leaves_after is not None for turn in turns) / len(turns)
    assert leaving == pytest.approx(HABITS.leave, abs=0.01)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 200))
def test_trimming_keeps_the_end_and_begins_with_the_user(sizes: list[int], room: int) -> None:
    sizes = sizes[: len(sizes) // 2 * 2 + 1] if len(sizes) % 2 else sizes[:-1] or [1]
    history = [("user" if index % 2 == 0 else "assistant", "x" * size) for index, size in enumerate(sizes)]
    kept = trim(history, room)
    assert kept == history[len(history) - len(kept) :]
    assert kept[0][0] == "user"
    assert len(kept) == 1 or sum(len(text) + 2 for _, text in kept) <= room


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_quantiles_and_mean_are_numpy_s(values: list[float]) -> None:
    sample = Sample()
    for value in values:
        sample.add(value)
    assert sample.mean == pytest.approx(np.mean(values))
    assert sample.quantiles((0.0, 0.5, 0.99, 1.0)) == pytest.approx(np.quantile(values, (0.0, 0.5, 0.99, 1.0)))


def test_nothing_measured_is_none_not_zero() -> None:
    assert Sample().mean is None
    assert Sample().quantiles((0.5,)) == [None]


def test_a_sample_stays_bounded_and_fair() -> None:
    sample = Sample()
    for value in range(300_007):
        sample.add(value)
    assert (sample.count, sample.mean) == (300_007, 150_003)
    (median,) = sample.quantiles((0.5,))
    assert median == pytest.approx(150_003, rel=0.02)
    assert len(sample._kept) == 200_000


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [("http://127.0.0.1:8000", "127.0.0.1", 8000), ("http://x/", "x", 80), ("http://[::1]:5", "::1", 5)],
)
def test_addresses(url: str, host: str, port: int) -> None:
    assert Address.of_url(url) == Address(host, port)


@pytest.mark.parametrize(
    "url", ["", "x", "https://x", "http://", "http://x/path", "http://x:y", "http://[", "http://x?q"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Refusal):
        Address.of_url(url)


async def with_server(handler: Handler, use: Callable[[Address], Awaitable[None]]) -> None:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        _, port = server.sockets[0].getsockname()
        await asyncio.wait_for(use(Address("127.0.0.1", port)), 30)


def canned(*answers: bytes, close: bool = False) -> Handler:
    """A server that gives `answers` in turn to the requests of all its connections, cut into pieces of 7 bytes."""
    left = list(answers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
            answer = left.pop(0)
            for start in range(0, len(answer), 7):
                writer.write(answer[start : start + 7])
                await writer.drain()
            if close:
                break
        writer.close()

    return handle


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA\r\n, my world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 3\r\n\r\nno\n"


def test_pieces_are_chunks_and_the_connection_is_kept() -> None:
    async def use(address: Address) -> None:
        connection = Connection(address)
        for expected in ((200, [b"hello", b", my world"]), (404, [b"no\n"]), (200, [b"hello", b", my world"])):
            status, pieces = await connection.request("GET", "/")
            assert (status, [piece async for piece in pieces]) == expected
        connection.close()

    asyncio.run(with_server(canned(CHUNKED, SIZED, CHUNKED), use))


def test_a_kept_connection_that_was_closed_meanwhile_is_opened_anew() -> None:
    async def use(address: Address) -> None:
        connection = Connection(address)
        for _ in range(3):
            status, pieces = await connection.request("POST", "/", b"x")
            assert (status, [piece async for piece in pieces]) == (404, [b"no\n"])
        connection.close()

    asyncio.run(with_server(canned(SIZED, SIZED, SIZED, close=True), use))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        CHUNKED[:-20],
        CHUNKED.replace(b"A\r\n,", b"Z\r\n,"),
        CHUNKED.replace(b"A\r\n,", b"F" * 16 + b"\r\n,"),
        CHUNKED.replace(b"A\r\n,", b"-1\r\n,"),
        SIZED.replace(b"3", b"x"),
        SIZED.replace(b"3", b"-1"),
        SIZED.replace(b"3", b"9"),
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
    ],
)
def test_broken_responses_raise_one_kind_of_error(answer: bytes) -> None:
    async def use(address: Address) -> None:
        connection = Connection(address)
        with pytest.raises((ResponseError, ConnectionError)):
            _, pieces = await connection.request("GET", "/")
            async for _ in pieces:
                pass
        connection.close()

    asyncio.run(with_server(canned(answer, close=True), use))


def body(status: str, content: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(content), content)


def event(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % text.encode()


ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":31,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":16}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
STREAM = ROLE + event("a") + event("b") + event("c") + USAGE + DONE
ERROR = b'data: {"error":{"message":"broken"}}\n\n'


def turns_within(habits: Habits, seed: int, duration_s: float) -> list[int]:
    return [
        len(plan.turns) for plan in takewhile(lambda plan: plan.at_s < duration_s, conversations(habits, seed, 1, 1))
    ]


@pytest.mark.parametrize(
    ("answer", "leave", "outcome", "frames", "tokens"),
    [
        (body("200 OK", STREAM), 0.0, Outcome.COMPLETE, 3, 31),
        (body("200 OK", STREAM), 1.0, Outcome.LEFT_STREAMING, 1, 0),
        (body("200 OK", ROLE + event("a") + ERROR + DONE), 0.0, Outcome.FAILED, 1, 0),
        (body("200 OK", ROLE + event("a")), 0.0, Outcome.FAILED, 1, 0),
        (body("200 OK", b"data: {\n\n"), 0.0, Outcome.FAILED, 0, 0),
        (body("429 Too Many", b"{}"), 0.0, Outcome.REFUSED, 0, 0),
        (body("503 No", b"{}"), 0.0, Outcome.FAILED, 0, 0),
    ],
)
def test_users_count_what_they_got(answer: bytes, leave: float, outcome: Outcome, frames: int, tokens: int) -> None:
    models, personas = b'{"data":[{"id":"tiny","max_model_len":4096}]}', b'{"data":[{"id":"p","greeting":"Aye."}]}'
    served = canned(body("200 OK", models), body("200 OK", personas), answer)
    habits = Habits(rate=1000.0, patience_s=1000.0, leave=leave, max_tokens=1)
    seed = next(seed for seed in range(100) if turns_within(habits, seed, 0.003) == [1])
    found: list[Summary] = []

    async def use(address: Address) -> None:
        found.append(await Crowd(address, habits, seed, max_users=1).run(0.003))

    asyncio.run(with_server(served, use))
    (summary,) = found
    ((name, felt),) = summary.models.items()
    assert (name, summary.conversations, summary.turned_away) == ("tiny", 1, 0)
    assert +felt.outcomes == Counter([outcome])
    assert (felt.frames, felt.prompt_tokens) == (frames, tokens)
    assert (felt.ttft.count, felt.itl.count) == (min(frames, 1), max(0, frames - 1))
    assert felt.duration.count == (outcome is Outcome.COMPLETE)


def test_users_beyond_the_limit_are_turned_away_and_counted() -> None:
    models = b'{"data":[{"id":"tiny"}]}'
    seen: list[Summary] = []

    async def use(address: Address) -> None:
        crowded = Habits(rate=1000.0, patience_s=1.0, leave=0.0, max_tokens=1)
        seen.append(await Crowd(address, crowded, 7, max_users=0).run(0.02))

    asyncio.run(with_server(canned(body("200 OK", models), body("404 No", b"")), use))
    (summary,) = seen
    assert summary.conversations == summary.turned_away > 0
    assert summary.requests == 0


@pytest.mark.parametrize("answer", [b"no", b"[]", b'{"data":[]}', b'{"data":[{"name":"x"}]}', b'{"data":5}'])
def test_what_is_no_such_service_is_refused(answer: bytes) -> None:
    async def use(address: Address) -> None:
        with pytest.raises(Refusal, match="no such service"):
            await Crowd(address, HABITS, 7, max_users=1).run(1.0)

    asyncio.run(with_server(canned(body("200 OK", answer), body("404 No", b"")), use))
