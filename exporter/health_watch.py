"""Watches the health of every service while the agent runs: what is normal, what is not, and what happened lately."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from exporter import health_state
from exporter.fronts import rfc3339
from exporter.health import RULES, SIGMAS, Change, ServiceHealth, Signal
from exporter.health_signals import Signals
from exporter.health_state import Learnt
from exporter.labels import safe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.health import Baseline
    from exporter.slis import Slis
    from exporter.status import AgentStatus, DescriptorLeak

log = logging.getLogger("footlight")

LOOK_NS: Final = 1_000_000_000
SAVE_NS: Final = 60_000_000_000
EVENTS: Final = 100
LEAK: Final = "descriptor-leak"
"""Why a recording was made."""
_UNIT_TEXT: Final = {"cpus": "CPUs", "files": "open files", "requests": "requests"}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the health of a service.

    `at_ns` is since the epoch. `what` is the value of a `Change`, or `descriptor_leak`. `value` and `normal`, the
    median that it is compared to, are in `unit`; None where they are not known. `leak` is what leaks.
    """

    at_ns: int
    service: str
    signal: str
    what: str
    value: float | None
    normal: float | None
    sigmas: float | None
    unit: str
    leak: DescriptorLeak | None = None


class Health:
    """All services. `services` are names by the kernel's index, which may change.

    `folder` is the descriptor of the folder where what was learnt is kept; None keeps it nowhere. `clock` is
    CLOCK_MONOTONIC and `wall_clock` the time since the epoch, in nanoseconds.
    """

    def __init__(
        self,
        slis: Slis,
        services: Sequence[str],
        folder: int | None = None,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._signals: Final = Signals(slis, services)
        self._folder: Final = folder
        self._wall_clock: Final = wall_clock
        self._known: dict[str, ServiceHealth] = {}
        self._learnt: dict[str, Learnt] = {}
        self._next_look_ns = 0
        self._next_save_ns: int | None = None
        self._leaks_seen: set[tuple[int, int]] = set()
        self.events: Final[deque[Event]] = deque(maxlen=EVENTS)
        self.leaks: Final[dict[str, int]] = {}
        """How many leaks of descriptors there were, by service."""
        if folder is not None:
            try:
                self._learnt = health_state.load(folder, wall_clock() / 1e9)
            except (OSError, ValueError) as error:
                log.warning("what was learnt of the services' health cannot be read, it is learnt anew: %s", error)

    @property
    def services(self) -> Mapping[str, ServiceHealth]:
        """What is known of each service, by its name as a label."""
        return self._known

    def tick(
        self, now_ns: int, status: AgentStatus | None, kernel: Callable[[], Mapping[str, NDArray[np.void]]]
    ) -> list[Event]:
        """Look, once a second however often this is called; returns what happened."""
        if now_ns < self._next_look_ns:
            return []
        self._next_look_ns = now_ns + LOOK_NS
        values = self._signals.look(now_ns, status, kernel())
        for gone in self._known.keys() - values.keys():
            del self._known[gone]
        happened = []
        for name, mine in values.items():
            for signal, change in self._service(name).take(now_ns / 1e9, mine):
                happened.append(self._changed(name, signal, change))
        happened += self._new_leaks(status)
        self.events.extend(happened)
        for event in happened:
            _say(event)
        if self._next_save_ns is None:
            self._next_save_ns = now_ns + SAVE_NS
        elif now_ns >= self._next_save_ns:
            self._next_save_ns = now_ns + SAVE_NS
            self.save()
        return happened

    def save(self) -> None:
        """Write down what was learnt, where there is a place for it."""
        if self._folder is None:
            return
        now = self._wall_clock() / 1e9
        # what another agent learnt of a service that this one has not seen a process of stays, until it is too old
        self._learnt = {name: each for name, each in self._learnt.items() if each.is_fresh(now)}
        learnt = self._learnt | {
            name: Learnt(each.eldest, {signal: list(known) for signal, known in each.known().items()}, now)
            for name, each in self._known.items()
        }
        try:
            health_state.save(self._folder, now, learnt)
        except OSError as error:
            log.warning("what was learnt of the services' health cannot be kept: %s", error)

    def told(self) -> dict[str, Any]:
        """What is normal, what is now, and what happened, newest first, as JSON types."""
        return {
            "sigmas": SIGMAS,
            "services": [
                {"service": name, "signals": [_signal(signal, each.baselines[signal]) for signal in Signal]}
                for name, each in sorted(self._known.items())
            ],
            "events": [_event(event) for event in reversed(self.events)],
        }

    def _service(self, name: str) -> ServiceHealth:
        known = self._known.get(name)
        if known is None:
            before = self._learnt.pop(name, None)
            known = ServiceHealth() if before is None else ServiceHealth(dict(before.samples), before.eldest)
            self._known[name] = known
        return known

    def _changed(self, name: str, signal: Signal, change: Change) -> Event:
        baseline = self._known[name].baselines[signal]
        normal = baseline.normal()
        return Event(
            self._wall_clock(),
            name,
            signal.value,
            change.value,
            baseline.value,
            None if normal is None else normal.median,
            baseline.sigmas,
            RULES[signal].unit,
        )

    def _new_leaks(self, status: AgentStatus | None) -> Iterator[Event]:
        told = status.leaks if status is not None else ()
        for leak in told:
            if (leak.tgid, leak.at_ns) in self._leaks_seen:
                continue
            name = safe(leak.service)
            self.leaks[name] = self.leaks.get(name, 0) + 1
            yield Event(
                self._wall_clock(),
                name,
                Signal.OPEN_FILES.value,
                "descriptor_leak",
                leak.open_files,
                None,
                None,
                RULES[Signal.OPEN_FILES].unit,
                leak,
            )
        self._leaks_seen = {(leak.tgid, leak.at_ns) for leak in told}


def _say(event: Event) -> None:
    if event.leak is not None:
        largest = ", ".join(f"{each.count} {each.kind} {each.name}".rstrip() for each in event.leak.targets[:3])
        log.warning(
            "%s: process %d leaks descriptors: %d are open, %.0f more each second; most are: %s",
            *(event.service, event.leak.tgid, event.leak.open_files, event.leak.per_second, largest),
        )
        return
    signal, value = event.signal.replace("_", " "), _text(event, event.value)
    if event.what == Change.BEGAN.value:
        usual = _text(event, event.normal)
        log.warning("%s: %s is not normal: %s, usually %s", event.service, signal, value, usual)
    elif event.what == Change.ENDED.value:
        log.info("%s: %s is normal again: %s", event.service, signal, value)
    else:
        log.info("%s: %s stays where it is; that is taken for normal now", event.service, signal)


def _text(event: Event, value: float | None) -> str:
    if value is None:
        return "unknown"
    if event.unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if event.unit == "seconds":
        return f"{value * 1000:.3g} ms"
    if event.unit == "ratio":
        return f"{value:.1%}"
    return f"{value:.3g} {_UNIT_TEXT.get(event.unit, event.unit)}"


def _signal(signal: Signal, baseline: Baseline) -> dict[str, Any]:
    normal = baseline.normal()
    return {
        "signal": signal.value,
        "unit": RULES[signal].unit,
        "value": baseline.value,
        "normal": None if normal is None else normal.median,
        "deviation": None if normal is None else normal.deviation,
        "deviation_is_of_logarithm": RULES[signal].logarithmic,
        "samples": len(baseline.known),
        "sigmas": baseline.sigmas,
        "anomalous": baseline.anomalous_since is not None,
    }


def _event(event: Event) -> dict[str, Any]:
    told: dict[str, Any] = {
        "time": rfc3339(event.at_ns),
        "service": event.service,
        "signal": event.signal,
        "what": event.what,
        "value": event.value,
        "normal": event.normal,
        "sigmas": event.sigmas,
        "unit": event.unit,
    }
    if event.leak is not None:
        leak = asdict(event.leak)
        told["leak"] = {key: leak[key] for key in ("tgid", "per_second", "open_files", "examined")}
        told["leak"]["kinds"] = {safe(kind): count for kind, count in event.leak.kinds}
        told["leak"]["targets"] = [
            {"kind": safe(each.kind), "name": safe(each.name) if each.name else "", "count": each.count}
            for each in event.leak.targets
        ]
    return told
