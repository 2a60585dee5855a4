"""One scenario for each kind of fault, and its twin without: the cause found, and its size to the nanosecond."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from exporter.critical_path import STEPS_LIMIT, Cause, Step, Window, peer_text, totals, walk
from exporter.timeline import (
    GPU,
    IOWAIT,
    SPAN_GPU_SYNC,
    MessageKind,
    Reason,
    Records,
    Stream,
    Timeline,
    Waker,
)
from tests.simulator import (
    EPOLL_CALL,
    INTERVAL,
    MS,
    SEND_CALL,
    SERVICE_PORT,
    US,
    Block,
    Gil,
    Lock,
    Queue,
    Request,
    RolePlay,
    Run,
    Simulator,
    Sock,
    Steps,
    Thread,
    as_records,
    disk,
    iter_hog,
    nothing,
    poll,
    receive,
    reclaim,
    sleep,
    stalled_send,
    work,
)

CLIENT = "192.0.2.7:50000"


def explain(sim: Simulator, request: Request) -> list[Step]:
    window = request.window()
    steps = walk(sim.timeline().view(window.begin_ns, window.end_ns), window)
    assert steps[0].begin_ns == window.begin_ns
    assert steps[-1].end_ns == window.end_ns
    assert all(before.end_ns == after.begin_ns for before, after in pairwise(steps))
    return steps


def causes(steps: list[Step]) -> dict[Cause, int]:
    return {cause: ns for cause, ns in totals(steps).items() if ns}


def role_play(
    fault: Callable[[Simulator, RolePlay], None] | None = None, **options: dict[str, Any]
) -> tuple[list[Step], RolePlay]:
    """One request of a service, on CPUs enough unless the fault takes them."""
    sim = Simulator(cpus=4)
    service = RolePlay(sim, **options)
    start_ns = sim.now
    if fault:
        fault(sim, service)
    request = service.request(1, start_ns + 50 * MS)
    sim.run_until(start_ns + 2_000 * MS)
    return explain(sim, request), service


def assert_charged(steps: list[Step], quiet: list[Step], cause: Cause, least_ns: int) -> None:
    """The fault made the request slower by so much, and all of that is charged to the one cause."""
    found, before = totals(steps), totals(quiet)
    slower_ns = sum(found.values()) - sum(before.values())
    assert slower_ns >= least_ns
    assert found[cause] - before[cause] == pytest.approx(slower_ns, abs=50 * US)
    assert max(found, key=lambda each: found[each] - before[each]) is cause
    assert found[Cause.unexplained] == 0


def test_a_quiet_request_was_on_the_cpu_from_end_to_end() -> None:
    steps, service = role_play()
    assert [(step.tid, step.cause) for step in steps] == [
        (service.loop.tid, Cause.on_cpu),
        (service.engine.tid, Cause.on_cpu),
        (service.loop.tid, Cause.on_cpu),
    ]
    assert steps[1].end_ns - steps[1].begin_ns == pytest.approx(3 * service.step_ns, abs=100 * US)


def test_a_hog_on_the_engine_s_cpu_is_run_queue() -> None:
    cpu = frozenset({3})

    def fault(sim: Simulator, _: RolePlay) -> None:
        sim.thread("hog", lambda me: iter_hog(), target=False, cpus=cpu)

    pinned = {"loop": {"cpus": frozenset({0, 1})}, "engine": {"cpus": cpu}}
    steps, _ = role_play(fault, **pinned)
    assert_charged(steps, role_play(None, **pinned)[0], Cause.run_queue, 12 * MS)


def test_a_throttled_cgroup_is_cpu_quota() -> None:
    def fault(sim: Simulator, _: RolePlay) -> None:
        sim.after(60 * MS, lambda: sim.throttle("engine", 40 * MS))

    grouped = {"engine": {"group": "engine"}}
    steps, _ = role_play(fault, **grouped)
    quiet, _ = role_play(None, **grouped)
    assert_charged(steps, quiet, Cause.cpu_quota, 40 * MS)
    assert totals(steps)[Cause.cpu_quota] == 40 * MS


def test_a_thread_that_wakes_while_throttled_waits_for_its_quota() -> None:
    def fault(sim: Simulator, _: RolePlay) -> None:
        sim.after(45 * MS, lambda: sim.throttle("loop", 20 * MS))

    steps, _ = role_play(fault, loop={"group": "loop"})
    assert totals(steps)[Cause.cpu_quota] == 15 * MS


@pytest.mark.parametrize("who", ["engine", "loop"])
def test_a_lock_that_a_background_thread_holds_is_lock_and_names_it(who: str) -> None:
    holder: list[Thread] = []

    def fault(sim: Simulator, service: RolePlay) -> None:
        lock = Lock(sim)

        def background(me: Thread) -> Steps:
            while True:
                yield from sleep(5 * MS)
                yield from lock.acquire(me)
                yield from sleep(80 * MS)  # holding it
                lock.release(me)

        def take(me: Thread, *_: object) -> Steps:
            yield from lock.acquire(me)
            yield Run(10 * US)
            lock.release(me)

        holder.append(sim.thread("background", background))
        if who == "engine":
            service.engine_hook = take
        else:
            service.read_hook = take

    steps, _ = role_play(fault)
    assert_charged(steps, role_play()[0], Cause.lock, 30 * MS)
    assert {step.detail for step in steps if step.cause is Cause.lock} == {str(holder[0].tid)}


@pytest.mark.parametrize("others", [0, 1])
def test_a_thread_that_hogs_the_gil_is_lock_and_is_named(others: int) -> None:
    """Timed waits of 5 ms each: those that time out are the same wait. With another waiter in between, too."""
    hog: list[Thread] = []

    def fault(sim: Simulator, service: RolePlay) -> None:
        gil = Gil(sim)
        gil.CHECK_NS = 12 * MS  # type: ignore[misc]

        def hogging(me: Thread) -> Steps:
            yield from gil.acquire(me)
            while True:
                yield from gil.compute(me, 1_000 * MS)

        def other(me: Thread) -> Steps:
            while True:
                yield from sleep(3 * MS)
                yield from gil.acquire(me)
                yield Run(100 * US)
                gil.release(me)

        def take(me: Thread, *_: object) -> Steps:
            yield from gil.acquire(me)
            yield Run(1 * MS)
            gil.release(me)

        hog.append(sim.thread("hog", hogging, tgid=2000))
        for _ in range(others):
            sim.thread("other", other, tgid=2000)
        service.engine_hook = take

    steps, _ = role_play(fault)
    found = totals(steps)
    quiet = totals(role_play()[0])
    # The hook's own work is 1 ms in each of the three steps.
    slower_ns = sum(found.values()) - sum(quiet.values()) - 3 * MS
    assert slower_ns > 10 * MS
    assert found[Cause.lock] == pytest.approx(slower_ns, abs=10 * US)
    assert found[Cause.sleep] == found[Cause.unexplained] == 0
    held = {}
    for step in steps:
        if step.cause is Cause.lock:
            held[step.detail] = held.get(step.detail, 0) + step.end_ns - step.begin_ns
    assert max(held, key=lambda tid: held[tid]) == str(hog[0].tid)


def gil_both_ways() -> tuple[Simulator, Request, Thread]:
    """A background thread waits for the GIL that the engine holds, and gets it from there; it also has a lock."""
    sim = Simulator(cpus=4)
    gil, lock = Gil(sim), Lock(sim)

    def background(me: Thread) -> Steps:
        yield from lock.acquire(me)
        while True:
            yield from gil.acquire(me)
            yield from gil.compute(me, 30 * MS)
            gil.release(me)
            yield from sleep(40 * MS)
            lock.release(me)
            yield from lock.acquire(me)

    def computing(me: Thread, *_: object) -> Steps:
        yield from gil.acquire(me)
        yield from gil.compute(me, 12 * MS)
        gil.release(me)
        yield from lock.acquire(me)
        lock.release(me)

    holder = sim.thread("background", background, tgid=2000)
    service = RolePlay(sim)
    service.engine_hook = computing
    request = service.request(1, sim.now + 11 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    return sim, request, holder


def test_the_gil_s_hog_is_not_followed_for_having_been_woken_by_us() -> None:
    sim, request, _ = gil_both_ways()
    found = totals(explain(sim, request))
    assert found[Cause.sleep] == found[Cause.unexplained] == 0
    assert found[Cause.lock] > 60 * MS


def test_a_loss_does_not_make_the_gil_a_hand_over() -> None:
    sim, request, holder = gil_both_ways()
    rows = [row for row in sim.intervals if row["tid"] == holder.tid]
    dropped = 0
    for lost, row in pairwise(rows):
        if row["reason"] == Reason.FUTEX and row["waker"] == Waker.TASK:
            dropped += 1
            sim.intervals.remove(lost)
            assert Cause.sleep not in causes(explain(sim, request))
            sim.intervals.append(lost)
    assert dropped > 5


@pytest.mark.parametrize(
    ("made", "cause", "size_ns"),
    [
        (lambda me: disk(30 * MS), Cause.disk, 30 * MS),
        (lambda me: reclaim(me, 5 * MS, 20 * MS), Cause.memory, 30 * MS + 700),
        (lambda me: reclaim(me, 5 * MS, 20 * MS, SPAN_GPU_SYNC), Cause.gpu, 30 * MS + 700),
        (lambda me: reclaim(me, 15 * MS, 0, SPAN_GPU_SYNC), Cause.gpu, 30 * MS),
        (lambda me: sleep(25 * MS), Cause.sleep, 25 * MS),
    ],
)
@pytest.mark.parametrize("hook", ["engine_hook", "read_hook", "write_hook"])
def test_what_a_thread_does_to_itself(made: Callable[[Thread], Steps], cause: Cause, size_ns: int, hook: str) -> None:
    def fault(_: Simulator, service: RolePlay) -> None:
        setattr(service, hook, lambda me, number: made(me) if hook != "engine_hook" or number == 1 else nothing())

    steps, _ = role_play(fault)
    assert_charged(steps, role_play()[0], cause, size_ns)
    assert totals(steps)[cause] == size_ns


@pytest.mark.parametrize(
    ("block", "cause"),
    [
        (Block(Reason.PAGE_FAULT, timeout_ns=9 * MS, timer_waker=Waker.SOFTIRQ, flags=IOWAIT), Cause.disk),
        (Block(Reason.OTHER, timeout_ns=9 * MS, timer_waker=Waker.SOFTIRQ, flags=IOWAIT), Cause.disk),
        (Block(Reason.DISK, timeout_ns=9 * MS, timer_waker=Waker.SOFTIRQ), Cause.disk),
        (Block(Reason.DEVICE, object=195 << 20, timeout_ns=9 * MS, flags=GPU), Cause.gpu),
        (Block(Reason.DEVICE, object=195 << 20, timeout_ns=9 * MS, flags=GPU, timer_waker=Waker.TASK), Cause.gpu),
        (Block(Reason.DEVICE, object=195 << 20, timeout_ns=9 * MS), Cause.unexplained),
        (Block(Reason.DEVICE, object=195 << 20, timeout_ns=9 * MS, flags=IOWAIT), Cause.disk),
        (Block(Reason.DEVICE, object=5 << 20, timeout_ns=9 * MS), Cause.unexplained),
        (Block(Reason.OTHER, timeout_ns=9 * MS), Cause.unexplained),
        (Block(Reason.PAGE_FAULT, timeout_ns=9 * MS), Cause.unexplained),
        (Block(Reason.FUTEX, 64, timeout_ns=9 * MS), Cause.sleep),
        (Block(Reason.PIPE, 64, timeout_ns=9 * MS), Cause.sleep),
        (Block(Reason.SOCKET, 64, SEND_CALL, 9 * MS, Waker.SOFTIRQ), Cause.network),
        (Block(Reason.SOCKET, 64, SEND_CALL, 9 * MS, Waker.NONE), Cause.unexplained),
    ],
)
def test_each_kind_of_sleep(block: Block, cause: Cause) -> None:
    def fault(_: Simulator, service: RolePlay) -> None:
        def write(me: Thread, request: Request) -> Steps:
            yield block

        service.write_hook = write

    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    fault(sim, service)
    request = service.request(1, sim.now + 5 * MS)
    sim.run_until(sim.now + 500 * MS)
    window = request.window()
    steps = walk(sim.timeline().view(window.begin_ns, window.end_ns), window)
    assert totals(steps)[cause] == 9 * MS


def test_a_page_fault_that_another_thread_ended_is_a_lock_in_the_kernel() -> None:
    holder: list[Thread] = []

    def fault(sim: Simulator, service: RolePlay) -> None:
        def mapping(me: Thread) -> Steps:
            yield Run(90 * MS)
            sim.wake(service.engine, Waker.TASK, me)

        holder.append(sim.thread("mapping", mapping, tgid=2000))

        def faulting(me: Thread, step: int) -> Steps:
            if step == 1:
                yield Block(Reason.PAGE_FAULT)

        service.engine_hook = faulting

    steps, _ = role_play(fault)
    assert_charged(steps, role_play()[0], Cause.lock, 20 * MS)
    assert {step.detail for step in steps if step.cause is Cause.lock} == {str(holder[0].tid)}


def test_a_stopped_engine_is_stopped() -> None:
    def fault(sim: Simulator, service: RolePlay) -> None:
        sim.after(65 * MS, lambda: sim.stop(service.engine, 120 * MS))

    steps, _ = role_play(fault)
    assert_charged(steps, role_play()[0], Cause.stopped, 120 * MS)
    assert totals(steps)[Cause.stopped] == 120 * MS


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("busy", [True, False])
def test_a_slow_upstream_is_upstream_with_its_address(blocking: bool, busy: bool) -> None:
    """The loop asks another server before it answers; by a blocking call, by epoll, or busy when the answer comes."""
    sim = Simulator(cpus=4)
    upstream = Sock(sim, inside=False, local_port=41_000, peer_port=6379, peer=bytes((198, 51, 100, 9)))
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def loop(me: Thread) -> Steps:
        (ready,) = yield from poll(me, [client])
        ready.take(me)
        yield Run(1 * MS)
        upstream.ask(me, 70 * MS)
        if busy:
            yield Run(90 * MS)
        if blocking:
            yield from receive(me, upstream)
        else:
            (ready,) = yield from poll(me, [upstream])
            yield Run(20 * US)
            ready.take(me)
        yield Run(2 * MS)
        request.write(me)

    sim.thread("loop", loop)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.run_until(sim.now + 500 * MS)
    steps = explain(sim, request)
    found = causes(steps)
    # The bytes' arrival is not seen where nobody slept for them: then it is when they were received.
    assert found[Cause.upstream] == (pytest.approx(90 * MS, abs=100 * US) if busy else 70 * MS)
    assert set(found) == {Cause.upstream, Cause.on_cpu}
    assert {step.detail for step in steps if step.cause is Cause.upstream} == {"198.51.100.9:6379"}


def test_a_local_server_that_is_not_watched_is_upstream() -> None:
    sim = Simulator(cpus=4)
    upstream = Sock(sim, inside=False, local_port=41_000, peer_port=6379, peer=bytes((127, 0, 0, 1)))
    asked = Sock(sim, client=True)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def server(me: Thread) -> Steps:
        yield from receive(me, asked)
        yield Run(40 * MS)
        upstream.send(me, b"answer")

    def loop(me: Thread) -> Steps:
        yield from poll(me, [client])
        client.take(me)
        yield Run(1 * MS)
        sim.message(MessageKind.SENT, upstream, me, 100)
        asked.send(me, b"question")
        yield from receive(me, upstream)
        request.write(me)

    sim.thread("server", server, tgid=77, target=False)
    sim.thread("loop", loop)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.run_until(sim.now + 500 * MS)
    assert totals(explain(sim, request))[Cause.upstream] == pytest.approx(40 * MS, abs=10 * US)


def test_an_event_loop_s_own_timer_is_sleep_although_it_served_others_meanwhile() -> None:
    sim = Simulator(cpus=4)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    other = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def loop(me: Thread) -> Steps:
        yield from poll(me, [client])
        client.take(me)
        until_ns = sim.now + 100 * MS
        while sim.now < until_ns:
            for sock in (yield from poll(me, [other], until_ns - sim.now)):
                sock.take(me)
                yield Run(3 * MS)
        yield Run(1 * MS)
        request.write(me)

    sim.thread("loop", loop)
    sim.after(10 * MS, lambda: request.arrive(client))
    for number in range(4):
        sim.after((31 + 17 * number) * MS, lambda: other.deliver(b"GET"))
    sim.run_until(sim.now + 500 * MS)
    found = causes(explain(sim, request))
    assert set(found) == {Cause.sleep, Cause.on_cpu}
    assert found[Cause.sleep] == pytest.approx(88 * MS, abs=10 * US)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_body_that_is_still_coming_is_network(blocking: bool) -> None:
    sim = Simulator(cpus=4)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def server(me: Thread) -> Steps:
        for _ in range(2):
            if blocking:
                yield from receive(me, client)
            else:
                yield from poll(me, [client])
                client.take(me)
            yield Run(1 * MS)
        request.write(me)

    sim.thread("server", server)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.after(60 * MS, lambda: client.deliver(b"the rest"))
    sim.run_until(sim.now + 500 * MS)
    steps = explain(sim, request)
    assert causes(steps) == {Cause.on_cpu: 2 * MS + 1_400, Cause.network: 49 * MS - 700}
    assert [step.detail for step in steps if step.cause is Cause.network] == [CLIENT]


def test_a_loop_that_another_client_wakes_much_later_was_not_waiting_for_the_network() -> None:
    """What the loop did in between was not this request's: what it waited for cannot be told."""
    sim = Simulator(cpus=4)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    other = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def loop(me: Thread) -> Steps:
        yield from poll(me, [client])
        client.take(me)
        yield Run(1 * MS)
        for _ in range(3):
            yield from poll(me, [other])
            other.take(me)
            yield Run(1 * MS)
        request.write(me)

    sim.thread("loop", loop)
    sim.after(10 * MS, lambda: request.arrive(client))
    for number in range(3):
        sim.after((30 + 20 * number) * MS, lambda: other.deliver(b"GET"))
    sim.run_until(sim.now + 500 * MS)
    assert causes(explain(sim, request))[Cause.unexplained] == pytest.approx(38 * MS, abs=5 * US)


def test_no_room_towards_the_client_is_network() -> None:
    def fault(sim: Simulator, service: RolePlay) -> None:
        client = Sock(
            sim, inside=False, client=True, local_port=SERVICE_PORT, peer=bytes((192, 0, 2, 7)), peer_port=50_000
        )

        def write(me: Thread, _: Request) -> Steps:
            yield from stalled_send(me, client, 60 * MS)

        service.write_hook = write

    steps, _ = role_play(fault)
    assert_charged(steps, role_play()[0], Cause.network, 60 * MS)
    assert [step.detail for step in steps if step.cause is Cause.network] == [CLIENT]


def test_messages_that_came_while_there_was_no_room_are_not_what_the_token_waited_for() -> None:
    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT, peer=bytes((192, 0, 2, 7)), peer_port=50_000)

    def write(me: Thread, request: Request) -> Steps:
        if request.number == 1:
            yield from stalled_send(me, client, 60 * MS)
            assert service.to_loop.take(me)
            yield Run(1 * MS)

    service.write_hook = write
    service.request(2, sim.now + 40 * MS, steps=40)
    request = service.request(1, sim.now + 50 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    found = totals(explain(sim, request))
    assert found[Cause.network] == 60 * MS + 1 * US
    assert found[Cause.unexplained] == 0


def test_no_room_for_another_client_is_not_this_request_s_network() -> None:
    def fault(sim: Simulator, service: RolePlay) -> None:
        other = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT, peer=bytes((192, 0, 2, 8)), peer_port=1)

        def write(me: Thread, _: Request) -> Steps:
            yield from stalled_send(me, other, 60 * MS)

        service.write_hook = write

    assert Cause.network not in causes(role_play(fault)[0])


def test_a_loop_that_another_request_blocks_is_on_cpu_with_its_thread() -> None:
    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    service.read_hook = lambda me, request: work(80 * MS) if request.number == 2 else nothing()
    service.request(2, sim.now + 40 * MS)
    request = service.request(1, sim.now + 50 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    steps = explain(sim, request)
    assert totals(steps)[Cause.unexplained] == 0
    first = steps[0]
    assert (first.tid, first.cause, first.detail) == (service.loop.tid, Cause.on_cpu, str(service.loop.tid))
    assert sum(s.end_ns - s.begin_ns for s in steps if s.tid == service.loop.tid) > 70 * MS


def test_a_loop_that_sleeps_in_a_lock_before_the_read_is_lock() -> None:
    sim = Simulator(cpus=4)
    lock = Lock(sim)

    def background(me: Thread) -> Steps:
        yield from lock.acquire(me)
        yield from sleep(100 * MS)
        lock.release(me)

    def read(me: Thread, request: Request) -> Steps:
        if request.number == 2:
            yield from lock.acquire(me)

    sim.thread("background", background)
    service = RolePlay(sim)
    service.read_hook = read
    service.request(2, sim.now + 20 * MS)
    request = service.request(1, sim.now + 50 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    steps = explain(sim, request)
    assert steps[0].cause is Cause.lock
    assert steps[0].end_ns - steps[0].begin_ns == pytest.approx(50 * MS, abs=5 * US)


def test_an_engine_that_never_sleeps_is_left_by_this_request_s_own_submission() -> None:
    """Other requests' submissions lie in between; a disk read of the engine lies before them, one before its own."""
    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    start_ns = sim.now

    def hook(me: Thread, step: int) -> Steps:
        if step in {2, 8}:
            yield from disk(20 * MS)

    service.engine_hook = hook
    for number in range(2, 30):
        service.request(number, start_ns + number * 7 * MS + number * 1_000, steps=4)
    request = service.request(1, start_ns + 80 * MS, steps=12)
    sim.run_until(start_ns + 2_000 * MS)
    steps = explain(sim, request)
    found = totals(steps)
    assert found[Cause.unexplained] == 0
    assert found[Cause.disk] == 20 * MS
    # The path leaves the engine once, for the request's own read.
    assert [step.tid for step in steps if step.end_ns <= request.submitted_ns] == [service.loop.tid] * sum(
        step.end_ns <= request.submitted_ns for step in steps
    )
    assert next(step.tid for step in steps if step.begin_ns >= request.submitted_ns) == service.engine.tid
    on_loop = sum(s.end_ns - s.begin_ns for s in steps if s.tid == service.loop.tid)
    assert on_loop < 2 * MS


def test_a_token_that_reaches_a_busy_loop_is_followed_to_the_engine() -> None:
    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    service.read_hook = lambda me, request: work(30 * MS) if request.number == 2 else nothing()
    service.engine_hook = lambda me, step: disk(15 * MS) if step == 1 else nothing()
    request = service.request(1, sim.now + 50 * MS)
    service.request(2, sim.now + 88 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    steps = explain(sim, request)
    assert totals(steps)[Cause.disk] == 15 * MS
    assert totals(steps)[Cause.unexplained] == 0
    last = steps[-1]
    assert (last.tid, last.cause, last.begin_ns) == (service.loop.tid, Cause.on_cpu, request.done_ns)


def test_a_lock_on_its_way_does_not_take_an_engine_from_the_request() -> None:
    """It waits once for a lock, after it has sent tokens of others; the loop is busy when its message comes."""
    sim = Simulator(cpus=4)
    service = RolePlay(sim)
    lock = Lock(sim)

    def background(me: Thread) -> Steps:
        yield from lock.acquire(me)
        yield from sleep(100 * MS)
        lock.release(me)

    def take(me: Thread, step: int) -> Steps:
        if step == 2:
            yield from lock.acquire(me)

    sim.thread("background", background, tgid=2000)
    service.engine_hook = take
    service.read_hook = lambda me, request: work(30 * MS) if request.number == 2 else nothing()
    request = service.request(1, sim.now + 50 * MS)
    service.request(2, sim.now + 98 * MS)
    sim.run_until(sim.now + 1_000 * MS)
    steps = explain(sim, request)
    waited_ns = 100 * MS - (50 * MS + 200 * US + 20 * US + 20 * MS)
    assert totals(steps)[Cause.lock] == pytest.approx(waited_ns, abs=50 * US)
    assert steps[-1].begin_ns == request.done_ns


@pytest.mark.parametrize("rivals", [0, 1])
def test_a_worker_pool_hands_over_by_futex(rivals: int) -> None:
    """The reader gives the job to a worker and waits for its answer; the worker reads from disk and needs a lock."""
    sim = Simulator(cpus=4)
    jobs, answer, lock = Queue(sim), Queue(sim), Lock(sim)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def worker(me: Thread) -> Steps:
        while True:
            reply = yield from jobs.get(me)
            yield Run(2 * MS)
            yield from lock.acquire(me)
            yield Run(1 * MS)
            lock.release(me)
            yield from disk(40 * MS)
            reply.put(me, "done")

    def rival(me: Thread) -> Steps:
        while True:
            yield from lock.acquire(me)
            yield from sleep(25 * MS)
            lock.release(me)
            yield from sleep(1 * MS)

    def reader(me: Thread) -> Steps:
        yield from receive(me, client)
        yield Run(1 * MS)
        jobs.put(me, answer)
        yield from answer.get(me)
        yield Run(1 * MS)
        request.write(me)

    sim.thread("worker", worker)
    for _ in range(rivals):
        sim.thread("rival", rival)
    sim.thread("reader", reader)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.run_until(sim.now + 500 * MS)
    found = causes(explain(sim, request))
    assert found[Cause.disk] == 40 * MS
    assert set(found) == {Cause.disk, Cause.on_cpu} | ({Cause.lock} if rivals else set())


@pytest.mark.parametrize("worked_before", [True, False])
def test_a_worker_that_serves_another_request_and_holds_the_lock_is_its_holder(worked_before: bool) -> None:
    sim = Simulator(cpus=4)
    jobs, answer, lock = Queue(sim), Queue(sim), Lock(sim)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def worker(me: Thread) -> Steps:
        while True:
            job = yield from jobs.get(me)
            yield Run(1 * MS)
            if isinstance(job, Queue):
                job.put(me, "done")
                continue
            yield from lock.acquire(me)
            yield from disk(60 * MS)
            lock.release(me)

    def another(me: Thread) -> Steps:
        yield from sleep(20 * MS)
        jobs.put(me, "job")

    def reader(me: Thread) -> Steps:
        yield from receive(me, client)
        if worked_before:
            jobs.put(me, answer)
            yield from answer.get(me)
        yield Run(15 * MS)
        yield from lock.acquire(me)
        request.write(me)

    holder = sim.thread("worker", worker)
    sim.thread("another", another)
    sim.thread("reader", reader)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.run_until(sim.now + 500 * MS)
    steps = explain(sim, request)
    assert [(s.detail, s.woken_by) for s in steps if s.cause is Cause.lock] == [(str(holder.tid), holder.tid)]
    assert Cause.disk not in causes(steps)


def test_a_thread_per_request_is_followed_to_its_parent() -> None:
    sim = Simulator(cpus=1)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    listener = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def serve(me: Thread) -> Steps:
        yield from receive(me, client)
        yield from disk(30 * MS)
        request.write(me)

    def acceptor(me: Thread) -> Steps:
        yield from receive(me, listener)
        yield Run(2 * MS)
        sim.thread("serve", serve, parent=me)
        yield Run(3 * MS)
        yield from receive(me, listener)

    parent = sim.thread("acceptor", acceptor)
    sim.after(10 * MS, lambda: (listener.deliver(b""), request.arrive(client)))
    sim.run_until(sim.now + 500 * MS)
    steps = explain(sim, request)
    assert [(s.tid == parent.tid, s.cause) for s in steps][:2] == [(True, Cause.on_cpu), (False, Cause.run_queue)]
    assert steps[1].woken_by == parent.tid
    assert causes(steps)[Cause.run_queue] == 3 * MS
    assert causes(steps)[Cause.disk] == 30 * MS
    assert Cause.unexplained not in causes(steps)


def test_a_worker_that_reads_what_an_acceptor_handed_over_was_no_lock() -> None:
    sim = Simulator(cpus=2)
    jobs = Queue(sim)
    client = Sock(sim, inside=False, client=True, local_port=SERVICE_PORT)
    request = Request(1)

    def acceptor(me: Thread) -> Steps:
        while True:
            yield from poll(me, [client])
            yield Run(15 * MS)
            jobs.put(me, client)
            yield from sleep(500 * MS)

    def worker(me: Thread) -> Steps:
        sock = yield from jobs.get(me)
        sock.take(me)
        yield Run(1 * MS)
        request.write(me)

    sim.thread("acceptor", acceptor)
    sim.thread("worker", worker)
    sim.after(10 * MS, lambda: request.arrive(client))
    sim.run_until(sim.now + 300 * MS)
    found = causes(explain(sim, request))
    assert set(found) == {Cause.on_cpu}


# ---- what is missing ----


def simple() -> tuple[Records, Window]:
    """A thread that reads, sleeps on disk in the middle, and writes: four intervals."""
    rows = [
        {"off_ns": 50, "on_ns": 60, "sequence": 1, "reason": int(Reason.CPU)},
        {"off_ns": 200, "wake_ns": 290, "on_ns": 300, "sequence": 2, "reason": int(Reason.DISK), "waker": 4},
        {"off_ns": 400, "wake_ns": 450, "on_ns": 460, "sequence": 3, "reason": int(Reason.TIMER), "waker": 5},
        {"off_ns": 900, "on_ns": 910, "sequence": 4, "reason": int(Reason.CPU)},
    ]
    for row in rows:
        row |= {"tid": 7, "tgid": 7}
    records = as_records(rows, INTERVAL)
    return records, Window(100, 500, 7, 100, 100, 7)


def walk_records(records: Records, window: Window, lose: tuple[int, int, Stream] | None = None) -> dict[Cause, int]:
    timeline = Timeline(1 << 20)
    timeline.add_intervals(records)
    if lose:
        timeline.note_loss(*lose)
    return causes(walk(timeline.view(window.begin_ns, window.end_ns), window))


def test_nothing_is_missing() -> None:
    assert walk_records(*simple()) == {
        Cause.on_cpu: 240, Cause.disk: 90, Cause.sleep: 50, Cause.run_queue: 20
    }  # fmt: skip


def test_a_hole_in_the_sequence_is_unexplained() -> None:
    records, window = simple()
    assert walk_records(np.delete(records, 1), window) == {
        Cause.on_cpu: 40, Cause.sleep: 50, Cause.run_queue: 10, Cause.unexplained: 300
    }  # fmt: skip


def test_a_loss_after_the_last_interval_is_unexplained() -> None:
    records, window = simple()
    lost = walk_records(records[:2], window, (350, 420, Stream.intervals))
    assert lost == {Cause.on_cpu: 180, Cause.disk: 90, Cause.run_queue: 10, Cause.unexplained: 120}
    assert Cause.unexplained not in walk_records(records[:2], window, (600, 700, Stream.intervals))


@pytest.mark.parametrize("stream", [Stream.messages, Stream.spans])
def test_while_messages_or_spans_may_be_missing_nothing_is_explained(stream: Stream) -> None:
    records, window = simple()
    assert walk_records(records, window, (210, 310, stream))[Cause.unexplained] == 100


def test_a_thread_without_records_is_unexplained() -> None:
    records, window = simple()
    assert walk_records(records[:0], window) == {Cause.unexplained: 400}


def test_what_a_thread_did_before_it_was_known_is_unexplained() -> None:
    records, window = simple()
    found = walk_records(records[1:], window)
    assert found[Cause.unexplained] == 100
    assert found[Cause.disk] == 90


def test_another_thread_with_the_same_number_is_not_gone_on_with() -> None:
    records, window = simple()
    records["sequence"][2:] = (1, 2)
    assert walk_records(records, window) == {
        Cause.on_cpu: 40, Cause.sleep: 50, Cause.run_queue: 10, Cause.unexplained: 300
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [("reason", 99), ("waker", 99), ("wake_ns", 0), ("waker", int(Waker.PARENT))]
)
def test_an_interval_that_cannot_be_understood_is_unexplained(field: str, value: int) -> None:
    records, window = simple()
    records["reason"][1] = int(Reason.POLL)
    records["waker"][1] = int(Waker.SOFTIRQ)
    records[field][1] = value
    found = walk_records(records, window)
    assert found[Cause.unexplained] >= 90
    assert Cause.disk not in found


@pytest.mark.parametrize(("field", "value"), [("off_ns", 310), ("wake_ns", 199), ("wake_ns", 301), ("on_ns", 189)])
def test_an_interval_with_impossible_times_is_a_hole(field: str, value: int) -> None:
    records, window = simple()
    records[field][1] = value
    assert walk_records(records, window)[Cause.unexplained] == 300


def test_a_waker_without_records_costs_its_own_stretch_only() -> None:
    records, window = simple()
    records["reason"][1], records["waker"][1], records["waker_tid"][1] = Reason.PIPE, Waker.TASK, 999
    records["flags"][1] = 32
    assert walk_records(records, window) == {
        Cause.on_cpu: 240, Cause.sleep: 50, Cause.run_queue: 20, Cause.unexplained: 90
    }  # fmt: skip


def test_a_wake_up_after_the_instant_is_never_followed() -> None:
    """The writer was asleep when it wrote, if its records are right: clocks of two CPUs, or a wrong window."""
    records, _ = simple()
    window = Window(100, 250, 7, 100, 100, 7)
    assert walk_records(records, window) == {Cause.on_cpu: 100, Cause.unexplained: 50}


def test_an_interval_without_length_does_not_stop_the_walk() -> None:
    records, window = simple()
    records["off_ns"][1] = records["wake_ns"][1] = records["on_ns"][1] = 300
    records["reason"][1] = Reason.CPU
    assert walk_records(records, window) == {Cause.on_cpu: 340, Cause.sleep: 50, Cause.run_queue: 10}


def test_an_empty_window_has_no_steps() -> None:
    records, _ = simple()
    assert walk_records(records, Window(500, 500, 7, 100)) == {}
    assert walk_records(records, Window(600, 500, 7, 100)) == {}


def test_a_path_of_too_many_steps_ends_unexplained() -> None:
    size = 6_007
    records = np.zeros(size, INTERVAL)
    records["off_ns"] = np.arange(size) * 100 + 1_000
    records["on_ns"] = records["off_ns"] + 50
    records["sequence"] = np.arange(size) + 1
    records["tid"] = 7
    end_ns = 1_000 + 100 * size
    found = walk_records(records, Window(1_000, end_ns, 7, 1_000))
    assert sum(found.values()) == end_ns - 1_000
    assert found[Cause.unexplained] == end_ns - 1_000 - found[Cause.on_cpu] - found[Cause.run_queue]
    assert found[Cause.on_cpu] + found[Cause.run_queue] > 50 * (STEPS_LIMIT - 2)


def test_a_wait_for_the_poller_s_interrupt_needs_no_syscall() -> None:
    assert EPOLL_CALL != SEND_CALL  # the table of sending calls is this machine's
    records, window = simple()
    records["reason"][1], records["waker"][1] = Reason.POLL, Waker.HARDIRQ
    assert walk_records(records, window)[Cause.sleep] == 140


@pytest.mark.parametrize(
    ("peer", "port", "family", "text"),
    [
        (b"", 0, 0, ""),
        (bytes((127, 0, 0, 1)) + bytes(12), 80, 2, "127.0.0.1:80"),
        (bytes((127, 0, 0, 1)) + bytes(12), 80, 0, "127.0.0.1:80"),
        (bytes(15) + b"\x01", 80, 10, "[::1]:80"),
        (bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 1)), 80, 10, "10.0.0.1:80"),
    ],
)
def test_an_address_as_text(peer: bytes, port: int, family: int, text: str) -> None:
    assert peer_text(peer, port, family) == text
