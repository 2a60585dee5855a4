"""Which of the few alerts that cannot wait for Prometheus fire now: looked at four times a second, in the reader.

`ErrorBudgetBurn`: an objective about requests burns its budget fast (exporter/fast_burn.py). Its labels are those of
the alert that `footlight slo rules` makes, so that an Alertmanager takes both for one. A request that has waited longer
than its objective allows is bad before it is over: an engine that stopped is told of before it says another word.
`FootlightRequestsFail`, `FootlightStreamsCutOff`: the same for what services do wrong, where no objective is about it.
`FootlightServiceGone`: a service had processes, and has none or had none lately. `FootlightProbeDown`,
`FootlightLosesEvents`: the agent does not see what it was asked to.
These are alerts of dashboards/rules/footlight.yaml.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

import msgspec

from exporter.fast_burn import FastBurn, Weights
from exporter.labels import safe
from exporter.reloading import is_gone
from exporter.slis import largest_cause
from exporter.slo.declared import SLO_ABORTS, SLO_ERRORS, SLO_SPEED, Slo
from exporter.slo.events import NONE, events_of
from exporter.slo.native import natives
from exporter.slo.rules import PAGE, identity, possible
from exporter.slo.words import good_event, sentence

if TYPE_CHECKING:
    from exporter.config import Config
    from exporter.live_request import Request
    from exporter.slis import Series, Slis
    from exporter.slo.events import Events
    from exporter.slo.model import Objective
    from exporter.status import AgentStatus, ProbeStatus

    UnderWay = Callable[[], Iterable[tuple[Request, bool]]]
    """Every request that is not over, and whether its client has left."""

BURN: Final = "ErrorBudgetBurn"
FAIL: Final = "FootlightRequestsFail"
CUT_OFF: Final = "FootlightStreamsCutOff"
GONE: Final = "FootlightServiceGone"
PROBE_DOWN: Final = "FootlightProbeDown"
LOSES: Final = "FootlightLosesEvents"
NAMES: Final = (BURN, FAIL, CUT_OFF, GONE, PROBE_DOWN, LOSES)
FAST_SLIS: Final = ("ttft", "tpot", "longest_gap", "duration", SLO_SPEED, SLO_ERRORS, SLO_ABORTS)
"""What the fast path looks at: objectives whose events are requests. Gaps and tokens come by the hundred from one
stream, which is no proof of anything."""
MOST_ROWS: Final = 256
"""Objectives times models that are looked at: each costs 2 us at each look."""
MOST_REQUESTS: Final = 4096
"""Requests under way that are looked at, those of the oldest connections first: each costs 0.5 us at each look."""
LASTS_NS: Final = 3_000_000_000
"""A service has had no process, or a probe has not been up, for so long before anybody is told."""
KEEPS_NS: Final = 180_000_000_000
"""A service that is back is told of for so long as one that was gone, and then runs out. What its users felt of it runs
out as well, and Alertmanager silences that only while the root cause lasts."""
ATTACHES_NS: Final = 60_000_000_000
"""The same of an agent that begins."""
LOSS_SHARE: Final = 0.01
LOSS_FEWEST: Final = 100
LOSS_S: Final = 10
"""Lost events are told of where so many of a probe, and such a share of them, were lost in that many seconds."""
_SILENT: Final = (
    (FAIL, Slo("fail", SLO_ERRORS, None, 0.99, reasons=("server_error",))),
    (CUT_OFF, Slo("cut-off", SLO_ERRORS, None, 0.99, reasons=("cut_off",))),
)
"""What is looked at where no objective is about errors: alert, and the objective that stands in."""

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Alert:
    """One that fires. `labels` tell alerts apart. `since_ns` is CLOCK_MONOTONIC.

    `fades`: a rule's alert is the same one and lasts longer, because its windows are longer or it is kept. To end it
    would make the rule's a new one; it runs out instead.
    """

    labels: Labels
    summary: str
    description: str
    since_ns: int
    fades: bool = False
    of_agent: bool = False  # whether it is about what one agent sees: the labels of that agent belong to it

    @property
    def name(self) -> str:
        """Its `alertname`."""
        return dict(self.labels)["alertname"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An objective that is looked at, in `services` (labels), for `alert`. `objectives` are the rules', by service.

    `others` are services and models for which another objective is looked at.
    """

    alert: str
    slo: Slo
    weights: Weights
    services: frozenset[str]
    objectives: Mapping[str, Objective]
    others: frozenset[tuple[str, str]] = frozenset()

    def is_about(self, service: str, model: str) -> bool:
        """Whether it is about a model, by its labels."""
        if service not in self.services or (service, model) in self.others:
            return False
        return self.slo.model_name in (None, model)


class _Row:
    """One objective of one service and model."""

    __slots__ = ("before", "burn", "counted", "series", "since_ns", "wanted")

    def __init__(self, wanted: _Wanted, before: Events) -> None:
        self.wanted = wanted
        self.before = before  # what the series had told at the last look
        self.series: list[Series] = []
        self.counted: dict[int, Request] = {}  # by number: bad ones that the series do not tell of yet
        self.burn = FastBurn(wanted.weights)
        self.since_ns = 0

    def begin(self, overdue: Iterable[Request]) -> int:
        """Count requests that are overdue; tell how many did not count before."""
        fresh = {request.number: request for request in overdue if request.number not in self.counted}
        self.counted.update(fresh)
        return len(fresh)

    def settle(self, over: AbstractSet[int]) -> int:
        """Tell how many that counted are among the bad ones that the series tell of by now. `over` are numbers."""
        told = 0
        for number, request in list(self.counted.items()):
            is_told = _is_told(self.wanted.slo, request, is_over=number in over)
            if is_told or number in over:
                del self.counted[number]
                told += is_told and request.series() in self.series  # before its answer it may have had another model
        return told


Key = tuple[int, str, str]  # position of the objective, service_name, model_name


def _nobody() -> Iterable[tuple[Request, bool]]:
    return ()


class Alerting:
    """Looks at the series of `slis` and at the requests `under_way`."""

    def __init__(self, config: Config, slis: Slis, under_way: UnderWay = _nobody) -> None:
        self._slis = slis
        self._under_way = under_way
        self._conditions = _Conditions()
        self._firing: Sequence[Alert] = ()
        self._wanted: list[_Wanted] = []
        self._rows: dict[Key, _Row] = {}
        self._without_room: set[Key] = set()
        self._known = 0
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Look at other objectives. What was counted before is not held against them; the same ones go on."""
        self._find_rows(new=True)
        self._services = frozenset(safe(each.name) for each in config.services if not is_gone(each))
        self._wanted = list(_wanted(config))
        places = {(wanted.alert, wanted.slo): number for number, wanted in enumerate(self._wanted)}
        before, self._rows = self._rows, {}
        for (_, service, model), row in before.items():
            number = places.get((row.wanted.alert, row.wanted.slo))
            if number is not None and self._wanted[number].is_about(service, model):
                row.wanted = self._wanted[number]
                self._rows[number, service, model] = row
        self._known = -1
        self._slis.flush(self._slis.clock())
        self._find_rows(new=False)

    @property
    def firing(self) -> Sequence[Alert]:
        """What the last `look` found."""
        return self._firing

    @property
    def unfollowed(self) -> int:
        """Objectives times models for which there is no room."""
        return len(self._without_room)

    def counts(self) -> Mapping[str, int]:
        """How many fire, by `alertname`; those that do not are 0."""
        counted = Counter(alert.name for alert in self._firing)
        return {name: counted[name] for name in NAMES}

    def look(self, status: AgentStatus | None, seen_ns: int) -> Sequence[Alert]:
        """Look at everything. All that happened before `seen_ns` was counted, and possibly more."""
        self._find_rows(new=True)
        overdue, over = self._overdue(seen_ns)
        found = []
        for key, row in self._rows.items():
            good, events = NONE
            for series in row.series:
                more = events_of(row.wanted.slo, series)
                good, events = good + more[0], events + more[1]
            bad = (events - good) - (row.before[1] - row.before[0])
            lasting = overdue.get(key, ())
            # One that is overdue counts now, and not again when it is over.
            more_bad = row.begin(lasting) - min(bad, row.settle(over))
            all_ = events - row.before[1] + more_bad
            row.before = good, events
            was_burning = row.burn.is_burning
            if row.burn.take(bad + more_bad, all_, len(lasting), seen_ns):
                row.since_ns = row.since_ns if was_burning else seen_ns
                found.append(self._burning(key, row))
        found += self._conditions.look(status, self._services, seen_ns)
        self._firing = found
        return found

    def _find_rows(self, *, new: bool) -> None:
        """Give every series its rows. Those of a `new` one count from zero: it began after the last look."""
        every = self._slis.all_series()
        if len(every) == self._known:
            return
        self._known = len(every)
        self._without_room.clear()
        followed: dict[Key, list[Series]] = {}
        for series in every:
            for number, wanted in enumerate(self._wanted):
                service, model = series.labels[:2]
                if wanted.is_about(service, model):
                    followed.setdefault((number, service, model), []).append(series)
        for key, several in followed.items():
            row = self._row(key)
            if row is None:
                continue
            fresh = [series for series in several if series not in row.series]
            if not new:
                for series in fresh:
                    good, events = events_of(row.wanted.slo, series)
                    row.before = row.before[0] + good, row.before[1] + events
            row.series = several

    def _row(self, key: Key) -> _Row | None:
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= MOST_ROWS:
                self._without_room.add(key)
                return None
            row = self._rows[key] = _Row(self._wanted[key[0]], NONE)
        return row

    def _overdue(self, now_ns: int) -> tuple[Mapping[Key, Sequence[Request]], AbstractSet[int]]:
        """Requests under way that are bad already, by row; and the numbers of those that were, and are over."""
        found: defaultdict[Key, list[Request]] = defaultdict(list)
        over = {number for row in self._rows.values() for number in row.counted}
        latencies = [
            (number, wanted, round(wanted.slo.below_s * 1e9))
            for number, wanted in enumerate(self._wanted)
            if wanted.slo.below_s is not None and wanted.slo.sli in _LASTING
        ]
        if not latencies:
            return found, over
        looked_at = 0
        for request, has_left in self._under_way():
            over.discard(request.number)
            if has_left:
                continue
            looked_at += 1
            if looked_at > MOST_REQUESTS:
                if not over:
                    break
                continue  # only to see who is not over
            if not request.is_whole:
                continue
            names: tuple[str, str] | None = None
            for number, wanted, below_ns in latencies:
                lasts_ns = _LASTING[wanted.slo.sli](request, now_ns)
                if lasts_ns is None or lasts_ns <= below_ns:
                    continue
                if names is None:
                    names = safe(request.service), self._slis.model_label(request.service, request.model)
                if wanted.is_about(*names) and self._row((number, *names)) is not None:
                    found[number, *names].append(request)
        return found, over

    def _largest_cause(self, row: _Row) -> str:
        """As the rule's alert says it, of the last five minutes; nothing where no path was found."""
        now_ns = self._slis.clock()
        found = largest_cause([series.ttft_causes.totals(now_ns) for series in row.series])
        return f" Largest cause: {found[0]}, {found[1]:.0%} of the time." if found else ""

    def _burning(self, key: Key, row: _Row) -> Alert:
        _, service, model = key
        slo, burn = row.wanted.slo, row.burn
        told = f"{model}: {burn.bad} of {burn.events} events of the last minute were not {good_event(slo)}."
        why = self._largest_cause(row) if slo.sli == "ttft" else ""
        about = {"service_name": service, "model_name": model, "severity": "critical"}
        objective = row.wanted.objectives.get(service)
        if objective is None:
            summary = f"Requests to {service} fail: {', '.join(slo.reasons)}."
            labels = _labels(row.wanted.alert, {**about, "kind": "symptom"})
            return Alert(labels, summary, told, row.since_ns, fades=True)
        return Alert(
            _labels(BURN, {**objective.labels, **identity(objective), **about, "sloth_severity": "page"}),
            f"{slo.name} of {service} burns its error budget fast.",
            f"{told} The objective: {sentence(slo)}.{why}",
            row.since_ns,
            fades=True,
        )


def _wanted(config: Config) -> Iterable[_Wanted]:
    objectives: dict[str, dict[str, Objective]] = {}
    fast = tuple(slo for slo in config.slos if slo.sli in FAST_SLIS)
    for native in natives(msgspec.structs.replace(config, slos=fast)):
        objectives.setdefault(native.slo.name, {})[native.objective.service] = native.objective
    services: set[str] = set()  # those with an objective about errors, as are these models
    models: set[tuple[str, str]] = set()
    for slo in fast:
        of_slo = objectives.get(slo.name, {})
        if slo.sli == SLO_ERRORS:
            if slo.model_name is None:
                services.update(of_slo)
            else:
                models.update((service, slo.model_name) for service in of_slo)
        budget = 1 - Decimal(repr(slo.target))
        able = possible(PAGE, budget)
        if not able:
            continue  # every event may be bad, and the budget would still not burn fast
        weights = Weights.of(float(budget), max(float(burn.factor) for burn in able))
        yield _Wanted(BURN, slo, weights, frozenset(of_slo), of_slo)
    others = frozenset(safe(service.name) for service in config.services) - services
    for alert, slo in _SILENT:
        yield _Wanted(alert, slo, Weights.of(1 - slo.target, float(PAGE[0].factor)), others, {}, frozenset(models))


def _labels(name: str, others: Mapping[str, str]) -> Labels:
    return tuple(sorted({"alertname": name, **others}.items()))


def _waits_ns(request: Request, now_ns: int) -> int | None:
    since_ns = request.awaits_first_token_since()
    return None if since_ns is None else now_ns - since_ns


_LASTING: Final[Mapping[str, Callable[[Request, int], int | None]]] = {
    "ttft": _waits_ns,
    "longest_gap": lambda request, now_ns: request.longest_gap_by(now_ns),
    "duration": lambda request, now_ns: now_ns - request.arrived_ns,
}
"""How long the latency of a request under way is at the least, in ns; None where it is known, or never will be."""


def _is_told(slo: Slo, request: Request, *, is_over: bool) -> bool:
    """Whether the series tell that the latency of a request that was overdue is bad."""
    if slo.sli == "ttft":
        return request.first_token is not None
    last = request.last_token
    if is_over and slo.sli == "longest_gap" and last is not None and slo.below_s is not None:
        # A gap that only the end of the request ended is none.
        return (request.longest_gap_by(last[0]) or 0) > round(slo.below_s * 1e9)
    return is_over


class _Conditions:
    """What is wrong whatever the requests say: services without processes, probes that are not up or lose events."""

    def __init__(self) -> None:
        self._ran: set[str] = set()  # services that had a process
        self._gone: dict[str, _Gone] = {}
        self._probes: dict[str, _Probe] = {}

    def look(self, status: AgentStatus | None, services: frozenset[str], now_ns: int) -> Iterable[Alert]:
        """The alerts that fire now."""
        if status is None:
            return
        self._note_gone(status, services, now_ns)
        for service, gone in self._gone.items():
            if gone.is_told(now_ns):
                labels = _labels(GONE, {"service_name": service, "severity": "critical", "kind": "cause"})
                summary, told = f"{service} has no process.", "It had processes, and none is followed any more."
                if gone.back_ns is not None:
                    summary, told = f"{service} had no process.", "It is back; what users felt of it is not over yet."
                yield Alert(labels, summary, told, gone.since_ns, fades=True, of_agent=True)
        self._probes = {each.name: self._probes.get(each.name) or _Probe() for each in status.probes}
        for probe in status.probes:
            yield from self._probes[probe.name].look(probe, status.at_ns, now_ns)

    def _note_gone(self, status: AgentStatus, services: frozenset[str], now_ns: int) -> None:
        for target in status.targets:
            service = safe(target.service)
            if target.processes:
                self._ran.add(service)
                self._note_back(service, now_ns)
            elif service in self._ran and service in services:
                self._gone.setdefault(service, _Gone(now_ns)).back_ns = None
        for service in self._ran - services:
            self._ran.discard(service)
            self._gone.pop(service, None)

    def _note_back(self, service: str, now_ns: int) -> None:
        gone = self._gone.get(service)
        if gone is None:
            return
        if not gone.is_told(now_ns):
            del self._gone[service]
        elif gone.back_ns is None:
            gone.back_ns = now_ns


@dataclass(slots=True)
class _Gone:
    """A service without a process: since when, and when it had one again. CLOCK_MONOTONIC."""

    since_ns: int
    back_ns: int | None = None

    def is_told(self, now_ns: int) -> bool:
        """Whether it lasts, or has lasted, for long enough to be told of, and was not over for too long."""
        if self.back_ns is None:
            return now_ns - self.since_ns >= LASTS_NS
        return now_ns - self.back_ns < KEEPS_NS


class _Probe:
    """One probe: since when it is not up, and what it lost lately."""

    __slots__ = ("_down_ns", "_lost", "_was_up")

    def __init__(self) -> None:
        self._down_ns: int | None = None
        self._was_up = False
        self._lost: deque[tuple[int, int, int]] = deque()  # when, lost, all events

    def look(self, probe: ProbeStatus, at_ns: int, now_ns: int) -> Iterable[Alert]:
        """The alerts about it that fire now. `at_ns` is when its status was made."""
        about = {"probe": safe(probe.name), "severity": "warning", "kind": "agent"}
        since_ns = self._since(probe, now_ns)
        if since_ns is not None:
            told = f"{probe.reason or 'It is not attached'}. What it measures is absent."
            summary = f"The probe {probe.name} is not attached."
            yield Alert(_labels(PROBE_DOWN, about), summary, told, since_ns, of_agent=True)
        losing = self._losing(probe, at_ns)
        if losing is not None:
            summary = f"The agent loses records of the probe {probe.name}."
            yield Alert(_labels(LOSES, about), summary, losing, now_ns, fades=True, of_agent=True)

    def _since(self, probe: ProbeStatus, now_ns: int) -> int | None:
        if probe.up or not probe.required:
            self._was_up = self._was_up or probe.up
            self._down_ns = None
            return None
        if self._down_ns is None:
            self._down_ns = now_ns
        # Attaching takes its time.
        patience_ns = LASTS_NS if self._was_up else ATTACHES_NS
        return self._down_ns if now_ns - self._down_ns >= patience_ns else None

    def _losing(self, probe: ProbeStatus, at_ns: int) -> str | None:
        known, losses = self._lost, sum(loss.count for loss in probe.losses)
        if known and (losses < known[-1][1] or probe.events < known[-1][2]):
            known.clear()  # it is another one
        if not known or known[-1][0] != at_ns:
            known.append((at_ns, losses, probe.events))
        while known[0][0] < at_ns - LOSS_S * 1_000_000_000:
            known.popleft()
        lost, of = losses - known[0][1], probe.events - known[0][2]
        if lost < LOSS_FEWEST or lost < LOSS_SHARE * of:
            return None
        return f"{lost} of {of} events of the last {LOSS_S} s were lost."
