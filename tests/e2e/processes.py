"""Starts and ends the processes of the tests: services, agents, Prometheus. Each is in a session of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import psutil

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
NODE_FOLDER: Final = Path(__file__).parent / "node"
START_S: Final = 20.0
STOP_S: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1


def free_port() -> int:
    """A TCP port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, look: Callable[[], T | None], within_s: float = START_S) -> T:
    """Look again and again until there is something but None or False; fail with `what` when it takes too long."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"{what} did not come within {within_s:g} s"
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether somebody accepts connections on this port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@dataclass(slots=True)
class Started:
    """A process, and the file that its stderr goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def said(self) -> str:
        """What it has written to stderr."""
        return self.log.read_text("utf-8", "replace")

    def alive(self) -> bool:
        """Whether it runs; a test that waits for what it does wants to know."""
        return self.process.poll() is None

    def ended(self, within_s: float = STOP_S) -> int:
        """Wait for its end; returns the exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {within_s:g} s; it said:\n{self.said()}") from None


@contextlib.contextmanager
def started(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdout: int = subprocess.DEVNULL,
) -> Iterator[Started]:
    """Run a command within the context; then it and all that it started is ended."""

    def end_with_parent() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - this process has one thread
        )
    try:
        yield Started(process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, in good order where it obeys, and what it had started."""
    family = [process.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    for pid in family[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- services ----


@dataclass(frozen=True, slots=True)
class Service:
    """A service that runs: where, and as which process."""

    kind: str
    port: int
    pid: int
    started: Started


def commands(kind: str, port: int) -> list[str]:
    """How a kind of service is started."""
    python = [sys.executable, "-m"]
    return {
        "uvicorn-asyncio": [*python, "tests.e2e.servers.asgi", str(port), "asyncio"],
        "uvicorn-uvloop": [*python, "tests.e2e.servers.asgi", str(port), "uvloop"],
        "threaded": [*python, "tests.e2e.servers.threaded", str(port)],
        "prefork-shared": [*python, "tests.e2e.servers.prefork", str(port), "3", "shared"],
        "prefork-reuseport": [*python, "tests.e2e.servers.prefork", str(port), "3", "reuseport"],
        "express": ["node", str(NODE_FOLDER / "server.js"), str(port)],
    }[kind]


KINDS: Final = ("uvicorn-asyncio", "uvicorn-uvloop", "threaded", "prefork-shared", "prefork-reuseport", "express")


@contextlib.contextmanager
def service(kind: str, folder: Path, port: int | None = None) -> Iterator[Service]:
    """Run a service within the context; it accepts connections when the context begins."""
    if kind == "express":
        install_express()
    port = free_port() if port is None else port
    with started(commands(kind, port), folder / f"service-{port}.log") as process:
        wait_for(f"{kind} on port {port}", lambda: answers(port) or None)
        assert process.alive(), process.said()
        yield Service(kind, port, process.pid, process)


def install_express() -> None:
    """Install the packages of the service on node, as its lock file says."""
    need("node", "nodejs")
    need("npm", "npm")
    if (NODE_FOLDER / "node_modules" / "express").is_dir():
        return
    command = ["npm", "ci", "--no-audit", "--no-fund", "--prefix", str(NODE_FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"


def need(tool: str, package: str) -> str:
    """The path of a tool; without it the test fails and says how to install it."""
    import shutil

    path = shutil.which(tool)
    assert path is not None, (
        f"{tool} is not installed; try: sudo apt-get install --no-install-recommends {package}"
    )
    return path
