"""An objective as the configuration declares it, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

import msgspec

from exporter.document import Value, did_you_mean, exact_time, shown

if TYPE_CHECKING:
    from exporter.slo.catalogue import KnownMetric

MAX_SLOS: Final = 64
SLO_SLIS: Final = ("ttft", "itl", "tpot", "longest_gap", "duration")
"""Latencies that an objective may be about, by the value of their `Sli`."""
SLO_ERRORS: Final = "errors"
SLO_ABORTS: Final = "aborts"
SLO_CACHE: Final = "kv_cache_hit_ratio"
SLO_SPEED: Final = "decode_tokens_per_second"
SLO_METRIC: Final = re.compile(r"(kernel|gpu)_[a-z0-9_]{1,100}")
"""An objective may also be about a family of these, by its name."""
SLO_REASONS: Final = ("client_error", "rate_limited", "server_error", "cut_off")
"""Why a request failed, by the value of its `Failure`. The first one is the client's own fault."""
HOST: Final = "host"
"""The service of an objective about a metric that has none, such as a GPU's temperature."""
SLO_SHORTEST_S: Final = 3 * 86400
"""An objective's period is at least the longest window over which its burn rate is looked at."""
_ALL_SLIS: Final = (*SLO_SLIS, SLO_ERRORS, SLO_ABORTS, SLO_CACHE, SLO_SPEED)
_KEYS: Final = ("name", "sli", "below", "at_least", "target", "window", "service", "model_name", "reasons")


class Slo(msgspec.Struct, frozen=True):
    """An objective: the fraction `target` of the events of `sli` is good.

    `sli` is the value of a latency's `Sli` (good: at most `below` seconds), `decode_tokens_per_second` (good: a
    response with `at_least` so many), `errors` (good: a request that did not fail for one of `reasons`), `aborts`
    (good: one whose client stayed), `kv_cache_hit_ratio` (good: a prompt token that was looked up and found), or the
    name of a kernel_ or gpu_ family (good: an observation of the histogram, or a minute of the gauge, that is at most
    `below` or `at_least` so much, in the family's unit). `window_s` is its period. None for `service` or `model_name`
    means every one.
    """

    name: str
    sli: str
    below: float | None
    target: float
    window_s: int = 30 * 86400
    service: str | None = None
    model_name: str | None = None
    at_least: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def below_s(self) -> float | None:
        """The latency in seconds up to which an event is good; None where the objective is about something else."""
        if self.sli == SLO_SPEED and self.at_least is not None:
            return round(1 / self.at_least, 9)  # of the time per output token
        return self.below if self.sli in SLO_SLIS else None


def read_slos(value: Value, services: AbstractSet[str]) -> tuple[Slo, ...]:
    """The objectives of a configuration that names these services. Raises `ConfigError`."""
    names: dict[str, str] = {}  # by ids

    def read(item: Value) -> Slo:
        slo = _slo(item, services)
        for service in services_of(slo, services):
            joined = slo_id(service, slo.name)
            other = names.setdefault(joined, slo.name)
            if other != slo.name:
                item.fail(
                    f"service and name joined are {shown(joined)}, as for {shown(other)}",
                    "rename one of the two: rules tell objectives apart by that",
                )
        return slo

    return value.named(MAX_SLOS, "objective", "objectives", read)


def services_of(slo: Slo, services: Iterable[str]) -> list[str]:
    """The services that an objective is written out for, of all that are configured, in their order."""
    if "service_name" not in labels_of(slo):
        return [HOST]
    return list(services) if slo.service is None else [slo.service]


def labels_of(slo: Slo) -> Sequence[str]:
    """The labels of what an objective is about."""
    if SLO_METRIC.fullmatch(slo.sli):
        return known_metrics()[slo.sli].labels
    return ("service_name", "model_name")


def slo_id(service: str, name: str) -> str:
    """What rules tell objectives apart by."""
    return f"{service}-{name}"


def _slo(value: Value, services: AbstractSet[str]) -> Slo:
    keys = value.fields(*_KEYS, required=("name", "sli"))
    name = keys["name"].name_of("an objective")
    sli = keys["sli"].text()
    if sli not in _ALL_SLIS and not SLO_METRIC.fullmatch(sli):
        keys["sli"].fail(
            f"unknown sli {shown(sli)}",
            f"{did_you_mean(sli, _ALL_SLIS)}allowed here: {', '.join(_ALL_SLIS)}, or a kernel_ or gpu_ metric",
        )
    below, at_least, target = _wants(value, sli, keys)
    window_s = _window(keys["window"]) if "window" in keys else 30 * 86400
    reasons: tuple[str, ...] = SLO_REASONS[1:] if sli == SLO_ERRORS else ()
    if "reasons" in keys:
        if sli != SLO_ERRORS:
            keys["reasons"].fail(f"is for objectives about {SLO_ERRORS}", "remove the line")
        reasons = keys["reasons"].one_or_more(_reason)
    model = keys["model_name"].text() if "model_name" in keys else "*"
    service = keys["service"].service(services) if "service" in keys else None
    if not sli.startswith(("kernel_", "gpu_")):
        return Slo(name, sli, below, target, window_s, service, None if model == "*" else model, at_least, reasons)
    labels = known_metrics()[sli].labels
    for key, label, wanted in (("service", "service_name", service), ("model_name", "model_name", model)):
        if wanted not in (None, "*") and label not in labels:
            keys[key].fail(f"{sli} does not tell {key}s apart", "remove the line")
    return Slo(name, sli, below, target, window_s, service, None if model == "*" else model, at_least)


def _wants(value: Value, sli: str, keys: Mapping[str, Value]) -> tuple[float | None, float | None, float]:
    """`below`, `at_least` and `target`, of which an objective has those that its sli needs."""

    def need(key: str) -> Value:
        if key not in keys:
            value.fail(f"the key '{key}' is missing", f"add `{key}:`")
        return keys[key]

    def refuse(*unwanted: str) -> None:
        for key in unwanted:
            if key in keys:
                keys[key].fail(f"has no meaning for {sli}", "remove the line")

    if sli == SLO_CACHE:
        refuse("below", "target")  # the ratio is the objective: it is good tokens by all
        return None, None, _percent(need("at_least"), "a token that is not found")
    target = _percent(need("target"), "a single bad event" if sli not in SLO_SLIS else "a single slow request")
    if sli in SLO_SLIS:
        refuse("at_least")
        return need("below").duration(0.0001, 7680), None, target
    if sli == SLO_SPEED:
        refuse("below")
        return None, need("at_least").number(0.1, 10_000), target
    if sli in (SLO_ERRORS, SLO_ABORTS):
        refuse("below", "at_least")
        return None, None, target
    return (*_metric_wants(value, sli, keys), target)


def _metric_wants(value: Value, sli: str, keys: Mapping[str, Value]) -> tuple[float | None, float | None]:
    """`below` or `at_least` of a kernel_ or gpu_ family."""
    known = known_metrics()
    metric = known.get(sli)
    if metric is None:
        keys["sli"].fail(f"there is no metric {shown(sli)}", f"{did_you_mean(sli, sorted(known))}see docs/metrics.md")
    if metric.kind not in {"gauge", "histogram"}:
        keys["sli"].fail(f"{sli} is a {metric.kind}", "an objective is about a histogram or a gauge")
    given = [key for key in ("below", "at_least") if key in keys]
    if len(given) != 1:
        value.fail("give one of `below` and `at_least`", "add `below:` with the largest value that is good")
    (key,) = given
    if metric.kind == "histogram":
        if key == "at_least":
            keys[key].fail(f"{sli} is a histogram", "write `below:` with one of its bucket bounds")
        return _bound_of(keys[key], metric.bounds), None
    threshold = _in_unit(keys[key], metric.unit)
    return (threshold, None) if key == "below" else (None, threshold)


def _bound_of(value: Value, bounds: Sequence[float]) -> float:
    """A time that is one of the bounds, which are kept in the kernel and cannot be added to."""
    seconds = value.duration(bounds[0], bounds[-1])
    for bound in bounds:
        if abs(bound - seconds) < 1e-12:
            return bound
    below = max(bound for bound in bounds if bound < seconds)
    above = min(bound for bound in bounds if bound > seconds)
    value.fail(f"{value.described()} is no bucket bound", f"write {exact_time(below)} or {exact_time(above)}")


def _in_unit(value: Value, unit: str) -> float:
    if unit == "bytes":
        return value.size(1, 2**60)
    if unit == "seconds":
        return value.duration(1e-6, 366 * 86400)
    if unit == "ratio":
        return value.percent(1.0)
    return value.number(0, 1e15)


def _percent(value: Value, one: str) -> float:
    target = value.percent(1.0)
    if target == 1:
        value.fail(f"100% leaves no room for {one}", "write less, such as 99.9%")
    return target


def _window(value: Value) -> int:
    seconds = value.duration(3600, 90 * 86400)
    if seconds < SLO_SHORTEST_S:
        value.fail(
            f"{value.described()} is shorter than the longest window of the burn rate",
            f"write a period from {SLO_SHORTEST_S // 86400}d to 90d, such as 7d or 30d",
        )
    if seconds % 3600:
        value.fail(f"{value.described()} is no whole number of hours", "write whole days or hours, such as 30d")
    return round(seconds)


def _reason(value: Value) -> str:
    reason = value.text()
    if reason not in SLO_REASONS:
        value.fail(
            f"unknown reason {shown(reason)}",
            f"{did_you_mean(reason, SLO_REASONS)}allowed here: {', '.join(SLO_REASONS)}",
        )
    return reason


def known_metrics() -> Mapping[str, KnownMetric]:
    """The kernel_ and gpu_ families, by their name in the text format, as the installed package lists them."""
    from exporter.slo.catalogue import known  # noqa: PLC0415 - only an objective about one of them needs it

    return known()
