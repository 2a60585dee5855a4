"""Probe points on a real library: what functions and USDT probes tell of look-ups is counted exactly, or as lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.roleplay.lookups import LIBRARY
from exporter.config import MAX_PROBE_POINTS, ProbePoint
from probes.points_table import PointSlot, PointsTable
from probes.probe import Count, Transport
from probes.probe_points import ProbePointsProbe
from probes.requests import RequestsProbe

WORKLOADS = Path(__file__).parent / "workloads"
SERVICES = ("chat", "other")
NAME = "liblookups.so"
FUNCTION, TWIN, INT, INT_TWIN, LATE, LATE_TWIN, UNNAMED, CHAT_ONLY = range(8)
POINTS = (
    ProbePoint("function", NAME, "look_up", None, 1, 2, 3),
    ProbePoint("twin", NAME, None, "engine:look_up", 1, 2, 3),
    ProbePoint("int", NAME, "look_up_int", None, 3, 2, 1),
    ProbePoint("int-twin", NAME, None, "engine:look_up_int", 3, 2, 1),
    ProbePoint("late", NAME, "look_up_late", None, 5, 6, 4),
    ProbePoint("late-twin", NAME, None, "engine:look_up_late", 2, 3, 1),
    ProbePoint("unnamed", NAME, "look_up_unnamed", None, None, 1, 2),
    ProbePoint("chat-only", NAME, None, "engine:look_up_unnamed", None, 1, 2, "chat"),
)

Seen = dict[tuple[int, bytes], tuple[int, int, int]]
"""(point, model) -> calls, tokens found, tokens looked up."""


class Engine:
    """A process that looks up as it is told; see tests/kernel/workloads/lookups.py."""

    def __init__(self, library: Path, stack: ExitStack, *before: str) -> None:
        self._process = subprocess.Popen(
            [*before, sys.executable, "-S", "-E", str(WORKLOADS / "lookups.py"), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self.close)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self.pid = int(self._answers.readline())

    def do(self, function: str, *arguments: object, calls: int = 1, threads: int = 1, children: int = 0) -> None:
        """Have every thread of it and of its children call a function."""
        print(json.dumps([function, arguments, calls, threads, children]), file=self._orders, flush=True)
        assert self._answers.readline() == "done\n"

    def close(self) -> None:
        self._orders.close()
        self._process.wait()
        self._answers.close()


class Watch:
    """The probe, and what it has counted since the test began.

    `keeper` is a process that is always followed, so that not each test waits until the library is detached from.
    """

    def __init__(self, requests: RequestsProbe, probe: ProbePointsProbe, keeper: Mapping[int, int] = {}) -> None:
        self.requests, self.probe, self._keeper = requests, probe, keeper
        self.table = PointsTable(probe.points_map)
        self.restart()

    def restart(self) -> None:
        self.follow({})
        self._slots = {(each.service, each.point, each.model): each for each in self.table.read()}
        self._counts = self.probe.counts()

    def follow(self, processes: Mapping[int, int]) -> None:
        """Follow these processes and nobody else, as the attacher does."""
        self.requests.follow({**processes, **self._keeper}, {})
        for _ in range(len(processes) + 1):  # a round without time left looks at one process
            self.probe.follow_processes(self.requests.targets())

    def seen(self, service: int = 0) -> Seen:
        """What a service's points have counted."""
        found: Seen = {}
        for each in self.table.read():
            before = self._slots.get((each.service, each.point, each.model), PointSlot(0, 0, b"", 0, 0, 0))
            if each.service == service and each.calls > before.calls:
                found[each.point, each.model] = (
                    each.calls - before.calls,
                    each.hit_tokens - before.hit_tokens,
                    each.looked_up_tokens - before.looked_up_tokens,
                )
        return found

    def counted(self) -> dict[Count, int]:
        """Every counter that has moved, what was due included."""
        now = self.probe.counts()
        return {count: now[count] - self._counts[count] for count in now if now[count] != self._counts[count]}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("lookups") / NAME
    flags = ["-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    subprocess.run(["clang", *flags, str(WORKLOADS / "lookups.c"), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def requests() -> Iterator[RequestsProbe]:
    """The probe that follows forks for all others."""
    with RequestsProbe(Transport.RING) as probe:
        probe.attach()
        yield probe


@pytest.fixture(scope="module")
def shared(requests: RequestsProbe, library: Path) -> Iterator[Watch]:
    with ExitStack() as stack:
        keeper = Engine(library, stack)
        probe = stack.enter_context(ProbePointsProbe(POINTS, SERVICES, Transport.RING, shares_with=requests))
        probe.attach()
        yield Watch(requests, probe, {keeper.pid: 0})


@pytest.fixture
def watch(shared: Watch) -> Iterator[Watch]:
    shared.restart()
    yield shared
    shared.restart()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as result:
        yield result


def text(model: str) -> list[str]:
    return ["text", model]


def both(model: str, calls: int, hits: int, queries: int, *points: int) -> Seen:
    """What points that see the same calls have counted."""
    return {(point, model.encode()): (calls, calls * hits, calls * queries) for point in points}


def test_every_look_up_of_threads_and_children_is_counted_by_model_in_both_ways(
    watch: Watch, library: Path, stack: ExitStack
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up", text("alto"), 13, 101, calls=499)
    engine.do("look_up", text("bass"), 0, 7, calls=53, threads=2)
    engine.do("look_up", text("tenor"), 17, 17, calls=31, threads=2, children=3)
    assert watch.seen() == {
        **both("alto", 499, 13, 101, FUNCTION, TWIN),
        **both("bass", 106, 0, 7, FUNCTION, TWIN),
        **both("tenor", 31 * 2 * 4, 17, 17, FUNCTION, TWIN),
    }
    assert watch.counted() == {Count.SEEN_LOOKUPS: 2 * (499 + 106 + 248)}


def test_threads_and_processes_that_are_first_at_once_share_one_slot(
    watch: Watch, library: Path, stack: ExitStack
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    for number in range(23):
        engine.do("look_up", text(f"new-{number}"), 1, 2, calls=3, threads=4, children=2)
    names = [slot.model for slot in watch.table.read() if slot.model.startswith(b"new-") and slot.point == FUNCTION]
    assert len(names) == len(set(names)) == 23
    assert watch.seen() == {
        key: value for number in range(23) for key, value in both(f"new-{number}", 36, 1, 2, FUNCTION, TWIN).items()
    }


def test_a_stranger_is_not_counted_and_services_are_told_apart(watch: Watch, library: Path, stack: ExitStack) -> None:
    chat, other, stranger = (Engine(library, stack) for _ in range(3))
    watch.follow({chat.pid: 0, other.pid: 1})
    for engine, calls in ((chat, 11), (other, 7), (stranger, 1009)):
        engine.do("look_up", text("alto"), 1, 3, calls=calls)
        engine.do("look_up_unnamed", 2, 5, calls=calls)
    assert watch.seen(0) == both("alto", 11, 1, 3, FUNCTION, TWIN) | both("", 11, 2, 5, UNNAMED, CHAT_ONLY)
    assert watch.seen(1) == both("alto", 7, 1, 3, FUNCTION, TWIN) | both("", 7, 2, 5, UNNAMED)
    assert watch.counted() == {Count.SEEN_LOOKUPS: 4 * 11 + 3 * 7}


def test_a_number_of_32_bits_is_read_as_such_whatever_is_in_the_rest_of_its_register(
    watch: Watch, library: Path, stack: ExitStack
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up_int", 0xDEAD_0000_0065, 0xBEEF_0000_000D, text("alto"), calls=17)
    assert watch.seen() == both("alto", 17, 13, 101, INT, INT_TWIN)
    watch.restart()
    watch.follow({engine.pid: 0})
    engine.do("look_up_int", 0xFFFF_FFFF, 0, text("alto"), calls=3)
    engine.do("look_up_int", 101, 0xFFFF_FFFE, text("alto"), calls=5)
    assert watch.seen() == {}
    assert watch.counted() == {Count.SEEN_LOOKUPS: 16, Count.IMPLAUSIBLE_LOOKUPS: 16}


def test_all_six_arguments_in_registers_can_be_named(watch: Watch, library: Path, stack: ExitStack) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up_late", 1, 2, 3, 101, text("alto"), 13, calls=7)
    assert watch.seen() == both("alto", 7, 13, 101, LATE, LATE_TWIN)


@pytest.mark.parametrize("address", [0, 1, ["unmapped"], ["edge"], 2**63, 2**64 - 8], ids=str)
def test_a_name_that_cannot_be_read_is_a_look_up_lost(
    watch: Watch, library: Path, stack: ExitStack, address: object
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up", address, 1, 2, calls=5)
    assert watch.seen() == {}
    assert watch.counted() == {Count.SEEN_LOOKUPS: 10, Count.UNREADABLE: 10}


@pytest.mark.parametrize(
    ("given", "model", "cut"),
    [
        (["endless"], b"x" * 127, True),
        (["bytes", "ab" * 127], b"\xab" * 127, True),  # it could be longer: nobody looks further
        (["bytes", "ab" * 126], b"\xab" * 126, False),
        (["bytes", "c328fffe0a22"], b"\xc3(\xff\xfe\n\x22", False),
        (["bytes", "61006200"], b"a", False),
        (["text", ""], b"", False),
    ],
)
def test_any_name_is_taken_as_far_as_its_first_127_bytes(
    watch: Watch, library: Path, stack: ExitStack, given: object, model: bytes, cut: bool
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up", given, 1, 2, calls=5)
    assert watch.seen() == {(point, model): (5, 5, 10) for point in (FUNCTION, TWIN)}
    assert watch.counted() == {Count.SEEN_LOOKUPS: 10} | ({Count.MODEL_NAMES_CUT: 10} if cut else {})


@pytest.mark.parametrize("numbers", [(5, 4), (0, 2**31), (2**31, 2**31), (0, 2**32 - 1), (2**64 - 1, 2**64 - 1)])
def test_numbers_that_cannot_be_are_not_counted(
    watch: Watch, library: Path, stack: ExitStack, numbers: tuple[int, int]
) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up", text("alto"), *numbers, calls=7)
    assert watch.seen() == {}
    assert watch.counted() == {Count.SEEN_LOOKUPS: 14, Count.IMPLAUSIBLE_LOOKUPS: 14}


def test_the_largest_number_is_counted(watch: Watch, library: Path, stack: ExitStack) -> None:
    engine = Engine(library, stack)
    watch.follow({engine.pid: 0})
    engine.do("look_up", text("alto"), 2**31 - 1, 2**31 - 1, calls=7)
    assert watch.seen() == both("alto", 7, 2**31 - 1, 2**31 - 1, FUNCTION, TWIN)


def test_a_process_that_comes_again_counts_on_and_nothing_twice(
    requests: RequestsProbe, library: Path, stack: ExitStack
) -> None:
    probe = stack.enter_context(ProbePointsProbe(POINTS, SERVICES, Transport.RING, shares_with=requests))
    watch = Watch(requests, probe)
    for _ in range(5):  # the one is gone and the next one there in one round
        engine = Engine(library, stack)
        watch.follow({engine.pid: 0})
        assert probe.attached == {engine.pid}
        engine.do("look_up", text("alto"), 1, 3, calls=5)
        engine.close()
    for _ in range(5):  # there is none for a round
        probe.follow_processes({})
        assert probe.attached == frozenset()
        engine = Engine(library, stack)
        watch.follow({engine.pid: 0})
        engine.do("look_up", text("alto"), 1, 3, calls=5)
        engine.close()
    assert watch.seen() == both("alto", 50, 1, 3, FUNCTION, TWIN)
    watch.follow({})


def test_more_models_than_slots_are_counted_as_not_counted(
    requests: RequestsProbe, library: Path, stack: ExitStack
) -> None:
    engine = Engine(library, stack)
    point = (ProbePoint("function", str(library), "look_up", None, 1, 2, 3),)
    probe = stack.enter_context(ProbePointsProbe(point, SERVICES, Transport.RING, slots=5, shares_with=requests))
    watch = Watch(requests, probe)
    watch.follow({engine.pid: 0})
    for number in range(7):
        engine.do("look_up", text(f"model-{number}"), 1, 3, calls=11)
    engine.do("look_up", text("model-4"), 1, 3, calls=2)
    assert watch.seen() == {
        (0, b"model-%d" % number): (calls, calls, 3 * calls) for number, calls in enumerate((11, 11, 11, 11, 13))
    }
    assert watch.counted() == {Count.SEEN_LOOKUPS: 79, Count.SLOTS_FULL: 22}
    watch.follow({})


def test_what_a_library_does_not_have_is_said_and_the_rest_counts(
    requests: RequestsProbe, library: Path, stack: ExitStack
) -> None:
    engine = Engine(library, stack)
    points = (
        ProbePoint("gone", NAME, "look_up_long_ago", None, 1, 2, 3),
        ProbePoint("gone-too", NAME, None, "engine:look_up_long_ago", 1, 2, 3),
        ProbePoint("elsewhere", "/usr/lib/libelsewhere.so", "elsewhere_look_up", None, 1, 2, 3),
        ProbePoint("short", NAME, None, "engine:look_up_unnamed", 3, 1, 2),
        ProbePoint("there", NAME, "look_up", None, 1, 2, 3),
    )
    probe = stack.enter_context(ProbePointsProbe(points, SERVICES, Transport.RING, shares_with=requests))
    watch = Watch(requests, probe)
    watch.follow({engine.pid: 0})
    nowhere, function, twin = probe.notes()
    assert nowhere == "elsewhere_look_up: no followed process maps /usr/lib/libelsewhere.so"
    assert function.startswith(f"look_up_long_ago: {library}: ")
    assert twin.startswith(f"engine:look_up_long_ago: {library}: ")
    assert probe.attached == {engine.pid}
    assert probe.files == (str(library),)
    engine.do("look_up", text("alto"), 1, 3, calls=5)
    engine.do("look_up_unnamed", 1, 3, calls=7)
    assert watch.seen() == {(4, b"alto"): (5, 5, 15)}
    # The probe is there, and has no third argument.
    assert watch.counted() == {Count.SEEN_LOOKUPS: 12, Count.UNREADABLE: 7}
    watch.follow({})
    assert probe.attached == frozenset()
    assert probe.files == ()


def test_a_library_that_only_the_process_s_own_mounts_have_is_found(
    requests: RequestsProbe, library: Path, stack: ExitStack, tmp_path: Path
) -> None:
    shell = f"mount -t tmpfs tmpfs {tmp_path} && cp {library} {tmp_path} && exec \"$@\""
    engine = Engine(tmp_path / NAME, stack, "unshare", "--mount", "sh", "-c", shell, "sh")
    assert not (tmp_path / NAME).exists()
    points = (*POINTS[:2], ProbePoint("by-path", str(tmp_path / NAME), "look_up", None, 1, 2, 3))
    probe = stack.enter_context(ProbePointsProbe(points, SERVICES, Transport.RING, shares_with=requests))
    watch = Watch(requests, probe)
    watch.follow({engine.pid: 0})
    engine.do("look_up", text("alto"), 1, 3, calls=5)
    assert watch.seen() == both("alto", 5, 1, 3, 0, 1, 2)
    watch.follow({})


def test_there_are_as_many_points_as_the_configuration_may_have(shared: Watch) -> None:
    assert shared.probe.map("points").max_entries == MAX_PROBE_POINTS == len(POINTS)


def test_the_role_play_engine_s_library_tells_by_its_function_and_its_twin(
    requests: RequestsProbe, stack: ExitStack
) -> None:
    assert LIBRARY.exists(), "it is not built; try: make native"
    engine = Engine(LIBRARY, stack)
    points = (
        ProbePoint("function", LIBRARY.name, "llm_kv_lookup", None, 1, 2, 3),
        ProbePoint("twin", str(LIBRARY), None, "roleplay:kv_lookup", 1, 2, 3),
    )
    probe = stack.enter_context(ProbePointsProbe(points, SERVICES, Transport.RING, shares_with=requests))
    watch = Watch(requests, probe)
    watch.follow({engine.pid: 1})
    engine.do("llm_kv_lookup", text("understudy"), 96, 107, calls=499)
    assert watch.seen(1) == both("understudy", 499, 96, 107, 0, 1)
    watch.follow({})
