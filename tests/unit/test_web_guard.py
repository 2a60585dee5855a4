"""Names and passwords before the application: who gets in, what a guess costs, and what strangers send instead."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable

import bcrypt
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from exporter.web_config import RateLimit, WebConfig
from exporter.web_guard import LOOKS_AT_ONCE, LOOKS_PER_S, MOST_WAITING, Bucket, Guard, Passwords, credentials

RIGHT, OTHER = b"opening night", b"curtain"
USERS = {
    b"prometheus": bcrypt.hashpw(RIGHT, bcrypt.gensalt(4)),
    "søren".encode(): bcrypt.hashpw(OTHER, bcrypt.gensalt(4)).replace(b"$2b$", b"$2y$"),
}


class Clock:
    def __init__(self) -> None:
        self.now = 1709.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """bcrypt, counted: which hashes were computed, and in which threads."""

    def __init__(self) -> None:
        self.hashes: list[bytes] = []
        self.threads: set[int] = set()

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        self.hashes.append(hashed)
        self.threads.add(threading.get_ident())
        return bcrypt.checkpw(password, hashed)


async def stage(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("the play\n", headers={"x-frame-options": "DENY"})(scope, receive, send)


def basic(name: bytes, password: bytes) -> str:
    return "Basic " + base64.b64encode(name + b":" + password).decode()


Ask = Callable[..., list[httpx.Response]]


def asks(config: WebConfig, clock: Callable[[], float] | None = None, check: Counting | None = None) -> Ask:
    """Ask one guard for each `authorization` in turn; the same guard each time, on one loop."""
    loop = asyncio.new_event_loop()
    guard: list[Guard] = []

    async def ask_all(authorizations: tuple[str | None, ...], at_once: bool) -> list[httpx.Response]:
        if not guard:
            guard.append(Guard(stage, config, clock or Clock(), check or Counting()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard[0]), base_url="http://agent") as http:
            calls = [
                http.get("/metrics", headers={} if text is None else {"authorization": text}) for text in authorizations
            ]
            return list(await asyncio.gather(*calls)) if at_once else [await call for call in calls]

    def ask(*authorizations: str | None, at_once: bool = False) -> list[httpx.Response]:
        return loop.run_until_complete(ask_all(authorizations, at_once))

    return ask


def codes(answers: list[httpx.Response]) -> list[int]:
    return [answer.status_code for answer in answers]


def test_without_users_nobody_is_asked() -> None:
    (answer,) = asks(WebConfig())(None)
    assert (answer.status_code, answer.text) == (200, "the play\n")


def test_only_the_right_password_of_the_right_user() -> None:
    ask = asks(WebConfig(users=USERS))
    first = basic(b"prometheus", RIGHT)
    right = first, basic("søren".encode(), OTHER), first.replace("Basic", "bASIC")
    wrong = (
        None,
        basic(b"prometheus", OTHER),
        basic(b"prometheus", b""),
        basic(b"", RIGHT),
        basic(b"nobody", RIGHT),
        basic("søren".encode("latin-1"), OTHER),
        basic(b"prometheus", RIGHT + b"\0"),
        basic(b"Prometheus", RIGHT),
    )
    assert codes(ask(*right)) == [200] * len(right)
    refused = ask(*wrong)
    assert codes(refused) == [401] * len(wrong)
    for answer in refused:
        assert answer.headers["www-authenticate"] == 'Basic realm="footlight"'
        assert answer.headers["cache-control"] == "no-store"
        assert "play" not in answer.text


def test_a_password_is_hashed_once_and_off_the_loop() -> None:
    check = Counting()
    ask = asks(WebConfig(users=USERS), check=check)
    assert codes(ask(*[basic(b"prometheus", RIGHT)] * 101)) == [200] * 101
    assert check.hashes == [USERS[b"prometheus"]]
    assert threading.get_ident() not in check.threads


def test_requests_at_once_hash_a_password_once() -> None:
    check = Counting()
    ask = asks(WebConfig(users=USERS), check=check)
    assert codes(ask(*[basic(b"prometheus", RIGHT)] * 11, at_once=True)) == [200] * 11
    assert len(check.hashes) == len(check.threads) == 1


def test_a_password_that_was_remembered_lets_no_other_in() -> None:
    ask = asks(WebConfig(users=USERS))
    right, wrong = basic(b"prometheus", RIGHT), (basic(b"prometheus", OTHER), basic("søren".encode(), RIGHT))
    assert codes(ask(right, *wrong, right)) == [200, 401, 401, 200]


def test_an_unknown_name_costs_a_hash_as_a_known_one_does() -> None:
    check = Counting()
    asks(WebConfig(users=USERS), check=check)(*[basic(b"nobody", RIGHT)] * 3, basic(b"prometheus", OTHER))
    assert len(check.hashes) == 4
    assert len(set(check.hashes[:3])) == 1
    assert check.hashes[0] in USERS.values()


def test_the_right_password_of_the_user_whose_hash_is_computed_instead_does_not_help() -> None:
    one = {b"prometheus": USERS[b"prometheus"]}
    assert codes(asks(WebConfig(users=one))(basic(b"nobody", RIGHT))) == [401]


def test_bytes_after_the_72nd_never_counted_in_bcrypt() -> None:
    long = b"x" * 72
    users = {b"prometheus": bcrypt.hashpw(long, bcrypt.gensalt(4))}
    answers = asks(WebConfig(users=users))(basic(b"prometheus", long + b"more"), basic(b"prometheus", long[:-1]))
    assert codes(answers) == [200, 401]


def test_guessing_is_limited_and_who_is_known_comes_in_meanwhile() -> None:
    clock, check = Clock(), Counting()
    ask = asks(WebConfig(users=USERS), clock, check)
    assert codes(ask(basic(b"prometheus", RIGHT))) == [200]
    guesses = [basic(b"prometheus", b"guess %d" % number) for number in range(LOOKS_AT_ONCE + 7)]
    answers = ask(*guesses)
    assert codes(answers) == [401] * (LOOKS_AT_ONCE - 1) + [429] * 8
    assert answers[-1].headers["retry-after"] == "5"
    assert len(check.hashes) == LOOKS_AT_ONCE
    assert codes(ask(basic(b"prometheus", RIGHT), basic("søren".encode(), OTHER))) == [200, 429]
    clock.now += 3 / LOOKS_PER_S
    assert codes(ask(basic("søren".encode(), OTHER), *guesses[:4])) == [200, 401, 401, 429, 429]


@pytest.mark.parametrize(("costs", "per_s"), [((4,), 2.0), ((10, 4), 2.0), ((12,), 0.5), ((4, 16, 10), 1 / 32)])
def test_the_dearer_a_hash_is_the_fewer_are_computed(costs: tuple[int, ...], per_s: float) -> None:
    async def looks(passwords: Passwords, number: int) -> list[bool | None]:
        return [await passwords.right(b"nobody", b"guess") for _ in range(number)]

    clock = Clock()
    users = {b"user %d" % cost: b"$2b$%02d$" % cost for cost in costs}
    passwords = Passwords(users, clock, lambda *_: False)
    assert asyncio.run(looks(passwords, LOOKS_AT_ONCE + 1)) == [False] * LOOKS_AT_ONCE + [None]
    clock.now += 0.99 / per_s
    assert asyncio.run(looks(passwords, 1)) == [None]
    clock.now += 0.02 / per_s
    assert asyncio.run(looks(passwords, 2)) == [False, None]


def test_only_so_many_wait_for_a_look_and_who_is_known_does_not() -> None:
    clock, go = Clock(), threading.Event()

    def slow(password: bytes, _: bytes) -> bool:
        return password == RIGHT or (go.wait(30) and False)

    async def queue() -> list[bool | None]:
        passwords = Passwords({b"prometheus": USERS[b"prometheus"]}, clock, slow)
        assert await passwords.right(b"prometheus", RIGHT)
        waiting = []
        for number in range(3 * MOST_WAITING):  # each comes when the bucket has one for it
            clock.now += 3600
            waiting.append(asyncio.ensure_future(passwords.right(b"prometheus", b"guess %d" % number)))
            await asyncio.sleep(0)
        assert await passwords.right(b"prometheus", RIGHT)
        assert [each.done() for each in waiting] == [False] * MOST_WAITING + [True] * 2 * MOST_WAITING
        go.set()
        answers = await asyncio.gather(*waiting)
        assert await passwords.right(b"prometheus", b"one more") is False
        return answers

    assert asyncio.run(queue()) == [False] * MOST_WAITING + [None] * 2 * MOST_WAITING


def test_the_rate_limit_counts_every_request() -> None:
    clock = Clock()
    ask = asks(WebConfig(users=USERS, rate_limit=RateLimit(2.0, 3)), clock)
    right = basic(b"prometheus", RIGHT)
    assert codes(ask(right, None, right, right, None)) == [200, 401, 200, 429, 429]
    clock.now += 4.1
    assert codes(ask(right, right, right)) == [200, 200, 429]


def test_headers_are_set_on_refusals_too() -> None:
    headers = (("x-frame-options", "sameorigin"), ("strict-transport-security", "max-age=7"))
    for answer in asks(WebConfig(users=USERS, headers=headers))(None, basic(b"prometheus", RIGHT)):
        assert answer.headers.get_list("x-frame-options") == ["sameorigin"]
        assert answer.headers["strict-transport-security"] == "max-age=7"


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "other"])
def test_nothing_but_http_comes_through(kind: str) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("it came through")

    asyncio.run(Guard(never, WebConfig())({"type": kind}, never, never))  # type: ignore[arg-type]


# ---- what strangers send ----


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Basic",
        b"Basic ",
        b"Basic :",
        b"Bearer " + base64.b64encode(b"prometheus:opening night"),
        b"Basic cHJvbWV0aGV1cw==",  # no colon
        b"Basic cHJvbWV0aGV1czpvcGVuaW5nIG5pZ2h0\x00",
        b"Basic cHJvbWV0aGV1czpvcGVuaW5nIG5pZ2h",  # cut off
        b"Basic cHJvbWV0aGV1czpv cGVuaW5nIG5pZ2h0",
        b"Basic \xff\xfe\xfd\xfc",
        b"Basic " + base64.b64encode(b"prometheus:" + b"x" * 4096),
    ],
)
def test_what_is_no_name_and_password(value: bytes) -> None:
    assert credentials([(b"authorization", value)]) is None


def test_two_headers_are_none() -> None:
    header = (b"authorization", basic(b"prometheus", RIGHT).encode())
    assert credentials([header]) == (b"prometheus", RIGHT)
    assert credentials([header, header]) is None
    assert credentials([(b"accept", b"*/*")]) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_exception(value: bytes) -> None:
    for prefix in (b"", b"Basic ", b"basic   "):
        found = credentials([(b"authorization", prefix + value)])
        assert found is None or isinstance(found, tuple)


@given(st.binary(max_size=60).filter(lambda name: b":" not in name), st.binary(max_size=90))
def test_names_and_passwords_arrive_as_they_were_sent(name: bytes, password: bytes) -> None:
    assert credentials([(b"authorization", basic(name, password).encode())]) == (name, password)


@given(st.binary(max_size=20), st.binary(max_size=20), st.binary(max_size=20), st.binary(max_size=20))
def test_names_and_passwords_are_not_mixed_up(name: bytes, password: bytes, other: bytes, guess: bytes) -> None:
    async def both() -> None:
        passwords = Passwords({name: b"$2b$04$1", other: b"$2b$04$2"}, Clock(), lambda given, _: given == password)
        assert await passwords.right(name, password) is True
        assert await passwords.right(other, guess) is (guess == password)

    asyncio.run(both())


def test_a_bucket_is_never_fuller_than_full() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 3, clock)
    clock.now += 3600
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    clock.now += 0.1
    assert [bucket.take(), bucket.take()] == [True, False]
