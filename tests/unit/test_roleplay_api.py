"""The API as a client sees it: streams, whole replies, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from examples.roleplay.api import Api
from examples.roleplay.engines import Broke, Generation, Options
from examples.roleplay.errors import ApiError
from examples.roleplay.metrics import ServiceMetrics
from examples.roleplay.model import ModelShape
from examples.roleplay.openai import MAX_BODY
from examples.roleplay.personas import DIRECTORY, PersonaStore
from examples.roleplay.protocol import Abort, Finished, Gauges, Step
from examples.roleplay.replies import Asked, Reply, StopFilter
from examples.roleplay.tokens import END, SYSTEM, TokenArray, encode_chat

SHAPE = ModelShape("tiny", layers=1, heads=2, kv_heads=1, head_width=8, context=600, kv_tokens=1024)
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Who goes there?"}]}


class FakeEngine:
    """Says `reply`, ends it as told, and remembers what it was asked."""

    def __init__(self, reply: str = "", ending: Callable[[Generation], None] | None = None) -> None:
        self.shape = SHAPE
        self.ready = True
        self.full = False
        self.prompts: list[list[int]] = []
        self.options: list[Options] = []
        self.aborts: list[Abort] = []
        self._reply = reply
        self._ending = ending
        self._generation: Generation | None = None

    def generate(self, prompt: TokenArray, options: Options) -> Generation:
        if self.full:
            raise ApiError(429, "Too many.", code="rate_limit_exceeded")
        self.prompts.append(prompt.tolist())
        self.options.append(options)
        generation = self._generation = Generation(1, self._abort)
        for letter in self._reply:
            generation.put(ord(letter))
        if self._ending is not None:
            self._ending(generation)
        return generation

    def _abort(self, abort: Abort) -> None:
        self.aborts.append(abort)
        if abort.stopped and self._generation is not None:
            self._generation.finish(finished("stop", len(self._reply)))


def finished(reason: str, tokens: int, cached: int = 16) -> Finished:
    return Finished(1, reason, 20, tokens, cached, 0.001, 0.01, 0.1)


def ends(reason: str, tokens: int) -> Callable[[Generation], None]:
    return lambda generation: generation.finish(finished(reason, tokens))


def service(engine: FakeEngine) -> tuple[Api, ServiceMetrics]:
    metrics = ServiceMetrics([SHAPE], prefix_cache=True)
    return Api({"tiny": engine}, PersonaStore(DIRECTORY, lambda: 0), metrics), metrics


def ask(engine: FakeEngine, method: str, path: str, body: object = None) -> httpx.Response:
    api, _ = service(engine)

    async def run() -> httpx.Response:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        transport = httpx.ASGITransport(app=api.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(run())


def chat(engine: FakeEngine, **more: object) -> httpx.Response:
    return ask(engine, "POST", "/v1/chat/completions", ASK | more)


def frames(response: httpx.Response) -> list[Any]:
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


def test_a_stream_is_role_then_a_frame_per_token_then_reason_usage_and_done() -> None:
    response = chat(FakeEngine('Aye "so"', ends("length", 8)), stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *texts, end, usage, done = frames(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [text["choices"][0]["delta"] for text in texts] == [{"content": letter} for letter in 'Aye "so"']
    assert {text["choices"][0]["finish_reason"] for text in texts} == {None}
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
    assert {frame["id"] for frame in (first, *texts, end, usage)} == {first["id"]}
    assert all(frame["usage"] is None for frame in (first, *texts, end))
    size = len(encode_chat([("user", "Who goes there?")]))
    assert (usage["choices"], usage["usage"]) == (
        [],
        {
            "prompt_tokens": size,
            "completion_tokens": 8,
            "total_tokens": size + 8,
            "prompt_tokens_details": {"cached_tokens": 16},
        },
    )
    assert done == "[DONE]"


def test_a_stream_without_include_usage_has_none() -> None:
    response = chat(FakeEngine("ab", ends("stop", 3)), stream=True)
    assert "usage" not in response.text
    assert len(frames(response)) == 5


def test_a_reply_in_one_piece() -> None:
    body = chat(FakeEngine("Aye.", ends("stop", 5))).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Aye."}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 4


def test_completions_streamed_and_not() -> None:
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
    whole = ask(FakeEngine("abc", ends("length", 3)), "POST", "/v1/completions", body).json()
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "abc")
    streamed = ask(FakeEngine("abc", ends("length", 3)), "POST", "/v1/completions", body | {"stream": True})
    *texts, _, done = frames(streamed)
    assert "".join(frame["choices"][0]["text"] for frame in texts) == "abc"
    assert done == "[DONE]"


def test_the_persona_speaks_before_the_conversation() -> None:
    engine = FakeEngine("", ends("stop", 0))
    chat(engine, persona="swamp-witch")
    (prompt,) = engine.prompts
    assert prompt[1] == SYSTEM
    assert "You are Grandmother Fen." in "".join(map(chr, prompt[2:200]))
    assert prompt[-len("Who goes there?") - 2 : -2] == list(b"Who goes there?")
    assert prompt[-2] == END


def test_options_reach_the_engine() -> None:
    engine = FakeEngine("", ends("stop", 0))
    chat(engine, max_completion_tokens=5, temperature=0, top_p=0.5, seed=-3, ignore_eos=True)
    assert engine.options == [Options(5, 0.0, 0.5, -3, may_end=False)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_ends_the_reply_before_it_and_the_work_for_it(stream: bool) -> None:
    engine = FakeEngine("one two three")
    response = chat(engine, stop=["wx", " t"], stream=stream)
    if stream:
        text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames(response)[:-1])
        reason = frames(response)[-2]["choices"][0]["finish_reason"]
    else:
        text = response.json()["choices"][0]["message"]["content"]
        reason = response.json()["choices"][0]["finish_reason"]
    assert (text, reason) == ("one", "stop")
    assert engine.aborts == [Abort(1, stopped=True)]


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"persona": "nobody"}, 404, "persona", "persona_not_found"),
        ({"model": 5}, 422, "model", None),
        ({"messages": []}, 422, "messages", None),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages", None),
        ({"max_tokens": 0}, 422, "max_tokens", None),
        ({"max_tokens": 1.5}, 422, "max_tokens", None),
        ({"temperature": 3}, 422, "temperature", None),
        ({"n": 2}, 422, "n", None),
        ({"logprobs": True}, 422, "logprobs", None),
        ({"max_tokens": 590}, 400, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context_length_exceeded"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    change: dict[str, object], status: int, param: str, code: str | None
) -> None:
    engine = FakeEngine("x", ends("stop", 1))
    response = chat(engine, **change)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert engine.prompts == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"model":"\\ud800"}', 400),
        (b"[" * 200_000, 422),
        (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
        (b"[]", 422),
        (b'{"model":"tiny","messages":[{"role":"user"}],"max_tokens":' + b"9" * 4000 + b"}", 422),
        (b" " * (MAX_BODY + 1), 413),
    ],
)
def test_hostile_bodies_get_an_error_and_the_service_lives(body: bytes, status: int) -> None:
    response = ask(FakeEngine(), "POST", "/v1/chat/completions", body)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_429() -> None:
    engine = FakeEngine()
    engine.full = True
    response = chat(engine, stream=True)
    assert response.status_code == 429
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_routes_that_are_not_there() -> None:
    assert ask(FakeEngine(), "GET", "/v2").json()["error"]["type"] == "invalid_request_error"
    wrong_method = ask(FakeEngine(), "GET", "/v1/chat/completions")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")


def test_lists_and_health() -> None:
    engine = FakeEngine()
    (model,) = ask(engine, "GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 600)
    assert len(ask(engine, "GET", "/v1/personas").json()["data"]) == len(list(DIRECTORY.glob("*.yaml")))
    assert ask(engine, "GET", "/health").status_code == 200
    engine.ready = False
    assert ask(engine, "GET", "/health").text == "not running: tiny\n"


def test_an_engine_that_dies_is_an_error_frame_in_a_stream_and_503_otherwise() -> None:
    def dies(generation: Generation) -> None:
        generation.break_off(Broke.ENGINE_DIED)

    *_, error, done = frames(chat(FakeEngine("ab", dies), stream=True))
    assert (error["error"]["type"], done) == ("server_error", "[DONE]")
    assert chat(FakeEngine("ab", dies)).status_code == 503


def test_a_service_that_ends_takes_nothing_new() -> None:
    engine = FakeEngine()
    api, _ = service(engine)
    api.closing = True

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api.app()), base_url="http://s") as client:
            return await client.post("/v1/chat/completions", json=ASK)

    assert asyncio.run(run()).status_code == 503
    assert engine.prompts == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reply", ["", "Aye"])
def test_a_client_that_leaves_ends_the_work_for_it(stream: bool, reply: str) -> None:
    engine = FakeEngine(reply)
    api, _ = service(engine)
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        body = json.dumps(ASK | {"stream": stream}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        wanted = 2 + len(reply) if stream else 0
        enough = asyncio.Event()

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is not None:
                return message
            if wanted:
                await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if len(sent) == wanted:
                enough.set()

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"",
            "query_string": b"", "headers": [], "server": ("s", 80), "client": ("c", 1), "scheme": "http",
            "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(api.app()(scope, receive, send), 30)  # type: ignore[arg-type]  # plain dicts for messages

    asyncio.run(run())
    assert engine.aborts == [Abort(1, stopped=False)]
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_write_that_fails_ends_the_work_too() -> None:
    engine = FakeEngine("Aye")
    _, metrics = service(engine)
    facts = Asked("tiny", 0.0, 20, [], chat=True, stream=True, include_usage=False)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def send(_: object) -> None:
        raise OSError("gone")

    async def run() -> None:
        reply = Reply(facts, engine.generate(encode_chat([]), Options(1, 1.0, 1.0, 1, True)), metrics)
        with pytest.raises(OSError, match="gone"):
            await reply({}, receive, send)

    asyncio.run(run())
    assert engine.aborts == [Abort(1, stopped=False)]


def test_metrics_have_vllm_s_names_and_count() -> None:
    engine = FakeEngine("abcde", ends("length", 5))
    api, metrics = service(engine)

    async def run() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api.app()), base_url="http://s") as client:
            for _ in range(3):
                await client.post("/v1/chat/completions", json=ASK | {"stream": True})
            return (await client.get("/metrics")).text

    metrics.step("tiny", Step(7, 64, 48, 1, [(1, 97)] * 5, [finished("length", 5)], Gauges(2, 1, 0.5)))
    text = asyncio.run(run())
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("le") is None
    }
    assert samples[("vllm:time_to_first_token_seconds_count", None)] == 3
    assert samples[("vllm:inter_token_latency_seconds_count", None)] == 12
    assert samples[("vllm:e2e_request_latency_seconds_count", None)] == 3
    assert samples[("vllm:prefix_cache_hits_total", None)] == 48
    assert samples[("vllm:prefix_cache_queries_total", None)] == 64
    assert samples[("vllm:num_preemptions_total", None)] == 1
    assert samples[("vllm:generation_tokens_total", None)] == 5
    assert samples[("vllm:num_requests_running", None)] == 2
    assert samples[("vllm:kv_cache_usage_perc", None)] == 0.5
    assert samples[("vllm:request_success_total", "length")] == 1
    assert samples[("vllm:request_success_total", "error")] == 0
    assert "_created" not in text


TEXT = st.text("ab", max_size=30)


@given(TEXT, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_at_the_first_that_is_complete(text: str, stops: list[str]) -> None:
    subject = StopFilter(stops)
    shown = "".join(subject.feed(letter) for letter in text) + subject.rest()
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if complete:
        so_far = text[: complete[0]]
        assert subject.hit
        assert shown == so_far[: min(so_far.index(stop) for stop in stops if stop in so_far)]
    else:
        assert not subject.hit
        assert shown == text


def test_personas_are_read_again_when_a_file_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    store = PersonaStore(tmp_path, lambda: now[0])
    good = "name: {}\nsummary: s\ncharacter: c\ngreeting: g\n"

    def look() -> dict[str, str]:
        now[0] += 1_000_000_000
        return {key: persona.name for key, persona in store.all().items()}

    assert look() == {}
    (tmp_path / "a.yaml").write_text(good.format("Ann"))
    assert {key: persona.name for key, persona in store.all().items()} == {}, "it looks once a second"
    assert look() == {"a": "Ann"}
    (tmp_path / "a.yaml").write_text(good.format("Anna"))
    (tmp_path / "b.yaml").write_text(good.format("Ben"))
    assert look() == {"a": "Anna", "b": "Ben"}
    for bad in ("name: [", "name: 5", "- x", "a: &a [*a]", "nmae: x\n" + good.format("x"), "\0", "x" * 70_000):
        caplog.clear()
        (tmp_path / "a.yaml").write_text(bad)
        assert look() == {"a": "Anna", "b": "Ben"}, bad
        assert look() == {"a": "Anna", "b": "Ben"}
        assert [record.levelname for record in caplog.records].count("ERROR") == 1
    (tmp_path / "b.yaml").unlink()
    assert look() == {"a": "Anna"}


def test_the_built_in_personas_are_good() -> None:
    personas = PersonaStore(DIRECTORY, lambda: 0).all()
    assert len(personas) == 7
    for persona in personas.values():
        assert 300 < len(persona.instructions) < 1000
        assert persona.instructions.isascii()
