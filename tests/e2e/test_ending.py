"""How the agent ends: by Ctrl-C, by a closed pipe, by a killed half. Nothing of it may be left, running or attached."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.agent import FOOTLIGHT, Agent, agent, loaded_programs
from tests.e2e.client import Ask, ask, talk
from tests.e2e.processes import ROOT, STOP_S, Service, wait_for

END_S = 3.0
"""A person who pressed Ctrl-C waits no longer than this."""


def both(observer: Agent) -> tuple[psutil.Process, psutil.Process]:
    """The attacher and the reader."""
    return psutil.Process(observer.pid), psutil.Process(observer.reader)


def assert_nothing_is_left(processes: tuple[psutil.Process, ...], programs: frozenset[int]) -> None:
    wait_for("the end of its processes", lambda: not any(each.is_running() for each in processes) or None, END_S)
    wait_for("the end of its BPF programs", lambda: not programs & loaded_programs() or None, END_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run", "top", "trace"])
def test_a_signal_ends_everything(command: str, number: signal.Signals, threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, command, "--port", str(threaded.port)) as observer:
        processes, programs = both(observer), observer.programs()
        assert programs <= loaded_programs()
        ask(threaded.port, script={"frames": 3})
        if number == signal.SIGINT:
            os.killpg(observer.pid, number)  # as a terminal does
        else:
            os.kill(observer.pid, number)  # as a supervisor does
        assert observer.ended(END_S) == 0, observer.said()
        assert_nothing_is_left(processes, programs)
        assert "Traceback" not in observer.said()
        assert "error" not in observer.said().lower()


def test_a_signal_while_http_clients_dawdle(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        processes, programs = both(observer), observer.programs()
        host, port = observer.address.split(":")
        with socket.create_connection((host, int(port))) as half, socket.create_connection((host, int(port))):
            half.sendall(b"GET /metrics HTTP/1.1\r\n")  # one client never finishes its request, the other one is silent
            talk(threaded.port, [Ask(script={"frames": 3})])
            os.killpg(observer.pid, signal.SIGINT)
            assert observer.ended(END_S) == 0, observer.said()
        assert_nothing_is_left(processes, programs)
        assert "Traceback" not in observer.said()


def test_an_agent_that_is_interrupted_while_it_starts(threaded: Service, tmp_path: Path) -> None:
    for delay_s in (0.05, 0.15, 0.3, 0.5):
        with agent(tmp_path, "run", "--port", str(threaded.port), serves=False) as observer:
            time.sleep(delay_s)
            programs = observer.programs()
            os.killpg(observer.pid, signal.SIGINT)
            # 130 while Python imports, then the agent ends in good order. Python itself, as it starts, knows neither.
            assert observer.ended(END_S) in {0, 130, -signal.SIGINT}, observer.said()
            assert_nothing_is_left((), programs)


def test_a_closed_pipe_ends_trace_without_a_word(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "trace", "--json", "--port", str(threaded.port)) as observer:
        processes, programs = both(observer), observer.programs()
        stdout = observer.process.stdout
        assert stdout is not None
        ask(threaded.port, script={"frames": 3})
        assert stdout.readline().startswith(b"{")
        stdout.close()  # as `| head -1` does
        ask(threaded.port, script={"frames": 3})
        assert observer.ended(END_S) in {0, 141}, observer.said()
        assert observer.said() == ""
        assert_nothing_is_left(processes, programs)


def test_a_reader_of_the_output_that_has_stopped_reading_does_not_hold_it_up(
    threaded: Service, tmp_path: Path
) -> None:
    """As `footlight trace | less` after the first pages."""
    with agent(tmp_path, "trace", "--json", "--port", str(threaded.port)) as observer:
        processes, programs = both(observer), observer.programs()
        stdout = observer.process.stdout
        assert stdout is not None
        # The smallest pipe there is: a few lines fill it.
        fcntl.fcntl(stdout.fileno(), fcntl.F_SETPIPE_SZ, mmap.PAGESIZE)
        talk(threaded.port, *[[Ask(stream=False)] * 7] * 5)
        wait_for("the reader to wait for room in the pipe", lambda: written_full(stdout.fileno()) or None)
        os.killpg(observer.pid, signal.SIGINT)
        assert observer.ended() == 1, observer.said()  # the reader is given time, then killed
        assert_nothing_is_left(processes, programs)


def written_full(pipe: int) -> bool:
    """Whether less than one line has room in a pipe of one page."""
    waiting = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(waiting, sys.byteorder) > mmap.PAGESIZE - 1024


def test_help_into_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*FOOTLIGHT, "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode in {1, 141}  # click itself ends with 1 where it prints the help


def test_a_killed_attacher_takes_the_reader_along(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        processes, programs = both(observer), observer.programs()
        os.kill(observer.pid, signal.SIGKILL)
        assert observer.ended() == -signal.SIGKILL
        assert_nothing_is_left(processes, programs)


def test_a_reader_that_is_killed_is_started_again(transport: str, threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--transport", transport, "--port", str(threaded.port)) as observer:
        talk(threaded.port, *[[Ask(script={"frames": 7})]] * 3)
        observer.wait_requests(3)
        programs, first = observer.programs(), observer.reader
        # Stopped, it cannot read what the next requests put into the rings: all of it is the gap.
        os.kill(first, signal.SIGSTOP)
        talk(threaded.port, *[[Ask(script={"frames": 7})]] * 5)
        os.kill(first, signal.SIGSEGV)
        os.kill(first, signal.SIGCONT)
        wait_for("another reader", lambda: observer_reader(observer, first), STOP_S)
        wait_for("/metrics", lambda: is_ready(observer), STOP_S)
        metrics = observer.wait_metrics(
            "the restart", lambda metrics: metrics.one("footlight_reader_restarts_total") == 1
        )
        lost = metrics.one("footlight_lost_events_total", probe="requests", reason="reader_restart")
        # at the least a read, headers, 7 frames of content and the end's frame for each of the five
        assert lost > 5 * 10
        assert observer.programs() == programs
        assert metrics.sum("llm_requests_total") == 0
        talk(threaded.port, *[[Ask(script={"frames": 7})]] * 11)
        metrics = observer.wait_requests(11)
        assert metrics.sum("llm_requests_total") == 11
        assert metrics.sum("llm_frames_total") == 77
        assert metrics.one("footlight_capture_total", outcome="complete") == 11
        assert metrics.one("footlight_lost_events_total", probe="requests", reason="reader_restart") == lost
        assert "the reader crashed" in observer.said()


def observer_reader(observer: Agent, first: int) -> int | None:
    children = [child.pid for child in psutil.Process(observer.pid).children() if child.pid != first]
    return children[0] if children else None


def is_ready(observer: Agent) -> bool | None:
    return observer.ready() or None


def test_a_reader_that_dies_again_and_again_ends_the_agent(threaded: Service, tmp_path: Path) -> None:
    with agent(tmp_path, "run", "--port", str(threaded.port)) as observer:
        programs = observer.programs()
        last = 0
        for _ in range(6):
            wait_for("a reader", lambda last=last: observer_reader(observer, last), STOP_S)
            last = observer.reader
            os.kill(last, signal.SIGSEGV)
        assert observer.ended() == 1
        assert "giving up" in observer.said()
        assert not programs & loaded_programs()
