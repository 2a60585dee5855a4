"""What the role-play service found in its prefix cache: the wire, its own metrics and probe points tell the same."""

from __future__ import annotations

import http.client
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.roleplay.kv_cache import BLOCK_TOKENS
from examples.roleplay.lookups import LIBRARY
from tests.e2e.agent import Agent, Metrics, agent
from tests.e2e.processes import answers, free_port, started, wait_for

MODELS = ("understudy", "headliner")
TURNS = 6
REQUESTS = 499
"""83 conversations of `TURNS` turns, and the first turn of another one."""
INSTRUCTIONS = "You keep the lighthouse of a small harbour, alone."
POINTS = {"function": "symbol: llm_kv_lookup", "twin": "usdt: roleplay:kv_lookup"}
COUNTS = ("queries", "hits")


# ---- what is asked, and what must be found ----


class PrefixCache:
    """What a prefix cache without an end finds: whole blocks, and never the last token of a prompt."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def look_up(self, prompt: bytes) -> int:
        """Tokens of the prompt that are found; then it is known."""
        found = 0
        while found + BLOCK_TOKENS < len(prompt) and prompt[: found + BLOCK_TOKENS] in self._known:
            found += BLOCK_TOKENS
        self._known.update(prompt[:size] for size in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS))
        return found


def tokens_of(messages: list[dict[str, str]]) -> bytes:
    """A byte for each token of a chat, as the service's template has them: marks around each message."""
    begin, end_of_message = b"\x00", b"\x01"
    marks = {"system": b"\x02", "user": b"\x03", "assistant": b"\x04"}
    text = b"".join(marks[each["role"]] + each["content"].encode() + end_of_message for each in messages)
    return begin + text + marks["assistant"]


def turn_of(messages: list[dict[str, str]]) -> str:
    """The label that says how far the conversation has come."""
    turn = sum(each["role"] == "user" for each in messages)
    return "1" if turn == 1 else "2-4" if turn <= 4 else "5+"


@dataclass
class Expected:
    """Tokens by model, and by model and turn."""

    queries: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    turn_queries: Counter[tuple[str, str]] = field(default_factory=Counter)
    turn_hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    """Cached tokens by model, as the client read them in the usage."""


def usage_of(body: bytes, stream: bool) -> tuple[str, dict[str, Any]]:
    """The reply's text and its usage."""
    if not stream:
        value = json.loads(body)
        return value["choices"][0]["message"]["content"], value["usage"]
    frames = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    text = "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])
    return text, frames[-1]["usage"]


def talk(port: int, *, remembers: bool) -> Expected:
    """Hold all conversations, one after the other; return what they must have found."""
    expected = Expected()
    caches = {model: PrefixCache() for model in MODELS}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    messages: list[dict[str, str]] = []
    for number in range(REQUESTS):
        conversation, turn = divmod(number, TURNS)
        model = MODELS[conversation % len(MODELS)]
        if turn == 0:
            messages = [{"role": "system", "content": INSTRUCTIONS}]
        messages.append({"role": "user", "content": f"{conversation} asks, {turn}"})
        stream = number % 2 == 0
        body = {"model": model, "messages": messages, "max_tokens": 1, "ignore_eos": True, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        text, usage = usage_of(raw, stream)

        prompt = tokens_of(messages)
        hits = caches[model].look_up(prompt) if remembers else 0
        told = usage["prompt_tokens_details"]["cached_tokens"]
        assert (usage["prompt_tokens"], told) == (len(prompt), hits)
        key = (model, turn_of(messages))
        expected.queries[model] += len(prompt)
        expected.turn_queries[key] += len(prompt)
        expected.hits[model] += hits
        expected.turn_hits[key] += hits
        expected.told[model] += told
        messages.append({"role": "assistant", "content": text})
    connection.close()
    return expected


# ---- the service and the agent ----


@contextmanager
def roleplay(folder: Path, *options: str) -> Iterator[int]:
    """Run the service within the context, which has the port that it accepts connections on."""
    port = free_port()
    command = [sys.executable, "-m", "examples.roleplay", "serve", "--port", str(port), *options]
    with started(command, folder / "roleplay.log") as process:
        wait_for("the role-play service", lambda: answers(port) or (None if process.alive() else process.said()))
        assert process.alive(), process.said()
        yield port


def config(folder: Path, port: int) -> str:
    points = "\n".join(
        f"  - {{name: {name}, library: {LIBRARY.name}, {place}, model: 1, hit_tokens: 2, looked_up_tokens: 3}}"
        for name, place in POINTS.items()
    )
    path = folder / "footlight.yaml"
    # By its address, so that it is asked before the first request: what it tells then is where its news begin.
    service = f"  - {{name: roleplay, match: {{port: {port}}}, engine_metrics: 'http://127.0.0.1:{port}/metrics'}}"
    path.write_text(f"services:\n{service}\nprobe_points:\n{points}\n")
    return str(path)


def engines_own(port: int) -> dict[tuple[str, str], float]:
    """(queries or hits, model) -> tokens, by the page of the service itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        (what, sample.labels["model_name"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for what in COUNTS
        if sample.name == f"vllm:prefix_cache_{what}_total"
    }


def settled(observer: Agent, expected: Expected) -> Metrics:
    """The scrape in which every source has told of every request."""
    queries = sum(expected.queries.values())

    def all_told(metrics: Metrics) -> bool:
        return all(
            metrics.sum("llm_kv_cache_source_lookup_tokens_total", source=source) == queries
            for source in ("wire", "engine", "probe_point")
        )

    return observer.wait_metrics("the same look-ups from three sources", all_told, 20)


@pytest.mark.parametrize("remembers", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_three_sources_tell_the_same_of_499_requests(tmp_path: Path, remembers: bool) -> None:
    assert LIBRARY.exists(), "the engine's library is not built; try: make native"
    with (
        roleplay(tmp_path, "--prefix-cache" if remembers else "--no-prefix-cache") as port,
        agent(tmp_path, "run", "--config", config(tmp_path, port)) as observer,
    ):
        expected = talk(port, remembers=remembers)
        metrics = settled(observer, expected)
        own = engines_own(port)

    assert (sum(expected.hits.values()) > 0) == remembers
    assert expected.told == expected.hits
    for model in MODELS:
        labels = {"service_name": "roleplay", "model_name": model}
        queries, hits = expected.queries[model], expected.hits[model]
        ratio = hits / queries
        # the engine, by itself and as the agent reads it
        assert (own["queries", model], own["hits", model]) == (queries, hits)
        assert metrics.one("llm_engine_prefix_cache_queries_total", **labels) == queries
        assert metrics.one("llm_engine_prefix_cache_hits_total", **labels) == hits
        # the function and its twin
        for point in POINTS:
            assert metrics.one("llm_probe_point_looked_up_tokens_total", **labels, probe_point=point) == queries
            assert metrics.one("llm_probe_point_hit_tokens_total", **labels, probe_point=point) == hits
        # the wire counts, once
        assert metrics.find("llm_kv_cache_source_info", **labels) == [1]
        assert metrics.one("llm_kv_cache_source_info", **labels, source="wire") == 1
        assert metrics.sum("llm_prefix_cache_queries_total", **labels) == queries
        assert metrics.sum("llm_prefix_cache_hits_total", **labels) == hits
        assert metrics.one("llm_kv_cache_hit_ratio", **labels) == pytest.approx(ratio, abs=1e-12)
        for source in ("wire", "engine", "probe_point"):
            assert metrics.one("llm_kv_cache_source_lookup_tokens_total", **labels, source=source) == queries
            assert metrics.one("llm_kv_cache_source_hit_tokens_total", **labels, source=source) == hits
        for turn in ("1", "2-4", "5+"):
            asked, found = expected.turn_queries[model, turn], expected.turn_hits[model, turn]
            assert metrics.one("llm_prefix_cache_turn_queries_total", **labels, turn=turn) == asked
            assert metrics.one("llm_prefix_cache_turn_hits_total", **labels, turn=turn) == found
            by_turn = metrics.one("llm_kv_cache_turn_hit_ratio", **labels, turn=turn)
            assert by_turn == pytest.approx(found / asked, abs=1e-12)
    calls = {point: metrics.sum("llm_probe_point_calls_total", probe_point=point) for point in POINTS}
    assert calls == dict.fromkeys(POINTS, REQUESTS)
    assert metrics.sum("footlight_lost_events_total") == 0
