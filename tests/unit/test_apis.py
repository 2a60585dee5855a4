"""Which API a request asks for, and what the bodies of requests and answers say in each."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire.apis import Api, RequestBody, ResponseBody, api_of
from probes.wire.frames import Usage

CHAT = Api.CHAT_COMPLETIONS
WITH_TURNS = (Api.CHAT_COMPLETIONS, Api.MESSAGES, Api.RESPONSES)


@pytest.mark.parametrize(
    ("method", "target", "api"),
    [
        (b"POST", b"/v1/chat/completions", CHAT),
        (b"POST", b"/chat/completions", CHAT),
        (b"POST", b"/openai/deployments/x/chat/completions?api-version=2024-10-21", CHAT),
        (b"POST", b"http://a:8000/v1/chat/completions", CHAT),
        (b"POST", b"/v1/completions", Api.COMPLETIONS),
        (b"POST", b"/v1/completions?q=/chat/completions", Api.COMPLETIONS),
        (b"POST", b"/completion", Api.COMPLETION),
        (b"POST", b"/v1/messages", Api.MESSAGES),
        (b"POST", b"/anthropic/v1/messages?beta=true", Api.MESSAGES),
        (b"POST", b"/v1/responses", Api.RESPONSES),
        (b"POST", b"/responses", Api.RESPONSES),
        (b"POST", b"/openai/responses?api-version=2025-03-01-preview", Api.RESPONSES),
        (b"GET", b"/v1/chat/completions", None),
        (b"GET", b"/metrics", None),
        (b"GET", b"/v1/responses/resp_67", None),
        (b"POST", b"/v1/chat/completions/7", None),
        (b"POST", b"/v1/messages/count_tokens", None),
        (b"POST", b"/v1/messages/batches", None),
        (b"POST", b"/v1/threads/7/messages", None),
        (b"POST", b"/rooms/7/messages", None),
        (b"POST", b"/survey/7/responses", None),
        (b"POST", b"/v1/models", None),
        (b"POST", b"/xcompletions", None),
        (b"POST", b"/xcompletion", None),
        (b"POST", b"", None),
    ],
)
def test_api_of(method: bytes, target: bytes, api: Api | None) -> None:
    assert api_of(method, target) is api


def test_request_bodies() -> None:
    body = RequestBody(CHAT)
    body.feed(b'{"messages":[{"content":"\\"model\\":\\"no\\""}],"stream":tr')
    assert (body.model, body.stream, body.broken) == (None, False, False)
    body.feed(b'ue,"mod\\u0065l":"role\\u2011play"}')
    body.finish()
    assert (body.model, body.stream, body.broken) == ("role\u2011play", True, False)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model":"m"', b'{"model":"m"}{', b"null"])
@pytest.mark.parametrize("api", Api)
def test_request_bodies_that_are_no_object(api: Api, text: bytes) -> None:
    body = RequestBody(api)
    body.feed(text)
    body.finish()
    assert body.broken
    assert body.turn is None


@pytest.mark.parametrize("value", ["7", "null", "{}", '["m"]', '""', "NaN", '"' + "x" * 5000 + '"'])
def test_models_that_are_no_name(value: str) -> None:
    body = RequestBody(CHAT)
    body.feed(b'{"model":' + value.encode() + b"}")
    assert body.model is None


def test_a_gap_in_a_request_body() -> None:
    body = RequestBody(CHAT)
    body.feed(b'{"model":"m","messages":[{"role":"user","content":"a"}],"x":"')
    body.gap()
    body.feed(b'","stream":true}')
    body.finish()
    assert (body.model, body.stream, body.broken, body.turn) == ("m", False, True, None)


# --- turns ---------------------------------------------------------------------------------------------------------


def turn_of(api: Api, body: object) -> int | None:
    scanner = RequestBody(api)
    scanner.feed(json.dumps(body).encode())
    scanner.finish()
    return scanner.turn


def conversation(users: int) -> list[dict[str, object]]:
    talk: list[dict[str, object]] = [{"role": "system", "content": 'you are a "user"'}]
    for number in range(users):
        parts = [{"type": "text", "text": f"turn {number}"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
        talk.append({"role": "user", "content": parts if number % 3 == 2 else f"turn {number}"})
        call = {"id": "c", "function": {"name": "f", "arguments": '{"role":"user"}'}}
        talk.append({"role": "assistant", "content": None, "tool_calls": [call]})
        talk.append({"tool_call_id": "c", "content": '"role": "user"', "role": "tool"})
    return talk[: len(talk) - 2] if users else talk


@pytest.mark.parametrize("users", [1, 2, 5, 101])
@pytest.mark.parametrize("api", WITH_TURNS)
def test_the_turn_is_the_number_of_messages_of_the_user(api: Api, users: int) -> None:
    key = "input" if api is Api.RESPONSES else "messages"
    assert turn_of(api, {"model": "m", key: conversation(users), "stream": True}) == users


@pytest.mark.parametrize(
    ("api", "body", "turn"),
    [
        (CHAT, {"messages": conversation(0)}, None),
        (CHAT, {"messages": []}, None),
        (CHAT, {"messages": None}, None),
        (CHAT, {"messages": {"role": "user"}}, None),
        (CHAT, {"messages": ["user", {"role": "user"}]}, None),
        (CHAT, {"messages": [{"role": "user"}, [{"role": "user"}]]}, None),
        (CHAT, {"messages": [{"x": {"role": "user"}}]}, None),
        (CHAT, {"messages": [{"role": "user", "x": {"role": "tool", "y": [[{"role": "tool"}]]}}]}, 1),
        (CHAT, {"messages": [{"x": "role", "y": "user"}]}, None),
        (CHAT, {"messages": [{"role": {"role": "user"}}]}, None),
        (CHAT, {"messages": [{"role": "users"}, {"role": "use"}, {"role": "User"}, {"roles": "user"}]}, None),
        (CHAT, {"input": conversation(2)}, None),
        (CHAT, {"prompt": "a"}, None),
        (Api.COMPLETIONS, {"prompt": "a", "messages": conversation(2)}, None),
        (Api.COMPLETION, {"prompt": "a"}, None),
        (Api.MESSAGES, {"system": "s", "messages": conversation(3)}, 3),
        (Api.RESPONSES, {"input": 'a "quoted" text'}, 1),
        (Api.RESPONSES, {"input": "a", "previous_response_id": None}, 1),
        (Api.RESPONSES, {"input": "a", "previous_response_id": "resp_67"}, None),
        (Api.RESPONSES, {"conversation": {"id": "conv_7"}, "input": conversation(2)}, None),
        (Api.RESPONSES, {"conversation": "x" * 5000, "input": conversation(2)}, None),
        (Api.RESPONSES, {"input": [{"type": "function_call_output", "output": "1"}, {"role": "user"}]}, 1),
        (Api.RESPONSES, {"messages": conversation(2)}, None),
    ],
)
def test_turns_that_are_known_and_that_are_not(api: Api, body: object, turn: int | None) -> None:
    assert turn_of(api, body) == turn


def test_the_last_conversation_counts() -> None:
    body = RequestBody(CHAT)
    body.feed(b'{"messages":[{"role":"user"},{"role":"user"}],"messages":[{"role":"user"}]}')
    assert body.turn == 1
    body = RequestBody(CHAT)
    body.feed(b'{"messages":[{"role":"user"},{"role":"user"}],"messages":7}')
    assert body.turn is None


def test_an_odd_conversation_does_not_hide_the_model() -> None:
    body = RequestBody(CHAT)
    body.feed(b'{"messages":[{"role":"user"},7,[["x"]],{"a":[]}],"model":"m"}')
    assert (body.model, body.turn, body.broken) == ("m", None, False)


def test_a_body_that_is_not_over_has_no_turn() -> None:
    data = json.dumps({"messages": conversation(3)}).encode()
    for end in range(len(data)):
        body = RequestBody(CHAT)
        body.feed(data[:end])
        assert body.turn is None


def test_the_turn_in_every_split() -> None:
    data = json.dumps({"messages": conversation(7), "model": "m"}, indent=1).encode()
    for at in range(len(data)):
        body = RequestBody(CHAT)
        body.feed(data[:at])
        body.feed(data[at:])
        assert (body.turn, body.model) == (7, "m")


TEXTS = st.text(st.sampled_from('"\\{}[]:, user'), max_size=11) | st.sampled_from(["role", "user", "tool"])
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=17,
)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "users"])}) | st.dictionaries(
    st.sampled_from(["role", "content", "name"]) | TEXTS, VALUES, max_size=5
)


@settings(deadline=None)  # other work shares the machine
@given(st.lists(MESSAGES, max_size=7), st.sampled_from([None, 1]), st.lists(st.integers(1, 37), min_size=1, max_size=5))
def test_the_turn_is_what_json_loads_would_count(
    messages: list[dict[str, object]], indent: int | None, sizes: list[int]
) -> None:
    data = json.dumps({"a": 1, "messages": messages, "model": "m"}, indent=indent).encode()
    body = RequestBody(CHAT)
    at = piece = 0
    while at < len(data):
        body.feed(data[at : at + sizes[piece % len(sizes)]])
        at += sizes[piece % len(sizes)]
        piece += 1
    assert body.turn == (sum(message.get("role") == "user" for message in messages) or None)
    assert body.model == "m"


# --- answers in one piece ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "text", "usage"),
    [
        (Api.COMPLETION, {"content": "a", "stop": True, "tokens_evaluated": 41, "tokens_predicted": 4}, (41, 4, None)),
        (Api.COMPLETION, {"timings": {"cache_n": 0, "prompt_n": 41, "predicted_n": 4}}, (41, 4, 0)),
        (Api.COMPLETION, {"tokens_cached": 44, "tokens_evaluated": 41}, (41, None, None)),
        (Api.COMPLETIONS, {"usage": {"prompt_tokens": 7}, "tokens_evaluated": 41}, (7, None, None)),
        (CHAT, {"tokens_evaluated": 41}, None),
        (Api.MESSAGES, {"usage": {"input_tokens": 7, "output_tokens": 5}}, (7, 5, None)),
        (Api.MESSAGES, {"usage": {"prompt_tokens": 7}}, None),
        (Api.RESPONSES, {"usage": {"input_tokens": 7, "output_tokens": 5}}, (7, 5, None)),
        (Api.RESPONSES, {"usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0}}}, (7, None, 0)),
    ],
)
def test_usage_of_a_body(api: Api, text: object, usage: tuple[int | None, ...] | None) -> None:
    body = ResponseBody(api)
    body.feed(json.dumps(text).encode())
    body.finish()
    assert body.usage == (None if usage is None else Usage(*usage))


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"error":null}', False),
        ('{"error":{"code":400}}', True),
        ('{"type":"error","error":{"type":"overloaded_error"}}', True),
        ('{"type":"err\\u006fr"}', True),
        ('{"type":"message"}', False),
        ('{"object":"error"}', True),
    ],
)
def test_errors_of_a_body(api: Api, text: str, error: bool) -> None:
    body = ResponseBody(api)
    body.feed(text.encode())
    assert body.error is error
