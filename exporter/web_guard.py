"""Stands before the application: asks for a name and password, limits the rate of requests, sets headers.

A look at a password costs a bcrypt hash: 50 ms of a CPU at cost 10, on purpose. It runs in a thread of its own, one at
a time and at a limited rate, so that strangers who guess can take neither the loop nor the host's CPUs. The password
that a user gave last is remembered by a keyed digest: a scrape costs a hash once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import bcrypt
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from exporter.web_config import WebConfig

LOOKS_AT_ONCE: Final = 16
LOOKS_PER_S: Final = 2.0
"""Passwords that are hashed, at the most, where no hash costs more than `_QUICK`; half as many with each step above.
This is a tenth of a CPU, however many are tried."""
_QUICK: Final = 10
MOST_WAITING: Final = 16
"""Requests that wait for their look, at the most: of the 64 at once that uvicorn takes, most are for who is known."""
_MOST_CREDENTIALS: Final = 4096
"""Characters of a name and password as they are sent, in base64."""
_HASHED_BYTES: Final = 72
"""bcrypt looks at so many bytes of a password; what comes after them never counted."""

Check = Callable[[bytes, bytes], bool]


class Bucket:
    """Allows `burst` at once and `per_s` a second in the long run. `clock` is in seconds."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s: Final = per_s
        self._burst: Final = burst
        self._clock: Final = clock
        self._left = float(burst)
        self._at = clock()

    def take(self) -> bool:
        """Take one; False where none is left."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Passwords:
    """Says who may come in. `users` are bcrypt hashes by name, one or more; `check` compares a password with one.

    Whether a name is known cannot be told from the time that a refusal takes: for one that is not, the hash of another
    user is computed, always of the same one.
    """

    def __init__(
        self, users: dict[bytes, bytes], clock: Callable[[], float] = time.monotonic, check: Check = bcrypt.checkpw
    ) -> None:
        self._users: Final = users
        self._hashes: Final = tuple(users.values())
        self._check: Final = check
        self._key: Final = secrets.token_bytes(32)
        self._accepted: dict[bytes, bytes] = {}
        dearest = max(int(hashed.split(b"$")[2]) for hashed in self._hashes)
        self._bucket: Final = Bucket(LOOKS_PER_S / 2 ** max(0, dearest - _QUICK), LOOKS_AT_ONCE, clock)
        self._waiting = 0
        self._thread: Final = ThreadPoolExecutor(1, "passwords")
        self._turn: Final = asyncio.Lock()

    async def right(self, name: bytes, password: bytes) -> bool | None:
        """Whether this is the user's password; None where too many were tried lately to look at one more."""
        digest = self._digest(b"password", name, password)
        if self._remembered(name, digest):
            return True
        if self._waiting >= MOST_WAITING or not self._bucket.take():
            return None
        self._waiting += 1
        try:
            async with self._turn:
                if self._remembered(name, digest):  # by a request that came at the same time
                    return True
                return await self._look(name, password, digest)
        finally:
            self._waiting -= 1

    async def _look(self, name: bytes, password: bytes, digest: bytes) -> bool:
        known = self._users.get(name)
        hashed = known if known is not None else self._decoy(name)
        loop = asyncio.get_running_loop()
        same = await loop.run_in_executor(self._thread, self._check, password[:_HASHED_BYTES], hashed)
        if not same or known is None:
            return False
        self._accepted[name] = digest
        return True

    def _remembered(self, name: bytes, digest: bytes) -> bool:
        return hmac.compare_digest(self._accepted.get(name, b""), digest)

    def _decoy(self, name: bytes) -> bytes:
        return self._hashes[int.from_bytes(self._digest(b"decoy", name, b""), "big") % len(self._hashes)]

    def _digest(self, kind: bytes, name: bytes, password: bytes) -> bytes:
        text = b"%s:%d:%s%s" % (kind, len(name), name, password)
        return hashlib.blake2b(text, key=self._key, digest_size=32).digest()


class Guard:
    """The ASGI application `app`, for those who may use it, with the headers that the file asks for.

    What Prometheus's exporters do: the rate limit counts every request, and no path is free of a password.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: WebConfig,
        clock: Callable[[], float] = time.monotonic,
        check: Check = bcrypt.checkpw,
    ) -> None:
        self._app: Final = app
        self._headers: Final = config.headers
        limit = config.rate_limit
        self._bucket: Final = None if limit is None else Bucket(1 / limit.interval_s, limit.burst, clock)
        self._passwords: Final = Passwords(config.users, clock, check) if config.users else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer. Nothing but HTTP comes through."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict(self._headers))
            await send(message)

        answer = await self._refusal(scope) or self._app
        await answer(scope, receive, send_with_headers)

    async def _refusal(self, scope: Scope) -> ASGIApp | None:
        if self._bucket is not None and not self._bucket.take():
            return _refused(429, "too many requests: see rate_limit in the web configuration")
        if self._passwords is None:
            return None
        given = credentials(scope["headers"])
        right = False if given is None else await self._passwords.right(*given)
        if right is None:
            return _refused(429, "too many passwords were tried: try again", {"retry-after": "5"})
        if not right:
            return _refused(401, "name and password, please", {"www-authenticate": 'Basic realm="footlight"'})
        return None


def credentials(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes] | None:
    """Name and password of a request; None where there are none, more than one, or what is there is no such thing."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1 or len(values[0]) > _MOST_CREDENTIALS:
        return None
    scheme, _, encoded = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        name, colon, password = base64.b64decode(encoded.strip(b" "), validate=True).partition(b":")
    except binascii.Error:
        return None
    return (name, password) if colon else None


def _refused(code: int, text: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    always = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return PlainTextResponse(f"{text}\n", code, headers={**always, **(headers or {})})
