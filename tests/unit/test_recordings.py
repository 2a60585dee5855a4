"""What is kept for a recording, the file that it is written to, and the folder of those that the agent makes."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from exporter import cli, recordings
from exporter.cli import asking
from exporter.critical_path import Cause, Step
from exporter.fronts import Clock
from exporter.recordings import (
    RecentRequests,
    RecordFront,
    RecordingFolder,
    RollingRecords,
    default_name,
    open_folder,
)
from exporter.request import FinishedRequest
from exporter.trace_event import Recording
from exporter.why import Explained
from probes.errors import FootlightError
from tests.unit.finished import TOLD, later

S = 1_000_000_000
MS = 1_000_000
BEGIN = 5_000 * S

REQUEST = later(TOLD, BEGIN)


class HandClock(Clock):
    """Both clocks by hand; the wall clock begins at 2023-11-14T22:13:20Z."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return 1_700_000_000 * S + self.now_ns


# ---- what is kept ----


@given(st.lists(st.integers(0, 40), max_size=12))
def test_the_newest_records_are_kept(batches: list[int]) -> None:
    kept = RollingRecords([("at_ns", "u8"), ("value", "u4")], 23, "at_ns")
    numbers: list[int] = []
    for size in batches:
        new = np.zeros(size, [("at_ns", "u8"), ("value", "u4")])
        new["at_ns"] = np.arange(len(numbers), len(numbers) + size) * 10
        new["value"] = np.arange(len(numbers), len(numbers) + size)
        numbers += new["value"].tolist()
        kept.add(new)
        new["value"] = 0  # what is kept is a copy
    assert sorted(kept.since(-5)["value"].tolist()) == numbers[-23:]
    assert sorted(kept.since(995)["value"].tolist()) == [number for number in numbers[-23:] if number >= 100]


def at(number: int, second: float) -> FinishedRequest:
    return replace(REQUEST, number=number, finished_ns=BEGIN + round(second * S))


def path(request: FinishedRequest, steps: int) -> Explained:
    step = Step(request.arrived_ns, request.finished_ns, 103, Cause.on_cpu, "", 0)
    return Explained(request, (step,) * steps, {}, {}, False, {})


def test_requests_are_kept_for_the_window_with_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = RecentRequests(60)
    for number in range(101):
        request = at(number, number)
        recent.finished(request)
        if number % 2:
            recent.explained(path(request, 3))
    requests, paths = recent.since(BEGIN + 70 * S)
    assert [request.number for request in requests] == list(range(70, 101))
    assert sorted(paths) == list(range(71, 101, 2))
    requests, paths = recent.since(0)
    assert [request.number for request in requests] == list(range(40, 101))
    assert len(paths) == 30
    monkeypatch.setattr(recordings, "MAX_STEPS", 100)
    recent.explained(path(at(100, 100), 50))
    _, paths = recent.since(0)
    assert sum(map(len, paths.values())) <= 100
    assert len(paths[100]) == 50
    assert 41 not in paths  # the oldest gave way


def test_a_path_that_comes_twice_counts_once() -> None:
    recent = RecentRequests(60)
    recent.finished(at(1, 1))
    for _ in range(recordings.MAX_STEPS):
        recent.explained(path(at(1, 1), 2))
    assert len(recent.since(0)[1][1]) == 2


# ---- the front ----


class FakeReader:
    def __init__(self) -> None:
        self.stops = 0
        self.asked: list[tuple[int, str]] = []

    def stop(self) -> None:
        self.stops += 1

    def recording(self, since_ns: int, reason: str) -> Recording:
        self.asked.append((since_ns, reason))
        return Recording(BEGIN, BEGIN + S, 0, ("roleplay",), [REQUEST])


@pytest.mark.parametrize("compress", [False, True])
def test_the_front_writes_one_file_when_the_time_is_over(
    tmp_path: Path, compress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, reader = HandClock(), FakeReader()
    clock.now_ns = 7 * S
    with (tmp_path / "trace").open("wb") as file:
        front = RecordFront(file, name="trace", seconds=2.5, compress=compress, clock=clock)
        assert front.fds == (file.fileno(),)
        front.prepare()
        front.started(reader)  # type: ignore[arg-type]
        clock.now_ns += 2 * S
        front.tick(reader)  # type: ignore[arg-type]
        assert reader.stops == 0
        clock.now_ns += S
        front.tick(reader)  # type: ignore[arg-type]
        assert reader.stops == 1
        front.stopped(reader)  # type: ignore[arg-type]
        # the reader ends without the interpreter's tidying up: everything must be in the file
        data = (tmp_path / "trace").read_bytes()
    found = json.loads(gzip.decompress(data) if compress else data)
    assert len(found["traceEvents"]) > 3
    assert reader.asked == [(7 * S, "asked")]
    assert "trace: 5 events, 1 requests\n  open it: https://ui.perfetto.dev" in capsys.readouterr().err


def test_names_say_when_and_why() -> None:
    assert default_name(1_700_000_000 * S + 5) == "footlight-20231114T221320Z-asked.json"
    hostile = default_name(1_700_000_000 * S, "TTFT p99 > 300 ms/../../\u00e9\x00" + "x" * 99, compress=True)
    assert re.fullmatch(r"footlight-20231114T221320Z-ttft-p99-300-ms-x+\.json\.gz", hostile)
    assert len(hostile) == len("footlight-20231114T221320Z-.json.gz") + 60
    assert default_name(0, "///").endswith("Z-unknown.json")


# ---- the folder ----


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    found = open_folder(tmp_path / "recordings")
    yield found
    os.close(found)


def record(folder: RecordingFolder, size: int = 10, reason: str = "ttft") -> str:
    with folder.create(reason) as (name, file):
        file.write(os.urandom(size))
    return name


def test_a_recording_is_there_when_it_is_complete(fd: int, tmp_path: Path, clock: HandClock) -> None:
    folder = RecordingFolder(fd, clock=clock)
    with folder.create("TTFT p99") as (name, file):
        assert folder.names() == []
        file.write(b"{}")
    assert folder.names() == [name] == ["footlight-20231114T221320Z-ttft-p99.json.gz"]
    found = tmp_path / "recordings" / name
    assert gzip.decompress(found.read_bytes()) == b"{}"
    assert found.stat().st_mode & 0o777 == 0o600
    assert folder.written == 1


def test_one_that_fails_leaves_nothing(fd: int, tmp_path: Path, clock: HandClock) -> None:
    folder = RecordingFolder(fd, clock=clock)
    with pytest.raises(ZeroDivisionError), folder.create("ttft") as (_, file):
        file.write(b"{")
        raise ZeroDivisionError
    assert list((tmp_path / "recordings").iterdir()) == []
    assert folder.written == 0


def test_the_oldest_give_way_by_number(fd: int, clock: HandClock) -> None:
    folder = RecordingFolder(fd, keep_files=3, clock=clock)
    names = []
    for _ in range(7):
        clock.now_ns += S
        names.append(record(folder))
    assert folder.names() == names[-3:]


def test_the_oldest_give_way_by_size_and_the_newest_stays(fd: int, clock: HandClock) -> None:
    folder = RecordingFolder(fd, keep_bytes=10_000, clock=clock)
    names = []
    for size in (3_000, 3_000, 3_000, 3_000):
        clock.now_ns += S
        names.append(record(folder, size))
    assert folder.names() == names[-3:]
    clock.now_ns += S
    huge = record(folder, 50_000)
    assert folder.names() == [huge]


def test_other_files_are_left_alone_and_half_ones_are_removed(fd: int, tmp_path: Path, clock: HandClock) -> None:
    place = tmp_path / "recordings"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (place / "notes.txt").write_text("mine")
    (place / "notes.part").write_text("mine")
    (place / "footlight-20200101T000000Z-ttft.json.gz.part").write_text("half")
    (place / "footlight-20200101T000000Z-link.json.gz").symlink_to(victim)
    (place / "footlight-20231114T221320Z-ttft.json.gz.part").symlink_to(victim)
    folder = RecordingFolder(fd, keep_files=1, clock=clock)
    with pytest.raises(OSError, match=r"symbolic|ELOOP|Too many"):
        record(folder)
    assert victim.read_text() == "precious"
    (place / "footlight-20231114T221320Z-ttft.json.gz.part").unlink(missing_ok=True)
    name = record(folder)
    assert sorted(os.listdir(place)) == [name, "notes.part", "notes.txt"]
    assert victim.read_text() == "precious"


def test_a_recording_is_made_once_in_a_while(fd: int, clock: HandClock) -> None:
    folder = RecordingFolder(fd, every_s=300, clock=clock)
    assert folder.may_record()
    clock.now_ns += 299 * S
    assert not folder.may_record()
    assert not folder.may_record()
    assert folder.suppressed == 2
    clock.now_ns += S
    assert folder.may_record()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives the folder away; sudo .venv/bin/python -m pytest")
def test_the_folder_belongs_to_nobody_and_no_other_is_given_away(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    os.close(open_folder(place))
    assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (65534, 0o700)
    (place / "recording").write_text("x")
    os.close(open_folder(place))  # its own from before
    full = tmp_path / "full"
    full.mkdir()
    (full / "data").write_text("x")
    with pytest.raises(FootlightError, match="not the agent's own"):
        open_folder(full)
    assert full.stat().st_uid == 0
    (tmp_path / "link").symlink_to(full)
    (tmp_path / "file").write_text("")
    for wrong in ("link", "file"):
        with pytest.raises(FootlightError, match="cannot use the folder"):
            open_folder(tmp_path / wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody; sudo .venv/bin/python -m pytest")
def test_nobody_can_write_to_it_by_the_descriptor_alone(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(0o700)
    fd = open_folder(hidden / "recordings")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            folder = RecordingFolder(fd, keep_files=2)
            for reason in ("one", "two", "three"):
                record(folder, reason=reason)
            code = 0 if len(folder.names()) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(fd)
    assert len(list((hidden / "recordings").iterdir())) == 2


# ---- the command ----


def footlight(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, prog_name="footlight")


class Answer(io.BytesIO):
    def __init__(self, data: bytes, headers: dict[str, str]) -> None:
        super().__init__(data)
        self.headers = headers


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the agent answers, and what it was asked."""
    given: dict[str, Any] = {"data": b'{"traceEvents":[]}', "headers": {}, "asked": []}

    def opened(url: asking.Url, path: str, **query: str) -> Answer:
        given["asked"].append((url.base, path, query))
        return Answer(given["data"], given["headers"])

    monkeypatch.setattr(asking.Url, "open", opened)
    return given


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_running_agent_is_asked_for_its_last_seconds(
    tmp_path: Path, agent: dict[str, Any], coded: bool, name: str
) -> None:
    plain = agent["data"]
    if coded:
        agent.update(data=gzip.compress(plain), headers={"content-encoding": "gzip"})
    result = footlight("record", "--url", "127.0.0.1:9466", "--seconds", "7.5", "-o", str(tmp_path / name))
    assert result.exit_code == 0, result.output
    data = (tmp_path / name).read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data) == plain
    assert agent["asked"] == [("http://127.0.0.1:9466", "/api/record", {"seconds": "7.5"})]
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path: Path, agent: dict[str, Any]) -> None:
    path = tmp_path / "trace.json"
    path.write_text("mine")
    arguments = ("record", "--url", "127.0.0.1:9466", "-o", str(path))
    result = footlight(*arguments)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert (path.read_text(), agent["asked"]) == ("mine", [])
    assert footlight(*arguments, "--force").exit_code == 0
    assert path.read_bytes() == agent["data"]


def test_a_recording_that_fails_leaves_no_file(
    tmp_path: Path, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    agent.update(data=b"no gzip", headers={"content-encoding": "gzip"})
    result = footlight("record", "--url", "127.0.0.1:9466", "-o", "trace.json")
    assert result.exit_code == 1
    assert "the recording broke off: Not a gzipped file" in result.output
    agent.update(data=b"", headers={})
    result = footlight("record", "--url", "127.0.0.1:9466", "-o", "trace.json")
    assert result.exit_code == 1
    assert "nothing was recorded" in result.output
    assert os.listdir(tmp_path) == []
    assert footlight("record", "--url", "127.0.0.1:9466", "-o", "no/such/folder.json").exit_code == 1


def test_the_default_name_is_compressed_and_says_when(
    tmp_path: Path, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert footlight("record", "--url", "127.0.0.1:9466").exit_code == 0
    (name,) = os.listdir(tmp_path)
    assert re.fullmatch(r"footlight-[0-9]{8}T[0-9]{6}Z-asked\.json\.gz", name)
    assert gzip.decompress(Path(name).read_bytes()) == agent["data"]


@pytest.mark.parametrize("seconds", ["0", "61", "x"])
def test_seconds_have_a_range(seconds: str) -> None:
    assert footlight("record", "--url", "127.0.0.1:9466", "--seconds", seconds).exit_code == 2
