"""What strangers send, what changes under way: the agent measures the next request as ever and does not grow."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from exporter.config import Limits
from exporter.reader import RECORDER_SHARE
from tests.e2e.agent import Agent, agent
from tests.e2e.client import Ask, ask, talk
from tests.e2e.processes import Service, free_port, need, service, wait_for

MIB: Final = 2**20
GROWTH: Final = 6 * MIB + round(Limits().memory * RECORDER_SHARE)
"""The window of the last minute's records fills, whoever asks what."""
"""What the reader holds of one message is bounded (1 MiB of an event, 64 KiB of a head); so is what it may grow by."""
READ_S: Final = 2.0


def post(body: bytes, headers: bytes = b"", path: bytes = b"/v1/chat/completions") -> bytes:
    """A request of these very bytes."""
    size = str(len(body)).encode()
    return b"POST %s HTTP/1.1\r\nhost: localhost\r\n%scontent-length: %s\r\n\r\n%s" % (path, headers, size, body)


def answered(body: bytes, head: bytes = b"content-type: text/event-stream\r\n") -> bytes:
    """A request to which the service answers with this body, head included."""
    raw = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body
    return post(json.dumps({"model": "stranger", "stream": True, "script": {"raw": raw.hex()}}).encode())


def event(**what: object) -> bytes:
    """A frame with content and more."""
    frame = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "x"}}], **what}
    return b"data: " + json.dumps(frame).encode() + b"\n\n"


def usage(text: str) -> bytes:
    """A frame with content, one with this usage, and the end."""
    return event() + b'data: {"choices":[],"usage":%s}\n\n' % text.encode() + DONE


CHUNKED: Final = b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
DONE: Final = b"data: [DONE]\n\n"
COMPLETIONS: Final = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
DEEP: Final = 200_000

HOSTILE: Final[dict[str, bytes]] = {
    # to the request decoder
    "random bytes": bytes((index * 7919 + 13) % 251 for index in range(4099)),
    "zeros": bytes(65_537),
    "TLS hello": bytes.fromhex("16030100c4010000c00303") + bytes(190),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000012040000000000"),
    "header line of 1 MB": b"GET / HTTP/1.1\r\nx: " + b"a" * 1_000_003,
    "a million header lines": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 166_667,
    "chunk size of 16 F's in the request": COMPLETIONS + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n{",
    "content-length of 40 digits": COMPLETIONS + b"content-length: " + b"9" * 40 + b"\r\n\r\n{",
    "two content-lengths": COMPLETIONS + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    # to the JSON scanner
    "JSON nested 200,000 deep": post(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b',"model":"deep"}'),
    "objects nested 200,000 deep": post(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "lone surrogate in the model": post(b'{"model":"\\ud800","stream":true}'),
    "control characters in the model": post(b'{"model":"a\\n\\u0000\\u001b[31m\\" b","stream":true}'),
    "a model of 200 kB": post(b'{"model":"' + b"m" * 200_003 + b'"}'),
    "invalid UTF-8": post(b'{"model":"\xff\xfe\xfd"}'),
    "a number of 5,000 digits": post(b'{"n":' + b"7" * 5_003 + b',"model":"number"}'),
    "an unfinished request": post(b'{"model":"unfinished"}')[:-5],
    # to the response decoder, the frames and the usage
    "chunk size of 16 F's": answered(b"FFFFFFFFFFFFFFFF\r\n" + event() * 3, CHUNKED),
    "chunk size of 4,000 digits": answered(b"1" * 4_001 + b"\r\n" + event() * 3, CHUNKED),
    "chunk size with a sign": answered(b"+5\r\nhello\r\n", CHUNKED),
    "an event of 3 MB": answered(b"data: " + b"x" * 3_000_017 + b"\n\n" + DONE),
    "100,000 empty events": answered(b"data:\n\n" * 100_003 + DONE),
    "frames nested 200,000 deep": answered(b'data: {"choices":' + b"[" * DEEP + b"\n\n" + event() + DONE),
    "NaN usage": answered(usage('{"prompt_tokens":NaN,"completion_tokens":1e999}')),
    "negative usage": answered(usage('{"prompt_tokens":-5,"completion_tokens":-7}')),
    "huge usage": answered(usage('{"prompt_tokens":1%s,"completion_tokens":18446744073709551616}' % ("0" * 30))),
    "usage of other types": answered(usage("[1]") + usage('{"prompt_tokens":true,"completion_tokens":"7"}')),
    "no HTTP at all": post(
        json.dumps({"model": "stranger", "script": {"raw": (b"\x00\xffnonsense\r\n\r\n" * 101).hex()}}).encode()
    ),
    "status of 99999": post(
        json.dumps({"model": "stranger", "script": {"raw": b"HTTP/1.1 99999 OK\r\n\r\n".hex()}}).encode()
    ),
}


def throw(port: int, data: bytes) -> None:
    """Send bytes as they are, take what comes for a moment, and leave."""
    with socket.create_connection(("127.0.0.1", port), READ_S) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def memory(observer: Agent) -> int:
    """Resident bytes of the reader."""
    rss: int = psutil.Process(observer.reader).memory_info().rss
    return rss


def check_valid(text: str) -> None:
    """What is served must still be right for those who read it."""
    promtool = need("promtool", "prometheus")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "NaN" not in text


def test_hostile_traffic_hurts_nobody(transport: str, threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--transport", transport, "--port", str(threaded.port)) as observer:
        reader = observer.reader
        # What is needed anyway is there before the first look at the memory.
        talk(threaded.port, *[[Ask(model="well", script={"frames": 7})]] * 5)
        throw(threaded.port, b"x" * 2**20)
        throw(threaded.port, answered(event() * 1009 + DONE))
        observer.wait_requests(6)
        before = memory(observer)
        measured = 5
        for name, data in HOSTILE.items():
            throw(threaded.port, data)
            answer = ask(threaded.port, model="well", script={"frames": 7, "first_ms": 10})
            assert answer.complete, name
            measured += 1
            metrics = observer.wait_metrics(
                f"the request after {name}",
                lambda metrics: metrics.sum("llm_requests_total", model_name="well") >= measured,  # noqa: B023 - at once
            )
            assert metrics.sum("llm_frames_total", model_name="well") == measured * 7, name
            assert metrics.sum("llm_time_to_first_token_seconds_count", model_name="well") == measured, name
        check_valid(metrics.text)
        assert observer.reader == reader, observer.said()
        assert metrics.one("footlight_reader_restarts_total") == 0
        assert memory(observer) - before < GROWTH
        # Each of the well-behaved ones was seen completely; of the others at least these were not HTTP, SSE or JSON.
        assert metrics.one("footlight_capture_total", outcome="complete") >= measured
        assert metrics.one("footlight_capture_total", outcome="undecodable") >= 7
        assert metrics.sum("llm_generation_tokens_total", model_name="stranger") < 2_000
        wait_for("the end of the strangers' connections", lambda: is_quiet(observer) or None)


def is_quiet(observer: Agent) -> bool:
    metrics = observer.metrics()
    return metrics.one("footlight_connections_tracked") == 0 and metrics.sum("llm_requests_in_flight") == 0


def test_hostile_scrapes_hurt_nobody(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        ask(threaded.port, script={"frames": 3})
        observer.wait_requests(1)
        port = int(observer.address.rpartition(":")[2])
        before, reader = memory(observer), observer.reader
        for query in ("?name[]=" + "a" * 60_000, "?name[]=%00%ff&name[]=llm_requests", "?" + "&" * 9_973, "?name[]=("):
            throw(port, f"GET /metrics{query} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        for name, data in HOSTILE.items():
            throw(port, data)
            assert observer.get("/-/healthy")[0] == 200, name
        assert observer.reader == reader, observer.said()
        assert memory(observer) - before < GROWTH
        assert observer.metrics().sum("llm_requests_total") == 1
        assert "Traceback" not in observer.said()


def test_thousands_of_model_names_stay_bounded(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        asks = [[Ask(model=f"model-{number}-{turn}", stream=False) for turn in range(53)] for number in range(19)]
        talk(threaded.port, *asks)
        metrics = observer.wait_requests(19 * 53)
        names = {labels["model_name"] for name, labels, _ in metrics.samples if name == "llm_requests_total"}
        assert len(names) == 64 + 1
        assert metrics.sum("llm_requests_total", model_name="_other") == 19 * 53 - 64
        assert metrics.one("footlight_model_label_overflows_total") == 19 * 53 - 64


CONFIG: Final = """\
listen: 127.0.0.1:0
services:
  - name: front
    match: {{port: {first}}}
    labels:
      release: {{header: x-release-stage, values: [stable, canary]}}
  - name: back
    match: {{cmdline: tests.e2e.servers.asgi {second} asyncio}}
limits: {{models_per_service: 2}}
"""


def test_a_configuration_with_two_services_and_extra_labels(tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    path = tmp_path / "footlight.yaml"
    path.write_text(CONFIG.format(first=first, second=second))
    with (
        service("threaded", tmp_path, first),
        service("uvicorn-asyncio", tmp_path, second),
        agent(tmp_path, "run", "--config", str(path)) as observer,
    ):
        stable, canary, night = ({"x-release-stage": value} for value in ("stable", "canary", "night"))
        stages = [stable] * 5 + [{"X-Release-Stage": "canary"}] * 2 + [canary, night, {}]
        quick = {"frames": 3}
        talk(first, *[[Ask(model="alto", headers=stage, script=quick)] for stage in stages])
        talk(second, *[[Ask(model=f"model-{turn}", headers=stable, script=quick) for turn in range(5)]] * 3)
        metrics = observer.wait_requests(25)

        def count(**labels: str) -> float:
            return metrics.sum("llm_requests_total", **labels)

        assert count() == 25
        assert count(service_name="front", release="stable") == 5
        assert count(service_name="front", release="canary") == 3
        assert count(service_name="front", release="_other") == 1
        assert count(service_name="front", release="_none") == 1
        assert count(service_name="back") == 15
        assert count(service_name="back", model_name="_other") == 9
        for name, complete in (("front", 10), ("back", 15)):
            assert metrics.one("footlight_capture_total", service_name=name, outcome="complete") == complete
            assert metrics.one("footlight_target_processes", service_name=name) == 1


def test_a_new_process_is_followed_within_two_seconds(tmp_path: Path) -> None:
    port = free_port()
    arguments = ("run", "--wait", "--port", str(port), "--service", "stage")
    with agent(tmp_path, *arguments) as observer:
        assert observer.metrics().one("footlight_target_processes") == 0
        for turn in range(1, 4):
            with service("threaded", tmp_path, port):
                time.sleep(2)
                answers = talk(port, *[[Ask(script={"frames": 3})]] * 5)
                assert all(answer.complete for answer in answers)
                metrics = observer.wait_requests(5 * turn)
                assert metrics.sum("llm_requests_total") == 5 * turn
                assert metrics.one("footlight_capture_total", outcome="complete") == 5 * turn
                assert metrics.one("footlight_target_processes") == 1
            observer.wait_metrics("its end", lambda metrics: metrics.one("footlight_target_processes") == 0)


def test_a_response_that_was_under_way_at_the_start_is_not_counted_as_seen(threaded: Service, tmp_path: Path) -> None:
    stream = Ask(script={"frames": 97, "gap_ms": 50})
    with socket.create_connection(("127.0.0.1", threaded.port)) as early:
        early.sendall(stream.encoded())
        assert early.recv(1)
        with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
            talk(threaded.port, *[[Ask(script={"frames": 3})]] * 3)
            metrics = observer.wait_requests(3)
            metrics = observer.wait_metrics(
                "the early one", lambda metrics: metrics.one("footlight_capture_total", outcome="start_unseen") == 1
            )
            assert metrics.sum("llm_requests_total") == 3
            assert metrics.one("footlight_capture_total", outcome="complete") == 3
            assert metrics.one("footlight_capture_ratio") == pytest.approx(3 / 4)


def test_no_thread_of_the_reader_kept_a_privilege(threaded: Service, tmp_path: Path) -> None:
    """What a thread may gain is its own: one that began before privileges were given up would keep it."""
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        ask(threaded.port)
        observer.wait_requests(1)
        statuses = [
            dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            for task in Path(f"/proc/{observer.reader}/task").iterdir()
        ]
    assert len(statuses) > 1  # its own loop, and those who ask slow sources
    for status in statuses:
        assert status["Uid"].split() == ["65534"] * 4
        assert status["NoNewPrivs"].strip() == "1", status["Name"]
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, (status["Name"], kind)
