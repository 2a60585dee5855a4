"""When descriptors leak, and what a snapshot says of a real process: this one."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes import descriptors
from probes.descriptors import MOST_CHARACTERS, MOST_TARGETS, Growth, Snapshot, Target, counts_by_size, snapshot
from probes.vitals import AGAIN_S, Vitals

OWN = os.getpid()


def grown(counts: list[float], period: float = 1.0) -> Growth:
    growth = Growth()
    for index, count in enumerate(counts):
        growth.add(index * period, round(count))
    return growth


# ---- the rule ----


@pytest.mark.parametrize(
    ("counts", "leaks"),
    [
        ([51 * second for second in range(11)], True),
        ([50 * second for second in range(11)], False),
        ([1000 * second for second in range(10)], False),  # not for ten seconds yet
        ([17 + 71 * second for second in range(40)], True),
        ([100] * 5 + [5000] * 15, False),  # one jump
        ([0] * 5 + [2000] + [2000] * 4 + [4000] * 1, False),
        ([5000 - 60 * second for second in range(20)], False),
        ([0] * 11 + [60 * second for second in range(11)], True),
        ([100 * (second // 2) * 2 for second in range(12)], True),  # in steps
    ],
)
def test_what_a_leak_is(counts: list[float], leaks: bool) -> None:
    assert grown(counts).leaks() is leaks


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("late", [0.0, 0.03])
def test_a_leak_is_seen_within_twelve_seconds(offset: float, late: float) -> None:
    growth, second = Growth(), 0.0
    assert not growth.leaks()
    while not growth.leaks():
        second += 1 + late
        growth.add(second, 100 + round(71 * max(0.0, second - 30 - offset)))
    assert second - 30 - offset <= 11.5


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1 << 20)), min_size=1, max_size=50))
def test_uneven_looks_are_taken(steps: list[tuple[float, int]]) -> None:
    growth, now = Growth(), 0.0
    for pause, count in steps:
        now += pause
        growth.add(now, count)
        growth.leaks()


# ---- a real process ----


@pytest.fixture
def open_things(tmp_path: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def targets(found: Snapshot) -> dict[tuple[str, str], int]:
    return {(each.kind, each.name): each.count for each in found.targets}


def seen() -> Snapshot:
    found = snapshot(OWN)
    assert found is not None
    return found


def test_files_pipes_and_anonymous_inodes(tmp_path: Path, open_things: ExitStack) -> None:
    path = tmp_path / "weights.bin"
    path.touch()
    before = dict(seen().kinds)
    for _ in range(7):
        open_things.enter_context(path.open())
    for fd in os.pipe():
        open_things.callback(os.close, fd)
    for _ in range(3):
        open_things.callback(os.close, os.eventfd(0))
    found = seen()
    assert targets(found)["file", str(path)] == 7
    after = dict(found.kinds)
    assert after["file"] - before.get("file", 0) == 7
    assert after["pipe"] - before.get("pipe", 0) == 2
    assert after["eventfd"] - before.get("eventfd", 0) == 3


def test_tcp_by_its_other_end(open_things: ExitStack) -> None:
    listener = open_things.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = listener.getsockname()[1]
    for _ in range(11):
        open_things.enter_context(socket.create_connection(("127.0.0.1", port)))
        open_things.enter_context(listener.accept()[0])
    found = targets(seen())
    assert found["tcp", f"listens on 127.0.0.1:{port}"] == 1
    assert found["tcp", f"to 127.0.0.1:{port}"] == 11
    assert found["tcp", f"from 127.0.0.1 to port {port}"] == 11


def test_tcp_of_version_six(open_things: ExitStack) -> None:
    listener = open_things.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
    port = listener.getsockname()[1]
    open_things.enter_context(socket.create_connection(("::1", port)))
    found = targets(seen())
    assert found["tcp", f"listens on [::1]:{port}"] == 1
    assert found["tcp", f"to [::1]:{port}"] == 1


def test_unix_sockets_by_their_name_and_their_peers(tmp_path: Path, open_things: ExitStack) -> None:
    path = str(tmp_path / "sock")
    listener = open_things.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    listener.listen()
    for _ in range(5):
        open_things.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        open_things.enter_context(listener.accept()[0])
    found = targets(seen())
    assert found["unix", path] == 6  # it listens, and what was accepted has its name
    if os.geteuid() == 0:  # to ask in the process's network namespace is root's alone
        assert found["unix", f"to {path}"] == 5
    else:
        assert found["unix", "without a name"] >= 5


def test_the_largest_targets_come_first_and_are_few(tmp_path: Path, open_things: ExitStack) -> None:
    for number in range(MOST_TARGETS + 3):
        path = tmp_path / f"{number:03}{'x' * 200}"
        for _ in range(29 + number):
            open_things.enter_context(path.open("w"))
    found = seen()
    assert len(found.targets) == MOST_TARGETS
    counts = [each.count for each in found.targets]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 29 + MOST_TARGETS + 2
    assert all(len(each.name) <= MOST_CHARACTERS for each in found.targets)


def test_more_descriptors_than_are_examined(
    tmp_path: Path, open_things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "MOST_EXAMINED", 13)
    for _ in range(23):
        open_things.enter_context((tmp_path / "x").open("w"))
    found = seen()
    assert found.open_files >= 23
    assert found.examined <= 13


def test_a_process_that_is_gone_has_no_snapshot() -> None:
    assert snapshot(1 << 22) is None


def test_tables_of_nonsense_are_taken(tmp_path: Path) -> None:
    process = tmp_path / "7"
    (process / "fd").mkdir(parents=True)
    (process / "net").mkdir()
    (process / "fd/0").symlink_to("socket:[11]")
    (process / "fd/1").symlink_to("socket:[no]")
    (process / "fd/2").symlink_to("anon_inode:")
    (process / "fd/3").symlink_to("/x/\udcff (deleted)")
    (process / "fd/4").symlink_to("socket:[12]")
    for name, text in (
        ("tcp", "head\n 0: 0100007F:1F90 zz:0 0A\n 1: 1F90 : 01 a b c d e 11\n\xff\n"),
        ("tcp6", "head\n 0: 00:1 00:2 01 0 0 0 0 0 11\n"),
        ("udp", ""),
        ("unix", "head\na b c d e f g h\n" + "1: 2 3 4 5 6 12\n" * 3),
    ):
        (process / "net" / name).write_text(text, "latin-1")
    found = snapshot(7, tmp_path)
    assert found is not None
    assert found.open_files == found.examined == 5
    assert Target("other", "socket", 1) in found.targets
    assert Target("unix", "without a name", 1) in found.targets


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def socket_row(local: str, peer: str, state: str, inode: int) -> str:
    return f"   1: {local} {peer} {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 20 4\n"


def test_tables_of_others_sockets_are_not_held(tmp_path: Path) -> None:
    (tmp_path / "7/fd").mkdir(parents=True)
    (tmp_path / "7/net").mkdir()
    for number in range(3):
        (tmp_path / f"7/fd/{number}").symlink_to(f"socket:[{40_009 + number}]")
    local, peer = "0100007F:1F90", "0200007F:{:04X}"
    six = "0000000000000000FFFF0000{}".format
    rows = [socket_row(peer.format(1 + number % 65535), local, "01", number) for number in range(20_011)]
    rows += [socket_row(local, peer.format(7), "01", 40_009)]
    rows_six = [socket_row(six(peer.format(1 + number % 65535)), six(local), "01", number) for number in range(20_011)]
    rows_six += [socket_row(six(local), six(peer.format(11)), "01", 40_010)]
    (tmp_path / "7/net/tcp").write_text("".join(["head\n", socket_row(local, "00000000:0000", "0A", 11), *rows]))
    (tmp_path / "7/net/tcp6").write_text("".join(["head\n", *rows_six]))
    names = [f"0: 00000002 00000000 00010000 0001 01 {number} /a/{number}\n" for number in range(20_011)]
    (tmp_path / "7/net/unix").write_text("".join(["head\n", *names, names[-1].replace(" 20010 ", " 40011 ")]))
    found: list[Snapshot | None] = []
    assert peak_bytes(lambda: found.append(snapshot(7, tmp_path))) < 1 << 19
    assert found[0] is not None
    assert targets(found[0]) == {("tcp", "from 127.0.0.2 to port 8080"): 2, ("unix", "/a/20010"): 1}


def test_names_of_descriptors_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_EXAMINED", 13)
    process(tmp_path, 7, files=2003)
    counted: list[int | None] = []
    found: list[Snapshot | None] = []
    assert peak_bytes(lambda: counted.append(descriptors.count(str(tmp_path), 7, by_size=False))) < 1 << 15
    assert peak_bytes(lambda: found.append(snapshot(7, tmp_path))) < 1 << 15
    assert counted == [2003]
    assert found[0] is not None
    assert (found[0].open_files, found[0].examined) == (2003, 13)


# ---- once a second ----


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def process(root: Path, pid: int, *, files: int = 3, ticks: int = 100, start: int = 5000, pages: int = 10) -> None:
    folder = root / str(pid)
    (folder / "fd").mkdir(parents=True, exist_ok=True)
    for number in range(len(list((folder / "fd").iterdir())), files):
        (folder / "fd" / str(number)).symlink_to("/dev/null")
    fields = ["S", *"0" * 10, str(ticks), "7", *"0" * 6, str(start), "0", str(pages), "0"]
    (folder / "stat").write_text(f"{pid} (a ) b) {' '.join(fields)}\n")


def test_what_a_service_uses(tmp_path: Path) -> None:
    vitals = Vitals(tmp_path, Clock())
    process(tmp_path, 11, files=3, start=90)
    process(tmp_path, 13, files=5, start=70)
    process(tmp_path, 17, files=7)
    first = vitals.look({11: 0, 13: 0, 17: 1, 19: 1})
    assert (first[0].cpu_seconds, first[0].open_files, first[1].open_files) == (0.0, 8, 7)
    assert first[0].resident_bytes == 20 * os.sysconf("SC_PAGE_SIZE")
    process(tmp_path, 11, ticks=100 + 3 * os.sysconf("SC_CLK_TCK"), start=90)
    second = vitals.look({11: 0, 13: 0, 17: 1})
    assert second[0].cpu_seconds == 3.0
    assert second[0].eldest == first[0].eldest == 70 << 22 | 13
    process(tmp_path, 13, ticks=1, start=95, files=5)  # another one with its number
    third = vitals.look({11: 0, 13: 0})
    assert third[0].cpu_seconds == 3.0
    assert third[0].eldest == 90 << 22 | 11
    assert 1 not in third


def test_this_process_is_counted_as_by_its_folder() -> None:
    vitals = Vitals()
    found = vitals.look({OWN: 0})[0]
    assert found.open_files == pytest.approx(len(os.listdir(f"/proc/{OWN}/fd")), abs=1)
    assert found.resident_bytes > 1 << 20
    assert descriptors.count("/proc", OWN, by_size=False) == pytest.approx(found.open_files, abs=1)
    assert counts_by_size("/proc") in {True, False}
    assert not counts_by_size("/nowhere")


def test_a_leak_is_told_once_in_a_while_with_what_it_is(tmp_path: Path) -> None:
    clock = Clock()
    vitals = Vitals(tmp_path, clock)
    told = []
    for second in range(31):
        process(tmp_path, 11, files=3 + 61 * second)
        vitals.look({11: 4})
        told += [(second, leak) for leak in vitals.leaks()]
        clock.now -= 1.0  # leaks() asks it too
    ((second, leak),) = told
    assert second in {10, 11}
    assert (leak.service, leak.tgid) == (4, 11)
    assert leak.per_second == pytest.approx(61)
    assert leak.found.targets == (Target("device", "/dev/null", 3 + 61 * second),)
    clock.now += AGAIN_S
    for second in range(31, 45):
        process(tmp_path, 11, files=3 + 61 * second)
        vitals.look({11: 4})
        told += [(second, leak) for leak in vitals.leaks()]
        clock.now -= 1.0
    assert len(told) == 2
