"""`footlight demo`: the role-play service, its users, the agent and the live table, in one command."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import click

from exporter.cli import give_terminal_back, set_up_log
from exporter.cli.options import checked_address
from exporter.config import from_options
from probes import host
from probes.errors import FootlightError

ROOT: Final = Path(__file__).resolve().parents[2]
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1
_URL: Final = re.compile(rb"http://[0-9.]+:([0-9]+)")


@click.command(short_help="Role-play service, its users, and the live table, in one command.")
@click.option(
    "--rate",
    type=click.FloatRange(0, 1000, min_open=True),
    default=2.0,
    show_default=True,
    metavar="N",
    help="Mean new conversations per second.",
)
@click.option("--seed", type=int, default=7, show_default=True, help="Equal seeds give equal users.")
@click.option(
    "--duration", type=click.FloatRange(1), metavar="SECONDS", help="End after this time.  [default: until Ctrl-C]"
)
@click.option(
    "--listen", callback=checked_address, default="127.0.0.1:9466", show_default=True, help="Address of /metrics."
)
@click.option(
    "--transport", type=click.Choice(["auto", "ring", "perf"]), default="auto", show_default=True, help="See `run`."
)
@click.option("-v", "--verbose", count=True, help="Log more to stderr.")
def demo(rate: float, seed: int, duration: float | None, listen: str, transport: str, verbose: int) -> int:
    """Start the role-play service and its users, watch them from the kernel, show the live table.

    Needs root and a checkout of the repository. The service's words are noise, its work is real: two small
    transformers with random weights. Ctrl-C ends everything.

    \b
    Examples:
      footlight demo
      footlight demo --rate 2 --duration 60
      footlight demo --listen 127.0.0.1:9500
    """
    from exporter import attacher
    from exporter.fronts import TopFront

    set_up_log(logging.INFO if verbose else logging.WARNING)
    # before anything is started: it is a pity to wait for a service that then cannot be watched
    unable = host.examine().error()
    if unable is not None:
        raise unable
    if not (ROOT / "examples/roleplay/__main__.py").is_file():
        raise FootlightError(
            "the role-play service is not installed", "run this in a checkout: .venv/bin/footlight demo"
        )
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile(prefix="footlight-demo-"))
        port = _serve(stack, log)
        arguments = ("users", "--url", f"http://127.0.0.1:{port}", "--seed", str(seed), "--rate", str(rate))
        stack.enter_context(_started((*arguments, "--duration", "0"), subprocess.DEVNULL, log))
        config = from_options(port=[port], service="roleplay", listen=listen)
        code = attacher.run(config, TopFront(duration_s=duration, serves=True), transport=transport)
    return give_terminal_back(code)


def _serve(stack: contextlib.ExitStack, log: IO[bytes]) -> int:
    """Start the service on a free port, wait until it is ready, and return the port."""
    click.echo("starting the role-play service ...", err=True)
    service = stack.enter_context(_started(("serve", "--port", "0"), subprocess.PIPE, log))
    assert service.stdout is not None
    said = b""
    deadline = time.monotonic() + START_SECONDS
    while (found := _URL.search(said)) is None or b"\n" not in said:
        ready, _, _ = select.select([service.stdout], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(service.stdout.fileno(), 4096) if ready else b""
        if not more:
            log.seek(0)
            tail = log.read()[-2000:].decode("utf-8", "replace").strip()
            reason = f"did not start within {START_SECONDS:.0f} s" if not ready else "ended during its start"
            raise FootlightError(
                f"the role-play service {reason}: {tail or 'it said nothing'}",
                "python -m examples.roleplay serve, to see it alone",
            )
        said += more
    return int(found[1])


@contextlib.contextmanager
def _started(arguments: tuple[str, ...], stdout: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A part of the role-play example that runs within the context, in a session of its own.

    Ctrl-C then reaches this process alone, which ends the parts in order. A part whose parent is killed ends, too.
    """
    parent = os.getpid()

    def end_with_parent() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    process = subprocess.Popen(
        [sys.executable, "-m", "examples.roleplay", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=log,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - this process has one thread
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
