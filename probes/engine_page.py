"""Reads what a language-model engine tells of itself from its page of metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

LINE_LIMIT: Final = 4096
"""Bytes of a line that is read. A longer one with a wanted name counts as a sample that could not be read."""
SERIES_LIMIT: Final = 2048
"""Samples with a wanted name on one page."""
WANTED_LIMIT: Final = 1 << 18
"""Bytes of the wanted lines of one page that are read: where they are hostile, parsing so many takes 0.2 s."""
MODELS_LIMIT: Final = 64
"""Models that one page may tell of."""
LARGEST: Final = 2.0**53
"""No number may be larger: up to here a float holds every whole number."""

_CARRY_LIMIT: Final = 1 << 20
_METRICS: Final = re.compile(rb"(?:#|[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{|[ \t]+[-+0-9IN]))")

Labels = tuple[tuple[str, str], ...]


class Failure(Enum):
    """Why a page told nothing, or not all. The value is the label value of `reason`."""

    TIMEOUT = "timeout"
    """It did not come whole in its time."""
    REFUSED = "refused"
    """Nobody listens there."""
    UNREACHABLE = "unreachable"
    """No way there, no such host, or the connection broke before an answer."""
    TLS = "tls"
    """The encryption failed, as it does with a certificate that nobody vouches for."""
    NOT_HTTP = "not_http"
    HTTP_STATUS = "http_status"
    """The answer was none of 200."""
    REDIRECT = "redirect"
    """It was sent on to another host, or more than once."""
    NOT_METRICS = "not_metrics"
    """Neither by its type nor by its first line a page of metrics in the text format, or compressed unasked."""
    TOO_LARGE = "too_large"
    TRUNCATED = "truncated"
    """It ended before its length, or in the middle of a line. What is missing is not known: none of it is used."""
    TOO_MANY_SERIES = "too_many_series"
    UNKNOWN_ENGINE = "unknown_engine"
    """Metrics, but of no engine that is understood."""
    BAD_SAMPLE = "bad_sample"
    """A wanted sample could not be read, came twice, or is no possible value. The page's other figures are used."""
    NOT_ASKED = "not_asked"
    """There are more endpoints than are asked."""


class Figure(Enum):
    """What an engine may tell. The value is the field of `EngineModel`."""

    RUNNING = "running"
    WAITING = "waiting"
    KV_USAGE = "kv_usage_ratio"
    PREFIX_QUERIES = "prefix_queries"
    PREFIX_HITS = "prefix_hits"
    PREEMPTIONS = "preemptions"
    REQUESTS = "requests"
    TTFT_SUM = "ttft_sum_seconds"
    TTFT_COUNT = "ttft_count"
    PROMPT_TOKENS = "prompt_tokens"
    GENERATION_TOKENS = "generation_tokens"


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What an engine tells of one model. None is what it does not tell.

    `model` is None where the engine's metrics name no model. `running` and `waiting` are numbers of requests now,
    `kv_usage_ratio` is between 0 and 1. The rest counts from the engine's start: `prefix_queries` and `prefix_hits`
    are tokens looked up and found in the prefix cache, `ttft_*` its times to first token. Strings are as on the page.
    """

    engine: str
    model: str | None
    running: float | None = None
    waiting: float | None = None
    kv_usage_ratio: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None
    preemptions: float | None = None
    requests: float | None = None
    ttft_sum_seconds: float | None = None
    ttft_count: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a figure is: the sum of `names`, of which the first has to be on the page.

    Names are without `_total` and with `_` for `:`. `where` is the label and value that a sample must have.
    """

    names: tuple[str, ...]
    where: tuple[str, str] | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one engine names its figures: for each the sources, the first that is on the page counts.

    Samples that differ only in the labels `copies` tell the same thing again.
    """

    engine: str
    sources: Mapping[Figure, tuple[Source, ...]]
    copies: frozenset[str] = frozenset()


def _adapter(engine: str, copies: Iterable[str] = (), **figures: str | tuple[Source, ...]) -> Adapter:
    """`figures` by their field; as text, names that are taken in that order."""
    return Adapter(
        engine,
        {
            Figure(field): tuple(Source((name,)) for name in what.split()) if isinstance(what, str) else what
            for field, what in figures.items()
        },
        frozenset(copies),
    )


ADAPTERS: Final = (
    # gpu_prefix_cache_*, as older versions have it, counted blocks and then tokens under one name: it is not taken.
    _adapter(
        "vllm",
        running="vllm_num_requests_running",
        waiting="vllm_num_requests_waiting",
        kv_usage_ratio="vllm_kv_cache_usage_perc vllm_gpu_cache_usage_perc",
        prefix_queries="vllm_prefix_cache_queries",
        prefix_hits="vllm_prefix_cache_hits",
        preemptions="vllm_num_preemptions",
        requests="vllm_request_success",
        ttft_sum_seconds="vllm_time_to_first_token_seconds_sum",
        ttft_count="vllm_time_to_first_token_seconds_count",
        prompt_tokens="vllm_prompt_tokens",
        generation_tokens="vllm_generation_tokens",
    ),
    _adapter(
        "sglang",
        ("tp_rank", "pp_rank", "moe_ep_rank"),
        running="sglang_num_running_reqs",
        waiting="sglang_num_queue_reqs",
        kv_usage_ratio="sglang_token_usage",
        prefix_queries="sglang_prompt_tokens",
        prefix_hits="sglang_cached_tokens",
        preemptions="sglang_num_retracted_requests",
        requests="sglang_num_requests",
        ttft_sum_seconds="sglang_time_to_first_token_seconds_sum",
        ttft_count="sglang_time_to_first_token_seconds_count",
        prompt_tokens="sglang_prompt_tokens",
        generation_tokens="sglang_generation_tokens",
    ),
    _adapter(
        "tensorrt_llm",
        running="trtllm_num_requests_running",
        waiting="trtllm_num_requests_waiting",
        kv_usage_ratio="trtllm_kv_cache_utilization",
        prefix_queries="trtllm_prompt_tokens",
        prefix_hits="trtllm_prompt_cached_tokens",
        requests=(Source(("trtllm_request_success", "trtllm_request_error")),),
        ttft_sum_seconds="trtllm_time_to_first_token_seconds_sum",
        ttft_count="trtllm_time_to_first_token_seconds_count",
        prompt_tokens="trtllm_prompt_tokens",
        generation_tokens="trtllm_generation_tokens",
    ),
    _adapter(
        "triton",
        running=(Source(("nv_trt_llm_request_metrics",), ("request_type", "scheduled")),),
        waiting=(
            Source(("nv_trt_llm_request_metrics",), ("request_type", "waiting")),
            Source(("nv_inference_pending_request_count",)),
        ),
        kv_usage_ratio=(Source(("nv_trt_llm_kv_cache_block_metrics",), ("kv_cache_block_type", "fraction")),),
        requests=(Source(("nv_inference_request_success", "nv_inference_request_failure")),),
        ttft_sum_seconds=(Source(("nv_inference_first_response_histogram_ms_sum",), scale=1e-3),),
        ttft_count="nv_inference_first_response_histogram_ms_count",
    ),
    _adapter(
        "tgi",
        running="tgi_batch_current_size",
        waiting="tgi_queue_size",
        requests=(Source(("tgi_request_success", "tgi_request_failure")),),
        prompt_tokens="tgi_request_input_length_sum",
        generation_tokens="tgi_request_generated_tokens_sum",
    ),
    _adapter(
        "llama_cpp",
        running="llamacpp_requests_processing",
        waiting="llamacpp_requests_deferred",
        kv_usage_ratio="llamacpp_kv_cache_usage_ratio",
        prompt_tokens="llamacpp_prompt_tokens",
        generation_tokens="llamacpp_tokens_predicted",
    ),
)
"""Every engine that is understood. docs/engines.md is the same table with its sources; a test holds them together."""

MODEL_LABELS: Final = ("model_name", "model")
RATIOS: Final = frozenset({Figure.KV_USAGE})

_WANTED: Final = frozenset(
    name for adapter in ADAPTERS for sources in adapter.sources.values() for source in sources for name in source.names
)
_RATIO_NAMES: Final = frozenset(
    name
    for adapter in ADAPTERS
    for figure in RATIOS
    for source in adapter.sources.get(figure, ())
    for name in source.names
    if source.where is None
)
# A line break in front lets the search jump from line to line.
_WANTED_LINE: Final = re.compile(
    b"\n(("
    + b"|".join(name.replace("_", "[:_]", 1).encode() for name in sorted(_WANTED, reverse=True))
    + b")(?:_total)?)(?=[ \t{])([^\n]*)"
)


def _normal(name: str) -> str:
    return name.replace(":", "_").removesuffix("_total")


class PageReader:
    """Takes the pieces of a page in order, and keeps only the samples wanted. Never raises, whatever they hold.

    `bad_samples` are those that could not be taken.
    """

    def __init__(self) -> None:
        self.bad_samples = 0
        self._carry = b"\n"  # what the last piece began and did not end, with the line break before it
        self._is_metrics = False
        self._kept = 0
        self._room = WANTED_LIMIT
        # By name, then by its spelling, then by labels; None is a value that cannot be taken.
        self._samples: dict[str, dict[str, dict[Labels, float | None]]] = {}
        self._broken: set[str] = set()

    def feed(self, piece: bytes) -> Failure | None:
        """Take a piece, best of some 64 KiB: the page may be dropped where it returns a failure."""
        data = self._carry + piece
        if not self._is_metrics:
            text = data.lstrip()
            if b"\n" in text or len(text) > LINE_LIMIT:
                if not _METRICS.match(text):
                    return Failure.NOT_METRICS
                self._is_metrics = True
        end = data.rfind(b"\n")
        self._carry = data[end:]
        if len(self._carry) > _CARRY_LIMIT:
            return Failure.TOO_LARGE
        for found in _WANTED_LINE.finditer(data, 0, end):
            self._kept += 1
            size = len(found[0])
            self._room -= size if size <= LINE_LIMIT else 0  # a longer one is not looked into
            if self._kept > SERIES_LIMIT or self._room < 0:
                return Failure.TOO_MANY_SERIES
            self._take(found)
        return None

    def finish(self) -> tuple[EngineModel, ...] | Failure:
        """What the page told, when all of it was fed: engines in the order of `ADAPTERS`, their models by name.

        A figure of which one sample could not be taken is None: a sum without it would be another number.
        """
        if not self._is_metrics and self._carry.strip() and not _METRICS.match(self._carry.lstrip()):
            return Failure.NOT_METRICS
        if self._carry != b"\n":
            return Failure.TRUNCATED
        told = [model for adapter in ADAPTERS for model in self._models(adapter)]
        if len(told) > MODELS_LIMIT:
            return Failure.TOO_MANY_SERIES
        return tuple(told) or Failure.UNKNOWN_ENGINE

    def _take(self, found: re.Match[bytes]) -> None:
        spelling = found[1].decode("ascii")
        name = _normal(spelling)
        try:
            if len(found[0]) > LINE_LIMIT:
                raise ValueError("too long")
            line = (found[1] + found[3]).decode()
            ((sample,),) = [family.samples for family in text_string_to_metric_families(line)]
            labels = tuple(sorted(sample.labels.items()))
            value = float(sample.value)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError):
            # The library promises no errors of its own; these are all that looking at its source finds.
            self.bad_samples += 1
            self._broken.add(name)
            return
        taken = self._samples.setdefault(name, {}).setdefault(spelling, {})
        highest = 1.0 if name in _RATIO_NAMES else LARGEST
        good = labels not in taken and math.isfinite(value) and 0 <= value <= highest
        self.bad_samples += not good
        taken[labels] = value if good else None

    def _models(self, adapter: Adapter) -> Iterator[EngineModel]:
        by_model: dict[str | None, dict[str, float | None]] = {}
        for figure, sources in adapter.sources.items():
            for model, value in self._figure(adapter, figure, sources).items():
                by_model.setdefault(model, {})[figure.value] = value
        for model, figures in sorted(by_model.items(), key=lambda item: item[0] or ""):
            yield EngineModel(adapter.engine, model, **figures)

    def _figure(self, adapter: Adapter, figure: Figure, sources: Iterable[Source]) -> Mapping[str | None, float | None]:
        for source in sources:
            if source.names[0] in self._broken:
                return {}
            parts = [self._by_model(adapter, figure, source, name) for name in source.names]
            if not parts[0]:
                continue
            if any(name in self._broken for name in source.names):
                return {}
            return {model: _added([part[model] for part in parts if model in part]) for model in parts[0]}
        return {}

    def _by_model(
        self, adapter: Adapter, figure: Figure, source: Source, name: str
    ) -> Mapping[str | None, float | None]:
        # An engine that is changing its names may tell the same under both; the first is as good as the other.
        spellings = self._samples.get(name)
        if not spellings:
            return {}
        ranks: dict[str | None, dict[Labels, list[float | None]]] = {}
        for labels, value in next(iter(spellings.values())).items():
            if source.where is not None and source.where not in labels:
                continue
            model = next((value for label in MODEL_LABELS for key, value in labels if key == label and value), None)
            rank = tuple(pair for pair in labels if pair[0] not in adapter.copies)
            scaled = None if value is None else value * source.scale
            if figure in RATIOS and scaled is not None and scaled > 1:
                scaled = None
            ranks.setdefault(model, {}).setdefault(rank, []).append(scaled)
        combine = _mean if figure in RATIOS else _added
        return {model: combine([_highest(copies) for copies in of_model.values()]) for model, of_model in ranks.items()}


def _combined(values: Iterable[float | None], combine: Callable[[list[float]], float]) -> float | None:
    known = list(values)
    return None if None in known else combine([value for value in known if value is not None])


def _added(values: Iterable[float | None]) -> float | None:
    return _combined(values, math.fsum)


def _highest(values: Iterable[float | None]) -> float | None:
    return _combined(values, max)


def _mean(values: Iterable[float | None]) -> float | None:
    return _combined(values, lambda known: math.fsum(known) / len(known))
