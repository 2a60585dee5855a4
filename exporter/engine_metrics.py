"""The llm_engine_* families: what engines tell of themselves, and how it differs from what the agent saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

from exporter.engines import Comparison, ModelView
from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.labels import safe
from probes.engine_metrics import EndpointReport
from probes.engine_page import Failure

_LABELS: Final = ("service_name", "model_name", "engine")
_SERVICE: Final = ("service_name",)


def _endpoints(scrape: Scrape) -> Sequence[EndpointReport]:
    view = scrape.engines
    return view.report.endpoints if view is not None and view.report is not None else ()


def _info(scrape: Scrape) -> Iterator[Point]:
    for endpoint in _endpoints(scrape):
        place = urlsplit(endpoint.url)
        for engine in sorted({model.engine for model in endpoint.models}):
            # Without what may be a secret, such as a token in the query.
            yield (safe(endpoint.service), engine, safe(f"{place.scheme}://{place.netloc}{place.path}")), 1


def _up(scrape: Scrape) -> Iterator[Point]:
    up: dict[str, bool] = {}
    for endpoint in _endpoints(scrape):
        if endpoint.known:
            up[endpoint.service] = up.get(endpoint.service, True) and endpoint.up
    for service, all_up in up.items():
        yield (safe(service),), int(all_up)


def _failures(scrape: Scrape) -> Iterator[Point]:
    view = scrape.engines
    if view is None or view.report is None:
        return
    for (service, failure), count in view.report.failures.items():
        more = view.overflows[safe(service)] if failure is Failure.TOO_MANY_SERIES else 0
        yield (safe(service), failure.value), count + more


def _durations(scrape: Scrape) -> Iterator[Point]:
    longest: dict[str, float] = {}
    for endpoint in _endpoints(scrape):
        longest[endpoint.service] = max(longest.get(endpoint.service, 0.0), endpoint.seconds)
    for service, seconds in longest.items():
        yield (safe(service),), seconds


def _per_model(name: str, kind: Kind, text: str, get: Callable[[ModelView], float | None], unit: str = "") -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for labels, model in sorted(scrape.engines.models.items()) if scrape.engines is not None else ():
            value = get(model)
            if value is not None:
                yield labels, value

    return Family(Spec(name, kind, text, _LABELS, unit), points)


def _gauge(name: str, text: str, get: Callable[[ModelView], float | None], unit: str = "") -> Family:
    return _per_model(f"llm_engine_{name}", Kind.GAUGE, text, get, unit)


def _counter(name: str, field: str, text: str, unit: str = "") -> Family:
    return _per_model(f"llm_engine_{name}", Kind.COUNTER, text, lambda model: model.totals.get(field), unit)


def _compared(name: str, text: str, get: Callable[[Comparison], float | None], unit: str = "") -> Family:
    return _gauge(name, text, lambda model: None if model.comparison is None else get(model.comparison), unit)


def engine_families() -> Sequence[Family]:
    """All of them, in the order of the page."""
    return [
        Family(
            Spec(
                "llm_engine",
                Kind.INFO,
                "Engines that tell their own metrics, and where.",
                (*_SERVICE, "engine", "endpoint"),
            ),
            _info,
        ),
        Family(
            Spec("llm_engine_up", Kind.GAUGE, "Whether every engine of the service told its metrics.", _SERVICE), _up
        ),
        Family(
            Spec(
                "llm_engine_scrape_failures",
                Kind.COUNTER,
                "Times that an engine's metrics were not had, or not all of them, by reason.",
                (*_SERVICE, "reason"),
            ),
            _failures,
        ),
        Family(
            Spec(
                "llm_engine_scrape_seconds",
                Kind.GAUGE,
                "What the slowest of the service's engines took to tell its metrics last.",
                _SERVICE,
                "seconds",
            ),
            _durations,
        ),
        _gauge("requests_running", "Requests that the engine works on, by its own metrics.", lambda m: m.running),
        _gauge("requests_waiting", "Requests that wait for the engine, by its own metrics.", lambda m: m.waiting),
        _gauge(
            "kv_cache_usage_ratio",
            "Part of the KV cache that is held, by the engine's own metrics.",
            lambda m: m.kv_usage_ratio,
            "ratio",
        ),
        _counter(
            "prefix_cache_queries",
            "prefix_queries",
            "Prompt tokens looked up in the prefix cache, by the engine's own metrics.",
        ),
        _counter(
            "prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache, by the engine's own metrics."
        ),
        _counter("preemptions", "preemptions", "Times a request lost its place in the KV cache to another one."),
        _counter("requests", "requests", "Requests that ended, by the engine's own metrics."),
        _counter("prompt_tokens", "prompt_tokens", "Prompt tokens, by the engine's own metrics.", "tokens"),
        _counter("generation_tokens", "generation_tokens", "Generated tokens, by the engine's own metrics.", "tokens"),
        _compared(
            "time_to_first_token_mean_seconds",
            "Mean time to first token by the engine's own metrics, last five minutes.",
            lambda c: c.ttft_mean_seconds,
            "seconds",
        ),
        _compared(
            "time_to_first_token_difference_seconds",
            "The engine's mean time to first token less the agent's, last five minutes.",
            lambda c: c.ttft_difference_seconds,
            "seconds",
        ),
        _compared(
            "requests_difference",
            "Requests that the engine counted less those that the agent saw, last five minutes.",
            lambda c: c.requests_difference,
        ),
    ]
