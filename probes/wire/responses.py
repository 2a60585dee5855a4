"""Reads frames and usage of OpenAI's Responses API."""

from __future__ import annotations

from typing import Final

import msgspec

from probes.wire.frames import DONE, Frame, Usage, as_dict, count_of, filled, loads, safe_model, usage_of

_NULL: Final = msgspec.Raw(b"null")


class _Event(msgspec.Struct, gc=False):
    type: str | None = None
    delta: str | None = None


class _Response(msgspec.Struct, gc=False):
    model: str | None = None
    usage: msgspec.Raw = _NULL


class _Last(msgspec.Struct, gc=False):
    response: _Response | None = None


_decode: Final = msgspec.json.Decoder(_Event).decode
_decode_last: Final = msgspec.json.Decoder(_Last).decode
_CONTENT: Final = Frame(content=True, done=False, finish=False, error=False, usage=None, model=None)
_NOTHING: Final = Frame(content=False, done=False, finish=False, error=False, usage=None, model=None)
_FAILED: Final = Frame(content=False, done=False, finish=False, error=True, usage=None, model=None)
_ENDS: Final = frozenset(("response.completed", "response.incomplete", "response.failed"))
_ERRORS: Final = frozenset(("error", "response.failed"))
# Those that name the model.
_STATES: Final = _ENDS | {"response.created", "response.in_progress", "response.queued"}


def parse_response(data: bytes) -> Frame | None:
    """Read the data of one server-sent event; None when it is neither `[DONE]` nor a JSON object. Never raises.

    Content is what an event `response.*.delta` brings: text, reasoning, a refusal, arguments of a call.
    """
    if data == b"[DONE]":
        return DONE  # not of the API, but servers add it
    try:
        event = _decode(data)
        kind = event.type
        if kind is None:
            return parse_response_leniently(data)
        if kind in _STATES:
            # Holds the whole request and answer, and may be large.
            state = _decode_last(data).response
            usage = None if state is None else response_usage(loads(bytes(state.usage)))
            return _state(kind, usage, None if state is None else state.model)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse_response_leniently(data)
    return _step(kind, event.delta)


def parse_response_leniently(data: bytes) -> Frame | None:
    """`parse_response` for unusual frames."""
    if data.strip() == b"[DONE]":
        return DONE
    event = loads(data)
    if not isinstance(event, dict):
        return None
    kind = event.get("type")
    if not isinstance(kind, str):
        return _NOTHING if event.get("error") is None else _FAILED
    if kind not in _STATES:
        return _step(kind, event.get("delta"))
    state = as_dict(event.get("response"))
    model = state.get("model")
    return _state(kind, response_usage(state.get("usage")), model if isinstance(model, str) else None)


def _step(kind: str, delta: object) -> Frame:
    if kind in _ERRORS:
        return _FAILED
    content = kind.startswith("response.") and kind.endswith(".delta") and filled(delta)
    return _CONTENT if content else _NOTHING


def _state(kind: str, usage: Usage | None, model: str | None) -> Frame:
    ends = kind in _ENDS
    return Frame(False, ends, ends, kind in _ERRORS, usage, None if model is None else safe_model(model))


def response_usage(usage: object) -> Usage | None:
    """Read a `usage` object, whose `input_tokens` include the cached ones."""
    fields = as_dict(usage)
    cached = count_of(as_dict(fields.get("input_tokens_details")).get("cached_tokens"))
    return usage_of(count_of(fields.get("input_tokens")), count_of(fields.get("output_tokens")), cached)
