"""The HTTP side of the agent: /metrics, health, readiness and a page that links them."""

from __future__ import annotations

import asyncio
import gzip
import html
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exporter.metrics import Metrics
from exporter.recordings import WINDOW_S
from exporter.status import AgentStatus, why_not_ready

# Level 1 makes 1.4 MB of metrics 75 kB in 2.5 ms; the reader's loop stands still meanwhile.
_GZIP_LEVEL = 1
_LEAST_TO_COMPRESS = 1024

_BUSY = "a recording is being written: try again when it is there\n"
_NO_SCHEDULER = "the scheduler probe is not up: see footlight check, and probes in the configuration\n"
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
_METHODS = ["GET"]  # Starlette adds HEAD

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-store",
}

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Footlight</title>
<style>
:root {{
  color-scheme: light dark;
  --text: #1d2430; --dim: #5b6575; --back: #f6f7f9; --card: #fff; --line: #dde1e7;
  --link: #0b57b0; --good: #17723b; --bad: #b3261e;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --text: #e6e9ee; --dim: #9aa4b2; --back: #12161c; --card: #1a2029; --line: #2c3440;
    --link: #7db4f5; --good: #6fcf97; --bad: #f2867e;
  }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 44rem; margin: 0 auto; padding: 3rem 1.25rem }}
h1 {{ margin: 0; font-size: 1.6rem }}
p {{ margin: .25rem 0 0; color: var(--dim) }}
.state, ul {{ background: var(--card); border: 1px solid var(--line); border-radius: 6px }}
.state {{
  margin: 1.5rem 0; padding: .75rem 1rem; border-left: 4px solid var(--good);
  color: var(--text); overflow-wrap: anywhere;
}}
.state.bad {{ border-left-color: var(--bad) }}
ul {{ margin: 0; padding: 0; list-style: none }}
li {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: .7rem 1rem }}
li + li {{ border-top: 1px solid var(--line) }}
a {{ min-width: 8rem; color: var(--link); font-family: ui-monospace, monospace; text-decoration: none }}
a:hover, a:focus-visible {{ text-decoration: underline }}
li span {{ color: var(--dim) }}
</style>
</head>
<body>
<main>
<h1>Footlight</h1>
<p>What the users of a streaming language model feel, measured from the kernel. Version {version}.</p>
<p class="state{bad}">{state}</p>
<ul>
<li><a href="metrics">/metrics</a> <span>for Prometheus: text or OpenMetrics</span></li>
<li><a href="-/ready">/-/ready</a> <span>200 when every wanted probe is attached, else 503 and why</span></li>
<li><a href="-/healthy">/-/healthy</a> <span>200 while the reader runs</span></li>
</ul>
</main>
</body>
</html>
"""


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


async def _plain_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {
        404: "not here; try /metrics, /api/why, /api/record, /-/ready, /-/healthy or /",
        405: "only GET and HEAD are answered here",
    }.get(error.status_code, error.detail)
    return PlainTextResponse(f"{text}\n", error.status_code, headers=error.headers)


def create_app(
    metrics: Metrics,
    status: Callable[[], AgentStatus | None],
    clock: Callable[[], int] = time.monotonic_ns,
    why: Callable[[], Iterable[bytes]] | None = None,
    record: Callable[[float], Iterable[bytes]] | None = None,
) -> Starlette:
    """The ASGI application. `status` is what the attacher reported last, `clock` CLOCK_MONOTONIC in nanoseconds.

    `why` gives the JSON lines of requests that were explained, `record` the recording of the last seconds, in pieces;
    None where the probes that they need are not wanted. Everything is answered on the loop that calls it, without a
    thread.
    """

    async def expose(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""), request.query_params.getlist("name[]"))
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if len(body) >= _LEAST_TO_COMPRESS and _takes_gzip(request.headers):
            body = gzip.compress(body, _GZIP_LEVEL)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers)

    async def healthy(_: Request) -> Response:
        return PlainTextResponse("healthy\n")

    async def ready(_: Request) -> Response:
        reason = why_not_ready(status(), clock())
        return PlainTextResponse("ready\n") if reason is None else PlainTextResponse(f"{reason}\n", 503)

    async def landing(_: Request) -> Response:
        reason = why_not_ready(status(), clock())
        state = "Ready: every wanted probe is attached." if reason is None else f"Not ready: {reason}"
        return HTMLResponse(
            _PAGE.format(
                version=html.escape(metrics.version), state=html.escape(state), bad="" if reason is None else " bad"
            )
        )

    async def explained(_: Request) -> Response:
        if why is None:
            return PlainTextResponse(_NO_SCHEDULER, 404)
        return StreamingResponse(_in_turns(why()), media_type="application/jsonl")

    recording = None if record is None else _OneRecording(record)

    async def recorded(request: Request) -> Response:
        if recording is None:
            return PlainTextResponse(_NO_SCHEDULER, 404)
        text = request.query_params.get("seconds", "60")
        if not _SECONDS.fullmatch(text) or not 0 < float(text) <= WINDOW_S:
            return PlainTextResponse(f"seconds must be a number above 0 and at most {WINDOW_S}\n", 400)
        return recording.answer(float(text))

    app = Starlette(
        routes=[
            Route("/api/why", explained, methods=_METHODS),
            Route("/api/record", recorded, methods=_METHODS),
            Route("/metrics", expose, methods=_METHODS),
            Route("/-/healthy", healthy, methods=_METHODS),
            Route("/-/ready", ready, methods=_METHODS),
            Route("/", landing, methods=_METHODS),
        ],
        exception_handlers={HTTPException: _plain_error},
    )
    # A redirect to the path without its slash would be built from the Host header, which the client chooses.
    app.router.redirect_slashes = False
    app.add_middleware(_SafeHeaders)
    return app
