"""The live page, in a real browser: what stands on it is what /metrics says, and nothing goes wrong on the way."""

from __future__ import annotations

import html
import re
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from tests.e2e.agent import Agent, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import need, service

REQUESTS = 23
PATIENCE_S = 60.0
UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}


def opened(url: str, *more: str) -> tuple[str, str]:
    """The page as it stands a few seconds after it was opened, and what the browser's console said."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                need("chromium", "chromium"),
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
                *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
                *(f"--user-data-dir={profile}", *more, url),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, said


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
