"""The texts of requests and streamed answers, as OpenAI-compatible servers speak them."""

from __future__ import annotations

import json
from collections.abc import Sequence

END = b"0\r\n\r\n"
"""The last chunk of a chunked body."""


def request(
    model: str = "tiny", *, prompt: str = "hello", model_at: str = "first", path: str = "/v1/chat/completions"
) -> bytes:
    """A streaming request whose `model` is the first, the last or the middle key of its body."""
    messages = ("messages", [{"role": "user", "content": prompt}])
    named, stream = ("model", model), ("stream", True)
    order = {
        "first": (named, messages, stream),
        "middle": (stream, ("system", prompt), named, messages),
        "last": (stream, messages, named),
    }[model_at]
    body = json.dumps(dict(order)).encode()
    headers = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body


def head(framing: str = "Transfer-Encoding: chunked") -> bytes:
    """Status line and headers of a streamed answer."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n".encode()


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def token(text: str) -> bytes:
    """The event of one frame with content."""
    return event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]})


def events(tokens: int, *, prompt_tokens: int = 41, cached_tokens: int = 29) -> list[bytes]:
    """A whole answer: role, content frames, finish reason, usage, `[DONE]`."""
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    }
    words = [token(f" w{number}") for number in range(tokens)]
    return [event(role), *words, event(finish), event(usage), b"data: [DONE]\n\n"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer(tokens: int) -> list[bytes]:
    """A whole answer as uvicorn writes it: head, one chunk per event, last chunk."""
    return [head(), *map(chunk, events(tokens)), END]


def texts(pieces: Sequence[bytes]) -> list[str]:
    """The pieces as a plan holds them."""
    return [piece.decode("latin-1") for piece in pieces]


def cut(data: bytes, size: int) -> list[bytes]:
    """The same bytes in pieces of `size`."""
    return [data[at : at + size] for at in range(0, len(data), size)]
