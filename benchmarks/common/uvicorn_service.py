"""A service on uvicorn that answers as its request's script says, to within what a loaded event loop can do.

Between the frames with content it sends what is none: a role, an empty delta, comments; and it splits and joins frames
over its writes as proxies do. `python -m benchmarks.common.uvicorn_service [--workers N]` prints its URL when it
serves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Any, Final

import click
import msgspec
import uvicorn

from benchmarks.common import frames
from benchmarks.common.processes import end_with_parent, ends_on_sigterm

_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_PING_EVERY: Final = 7
_SPLIT_EVERY: Final = 11
_JOIN_EVERY: Final = 13


class Script(msgspec.Struct):
    """Seconds until the first frame with content, and between the others. All zero: as fast as the loop can."""

    first_s: float
    gaps_s: list[float]


class Ask(msgspec.Struct):
    """A request, as far as it matters here."""

    model: str
    script: Script


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own
    """Play a script. The ASGI application."""
    assert scope["type"] == "http"
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    ask = msgspec.json.decode(body, type=Ask)

    async def write(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await write(frames.frame(ask.model, {"role": "assistant", "content": ""}))
    plain = not any(ask.script.gaps_s)
    held = b""
    for number, wait_s in enumerate((ask.script.first_s, *ask.script.gaps_s)):
        await asyncio.sleep(wait_s)
        event = held + frames.frame(ask.model, {"content": f"word {number} "})
        held = b""
        if plain:
            await write(event)
        elif number % _SPLIT_EVERY == _SPLIT_EVERY - 1:
            await write(event[:53])
            await write(event[53:])
        elif number % _JOIN_EVERY == _JOIN_EVERY - 1 and number < len(ask.script.gaps_s):
            held = event
        else:
            await write(event)
        if not plain and number % _PING_EVERY == _PING_EVERY - 1:
            await write(frames.PING)
            await write(frames.frame(ask.model, {}))
    await write(frames.frame(ask.model, {}) + frames.usage(ask.model, len(ask.script.gaps_s) + 1))
    await write(frames.DONE)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@click.command(help=__doc__)
@click.option("--workers", default=1, show_default=True, help="Processes that serve the one port.")
@click.option("--loop", default="auto", show_default=True, help="uvicorn's: auto, asyncio or uvloop.")
def main(workers: int, loop: str) -> None:
    ends_on_sigterm()  # uvicorn raises the signals that ended it again
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        children: list[int] = []
        for _ in range(workers - 1):
            child = os.fork()
            if not child:
                end_with_parent()
                children.clear()
                break
            children.append(child)
        else:
            print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        try:
            config = uvicorn.Config(app, loop=loop, lifespan="off", ws="none", log_level="warning", access_log=False)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            for child in children:
                os.kill(child, signal.SIGTERM)
            for child in children:
                os.waitpid(child, 0)
    sys.exit(0)


if __name__ == "__main__":
    main()
