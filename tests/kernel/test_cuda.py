"""The CUDA probe against a stand-in for the driver's library, whose callers say what they called."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from probes import btf
from probes.cuda import Call, CudaProbe
from probes.probe import OBJECTS, Count, Transport
from tests.kernel.one_probe import OneProbe, attached, fill, wait_for
from tests.standins.cuda import Caller, breakpoints, build

LAUNCHES, COPIES, STALLS = 10_007, 101, 53
STALL_US = 20_000
UNKNOWN, IN, OUT, WITHIN = range(4)
"""Directions of copies."""
CONTEXT, STREAM, EVENT, COPY = range(4)
"""Waits."""
PYTHON = """
import ctypes, os, sys
print(os.getpid(), flush=True)
cuda = ctypes.CDLL(sys.argv[1])
def launch(_): cuda.cuLaunchKernel(None, 1, 1, 1, 32, 1, 1, 0, None, None, None)
def stream(_): cuda.cuStreamSynchronize(None)
def busy(us): cuda.standin_busy_us(ctypes.c_long(us))
buffer = ctypes.create_string_buffer(4096)
def copy_in(size): cuda.cuMemcpyHtoD_v2(buffer, buffer, ctypes.c_size_t(size))
def allocate(size): cuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_ulonglong()), ctypes.c_size_t(size))
for line in sys.stdin:
    name, count, argument = line.split()
    for _ in range(int(count)):
        globals()[name](int(argument))
    print('done', flush=True)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def probe(able_host: None) -> Iterator[OneProbe]:
    with attached(CudaProbe(Transport.RING, services=2)) as one:
        yield one


@pytest.fixture
def cuda(probe: OneProbe) -> Iterator[OneProbe]:
    follow(probe)
    probe.restart()
    yield probe
    follow(probe)


Start = Callable[[], Caller]


@pytest.fixture
def start(built: tuple[Path, Path]) -> Iterator[Start]:
    """Starts a caller that has the library."""
    with ExitStack() as stack:

        def one() -> Caller:
            return stack.enter_context(closing(Caller([str(built[1])], preload=built[0])))

        yield one


def follow(one: OneProbe, *callers: Caller | None) -> None:
    """Make these the targets, service by service, and give the probe its round."""
    tgids = {caller.pid: index for index, caller in enumerate(callers) if caller is not None}
    one.follow(tgids)
    cuda_probe(one).follow_processes(tgids)


def cuda_probe(one: OneProbe) -> CudaProbe:
    assert isinstance(one.raw, CudaProbe)
    return one.raw


def outstanding(one: OneProbe, service: int = 0) -> int:
    stats = one.stats(service)
    return int(stats["allocated_bytes"] - stats["freed_bytes"])


def user_links() -> int:
    """Links to user code that this process has open."""
    kinds = ("uprobe_multi", "perf")
    found = 0
    for entry in Path("/proc/self/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except OSError:
            continue
        found += any(f"link_type:\t{kind}" in text for kind in kinds)
    return found


def test_the_calls_are_those_of_the_probe() -> None:
    in_c = btf.enum_of(OBJECTS / "cuda.bpf.o", "cuda_call")
    assert in_c == {f"CUDA_{call.name}": call.value for call in Call}


def test_launches_copies_and_stalls_are_counted_exactly(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("launch", LAUNCHES)
    caller.do("copy_in_async", COPIES, 4099)
    caller.do("busy", 1, STALL_US)
    mean_ns = float(caller.do("stream", STALLS))
    stats, spans = cuda.stats(), cuda.records()
    assert stats["launches"].tolist() == [LAUNCHES, 0]
    assert stats["copies"].tolist() == [0, COPIES, 0, 0]
    assert stats["copied_bytes"].tolist() == [0, COPIES * 4099, 0, 0]
    stalls = stats["waits"][STREAM]
    assert sum(stalls["counts"]) == STALLS
    assert abs(stalls["sum_ns"] / STALLS - mean_ns) < 1_000_000
    took = spans["end_ns"] - spans["begin_ns"]
    assert len(spans) == STALLS
    assert min(took) >= STALL_US * 1000
    assert int(sum(took)) == stalls["sum_ns"]
    assert set(spans["tgid"]) == set(spans["tid"]) == {caller.pid}
    assert set(spans["kind"]) == {2}
    assert cuda.losses() == {}


def test_a_python_program_is_counted_the_same(
    cuda: OneProbe, built: tuple[Path, Path], start: Start, tmp_path: Path
) -> None:
    with closing(Caller([sys.executable, "-S", "-E", "-c", PYTHON, str(built[0])])) as caller:
        caller.do("busy", 1, 0)
        follow(cuda, caller)
        caller.do("launch", LAUNCHES)
        caller.do("copy_in", COPIES, 97)
        caller.do("allocate", 7, 1009)
        caller.do("busy", 1, STALL_US)
        caller.do("stream", 5)
        stats = cuda.stats()
    assert stats["launches"].tolist() == [LAUNCHES, 0]
    assert stats["copies"].tolist() == [0, COPIES, 0, 0]
    assert stats["allocations"] == 7
    assert sum(stats["waits"][STREAM]["counts"]) == 5
    assert stats["waits"][STREAM]["sum_ns"] >= 5 * STALL_US * 1000
    assert cuda.losses() == {}


def test_each_function_is_counted_as_what_it_is(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("launch", 2)
    caller.do("launch_per_thread", 3)
    caller.do("launch_ex", 5)
    caller.do("graph", 7)
    for count, order in enumerate(("context", "stream", "event"), 2):
        caller.do(order, count)
    for count, order in enumerate(("copy", "copy_in", "copy_out", "copy_within"), 11):
        caller.do(order, count, 10)
        caller.do(f"{order}_async", count * 2, 1)
    stats = cuda.stats()
    assert stats["launches"].tolist() == [2 + 3 + 5, 7], "a launch that the library makes itself is none"
    assert [sum(wait["counts"]) for wait in stats["waits"]] == [2, 3, 4, 11 + 12 + 13 + 14]
    assert stats["copies"].tolist() == [33, 36, 39, 42]
    assert stats["copied_bytes"].tolist() == [132, 144, 156, 168]
    assert len(cuda.records()) == 9 + 50
    assert cuda.losses() == {}


def test_outstanding_bytes_follow_allocations_and_frees(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("allocate", 101, 4099)
    caller.do("allocate_managed", 3, 17)
    caller.do("allocate_async", 5, 1_000_003)
    assert outstanding(cuda) == 101 * 4099 + 3 * 17 + 5 * 1_000_003
    caller.do("free", 4)  # of the five big ones
    caller.do("free_async", 1)
    assert outstanding(cuda) == 101 * 4099 + 3 * 17
    stats = cuda.stats()
    assert (stats["allocations"], stats["frees"]) == (109, 5)
    caller.do("free", 104)
    assert outstanding(cuda) == 0
    assert cuda.losses() == {}


@pytest.mark.parametrize("end", ["exit", "kill", "exec"])
def test_memory_goes_with_its_process(cuda: OneProbe, start: Start, end: str) -> None:
    caller, other = start(), start()
    follow(cuda, caller, other)
    other.do("allocate", 1, 13)
    caller.do("allocate", 23, 4099)
    assert outstanding(cuda) == 23 * 4099
    if end == "kill":
        caller.kill()
    else:
        caller.tell(end, 0)
    wait_for(lambda: outstanding(cuda) == 0, "the memory is taken off")
    if end == "exec":
        assert caller.said() == str(caller.pid)
        caller.kill()
    assert outstanding(cuda, 1) == 13
    assert len(list(cuda.raw.map("allocations").items())) == 24
    follow(cuda, None, other)
    assert len(list(cuda.raw.map("allocations").items())) == 1
    assert cuda.stats()["frees"] == 0


def test_memory_goes_with_its_process_to_another_service(cuda: OneProbe, start: Start) -> None:
    stays, moves = start(), start()
    both = {stays.pid: 0, moves.pid: 0}
    cuda.follow(both)
    cuda_probe(cuda).follow_processes(both)
    stays.do("allocate", 3, 1000)
    moves.do("allocate", 5, 100)
    assert (outstanding(cuda), outstanding(cuda, 1)) == (3500, 0)
    follow(cuda, stays, moves)
    moves.do("allocate", 7, 10)
    assert (outstanding(cuda), outstanding(cuda, 1)) == (3000, 570)
    moves.do("exit", 0)
    wait_for(lambda: outstanding(cuda, 1) == 0, "the memory is given back")
    assert outstanding(cuda) == 3000


def test_what_failed_is_an_error_and_nothing_else(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("allocate", 7, 100)
    caller.do("fail", 1, 2)
    caller.do("copy_in_async", 3, 10)
    caller.do("copy", 2, 10)
    caller.do("allocate", 5, 10)
    caller.do("free", 1)
    caller.do("stream", 11)
    stats = cuda.stats()
    errors = [stats[f"{what}_errors"] for what in ("copy", "allocation", "free", "wait")]
    assert errors == [5, 5, 1, 11]
    assert sum(stats["copies"]) == sum(stats["copied_bytes"]) == 0
    assert (stats["allocations"], stats["frees"]) == (7, 0)
    assert outstanding(cuda) == 700
    assert sum(stats["waits"][STREAM]["counts"]) == 11, "what failed to wait took its time"


def test_a_free_of_what_was_not_seen_to_be_allocated_is_counted_as_unknown(cuda: OneProbe, start: Start) -> None:
    caller = start()
    caller.do("allocate", 3, 100)
    follow(cuda, caller)
    caller.do("free", 3)
    assert cuda.stats()["frees"] == 3
    assert outstanding(cuda) == 0
    assert cuda.losses() == {Count.UNKNOWN_FREES: 3}


def test_threads_of_a_process_are_counted_together(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("threads", 1, 2003)
    stats = cuda.stats()
    assert stats["launches"][0] == stats["copies"][IN] == 5 * 2003
    assert stats["copied_bytes"][IN] == 3 * 5 * 2003
    assert cuda.losses() == {}
    assert not list(cuda.raw.map("cuda_functions").items())


def test_services_are_counted_apart_and_strangers_pay_nothing(
    cuda: OneProbe, start: Start, built: tuple[Path, Path]
) -> None:
    first, second, stranger = start(), start(), start()
    follow(cuda, first, second)
    first.do("launch", 23)
    second.do("launch", 29)
    stranger.do("launch", 1009)
    assert cuda.stats(0)["launches"][0] == 23
    assert cuda.stats(1)["launches"][0] == 29
    assert breakpoints(first.pid, built[0]) > 0
    assert breakpoints(stranger.pid, built[0]) == 0
    follow(cuda, second)
    wait_for(lambda: breakpoints(first.pid, built[0]) == 0, "who is not followed any more is let alone")


def test_a_library_that_is_loaded_later_is_found_at_the_next_round(cuda: OneProbe, built: tuple[Path, Path]) -> None:
    with closing(Caller([str(built[1])])) as caller:
        follow(cuda, caller)
        assert not cuda_probe(cuda).attached
        caller.do(f"open {built[0]}", 0)
        follow(cuda, caller)
        assert cuda_probe(cuda).attached == {caller.pid}
        caller.do("launch", 17)
        assert cuda.stats()["launches"][0] == 17


def test_a_process_that_executes_a_program_is_found_again(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("launch", 3)
    assert caller.do("exec", 0) == str(caller.pid)
    follow(cuda, caller)
    caller.do("launch", 5)
    assert cuda.stats()["launches"][0] == 8


def test_a_forked_child_is_seen_once_it_is_followed(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    child = int(caller.do("fork", 0))
    cuda.follow({caller.pid: 0, child: 0})  # as the fork tracepoint does at once
    caller.do("launch", 7)
    assert cuda.stats()["launches"][0] == 0, "a link is for one process"
    cuda_probe(cuda).follow_processes({caller.pid: 0, child: 0})
    caller.do("launch", 11)
    assert caller.do("exit", 0) == "reaped"
    caller.do("launch", 13)
    assert cuda.stats()["launches"][0] == 11 + 13


def test_a_thread_that_is_killed_in_a_wait_leaves_nothing(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("busy", 1, 10**9)
    caller.tell("stream")
    wait_for(lambda: list(cuda.raw.map("cuda_functions").items()), "it waits")
    caller.kill()
    assert not list(cuda.raw.map("cuda_functions").items())
    assert sum(cuda.stats()["waits"][STREAM]["counts"]) == 0


def test_a_call_that_does_not_return_does_not_hide_later_ones(cuda: OneProbe, start: Start) -> None:
    caller = start()
    follow(cuda, caller)
    caller.do("abandon", 3)
    caller.do("context", 5)
    assert sum(cuda.stats()["waits"][CONTEXT]["counts"]) == 5
    assert cuda.losses() == {Count.CUDA_RETURNS_UNSEEN: 3}


def test_waits_cross_by_perf_buffers_too(able_host: None, start: Start) -> None:
    with attached(CudaProbe(Transport.PERF)) as one:
        caller = start()
        follow(one, caller)
        caller.do("stream", 101)
        assert len(one.records()) == 101
        assert one.losses() == {}


def test_full_tables_are_counted(able_host: None, start: Start) -> None:
    class SmallProbe(CudaProbe):
        def _set_up(self) -> None:
            super()._set_up()
            self._object.map("cuda_functions").max_entries = 1
            self._object.map("allocations").max_entries = 1

    with attached(SmallProbe(Transport.RING)) as one:
        caller = start()
        follow(one, caller)
        caller.do("allocate", 3, 100)
        assert outstanding(one) == 100
        assert one.losses() == {Count.ALLOCATIONS_FULL: 2}
        fill(one.raw, "cuda_functions")
        caller.do("stream", 5)
        assert one.losses() == {Count.ALLOCATIONS_FULL: 2, Count.CUDA_CALLS_FULL: 5}


def test_nothing_is_left_after_200_short_processes(cuda: OneProbe, built: tuple[Path, Path]) -> None:
    slowest = 0.0
    for _ in range(8):
        with ExitStack() as stack:
            callers = [stack.enter_context(closing(Caller([str(built[1])], preload=built[0]))) for _ in range(25)]
            tgids = {caller.pid: 0 for caller in callers}
            cuda.follow(tgids)
            while len(cuda_probe(cuda).attached) != len(callers):
                began = time.monotonic()
                cuda_probe(cuda).follow_processes(tgids)
                slowest = max(slowest, time.monotonic() - began)
            for caller in callers:
                caller.do("launch", 3)
                caller.do("allocate", 1, 100)
        follow(cuda)
        # A process that is started meanwhile has copies of the links until it executes its program.
        wait_for(lambda: user_links() == 0, "all links are closed")
    assert cuda.stats()["launches"][0] == 200 * 3
    assert outstanding(cuda) == 0
    assert slowest < 1.0, "a round takes a tenth of a second, and one process longer"
    assert not any(list(cuda.raw.map(name).items()) for name in ("libraries", "owners", "allocations"))


def test_a_forked_child_of_the_agent_keeps_no_breakpoint(
    cuda: OneProbe, start: Start, built: tuple[Path, Path]
) -> None:
    caller = start()
    follow(cuda, caller)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        follow(cuda)
        wait_for(lambda: breakpoints(caller.pid, built[0]) == 0, "the breakpoints go")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
