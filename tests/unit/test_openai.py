"""Transcripts of several servers and APIs through all decoders; OpenAI's completions: usage, names, hostile frames."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire import openai
from probes.wire.apis import Api, RequestBody, ResponseBody, parser_of
from probes.wire.frames import MODEL_LIMIT, Frame, Usage, safe_model
from probes.wire.http1 import Body, Broken, End, Event, ResponseDecoder, ResponseHead
from probes.wire.sse import SseDecoder

FIXTURES = Path(__file__).parent.parent / "fixtures" / "wire"
CHAT = Api.CHAT_COMPLETIONS
LENIENT = {CHAT: openai.parse_chat_leniently, Api.COMPLETIONS: openai.parse_text_leniently}


def parse_frame(api: Api, data: bytes) -> Frame | None:
    return parser_of(api)(data)


@dataclass
class Seen:
    """What a whole transcript said."""

    status: int = 0
    frames: int = 0
    content: int = 0
    finish: int = 0
    done: int = 0
    errors: int = 0
    undecodable: int = 0
    usages: list[Usage] = field(default_factory=list)
    models: set[str | None] = field(default_factory=set)
    ends: int = 0


def watch(pieces: list[bytes], api: Api) -> Seen:
    seen, http, sse = Seen(), ResponseDecoder(frozenset()), SseDecoder()

    def take(events: list[Event]) -> None:
        for event in events:
            assert not isinstance(event, Broken)
            if isinstance(event, ResponseHead):
                seen.status = event.status
            elif isinstance(event, Body):
                for data in sse.feed(event.data):
                    count(parse_frame(api, data))
            elif isinstance(event, End):
                seen.ends += 1

    def count(frame: Frame | None) -> None:
        seen.frames += 1
        if frame is None:
            seen.undecodable += 1
            return
        seen.content += frame.content
        seen.finish += frame.finish
        seen.done += frame.done
        seen.errors += frame.error
        if frame.usage is not None:
            seen.usages.append(frame.usage)
        if not frame.done or frame.model:
            seen.models.add(frame.model)

    for piece in pieces:
        take(http.feed(piece))
    take(http.eof())
    return seen


def seen(frames: int, content: int, model: str, *usages: Usage, finish: int = 1, done: int = 1) -> Seen:
    return Seen(200, frames, content, finish, done, 0, 0, list(usages), {model}, 1)


QWEN, GEMMA, GPT = "Qwen/Qwen2.5-7B-Instruct", "gemma-3-4b-it", "gpt-4o-mini-2024-07-18"
LLAMA, SGLANG = "meta-llama/Meta-Llama-3-8B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
STREAMS = {
    "vllm_chat": seen(11, 7, QWEN, Usage(331, 7, 304)),
    "vllm_reasoning_continuous_usage": seen(9, 5, QWEN, *(Usage(23, n, None) for n in (0, 1, 2, 3, 4, 5, 5, 5))),
    "vllm_error": Seen(200, 5, 2, 0, 1, 1, 0, [], {QWEN, None}, 1),
    "vllm_error_object": Seen(200, 4, 1, 0, 1, 1, 0, [], {QWEN, None}, 1),
    "vllm_completions": seen(7, 4, "facebook/opt-125m", Usage(5, 4, None)),
    "llamacpp_chat": seen(6, 3, GEMMA, Usage(237, 3, 236)),
    "llamacpp_timings_only": seen(5, 2, GEMMA, Usage(29, 2, 18)),
    "sse_starlette_crlf": seen(5, 2, "models/7B/llama.gguf"),
    "sglang_chat": seen(8, 4, SGLANG, Usage(12, 5, 0)),
    "tgi_chat": seen(6, 3, LLAMA, Usage(41, 4, None)),
    "tgi_error": Seen(200, 2, 1, 0, 0, 1, 0, [], {LLAMA, None}, 1),
    "openai_chat_rechunked": seen(7, 3, GPT, Usage(2006, 3, 1920)),
    "openai_tools": seen(8, 5, GPT),
    "openai_refusal": seen(5, 2, GPT),
    "litellm_close_delimited": seen(6, 2, "claude-3-5-haiku", Usage(1200, 2, 1024)),
}


CLAUDE, GPT_4O = "claude-sonnet-4-20250514", "gpt-4o-2024-08-06"
OTHER_APIS = {
    "llamacpp_completion": (
        Api.COMPLETION,
        Seen(200, 5, 3, 1, 0, 0, 0, [Usage(41, 4, 29)], {None, "models/7B/ggml-model.gguf"}, 1),
    ),
    "anthropic_messages": (
        Api.MESSAGES,
        Seen(200, 18, 6, 1, 1, 0, 0, [Usage(1233, None, 1024), Usage(None, 89, None)], {None, CLAUDE}, 1),
    ),
    "anthropic_overloaded": (
        Api.MESSAGES,
        Seen(200, 4, 1, 0, 0, 1, 0, [Usage(25, None, None)], {None, CLAUDE}, 1),
    ),
    "openai_responses": (
        Api.RESPONSES,
        Seen(200, 15, 6, 1, 1, 0, 0, [Usage(1297, 31, 1152)], {None, GPT_4O}, 1),
    ),
}
STREAMS |= {name: expected for name, (_, expected) in OTHER_APIS.items()}


def transcript(name: str) -> bytes:
    return (FIXTURES / f"{name}_from_docs.http").read_bytes()


def api_for(name: str) -> Api:
    if name in OTHER_APIS:
        return OTHER_APIS[name][0]
    return Api.COMPLETIONS if "completions" in name else CHAT


def test_every_transcript_is_used() -> None:
    names = {path.name.removesuffix("_from_docs.http") for path in FIXTURES.glob("*.http")}
    assert names == {*STREAMS, "openai_not_streamed", "anthropic_not_streamed", "vllm_not_found"}


@pytest.mark.parametrize("name", STREAMS)
def test_transcripts(name: str) -> None:
    assert watch([transcript(name)], api_for(name)) == STREAMS[name]


@pytest.mark.parametrize("name", STREAMS)
def test_transcripts_in_every_split(name: str) -> None:
    data, api = transcript(name), api_for(name)
    assert watch([bytes([byte]) for byte in data], api) == STREAMS[name]
    for at in range(0, len(data), 3):
        assert watch([data[:at], data[at:]], api) == STREAMS[name]


def not_streamed(name: str, api: Api = CHAT) -> tuple[int, ResponseBody]:
    status, body, decoder = 0, ResponseBody(api), ResponseDecoder(frozenset())
    for event in decoder.feed(transcript(name)):
        if isinstance(event, ResponseHead):
            status = event.status
        elif isinstance(event, Body):
            body.feed(event.data)
        elif isinstance(event, End):
            body.finish()
    return status, body


def test_a_response_in_one_piece() -> None:
    status, body = not_streamed("openai_not_streamed")
    assert (status, body.model, body.usage, body.error, body.broken) == (200, GPT, Usage(19, 10, 0), False, False)


def test_a_message_in_one_piece() -> None:
    status, body = not_streamed("anthropic_not_streamed", Api.MESSAGES)
    assert (status, body.model, body.usage, body.error, body.broken) == (
        200,
        CLAUDE,
        Usage(2057, 5, 2048),
        False,
        False,
    )


def test_an_error_in_one_piece() -> None:
    status, body = not_streamed("vllm_not_found")
    assert (status, body.model, body.usage, body.error, body.broken) == (404, None, None, True, False)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"error":null}', False),
        ('{"error":"%s"}' % ("x" * 9000), True),
        ('{"object":"error","message":"x"}', True),
        ('{"object":"err\\u006fr"}', True),
        ('{"object":"list"}', False),
        ('{"choices":[{"error":1}]}', False),
    ],
)
def test_errors_of_response_bodies(text: str, error: bool) -> None:
    body = ResponseBody(CHAT)
    body.feed(text.encode())
    body.finish()
    assert (body.error, body.broken) == (error, False)


def chat(delta: object, **more: object) -> bytes:
    return json.dumps({"model": "m", "choices": [{"index": 0, "delta": delta}], **more}).encode()


@pytest.mark.parametrize(
    ("delta", "content"),
    [
        ({"content": "a"}, True),
        ({"content": " "}, True),
        ({"content": "\ud800"}, True),
        ({"content": [{"type": "text", "text": "a"}]}, True),
        ({"reasoning_content": "a", "content": None}, True),
        ({"reasoning": "a"}, True),
        ({"refusal": "a"}, True),
        ({"tool_calls": [{"index": 0}, {"index": 1, "function": {"arguments": "{"}}]}, True),
        ({"function_call": {"arguments": "{"}}, True),
        ({"role": "assistant"}, False),
        ({"role": "assistant", "content": ""}, False),
        ({"content": None, "reasoning_content": None, "tool_calls": None, "refusal": None}, False),
        ({"content": []}, False),
        ({"content": 7}, False),
        ({"content": {"a": 1}}, False),
        ({"tool_calls": []}, False),
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}, False),
        ({"tool_calls": [None, 7, {"function": None}, {"function": []}]}, False),
        ({"tool_calls": {"function": {"arguments": "{"}}}, False),
        ({"text": "a"}, False),
        ({}, False),
        (None, False),
        (["a"], False),
    ],
)
def test_content_of_a_chat_frame(delta: object, content: bool) -> None:
    assert parse_frame(CHAT, chat(delta)) == Frame(content, False, False, False, None, "m")


@pytest.mark.parametrize(("text", "content"), [("a", True), ("", False), (None, False), (7, False), ("\udfff", True)])
def test_content_of_a_completions_frame(text: object, content: bool) -> None:
    data = json.dumps({"choices": [{"text": ""}, {"text": text, "delta": {"content": "a"}}]}).encode()
    assert parse_frame(Api.COMPLETIONS, data) == Frame(content, False, False, False, None, None)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"error": None}, False),
        ({"error": {}}, True),
        ({"error": "x"}, True),
        ({"object": "error"}, False),
        ({"object": "error", "choices": None}, True),
        ({"object": "error", "choices": []}, True),
        ({"object": 7}, False),
    ],
)
def test_errors_of_frames(more: dict[str, object], error: bool) -> None:
    frame = parse_frame(CHAT, chat({"content": "a"}, **more))
    assert frame is not None
    assert frame.error is error


@pytest.mark.parametrize("data", [b"[DONE]", b" [DONE] ", b"[DONE]\n"])
def test_done(data: bytes) -> None:
    assert parse_frame(CHAT, data) == Frame(False, True, False, False, None, None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"[]",
        b"7",
        b"null",
        b'"x"',
        b"{",
        b"{]",
        b'{"a"}',
        b"[DONE",
        b"DONE",
        b"\xff",
        b'{"a":1}{',
        b"\0",
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"choices":' + b"[" * 200_000,
        b'{"a":1' + b" " * 2**20,
    ],
)
def test_undecodable_frames(data: bytes) -> None:
    assert parse_frame(CHAT, data) is None
    assert parse_frame(Api.COMPLETIONS, data) is None


def test_oddities_elsewhere_in_a_frame_do_no_harm() -> None:
    whole = Frame(True, False, True, False, None, "m")
    for odd in (b"NaN", b"-Infinity", b'"\\ud800"', b"9" * 5000, b"1e999", b"[[[[]]]]", b'"\xff"', b"-" + b"9" * 5000):
        data = b'{"odd":' + odd + b',"model":"m","choices":[{"odd":' + odd
        assert parse_frame(CHAT, data + b',"delta":{"content":"a"},"finish_reason":"stop"}]}') == whole


def test_a_large_frame_is_read_in_the_quick_way_only() -> None:
    """json.loads makes objects of everything: what it may have to hold is bounded."""
    padding = b" " * 70_001
    assert parse_frame(CHAT, padding + chat({"content": "a"})) == Frame(True, False, False, False, None, "m")
    assert parse_frame(CHAT, padding + chat({"content": ["a"]})) is None


def usage_of(usage: str, timings: str = "null") -> Usage | None:
    frame = parse_frame(CHAT, b'{"choices":[],"usage":%s,"timings":%s}' % (usage.encode(), timings.encode()))
    assert frame is not None
    same = parse_frame(CHAT, b'{"choices":[{"delta":{}}],"usage":%s,"timings":%s}' % (usage.encode(), timings.encode()))
    assert same is not None
    assert same.usage == frame.usage
    body = ResponseBody(CHAT)
    body.feed(b'{"usage":%s,"timings":%s}' % (usage.encode(), timings.encode()))
    assert body.usage == (frame.usage if len(usage) <= 4096 else None)
    return frame.usage


@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        "1e999",
        "-5",
        "5.0",
        "5e0",
        "true",
        '"5"',
        "null",
        "[5]",
        "{}",
        "-0.0",
        str(2**40 + 1),
        "9" * 5000,
        "Infinity",
    ],
)
def test_what_is_no_number_of_tokens(number: str) -> None:
    assert usage_of(f'{{"prompt_tokens":7,"completion_tokens":{number}}}') == Usage(7, None, None)
    assert usage_of(f'{{"prompt_tokens":{number},"completion_tokens":{number}}}') is None


@pytest.mark.parametrize("number", [0, 1, 31, 2**40])
def test_what_is_a_number_of_tokens(number: int) -> None:
    assert usage_of(f'{{"prompt_tokens":{number},"completion_tokens":{number}}}') == Usage(number, number, None)


@pytest.mark.parametrize(
    ("usage", "timings", "expected"),
    [
        ('{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}', "null", Usage(9, None, 8)),
        ('{"prompt_tokens":9,"prompt_tokens_details":null}', "null", Usage(9, None, None)),
        ('{"prompt_tokens":9,"prompt_tokens_details":[]}', "null", Usage(9, None, None)),
        ('{"prompt_tokens":9,"cache_read_input_tokens":7}', "null", Usage(9, None, 7)),
        ('{"prompt_tokens":9,"prompt_cache_hit_tokens":6,"prompt_cache_miss_tokens":3}', "null", Usage(9, None, 6)),
        ('{"prompt_tokens":9,"cached_tokens":5}', "null", Usage(9, None, 5)),
        ('{"prompt_tokens":9}', '{"cache_n":4,"prompt_n":5}', Usage(9, None, 4)),
        ('{"prompt_tokens":9,"cached_tokens":10}', "null", Usage(9, None, None)),
        ("null", '{"cache_n":4,"prompt_n":5,"predicted_n":3}', Usage(9, 3, 4)),
        ("null", '{"prompt_n":5,"predicted_n":3}', Usage(None, 3, None)),
        ("null", "[]", None),
        ("7", "7", None),
        ("{}", "{}", None),
    ],
)
def test_dialects_of_usage(usage: str, timings: str, expected: Usage | None) -> None:
    assert usage_of(usage, timings) == expected


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("gpt-4o", "gpt-4o"),
        (b'"gpt-4o"', "gpt-4o"),
        (b'"\\u6a21\\u578b"', "模型"),
        ("模型 7B", "模型 7B"),
        ("\ud800", "\ufffd"),
        (b'"\\ud800x"', "\ufffdx"),
        (b'"\xff"', "\ufffd"),
        ("a\nb\x1b[31m\x7f", "a\ufffdb\ufffd[31m\ufffd"),
        ("a\u202eb", "a\ufffdb"),
        ("x" * 256, "x" * 256),
        ("x" * 257, "x" * 255 + "…"),
        ("", None),
        (b"", None),
        (b'""', None),
        (b"7", None),
        (b"null", None),
        (b'"unended', None),
    ],
)
def test_safe_model(raw: bytes | str, name: str | None) -> None:
    assert safe_model(raw) == name
    if name is not None:
        assert safe_model(name) == name
        name.encode()


@settings(deadline=None)  # other work shares the machine
@given(st.text(max_size=300) | st.text(st.characters(min_codepoint=0xD7FF, max_codepoint=0xE001), max_size=5))
def test_any_name_is_made_safe(name: str) -> None:
    name = json.loads(json.dumps(name))  # two lone surrogates can make a pair
    safe = safe_model(name)
    frame = parse_frame(CHAT, json.dumps({"model": name, "choices": [{}]}).encode())
    assert frame is not None
    assert frame.model == safe
    assert (safe is None) == (name == "")
    if safe is not None:
        safe.encode()
        assert safe.isprintable()
        assert len(safe) <= MODEL_LIMIT


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800")
ANYTHING = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)
TEXTS = st.none() | st.text(max_size=3)
FUNCTIONS = st.none() | st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS | ANYTHING})
CALLS = st.none() | st.lists(st.fixed_dictionaries({}, optional={"function": FUNCTIONS}), max_size=3)
DELTAS = st.none() | st.fixed_dictionaries(
    {}, optional={"content": TEXTS | ANYTHING, "reasoning": TEXTS, "refusal": TEXTS, "tool_calls": CALLS | ANYTHING}
)
CHOICES = st.fixed_dictionaries(
    {}, optional={"delta": DELTAS, "text": TEXTS | ANYTHING, "finish_reason": TEXTS | ANYTHING}
)
FRAMES = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.lists(CHOICES, max_size=3) | ANYTHING,
        "model": TEXTS | ANYTHING,
        "usage": st.none()
        | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), ANYTHING)
        | ANYTHING,
        "error": st.none() | ANYTHING,
        "timings": ANYTHING,
        "id": ANYTHING,
    },
)


@settings(deadline=None)  # other work shares the machine
@given(FRAMES, st.sampled_from(list(LENIENT)))
def test_the_quick_way_and_the_lenient_way_agree(frame: dict[str, Any], api: Api) -> None:
    data = json.dumps(frame).encode()
    parsed = parse_frame(api, data)
    assert parsed is not None
    assert parsed == LENIENT[api](data)


@settings(deadline=None)  # other work shares the machine
@given(st.binary() | st.sampled_from(["vllm_chat", "llamacpp_chat", "openai_tools"]).map(transcript), st.data())
def test_no_bytes_raise(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 7))):
        at = draw.draw(st.integers(0, len(damaged)))
        damaged[at : at + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(max_size=2))
    for line in damaged.split(b"\n"):
        payload = bytes(line).removeprefix(b"data: ")
        for api in Api:
            frame = parse_frame(api, payload)
            assert frame is None or frame.model is None or frame.model.isprintable()
            for body in (RequestBody(api), ResponseBody(api)):
                body.feed(payload)
                body.finish()
                assert body.model is None or body.model.isprintable()
                assert body.broken in (True, False)
