"""Threads that wait for one thing each, for tests/kernel/test_scheduler*.py: `python waits.py NAME [ARGUMENT...]`.

Says `ready`, waits for a line, does what NAME says, says one line of JSON about it, and ends when its input does. Every
scenario says `tid`, `begin_ns` and `end_ns` of the thread that waited: the wait in question is the longest in between.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import pty
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

WAIT_S = 0.05
"""How long a wait lasts at least that a timer ends."""
PAGE = 4096

Facts = dict[str, object]


def until_asleep(tid: int) -> None:
    """Wait until a thread of this process sits in one and the same system call five times in a row."""
    place = Path(f"/proc/self/task/{tid}/syscall")
    before, seen = "", 0
    deadline = time.monotonic() + 10
    while seen < 5:
        assert time.monotonic() < deadline, "the thread does not wait"
        time.sleep(0.004)
        now = place.read_text()
        seen = seen + 1 if now == before and now != "running\n" else 0
        before = now


def watched(wait: Callable[[], object], wake: Callable[[], object] | None = None) -> Facts:
    """Let a thread `wait`; once it sleeps, `wake` it from this one."""
    facts: Facts = {"waker": threading.get_native_id()}
    started = threading.Event()

    def work() -> None:
        facts["tid"] = threading.get_native_id()
        started.set()
        facts["begin_ns"] = time.monotonic_ns()
        wait()
        facts["end_ns"] = time.monotonic_ns()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    if wake is not None:
        until_asleep(int(str(facts["tid"])))
        facts["woke_ns"] = time.monotonic_ns()
        wake()
    thread.join()
    return facts


def tcp_pair(family: int, host: str) -> tuple[socket.socket, socket.socket]:
    """A connection of this process with itself: who connected, who accepted."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname()[:2])
        server, _ = listener.accept()
        return client, server


# ---- what a thread waits for ----


def lock() -> Facts:
    held = threading.Lock()
    held.acquire()
    return watched(held.acquire, held.release)


def lock_timeout() -> Facts:
    held = threading.Lock()
    held.acquire()
    return watched(lambda: held.acquire(timeout=WAIT_S))


def epoll_timeout() -> Facts:
    poller = select.epoll()
    return watched(lambda: poller.poll(WAIT_S))


def poll_forever() -> Facts:
    """No timeout, ended by a pipe."""
    read_end, write_end = os.pipe()
    poller = select.poll()
    poller.register(read_end, select.POLLIN)
    return watched(poller.poll, lambda: os.write(write_end, b"x"))


def select_timeout() -> Facts:
    read_end, _ = os.pipe()
    return watched(lambda: select.select([read_end], [], [], WAIT_S))


def pipe() -> Facts:
    read_end, write_end = os.pipe()
    return watched(lambda: os.read(read_end, 1), lambda: os.write(write_end, b"x"))


def eventfd() -> Facts:
    event = os.eventfd(0)
    return watched(lambda: os.eventfd_read(event), lambda: os.eventfd_write(event, 1))


def unix() -> Facts:
    here, there = socket.socketpair()
    return watched(lambda: here.recv(1), lambda: there.send(b"x"))


def unix_epoll() -> Facts:
    here, there = socket.socketpair()
    poller = select.epoll()
    poller.register(here, select.EPOLLIN)

    def wait() -> None:
        poller.poll()
        here.recv(1)

    return watched(wait, lambda: there.send(b"x"))


def tcp() -> Facts:
    """Over loopback, IPv4; to the one that accepted."""
    client, server = tcp_pair(socket.AF_INET, "127.0.0.1")
    facts = watched(lambda: server.recv(1), lambda: client.send(b"x"))
    facts["ports"] = [server.getsockname()[1], client.getsockname()[1]]
    return facts


def tcp6_epoll() -> Facts:
    """Over loopback, IPv6; to the one that connected."""
    client, server = tcp_pair(socket.AF_INET6, "::1")
    poller = select.epoll()
    poller.register(client, select.EPOLLIN)

    def wait() -> None:
        poller.poll()
        client.recv(1)

    facts = watched(wait, lambda: server.send(b"x"))
    facts["ports"] = [client.getsockname()[1], server.getsockname()[1]]
    return facts


def timer() -> Facts:
    return watched(lambda: time.sleep(WAIT_S))


def terminal() -> Facts:
    """A character device."""
    master, slave = pty.openpty()
    facts = watched(lambda: os.read(slave, 1), lambda: os.write(master, b"x\n"))
    device = os.fstat(slave).st_rdev
    facts["device"] = os.major(device) << 20 | os.minor(device)
    return facts


def child() -> Facts:
    """Waits for a process to end, which no reason of its own stands for."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    return watched(lambda: os.waitpid(pid, 0), lambda: os.close(write_end))


def disk(name: str) -> Facts:
    """Reads a file past the page cache, 23 times."""
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)

    def wait() -> None:
        for index in range(23):
            os.preadv(descriptor, [buffer], index * PAGE * 8)

    return watched(wait)


def page_fault(name: str) -> Facts:
    """Touches pages of a file that the page cache does not have."""
    descriptor = os.open(name, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)

    def wait() -> None:
        for offset in range(0, len(memory), len(memory) // 23):
            memory[offset]

    return watched(wait)


# ---- the lives of threads ----


def lives() -> Facts:
    """31 threads one after the other, each with a name of its own, that sleep 3 times.

    `left` says how often each had left its CPU by itself (the kernel's ru_nvcsw) at an instant at its end.
    """
    name_thread = ctypes.CDLL(None).prctl
    tids: list[int] = []
    left: dict[int, tuple[int, int]] = {}

    def live(number: int) -> None:
        tid = threading.get_native_id()
        tids.append(tid)
        name_thread(15, b"life-%d" % number, 0, 0, 0)  # PR_SET_NAME
        for _ in range(3):
            time.sleep(0.001)
        left[tid] = (resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, time.monotonic_ns())

    begin_ns = time.monotonic_ns()
    for number in range(31):
        thread = threading.Thread(target=live, args=(number,))
        thread.start()
        thread.join()
    return {"tids": tids, "left": left, "tid": os.getpid(), "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}


def sleeps(count: str) -> Facts:
    """Sleeps `count` times, exactly, and does nothing else that could."""
    begin_ns = time.monotonic_ns()
    for _ in range(int(count)):
        time.sleep(0.0005)
    return {"tid": os.getpid(), "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}


def messages(count: str) -> Facts:
    """Sends and receives `count` messages over a unix socket, without ever waiting."""
    here, there = socket.socketpair()
    begin_ns = time.monotonic_ns()
    for _ in range(int(count)):
        there.send(b"abc")
        here.recv(65536)
    return {"tid": os.getpid(), "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}


def full() -> Facts:
    """Fills a unix socket until it has no room."""
    here, there = socket.socketpair()
    there.setblocking(False)
    begin_ns, sends = time.monotonic_ns(), 0
    try:
        while True:
            there.send(b"x" * 4096)
            sends += 1
    except BlockingIOError:
        return {"tid": os.getpid(), "sends": sends, "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}
    finally:
        here.close()


def spin(cpu: str, seconds: str) -> Facts:
    """Runs on one CPU for so much time, and sleeps and waits for nothing by its own will."""
    os.sched_setaffinity(0, {int(cpu)})
    begin_ns = time.monotonic_ns()
    begin_cpu_ns = time.thread_time_ns()
    end_ns = begin_ns + int(float(seconds) * 1e9)
    while time.monotonic_ns() < end_ns:
        pass
    return {
        "tid": os.getpid(),
        "begin_ns": begin_ns,
        "cpu_ns": time.thread_time_ns() - begin_cpu_ns,
        "end_ns": time.monotonic_ns(),
    }


def crowd(cpu: str, seconds: str) -> Facts:
    """3 threads that work without the interpreter's lock and 2 that sleep often, on one CPU."""
    os.sched_setaffinity(0, {int(cpu)})
    begin_ns = time.monotonic_ns()
    end_ns = begin_ns + int(float(seconds) * 1e9)

    def work() -> None:
        while time.monotonic_ns() < end_ns:
            hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 20000)

    def rest() -> None:
        while time.monotonic_ns() < end_ns:
            time.sleep(0.001)

    threads = [threading.Thread(target=target) for target in (work, work, work, rest, rest)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"tid": os.getpid(), "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}


def become(scenario: str) -> None:
    """Another thread than the first one executes this program again, which does `scenario`."""
    command = [sys.executable, "-S", "-E", __file__, scenario]
    threading.Thread(target=os.execv, args=(command[0], command)).start()
    threading.Event().wait()


def serve() -> Facts:
    """Listens, says its port, takes one connection and waits for 1 byte; answers 23 bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        say({"port": listener.getsockname()[1]})
        connection, peer = listener.accept()
    facts = watched(lambda: connection.recv(1))
    connection.sendall(b"y" * 23)
    facts["ports"] = [connection.getsockname()[1], peer[1]]
    return facts


def stall() -> Facts:
    """Listens, says its port, takes one connection and sends until there is no room; then, told so, 2 bytes more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        say({"port": listener.getsockname()[1]})
        connection, _ = listener.accept()
    connection.setblocking(False)
    begin_ns, sends = time.monotonic_ns(), 0
    try:
        while True:
            connection.send(b"x" * 16384)
            sends += 1
    except BlockingIOError:
        say({"sends": sends})
    sys.stdin.readline()
    select.select([], [connection], [])
    connection.send(b"y")
    connection.send(b"z")
    return {"tid": os.getpid(), "begin_ns": begin_ns, "end_ns": time.monotonic_ns()}


def datagram(port: str) -> Facts:
    """Asks by UDP, and waits for the answer."""
    asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect(("127.0.0.1", int(port)))
    asker.send(b"question")
    facts = watched(lambda: asker.recv(65536))
    facts["ports"] = [asker.getsockname()[1], int(port)]
    return facts


def ask(port: str) -> Facts:
    """Asks a server on this host for an answer, and waits for it."""
    client = socket.create_connection(("127.0.0.1", int(port)))
    client.send(b"question")
    facts = watched(lambda: client.recv(65536))
    facts["ports"] = [client.getsockname()[1], int(port)]
    return facts


def say(facts: Facts) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    scenario = globals()[sys.argv[1]]
    print("ready", flush=True)
    sys.stdin.readline()
    say(scenario(*sys.argv[2:]))
    sys.stdin.read()


if __name__ == "__main__":
    main()
