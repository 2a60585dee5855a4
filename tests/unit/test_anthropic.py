"""Frames of the Messages and the Responses API: what is content, usage, ends, errors; and hostile ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire.anthropic import messages_usage, parse_messages, parse_messages_leniently
from probes.wire.apis import ParseFrame
from probes.wire.frames import DONE, Frame, Usage
from probes.wire.openai import parse_text
from probes.wire.responses import parse_response, parse_response_leniently, response_usage

NOTHING = Frame(False, False, False, False, None, None)
CONTENT = Frame(True, False, False, False, None, None)
FAILED = Frame(False, False, False, True, None, None)


def messages(**event: object) -> Frame | None:
    return parse_messages(json.dumps(event).encode())


def response(**event: object) -> Frame | None:
    return parse_response(json.dumps(event).encode())


@pytest.mark.parametrize("kind", ["content_block_delta", "content_block_start"])
@pytest.mark.parametrize(
    ("part", "content"),
    [
        ({"type": "text_delta", "text": "a"}, True),
        ({"type": "thinking_delta", "thinking": " "}, True),
        ({"type": "input_json_delta", "partial_json": "{"}, True),
        ({"type": "text_delta", "text": "\ud800"}, True),
        ({"type": "text_delta", "text": ""}, False),
        ({"type": "input_json_delta", "partial_json": ""}, False),
        ({"type": "signature_delta", "signature": "EqQB"}, False),
        ({"type": "citations_delta", "citation": {"cited_text": "a"}}, False),
        ({"type": "tool_use", "name": "brew", "input": {}}, False),
        ({"type": "web_search_tool_result", "content": [{"url": "x" * 70_001}]}, False),
        ({"text": 7}, False),
        ({}, False),
        (None, False),
    ],
)
def test_content_of_a_block(kind: str, part: object, content: bool) -> None:
    key = "delta" if kind == "content_block_delta" else "content_block"
    assert messages(type=kind, index=0, **{key: part}) == (CONTENT if content else NOTHING)


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        ({"type": "ping"}, NOTHING),
        ({"type": "content_block_stop", "index": 0}, NOTHING),
        ({"type": "content_block_delta", "content_block": {"text": "a"}}, NOTHING),
        ({"type": "a_new_one", "delta": {"text": "a"}, "error": {}, "x": "x" * 70_001}, NOTHING),
        ({"type": "message_stop"}, DONE),
        ({"type": "error", "error": {"type": "overloaded_error"}}, FAILED),
        ({"type": "error"}, FAILED),
        ({"error": "engine died"}, FAILED),
        ({"error": None}, NOTHING),
        ({}, NOTHING),
        ({"type": "message_delta", "delta": {"stop_reason": None}}, NOTHING),
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, Frame(False, False, True, False, None, None)),
        (
            {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 15}},
            Frame(False, False, True, False, Usage(None, 15, None), None),
        ),
        ({"type": "message_start"}, NOTHING),
        ({"type": "message_start", "message": {"model": 7, "usage": []}}, NOTHING),
    ],
)
def test_events_of_the_messages_api(event: dict[str, object], frame: Frame) -> None:
    assert messages(**event) == frame


def test_the_first_event_counts_no_output_tokens() -> None:
    """They are those that were there already; a stream that is cut off would keep them."""
    usage = {"input_tokens": 3, "cache_read_input_tokens": 16, "cache_creation_input_tokens": 7, "output_tokens": 1}
    frame = messages(type="message_start", message={"model": "m\n", "usage": usage})
    assert frame == Frame(False, False, False, False, Usage(26, None, 16), "m\ufffd")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 9}, Usage(9, None, None)),
        ({"input_tokens": 9, "cache_read_input_tokens": 0}, Usage(9, None, 0)),
        ({"input_tokens": 0, "cache_read_input_tokens": 8, "output_tokens": 5}, Usage(8, 5, 8)),
        ({"input_tokens": 1, "cache_read_input_tokens": None, "cache_creation_input_tokens": 4}, Usage(5, None, None)),
        ({"cache_read_input_tokens": 8}, Usage(None, None, 8)),
        ({"input_tokens": True, "output_tokens": -1}, None),
        ({"input_tokens": 2**41}, None),
        ([], None),
        (None, None),
    ],
)
def test_usage_of_the_messages_api(usage: object, expected: Usage | None) -> None:
    assert messages_usage(usage) == expected


@pytest.mark.parametrize(
    ("kind", "delta", "content"),
    [
        ("response.output_text.delta", "a", True),
        ("response.reasoning_text.delta", "a", True),
        ("response.reasoning_summary_text.delta", "a", True),
        ("response.refusal.delta", "a", True),
        ("response.function_call_arguments.delta", "{", True),
        ("response.output_text.delta", "\udfff", True),
        ("response.output_text.delta", "", False),
        ("response.output_text.delta", {}, False),
        ("response.output_text.delta", None, False),
        ("response.output_text.done", "a", False),
        ("transcript.text.delta", "a", False),
        ("response.output_item.added", None, False),
    ],
)
def test_content_of_a_response(kind: str, delta: object, content: bool) -> None:
    assert response(type=kind, delta=delta) == (CONTENT if content else NOTHING)


USAGE = {"input_tokens": 31, "input_tokens_details": {"cached_tokens": 16}, "output_tokens": 7, "total_tokens": 38}


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        ({"type": "response.created", "response": {"model": "m"}}, Frame(False, False, False, False, None, "m")),
        ({"type": "response.created", "response": None}, NOTHING),
        ({"type": "response.created", "response": {"model": 7, "usage": None}}, NOTHING),
        (
            {"type": "response.completed", "response": {"model": "m", "usage": USAGE, "output": "x" * 70_001}},
            Frame(False, True, True, False, Usage(31, 7, 16), "m"),
        ),
        ({"type": "response.incomplete"}, Frame(False, True, True, False, None, None)),
        ({"type": "response.failed", "response": {}}, Frame(False, True, True, True, None, None)),
        ({"type": "error", "code": "server_error"}, FAILED),
        ({"error": {"code": 500}}, FAILED),
        ({"type": 7}, NOTHING),
        ({}, NOTHING),
    ],
)
def test_events_of_the_responses_api(event: dict[str, object], frame: Frame) -> None:
    assert response(**event) == frame


def test_usage_of_the_responses_api() -> None:
    assert response_usage(USAGE) == Usage(31, 7, 16)
    assert response_usage({"input_tokens": 31, "input_tokens_details": None}) == Usage(31, None, None)
    assert response_usage({"input_tokens": 3, "input_tokens_details": {"cached_tokens": 5}}) == Usage(3, None, None)


@pytest.mark.parametrize("parse", [parse_messages, parse_response])
def test_done_and_what_is_no_frame(parse: ParseFrame) -> None:
    assert parse(b"[DONE]") == parse(b" [DONE]\n") == DONE
    for data in (b"", b"[]", b"7", b"null", b'"x"', b"{", b"\xff", b"\0", b'{"type":' + b"[" * 200_000):
        assert parse(data) is None


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ({"content": "a", "stop": False}, CONTENT),
        ({"content": "", "stop": False}, NOTHING),
        ({"content": "a"}, CONTENT),
        ({"content": "", "stop": True}, Frame(False, False, True, False, None, None)),
        ({"content": "a", "stop": True, "model": "m"}, Frame(True, False, True, False, None, "m")),
        (
            {"content": "a", "stop": False, "timings": {"cache_n": 5, "prompt_n": 2, "predicted_n": 1}},
            Frame(True, False, False, False, Usage(7, 1, 5), None),
        ),
        (
            {"content": "", "stop": True, "tokens_evaluated": 41, "tokens_predicted": 4, "tokens_cached": 44},
            Frame(False, False, True, False, Usage(41, 4, None), None),
        ),
        ({"error": {"code": 500, "message": "slot"}}, FAILED),
        ({"content": "a", "stop": False, "error": "x"}, Frame(True, False, False, True, None, None)),
        ({"choices": [], "content": "a", "stop": False}, NOTHING),
    ],
)
def test_frames_of_llama_cpp(frame: object, expected: Frame) -> None:
    assert parse_text(json.dumps(frame).encode()) == expected


KINDS = st.sampled_from(
    [
        *("ping", "message_start", "message_delta", "message_stop", "content_block_start", "content_block_delta"),
        *("error", "response.created", "response.completed", "response.failed", "response.output_text.delta", "x"),
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("\ud800"),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["text", "usage", "model", "a"]), x, max_size=3)
    ),
)
PARTS = st.dictionaries(
    st.sampled_from(["text", "thinking", "partial_json", "stop_reason"]), st.text(max_size=2) | ANYTHING, max_size=3
)
TOKENS = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens", "input_tokens_details"]),
    st.integers(-1, 99) | st.fixed_dictionaries({"cached_tokens": st.integers(0, 99)}) | ANYTHING,
)
BODIES = st.fixed_dictionaries(
    {}, optional={"model": st.text(max_size=3) | ANYTHING, "usage": st.none() | TOKENS | ANYTHING}
)
EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "type": KINDS | ANYTHING,
        "delta": st.text(max_size=2) | PARTS | ANYTHING,
        "content_block": PARTS | ANYTHING,
        "message": BODIES | ANYTHING,
        "response": BODIES | ANYTHING,
        "usage": TOKENS | ANYTHING,
        "error": ANYTHING,
    },
)


@settings(deadline=None)  # other work shares the machine
@given(EVENTS)
def test_the_quick_way_and_the_lenient_way_agree(event: dict[str, Any]) -> None:
    data = json.dumps(event).encode()
    assert parse_messages(data) == parse_messages_leniently(data) is not None
    assert parse_response(data) == parse_response_leniently(data) is not None
