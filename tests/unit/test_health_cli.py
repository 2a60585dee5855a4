"""`footlight health`, by an agent that is a web server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.cli.health import amount, health
from probes.errors import FootlightError
from tests.unit.test_health_watch import LEAK, World


class _Agent(BaseHTTPRequestHandler):
    told: Any = None

    def do_GET(self) -> None:
        body = json.dumps({"health": self.told}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Agent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(health, list(arguments), standalone_mode=False)


def test_it_shows_what_is_normal_and_what_is_not(url: str) -> None:
    world = World()
    for _ in range(180):
        world.second()
    _Agent.told = world.health.told()
    assert ask("--url", url, "--check").return_value == 0
    world.leaks = (LEAK,)
    for _ in range(15):
        world.second(cpus=1.7)
    _Agent.told = world.health.told()
    result = ask("--url", url, "--check")
    assert result.return_value == 1
    rows = [line.split() for line in result.stdout.splitlines()]
    (cpu,) = [row for row in rows if row[:2] == ["roleplay", "cpu"]]
    assert cpu[2:4] == ["1.7", "0.5"]
    assert cpu[5:] == ["not", "normal"]
    assert ["roleplay", "ttft_p99"] in [row[:2] for row in rows]
    assert "descriptor leak  923" in result.stdout
    assert ask("--url", url).return_value == 0
    assert json.loads(ask("--url", url, "--json").stdout)["services"]


def test_an_agent_that_tells_nothing_is_an_error(url: str) -> None:
    _Agent.told = None
    with pytest.raises(FootlightError, match="tells nothing of health"):
        CliRunner().invoke(health, ["--url", url], standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "bytes", "-"), (3 << 30, "bytes", "3,072 MiB"), (0.0123, "seconds", "12.3 ms"), (0.5, "ratio", "50.0%")],
)
def test_amounts_have_their_unit(value: float | None, unit: str, text: str) -> None:
    assert amount(value, unit) == text
