"""The live page, in a real browser: what stands on it is what /metrics says, and nothing goes wrong on the way."""

from __future__ import annotations

import contextlib
import html
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from exporter.history import History
from exporter.live import JsonObject, Live, Parts
from exporter.slis import Slis
from exporter.status import ReaderStatus
from exporter.web import PAGE
from tests.e2e.agent import Agent, agent
from tests.e2e.browser import opened
from tests.e2e.client import Ask, talk
from tests.e2e.processes import service

REQUESTS = 23
UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}


def cell(page: str, title: str) -> str:
    (text,) = re.findall(rf'<td data-title="{title}"[^>]*>([^<]*)</td>', page)
    return html.unescape(text)


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("page")
    ask = Ask(model="<b>alto</b>", script={"frames": 11, "first_ms": 300, "gap_ms": 5})
    with (
        service("uvicorn-uvloop", folder) as running,
        agent(folder, "run", "--service", "stage", "--port", str(running.port)) as observer,
    ):
        talk(running.port, *[[ask]] * REQUESTS)
        observer.wait_requests(REQUESTS)
        yield observer


def test_the_page_shows_what_metrics_say(watched: Agent) -> None:
    page, said = opened(f"http://{watched.address}/")
    assert said == ""
    assert "Ready: every wanted probe is attached." in page
    metrics = watched.metrics()
    for quantile, title in ((0.5, "TTFT p50"), (0.99, "TTFT p99")):
        measured = metrics.one("llm_latency_quantile_seconds", sli="ttft", quantile=f"{quantile}")
        assert seconds(cell(page, title)) == pytest.approx(measured, rel=0.005)
    assert cell(page, "failed") == "0"
    assert cell(page, "seen") == "100.0 %"
    assert "&lt;b&gt;alto&lt;/b&gt;" in page  # a name from the network is text
    assert "<b>alto</b>" not in page


def test_a_narrow_dark_screen_has_no_error_either(watched: Agent) -> None:
    _, said = opened(f"http://{watched.address}/", "--window-size=390,844", "--blink-settings=preferredColorScheme=0")
    assert said == ""


def test_slow_requests_stand_there_with_their_causes(watched: Agent) -> None:
    page, _ = opened(f"http://{watched.address}/")
    shown = re.findall(r'<details data-number="([0-9]+)"', page)
    assert len(shown) == 10
    status, _, line = watched.get(f"/api/why?number={shown[0]}")
    assert status == 200
    assert f'"number":{shown[0]}' in line
    assert "mostly sleep" in page


def test_one_that_is_not_there_is_told(watched: Agent) -> None:
    for number in ("0", "999999", "-1", "1e3", "x", "9" * 40):
        assert watched.get(f"/api/why?number={number}")[0] == 404


def open_files(observer: Agent) -> float | None:
    (service,) = json.loads(observer.get("/api/live")[2])["health"]["services"]
    (value,) = (each["value"] for each in service["signals"] if each["signal"] == "open_files")
    return None if value is None else float(value)


def test_a_service_has_a_tile_with_its_open_files(watched: Agent) -> None:
    before = open_files(watched)
    page, said = opened(f"http://{watched.address}/")
    assert said == ""
    tiles = re.search(r'<div id="health" class="tiles">(.*?)</dl></div></div>', page)
    assert tiles is not None
    assert "<b>stage</b>" in tiles[1]
    (shown,) = re.findall(r"<dt>open files</dt><dd>([0-9]+)", tiles[1])
    assert before is not None
    assert float(shown) in {before, open_files(watched)}


# ---- an agent that answers what no agent does ----


def nothing() -> Live:
    slis = Slis()
    return Live(Parts(slis, History(slis), lambda: None, lambda: ReaderStatus(0), "7.0"))


def told(**changed: object) -> JsonObject:
    """What an agent that watches nothing says, with changes."""
    return nothing().now() | changed


@contextlib.contextmanager
def standing_in(live: JsonObject | None) -> Iterator[str]:
    """The URL of something that has the page's files and says this at /api/live.

    None is nothing, ever: then the page has one more part, which is there when the page was tired of waiting.
    """
    tired = threading.Event()
    history = nothing().past()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2] or "index.html"
            if name == "live" and live is None:
                assert self.connection.recv(1) == b""  # until the other side goes
                tired.set()
                return
            if name == "late":
                tired.wait()
            said = {"live": live, "history": history}.get(name)
            body = PAGE.get(name, b"") if said is None else json.dumps(said).encode()
            if name == "index.html" and live is None:
                body = body.replace(b"</body>", b'<img src="late"></body>')
            kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
            self.send_response(200)
            self.send_header("content-type", kind.get(name.rpartition(".")[2], "application/json"))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            tired.set()
            server.shutdown()
            thread.join()


def test_an_address_that_names_no_model_is_no_end() -> None:
    with standing_in(told(state="Ready: as ever.")) as url:
        page, said = opened(f"{url}#50%")
    assert "Ready: as ever." in page
    assert said == ""


def test_what_is_missed_is_not_rounded_up() -> None:
    rows = [
        {"name": name, "service": "stage", "model": "alto", "target": target, "good": good, "total": total,
         "ratio": good / total, "burn_rate_5m": None, "burn_rate_1h": None, "budget_remaining": None}
        for name, target, good, total in (
            ("missed", 0.99999, 99996, 100000),
            ("nearly-missed", 0.9999, 99999, 100000),
            ("just-met", 0.57, 57, 100),
            ("exceeded", 0.99, 7, 7),
        )
    ]  # fmt: skip
    with standing_in(told(objectives=rows)) as url:
        page, _ = opened(url)
    row = r'<td>([a-z-]+)</td><td>stage</td><td>alto</td><td>([0-9.]+ %)</td>.*?<td( class="bad")?>([0-9.]+ %)'
    shown = re.findall(row, page)
    assert shown == [
        ("missed", "99.999 %", ' class="bad"', "99.996 %"),
        ("nearly-missed", "99.99 %", "", "99.99 %"),
        ("just-met", "57 %", "", "57.00 %"),
        ("exceeded", "99 %", "", "100.00 %"),
    ]


def test_what_cannot_be_drawn_is_no_silence_of_the_agent() -> None:
    with standing_in(told(models=7)) as url:
        page, said = opened(url)
    (state,) = re.findall(r'<p id="state"[^>]*>([^<]*)', page)
    assert state.startswith("The agent answers, but this page cannot draw it (")
    assert "TypeError" in said


def test_an_agent_that_stands_still_is_told() -> None:
    with standing_in(None) as url:
        page, _ = opened(url, seconds=None)
    (state,) = re.findall(r'<p id="state"[^>]*>([^<]*)', page)
    assert state.startswith("The agent does not answer (")
