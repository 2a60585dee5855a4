"""Writes a file for `promtool test rules` that shows what the rules of a configuration do, on traffic made for each.

The traffic is one of seven stories. Every objective has a model of its own in it, or is tested apart from those that
would read the same series. promtool evaluates once an hour: a month is then 720 evaluations of every rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from exporter.slo.model import selector
from exporter.slo.native import Gauge, Native
from exporter.slo.output import as_yaml
from exporter.slo.rules import PAGE, Group, identity, names, possible
from exporter.slo.words import period

_DAY: Final = 1440
_DAYS: Final = 30
_TOLERANCE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Phase:
    """So many minutes with so many good and bad events in each. `restart`: the counters begin at zero again."""

    minutes: int
    good: float
    bad: float
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an expression gives at a minute of the story: one sample of this value, or nothing."""

    minute: int
    expr: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Story:
    """A course of events: what happens to an objective, and what is to be seen of it then."""

    name: str
    interval_min: int
    phases: Callable[[Native], Sequence[Phase]]
    expects: Callable[[Native, dict[str, str]], Iterable[Expectation]]
    shown: Callable[[Native], bool] = lambda _: True


def file_of_tests(natives: Sequence[Native], groups: Sequence[Group], rule_file: str) -> str:
    """The whole file, as YAML. `rule_file` is the path of the rules in `groups`, as seen from its folder."""
    tests = [
        _test(story, batch)
        for story in STORIES
        for batch in _batches([native for native in natives if story.shown(native)])
    ]
    return as_yaml(
        {
            "rule_files": [rule_file],
            "evaluation_interval": "1h",
            # Else promtool takes them in any order, and an alert would look at what was recorded an hour ago.
            "group_eval_order": [group.name for group in groups],
            "tests": tests,
        }
    )


def _batches(natives: Sequence[Native]) -> list[list[Native]]:
    """The objectives, with those apart that read series of the same name and group."""
    batches: list[tuple[list[Native], set[tuple[str, ...]]]] = []
    for native in natives:
        reads = _names(native)
        batch, taken = next((each for each in batches if each[1].isdisjoint(reads)), ([], set()))
        if not batch:
            batches.append((batch, taken))
        batch.append(native)
        taken.update(reads)
    return [batch for batch, _ in batches]


def _labels(native: Native) -> dict[str, str]:
    labels = dict(native.matched)
    if "model_name" in native.groups:
        labels.setdefault("model_name", f"test-{native.slo.name}")
    return labels


def _names(native: Native) -> set[tuple[str, ...]]:
    labels = _labels(native)
    reads = native.reads(labels)
    found = [reads.name] if isinstance(reads, Gauge) else [each.name for each in reads]
    return {(name, *labels.values()) for name in found}


def _test(story: Story, batch: Sequence[Native]) -> dict[str, Any]:
    length = 0
    series: dict[str, str] = {}
    expectations: list[Expectation] = []
    for native in batch:
        phases = story.phases(native)
        labels = _labels(native)
        length = max(length, sum(phase.minutes for phase in phases))
        series.update(_series(native, labels, phases, story.interval_min))
        expectations += story.expects(native, labels)
    if series:
        samples = length // story.interval_min
        for service in sorted({native.matched["service_name"] for native in batch if "service_name" in native.matched}):
            series[f"footlight_target_processes{{{selector({'service_name': service})}}}"] = f"1+0x{samples}"
    return {
        "name": story.name,
        "interval": f"{story.interval_min}m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": each.expr,
                "eval_time": period(each.minute * 60),
                "exp_samples": [] if each.value is None else [{"labels": "{}", "value": each.value}],
            }
            for each in sorted(expectations, key=lambda each: each.minute)
        ],
    }


def _series(
    native: Native, labels: dict[str, str], phases: Sequence[Phase], interval_min: int
) -> Iterator[tuple[str, str]]:
    if not phases:
        return
    reads = native.reads(labels)
    if isinstance(reads, Gauge):
        yield f"{reads.name}{{{selector(reads.labels)}}}", _gauge(reads, phases, interval_min)
        return
    for counter in reads:
        values = _counter(phases, interval_min, counter.good, counter.bad)
        yield f"{counter.name}{{{selector(counter.labels)}}}", values


def _counter(phases: Sequence[Phase], interval_min: int, good: int, bad: int) -> str:
    """A counter in promtool's notation: `first+stepxtimes` for each phase, after a sample at the beginning."""
    value = 1000.0  # it was there before
    parts = [_plain(value)]
    for phase in phases:
        step = (phase.good * good + phase.bad * bad) * interval_min
        samples = phase.minutes // interval_min
        if phase.restart:
            value = 0.0
        parts.append(f"{_plain(value + step)}+{_plain(step)}x{samples - 1}")
        value += step * samples
    return " ".join(parts)


def _gauge(gauge: Gauge, phases: Sequence[Phase], interval_min: int) -> str:
    """A gauge that has a bad value for the share of bad events of each phase, and is not there where there is none."""
    parts: list[str] = []
    for phase in phases:
        samples = phase.minutes // interval_min
        total = phase.good + phase.bad
        if not total:
            parts.append("stale" if samples == 1 else f"stale _x{samples - 1}")
            continue
        share = phase.bad / total
        values = (gauge.bad if _is_due(number, share) else gauge.good for number in range(-samples, 0))
        for value, run in itertools.groupby(values):
            parts.append(f"{_plain(value)}+0x{len(list(run)) - 1}")
    return " ".join(parts)


def _is_due(number: int, share: float) -> bool:
    """Whether a sample is among the bad ones, of which this share is spread evenly; number -24 always is."""
    return math.floor((number + 24) * share + 1e-9) > math.floor((number + 23) * share + 1e-9)


def _plain(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _is_gauge(native: Native) -> bool:
    return isinstance(native.reads({}), Gauge)


def _budget(native: Native) -> float:
    return float(native.objective.budget)


def _traffic(native: Native) -> float:
    """Events in a minute: enough for an alert of even the strictest objective."""
    return max(1000.0, 2 / _budget(native))


def _alerts(native: Native, labels: dict[str, str], severity: str = "") -> str:
    chosen = {"alertname": native.objective.alert_name, "alertstate": "firing", **identity(native.objective)}
    chosen |= {name: labels[name] for name in native.groups}
    if severity:
        chosen["sloth_severity"] = severity
    return f"count(ALERTS{{{selector(chosen)}}})"


def _absent(native: Native) -> str:
    chosen = {"alertname": "SLOMetricAbsent", "alertstate": "firing", **identity(native.objective)}
    return f"count(ALERTS{{{selector(chosen)}}})"


def _close_to(native: Native, labels: dict[str, str], window: str, share: float) -> str:
    """Whether the share of bad events over a window is within `_TOLERANCE` of the true one."""
    chosen = {**names(native.objective), **{name: labels[name] for name in native.groups}}
    ratio = f"sum(slo:sli_error:ratio_rate{window}{{{selector(chosen)}}})"
    return f"abs({ratio} / {share:.12g} - 1) < bool {_TOLERANCE}"


def _fast(native: Native) -> Sequence[Phase]:
    rate = _traffic(native)
    return Phase(360, rate, 0), Phase(120, 0, rate), Phase(480, rate, 0)


def _after_fast(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    yield Expectation(360, _alerts(native, labels), None)
    pages = bool(possible(PAGE, native.objective.budget))
    yield Expectation(480, _alerts(native, labels, "page"), 1 if pages else None)
    yield Expectation(480, _absent(native), None)
    yield Expectation(540, _alerts(native, labels, "page"), None)
    yield Expectation(960, _alerts(native, labels), None)


def _pairs_shares(native: Native) -> list[float]:
    """Bad shares that only the first pair of a page's windows can see in an hour, and only the second in six."""
    budget = _budget(native)
    return [min(wide * budget, (narrow * budget + 1) / 2) for wide, narrow in ((20, 14.4), (10, 6))]


def _pairs(native: Native) -> Sequence[Phase]:
    rate = _traffic(native)
    hour, six = _pairs_shares(native)
    return (
        Phase(420, rate, 0),
        Phase(60, rate * (1 - hour), rate * hour),
        Phase(480, rate, 0),
        Phase(360, rate * (1 - six), rate * six),
    )


def _after_pairs(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    page = _alerts(native, labels, "page")
    yield Expectation(420, page, None)
    yield Expectation(480, page, 1)
    yield Expectation(960, page, None)
    yield Expectation(1320, page, 1)


def _has_both_pairs(native: Native) -> bool:
    return len(possible(PAGE, native.objective.budget)) == len(PAGE) and not _is_gauge(native)


def _slow_share(native: Native) -> float:
    budget = _budget(native)
    return min(2 * budget, (1 + budget) / 2)


def _slow(native: Native) -> Sequence[Phase]:
    rate, share = _traffic(native), _slow_share(native)
    return (Phase(4 * _DAY, rate * (1 - share), rate * share),)


def _has_enough_minutes(native: Native) -> bool:
    """Evaluated once an hour, the sums hold a twelfth of a gauge's minutes: for a strict objective too few to alert."""
    return not _is_gauge(native) or _budget(native) >= 0.005


def _after_slow(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    yield Expectation(4 * _DAY, _alerts(native, labels, "ticket"), 1)
    yield Expectation(4 * _DAY, _alerts(native, labels, "page"), None)


def _quiet(native: Native) -> Sequence[Phase]:
    return (Phase(480, 1, 0),) if _is_gauge(native) else (Phase(477, 0, 0), Phase(3, 0, 1))


def _after_quiet(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    yield Expectation(420, _alerts(native, labels), None)
    yield Expectation(480, _alerts(native, labels), None)
    yield Expectation(480, _absent(native), None)


def _restarts(native: Native) -> Sequence[Phase]:
    rate, share = _traffic(native), _budget(native) / 2
    return [Phase(60, rate * (1 - share), rate * share, restart=True)] * 8


def _after_restarts(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    yield Expectation(480, _close_to(native, labels, "6h", _budget(native) / 2), 1)
    yield Expectation(480, _alerts(native, labels), None)


def _uneven(native: Native) -> Sequence[Phase]:
    rate = _traffic(native)
    return [Phase(600, 0, 0), Phase(180, rate, 0), Phase(30, 0, rate / 100), Phase(_DAY - 810, 0, 0)] * _DAYS


def _after_uneven(native: Native, labels: dict[str, str]) -> Iterator[Expectation]:
    seconds = native.objective.window_s
    good, bad = _in_the_end(_uneven(native), min(seconds // 60, _DAYS * _DAY), gauge=_is_gauge(native))
    yield Expectation(_DAYS * _DAY, _close_to(native, labels, period(seconds), bad / (good + bad)), 1)


def _in_the_end(phases: Sequence[Phase], minutes: int, *, gauge: bool) -> tuple[float, float]:
    """Good and bad events in the last minutes. A gauge has one event in each minute in which it is there."""
    good = bad = 0.0
    for phase in reversed(phases):
        part = min(phase.minutes, minutes)
        minutes -= part
        scale = 1 / (phase.good + phase.bad) if gauge and phase.good + phase.bad else 1.0
        good += part * phase.good * scale
        bad += part * phase.bad * scale
    return good, bad


def _nothing(_: Native) -> Sequence[Phase]:
    return ()


def _after_nothing(native: Native, _: dict[str, str]) -> Iterator[Expectation]:
    yield Expectation(120, _absent(native), 1)


STORIES: Final = (
    Story("fast burn fires, recovery resolves", 1, _fast, _after_fast),
    Story("each pair of windows pages on its own", 1, _pairs, _after_pairs, _has_both_pairs),
    Story("slow burn fires", 5, _slow, _after_slow, _has_enough_minutes),
    Story("no traffic, and next to none, stay quiet", 1, _quiet, _after_quiet),
    Story("counter resets are harmless", 1, _restarts, _after_restarts, lambda native: not _is_gauge(native)),
    Story("30 days of uneven traffic give the true ratio", 5, _uneven, _after_uneven),
    Story("absent metrics are told", 1, _nothing, _after_nothing),
)
