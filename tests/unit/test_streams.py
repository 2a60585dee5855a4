"""Streams that are kept as they are: every record is handed over once, and a drain ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from probes import btf, streams
from probes.probe import Channel, Transport
from probes.streams import SLICE, Streams
from probes.transport import RecordSource

KIND = np.dtype([("at_ns", "u8")])


class StubSource:
    """A source of an array that is overwritten as soon as it is released, as a ring is."""

    def __init__(self, count: int, endless: bool = False) -> None:
        self.records = np.zeros(count, KIND)
        self.records["at_ns"] = np.arange(count)
        self.position = 0
        self.endless = endless
        self.stalled = False
        self.lost = 0
        self.closed = False

    def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
        assert limit is not None, "a stream that never ends would be taken whole"
        if self.endless:
            self.position = 0
        return self.records[self.position : self.position + limit]

    def consume(self, count: int) -> None:
        assert count > 0
        if not self.endless:
            self.records["at_ns"][self.position : self.position + count] = 0
        self.position += count

    def skip_all(self) -> int:
        skipped, self.position = len(self.records) - self.position, len(self.records)
        return skipped

    def close(self) -> None:
        self.closed = True


class Taken:
    """What was handed over, copied."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []

    def __call__(self, name: str, records: npt.NDArray[Any]) -> None:
        assert len(records)
        self.batches.append((name, records["at_ns"].tolist()))

    def of(self, name: str) -> list[int]:
        return [number for stream, numbers in self.batches if stream == name for number in numbers]


Open = Callable[..., Streams]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Streams over these sources, by name."""
    with ExitStack() as stack:

        def open_streams(**sources: StubSource) -> Streams:
            def open_source(channel: Channel, _: Callable[[], int], opening: ExitStack) -> RecordSource:
                opening.callback(sources[channel.name].close)
                return sources[channel.name]

            monkeypatch.setattr(streams, "open_source", open_source)
            monkeypatch.setattr(btf, "dtype_of", lambda _, record: {"record": KIND}[record])
            return stack.enter_context(Streams(channels(list(sources))))

        yield open_streams


def channels(names: Sequence[str]) -> list[Channel]:
    return [Channel("p", name, "record", "at_ns", Transport.RING, Path("p.bpf.o"), (3,), 4096) for name in names]


def test_every_record_is_handed_over_once_and_in_order(opened: Open) -> None:
    counts = {"a": 0, "b": 1, "c": SLICE, "d": 3 * SLICE + 7}
    made = opened(**{name: StubSource(count) for name, count in counts.items()})
    taken = Taken()
    made.drain(taken)
    for name, count in counts.items():
        assert taken.of(name) == list(range(count))
    assert max(len(numbers) for _, numbers in taken.batches) == SLICE
    taken.batches.clear()
    made.drain(taken)
    assert taken.batches == []


def test_a_drain_ends_although_records_never_do(opened: Open) -> None:
    made = opened(a=StubSource(SLICE, endless=True), b=StubSource(3))
    taken = Taken()
    made.drain(taken)
    assert 0 < len(taken.of("a")) <= 100 * SLICE
    assert taken.of("b") == [0, 1, 2]


def test_the_types_are_those_of_the_records(opened: Open) -> None:
    assert opened(a=StubSource(0), b=StubSource(0)).dtypes == {"a": KIND, "b": KIND}


def test_skipping_says_how_many_by_stream(opened: Open) -> None:
    made = opened(a=StubSource(7), b=StubSource(0))
    assert made.skip_all() == {"a": 7, "b": 0}
    taken = Taken()
    made.drain(taken)
    assert taken.batches == []


def test_a_failure_of_one_closes_those_that_were_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    first = StubSource(3)

    def open_source(channel: Channel, _: Callable[[], int], opening: ExitStack) -> RecordSource:
        if channel.name == "b":
            raise OSError("no memory")
        opening.callback(first.close)
        return first

    monkeypatch.setattr(streams, "open_source", open_source)
    monkeypatch.setattr(btf, "dtype_of", lambda *_: KIND)
    with pytest.raises(OSError, match="no memory"):
        Streams(channels(["a", "b"]))
    assert first.closed


def test_leaving_closes_every_source(opened: Open) -> None:
    sources = [StubSource(1), StubSource(1)]
    with opened(a=sources[0], b=sources[1]):
        assert not any(source.closed for source in sources)
    assert all(source.closed for source in sources)


def test_without_streams_there_is_nothing(opened: Open) -> None:
    made = opened()
    taken = Taken()
    made.drain(taken)
    assert (made.dtypes, made.skip_all(), taken.batches) == ({}, {}, [])
