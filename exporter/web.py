"""The HTTP side of the agent: /metrics, health, readiness, and the live page with its data."""

from __future__ import annotations

import asyncio
import gzip
import importlib.resources
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exporter.live import JsonObject, Live
from exporter.metrics import Metrics
from exporter.recordings import WINDOW_S
from exporter.status import AgentStatus, why_not_ready

# Level 1 makes 1.4 MB of metrics 75 kB in 2.5 ms; the reader's loop stands still meanwhile.
_GZIP_LEVEL = 1
_LEAST_TO_COMPRESS = 1024

_BUSY = "a recording is being written: try again when it is there\n"
_NO_SCHEDULER = "the scheduler probe is not up: see footlight check, and probes in the configuration\n"
_NUMBER = re.compile(r"[0-9]{1,15}")
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE = {
    path.name: path.read_bytes()
    for path in importlib.resources.files("exporter").joinpath("page").iterdir()
    if path.name.rpartition(".")[2] in _MEDIA_TYPES
}
"""The files of the live page. Read when this is imported: the reader may not read files later."""
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
_METHODS = ["GET"]  # Starlette adds HEAD

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    ),
    "cache-control": "no-store",
}

class _SafeHeaders:
    """Puts the same headers on every response, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _takes_gzip(headers: Headers) -> bool:
    for entry in headers.get("accept-encoding", "").lower().split(","):
        coding, _, parameters = entry.partition(";")
        if coding.strip() in {"gzip", "x-gzip", "*"}:
            return not re.search(r"\bq\s*=\s*0(\.0*)?\s*(;|$)", parameters)
    return False


class _OneRecording:
    """Writes one recording at a time: each is a copy of the last minute, which is most of the reader's memory."""

    def __init__(self, record: Callable[[float], Iterable[bytes]]) -> None:
        self._record = record
        self._busy = False

    def answer(self, seconds: float) -> Response:
        if self._busy:
            return PlainTextResponse(_BUSY, 503, headers={"retry-after": "5"})
        self._busy = True
        return _Recording(self._done, _in_turns(self._record(seconds)), media_type="application/json")

    def _done(self) -> None:
        self._busy = False


class _Recording(StreamingResponse):
    """Calls `done` when it was sent, or nobody takes it any more."""

    def __init__(self, done: Callable[[], None], content: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(content, media_type=media_type)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _in_turns(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The pieces, with the loop's other work between them."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


async def rehearse() -> None:
    """Send a streamed answer to nobody: what anyio needs for one it only loads when it is asked for."""

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def drop(_: Message) -> None:
        pass

    await StreamingResponse(_in_turns((b"",)))({"type": "http", "method": "GET"}, never, drop)


def _compressible(request: Request, body: bytes, content_type: str, vary: str = "accept-encoding") -> Response:
    """An answer of such a body, compressed where it is long and the client takes that."""
    headers = {"content-type": content_type, "vary": vary}
    if len(body) >= _LEAST_TO_COMPRESS and _takes_gzip(request.headers):
        body = gzip.compress(body, _GZIP_LEVEL)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers)


def _json(request: Request, told: JsonObject) -> Response:
    return _compressible(request, msgspec.json.encode(told), "application/json")


async def _plain_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {
        404: "not here; try /metrics, /api/live, /api/why, /api/record, /-/ready, /-/healthy or /",
        405: "only GET and HEAD are answered here; /-/reload takes POST",
    }.get(error.status_code, error.detail)
    return PlainTextResponse(f"{text}\n", error.status_code, headers=error.headers)


def create_app(
    metrics: Metrics,
    live: Live,
    status: Callable[[], AgentStatus | None],
    clock: Callable[[], int] = time.monotonic_ns,
    why: Callable[[], Iterable[bytes]] | None = None,
    record: Callable[[float], Iterable[bytes]] | None = None,
    reload: Callable[[], Awaitable[str | None]] | None = None,
) -> Starlette:
    """The ASGI application.

    `live` has the page's data, `status` is what the attacher reported last, `clock` CLOCK_MONOTONIC in nanoseconds.
    `why` gives the JSON lines of requests that were explained, `record` the recording of the last seconds, in pieces;
    None where the probes that they need are not wanted. `reload` has the configuration read again and says why the old
    one stays, or None. Everything is answered on the loop that calls it, without a
    thread.
    """

    async def expose(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""), request.query_params.getlist("name[]"))
        return _compressible(request, body, content_type, "accept, accept-encoding")

    async def healthy(_: Request) -> Response:
        return PlainTextResponse("healthy\n")

    async def ready(_: Request) -> Response:
        reason = why_not_ready(status(), clock())
        return PlainTextResponse("ready\n") if reason is None else PlainTextResponse(f"{reason}\n", 503)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGE:
            raise HTTPException(404)
        return Response(PAGE[name], media_type=_MEDIA_TYPES[name.rpartition(".")[2]])

    async def now(request: Request) -> Response:
        return _json(request, live.now())

    async def past(request: Request) -> Response:
        return _json(request, live.past())

    async def explained(request: Request) -> Response:
        if why is None:
            return PlainTextResponse(_NO_SCHEDULER, 404)
        number = request.query_params.get("number")
        if number is not None:
            found = live.why(int(number)) if _NUMBER.fullmatch(number) else None
            if found is None:
                return PlainTextResponse("no request of that number has a path any more\n", 404)
            return Response(msgspec.json.encode(found) + b"\n", media_type="application/jsonl")
        return StreamingResponse(_in_turns(why()), media_type="application/jsonl")

    recording = None if record is None else _OneRecording(record)

    async def recorded(request: Request) -> Response:
        if recording is None:
            return PlainTextResponse(_NO_SCHEDULER, 404)
        text = request.query_params.get("seconds", "60")
        if not _SECONDS.fullmatch(text) or not 0 < float(text) <= WINDOW_S:
            return PlainTextResponse(f"seconds must be a number above 0 and at most {WINDOW_S}\n", 400)
        return recording.answer(float(text))

    async def reloaded(_: Request) -> Response:
        problem = await reload() if reload is not None else "this agent cannot reload"
        return PlainTextResponse("reloaded\n") if problem is None else PlainTextResponse(f"{problem}\n", 500)

    app = Starlette(
        routes=[
            Route("/api/why", explained, methods=_METHODS),
            Route("/api/record", recorded, methods=_METHODS),
            Route("/metrics", expose, methods=_METHODS),
            Route("/-/healthy", healthy, methods=_METHODS),
            Route("/-/ready", ready, methods=_METHODS),
            Route("/-/reload", reloaded, methods=["POST", "PUT"]),
            Route("/api/live", now, methods=_METHODS),
            Route("/api/history", past, methods=_METHODS),
            Route("/page/{name}", page, methods=_METHODS),
            Route("/", page, methods=_METHODS),
        ],
        exception_handlers={HTTPException: _plain_error},
    )
    # A redirect to the path without its slash would be built from the Host header, which the client chooses.
    app.router.redirect_slashes = False
    app.add_middleware(_SafeHeaders)
    return app
