"""What the test services answer: the request itself scripts it, so that every service gives the same bytes.

The body of a request may have a key `script`:

    status      HTTP status; from 400 on the answer is an error object
    frames      frames with content (each of them one token)
    first_ms    pause before the first of them, in milliseconds
    gap_ms      pause before each later one
    error_after  after that many frames comes an error frame, and the stream ends
    cut_after    after that many frames the service closes the connection
    framing     `chunked`, or `close`: only the end of the connection ends the response (threaded services)
    raw         hexadecimal: these bytes are the response, head included, then the connection closes (threaded services)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

PROMPT_TOKENS: Final = 17
CACHED_TOKENS: Final = 5
ERRORS: Final = {400: "BadRequestError", 429: "RateLimitError", 500: "InternalServerError"}


@dataclass(frozen=True, slots=True)
class Step:
    """Wait `pause_s` seconds, then hand over `data` in one call; `cut`: close the connection instead."""

    pause_s: float
    data: bytes
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's body, with the defaults filled in."""

    model: str
    chat: bool
    stream: bool
    usage: bool
    status: int
    frames: int
    first_s: float
    gap_s: float
    error_after: int | None
    cut_after: int | None
    framing: str
    raw: bytes | None


def parse(path: str, body: bytes) -> Asked:
    """Take a request apart. Raises ValueError where it is no JSON object that makes sense."""
    try:
        request: dict[str, Any] = json.loads(body)
        script = request.get("script", {})
        return Asked(
            model=str(request.get("model")),
            chat=path.endswith("/chat/completions"),
            stream=bool(request.get("stream")),
            usage=bool((request.get("stream_options") or {}).get("include_usage")),
            status=int(script.get("status", 200)),
            frames=int(script.get("frames", 11)),
            first_s=script.get("first_ms", 0) / 1e3,
            gap_s=script.get("gap_ms", 0) / 1e3,
            error_after=script.get("error_after"),
            cut_after=script.get("cut_after"),
            framing=script.get("framing", "chunked"),
            raw=bytes.fromhex(script["raw"]) if "raw" in script else None,
        )
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def whole(asked: Asked) -> bytes:
    """The body of an answer that is not streamed, errors included."""
    if asked.status >= 400:
        return error_body(asked.status)
    text = " ".join(["word"] * asked.frames)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
    kind = "chat.completion" if asked.chat else "text_completion"
    return _json({"id": "cmpl-1", "object": kind, "model": asked.model, "choices": [choice], "usage": _usage(asked)})


def error_body(status: int) -> bytes:
    """An error as OpenAI's API and vLLM's write it."""
    kind = ERRORS.get(status, "Error")
    return _json({"error": {"message": "scripted", "type": kind, "param": None, "code": status}})


def steps(asked: Asked) -> Iterator[Step]:
    """The server-sent events of a streamed answer, as many engines send them.

    First a frame that only names the role and a comment, last the finish reason, the usage where it was asked for,
    and [DONE]. Frames without content come at once, frames with content after their pause.
    """
    if asked.chat:
        yield Step(0.0, _frame(asked, {"role": "assistant", "content": ""}))
    yield Step(0.0, b": ping\n\n")
    for number in range(asked.frames):
        if number == asked.error_after:
            yield Step(asked.gap_s, b"data: " + error_body(500) + b"\n\n")
            yield Step(0.0, b"data: [DONE]\n\n")
            return
        if number == asked.cut_after:
            yield Step(asked.gap_s, b"", cut=True)
            return
        text = f"w\u00f6rd{number} "
        yield Step(asked.gap_s if number else asked.first_s, _frame(asked, {"content": text} if asked.chat else text))
    yield Step(0.0, _frame(asked, {} if asked.chat else "", finish="stop"))
    if asked.usage:
        empty = {"id": "cmpl-1", "object": "chat.completion.chunk", "model": asked.model, "choices": []}
        yield Step(0.0, b"data: " + _json({**empty, "usage": _usage(asked)}) + b"\n\n")
    yield Step(0.0, b"data: [DONE]\n\n")


def _frame(asked: Asked, content: dict[str, str] | str, finish: str | None = None) -> bytes:
    kind = "chat.completion.chunk" if asked.chat else "text_completion"
    choice = {"index": 0, "delta" if asked.chat else "text": content, "logprobs": None, "finish_reason": finish}
    frame = {"id": "cmpl-1", "object": kind, "created": 1700000000, "model": asked.model, "choices": [choice]}
    return b"data: " + _json(frame) + b"\n\n"


def _usage(asked: Asked) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": asked.frames,
        "total_tokens": PROMPT_TOKENS + asked.frames,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
