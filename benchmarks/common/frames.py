"""The frames that the scripted services send: OpenAI's, in the shapes that a decoder must tell apart."""

from __future__ import annotations

import json
from typing import Final

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
NOT_FOUND: Final = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
"""The answer to all but a POST: the agent asks a service that it sees for an engine's metrics; here there are none."""


def frame(model: str, delta: dict[str, str], **more: object) -> bytes:
    """One event of a chat completion stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "object": "chat.completion.chunk",
        "created": 1767225600,
        "model": model,
        "choices": [choice],
        **more,
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def usage(model: str, tokens: int) -> bytes:
    """The last event but one: no choice, and what was used."""
    counts = {"prompt_tokens": 29, "completion_tokens": tokens, "total_tokens": 29 + tokens}
    return frame(model, {}, choices=[], usage=counts)
