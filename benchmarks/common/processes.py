"""The processes of a benchmark: started, watched and ended, so that none outlives the command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import click
import msgspec

ROOT: Final = Path(__file__).resolve().parents[2]
"""The repository."""
START_S: Final = 60.0
STOP_S: Final = 10.0

_PR_SET_PDEATHSIG: Final = 1
_CPUCLOCK_SCHED: Final = 2
_prctl: Final = ctypes.CDLL(None).prctl


def ends_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: with everything that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def end_with_parent() -> None:
    """Let the end of the parent, by whatever, be a SIGTERM for this process. A fork undoes it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def started(
    command: Sequence[str], *, stdout: int | IO[Any] = subprocess.PIPE, stderr: IO[Any] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `command` in the repository's root; end it on the way out: SIGTERM, and SIGKILL `STOP_S` seconds later."""
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        bufsize=0,
        cwd=ROOT,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - no threads here
    )
    try:
        yield process
    finally:
        end(process)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and wait for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(command: Sequence[str]) -> Iterator[Server]:
    """Start a server that prints its URL, http://127.0.0.1:PORT, as its first line when it is ready.

    Raises click.ClickException, with what it wrote to stderr, when that does not come within `START_S` seconds.
    """
    with tempfile.TemporaryFile() as complaints, started(command, stderr=complaints) as process:
        line = line_of(process, START_S)
        if not line.startswith(b"http://"):
            raise failed(process, command, complaints)
        yield Server(process.pid, int(line.rsplit(b":", 1)[1].strip(b"/\n ")))


@dataclass(frozen=True, slots=True)
class Server:
    """A server on 127.0.0.1 that was started here."""

    pid: int
    port: int

    @property
    def pids(self) -> tuple[int, ...]:
        """It and its children, and theirs."""
        return family(self.pid)


def failed(process: subprocess.Popen[bytes], command: Sequence[str], complaints: IO[bytes]) -> click.ClickException:
    """Return the error that says what `process` wrote before it did not get ready."""
    end(process)
    complaints.seek(0)
    said = complaints.read().decode(errors="replace").strip()
    return click.ClickException(f"{' '.join(command)} did not get ready, exit status {process.returncode}:\n{said}")


def line_of(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return the next line of the process's stdout; less when it ends, or when the time is over."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = process.stdout.read(1) if ready else b""
        if not piece:
            break
        line += piece
    return line


def told(process: subprocess.Popen[bytes], seconds: float) -> Any:  # noqa: ANN401 - JSON
    """Return the JSON of the process's next line. Raises click.ClickException when none comes in time."""
    line = line_of(process, seconds)
    if not line.endswith(b"\n"):
        raise click.ClickException(f"no answer from {process.args!r} within {seconds:.0f} s")
    return msgspec.json.decode(line)


def family(pid: int) -> tuple[int, ...]:
    """Return a process and all its descendants that live now."""
    pids = [pid]
    for each in pids:  # grows while it is walked
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return tuple(pids)


def cpu_ns(pid: int) -> int:
    """CPU time of a process in nanoseconds, user and system, threads that are gone included; not its children's."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process: pages that n processes share count one n-th."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise click.ClickException(f"/proc/{pid}/smaps_rollup has no Pss")


@contextlib.contextmanager
def realtime() -> Iterator[None]:
    """Run ahead of everything else on the machine (SCHED_FIFO): a clock must not wait for the CPU it shares.

    Children do not inherit it.
    """
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
