"""A Starlette service on uvicorn: `python -m tests.e2e.servers.asgi PORT asyncio|uvloop`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.e2e.servers.script import Asked, error_body, parse, steps, whole


async def complete(request: Request) -> Response:
    try:
        asked = parse(request.url.path, await request.body())
    except ValueError:
        return Response(error_body(400), 400, media_type="application/json")
    if asked.status < 400 and asked.stream:
        return StreamingResponse(stream(asked), media_type="text/event-stream")
    await asyncio.sleep(asked.first_s)
    return Response(whole(asked), asked.status, media_type="application/json")


async def stream(asked: Asked) -> AsyncIterator[bytes]:
    for step in steps(asked):
        if step.pause_s:
            await asyncio.sleep(step.pause_s)
        if step.cut:
            raise RuntimeError("scripted: the response is cut off")
        yield step.data


PATHS = ("/v1/chat/completions", "/v1/completions")
app = Starlette(routes=[Route(path, complete, methods=["POST"]) for path in PATHS])

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop=sys.argv[2], http="h11", log_level="critical")
