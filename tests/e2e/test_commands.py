"""trace, top and check: what they print, and every exit status that a user can meet."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.agent import FOOTLIGHT, Agent, agent, footlight, objects
from tests.e2e.client import Answer, Ask, ask, talk
from tests.e2e.processes import ROOT, Service, free_port, need, service
from tests.e2e.servers.script import CACHED_TOKENS, PROMPT_TOKENS

CLOSE_S = 0.005
COLUMNS = "TIME SERVICE MODEL CODE TTFT ITL STALL TOKENS TOTAL WHY OUTCOME".split()


def output(observer: Agent) -> str:
    """All that an agent has printed; it has ended or is about to."""
    assert observer.process.stdout is not None
    text = observer.process.stdout.read().decode()
    assert observer.ended() == 0, observer.said()
    return text


# ---- trace ----


def test_trace_tells_each_request_as_the_client_saw_it(transport: str, tmp_path: Path) -> None:
    stream = Ask(script={"frames": 11, "first_ms": 20, "gap_ms": 5})
    text = Ask(model="bass", chat=False, usage=False, script={"frames": 7, "first_ms": 10, "gap_ms": 7})
    whole = Ask(model="bass", stream=False, script={"first_ms": 30})
    busy = Ask(model="alto", script={"status": 429})
    lost = Ask(model="alto", leave_after=3, script={"gap_ms": 150})
    asks = [[stream]] * 11 + [[text]] * 5 + [[whole]] * 3 + [[busy]] * 2 + [[lost]] * 2
    arguments = ("trace", "--json", "--count", "23", "--transport", transport)
    with (
        service("uvicorn-asyncio", tmp_path) as running,
        agent(tmp_path, *arguments, "--service", "stage", "--port", str(running.port)) as observer,
    ):
        answers = talk(running.port, *asks)
        told = objects(output(observer))
    assert len(told) == 23
    assert sorted(each["number"] for each in told) == list(range(1, 24))
    by_peer = {each["peer"]: each for each in told}
    for answer in answers:
        check_told(answer, by_peer.pop(answer.peer), running.pid)
    assert not by_peer


def check_told(answer: Answer, told: dict[str, object], pid: int) -> None:
    what = answer.ask
    assert (told["service"], told["model"], told["capture"]) == ("stage", what.model, "complete")
    assert told["api"] == ("chat_completions" if what.chat else "completions")
    assert told["target"] == ("/v1/chat/completions" if what.chat else "/v1/completions")
    assert (told["method"], told["tgid"], told["status"]) == ("POST", pid, answer.status)
    assert told["streamed"] == (answer.headers["content-type"].startswith("text/event-stream"))
    assert isinstance(told["frames"], int)
    assert isinstance(told["wasted_tokens"], int)
    assert told["frames"] - told["wasted_tokens"] == len(answer.content_ns)
    outcome = "aborted" if answer.left else "rate_limited" if answer.status == 429 else "ok"
    assert (told["outcome"], told["aborted_while"]) == (outcome, "streaming" if answer.left else None)
    usage = answer.usage or {}
    assert told["completion_tokens"] == usage.get("completion_tokens")
    assert told["prompt_tokens"] == (PROMPT_TOKENS if usage else None)
    assert told["cached_tokens"] == (CACHED_TOKENS if usage else None)
    assert isinstance(told["read_delay_seconds"], float)
    assert 0 <= told["read_delay_seconds"] < 0.1
    if answer.content_ns:
        first, gap = told["time_to_first_token_seconds"], told["mean_inter_token_latency_seconds"]
        assert isinstance(first, float)
        # The truth without a tolerance: the request cannot arrive before it is sent, nor a frame before it is made.
        assert what.script.get("first_ms", 0) / 1e3 <= first <= answer.ttft_s
        assert gap == pytest.approx(answer.mean_gap_s, abs=CLOSE_S)
    else:
        assert told["time_to_first_token_seconds"] is None
    duration = told["duration_seconds"]
    assert isinstance(duration, float)
    if not answer.left:
        assert duration <= (answer.end_ns - answer.sent_ns) / 1e9


def test_trace_prints_a_table(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "trace", "--count", "3", "--port", str(threaded.port)) as observer:
        ask(threaded.port, model="a-model-with-a-rather-long-name-q4", script={"frames": 5, "first_ms": 20})
        ask(threaded.port, script={"status": 500})
        ask(threaded.port, leave_after=0, script={"first_ms": 300})
        header, *lines = output(observer).splitlines()
    assert header.split() == COLUMNS
    assert [line.split()[-1] for line in lines] == ["ok", "server_error", "left_waiting"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", lines[0].split()[0])
    assert f"{PROMPT_TOKENS}>5" in lines[0]
    assert "\x1b" not in "".join([header, *lines])


def test_trace_ends_when_its_time_is_over(threaded: Service) -> None:
    done = footlight("trace", "--json", "--duration", "0.5", "--port", str(threaded.port))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_colour_on_a_terminal_without_colour(threaded: Service) -> None:
    # script gives the command a terminal of its own
    arguments = ["--duration", "0.3", "--port", str(threaded.port)]
    command = " ".join([*FOOTLIGHT, "trace", *arguments])
    terminal = [need("script", "bsdutils"), "-qec", command, "/dev/null"]
    plain = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    for env, painted in ((plain, True), ({**plain, "NO_COLOR": "1"}, False)):
        done = subprocess.run(
            terminal, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True
        )
        assert b"OUTCOME" in done.stdout
        assert (b"\x1b[" in done.stdout) is painted


# ---- top ----


def test_top_once_has_a_row_for_each_model(threaded: Service, tmp_path: Path) -> None:
    arguments = ("top", "--once", "--json", "--interval", "3", "--service", "stage", "--port", str(threaded.port))
    with agent(tmp_path, *arguments) as observer:
        fast = [Ask(model="alto", script={"frames": 11, "first_ms": 20, "gap_ms": 5})]
        slow = [Ask(model="bass", script={"frames": 5, "first_ms": 60, "gap_ms": 10})]
        failing = [Ask(model="alto", script={"status": 500})]
        talk(threaded.port, *[fast] * 7, *[slow] * 5, *[failing] * 3)
        alto, bass = objects(output(observer))
    assert (alto["service"], alto["model"], alto["api"]) == ("stage", "alto", "chat_completions")
    assert (alto["failures"], bass["failures"], alto["aborts"], alto["in_flight"]) == (3, 0, 0, 0)
    assert alto["coverage"] == bass["coverage"] == 1.0
    assert 0.020 * 0.99 <= alto["ttft_p50_seconds"] <= alto["ttft_p99_seconds"] < 0.5
    assert 0.060 * 0.99 <= bass["ttft_p50_seconds"] <= bass["ttft_p99_seconds"] < 0.5
    assert 0.005 * 0.99 <= alto["itl_p50_seconds"] < bass["itl_p50_seconds"]
    assert alto["cache_hit_ratio"] == pytest.approx(CACHED_TOKENS / PROMPT_TOKENS)
    assert alto["requests_per_second"] == pytest.approx(bass["requests_per_second"] * 2)


def test_top_prints_a_table_into_a_pipe(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "top", "--once", "--interval", "2", "--port", str(threaded.port)) as observer:
        talk(threaded.port, *[[Ask(model="alto", script={"frames": 3})]] * 5)
        text = output(observer)
    assert "alto" in text
    assert "\x1b" not in text


# ---- check ----


def test_check_says_that_this_host_is_able() -> None:
    done = footlight("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "This host can run Footlight." in done.stdout
    assert "\x1b" not in done.stdout
    findings = {each["check"]: each for each in objects(footlight("check", "--json").stdout)}
    assert all(each["ok"] for each in findings.values() if each["required"])
    assert "nobody (65534), no capabilities" in findings["reader's privileges"]["detail"]


def test_check_reads_a_configuration(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("services:\n  - {name: roleplay, match: {port: 8000}}\n")
    done = footlight("check", "--json", "--config", str(good))
    assert done.returncode == 0
    (finding,) = (each for each in objects(done.stdout) if each["check"] == "configuration")
    assert "roleplay (port 8000)" in finding["detail"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("services:\n  - name: roleplay\n    match: {prot: 8000}\n")
    done = footlight("check", "--config", str(bad))
    assert done.returncode == 4
    assert f"{bad}:3" in done.stdout + done.stderr
    assert "port" in done.stdout + done.stderr


# ---- what goes wrong ----


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Check that a command failed as it should, in two lines that say what and what next; returns the first."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    first, second, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("  try: ")
    assert not rest
    return first


def test_a_bad_configuration_is_4_with_path_and_line(tmp_path: Path) -> None:
    path = tmp_path / "footlight.yaml"
    path.write_text("listen: 127.0.0.1:0\nservices:\n  - name: roleplay\n    match: {port: eight}\n")
    assert f"{path}:4" in failed(footlight("run", "--config", str(path)), 4)
    path.write_text("services:\n  - {name: roleplay, match: {port: 8000}}\nlimts: {connections: 5}\n")
    done = footlight("run", "--config", str(path))
    assert f"{path}:3" in failed(done, 4)
    assert "limits" in done.stderr
    assert str(tmp_path / "none.yaml") in failed(footlight("run", "--config", str(tmp_path / "none.yaml")), 4)


def test_wrong_usage_is_2() -> None:
    for arguments in (["run", "--colour"], ["run"], ["rum"], ["trace", "--port", "http"], ["run", "--port", "70000"]):
        failed(footlight(*arguments), 2)


def test_a_target_that_is_not_there_is_1() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert str(gone.pid) in failed(footlight("trace", "--pid", str(gone.pid)), 1)
    port = free_port()
    assert str(port) in failed(footlight("run", "--port", str(port), "--listen", "127.0.0.1:0"), 1)


def test_a_port_that_is_taken_is_1(threaded: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in failed(footlight("run", "--port", str(threaded.port), "--listen", address), 1)


def test_without_privilege_it_is_3(threaded: Service) -> None:
    setpriv = need("setpriv", "util-linux")
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    command = [*nobody, *FOOTLIGHT, "run", "--port", str(threaded.port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert "privilege" in failed(done, 3)
    done = subprocess.run(
        [*nobody, *FOOTLIGHT, "check", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 3
    assert any(not each["ok"] and each["next_step"] for each in map(json.loads, done.stdout.splitlines()))


def test_without_the_object_it_is_3(threaded: Service, tmp_path: Path) -> None:
    # a copy of the packages that was never built
    for package in ("exporter", "probes"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.bpf.o", "__pycache__"))
    command = [*FOOTLIGHT, "run", "--port", str(threaded.port)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    failed(done, 3)
    assert "make bpf" in done.stderr


def test_two_agents_beside_each_other_count_everything(threaded: Service, tmp_path: Path) -> None:
    port = str(threaded.port)
    with (
        agent(tmp_path, "run", "--port", port) as first,
        agent(tmp_path, "run", "--port", port, "--transport", "perf") as second,
    ):
        answers = talk(threaded.port, *[[Ask(script={"frames": 13, "gap_ms": 3})] * 3] * 11)
        frames = sum(len(answer.content_ns) for answer in answers)
        means = []
        for observer in (first, second):
            metrics = observer.wait_requests(33)
            assert metrics.sum("llm_requests_total") == 33
            assert metrics.sum("llm_frames_total") == frames == 33 * 13
            assert metrics.one("footlight_capture_total", outcome="complete") == 33
            means.append(metrics.mean("llm_inter_token_latency_seconds"))
        # Each takes the kernel's own instants: they may differ by what the other's program costs, no more.
        assert means[0] == pytest.approx(means[1], abs=0.001)
        assert not first.programs() & second.programs()
        assert first.programs()
    assert not psutil.pid_exists(first.pid)
