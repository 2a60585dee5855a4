"""`footlight slo status`: what a page of metrics says of the objectives, as a table and as JSON, and its exit codes."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from exporter.cli import main
from exporter.families import Scrape
from exporter.objectives import bounds
from exporter.slis import Slis
from exporter.slo.declared import Slo
from exporter.slo.standing import Told, read, show
from exporter.slo.status import SloStatus, slo_families
from exporter.status import ReaderStatus
from probes.errors import FootlightError

MS = 1_000_000
MINUTE = 60_000_000_000
SLOS = (
    Slo("fast", "ttft", 0.3, 0.9),
    Slo("stays", "aborts", None, 0.97, service="elsewhere"),
    Slo("threads", "kernel_threads", 9, 0.99),
)


def page(good: int, bad: int, minutes: int = 45) -> str:
    """What an agent serves that has run for so many minutes, with these first tokens in the last one."""
    now_ns = 0
    slis = Slis((), 64, bounds(SLOS), lambda: now_ns)
    status = SloStatus(SLOS, slis)
    for _ in range(minutes):
        now_ns += MINUTE
        status.tick(now_ns)
    for number in range(good + bad):
        slis.series("roleplay", 'b"ard', "chat", (), admit=True).first_token((1 if number < good else 999) * MS, now_ns)
    now_ns += 1
    scrape = Scrape(now_ns, 0.0, slis.all_series(), None, ReaderStatus(0))
    lines = ["# HELP llm_requests_total Not of objectives.", 'llm_requests_total{a="b"} 7.0']
    for family in slo_families(status):
        (name,) = family.spec.sample_names()
        for values, value in family.points(scrape):
            escaped = (each.replace("\\", "\\\\").replace('"', '\\"') for each in values)
            labels = ",".join(f'{label}="{each}"' for label, each in zip(family.spec.labels, escaped, strict=True))
            lines.append(f"{name}{{{labels}}} {value}")
    return "\n".join(lines) + "\n"


@contextmanager
def served(text: str) -> Iterator[str]:
    """Somebody who answers everything with this text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def status(url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["slo", "status", "--url", url, *options])


def test_what_a_page_says() -> None:
    fast, stays, threads = read(page(good=17, bad=3))
    assert fast == Told(
        "fast",
        "ttft",
        "90% of times to first token within 0.3 s",
        "30d",
        0.9,
        pytest.approx(45 * 60),
        "roleplay",
        'b"ard',
        20,
        17,
        pytest.approx(-0.5),
        {"5m": pytest.approx(1.5), "30m": pytest.approx(1.5)},
    )
    assert (stays.service, stays.covered_s) == (None, pytest.approx(45 * 60))
    assert (threads.service, threads.covered_s) == (None, None)


def test_the_table() -> None:
    out = io.StringIO()
    show(read(page(good=17, bad=3)), out)
    head, columns, row, blank, stays, none, _, threads, only = out.getvalue().splitlines()
    assert head == "fast: 90% of times to first token within 0.3 s, over 30d, of which 45m were seen"
    assert (
        columns.split() == "service / model good all share burn 5m burn 30m burn 1h burn 2h burn 6h budget left".split()
    )
    assert row.split() == ["roleplay", "/", 'b"ard', "17", "20", "85%", "1.50", "1.50", "-", "-", "-", "-50.0%", "!"]
    assert blank == ""
    assert stays == "stays: 97% of requests not left by their client, over 30d, of which 45m were seen"
    assert none == "  no request yet"
    assert threads == "threads: 99% of minutes of kernel_threads at 9 or less, over 30d"
    assert only == "  only Prometheus counts it"


def test_a_hair_below_all_is_not_all() -> None:
    out = io.StringIO()
    show([Told("a", "ttft", "b", "30d", 0.9, 60, "s", "m", 1_000_000, 999_999, 0.99, {})], out)
    assert " 99.99%" in out.getvalue()


@pytest.mark.parametrize(
    ("rates", "budget", "bad"),
    [
        ({}, None, False),
        ({}, 0.01, False),
        ({}, 0.0, True),
        ({"5m": 99.0}, 0.5, False),  # for an hour it was not seen, or not so
        ({"5m": 99.0, "1h": 14.0}, 0.5, False),
        ({"5m": 14.5, "1h": 14.5}, 0.5, True),
        ({"30m": 6.1, "6h": 6.1}, 0.5, True),
        ({"30m": 6.1, "6h": 5.9}, 0.5, False),
    ],
)
def test_what_is_bad(rates: dict[str, float], budget: float | None, bad: bool) -> None:
    assert Told("a", "ttft", "b", "30d", budget_left=budget, burn_rates=rates).is_bad == bad


def test_the_command() -> None:
    with served(page(good=97, bad=3)) as url:
        table, as_json, checked = status(url), status(url, "--json"), status(url.removeprefix("http://"), "--check")
    assert (table.exit_code, as_json.exit_code, checked.exit_code) == (0, 0, 0)
    assert table.stdout == checked.stdout
    assert "70.0%" in table.stdout
    first, *_ = map(json.loads, as_json.stdout.splitlines())
    assert first == {
        "slo": "fast",
        "sli": "ttft",
        "objective": "90% of times to first token within 0.3 s",
        "window": "30d",
        "target": 0.9,
        "covered_seconds": pytest.approx(45 * 60),
        "service": "roleplay",
        "model": 'b"ard',
        "events": 100,
        "good_events": 97,
        "good_ratio": 0.97,
        "burn_rates": {"5m": pytest.approx(0.3), "30m": pytest.approx(0.3), "1h": None, "2h": None, "6h": None},
        "error_budget_remaining_ratio": pytest.approx(0.7),
        "bad": False,
    }


def test_check_fails_where_the_budget_is_used_up() -> None:
    with served(page(good=17, bad=3)) as url:
        assert status(url).exit_code == 0
        assert status(url, "--check").exit_code == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("llm_requests_total 7\n", "this agent has no objectives"),
        ("", "this agent has no objectives"),
        ('llm_slo_info{slo="a\n', "this is no page of metrics"),
    ],
)
def test_what_is_no_agent_with_objectives_is_said(text: str, what: str) -> None:
    with served(text) as url:
        result = status(url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert what in result.stderr


def test_nobody_answers() -> None:
    result = status("http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no agent answers at http://127.0.0.1:1" in result.stderr


@given(st.text(max_size=200), st.integers(0, 5))
def test_no_page_breaks_it(text: str, cut: int) -> None:
    lines = page(3, 1).splitlines()
    lines.insert(cut, f"llm_slo_{text}")
    try:
        told = read("\n".join(lines))
    except FootlightError:
        return
    show(told, io.StringIO())
