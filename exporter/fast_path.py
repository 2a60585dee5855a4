"""The way from a request over its objective to an Alertmanager, without Prometheus: where one is configured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from exporter.alerting import Alerting
from exporter.alertmanager import AlertReport, Notifier

if TYPE_CHECKING:
    from exporter.alerting import UnderWay
    from exporter.alertmanager import Post
    from exporter.config import Config
    from exporter.slis import Slis
    from exporter.status import AgentStatus


class FastPath:
    """Looks and tells. Without an Alertmanager in the configuration it does neither, and costs nothing.

    `wall` is the time since the epoch in nanoseconds; `post` takes the network's place in tests.
    """

    def __init__(
        self,
        config: Config,
        slis: Slis,
        under_way: UnderWay,
        wall: Callable[[], int] = time.time_ns,
        post: Post | None = None,
    ) -> None:
        self._slis: Final = slis
        self._under_way: Final = under_way
        self._notifier: Final = Notifier(config.alertmanagers, wall, post)
        self._alerting = self._made(config)

    def _made(self, config: Config) -> Alerting | None:
        return Alerting(config, self._slis, self._under_way) if config.alertmanagers else None

    @property
    def is_on(self) -> bool:
        """Whether anybody is to be told."""
        return self._alerting is not None

    def start(self) -> None:
        """Begin to deliver."""
        self._notifier.start()

    def stop(self) -> None:
        """End; waits half a second at the most for Alertmanagers that do not answer."""
        self._notifier.stop()

    def reconfigure(self, config: Config) -> None:
        """Go on with other objectives and Alertmanagers."""
        if self._alerting is None or not config.alertmanagers:
            self._alerting = self._made(config)
        else:
            self._alerting.reconfigure(config)
        self._notifier.reconfigure(config.alertmanagers)

    def tick(self, status: AgentStatus | None, seen_ns: int) -> None:
        """Look, and tell. All records of what happened before `seen_ns` (CLOCK_MONOTONIC) have to be taken."""
        if self._alerting is not None:
            self._notifier.take(self._alerting.look(status, seen_ns), seen_ns)

    def report(self) -> AlertReport | None:
        """What /metrics tells of it; None where nobody looks."""
        if self._alerting is None:
            return None
        delivered = [outbox.delivered() for outbox in self._notifier.outboxes]
        return AlertReport(self._alerting.counts(), self._alerting.unfollowed, delivered)
