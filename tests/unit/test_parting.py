"""What a reader is when it begins: it shares memory with the attacher, and gives back what it takes."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import exporter
from exporter.parting import fork_reader

MIB = 1 << 20


@pytest.fixture
def said_by_a_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], int]], int]]:
    """What a function returns where the reader would begin."""

    def ask(look: Callable[[], int]) -> int:
        reading, writing = os.pipe()
        reader: Any = ModuleType("exporter.reader")
        reader.main = lambda _given: os.write(writing, str(look()).encode())
        monkeypatch.setitem(sys.modules, "exporter.reader", reader)
        monkeypatch.setattr(exporter, "reader", reader, raising=False)
        given: Any = None
        child = fork_reader(given)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        return int(said)

    yield ask
    gc.unfreeze()


def test_no_collection_looks_at_what_the_attacher_made(
    said_by_a_reader: Callable[[Callable[[], int]], int],
) -> None:
    of_the_attacher = [[number] for number in range(101)]

    def collected() -> int:
        seen = {id(each) for each in gc.get_objects()}
        return sum(id(each) in seen for each in of_the_attacher)

    assert collected() == 101
    assert said_by_a_reader(collected) == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_large_blocks_go_back_to_the_kernel_when_they_are_freed(
    said_by_a_reader: Callable[[Callable[[], int]], int],
) -> None:
    def kept() -> int:
        before = resident()
        large: list[bytes] = []
        small = []
        for _ in range(5):  # from the second one on, glibc takes them from its heap, below what is in use
            large.append(b"x" * (4 * MIB))
            small.append(b"y" * 100_003)
            large.clear()
        return resident() - before - len(small) * 100_003

    assert said_by_a_reader(kept) < MIB


def test_many_blocks_go_back_to_the_kernel_when_they_are_freed(
    said_by_a_reader: Callable[[Callable[[], int]], int],
) -> None:
    def kept() -> int:
        before = resident()
        blocks = [b"z" * 100_003 for _ in range(101)]
        blocks.clear()
        return resident() - before

    large = b"x" * (16 * MIB)
    del large  # what glibc learns from in the attacher, it knows in the reader
    assert said_by_a_reader(kept) < MIB
