"""The flight recorder: what is kept for a recording beside the timeline, and where recordings go."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import stat
import sys
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, cast

from exporter.fronts import Clock
from probes.errors import FootlightError

if TYPE_CHECKING:
    import numpy.typing as npt

    from exporter.critical_path import Step
    from exporter.fronts import Reader
    from exporter.request import FinishedRequest
    from exporter.trace_event import Recording
    from exporter.why import Explained

WINDOW_S: Final = 60
"""How far back a recording can reach."""
MAX_BYTES: Final = 1 << 28
"""Of a recording, before it is compressed."""
MAX_REQUESTS: Final = 20_000
MAX_STEPS: Final = 100_000
"""Of all requests in the window together: some 20 MB. The oldest requests lose theirs first."""
KEEP_FILES: Final = 20
KEEP_BYTES: Final = 1 << 30
EVERY_S: Final = 300.0
"""At the most one recording by itself within this time."""
WRITE_S: Final = 30.0
"""How long writing a recording may take; a minute of a busy service takes some 5 s."""
NOBODY: Final = 65534
_GZIP_LEVEL: Final = 3
_NAME: Final = re.compile(r"footlight-[0-9]{8}T[0-9]{6}Z-[a-z0-9_-]{1,60}\.json\.gz")
_PART: Final = ".part"


class RollingRecords:
    """The newest records of one stream, in memory that was taken at the start: `capacity` of them."""

    def __init__(self, dtype: npt.DTypeLike, capacity: int, key: str) -> None:
        import numpy as np  # noqa: PLC0415 - the attacher imports this module

        self._rows: npt.NDArray[Any] = np.zeros(capacity, dtype)
        self._key: Final = key
        self._next = 0
        self._count = 0

    def add(self, records: npt.NDArray[Any]) -> None:
        """Copy the records in; the oldest give way."""
        capacity = len(self._rows)
        records = records[-capacity:]
        until_end = min(len(records), capacity - self._next)
        self._rows[self._next : self._next + until_end] = records[:until_end]
        self._rows[: len(records) - until_end] = records[until_end:]
        self._next = (self._next + len(records)) % capacity
        self._count = min(self._count + len(records), capacity)

    def since(self, since_ns: int) -> npt.NDArray[Any]:
        """A copy of those that are not older, in no order."""
        kept = self._rows[: self._count]
        found: npt.NDArray[Any] = kept[kept[self._key] >= max(since_ns, 0)]
        return found


class RecentRequests:
    """The requests that ended within the window, and the paths of those that have one. Bounded."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_ns: Final = round(window_s * 1e9)
        self._requests: deque[FinishedRequest] = deque(maxlen=MAX_REQUESTS)
        self._paths: dict[int, tuple[Step, ...]] = {}
        self._steps = 0

    def finished(self, request: FinishedRequest) -> None:
        """Keep it for the window."""
        self._requests.append(request)
        while self._requests[0].finished_ns < request.finished_ns - self._window_ns:
            self._forget(self._requests.popleft().number)

    def explained(self, explained: Explained) -> None:
        """Keep its path as long as the request itself."""
        self._forget(explained.request.number)
        self._paths[explained.request.number] = explained.steps
        self._steps += len(explained.steps)
        while self._steps > MAX_STEPS:
            self._forget(next(iter(self._paths)))

    def _forget(self, number: int) -> None:
        self._steps -= len(self._paths.pop(number, ()))

    def since(self, since_ns: int) -> tuple[list[FinishedRequest], dict[int, tuple[Step, ...]]]:
        """The requests that ended since then, with the paths that there are."""
        found = [request for request in self._requests if request.finished_ns >= since_ns]
        return found, {each.number: self._paths[each.number] for each in found if each.number in self._paths}


# ---- a file ----


class Recorder(Protocol):
    """What a reader with a flight recorder offers."""

    def recording(self, since_ns: int, reason: str) -> Recording:
        """All that was kept from that instant on."""


class RecordFront:
    """Records for `seconds`, then writes one file and ends the agent. Ctrl-C writes what there is.

    `file` was opened by the attacher: the reader may not. Its descriptor must be among those that the reader keeps.
    """

    def __init__(
        self,
        file: IO[bytes],
        *,
        name: str,
        seconds: float,
        compress: bool,
        serves: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.serves = serves
        self.fds: Final = (file.fileno(),)
        self.stop_s: Final = WRITE_S
        self._file: Final = file
        self._name: Final = name
        self._compress: Final = compress
        self._clock: Final = clock or Clock()
        self._seconds: Final = seconds
        self._since_ns = 0

    def prepare(self) -> None:
        """Load what writes."""
        import exporter.trace_event  # noqa: F401, PLC0415 - numpy is not for the attacher

    def started(self, reader: Reader) -> None:
        """The time starts to count."""
        self._since_ns = self._clock.monotonic_ns()
        if sys.stderr.isatty():
            sys.stderr.write(f"recording for {self._seconds:g} s; Ctrl-C writes what there is\n")

    def finished(self, request: FinishedRequest) -> None:
        """Nothing: the reader's flight recorder keeps it."""

    def explained(self, explained: Explained) -> None:
        """Nothing: the reader's flight recorder keeps it."""

    def tick(self, reader: Reader) -> None:
        """End the agent when the time is over."""
        if self._clock.monotonic_ns() - self._since_ns >= self._seconds * 1e9:
            reader.stop()

    def stopped(self, reader: Reader) -> None:
        """Write the file."""
        from exporter.trace_event import Written, write  # noqa: PLC0415 - numpy is not for the attacher

        recording = cast("Recorder", reader).recording(self._since_ns, "asked")
        written = Written()
        with opened(self._file, compress=self._compress) as out:
            for chunk in write(recording, MAX_BYTES, written):
                out.write(chunk)
        self._file.flush()
        sys.stderr.write(summary(self._name, written.events, len(recording.requests), written.oldest_ns is not None))


def summary(name: str, events: int, requests: int, cut: bool) -> str:
    """What to tell a person about a file that was written."""
    lost = "; it has reached its limit, the oldest are missing" if cut else ""
    return f"{name}: {events:,} events, {requests:,} requests{lost}\n  open it: https://ui.perfetto.dev\n"


@contextlib.contextmanager
def opened(file: IO[bytes], *, compress: bool) -> Iterator[IO[bytes]]:
    """Something to write a recording to; `file` stays open."""
    if not compress:
        yield file
        return
    # no name and no time in the header: equal recordings are equal files
    with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as out:
        yield cast("IO[bytes]", out)


def default_name(wall_ns: int, reason: str = "asked", compress: bool = False) -> str:
    """`footlight-TIME-REASON.json`, with the time in UTC."""
    at = datetime.fromtimestamp(wall_ns // 1_000_000_000, UTC)
    word = re.sub(r"[^a-z0-9_-]+", "-", reason.lower()).strip("-")[:60] or "unknown"
    return f"footlight-{at:%Y%m%dT%H%M%SZ}-{word}.json{'.gz' if compress else ''}"


# ---- the folder ----


def open_folder(path: Path) -> int:
    """Make the folder that nobody, as whom the reader runs, may write to; return its descriptor. Needs root.

    A folder that is there already must be nobody's own or empty: no other folder is given away. Raises FootlightError.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise FootlightError(f"cannot use the folder {path}: {error}", "another folder, or none") from error
    try:
        if os.fstat(fd).st_uid != NOBODY and os.geteuid() == 0:
            if os.listdir(fd):  # noqa: PTH208 - a descriptor, not a path
                raise FootlightError(
                    f"{path} is not the agent's own, and not empty",
                    "a folder of its own, which it makes where it is missing",
                )
            os.fchown(fd, NOBODY, NOBODY)
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


class RecordingFolder:
    """Recordings that the agent made by itself, in a folder of bounded size. `fd` is the open folder.

    Everything goes by the descriptor: the reader has no right to look the folder up by its path.
    """

    def __init__(
        self,
        fd: int,
        *,
        keep_files: int = KEEP_FILES,
        keep_bytes: int = KEEP_BYTES,
        every_s: float = EVERY_S,
        clock: Clock | None = None,
    ) -> None:
        self.fd: Final = fd
        self._keep_files: Final = keep_files
        self._keep_bytes: Final = keep_bytes
        self._every_ns: Final = round(every_s * 1e9)
        self._clock: Final = clock or Clock()
        self._last_ns: int | None = None
        self.written = 0
        """Recordings made."""
        self.suppressed = 0
        """Recordings that were due within `every_s` of the one before, and were not made."""

    def may_record(self) -> bool:
        """Whether a recording may be made now. Counts where not; where it may, the time starts again."""
        now_ns = self._clock.monotonic_ns()
        if self._last_ns is not None and now_ns - self._last_ns < self._every_ns:
            self.suppressed += 1
            return False
        self._last_ns = now_ns
        return True

    @contextlib.contextmanager
    def create(self, reason: str) -> Iterator[tuple[str, IO[bytes]]]:
        """A new recording's name, and the file to write it to, uncompressed.

        It has its name when it is complete; then the oldest are removed. Raises OSError.
        """
        name = default_name(self._clock.wall_ns(), reason, compress=True)
        part = name + _PART
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(part, flags, 0o600, dir_fd=self.fd)
        try:
            with os.fdopen(fd, "wb") as file, opened(file, compress=True) as out:
                yield name, out
            os.replace(part, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part, dir_fd=self.fd)
            raise
        self.written += 1
        self.prune()

    def names(self) -> list[str]:
        """The recordings, oldest first."""
        return sorted(name for name in os.listdir(self.fd) if _NAME.fullmatch(name))  # noqa: PTH208 - by descriptor

    def prune(self) -> None:
        """Remove the oldest recordings that are too many or too large, and what an agent that died left half done.

        The newest stays, however large. No file of another name is touched.
        """
        room = self._keep_bytes
        for index, name in enumerate(reversed(self.names())):
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            room -= found.st_size if stat.S_ISREG(found.st_mode) else 0
            if index and (index >= self._keep_files or room < 0):
                os.unlink(name, dir_fd=self.fd)
        for name in os.listdir(self.fd):  # noqa: PTH208 - by descriptor
            if name.endswith(_PART) and _NAME.fullmatch(name.removesuffix(_PART)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)
