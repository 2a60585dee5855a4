"""`footlight record`: the flight recorder, as a file."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import click

from exporter.cli import usage_error
from exporter.cli.asking import Url, agent_or_url
from exporter.cli.options import Request
from probes.errors import FootlightError

MOST_SECONDS: Final = 60


@click.command(short_help="Everything of some seconds, for ui.perfetto.dev.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, MOST_SECONDS, min_open=True),
    default=20.0,
    show_default=True,
    metavar="N",
    help=f"How much to record, at most {MOST_SECONDS}. With --url: the last N seconds, at once.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to; compressed when the name ends in .gz.  [default: footlight-TIME-asked.json.gz]",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@agent_or_url(level=logging.WARNING)
def record(asked: Request | Url, seconds: float, output: Path | None, force: bool) -> int:
    """Write requests, what threads did, TCP and block I/O to a file that https://ui.perfetto.dev opens.

    Needs root, unless it asks a running agent with --url, which remembers the last 60 seconds. One track per thread and
    per request, arrows for who woke whom. No text of a prompt or reply is in it: names, counts and times only.

    \b
    Examples:
      footlight record --port 8000
      footlight record --port 8000 --seconds 5 -o trace.json
      footlight record --url http://127.0.0.1:9466 -o incident.json.gz
    """
    from exporter.recordings import RecordFront, default_name

    path = output or Path(default_name(time.time_ns(), compress=True))
    if not _is_special(path):
        path = path.resolve()  # a link is not replaced by a file: what it leads to is
    compress = path.name.endswith(".gz")
    if path.is_file() and not force:
        raise usage_error(f"{path} exists already", "--force, or another name with --output")
    with _complete(path) as file:
        if isinstance(asked, Url):
            _fetch(asked, seconds, file, compress)
            file.flush()
            size = os.fstat(file.fileno()).st_size
            click.echo(f"{path}: {size:,} bytes\n  open it: https://ui.perfetto.dev", err=True)
            return 0
        from exporter import attacher

        front = RecordFront(file, name=str(path), seconds=seconds, compress=compress, serves=asked.serves)
        code = attacher.run(
            asked.config,
            front,
            transport=asked.transport,
            wait_for_targets=asked.waits,
            source=asked.source,
        )
        if code:
            raise click.exceptions.Exit(code)
    return 0


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, such as what /dev/stdout leads to: a pipe there has no other name."""
    return path.exists() and not path.is_file()


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only when it is complete, or the stream itself where `path` is a pipe or device."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    special = _is_special(path)
    try:
        file = path.open("wb") if special else part.open("xb")
    except OSError as error:
        raise FootlightError(f"cannot write {path}: {error.strerror}", "another file with --output") from error
    try:
        with file:
            yield file
            file.flush()
            empty = not special and os.fstat(file.fileno()).st_size == 0
        if empty:
            raise FootlightError("nothing was recorded: the agent ended before", "footlight record -vv, to see why")
        if not special:
            part.replace(path)
    finally:
        if not special:
            part.unlink(missing_ok=True)


def _fetch(url: Url, seconds: float, file: IO[bytes], compress: bool) -> None:
    """Copy what the agent answers; it may come compressed, and is wanted so or not. Raises FootlightError."""
    from exporter.recordings import opened

    with url.open("/api/record", seconds=f"{seconds:g}") as response:
        coded = response.headers.get("content-encoding", "").lower() == "gzip"
        source: IO[bytes] = gzip.GzipFile(fileobj=response) if coded else response  # type: ignore[assignment]
        try:
            with opened(file, compress=compress) as out:
                shutil.copyfileobj(source, out)
        except (EOFError, zlib.error, http.client.HTTPException, OSError) as error:
            raise FootlightError(
                f"the recording broke off: {str(error) or type(error).__name__}",
                "the log of the agent, and free space here",
            ) from error
