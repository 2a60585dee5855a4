"""The poller: what a slow source said last, and that nobody waits for it."""

from __future__ import annotations

import threading

import pytest

from probes.poller import Poller

PATIENCE_S = 10.0


class Source:
    """A source that answers when the test says so."""

    def __init__(self, *answers: int | Exception) -> None:
        self._answers = iter(answers)
        self.asked = threading.Semaphore(0)
        self.may_answer = threading.Semaphore(0)

    def ask(self) -> int:
        self.asked.release()
        assert self.may_answer.acquire(timeout=PATIENCE_S)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_last_answer_is_kept_with_its_time() -> None:
    source, times = Source(23, 29, 31), iter(range(0, 100_000, 1000))
    poller = Poller("source", source.ask, 0.0, clock=lambda: next(times))
    assert poller.latest() is None
    poller.start()
    for answer in (23, 29):
        assert source.asked.acquire(timeout=PATIENCE_S)
        source.may_answer.release()
        assert source.asked.acquire(timeout=PATIENCE_S)  # the next question: the answer is there
        source.asked.release()
        latest = poller.latest()
        assert latest is not None
        assert latest[0] == answer
        assert latest[1] % 1000 == 0
    source.may_answer.release()
    poller.stop(PATIENCE_S)


def test_a_source_that_does_not_answer_holds_nobody() -> None:
    source, now = Source(23), [0]
    poller = Poller("source", source.ask, 1.0, clock=lambda: now[0])
    assert poller.waiting_ns() == 0
    poller.start()
    assert source.asked.acquire(timeout=PATIENCE_S)
    now[0] = 12_000_000_000
    assert poller.waiting_ns() == 12_000_000_000
    assert poller.latest() is None
    poller.stop(0.0)  # the thread is left to itself
    source.may_answer.release()


def test_a_fault_of_the_source_is_raised_where_its_answer_is_asked_for() -> None:
    source = Source(ValueError("a fault"))
    poller = Poller("source", source.ask, 1.0)
    poller.start()
    source.may_answer.release()
    poller.stop(PATIENCE_S)
    with pytest.raises(ValueError, match="a fault"):
        poller.latest()


def test_a_stopped_poller_asks_no_more() -> None:
    source = Source(23, 29)
    poller = Poller("source", source.ask, 3600.0)
    poller.stop()  # before it began: nothing to wait for
    poller.start()
    poller.stop(PATIENCE_S)
    assert not source.asked.acquire(blocking=False)
