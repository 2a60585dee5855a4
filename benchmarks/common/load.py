"""The client in a process of its own, so that the benchmark may look at the agent while it runs.

`python -m benchmarks.common.load` takes a `Job` as one line of JSON on stdin and prints "ready". It runs until all is
answered, or until stdin says more or is closed, and prints "heard". Then it reads what it heard, writes that to
`Job.out` and prints "done".
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import click
import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.common import scripts
from benchmarks.common.client import Client, Heard, raise_open_files
from benchmarks.common.processes import line_of, realtime, started
from benchmarks.common.transcript import transcribe

_END_S: Final = 300.0
_COLUMNS: Final = ("lane", "sent_ns", "finished_ns", "frames")


class Lane(msgspec.Struct, frozen=True):
    """What a part of the users asks, endlessly or not; see `benchmarks.common.scripts`.

    `roleplay`: prompts of `prompt_bytes`, `frames` tokens. `endless`: `frames` at once. `paced`: `streams` requests for
    `frames` at `rate` a second.
    """

    kind: Literal["roleplay", "endless", "paced"]
    model: str
    frames: int
    seed: int = 7
    prompt_bytes: int = 0
    streams: int = 0
    rate: float = 0.0

    def asks(self) -> Iterator[bytes]:
        """Return the lane's requests."""
        match self.kind:
            case "roleplay":
                return scripts.roleplay(self.seed, [self.model], prompt_bytes=self.prompt_bytes, max_tokens=self.frames)
            case "endless":
                return scripts.endless(self.model, self.frames)
            case "paced":
                return iter(list(scripts.paced(self.seed, self.model, self.streams, self.frames, self.rate)))


class Job(msgspec.Struct, frozen=True):
    """What the client has to do; see `benchmarks.common.client.Client`. `eager`: read responses while it runs.

    That keeps no bytes, but takes CPU time while the clock runs.
    """

    port: int
    lanes: list[Lane]
    concurrency: int
    out: str
    per_connection: int = 1
    ramp_s: float = 0.0
    eager: bool = False


@dataclass(frozen=True, slots=True)
class Felt:
    """What the users felt. One row per complete request; `content_ns` of all frames, request after request.

    Instants are CLOCK_MONOTONIC ns. `content_ns[first[i]:first[i] + frames[i]]` are those of request i.
    """

    lane: npt.NDArray[np.int64]
    sent_ns: npt.NDArray[np.int64]
    finished_ns: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]
    content_ns: npt.NDArray[np.int64]

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """Where each request's frames begin."""
        return np.cumsum(self.frames) - self.frames

    @property
    def ttft_ns(self) -> npt.NDArray[np.int64]:
        """Time to first token of each request."""
        times: npt.NDArray[np.int64] = self.content_ns[self.first] - self.sent_ns
        return times

    @property
    def gaps_ns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When each gap between two frames of a response ended, and how long it was."""
        within = np.ones(len(self.content_ns), bool)
        within[self.first] = False
        gaps = np.diff(self.content_ns, prepend=0)
        return self.content_ns[within], gaps[within]


@dataclass(frozen=True, slots=True)
class Load:
    """A client that runs."""

    process: subprocess.Popen[bytes]
    out: Path

    def running(self, seconds: float) -> bool:
        """Wait until all is answered, at most so long; whether it still is not."""
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def felt(self, *, stop: bool) -> Felt:
        """Wait for its end, after asking for it when `stop`; return what it felt.

        Raises click.ClickException when it failed; it has said why on stderr.
        """
        assert self.process.stdin is not None
        if stop:
            self.process.stdin.write(b"stop\n")
        if line_of(self.process, _END_S) != b"heard\n" or line_of(self.process, _END_S) != b"done\n":
            raise click.ClickException("the client did not finish its work")
        with np.load(self.out) as felt:
            return Felt(*(felt[name] for name in (*_COLUMNS, "content_ns")))


@contextlib.contextmanager
def load(
    port: int, lanes: list[Lane], *, concurrency: int, per_connection: int = 1, ramp_s: float = 0.0, eager: bool = False
) -> Iterator[Load]:
    """Start a client and wait until it runs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "felt.npz"
        job = Job(port, lanes, concurrency, str(out), per_connection, ramp_s, eager)
        with started([sys.executable, "-m", "benchmarks.common.load"]) as process:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            if line_of(process, 30.0) != b"ready\n":
                raise click.ClickException("the client did not start")
            yield Load(process, out)


def main() -> None:
    raise_open_files()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    rows: list[tuple[int, int, int, int]] = []
    content = array("q")
    kept: list[Heard] = []

    def take(heard: Heard) -> None:
        read = transcribe(heard)
        rows.append((read.lane, read.sent_ns, read.finished_ns, len(read.content_ns)))
        content.extend(read.content_ns)

    client = Client(
        job.port,
        [lane.asks() for lane in job.lanes],
        take if job.eager else kept.append,
        concurrency=job.concurrency,
        per_connection=job.per_connection,
        ramp_s=job.ramp_s,
    )
    print("ready", flush=True)
    with realtime():
        client.run(sys.stdin.fileno())
    print("heard", flush=True)
    for heard in kept:
        take(heard)
    columns = np.array(rows, np.int64).reshape(-1, len(_COLUMNS)).T
    lane, sent_ns, finished_ns, frames = columns
    np.savez(
        job.out,
        lane=lane,
        sent_ns=sent_ns,
        finished_ns=finished_ns,
        frames=frames,
        content_ns=np.array(content, np.int64),
    )
    print("done", flush=True)


if __name__ == "__main__":
    main()
