"""The command line: help, exit codes and errors; and what each front prints."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exporter import VERSION, cli
from exporter.cli import COMMANDS
from exporter.cli.table import PLAIN_WIDTH, Scene, draw
from exporter.config import Address, Config, Match, Service
from exporter.fronts import (
    Clock,
    ServeFront,
    TopFront,
    TraceFront,
    mean_gap_ns,
    outcome,
    rfc3339,
    shortened,
    span,
    trace_line,
    trace_object,
)
from exporter.machine import EngineRow, GpuRow
from exporter.reloading import Source
from exporter.request import Capture, Causes, Failure, FinishedRequest, Phase
from exporter.slis import Row
from exporter.status import AgentStatus, Loss, ProbeStatus, ProcessUsage, TargetStatus
from probes.errors import ConfigError, HostError, TargetError
from probes.host import Check, HostReport
from probes.switches import Switches
from tests.unit.finished import TOLD, later

S = 1_000_000_000
MS = 1_000_000

CONFIG = Config(listen=Address(), services=(Service("roleplay", Match(port=(8000,))),))

ROW = Row(
    service="roleplay",
    model="headliner",
    api="chat_completions",
    requests_per_second=2.131,
    in_flight=4,
    ttft_p50=0.038,
    ttft_p90=0.061,
    ttft_p99=0.12,
    itl_p50=0.0031,
    itl_p90=0.004,
    itl_p99=0.0098,
    tokens_per_second=212.4,
    cache_hit_ratio=0.613,
    failures=0,
    aborts=1,
    coverage=1.0,
)

REQUEST = replace(later(TOLD, 100 * S), number=7, extra=("stable",), first_token_ns=100 * S + 38 * MS, turn=3)


class FakeClock(Clock):
    """Both clocks by hand. The wall clock is 1,700,000,000 s ahead."""

    def __init__(self) -> None:
        self.now_ns = 200 * S

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return 1_700_000_000 * S + self.now_ns


@dataclass
class FakeSlis:
    answer: list[Row] = field(default_factory=list)
    label_names: tuple[str, ...] = ("release",)

    def rows(self) -> list[Row]:
        return self.answer


@dataclass
class FakeReader:
    slis: FakeSlis
    status: AgentStatus | None = None
    config: Config = CONFIG
    address: Address | None = None
    gpus: Sequence[GpuRow] = ()
    engines: Sequence[EngineRow] = ()
    stops: int = 0

    def stop(self) -> None:
        self.stops += 1


def agent(at_ns: int = 200 * S, processes: int = 3, lost: int = 0, up: bool = True) -> AgentStatus:
    probe = ProbeStatus("requests", up, "" if up else "EPERM", 1009, 1, 1, (Loss("ring_full", lost),))
    usage = (ProcessUsage("attacher", 1, 1.0, 9 << 20, 9 << 20), ProcessUsage("reader", 2, 2.0, 70 << 20, 61 << 20))
    return AgentStatus(at_ns, "ring", (probe,), (TargetStatus("roleplay", processes, 1),), 0, usage)


def footlight(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, prog_name="footlight")


# ---- the command ----


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert footlight("--version").stdout == f"footlight {VERSION}\n"


def test_the_attacher_holds_nothing_that_only_the_reader_needs() -> None:
    code = "import sys, exporter.attacher, exporter.cli.run, exporter.fronts; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    others = {"asyncio", "email", "exporter.reader", "importlib.metadata", "numpy", "zipfile"}
    assert not others & set(done.stdout.split())


def test_help_lists_every_command_and_the_exit_codes() -> None:
    result = footlight("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)
    assert "3 this host cannot" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_importing_the_agent(command: str) -> None:
    code = (
        "import sys; from exporter.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'numpy', 'rich', 'yaml', 'uvicorn'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert "Usage: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "code", "what", "next_step"),
    [
        (["chek"], 2, "there is no command 'chek'", "footlight check"),
        (["top"], 2, "no target is named", "footlight top --port 8000"),
        (["top", "--nope"], 2, "--nope", "footlight top --help"),
        (["top", "--port", "0"], 2, "0 is not in the range", "footlight top --help"),
        (["top", "--port", "x"], 2, "'x' is not a valid integer", "footlight top --help"),
        (["top", "--port", "1", "--once", "--count", "3"], 2, "--once and --count", "keep one of the two"),
        (["run", "--port", "1", "--listen", "x"], 2, "'x' is not an address", "footlight run --help"),
        (["run", "--port", "1", "--config", "x"], 2, "--config and target options", "keep one of the two"),
        (["run", "--port", "1", "--transport", "udp"], 2, "'udp' is not one of", "footlight run --help"),
        (["run", "--exe", ""], 4, "'' cannot match any process", "without control characters"),
        (["run", "--port", "1", "--service", "a b"], 4, "'a b' is not a service name", "begin with a letter"),
        (["run", "--config", "/nonexistent"], 4, "/nonexistent: cannot read", "--config"),
    ],
)
def test_wrong_use_says_what_and_what_to_do(arguments: list[str], code: int, what: str, next_step: str) -> None:
    result = footlight(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  try: ")
    assert next_step in second


def test_without_a_command_the_help_is_an_error() -> None:
    result = footlight()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


def test_a_bad_config_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("services:\n- name: a\n  match: {prot: 80}\n")
    result = footlight("run", "--config", str(file))
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        f"error: {file}:3: services[0].match: unknown key 'prot'",
        "  try: did you mean 'port'? allowed here: pid, port, exe, cmdline, cgroup, container",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HostError("no BPF", "be root"), 3),
        (TargetError("gone", "look"), 1),
        (ConfigError("bad", "mend", "f", None), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_the_agent_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def run(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr("exporter.attacher.run", run)
    result = footlight("run", "--port", "8000")
    assert result.exit_code == code
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "front", "serves", "waits"),
    [
        (["run", "--port", "8000"], ServeFront, True, False),
        (["run", "--port", "8000", "--wait"], ServeFront, True, True),
        (["top", "--port", "8000"], TopFront, False, False),
        (["trace", "--port", "8000", "--listen", ":1"], TraceFront, True, False),
    ],
)
def test_options_reach_the_agent(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], front: type, serves: bool, waits: bool
) -> None:
    seen: list[object] = []

    def run(config: Config, front: ServeFront, *, transport: str, wait_for_targets: bool, source: Source | None) -> int:
        seen.extend((config.services[0].match, type(front), front.serves, transport, wait_for_targets, source))
        return 0

    monkeypatch.setattr("exporter.attacher.run", run)
    assert footlight(*arguments, "--transport", "perf").exit_code == 0
    assert seen == [Match(port=(8000,)), front, serves, "perf", waits, None]


def test_a_configuration_can_be_read_again_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources: list[Source] = []

    def run(config: Config, _: ServeFront, *, source: Source, **__: object) -> int:
        assert source.read() == config
        sources.append(source)
        return 0

    monkeypatch.setattr("exporter.attacher.run", run)
    file = tmp_path / "a.yaml"
    file.write_text("listen: 127.0.0.1:1\nservices:\n  - {name: a, match: {port: 80}}\n")
    assert footlight("run", "--config", str(file), "--listen", "127.0.0.1:2").exit_code == 0
    (source,) = sources
    assert source.watch.path == file
    file.write_text("services:\n  - {name: a, match: {port: 81}}\n")
    assert source.read().services[0].match == Match(port=(81,))
    assert source.read().listen.port == 2  # the option still stands


def test_a_closed_pipe_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "exporter.cli", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=30,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


# ---- check ----


def host(*checks: Check) -> HostReport:
    return HostReport(checks)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the host check finds; the check of the reader's privileges finds nothing wrong."""
    found: list[Check] = [Check("kernel", True, True, "Linux 7.7")]
    monkeypatch.setattr("probes.host.examine", lambda: host(*found))
    monkeypatch.setattr("probes.privileges.drop_to_nobody", lambda _: "nobody, nothing")
    monkeypatch.setattr("probes.switches.observe", lambda _: Switches(99, 0, ()))
    return found


def test_check_of_an_able_host(findings: list[Check]) -> None:
    findings.append(Check("ring buffer", False, False, "not usable", "nothing"))
    result = footlight("check")
    assert result.exit_code == 0
    assert "ok   kernel               Linux 7.7" in result.stdout
    assert "note ring buffer          not usable\n                           try: nothing" in result.stdout
    assert "ok   reader's privileges  nobody, nothing" in result.stdout
    assert "ok   hidden threads       none: all 99 switches of 2 s were told" in result.stdout
    assert result.stdout.endswith("This host can run Footlight.\n")


def test_check_of_a_host_that_cannot(findings: list[Check]) -> None:
    findings.append(Check("kernel BTF", False, True, "missing", "another kernel"))
    result = footlight("check", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout.splitlines()[1]) == {
        "check": "kernel BTF",
        "ok": False,
        "required": True,
        "detail": "missing",
        "next_step": "another kernel",
    }
    assert result.stderr == "error: this host cannot run the probes: kernel BTF\n  try: another kernel\n"


def test_check_of_a_config(findings: list[Check], tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("services:\n- {name: a, match: {port: 80}}\n")
    result = footlight("check", "--config", str(file))
    assert result.exit_code == 0
    assert "a (port 80); listen 127.0.0.1:9466" in result.stdout
    file.write_text("services:\n- {name: a, match: {port: no}}\n")
    result = footlight("check", "--config", str(file))
    assert result.exit_code == 4
    assert f"{file}:2: services[0].match.port: must be a whole number" in result.stdout
    assert result.stderr.startswith(f"error: {file}:2: services[0].match.port: must be a whole number")


# ---- serve ----


def test_serve_logs_what_changes_and_only_that(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "footlight")
    clock = FakeClock()
    front = ServeFront(clock)
    reader = FakeReader(FakeSlis(), address=Address())
    front.started(reader)
    front.tick(reader)
    for status in (agent(), agent(), agent(up=False), agent(), agent(processes=0), agent(processes=0, lost=23)):
        reader.status = status
        front.tick(reader)
    front.stopped(reader)
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert re.fullmatch(r"INFO reader \d+ runs as \S+ .*", said[0])
    assert re.fullmatch(r"INFO attacher \d+ runs as \S+ .*", said[1])
    assert said[2:] == [
        "INFO serving http://127.0.0.1:9466/metrics",
        "INFO attached: requests; transport ring",
        "INFO roleplay: following 3 processes, 1 port",
        "WARNING not ready: not attached: requests: EPERM",
        "INFO attached: requests; transport ring",
        "WARNING roleplay: following 0 processes, 1 port",
        "WARNING requests: lost 23 events: ring_full",
        "INFO stopped",
    ]


# ---- top ----


def top(reader: FakeReader, ticks: int, **options: object) -> str:
    clock, out = FakeClock(), io.StringIO()
    front = TopFront(out=out, clock=clock, **options)  # type: ignore[arg-type]  # keyword options by name
    front.started(reader)
    for _ in range(ticks):
        front.tick(reader)
        clock.now_ns += S // 4
        if reader.stops:
            break
    front.stopped(reader)
    return out.getvalue()


def test_top_prints_a_json_object_per_row_and_interval() -> None:
    reader = FakeReader(FakeSlis([ROW, replace(ROW, model="understudy", ttft_p50=None)]), agent())
    lines = [json.loads(line) for line in top(reader, 100, as_json=True, interval_s=2.0, count=3).splitlines()]
    assert reader.stops == 1
    assert [(line["time"], line["model"]) for line in lines[::2]] == [
        ("2023-11-14T22:16:42.000000000Z", "headliner"),
        ("2023-11-14T22:16:44.000000000Z", "headliner"),
        ("2023-11-14T22:16:46.000000000Z", "headliner"),
    ]
    assert lines[1]["ttft_p50_seconds"] is None
    assert lines[0]["itl_p99_seconds"] == 0.0098
    of_engine = {"engine", "engine_running", "engine_waiting", "engine_kv_cache_usage_ratio"}
    assert set(lines[0]) == {"time", *of_engine} | {
        f"{name}_seconds" if name.startswith(("ttft", "itl")) else name for name in Row.__dataclass_fields__
    }
    assert {lines[0][name] for name in of_engine} == {None}


def test_top_prints_gpus_after_the_rows_of_models_and_told_apart() -> None:
    reader = FakeReader(FakeSlis([ROW]), agent(), gpus=[H200, LOST], engines=[ENGINE])
    model, well, lost = (json.loads(line) for line in top(reader, 100, as_json=True, count=1).splitlines())
    assert "gpu" not in model
    assert (model["engine"], model["engine_running"], model["engine_waiting"]) == ("vllm", 3, 0)
    assert model["engine_kv_cache_usage_ratio"] == 0.421
    assert set(well) == set(lost) == {"time", "gpu"}
    assert well["gpu"] == {
        "uuid": "GPU-a",
        "index": 0,
        "name": "NVIDIA H200",
        "utilization_ratio": 0.87,
        "memory_used_bytes": 108_670_000_000,
        "memory_total_bytes": 150_754_820_096,
        "power_watts": 412.3,
        "power_limit_watts": 700.0,
        "temperature_celsius": 61.0,
        "throttled": ["sw_power_cap"],
        "xids": [{"xid": 43, "count": 2}],
        "problem": None,
    }
    assert (lost["gpu"]["problem"], lost["gpu"]["utilization_ratio"]) == ("it is lost", None)


def test_top_ends_after_its_duration() -> None:
    reader = FakeReader(FakeSlis([ROW]), agent())
    assert top(reader, 100, as_json=True, duration_s=3.0).count("\n") == 4
    assert reader.stops == 1


def test_top_prints_a_table_where_there_is_no_terminal() -> None:
    reader = FakeReader(FakeSlis([ROW]), agent(), address=Address())
    text = top(reader, 100, count=1)
    assert "\x1b" not in text
    assert re.search(r"headliner +2\.13 +4 +38ms +61ms +120ms +3\.1ms +4\.0ms +9\.8ms +212 +61% +0 +1 100%", text)


def test_top_ends_when_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    reader = FakeReader(FakeSlis([ROW]), agent())
    with os.fdopen(writing, "w") as out:
        front = TopFront(out=out, clock=FakeClock(), as_json=True)
        front.started(reader)
        front.tick(reader)
    assert reader.stops == 1


def scene(*rows: Row, status: AgentStatus | None = None, cpu: float | None = 0.013) -> Scene:
    noon = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
    return Scene(rows, status or agent(), CONFIG, Address(), 200 * S, noon, cpu)


def test_the_table_in_100_columns() -> None:
    other = replace(
        ROW, model="understudy", in_flight=0, ttft_p99=1.4, failures=32, cache_hit_ratio=None, coverage=0.9996
    )
    lines = [line.plain.rstrip() for line in draw(scene(other, ROW), 100, 24)]
    assert lines == [
        " footlight  what users feel, seen from the kernel          http://127.0.0.1:9466/metrics   12:00:00",
        " ● requests attached   nothing lost   agent: 70 MiB, 1.3% of a CPU",
        "",
        "                                 ─────── TTFT ──────  ─────── ITL ───────",
        " MODEL               req/s open    p50    p90    p99    p50    p90    p99 tok/s cache fail left seen",
        " roleplay   4.3 req/s  4 open  425 tok/s  3 processes",
        "   headliner          2.13    4   38ms   61ms  120ms  3.1ms  4.0ms  9.8ms   212   61%    0    1 100%",
        "   understudy         2.13    0   38ms   61ms  1.40s  3.1ms  4.0ms  9.8ms   212     -   32    1  99%",
        "",
        " Last 5 minutes. TTFT: to the first token. ITL: between tokens. left: client gone. seen: captured.",
        " Yellow, red: TTFT p99 > 0.3s, 1s; ITL p99 > 0.1s, 0.3s; failed > 0, 5%; unseen > 0.5%, 5%.",
    ]


def test_a_wide_table_says_why() -> None:
    other = replace(ROW, model="understudy", why=("run_queue", 0.616))
    lines = [line.plain.rstrip() for line in draw(scene(other, ROW), PLAIN_WIDTH, 24)]
    assert lines[4].endswith("fail left seen    why (of TTFT)")
    assert lines[6].endswith("   0    1 100%                -")
    assert lines[7].endswith("   0    1 100%    run_queue 62%")


def test_only_what_is_wrong_has_a_colour() -> None:
    def coloured(row: Row) -> set[str]:
        (line,) = (line for line in draw(scene(row), 100, 24) if "headliner" in line.plain)
        return {
            line.plain[part.start : part.end].strip()
            for part in line.spans
            if "red" in str(part.style) or "yellow" in str(part.style)
        }

    assert coloured(ROW) == set()
    wrong = replace(ROW, ttft_p99=0.301, itl_p99=0.301, failures=1, coverage=0.94)
    assert coloured(wrong) == {"301", "ms", "1", "94", "%"}


@pytest.mark.parametrize("width", [20, 60, 79, 80, 99, 100, 119, 200])
@pytest.mark.parametrize("height", [3, 7, 12, 24])
def test_the_table_fits_any_window(width: int, height: int) -> None:
    rows = [
        replace(ROW, model=f"organisation/model-{number:03d}-instruct-q4", service=f"s{number % 3}")
        for number in range(67)
    ]
    lines = draw(scene(*rows), width, height)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width


def test_a_small_window_shows_the_busiest_models() -> None:
    rows = [replace(ROW, model=f"m{number:02d}", requests_per_second=float(number)) for number in range(23)]
    text = "\n".join(line.plain for line in draw(scene(*rows), 100, 12))
    assert re.findall(r"m\d\d", text) == ["m18", "m19", "m20", "m21", "m22"]
    assert "and 18 less busy ones:" in text
    assert "and 1 less busy one:" in "\n".join(line.plain for line in draw(scene(*rows[:6]), 100, 12))


def test_in_60_columns_models_still_have_names() -> None:
    lines = [line.plain.rstrip() for line in draw(scene(ROW), 60, 24)]
    assert lines[3].split() == ["TTFT", "ITL"]
    assert lines[4].split() == ["MODEL", "req/s", "open", "p99", "p99", "tok/s", "fail", "seen"]
    assert "headliner" in lines[6]
    for title in ("TTFT", "ITL"):  # each stands over the end of its column
        assert lines[4][: lines[3].index(title) + len(title)].endswith("p99")


def test_two_apis_of_one_model_are_told_apart() -> None:
    rows = [
        replace(ROW, model="a-model-with-a-long-name"),
        replace(ROW, model="a-model-with-a-long-name", api="completions"),
    ]
    text = "\n".join(line.plain for line in draw(scene(*rows), 100, 24))
    assert re.findall(r"\S+ (?:chat|completions) ", text) == ["a-mod…g-name chat ", "a-…me completions "]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (agent(lost=1234567), "● requests attached   lost since start: 1,234,567 ring_full"),
        (agent(up=False), "● not attached: requests: EPERM"),
        (agent(at_ns=100 * S), "● the attacher has not reported for 100 s"),
        (replace(agent(), reader_restarts=2), "reader restarted 2x"),
        (
            replace(agent(), probes=(*agent().probes, ProbeStatus("gpu", False, "gone", 0, None, None, (), False))),
            "● requests attached   gpu: gone   nothing lost",
        ),
    ],
)
def test_the_state_of_the_agent_is_on_the_second_line(status: AgentStatus, text: str) -> None:
    assert text in draw(scene(ROW, status=status), 100, 24)[1].plain


H200 = GpuRow(
    "GPU-a",
    0,
    "NVIDIA H200",
    utilization_ratio=0.87,
    memory_used_bytes=108_670_000_000,
    memory_total_bytes=150_754_820_096,
    power_watts=412.3,
    power_limit_watts=700.0,
    temperature_celsius=61.0,
    throttled=("sw_power_cap",),
    xids=((43, 2),),
)
LOST = GpuRow("GPU-b", 1, "NVIDIA H200", problem="it is lost")
ENGINE = EngineRow("roleplay", "headliner", "vllm", running=3, waiting=0, kv_cache_usage_ratio=0.421)


def test_gpus_and_engines_stand_below_the_models() -> None:
    gpus = [LOST, H200, GpuRow("GPU-c", 2, "Tesla T4", memory_total_bytes=16 << 30)]
    shown = replace(scene(ROW), gpus=gpus, engines=[ENGINE, replace(ENGINE, model="understudy", waiting=None)])
    lines = [line.plain.rstrip() for line in draw(shown, 100, 40)]
    assert lines[7:18] == [
        "",
        " GPU                 util    memory GiB   power W  temp",
        "     0  NVIDIA H200   87%   101.2/140.4   412/700   61C  XID 43 2x  throttled: sw_power_cap",
        "     1  NVIDIA H200  it is lost",
        "     2  Tesla T4        -             -         -     -",
        "",
        " ENGINE                         running  waiting  KV cache",
        "   vllm    roleplay/headliner         3        0       42%",
        "   vllm    roleplay/understudy        3        -       42%",
        "",
        " Last 5 minutes. TTFT: to the first token. ITL: between tokens. left: client gone. seen: captured.",
    ]


def test_gpus_are_shown_before_the_first_request() -> None:
    text = "\n".join(line.plain for line in draw(replace(scene(), gpus=[H200]), 100, 24))
    assert "waiting for the first request" in text
    assert "NVIDIA H200" in text


def test_of_gpus_only_what_is_wrong_has_a_colour() -> None:
    def coloured(gpu: GpuRow) -> list[str]:
        (line,) = (line for line in draw(replace(scene(ROW), gpus=[gpu]), 100, 24) if "NVIDIA" in line.plain)
        return [
            line.plain[part.start : part.end].strip()
            for part in line.spans
            if "red" in str(part.style) or "yellow" in str(part.style)
        ]

    assert coloured(replace(H200, throttled=(), xids=())) == []
    assert coloured(H200) == ["XID 43 2x", "throttled: sw_power_cap"]
    assert coloured(LOST) == ["it is lost"]


@pytest.mark.parametrize("width", [20, 79, 80, 99, 100, 119, 200])
@pytest.mark.parametrize("height", [3, 7, 12, 24, 60])
@pytest.mark.parametrize("models", [0, 1, 67])
def test_gpus_and_engines_fit_any_window(width: int, height: int, models: int) -> None:
    rows = [replace(ROW, model=f"organisation/model-{number:03d}-instruct-q4") for number in range(models)]
    gpus = [
        replace(H200, index=number, name="NVIDIA GeForce RTX 4090 Laptop GPU of some length") for number in range(16)
    ]
    shown = replace(scene(*rows), gpus=gpus, engines=[replace(ENGINE, model=row.model) for row in rows])
    lines = draw(shown, width, height)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width
    if models and height >= 12 and width >= 79:
        assert any("req/s open" in line.plain for line in lines)
        assert any(line.plain.startswith("   org") for line in lines)
        assert any("NVIDIA" in line.plain for line in lines)


def test_a_small_window_shows_the_gpus_in_trouble() -> None:
    well = replace(H200, throttled=(), xids=())
    gpus = [replace(well, index=number) for number in range(15)] + [replace(H200, index=15)]
    lines = [line.plain for line in draw(replace(scene(ROW), gpus=gpus), 100, 16)]
    assert any("XID 43" in line for line in lines)
    assert any("a taller window shows all" in line for line in lines)
    assert any("headliner" in line for line in lines)


def test_an_empty_table_says_what_it_waits_for() -> None:
    def said(status: AgentStatus | None) -> str:
        return draw(Scene((), status, CONFIG, None, 200 * S, 0.0), 100, 24)[3].plain

    assert said(agent()) == " roleplay   port 8000   3 followed, waiting for the first request"
    assert said(agent(processes=0)) == " roleplay   port 8000   no such process yet"
    assert said(None) == " roleplay   port 8000   no such process yet"


# ---- trace ----


def traced(*requests: FinishedRequest, **options: object) -> tuple[list[str], FakeReader]:
    out = io.StringIO()
    reader = FakeReader(FakeSlis())
    front = TraceFront(out=out, clock=FakeClock(), **options)  # type: ignore[arg-type]  # keyword options by name
    front.started(reader)
    for request in requests:
        front.finished(request)
        front.tick(reader)
    front.stopped(reader)
    return out.getvalue().splitlines(), reader


def test_trace_lines_stand_under_their_columns() -> None:
    (header, line, failed), reader = traced(
        REQUEST,
        replace(
            REQUEST,
            model=None,
            status=None,
            first_token_ns=None,
            last_token_ns=None,
            longest_gap_ns=None,
            frames=0,
            prompt_tokens=None,
            completion_tokens=None,
            failure=Failure.cut_off,
            capture=Capture.model_unseen,
        ),
    )
    assert header == (
        "TIME          SERVICE       MODEL                   CODE    TTFT     ITL   STALL       TOKENS   TOTAL  "
        "WHY                         OUTCOME"
    )
    told = line[12:]
    assert told == (
        "  roleplay      headliner                200    38ms   3.0ms    12ms      312>103   340ms  "
        "-                           ok"
    )
    dashes = ["-", "-", "-", "-", "-", "->-", "340ms", "-"]
    assert failed[12:].split() == ["roleplay", *dashes, "cut_off", "(model_unseen)"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.340", line[:12])
    assert reader.stops == 0
    because = replace(REQUEST, causes=Causes({"on_cpu": 3 * MS, "lock": 35 * MS, "disk": 1}, {}))
    (_, line), _ = traced(because)
    assert line[12:] == told.replace("-" + " " * 27, "lock 92% on_cpu 8%" + " " * 10)


def test_trace_ends_after_its_count() -> None:
    lines, reader = traced(REQUEST, REQUEST, REQUEST, count=2)
    assert len(lines) == 3
    assert reader.stops == 2  # said again until the reader has ended


def test_trace_ends_after_its_duration() -> None:
    clock, reader = FakeClock(), FakeReader(FakeSlis())
    front = TraceFront(out=io.StringIO(), clock=clock, duration_s=2.0)
    front.started(reader)
    front.tick(reader)
    assert reader.stops == 0
    clock.now_ns += 2 * S
    front.tick(reader)
    assert reader.stops == 1


def test_trace_json_has_units_and_null_for_what_was_not_measured() -> None:
    told = trace_object(REQUEST, 1_700_000_000 * S + 340 * MS, ("release",))
    assert json.loads(json.dumps(told)) == {
        "time": "2023-11-14T22:13:20.340000000Z",
        "number": 7,
        "service": "roleplay",
        "model": "headliner",
        "api": "chat_completions",
        "labels": {"release": "stable"},
        "method": "POST",
        "target": "/v1/chat/completions",
        "peer": "127.0.0.1:40000",
        "tgid": 101,
        "tid": 103,
        "turn": 3,
        "streamed": True,
        "status": 200,
        "outcome": "ok",
        "aborted_while": None,
        "capture": "complete",
        "read_delay_seconds": 0.002,
        "first_byte_seconds": 0.005,
        "time_to_first_token_seconds": 0.038,
        "mean_inter_token_latency_seconds": 0.003,
        "longest_gap_seconds": 0.012,
        "duration_seconds": 0.34,
        "frames": 101,
        "prompt_tokens": 312,
        "completion_tokens": 103,
        "cached_tokens": 256,
        "wasted_tokens": 0,
        "causes_sampled": False,
        "causes": None,
    }
    because = replace(REQUEST, causes=Causes({"on_cpu": 3 * MS, "lock": 35 * MS}, {"sleep": 300 * MS}))
    told = trace_object(because, 0, ("release",))
    assert told["causes"] == {"ttft": {"on_cpu": 0.003, "lock": 0.035}, "decode": {"sleep": 0.3}}
    assert told["causes_sampled"] is True
    less = replace(REQUEST, streamed=False, capture=Capture.arrival_unseen, aborted=Phase.waiting, frames=1)
    told = trace_object(less, 0, ("release",))
    assert (told["read_delay_seconds"], told["time_to_first_token_seconds"]) == (None, None)
    assert (told["mean_inter_token_latency_seconds"], told["outcome"], told["aborted_while"]) == (
        None,
        "aborted",
        "waiting",
    )


def test_what_strangers_sent_does_not_reach_the_terminal() -> None:
    hostile = replace(REQUEST, model="\x1b]0;owned\x07\u202e\ud800\n", target="/\x1b[2J", peer="\r")
    line = trace_line(hostile, 0)
    assert line.isprintable()
    line.encode("utf-8")
    told = trace_object(hostile, 0, ("release",))
    assert all(value.isprintable() for value in told.values() if isinstance(value, str))


def test_outcomes() -> None:
    assert outcome(REQUEST) == "ok"
    assert outcome(replace(REQUEST, aborted=Phase.streaming)) == "left_streaming"
    assert outcome(replace(REQUEST, failure=Failure.rate_limited)) == "rate_limited"
    assert outcome(replace(REQUEST, capture=Capture.lost_events)) == "ok (lost_events)"


def test_the_mean_gap_needs_two_frames() -> None:
    assert mean_gap_ns(REQUEST) == 3 * MS
    assert mean_gap_ns(replace(REQUEST, frames=1)) is None
    assert mean_gap_ns(replace(REQUEST, first_token_ns=None)) is None


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, "-"),
        (0, "0us"),
        (83_000, "83us"),
        (999_499, "999us"),
        (999_500, "1.0ms"),
        (3.14e6, "3.1ms"),
        (9.96e6, "10ms"),
        (412e6, "412ms"),
        (999.6e6, "1.00s"),
        (1.236e9, "1.24s"),
        (9.996e9, "10.0s"),
        (96.14e9, "96.1s"),
        (812e9, "812s"),
        (99_999e9, "99999s"),
    ],
)
def test_spans(nanoseconds: float | None, text: str) -> None:
    assert span(nanoseconds) == text
    assert len(text) <= 6


def test_long_names_keep_both_ends() -> None:
    assert shortened("meta-llama/Llama-3.3-70B-Instruct-Q4_K_M", 22) == "meta-llama…ruct-Q4_K_M"
    assert shortened("short", 5) == "short"


def test_times_are_rfc3339_in_utc_with_nanoseconds() -> None:
    assert rfc3339(1_700_000_000 * S + 7) == "2023-11-14T22:13:20.000000007Z"
