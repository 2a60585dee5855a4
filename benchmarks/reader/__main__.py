"""Measures the readers side by side: the same records, the same producer, each on its CPU, one after the other.

A producer on one CPU offers 40-byte records at a steady rate, a reader on another takes them and counts them by kind.
Every 20 ms a reader looks; nothing wakes it. The first row is Footlight's way of reading. BCC cannot load the others'
object, so it compiles the same producer from producer_bcc.c. CPU time is the reader's own, user and system, from the
moment it is attached until it has the last record.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.common.report import Bar, judge, need_root
from benchmarks.reader.headers import borrowed_headers
from benchmarks.reader.produce import RECORDS_PER_CALL
from probes import host

HERE = Path(__file__).parent
SYSTEM_PYTHON = "/usr/bin/python3"
BUCKETS = 61
RING = "Footlight, ring buffer"
BCC = "BCC, callback"
C = "C, libbpf callback"


class Counted(msgspec.Struct, frozen=True):
    """What a reader said when it was done."""

    received: int
    offered: int
    lost: int
    cpu_seconds: float
    histogram: list[int]


@dataclass(frozen=True, slots=True)
class Run:
    """One reader's run. Records are counted, `seconds` is the producer's time, `cpu_seconds` the reader's."""

    offered: int
    received: int
    lost: int
    seconds: float
    cpu_seconds: float

    @property
    def per_cpu_second(self) -> float:
        """Records received for each second of CPU time that the reader used."""
        return self.received / self.cpu_seconds


@dataclass(frozen=True, slots=True)
class Reader:
    """A way to read. `command` takes the producer's pid; `missing` says why it cannot run here."""

    name: str
    command: Callable[[int], list[str]]
    missing: str | None = None


class WrongAnswerError(click.ClickException):
    """What a reader counted is not what it was given."""


@contextmanager
def started(command: list[str], cpu: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process on a CPU and wait for its "ready". Raises click.ClickException when that does not come."""
    with tempfile.TemporaryFile("w+") as complaints:  # BCC writes there also when all is well
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            cwd=HERE.parent.parent,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),  # noqa: PLW1509 no threads here
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.wait()
                complaints.seek(0)
                raise click.ClickException(f"{' '.join(command[:4])} did not start:\n{complaints.read()}")
            yield process
        finally:
            process.kill()
            process.wait()


def measure(reader: Reader, rate: float, seconds: float, cpus: tuple[int, int]) -> Run:
    """Run one reader against the producer. Raises WrongAnswerError."""
    producing = [sys.executable, "-m", "benchmarks.reader.produce", str(rate), str(seconds)]
    with started(producing, cpus[1]) as producer, started(reader.command(producer.pid), cpus[0]) as consumer:
        took = float(producer.communicate("go\n")[0])
        counted = msgspec.json.decode(consumer.communicate()[0], type=Counted)
    offered = int(rate * seconds / RECORDS_PER_CALL) * RECORDS_PER_CALL
    right = counted.offered == offered == counted.received + counted.lost
    if not right or not (counted.lost or counted.histogram == expected(offered)):
        raise WrongAnswerError(f"{reader.name} of {offered} records: {counted}")
    return Run(counted.offered, counted.received, counted.lost, took, counted.cpu_seconds)


def expected(offered: int) -> list[int]:
    """Return the histogram of numbers 0 to `offered`, by number % BUCKETS."""
    return [offered // BUCKETS + (bucket < offered % BUCKETS) for bucket in range(BUCKETS)]


def built(folder: Path) -> tuple[Path, Path]:
    """Compile the producer and the C reader; return both. Raises click.ClickException with the command to run."""
    for tool, package in (("clang", "clang"), ("llvm-strip", "llvm"), ("gcc", "gcc")):
        if not shutil.which(tool):
            raise click.ClickException(f"{tool} is not installed; apt-get install {package}")
    include = f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH')}"
    producer, consumer = folder / "producer.bpf.o", folder / "consumer"
    flags = ["-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    bpf = ["clang", *flags, "-target", "bpf", "-mcpu=v3", include, "-c", str(HERE / "producer.bpf.c")]
    subprocess.run([*bpf, "-o", str(producer)], check=True)
    subprocess.run(["llvm-strip", "-g", str(producer)], check=True)
    subprocess.run(["gcc", *flags, str(HERE / "consumer.c"), "-o", str(consumer), "-lbpf"], check=True)
    return producer, consumer


def bcc_missing() -> str | None:
    """Say why BCC cannot run, None when it can."""
    found = subprocess.run([SYSTEM_PYTHON, "-c", "import bcc"], capture_output=True, check=False).returncode == 0
    return None if found else "apt-get install python3-bpfcc"


def readers(producer: Path, consumer: Path, ring_bytes: int, bcc: str | None) -> tuple[Reader, ...]:
    """Return the readers in the order of the table."""
    numpy = [sys.executable, "-m", "benchmarks.reader.consume_numpy", str(producer)]
    return (
        Reader(RING, lambda pid: [*numpy, str(pid), str(ring_bytes), "ring"]),
        Reader("Footlight, perf buffers", lambda pid: [*numpy, str(pid), str(ring_bytes), "perf"]),
        Reader(
            BCC,
            lambda pid: [SYSTEM_PYTHON, str(HERE / "consume_bcc.py"), str(pid), str(ring_bytes)],
            bcc,
        ),
        Reader(C, lambda pid: [str(consumer), str(producer), str(pid), str(ring_bytes)]),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One reader's line: the sums of its runs, and the median of its records per CPU second."""

    reader: str
    offered: int
    received: int
    lost: int
    offered_per_second: float
    received_per_second: float
    per_cpu_second: float
    lowest_per_cpu_second: float
    highest_per_cpu_second: float


def summed(name: str, runs: list[Run]) -> Row:
    """Return the line for a reader's runs."""
    seconds = sum(run.seconds for run in runs)
    rates = [run.per_cpu_second for run in runs]
    return Row(
        reader=name,
        offered=sum(run.offered for run in runs),
        received=sum(run.received for run in runs),
        lost=sum(run.lost for run in runs),
        offered_per_second=sum(run.offered for run in runs) / seconds,
        received_per_second=sum(run.received for run in runs) / seconds,
        per_cpu_second=statistics.median(rates),
        lowest_per_cpu_second=min(rates),
        highest_per_cpu_second=max(rates),
    )


def table(rows: list[Row], missing: dict[str, str]) -> Table:
    """Return the rows for people: rates in millions, and the first row's ratio to each."""
    numbers = ("offered/s", "received/s", "lost", "per CPU second", "lowest", "highest", "first row is")
    result = Table("records, millions", *numbers, show_edge=False)
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        rates = (row.offered_per_second, row.received_per_second)
        per_cpu = (row.per_cpu_second, row.lowest_per_cpu_second, row.highest_per_cpu_second)
        result.add_row(
            row.reader,
            *(f"{rate / 1e6:.2f}" for rate in rates),
            f"{row.lost / 1e6:.3f} ({row.lost / row.offered:.0%})" if row.lost else "0",
            *(f"{rate / 1e6:.2f}" for rate in per_cpu),
            f"{rows[0].per_cpu_second / row.per_cpu_second:.2f} x",
        )
    for name, why in missing.items():
        result.add_row(name, "not run:", why)
    return result


def bars(rows: list[Row]) -> list[Bar]:
    """What Footlight promises of its reader, which is the first row."""
    ours, bcc, c = (next((row for row in rows if row.reader == name), None) for name in (RING, BCC, C))

    def times(other: Row | None) -> float:
        return ours.per_cpu_second / other.per_cpu_second if ours and other else math.nan

    return [
        Bar("records offered a second", ours.offered_per_second if ours else math.nan, 3e6, at_least=True),
        Bar("records lost", ours.lost if ours else math.nan, 0),
        Bar("records per CPU second, times BCC's callback", times(bcc), 40, at_least=True),
        Bar("records per CPU second, of the C program's", times(c), 0.4, at_least=True),
    ]


@click.command(help=__doc__)
@click.option("--rate", default=3.2, show_default=True, help="Records offered, millions a second.")
@click.option("--seconds", default=3.0, show_default=True, help="How long each run offers records.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each reader, taken in turn; medians are shown.")
@click.option("--ring-mib", default=16, show_default=True, help="Size of the ring, or of each CPU's perf buffer. MiB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per reader on stdout.")
def main(rate: float, seconds: float, rounds: int, ring_mib: int, as_json: bool) -> None:
    """See the module's docstring, which is the command's help."""
    need_root()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise click.ClickException("the producer and the reader need a CPU each; this process may use one only")
    if host.find_tracefs() is None:
        host.mount_tracefs()
    with ExitStack() as stack:
        producer, consumer = built(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        bcc = bcc_missing() or stack.enter_context(borrowed_headers())
        every = readers(producer, consumer, ring_mib << 20, bcc)
        runs: dict[str, list[Run]] = {reader.name: [] for reader in every if not reader.missing}
        for _ in range(rounds):
            for reader in every:
                if not reader.missing:
                    runs[reader.name].append(measure(reader, rate * 1e6, seconds, (cpus[0], cpus[1])))
    rows = [summed(name, each) for name, each in runs.items()]
    if as_json:
        for row in rows:
            click.echo(json.dumps(asdict(row)))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=120)
        console.print(table(rows, {reader.name: reader.missing for reader in every if reader.missing}))
    judge(bars(rows))


if __name__ == "__main__":
    main()
