"""The HTTP side: paths, negotiation, compression, readiness, and query strings that strangers send."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest

from exporter.history import History
from exporter.live import Live, Parts
from exporter.metrics import Format, Metrics, Sources
from exporter.slis import Slis
from exporter.status import AgentStatus, ProbeStatus, ReaderStatus
from exporter.web import create_app

NOW_NS = 7_000_000_000
UP = AgentStatus(NOW_NS, "ring", (ProbeStatus("requests", True, "", 0, None, None, ()),), (), 0, ())
DOWN = replace(UP, probes=(ProbeStatus("requests", False, "no <b>tracefs</b>", 0, None, None, ()),))

Get = Callable[..., httpx.Response]


def client(status: AgentStatus | None) -> Get:
    slis = Slis()
    slis.series("roleplay", "bard", "completions", (), admit=True)
    live = Live(Parts(slis, History(slis), lambda: status, lambda: ReaderStatus(7), "<0.1>", clock=lambda: NOW_NS))
    metrics = Metrics(slis, Sources(lambda: status), version="<0.1>")
    app = create_app(metrics, live, lambda: status, clock=lambda: NOW_NS)

    def get(url: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://agent") as http:
                sent = {name.replace("_", "-"): text for name, text in headers.items()}
                return await http.request(method, url, headers={"accept-encoding": "identity", **sent})

        return asyncio.run(ask())

    return get


@pytest.fixture
def get() -> Get:
    return client(UP)


def test_metrics_in_both_formats(get: Get) -> None:
    plain = get("/metrics")
    assert plain.status_code == 200
    assert plain.headers["content-type"] == Format.TEXT.value
    assert b"# TYPE llm_requests_total counter\n" in plain.content
    openmetrics = get("/metrics", accept="application/openmetrics-text;version=1.0.0")
    assert openmetrics.headers["content-type"] == Format.OPENMETRICS.value
    assert openmetrics.content.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("encoding", "compressed"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.00", False),
        ("br", False),
    ],
)
def test_compression_when_it_is_asked_for(get: Get, encoding: str, compressed: bool) -> None:
    answer = get("/metrics", accept_encoding=encoding)
    assert answer.headers.get("content-encoding") == ("gzip" if compressed else None)
    assert answer.content.startswith(b"# HELP llm_requests_total ")  # httpx has decompressed it
    assert (int(answer.headers["content-length"]) < len(answer.content)) == compressed
    assert answer.headers["vary"] == "accept, accept-encoding"


@pytest.mark.parametrize(("encoding", "compressed"), [("gzip", True), ("br", False)])
def test_the_pages_data_are_compressed_when_it_is_asked_for(get: Get, encoding: str, compressed: bool) -> None:
    answer = get("/api/history", accept_encoding=encoding)
    assert answer.headers.get("content-encoding") == ("gzip" if compressed else None)
    assert (int(answer.headers["content-length"]) < len(answer.content)) == compressed
    assert answer.headers["vary"] == "accept-encoding"
    assert len(answer.json()["times"]) == 150


def test_a_short_answer_is_not_compressed(get: Get) -> None:
    answer = get("/metrics?name[]=llm_requests_total", accept_encoding="gzip")
    assert "content-encoding" not in answer.headers
    assert answer.text.count("# TYPE") == 1
    assert "content-encoding" not in get("/api/live", accept_encoding="gzip").headers


def test_names_choose_families(get: Get) -> None:
    text = get("/metrics?name[]=llm_requests_total&name%5B%5D=footlight_build_info").text
    assert [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")] == [
        "llm_requests_total",
        "footlight_build_info",
    ]


@pytest.mark.parametrize(
    "query",
    [
        "name[]=%ff%fe",
        "name[]=%ED%A0%80",
        "name[]=%00",
        "name[]",
        "&&&=",
        "%",
        "name[]=" + "a" * 60_000,
        "name[]=x&" * 7_001,
    ],
)
def test_hostile_query_strings_are_answered(get: Get, query: str) -> None:
    assert get(f"/metrics?{query}").status_code == 200


def test_health_and_readiness(get: Get) -> None:
    assert (get("/-/healthy").status_code, get("/-/healthy").text) == (200, "healthy\n")
    assert (get("/-/ready").status_code, get("/-/ready").text) == (200, "ready\n")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (None, "the attacher has not reported yet\n"),
        (DOWN, "not attached: requests: no <b>tracefs</b>\n"),
        (replace(UP, at_ns=NOW_NS - 13_000_000_000), "the attacher has not reported for 13 s\n"),
    ],
)
def test_readiness_says_why_not(status: AgentStatus | None, reason: str) -> None:
    get = client(status)
    answer = get("/-/ready")
    assert (answer.status_code, answer.text) == (503, reason)
    assert answer.headers["content-type"].startswith("text/plain")
    assert get("/-/healthy").status_code == 200
    assert get("/metrics").status_code == 200


def test_the_page_has_all_that_it_names(get: Get) -> None:
    answer = get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert {"metrics", "-/ready", "-/healthy", "page/page.js", "page/page.css", "page/uplot.js"} <= set(named)
    for path in named:
        if path not in {"api/why", "api/record"}:  # without the scheduler probe there is none
            assert get(f"/{path}").status_code == 200, path
    assert get("/page/page.js").headers["content-type"].startswith("text/javascript")
    assert not re.search(r"(?:https?:)?//[a-z]", answer.text)  # nothing comes from elsewhere


@pytest.mark.parametrize("name", ["", "nothing.js", "uplot.LICENSE", "../web.py", "%2e%2e/web.py", "index.html/"])
def test_there_is_no_other_file(get: Get, name: str) -> None:
    assert get(f"/page/{name}").status_code == 404


def test_how_things_stand_is_json(get: Get) -> None:
    now = get("/api/live")
    assert now.headers["content-type"] == "application/json"
    told = now.json()
    assert (told["ready"], told["version"], told["agent"]["connections"]) == (True, "<0.1>", 7)
    (row,) = told["models"]
    assert (row["service"], row["model"], row["api"]) == ("roleplay", "bard", "completions")
    assert client(DOWN)("/api/live").json()["state"] == "Not ready: not attached: requests: no <b>tracefs</b>"
    past = get("/api/history").json()
    assert (past["step_seconds"], past["models"]) == (12, [])
    assert len(past["times"]) == 150


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "/-/", "/../etc/passwd", "/%2e%2e/x"])
def test_what_is_not_there_is_404(get: Get, path: str) -> None:
    answer = get(path)
    assert answer.status_code == 404
    assert "/metrics" in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/metrics", "/", "/-/ready"])
def test_other_methods_are_405(get: Get, path: str, method: str) -> None:
    answer = get(path, method)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/metrics", "/", "/-/ready", "/-/healthy"])
def test_head_is_get_without_the_body(get: Get, path: str) -> None:
    answer = get(path, "HEAD")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/metrics", "/", "/nothing"])
def test_every_answer_carries_the_safe_headers(get: Get, path: str) -> None:
    headers = get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["cache-control"] == "no-store"


# ---- what is explained and recorded ----


class Explaining:
    """What requests are explained by, and recordings; `asked` are the seconds of each recording."""

    def __init__(self, recording: Callable[[], Iterator[bytes]] = lambda: iter((b'{"a":', b"1}"))) -> None:
        self.asked: list[float] = []
        self.reloads = 0
        self.problem: str | None = None
        self._recording = recording
        slis = Slis()
        live = Live(Parts(slis, History(slis), lambda: UP, lambda: ReaderStatus(0), "1", clock=lambda: NOW_NS))
        metrics = Metrics(slis, Sources(lambda: UP))
        self.app = create_app(metrics, live, lambda: UP, lambda: NOW_NS, self.why, self.record, self.reload)

    async def reload(self) -> str | None:
        self.reloads += 1
        return self.problem

    def why(self) -> Iterator[bytes]:
        yield b'{"n":1}\n'
        yield b'{"n":2}\n'

    def record(self, seconds: float) -> Iterator[bytes]:
        self.asked.append(seconds)
        return self._recording()

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://agent")

    def get(self, path: str, method: str = "GET") -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.http() as http:
                return await http.request(method, path)

        return asyncio.run(ask())


def test_explained_requests_are_json_lines() -> None:
    answer = Explaining().get("/api/why")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jsonl")
    assert [json.loads(line) for line in answer.text.splitlines()] == [{"n": 1}, {"n": 2}]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("query", "seconds"), [("", 60), ("?seconds=7", 7), ("?seconds=0.5", 0.5), ("?seconds=60", 60)]
)
def test_a_recording_is_json_of_the_last_seconds(query: str, seconds: float) -> None:
    sources = Explaining()
    answer = sources.get(f"/api/record{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"a": 1}
    assert sources.asked == [seconds]


@pytest.mark.parametrize(
    "text", ["0", "60.001", "61", "-1", "1e1", "nan", "inf", "", "1_0", "\u0661", "0x1", " 1", "9" * 5000]
)
def test_other_times_are_refused(text: str) -> None:
    sources = Explaining()
    answer = sources.get(f"/api/record?seconds={text}")
    assert answer.status_code == 400
    assert "at most 60" in answer.text
    assert sources.asked == []


@pytest.mark.parametrize("path", ["/api/why", "/api/record", "/api/record?seconds=5"])
def test_without_the_scheduler_probe_there_is_nothing_and_it_says_why(get: Get, path: str) -> None:
    answer = get(path)
    assert answer.status_code == 404
    assert "scheduler probe" in answer.text


def test_one_recording_at_a_time() -> None:
    """Each is a copy of the last minute: twenty at once would be more than the agent may use."""
    sources = Explaining()

    async def ask() -> list[httpx.Response]:
        async with sources.http() as http:
            return list(await asyncio.gather(*(http.get("/api/record") for _ in range(20))))

    answers = asyncio.run(ask())
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200] + [503] * 19
    assert len(sources.asked) == 1
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    assert sources.get("/api/record").status_code == 200


def test_after_a_recording_that_broke_the_next_one_is_made() -> None:
    def breaks() -> Iterator[bytes]:
        yield b"{"
        raise OSError("broken")

    sources = Explaining(breaks)
    for count in (1, 2):
        with pytest.raises(OSError, match="broken"):
            sources.get("/api/record")
        assert len(sources.asked) == count


def test_the_loop_has_its_turn_between_the_pieces() -> None:
    turns = 0
    pieces = 23

    async def ask() -> None:
        nonlocal turns
        done = asyncio.Event()

        async def count() -> None:
            nonlocal turns
            while not done.is_set():
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        async with Explaining(lambda: iter([b" "] * pieces)).http() as http:
            assert (await http.get("/api/record")).text == " " * pieces
        done.set()
        await counting

    asyncio.run(ask())
    assert turns >= pieces


# ---- another configuration ----


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_reload_is_asked_for_and_its_outcome_told(method: str) -> None:
    explaining = Explaining()
    assert (explaining.get("/-/reload", method).status_code, explaining.reloads) == (200, 1)
    explaining.problem = "a.yaml:7: unknown key 'x'"
    refused = explaining.get("/-/reload", method)
    assert (refused.status_code, refused.text) == (500, "a.yaml:7: unknown key 'x'\n")


def test_a_link_cannot_reload(get: Get) -> None:
    explaining = Explaining()
    assert explaining.get("/-/reload").status_code == 405
    assert explaining.reloads == 0
    assert get("/-/reload", "POST").status_code == 500
