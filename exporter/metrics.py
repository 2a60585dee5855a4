"""The families of /metrics: what each one is, its values at a scrape, and their text.

The text is made here and not by prometheus_client's encoders, because the reader's loop stands still meanwhile: at 64
models (11,282 samples) this takes 11-13 ms, theirs 60-67 (text) and 110-122 (OpenMetrics). `Metrics` is a collector of
that library all the same, and the tests hold its encoders and this one to the same bytes.
"""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import CollectorRegistry
from prometheus_client.utils import floatToGoString

from exporter import VERSION
from exporter.alertmanager import alert_families
from exporter.cache_metrics import cache_families
from exporter.cuda_metrics import cuda_families
from exporter.engine_metrics import engine_families
from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.gpu_metrics import gpu_families
from exporter.health_metrics import health_families
from exporter.kernel_metrics import kernel_families
from exporter.labels import safe
from exporter.probe_points import probe_point_families
from exporter.slis import QUANTILE_SLIS, QUANTILES, Histogram, Series, Sli, Slis
from exporter.slo.status import SloStatus, slo_families
from exporter.status import AgentStatus, ProbeStatus, ProcessUsage, ReaderStatus, ReloadStatus, TargetStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.alertmanager import AlertReport
    from exporter.engines import EngineView
    from exporter.health_watch import Health
    from exporter.probe_points import PointTotal
    from probes.gpu_report import GpuReport


def _per_series(get: Callable[[Series, int], float | Histogram | None]) -> Callable[[Scrape], Iterator[Point]]:
    """One point per series; none where the value is None, because it was not measured."""

    def points(scrape: Scrape) -> Iterator[Point]:
        for series in scrape.series:
            value = get(series, scrape.now_ns)
            if value is not None:
                yield series.labels, value

    return points


def _failures(scrape: Scrape) -> Iterator[Point]:
    for series in scrape.series:
        for reason, count in series.failures.items():
            yield (*series.labels, reason.value), count


def _aborts(scrape: Scrape) -> Iterator[Point]:
    for series in scrape.series:
        for phase, count in series.aborts.items():
            yield (*series.labels, phase.value), count


def _quantiles(scrape: Scrape) -> Iterator[Point]:
    for series in scrape.series:
        for sli in QUANTILE_SLIS:
            for quantile, value in zip(QUANTILES, series.quantiles(sli, scrape.now_ns) or (), strict=False):
                yield (*series.labels, sli.value, str(quantile)), value


def _causes(slis: Slis) -> Callable[[Scrape], Iterator[Point]]:
    def points(scrape: Scrape) -> Iterator[Point]:
        for series in scrape.series if slis.explains else ():
            for (phase, cause), ns in series.causes_ns.items():
                yield (*series.labels, phase.value, cause.value), ns / 1e9

    return points


_LATENCIES = {
    Sli.TTFT: ("llm_time_to_first_token", "From the request's first byte to the first frame with content, streamed"),
    Sli.ITL: ("llm_inter_token_latency", "Between two successive frames with content of one response"),
    Sli.TPOT: (
        "llm_request_time_per_output_token",
        "Time between first and last token by tokens after the first, per request",
    ),
    Sli.LONGEST_GAP: ("llm_request_longest_gap", "The longest gap between frames with content, per request"),
    Sli.DURATION: ("llm_request_duration", "From the request's first byte to the last byte of its response"),
    Sli.READ_DELAY: ("llm_request_read_delay", "How long a request lay in the socket before the service read it"),
}


def _latency(slis: Slis, sli: Sli, labels: tuple[str, ...]) -> Family:
    name, text = _LATENCIES[sli]
    spec = Spec(f"{name}_seconds", Kind.HISTOGRAM, f"{text}.", labels, "seconds", slis.bounds[sli])
    return Family(spec, _per_series(lambda series, _: series.histograms[sli]))


def _llm_families(slis: Slis) -> list[Family]:
    """What users feel."""
    labels = ("service_name", "model_name", "api", *slis.label_names)

    def counter(name: str, text: str, get: Callable[[Series, int], float | None], unit: str = "") -> Family:
        return Family(Spec(name, Kind.COUNTER, text, labels, unit), _per_series(get))

    def gauge(name: str, text: str, get: Callable[[Series, int], float | None], unit: str = "") -> Family:
        return Family(Spec(name, Kind.GAUGE, text, labels, unit), _per_series(get))

    return [
        counter("llm_requests", "Requests whose end was seen, whatever the outcome.", lambda s, _: s.requests),
        Family(
            Spec(
                "llm_request_failures",
                Kind.COUNTER,
                "Failed requests: 4xx, 429, 5xx or an error in the stream, or cut off by the server.",
                (*labels, "reason"),
            ),
            _failures,
        ),
        Family(
            Spec(
                "llm_requests_aborted",
                Kind.COUNTER,
                "Requests whose client left, before the first token (waiting) or after it (streaming).",
                (*labels, "phase"),
            ),
            _aborts,
        ),
        Family(
            Spec("llm_requests_in_flight", Kind.GAUGE, "Requests that were read and are not finished.", labels),
            lambda _: slis.count_in_flight().items(),
        ),
        *(_latency(slis, sli, labels) for sli in Sli),
        counter(
            "llm_prompt_tokens",
            "Prompt tokens by the responses' own usage.",
            lambda s, _: s.prompt_tokens,
            "tokens",
        ),
        counter(
            "llm_generation_tokens",
            "Generated tokens by the responses' own usage; frames with content where it has none.",
            lambda s, _: s.generated_tokens,
            "tokens",
        ),
        counter("llm_frames", "Frames with content.", lambda s, _: s.frames),
        counter(
            "llm_wasted_generation_tokens",
            "Tokens generated for requests whose client had left.",
            lambda s, _: s.wasted_tokens,
            "tokens",
        ),
        *cache_families(slis),
        gauge(
            "llm_prefill_tokens_per_second",
            "Uncached prompt tokens by time from read to first token, last 5 minutes; needs usage with cached tokens.",
            Series.prefill_rate,
        ),
        gauge(
            "llm_decode_tokens_per_second",
            "Generated tokens by time from first to last token, last 5 minutes.",
            Series.decode_rate,
        ),
        # By its nature a gauge, but promtool allows the label `quantile` on summaries alone. Samples are the same.
        Family(
            Spec(
                "llm_latency_quantile_seconds",
                Kind.SUMMARY,
                "Quantiles over the last 5 minutes, within 1 % of the value. For people; aggregate the histograms.",
                (*labels, "sli", "quantile"),
                "seconds",
            ),
            _quantiles,
        ),
        Family(
            Spec(
                "llm_latency_cause_seconds",
                Kind.COUNTER,
                "Time of all streamed requests by what it was spent on; scaled up from those whose path was walked.",
                (*labels, "phase", "cause"),
                "seconds",
            ),
            _causes(slis),
        ),
    ]


def _coverage_families(slis: Slis) -> list[Family]:
    """How much of the truth was seen."""

    def captures(_: Scrape) -> Iterator[Point]:
        for service, outcomes in sorted(slis.captures().items()):
            for outcome, count in outcomes.items():
                yield (service, outcome.value), count

    def ratios(_: Scrape) -> Iterator[Point]:
        for service, ratio in sorted(slis.capture_ratios().items()):
            if ratio is not None:
                yield (service,), ratio

    return [
        Family(
            Spec(
                "footlight_capture",
                Kind.COUNTER,
                "Requests by how much of them was seen.",
                ("service_name", "outcome"),
            ),
            captures,
        ),
        Family(
            Spec(
                "footlight_capture_ratio",
                Kind.GAUGE,
                "Requests captured completely by all requests, last 5 minutes.",
                ("service_name",),
                "ratio",
            ),
            ratios,
        ),
        Family(
            Spec(
                "footlight_model_label_overflows",
                Kind.COUNTER,
                "Requests whose model got no label of its own: one too many, or refused by the service.",
                ("service_name",),
            ),
            lambda _: (((service,), count) for service, count in sorted(slis.overflows().items())),
        ),
        Family(
            Spec(
                "footlight_discarded_observations",
                Kind.COUNTER,
                "Latencies that were not counted because they were negative.",
                ("sli",),
            ),
            lambda _: (((sli.value,), count) for sli, count in slis.refused.items()),
        ),
    ]


def _losses(scrape: Scrape) -> Iterable[Point]:
    lost: Counter[tuple[str, str]] = Counter()
    for probe in scrape.status.probes if scrape.status else ():
        lost.update({(probe.name, loss.reason): loss.count for loss in probe.losses})
    for mine in scrape.reader.losses:
        lost.update({(mine.probe, loss.reason): loss.count for loss in mine.losses})
    return sorted(lost.items())


def _per_probe(get: Callable[[ProbeStatus], float | None]) -> Callable[[Scrape], Iterator[Point]]:
    def points(scrape: Scrape) -> Iterator[Point]:
        for probe in scrape.status.probes if scrape.status else ():
            value = get(probe)
            if value is not None:
                yield (probe.name,), value

    return points


def _per_process(get: Callable[[ProcessUsage], float | None]) -> Callable[[Scrape], Iterator[Point]]:
    def points(scrape: Scrape) -> Iterator[Point]:
        for process in scrape.status.processes if scrape.status else ():
            value = get(process)
            if value is not None:
                yield (process.role,), value

    return points


def _per_target(get: Callable[[TargetStatus], int]) -> Callable[[Scrape], Iterator[Point]]:
    def points(scrape: Scrape) -> Iterator[Point]:
        for target in scrape.status.targets if scrape.status else ():
            yield (safe(target.service),), get(target)

    return points


def _reload(get: Callable[[ReloadStatus], float]) -> Callable[[Scrape], Iterator[Point]]:
    def points(scrape: Scrape) -> Iterator[Point]:
        if scrape.status is not None and scrape.status.reload is not None:
            yield (), get(scrape.status.reload)

    return points


def _agent_families(version: str, timer: Callable[[], float]) -> list[Family]:
    """The agent itself."""

    def counter(name: str, text: str, labels: tuple[str, ...], points: Callable[[Scrape], Iterable[Point]]) -> Family:
        return Family(Spec(name, Kind.COUNTER, text, labels), points)

    def gauge(
        name: str, text: str, labels: tuple[str, ...], points: Callable[[Scrape], Iterable[Point]], unit: str = ""
    ) -> Family:
        return Family(Spec(name, Kind.GAUGE, text, labels, unit), points)

    probe, process = ("probe",), ("process",)
    return [
        counter("footlight_lost_events", "Records that were lost, by reason.", ("probe", "reason"), _losses),
        gauge("footlight_probe_up", "1 when the probe is attached, else 0.", probe, _per_probe(lambda p: int(p.up))),
        gauge(
            "footlight_probe_required",
            "1 when the agent is not ready without the probe, else 0: a GPU probe that is `auto`.",
            probe,
            _per_probe(lambda p: int(p.required)),
        ),
        counter(
            "footlight_probe_events",
            "Records the probe had to make.",
            probe,
            _per_probe(lambda p: None if p.name == "gpu" else p.events),  # NVML makes no records
        ),
        Family(
            Spec(
                "footlight_probe_cpu_seconds",
                Kind.COUNTER,
                "CPU time of the probe's programs, by the kernel's statistics.",
                probe,
                "seconds",
            ),
            _per_probe(lambda p: None if p.cpu_ns is None else p.cpu_ns / 1e9),
        ),
        gauge(
            "footlight_target_processes",
            "Processes of the service that are followed.",
            ("service_name",),
            _per_target(lambda t: t.processes),
        ),
        gauge(
            "footlight_target_ports",
            "Ports on which the service listens.",
            ("service_name",),
            _per_target(lambda t: t.ports),
        ),
        gauge(
            "footlight_connections_tracked",
            "Connections for which the reader holds state.",
            (),
            lambda scrape: [((), scrape.reader.connections)],
        ),
        counter(
            "footlight_paths",
            "Windows of requests whose critical path was walked; those of others are divided like theirs.",
            (),
            lambda scrape: [] if scrape.reader.paths is None else [((), scrape.reader.paths)],
        ),
        Family(
            Spec("footlight_path_cpu_seconds", Kind.COUNTER, "CPU time that critical paths took.", (), "seconds"),
            lambda scrape: [] if scrape.reader.path_cpu_ns is None else [((), scrape.reader.path_cpu_ns / 1e9)],
        ),
        counter(
            "footlight_reader_restarts",
            "Times that the reader died and was started again.",
            (),
            lambda scrape: [((), scrape.status.reader_restarts)] if scrape.status else (),
        ),
        Family(
            Spec(
                "footlight_process_cpu_seconds",
                Kind.COUNTER,
                "CPU time of the agent's processes, user and system.",
                process,
                "seconds",
            ),
            _per_process(lambda p: p.cpu_seconds),
        ),
        gauge(
            "footlight_process_resident_memory_bytes",
            "Resident memory of the agent's processes. Pages that both share count in both.",
            process,
            _per_process(lambda p: p.resident_bytes),
            "bytes",
        ),
        gauge(
            "footlight_process_proportional_memory_bytes",
            "Proportional set size of the agent's processes: shared pages are divided among their users.",
            process,
            _per_process(lambda p: p.proportional_bytes),
            "bytes",
        ),
        gauge(
            "footlight_config_last_reload_successful",
            "1 when the configuration of now is the file's, 0 when that one was refused. Absent without a file.",
            (),
            _reload(lambda reload: int(reload.successful)),
        ),
        gauge(
            "footlight_config_last_reload_success_timestamp_seconds",
            "When the configuration was last read and taken, since the epoch.",
            (),
            _reload(lambda reload: reload.successful_at),
            "seconds",
        ),
        Family(
            Spec("footlight_build", Kind.INFO, "What runs here.", ("version", "python_version")),
            lambda _: [((version, platform.python_version()), 1)],
        ),
        Family(
            Spec("footlight_transport", Kind.INFO, "How records leave the kernel: ring or perf.", ("transport",)),
            lambda scrape: [((scrape.status.transport,), 1)] if scrape.status else (),
        ),
        # The last one, so that it covers the work for all others.
        gauge(
            "footlight_scrape_duration_seconds",
            "How long this scrape took until this line.",
            (),
            lambda scrape: [((), timer() - scrape.began)],
            "seconds",
        ),
    ]


class Format(Enum):
    """The two exposition formats. The value is the content type."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


_QUALITY = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?")


def choose_format(accept: str) -> Format:
    """The format for an Accept header: OpenMetrics where it is asked for at least as much as plain text."""
    best = {Format.OPENMETRICS: 0.0, Format.TEXT: 0.0}
    for entry in accept.split(","):
        media, *parameters = (part.strip().lower() for part in entry.split(";"))
        named = dict(part.partition("=")[::2] for part in parameters)
        quality = named.get("q", "1")
        if not _QUALITY.fullmatch(quality):
            continue
        if media == "application/openmetrics-text" and named.get("version", "1.0.0") in {"0.0.1", "1.0.0"}:
            best[Format.OPENMETRICS] = max(best[Format.OPENMETRICS], float(quality))
        elif media in {"text/plain", "text/*", "*/*"}:
            best[Format.TEXT] = max(best[Format.TEXT], float(quality))
    asked = best[Format.OPENMETRICS] > 0 and best[Format.OPENMETRICS] >= best[Format.TEXT]
    return Format.OPENMETRICS if asked else Format.TEXT


def _float(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]  # the library has no types for this one
    return text


def _number(value: float) -> str:
    # Most samples are small whole numbers, and for them this takes a fifth of the time.
    if isinstance(value, int) and -1_000_000 < value < 1_000_000:
        return f"{value}.0"
    return _float(value)


def _bound_texts(spec: Spec) -> list[str]:
    return [_float(bound) for bound in (*spec.bounds, float("inf"))]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _braced(pairs: str) -> str:
    return f"{{{pairs}}}" if pairs else ""


def _pairs(labels: Iterable[tuple[str, str]]) -> str:
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in labels])


def _histogram_lines(
    name: str, labels: list[tuple[str, str]], bounds: Sequence[str], value: Histogram
) -> Iterator[str]:
    before = "".join(f"{_pairs([pair])}," for pair in labels if pair[0] < "le")
    after = "".join(f",{_pairs([pair])}" for pair in labels if pair[0] > "le")
    head, tail = f'{name}_bucket{{{before}le="', f'"{after}}} '
    count = 0
    for bound, count in zip(bounds, accumulate(value.counts), strict=True):
        yield f"{head}{bound}{tail}{_number(count)}\n"
    braced = _braced(_pairs(labels))
    yield f"{name}_count{braced} {_number(count)}\n"
    yield f"{name}_sum{braced} {_number(value.sum_ns / 1e9)}\n"


def _lines(family: Family, scrape: Scrape) -> Iterator[str]:
    spec = family.spec
    if spec.kind is Kind.HISTOGRAM:
        bounds = _bound_texts(spec)
    else:
        (name,) = spec.sample_names()
    for values, value in family.points(scrape):
        labels = sorted(zip(spec.labels, values, strict=True))
        if isinstance(value, Histogram):
            yield from _histogram_lines(spec.name, labels, bounds, value)
        else:
            yield f"{name}{_braced(_pairs(labels))} {_number(value)}\n"


def _head(spec: Spec, form: Format) -> str:
    if form is Format.OPENMETRICS:
        unit = f"# UNIT {spec.name} {spec.unit}\n" if spec.unit else ""
        return f"# HELP {spec.name} {spec.help}\n# TYPE {spec.name} {spec.kind.value}\n{unit}"
    kind = Kind.GAUGE if spec.kind is Kind.INFO else spec.kind
    return f"# HELP {spec.text_name()} {spec.help}\n# TYPE {spec.text_name()} {kind.value}\n"


def _library_family(spec: Spec, points: Iterable[Point]) -> Metric:
    """The same in prometheus_client's own types."""
    if spec.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels, unit=spec.unit)
        bounds = _bound_texts(spec)
        for values, value in points:
            assert isinstance(value, Histogram)
            buckets = list(zip(bounds, accumulate(value.counts), strict=True))
            histogram.add_metric(values, buckets, value.sum_ns / 1e9)
        return histogram
    if spec.kind is Kind.INFO:
        info = InfoMetricFamily(spec.name, spec.help)
        for values, _ in points:
            info.add_metric([], dict(zip(spec.labels, values, strict=True)))
        return info
    if spec.kind is Kind.SUMMARY:
        summary = Metric(spec.name, spec.help, "summary", spec.unit)
        for values, value in points:
            assert not isinstance(value, Histogram)
            summary.add_sample(spec.name, dict(zip(spec.labels, values, strict=True)), value)
        return summary
    family: CounterMetricFamily | GaugeMetricFamily = (
        CounterMetricFamily(spec.name, spec.help, labels=spec.labels, unit=spec.unit)
        if spec.kind is Kind.COUNTER
        else GaugeMetricFamily(spec.name, spec.help, labels=spec.labels, unit=spec.unit)
    )
    for values, value in points:
        assert not isinstance(value, Histogram)
        family.add_metric(values, value)
    return family


def _nothing() -> None:
    return None


def _no_points() -> Sequence[PointTotal]:
    return ()


def _no_reader() -> ReaderStatus:
    return ReaderStatus(connections=0)


@dataclass(frozen=True, slots=True)
class Sources:
    """What is asked at each scrape, beside the SLIs; every call must be quick.

    `status` is what the attacher reported last, `reader` what the reader knows of itself, `kernel` what the probes have
    counted for each service, `gpus` the last look at them, `engines` what the engines tell, `points` the probe points,
    `alerts` what the fast path tells, `health` what is normal.
    """

    status: Callable[[], AgentStatus | None] = _nothing
    reader: Callable[[], ReaderStatus] = _no_reader
    kernel: Callable[[], Mapping[str, NDArray[np.void]]] = dict
    gpus: Callable[[], GpuReport | None] = _nothing
    engines: Callable[[], EngineView | None] = _nothing
    points: Callable[[], Sequence[PointTotal]] = _no_points
    alerts: Callable[[], AlertReport | None] = _nothing
    health: Callable[[], Health | None] = _nothing


class Metrics:
    """Everything that /metrics says. `services` are names by the index that the kernel uses; `timer` is in seconds."""

    def __init__(
        self,
        slis: Slis,
        sources: Sources | None = None,
        services: Sequence[str] = (),
        objectives: SloStatus | None = None,
        version: str = VERSION,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._slis = slis
        self._sources = sources or Sources()
        self._objectives = objectives or SloStatus((), slis)
        self._services = services
        self._timer = timer
        self.version = version
        self.rebuild()
        # Registering makes the library compare the names, so that no two families can clash.
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def rebuild(self) -> None:
        """Make the families anew: the SLIs have other bounds."""
        self._families = [
            *_llm_families(self._slis),
            *slo_families(self._objectives),
            *engine_families(),
            *probe_point_families(),
            *kernel_families(),
            *gpu_families(),
            *cuda_families(),
            *_coverage_families(self._slis),
            *health_families(self._sources.health),
            *alert_families(),
            *_agent_families(self.version, self._timer),
        ]

    @property
    def specs(self) -> tuple[Spec, ...]:
        """What families there are, in the order of the text."""
        return tuple(family.spec for family in self._families)

    def _scrape(self) -> Scrape:
        began = self._timer()
        now_ns = self._slis.clock()
        self._slis.flush(now_ns)
        return Scrape(
            now_ns,
            began,
            self._slis.all_series(),
            self._sources.status(),
            self._sources.reader(),
            [safe(service) if service else "" for service in self._services],
            self._sources.kernel(),
            self._sources.gpus(),
            self._sources.engines(),
            self._sources.points(),
            self._sources.alerts(),
        )

    def describe(self) -> Iterator[Metric]:
        """The families without samples."""
        for family in self._families:
            yield _library_family(family.spec, ())

    def collect(self) -> Iterator[Metric]:
        """The families with fresh samples."""
        scrape = self._scrape()
        for family in self._families:
            yield _library_family(family.spec, family.points(scrape))

    def render(self, accept: str = "", names: Iterable[str] = ()) -> tuple[bytes, str]:
        """The text and its content type, in the format that suits the Accept header.

        `names` keeps only the families that have one of these names, or samples of one of these names; none keeps all.
        """
        form = choose_format(accept)
        wanted = frozenset(names)
        scrape = self._scrape()
        parts: list[str] = []
        for family in self._families:
            if wanted and wanted.isdisjoint((family.spec.name, *family.spec.sample_names())):
                continue
            parts.append(_head(family.spec, form))
            parts.extend(_lines(family, scrape))
        if form is Format.OPENMETRICS:
            parts.append("# EOF\n")
        return "".join(parts).encode(), form.value
