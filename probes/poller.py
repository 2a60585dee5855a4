"""Asks a slow source again and again in a thread of its own, so that neither a ring nor a scrape waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")


class Poller(Generic[T]):
    """Calls `ask` every `period_s` seconds and keeps what it returned last.

    `ask` reports what is wrong with its source in what it returns; one that raises has a fault of its own, which
    `latest` raises again. A call that takes longer than the period delays the next one; none is made up for.
    `clock` is CLOCK_MONOTONIC in nanoseconds.
    """

    def __init__(
        self, name: str, ask: Callable[[], T], period_s: float, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._ask: Final = ask
        self._period_ns: Final = round(period_s * 1e9)
        self._clock: Final = clock
        self._answer: tuple[T, int] | None = None
        self._error: BaseException | None = None
        self._asked_ns: int | None = None
        self._ending = threading.Event()
        # A daemon: a driver that never answers must not keep the process from its end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; the first question is asked at once."""
        self._thread.start()

    def stop(self, patience_s: float = 0.5) -> None:
        """Ask no more. Returns when the thread has ended, or `patience_s` later where its source does not answer."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def latest(self) -> tuple[T, int] | None:
        """What was answered last and when, by the clock; None before the first answer. Raises what `ask` raised."""
        if self._error is not None:
            raise self._error
        return self._answer

    def waiting_ns(self) -> int:
        """How long the question under way has been waiting for its answer; 0 where there is none."""
        asked_ns = self._asked_ns
        return 0 if asked_ns is None else max(0, self._clock() - asked_ns)

    def _run(self) -> None:
        while not self._ending.is_set():
            began_ns = self._asked_ns = self._clock()
            try:
                answer = self._ask()
            except BaseException as error:
                self._error = error
                return
            finally:
                self._asked_ns = None
            self._answer = answer, self._clock()
            self._ending.wait(max(0, began_ns + self._period_ns - self._clock()) / 1e9)
