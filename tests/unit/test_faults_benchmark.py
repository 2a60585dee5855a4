"""The benchmarks of causes: their arithmetic, and servers that do what they say and when."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from benchmarks import quota
from benchmarks.common.processes import line_of, started
from benchmarks.common.processes import told as said
from benchmarks.common.transcript import Transcript
from benchmarks.faults import __main__ as faults
from benchmarks.faults import client, host
from benchmarks.faults.client import Asked
from benchmarks.faults.explained import Explained
from benchmarks.faults.kinds import FAULTS, HeldLock, Quota, Sleeps, SlowNetwork, overlap_ns
from benchmarks.faults.score import LEAST_INJECTED_S, Request, Run, macro_f1, score, told
from benchmarks.faults.service import Order, Script, Step

LINE = {
    "model": "m",
    "peer": "127.0.0.1:40001",
    "streamed": True,
    "status": 200,
    "outcome": "ok",
    "capture": "complete",
    "frames": 3,
    "prompt_tokens": 1,
    "completion_tokens": 3,
    "time_to_first_token_seconds": 0.137,
    "mean_inter_token_latency_seconds": 0.011,
    "longest_gap_seconds": 0.012,
    "duration_seconds": 0.2,
}


def line(port: int = 40001, **more: Any) -> Explained:  # noqa: ANN401 - JSON
    return msgspec.convert(LINE | {"peer": f"127.0.0.1:{port}"} | more, Explained)


def asked(
    port: int = 40001,
    ttft_ns: int = 100,
    gaps_ns: Sequence[int] = (10, 10),
    sent_ns: int = 1000,
    done: Sequence[tuple[str, int, int]] = (),
    looks: Sequence[tuple[int, int]] = (),
) -> Asked:
    content = [sent_ns + ttft_ns]
    for gap in gaps_ns:
        content.append(content[-1] + gap)
    return Asked(Transcript(0, 0, port, "m", sent_ns, tuple(content), content[-1] + 5, 3), tuple(done), tuple(looks))


Parts = list[dict[str, float]]


def run(
    cause: str, quiet: Parts, faulty: Parts, *, injected_s: float = 0.1, fault: str = "some", felt_s: float = 0.12
) -> Run:
    requests = [Request(False, 0.0, 0.02, parts) for parts in quiet]
    requests += [Request(True, injected_s, felt_s, parts) for parts in faulty]
    return Run(fault, "scripted", "ttft", cause, tuple(requests))


# ---- what is told of one request ----


def test_a_cause_is_told_only_when_it_grew_by_5_ms_and_a_tenth():
    assert told({"lock": 0.0051, "on_cpu": 0.02}, {"on_cpu": 0.02}) == "lock"
    assert told({"lock": 0.0049, "on_cpu": 0.02}, {"on_cpu": 0.02}) is None
    assert told({"lock": 0.009, "on_cpu": 0.2}, {"on_cpu": 0.2}) is None  # less than a tenth of 209 ms
    assert told({"lock": 0.12, "on_cpu": 0.2}, {"on_cpu": 0.2, "lock": 0.119}) is None  # as always
    assert told({}, {}) is None


def test_the_cause_that_grew_most_is_told_not_the_largest():
    assert told({"on_cpu": 0.5, "disk": 0.2, "lock": 0.11}, {"on_cpu": 0.45, "disk": 0.01}) == "disk"


def test_unexplained_is_no_cause():
    assert told({"unexplained": 0.3, "on_cpu": 0.01}, {}) is None
    assert told({"unexplained": 0.1, "sleep": 0.09}, {}) == "sleep"


# ---- what a run gives ----


def test_a_run_without_a_mistake():
    result = score(run("lock", [{"on_cpu": 0.015, "lock": 0.005}] * 7, [{"on_cpu": 0.015, "lock": 0.105}] * 5))
    assert (result.requests, result.quiet_requests) == (5, 7)
    assert result.charged == pytest.approx(1.0)
    assert result.felt == pytest.approx(1.0)
    assert (result.found, result.alarms, result.false_alarms) == ({"lock": 5}, {None: 7}, 0)
    assert (result.dominant, result.unexplained_faulty, result.unexplained_quiet) == ("lock", 0.0, 0.0)
    assert macro_f1([result]) == 1.0


def test_requests_without_a_path_are_all_unexplained():
    result = score(run("lock", [{}, {"on_cpu": 0.02}, {"on_cpu": 0.02}], [{}, {"lock": 0.12}], felt_s=0.12))
    assert result.unexplained_faulty == pytest.approx(0.5)
    assert result.unexplained_quiet == pytest.approx(1 / 3)
    assert result.found == {None: 1, "lock": 1}


def test_a_fault_that_was_not_there_is_left_out():
    short = run("lock", [{"on_cpu": 0.02}], [{"on_cpu": 0.02}] * 3, injected_s=LEAST_INJECTED_S / 2)
    result = score(short)
    assert result.requests == 0
    assert math.isnan(result.charged)
    missed = [bar.what for bar in faults.bars([result], all_kinds=False, watched=True) if not bar.met]
    assert "some: requests with the fault" in missed
    assert "some: |charged - injected| / injected" in missed


def test_the_medians_are_of_single_requests():
    result = score(run("disk", [{"on_cpu": 0.02}] * 3, [{"disk": 0.01}, {"disk": 0.1}, {"disk": 0.4}]))
    assert result.charged == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cause", "grew", "false"),
    [("lock", "on_cpu", 0), ("lock", "run_queue", 0), ("lock", "disk", 1), ("lock", "lock", 1), ("on_cpu",) * 2 + (1,)],
)
def test_false_alarms_are_those_that_the_host_cannot_have_made(cause: str, grew: str, false: int):
    quiet = [{"sleep": 0.01}] * 6 + [{"sleep": 0.01, grew: 0.03}]
    result = score(run(cause, quiet, [{cause: 0.1}]))
    assert result.alarms == {None: 6, grew: 1}
    assert result.false_alarms == false
    assert faults.false_alarms([result]) == pytest.approx(false / 7)


def test_macro_f1_by_hand():
    # lock: 3 of 4 found, once told of disk's requests: F1 = 6 / (4 + 4). disk: 4 of 5, once of lock's: 8 / (5 + 5)
    lock = score(run("lock", [{"on_cpu": 0.02}] * 3, [{"lock": 0.1}] * 3 + [{"disk": 0.1}], fault="lock"))
    disk = score(run("disk", [{"on_cpu": 0.02}] * 3, [{"disk": 0.1}] * 4 + [{"lock": 0.1}], fault="disk"))
    assert macro_f1([lock, disk]) == pytest.approx((6 / 8 + 8 / 10) / 2)
    # a quiet request that is told to have it counts against it: 6 / (4 + 5)
    alarmed = score(run("disk", [{"on_cpu": 0.02}] * 3 + [{"lock": 0.1}], [{"disk": 0.1}] * 4 + [{"lock": 0.1}]))
    assert macro_f1([lock, alarmed]) == pytest.approx((6 / 9 + 8 / 10) / 2)
    # two faults with one cause are one class
    gil = score(run("lock", [{"on_cpu": 0.02}] * 3, [{}] * 4, fault="gil"))
    assert macro_f1([lock, gil]) == pytest.approx(6 / (8 + 3))
    assert math.isnan(macro_f1([]))


def test_every_kind_has_its_own_name_and_there_are_as_many_as_promised():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= faults.KINDS_WANTED
    assert {fault.server for fault in FAULTS} == {"roleplay", "scripted"}
    assert {fault.phase for fault in FAULTS} <= {"ttft", "decode"}


# ---- how requests, faults and the agent's lines meet ----


def test_only_what_is_in_the_window_counts():
    assert overlap_ns((100, 200), [(0, 50), (90, 110), (150, 160), (190, 300), (200, 400)]) == 10 + 10 + 10
    assert overlap_ns((100, 200), [(0, 1000)]) == 100
    assert overlap_ns((100, 200), []) == 0


def test_requests_meet_their_lines_by_port_and_those_without_the_fault_are_left_out():
    fault = HeldLock()
    fault._stretches = [(0, 30_000_000), (1_000_000_000, 1_120_000_000)]
    quiet = [asked(port=1, ttft_ns=10_000_000, sent_ns=500_000_000)]
    faulty = [
        asked(port=2, ttft_ns=12_000_000, sent_ns=20_000_000),  # 10 ms of it: too little
        asked(port=3, ttft_ns=130_000_000, sent_ns=1_000_000_000),
        asked(port=4, ttft_ns=129_000_000, sent_ns=1_001_000_000),
        asked(port=5, ttft_ns=128_000_000, sent_ns=1_002_000_000),
    ]
    causes = {"ttft": {"lock": 0.12, "on_cpu": 0.017}, "decode": {"sleep": 0.022}}
    lines = {1: line(1), 3: line(3, causes=causes)}
    result = faults.judged(fault, quiet, faulty, lines, 2)
    assert [(each.faulty, each.injected_s) for each in result.requests] == [(False, 0.0), (True, 0.12), (True, 0.119)]
    assert [dict(each.parts) for each in result.requests] == [{}, causes["ttft"], {}]
    assert (result.untraced, result.uneven) == (1, 0)


def test_parts_that_do_not_add_up_are_seen():
    even = {"ttft": {"lock": 0.100000001, "on_cpu": 0.036999999}, "decode": {"sleep": 0.022}}
    assert line(causes=even).uneven == 0
    assert line(causes=even | {"ttft": {"lock": 0.137001}}).uneven == 1
    assert line(causes={"ttft": {}, "decode": {}}).uneven == 2
    assert line().uneven == 0
    assert line().parts("ttft") == {}
    assert line(40123).port == 40123


def test_sizes_are_those_beyond_what_the_step_takes_without_the_fault():
    quiet = [asked(done=[("sleep", 0, usual)]) for usual in (10, 12, 90)]
    faulty = asked(done=[("sleep", 0, 12), ("burn", 12, 99), ("sleep", 100, 220)])
    assert Sleeps().injected_ns(faulty, quiet) == 120


def test_the_network_is_timed_by_the_server_since_its_buffer_is_the_clients_delay():
    done = [("send", 0, 5), ("sleep", 5, 10), ("send", 10, 60), ("send", 61, 99)]
    assert SlowNetwork().felt_ns(asked(done=done)) == 94


def test_throttled_time_is_taken_at_the_windows_ends():
    each = asked(sent_ns=1000, ttft_ns=100, looks=[(1000, 7), (1050, 20), (1100, 57), (1200, 99)])
    assert Quota().injected_ns(each, []) == 50


# ---- the servers ----


def ask(port: int, script: Script) -> Asked:
    connection = client.connect(port)
    return client.hear(connection, client.send(connection, client.scripted(script)))


def serving(process: subprocess.Popen[bytes]) -> int:
    return int(line_of(process, 30.0).rsplit(b":", 1)[1])


def test_the_scripted_server_does_what_it_is_told_and_says_when(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2 << 20))
    upstream_command = [sys.executable, "-m", "benchmarks.faults.upstream"]
    command = [sys.executable, "-m", "benchmarks.faults.service", "--file", str(file)]
    with started(upstream_command) as upstream, started([*command, "--upstream", str(serving(upstream))]) as process:
        port = serving(process)
        amounts = {"burn": 0.001, "pages": 1 << 20, "upstream": 0.001, "block": 0.001, "lock": 0.0}
        steps = [msgspec.convert({"do": do, "amount": amount}, Step) for do, amount in amounts.items()]
        heard = ask(port, Script(steps, frames=5, frame_bytes=301, between=[Step("sleep", 0.001)]))
        assert len(heard.transcript.content_ns) == 5
        what = [step for step, _, _ in heard.done]
        assert what == [*amounts, "send", *["sleep", "send"] * 4]
        began, ended = zip(*[(since, until) for _, since, until in heard.done], strict=True)
        assert heard.transcript.sent_ns < began[0]
        assert all(since <= until for since, until in zip(began, ended, strict=True))
        assert all(until <= since for until, since in zip(ended, began[1:], strict=False))
        assert heard.did_ns("sleep") >= 4_000_000  # a timer never ends early
        assert heard.did_ns("upstream") >= 1_000_000
        assert file.read_bytes()[: 1 << 20] == b"\xa5" * (1 << 20)


def test_a_request_that_wants_the_lock_gets_it_when_the_background_thread_lets_go():
    with started([sys.executable, "-m", "benchmarks.faults.service"]) as process:
        port = serving(process)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Order("hold", 0.05)) + b"\n")
        began = said(process, 10.0)["began"]
        heard = ask(port, Script([Step("lock")], frames=2))
        ended = said(process, 10.0)["ended"]
        assert began + 50_000_000 <= ended
        (lock,) = [until for what, _, until in heard.done if what == "lock"]
        assert lock >= ended
        process.stdin.write(msgspec.json.encode(Order("hog", 0.01)) + b"\n")
        assert said(process, 10.0)["began"] < said(process, 10.0)["ended"]


@pytest.mark.parametrize("mode", [[], ["--in-step"]])
def test_the_timed_engine_never_makes_a_token_early(mode: list[str]):
    with started([sys.executable, "-m", "benchmarks.faults.timed_engine", "--step", "0.005", *mode]) as process:
        heard = ask(serving(process), Script([], frames=7))
        content = heard.transcript.content_ns
        assert len(content) == 7
        assert content[-1] - heard.transcript.sent_ns >= 7 * 5_000_000


def test_the_hog_says_when_it_had_the_cpu():
    with started([sys.executable, "-m", "benchmarks.faults.hog"]) as process:
        assert line_of(process, 30.0) == b"running\n"
        assert process.stdin is not None
        process.stdin.write(b"enough\n")
        stretches = said(process, 30.0)
    assert stretches
    instants = [instant for stretch in stretches for instant in stretch]
    assert instants == sorted(instants)


def test_a_response_that_is_no_stream_is_refused():
    with started([sys.executable, "-m", "benchmarks.faults.upstream"]) as process:
        connection = client.connect(serving(process))
        with pytest.raises(click.ClickException, match="the service answers"):
            client.hear(connection, client.send(connection, b"GET /0 HTTP/1.0\r\n\r\n"))


def test_a_host_without_the_tool_is_told_so():
    with pytest.raises(click.ClickException, match="no-such-tool is not installed"):
        host.need("no-such-tool")


# ---- quota ----


def test_the_answer_is_what_the_quota_took_of_what_the_gap_lost():
    def look(share: float, gap_ns: int, quota_s: float, throttled_ns: int) -> quota.Row:
        looks = [(2000, 0), (2000 + 2 * gap_ns, throttled_ns)]
        each = asked(port=1, ttft_ns=1_000, gaps_ns=(gap_ns, gap_ns), looks=looks)
        gap_s = gap_ns / 1e9
        causes = {"ttft": {"on_cpu": 0.137}, "decode": {"cpu_quota": 2 * quota_s, "sleep": 2 * (gap_s - quota_s)}}
        told = line(1, causes=causes, mean_inter_token_latency_seconds=gap_s)
        return quota.row("in step", share, [each], {1: told})

    rows = [look(0.2, 20_000_000, 0.0091, 18_000_000), look(0.6, 10_000_000, 0.0, 0)]
    assert [each.client_ms for each in rows] == [20.0, 10.0]
    assert rows[0].parts == pytest.approx({"cpu_quota": 9.1, "sleep": 10.9})
    assert rows[0].throttled_ms == 9.0
    assert quota.ratio(rows) == 2.0
    assert quota.answer(rows) == pytest.approx(0.91)
    assert [bar.what for bar in quota.bars(rows) if not bar.met] == []
    wrong = [look(0.2, 20_000_000, 0.0, 18_000_000), rows[1]]
    assert [bar.what for bar in quota.bars(wrong) if not bar.met] == [
        "in step, quota 20%: |cpu_quota - throttled|, of the gap",
        "in step: cpu_quota is what changed most",
        "in step: |what cpu_quota lost - what the gap lost|, of that",
    ]


def test_an_untold_request_is_unexplained_in_the_quotas_bars():
    rows = [quota.row("ahead", share, [asked(port=9, looks=[(1100, 0), (1120, 0)])], {}) for share in (0.2, 0.6)]
    missed = {bar.what for bar in quota.bars(rows) if not bar.met}
    assert {"ahead, quota 20%: unexplained", "ahead, quota 20%: requests that the agent did not tell of"} <= missed
    assert "ahead: cpu_quota is what changed most" in missed
    assert json.dumps([each.parts for each in rows]) == "[{}, {}]"
