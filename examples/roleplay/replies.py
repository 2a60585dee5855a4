"""From an engine's tokens to an HTTP response, until it is complete or the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from examples.roleplay.engines import Generation
from examples.roleplay.errors import ApiError
from examples.roleplay.metrics import ServiceMetrics
from examples.roleplay.openai import DONE, Form, Usage, error_body, error_event
from examples.roleplay.tokens import decode_token


class StopFilter:
    """Holds text back while it could become one of `stops`, and ends the text before the first that it becomes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the text that can be shown after `text` came. After a hit it is always empty."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        held = self._held + text
        found = [held.index(stop) for stop in self._stops if stop in held]
        if found:
            self.hit = True
            self._held = ""
            return held[: min(found)]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """Return what is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reply needs to know of its request. `received_s` is on the clock of `time.perf_counter`."""

    model: str
    received_s: float
    prompt_tokens: int
    stops: Sequence[str]
    chat: bool
    stream: bool
    include_usage: bool


class Reply(Response):
    """An ASGI response that sends the text of `generation`. A client that leaves ends the generation in the engine."""

    def __init__(self, asked: Asked, generation: Generation, metrics: ServiceMetrics) -> None:
        super().__init__()
        self._asked = asked
        self._generation = generation
        self._metrics = metrics
        self._form = Form(asked.model, chat=asked.chat, null_usage=asked.stream and asked.include_usage)
        self._stops = StopFilter(asked.stops)
        self._completion_tokens = 0
        self._last_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; returns when it is complete, or soon after the client left."""
        watcher = asyncio.create_task(_call_when_gone(receive, self._generation.abandon))
        try:
            await (self._stream(send) if self._asked.stream else self._whole(send))
        finally:
            watcher.cancel()
            self._generation.abandon()

    async def _stream(self, send: Send) -> None:
        form, generation = self._form, self._generation
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if self._asked.chat:
            await _send_part(send, form.role())
        async for token in generation:
            text = self._take(token)
            if text:
                await _send_part(send, form.frame(text))
            if self._stops.hit:
                await generation.complete()
        if generation.abandoned:
            return
        error = self._error()
        if error is not None:
            await _send_part(send, error_event(error))
        else:
            rest = self._stops.rest()
            if rest:
                await _send_part(send, form.frame(rest))
            await _send_part(send, form.end(self._reason()))
            if self._asked.include_usage:
                await _send_part(send, form.usage(self._usage()))
            self._count_end()
        await _send_part(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, send: Send) -> None:
        generation = self._generation
        parts: list[str] = []
        async for token in generation:
            parts.append(self._take(token))
            if self._stops.hit:
                await generation.complete()
        if generation.abandoned:
            return
        error = self._error()
        if error is not None:
            await _send_json(send, error.status, error_body(error))
            return
        parts.append(self._stops.rest())
        await _send_json(send, 200, self._form.whole("".join(parts), self._reason(), self._usage()))
        self._count_end()

    def _take(self, token: int) -> str:
        now = time.perf_counter()
        if not self._completion_tokens:
            self._metrics.first_token(self._asked.model, now - self._asked.received_s)
        else:
            self._metrics.next_token(self._asked.model, now - self._last_s)
        self._last_s = now
        self._completion_tokens += 1
        return self._stops.feed(decode_token(token))

    def _error(self) -> ApiError | None:
        broke = self._generation.broke
        if broke is None:
            return None
        self._metrics.broke(self._asked.model)
        return ApiError(503, f"The reply was broken off: {broke.value}.")

    def _reason(self) -> str:
        finished = self._generation.finished
        if self._stops.hit or finished is None:
            return "stop"
        return finished.reason

    def _usage(self) -> Usage:
        finished = self._generation.finished
        cached = finished.cached_tokens if finished is not None else 0
        return Usage.of(self._asked.prompt_tokens, self._completion_tokens, cached)

    def _count_end(self) -> None:
        self._metrics.ended(self._asked.model, time.perf_counter() - self._asked.received_s)


async def _call_when_gone(receive: Receive, call: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call()


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _send_json(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
