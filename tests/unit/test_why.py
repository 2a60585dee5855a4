"""Where the time went: the JSON types, lists, bars and paths; and the front and the command that show them."""

from __future__ import annotations

import functools
import http.server
import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from exporter import cli
from exporter.cli.causes import _LOOKS, Screen, apportion
from exporter.config import Address, Config, Match, Service
from exporter.critical_path import Cause, Step, totals
from exporter.fronts import Clock
from exporter.status import AgentStatus
from exporter.why import (
    CAUSES,
    KEPT,
    Explained,
    Summary,
    Wanted,
    WhyFront,
    check,
    dominant,
    encode,
    fold,
    main_detail,
    show,
    window_s,
)
from tests.unit.finished import TOLD, later

S = 1_000_000_000
MS = 1_000_000
BEGIN = 987_654_321_987_654_321
WALL = 1_700_000_000 * S

REQUEST = replace(later(TOLD, BEGIN), number=7)
NAMES = {103: "uvicorn", 204: "engine", 305: "loader"}
PLAN = (
    # ms, thread, cause, detail, woken by
    (2, 103, Cause.run_queue, "", 204),
    (3, 103, Cause.on_cpu, "103", 0),
    (62, 204, Cause.lock, "305", 305),
    (8, 204, Cause.on_cpu, "204", 103),
    (11, 103, Cause.upstream, "10.0.0.3:6379", 0),
    (14, 103, Cause.unexplained, "", 999),
)


def explained(number: int = 7, *, slow: bool = True, model: str | None = "headliner", scale: int = 1) -> Explained:
    steps = []
    at_ns = BEGIN
    for duration, tid, cause, detail, woken_by in PLAN:
        steps.append(Step(at_ns, at_ns + scale * duration * MS, tid, cause, detail, woken_by))
        at_ns += scale * duration * MS
    request = replace(REQUEST, number=number, model=model, first_token_ns=at_ns, finished_ns=at_ns + 240 * MS)
    return Explained(request, tuple(steps), totals(steps), {Cause.on_cpu: 3 * MS, Cause.disk: 0}, slow, NAMES)


def told(number: int = 7, *, slow: bool = True, model: str | None = "headliner", scale: int = 1) -> dict[str, Any]:
    each = explained(number, slow=slow, model=model, scale=scale)
    return check(json.loads(json.dumps(encode(each, WALL, ()))))


def shown(summary: Summary, wanted: Wanted, width: int, finished: int | None = None) -> list[str]:
    file = io.StringIO()
    screen = Screen(file, width)
    if wanted.request is None:
        screen.overview(summary, wanted.top or 10, finished)
    else:
        screen.path(summary.kept[0], wanted.lines)
    return file.getvalue().splitlines()


def filled(*each: dict[str, Any], keep: int = KEPT, model: str | None = None, all_requests: bool = False) -> Summary:
    summary = Summary(keep, model, all_requests)
    for one in each:
        summary.add(one)
    return summary


# ---- the JSON types ----


def test_every_cause_has_a_place_a_letter_and_a_colour() -> None:
    assert [cause.value for cause in Cause] == CAUSES == list(_LOOKS)
    letters = [letter for letter, _ in _LOOKS.values()]
    assert len(set(letters)) == len(letters)


def test_a_step_is_told_with_names_and_relative_times() -> None:
    steps = told()["steps"]
    assert steps[0] == {
        "offset_seconds": 0.0,
        "duration_seconds": 0.002,
        "tid": 103,
        "thread": "uvicorn",
        "cause": "run_queue",
        "detail": None,
        "woken_by": 204,
        "woken_by_thread": "engine",
    }
    assert (steps[1]["detail"], steps[1]["woken_by"]) == (None, None)  # running on its own account
    assert steps[2]["detail"] == "held by loader (305)"
    assert steps[4]["detail"] == "10.0.0.3:6379"
    assert (steps[5]["woken_by"], steps[5]["woken_by_thread"]) == (999, None)


def test_causes_of_zero_are_not_told_and_decode_is_apart() -> None:
    assert told()["causes"] == {
        "ttft": {"on_cpu": 0.011, "run_queue": 0.002, "lock": 0.062, "upstream": 0.011, "unexplained": 0.014},
        "decode": {"on_cpu": 0.003},
    }


@given(st.lists(st.tuples(st.sampled_from(list(Cause)), st.integers(0, 40 * S)), min_size=1, max_size=60))
def test_what_is_told_adds_up_to_the_window_to_the_nanosecond(parts: list[tuple[Cause, int]]) -> None:
    steps, at_ns = [], BEGIN
    for cause, duration in parts:
        steps.append(Step(at_ns, at_ns + duration, 103, cause, "", 0))
        at_ns += duration
    request = replace(REQUEST, first_token_ns=at_ns, last_token_ns=at_ns, finished_ns=at_ns)
    each = encode(Explained(request, tuple(steps), totals(steps), {}, True, {}), WALL, ())
    exact = sum(round(step["duration_seconds"] * 1e9) for step in each["steps"])
    assert exact == at_ns - BEGIN == sum(round(value * 1e9) for value in each["causes"]["ttft"].values())
    for lines in (0, 1, 5, 17):
        folded = fold(each["steps"], lines)
        assert math.isclose(math.fsum(line.duration_s for line in folded), exact / 1e9, abs_tol=1e-9)
        assert sum(line.folded or 1 for line in folded) == len(steps)
        assert len(folded) <= max(3, lines + 1) if lines else len(folded) == len(steps)


def test_hostile_names_are_made_safe_and_printed_harmlessly() -> None:
    each = replace(explained(), names={305: "\x1b[2J\u202eload"})
    each = replace(each, request=replace(each.request, model="x\x1b]0;pwn\x07", target="/\x1b[31m"))
    one = check(json.loads(json.dumps(encode(each, WALL, ()))))
    text = "\n".join(shown(filled(one), Wanted(), 100) + shown(filled(one), Wanted(request=7), 100))
    assert "load (305)" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("steps", 0, "cause"), 7),
        (("steps", 0, "cause"), "\x1b[31m"),
        (("steps", 0, "duration_seconds"), "x"),
        (("steps", 0, "offset_seconds"), math.inf),
        (("steps", 0, "tid"), "1"),
        (("steps", 0), None),
        (("steps",), 3),
        (("causes",), None),
        (("causes", "ttft"), [1]),
        (("time",), "yesterday"),
        (("peer",), "a\x1bb"),
        (("number",), None),
        (("time_to_first_token_seconds",), "1"),
    ],
)
def test_what_is_no_request_with_a_path_is_refused(path: tuple[Any, ...], value: object) -> None:
    one = json.loads(json.dumps(encode(explained(), WALL, ())))
    if path[0] == "time_to_first_token_seconds":
        one["causes"]["ttft"] = {}
    place = functools.reduce(lambda where, key: where[key], path[:-1], one)
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"."):
        check(one)


def test_the_main_detail_is_that_of_the_most_time() -> None:
    one = told()
    one["steps"].append({**one["steps"][2], "detail": "held by gc (1)", "duration_seconds": 1.0})
    assert dominant(one["causes"]["ttft"]) == "lock"
    assert main_detail(one, "lock") == "held by gc (1)"
    assert main_detail(one, "run_queue") is None


# ---- which requests ----


def test_the_slowest_are_kept_and_all_are_counted() -> None:
    each = [told(number, scale=number, slow=number % 2 == 0) for number in (3, 8, 1, 6, 2, 5)]
    summary = filled(*each, keep=2)
    assert [one["number"] for one in summary.kept] == [8, 6]
    (model,) = summary.models
    assert (model.requests, model.slow) == (6, 3)
    assert math.isclose(model.seconds, 0.1 * 25)
    assert math.isclose(model.causes["lock"], 0.062 * 25)
    assert [one["number"] for one in filled(*each, all_requests=True).kept] == [8, 6, 5, 3, 2, 1]


def test_equally_slow_requests_are_kept_in_their_order() -> None:
    assert [one["number"] for one in filled(told(1), told(2), told(3), keep=2).kept] == [1, 2]


def test_a_model_can_be_asked_for() -> None:
    summary = filled(told(1, model="alto"), told(2, model="bass"), told(3, model=None), model="bass")
    assert [one["number"] for one in summary.kept] == [2]
    assert [model.model for model in summary.models] == ["bass"]
    assert [one["number"] for one in filled(told(3, model=None), model="_unknown").kept] == [3]


# ---- drawing ----


@given(st.lists(st.floats(0, 1e6), max_size=12), st.integers(0, 200))
def test_a_bar_has_its_width_and_no_part_is_off_by_a_cell(parts: list[float], cells: int) -> None:
    found = apportion(parts, cells)
    total = math.fsum(parts)
    if total <= 0:
        assert found == [0] * len(parts)
        return
    assert sum(found) == cells
    assert all(abs(count - part / total * cells) < 1.0001 for count, part in zip(found, parts, strict=True))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_everything_fits_the_width(width: int) -> None:
    many = [
        told(number, scale=number, model=f"org/{'long' * number}-{number}", slow=number > 3) for number in range(1, 30)
    ]
    for wanted in (Wanted(), Wanted(request=7), Wanted(request=7, lines=2), Wanted(top=3)):
        lines = shown(filled(*many), wanted, width, finished=123)
        assert max(map(cell_len, lines)) <= width


def test_the_list_on_a_pipe() -> None:
    lines = shown(filled(told(7), told(9, scale=3), told(4, slow=False)), Wanted(), 100, finished=23)
    assert lines[0] == " 2 slow of 3 requests with a path   (23 finished, 2 shown, the slowest first)"
    assert lines[2].split() == ["NUMBER", "TIME", "MODEL", "TTFT", "CAUSES", "MOST", "OF", "IT"]
    assert lines[3].split()[0] == "9"
    assert "  300ms  CC" in lines[3]
    assert lines[3].endswith("lock 62% held by loader (305)")
    assert lines[4].split()[0] == "7"
    assert lines[7].split()[:4] == ["headliner", "3", "2", "167ms"]
    assert "C on_cpu" in lines[9]
    assert "L lock" in lines[9]
    assert "disk" not in lines[9]
    assert any("request 9" in line for line in lines)


def test_a_bar_of_letters_shows_the_shares() -> None:
    (line,) = [line for line in shown(filled(told()), Wanted(), 100) if line.startswith("      7")]
    bar = line.split()[4]
    assert bar.count("L") / len(bar) == pytest.approx(0.62, abs=0.06)
    assert "".join(dict.fromkeys(bar)) == "CLU?"  # 2% are less than a cell


def test_the_path_tells_each_step_in_order() -> None:
    lines = shown(filled(told()), Wanted(request=7), 120)
    steps = [line for line in lines if "." in line[:10]]
    assert [line.split()[0] for line in steps] == ["0.000", "2.000", "5.000", "67.000", "75.000", "86.000"]
    assert "uvicorn (103)" in steps[0]
    assert "woken by engine (204)" in steps[0]
    assert "held by loader" in steps[2]
    assert "woken by" not in steps[2]  # that is said already
    assert "10.0.0.3:6379" in steps[4]
    assert "woken by thread 999" in steps[5]
    assert "POST /v1/chat/completions  from 127.0.0.1:40000" in lines[0]


def test_short_steps_share_a_line() -> None:
    lines = shown(filled(told()), Wanted(request=7, lines=4), 100)
    assert any("2 short steps" in line for line in lines)
    assert sum("short steps" in line for line in lines) <= 2


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "\n".join(shown(filled(told()), Wanted(), 120))
    assert "\x1b[" in coloured
    assert "LLLL" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = "\n".join(shown(filled(told()), Wanted(), 120))
    assert "LLLL" in plain
    assert "38;" not in plain
    assert "48;" not in plain


@pytest.mark.parametrize(
    ("each", "wanted", "text"),
    [
        ([], Wanted(), "no request with a path was seen"),
        ([told(slow=False)], Wanted(), "nothing was slow among 1 requests with a path; --all shows"),
        ([], Wanted(request=5), "request 5 was not seen, or has no path"),
    ],
)
def test_nothing_is_said_in_words(each: list[dict[str, Any]], wanted: Wanted, text: str) -> None:
    file = io.StringIO()
    show(filled(*each), wanted, file)
    assert text in file.getvalue()


def test_a_request_whose_steps_were_not_kept_still_has_its_causes() -> None:
    one = {**told(), "steps": []}
    lines = shown(filled(one), Wanted(request=7), 100)
    assert any("its steps were not kept" in line for line in lines)
    assert any("lock 62%" in line for line in lines)


# ---- the front ----


class HandClock(Clock):
    def __init__(self) -> None:
        self.now_ns = 200 * S

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return WALL + self.now_ns


class NoRows:
    label_names = ()

    def rows(self) -> list[Any]:
        return []


CONFIG = Config(listen=Address(), services=(Service("roleplay", Match(port=(8000,))),))


@dataclass
class FakeReader:
    slis: NoRows
    config: Config = CONFIG
    status: AgentStatus | None = None
    address: Address | None = None
    stops: int = 0

    def stop(self) -> None:
        self.stops += 1


def run(
    wanted: Wanted,
    *each: Explained,
    seconds: float = 1.0,
    duration_s: float | None = 10.0,
    follow: bool = False,
) -> tuple[list[str], FakeReader, HandClock]:
    clock, out = HandClock(), io.StringIO()
    reader = FakeReader(NoRows())
    front = WhyFront(wanted, duration_s=duration_s, follow=follow, out=out, clock=clock)
    front.prepare()
    front.started(reader)
    for one in each:
        front.finished(one.request)
        front.explained(one)
    clock.now_ns += round(seconds * S)
    front.tick(reader)
    front.stopped(reader)
    return out.getvalue().splitlines(), reader, clock


def test_the_front_shows_the_list_when_its_time_is_over() -> None:
    lines, reader, _ = run(Wanted(), explained(7), explained(8, slow=False), duration_s=10.0)
    assert reader.stops == 0
    assert "1 slow of 2 requests with a path   (2 finished, 1 shown" in lines[0]
    assert run(Wanted(), duration_s=10.0, seconds=10.0)[1].stops == 1


def test_the_front_in_json_has_all_that_was_asked_for_the_slowest_first() -> None:
    each = [explained(number, scale=number, slow=number != 5) for number in range(1, 8)]
    lines, *_ = run(Wanted(as_json=True), *each)
    assert [json.loads(line)["number"] for line in lines] == [7, 6, 4, 3, 2, 1]
    assert [len(check(json.loads(line))["steps"]) for line in lines] == [len(PLAN)] * 6
    lines, *_ = run(Wanted(as_json=True, top=2, all_requests=True), *each)
    assert [json.loads(line)["number"] for line in lines] == [7, 6]


def test_the_front_follows() -> None:
    each = [explained(number, slow=number % 2 == 1) for number in range(1, 8)]
    lines, reader, _ = run(Wanted(as_json=True, top=3), *each, follow=True, duration_s=None)
    assert [json.loads(line)["number"] for line in lines] == [1, 3, 5]
    assert reader.stops == 1
    lines, reader, _ = run(Wanted(), *each, follow=True, duration_s=None)
    assert [line.split()[0] for line in lines[:5]] == ["NUMBER", "1", "3", "5", "7"]
    assert "4 slow of 7" in lines[5]
    assert reader.stops == 0


def test_the_front_ends_with_the_request_that_it_waits_for() -> None:
    lines, reader, _ = run(Wanted(request=3), explained(2), duration_s=None)
    assert reader.stops == 0
    assert "request 3 was not seen" in lines[0]
    lines, reader, _ = run(Wanted(request=3), explained(2), explained(3, slow=False), duration_s=None)
    assert reader.stops == 1
    assert lines[0].startswith(" request 3 ")


def test_the_front_keeps_a_bounded_number() -> None:
    summary = Wanted().summary()
    one = told()
    for _ in range(KEPT + 50):
        summary.add(one)
    assert len(summary.kept) == KEPT


# ---- the command ----


def footlight(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, given, prog_name="footlight")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "why.jsonl"
    lines = [encode(explained(number, scale=number, slow=number > 2), WALL, ()) for number in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_is_shown_as_what_was_measured(file: Path) -> None:
    result = footlight("why", "--read", str(file))
    assert result.exit_code == 0
    assert "3 slow of 5" in result.output
    again = footlight("why", "--read", "-", given=file.read_text())
    assert again.output == result.output
    one = footlight("why", "--read", str(file), "--request", "2", "--steps", "0")
    assert one.output.startswith(" request 2 ")
    printed = footlight("why", "--read", str(file), "--json", "--all")
    assert [json.loads(line)["number"] for line in printed.output.splitlines()] == [5, 4, 3, 2, 1]
    assert sorted(printed.output.splitlines()) == sorted(file.read_text().splitlines())


def test_a_line_that_is_none_is_named(file: Path) -> None:
    file.write_text(file.read_text() + '{"number": 1}\n')
    result = footlight("why", "--read", str(file))
    assert result.exit_code == 1
    assert "line 6 of" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--url", "http://127.0.0.1:1", "--port", "80"), "--url and --port cannot be given together"),
        (("--url", "http://127.0.0.1:1", "--read", "-"), "--url and --read cannot be given together"),
        (("--url", "ftp://127.0.0.1:1"), "is no address of an agent"),
        (("--url", "http://127.0.0.1:1", "--follow"), "--follow shows requests as they end"),
        (("--url", "http://127.0.0.1:1", "--duration", "3"), "--duration is for watching"),
        (("--port", "80", "--follow", "--request", "1"), "--follow shows requests as they end"),
        ((), "no target is named"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], text: str) -> None:
    result = footlight("why", *arguments)
    assert result.exit_code == 2
    assert text in result.output


class Agent(http.server.BaseHTTPRequestHandler):
    body = b""
    asked: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self) -> None:
        self.asked.append(self.path)
        found = self.path == "/api/why"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.body if found else b"not here")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(file: Path) -> Iterator[str]:
    Agent.body = file.read_bytes()
    Agent.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_running_agent_is_asked(url: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    result = footlight("why", "--url", f"{url}/")
    assert result.output == footlight("why", "--read", str(file)).output
    assert Agent.asked == ["/api/why"]
    assert footlight("why", "--url", url.removeprefix("http://")).exit_code == 0


def test_an_agent_that_is_not_there_or_is_another_is_told(url: str) -> None:
    result = footlight("why", "--url", f"{url}/prefix")
    assert result.exit_code == 1
    assert "answered 404: not here" in result.output
    result = footlight("why", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no agent answers at http://127.0.0.1:1: Connection refused" in result.output


def test_the_window_without_a_walk_is_the_ttft() -> None:
    one = told()
    one["causes"]["ttft"] = {}
    assert window_s(one) == pytest.approx(0.1)
