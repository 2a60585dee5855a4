"""Reads frames and usage of Anthropic's Messages API, as several servers speak it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from probes.wire.frames import DONE, Frame, Usage, as_dict, count_of, filled, loads, safe_model, usage_of


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None


class _Event(msgspec.Struct, gc=False):
    type: str | None = None
    delta: _Delta | None = None
    content_block: _Delta | None = None


_decode: Final = msgspec.json.Decoder(_Event).decode
_CONTENT: Final = Frame(content=True, done=False, finish=False, error=False, usage=None, model=None)
_NOTHING: Final = Frame(content=False, done=False, finish=False, error=False, usage=None, model=None)
_FAILED: Final = Frame(content=False, done=False, finish=False, error=True, usage=None, model=None)
# What comes a few times in a stream and says something else than content.
_RARE: Final = frozenset(("message_start", "message_delta", "message_stop", "error", None))


def parse_messages(data: bytes) -> Frame | None:
    """Read the data of one server-sent event; None when it is no JSON object. Never raises."""
    try:
        event = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse_messages_leniently(data)
    kind = event.type
    if kind == "content_block_delta":
        part = event.delta
    elif kind == "content_block_start":
        part = event.content_block
    else:
        return parse_messages_leniently(data) if kind in _RARE else _NOTHING
    return _CONTENT if part is not None and (part.text or part.thinking or part.partial_json) else _NOTHING


def parse_messages_leniently(data: bytes) -> Frame | None:
    """`parse_messages` for frames that come a few times in a stream, and for unusual ones."""
    if data.strip() == b"[DONE]":
        return DONE  # not of the API, but proxies add it
    event = loads(data)
    if not isinstance(event, dict):
        return None
    kind = event.get("type")
    if kind == "content_block_delta":
        return _CONTENT if _has_text(as_dict(event.get("delta"))) else _NOTHING
    if kind == "content_block_start":
        return _CONTENT if _has_text(as_dict(event.get("content_block"))) else _NOTHING
    if kind == "message_start":
        return _started(as_dict(event.get("message")))
    if kind == "message_delta":
        stopped = filled(as_dict(event.get("delta")).get("stop_reason"))
        return Frame(False, False, stopped, False, messages_usage(event.get("usage")), None)
    if kind == "message_stop":
        return DONE
    failed = kind == "error" or (not isinstance(kind, str) and event.get("error") is not None)
    return _FAILED if failed else _NOTHING


def _has_text(part: dict[str, Any]) -> bool:
    return any(filled(part.get(name)) for name in ("text", "thinking", "partial_json"))


def _started(message: dict[str, Any]) -> Frame:
    model = message.get("model")
    usage = messages_usage(message.get("usage"))
    if usage is not None:
        usage = usage_of(usage.prompt_tokens, None, usage.cached_tokens)  # its output tokens are those until now
    return Frame(False, False, False, False, usage, safe_model(model) if isinstance(model, str) else None)


def messages_usage(usage: object) -> Usage | None:
    """Read a `usage` object. Its `input_tokens` are those that were neither read from the cache nor written to it."""
    fields = as_dict(usage)
    fresh, cached = count_of(fields.get("input_tokens")), count_of(fields.get("cache_read_input_tokens"))
    written = count_of(fields.get("cache_creation_input_tokens"))
    prompt = None if fresh is None else fresh + (cached or 0) + (written or 0)
    return usage_of(prompt, count_of(fields.get("output_tokens")), cached)
