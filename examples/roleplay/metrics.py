"""The service's own metrics, under the names that vLLM gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from examples.roleplay.kv_cache import BLOCK_TOKENS
from examples.roleplay.model import ModelShape
from examples.roleplay.protocol import Finished, Step
from examples.roleplay.scheduler import Reason

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_LABELS: Final = ("model_name", "engine")
_ENGINE: Final = "0"
_TTFT: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_ITL: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_STEP_SIZES: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServiceMetrics:
    """Every metric of every model. All series exist from the start."""

    def __init__(self, shapes: Iterable[ModelShape], *, prefix_cache: bool) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped upstream
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", text, (*_LABELS, *more), registry=self._registry)

        def gauge(name: str, text: str, *more: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, (*_LABELS, *more), registry=self._registry)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self._registry)

        self._running = gauge("num_requests_running", "Requests in the batch.")
        self._waiting = gauge("num_requests_waiting", "Requests waiting to get into the batch.")
        self._kv_used = gauge("kv_cache_usage_perc", "Held KV-cache blocks over all blocks, 0 to 1.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = counter("num_preemptions", "Times a request lost its blocks to another one.")
        self._prompt = counter("prompt_tokens", "Prompt tokens of admitted requests, cached ones included.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._success = counter("request_success", "Requests by the reason of their end.", "finished_reason")
        self._step_tokens = histogram("iteration_tokens_total", "Tokens computed in one engine step.", _STEP_SIZES)
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _SIZES)
        self._reply_sizes = histogram("request_generation_tokens", "Generated tokens of a request.", _SIZES)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", _SIZES)
        self._ttft = histogram("time_to_first_token_seconds", "From the API's receipt to the first token.", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Between two successive tokens of a request.", _ITL)
        self._tpot = histogram("request_time_per_output_token_seconds", "Decode time over tokens but the first.", _ITL)
        self._e2e = histogram("e2e_request_latency_seconds", "From the API's receipt to the last token.", _LATENCY)
        self._queued = histogram("request_queue_time_seconds", "From queued to scheduled.", _LATENCY)
        self._prefill = histogram("request_prefill_time_seconds", "From scheduled to the first token.", _LATENCY)
        self._decode = histogram("request_decode_time_seconds", "From the first to the last token.", _LATENCY)
        self._inference = histogram("request_inference_time_seconds", "From scheduled to the last token.", _LATENCY)
        self._config = gauge(
            "cache_config_info",
            "The KV cache's configuration.",
            "block_size",
            "num_gpu_blocks",
            "enable_prefix_caching",
        )
        for shape in shapes:
            self._create(shape, prefix_cache=prefix_cache)

    def render(self) -> bytes:
        """Return everything in the Prometheus text format.

        Never OpenMetrics: prometheus_client writes names with colons wrongly there (its issue 1177).
        """
        return generate_latest(self._registry)

    def received(self, model: str, max_tokens: int) -> None:
        """A request was passed to its engine."""
        self._max_tokens.labels(model, _ENGINE).observe(max_tokens)

    def first_token(self, model: str, seconds: float) -> None:
        """The first token came `seconds` after the request."""
        self._ttft.labels(model, _ENGINE).observe(seconds)

    def next_token(self, model: str, seconds: float) -> None:
        """Another token came `seconds` after the one before."""
        self._itl.labels(model, _ENGINE).observe(seconds)

    def ended(self, model: str, seconds: float) -> None:
        """A request got all its tokens `seconds` after it was received."""
        self._e2e.labels(model, _ENGINE).observe(seconds)

    def broke(self, model: str) -> None:
        """A request ended because its engine or the service did."""
        self._success.labels(model, _ENGINE, "error").inc()

    def step(self, model: str, step: Step) -> None:
        """Take in an engine's step."""
        gauges = step.gauges
        self._running.labels(model, _ENGINE).set(gauges.running)
        self._waiting.labels(model, _ENGINE).set(gauges.waiting)
        self._kv_used.labels(model, _ENGINE).set(gauges.kv_used_ratio)
        self._queries.labels(model, _ENGINE).inc(step.prefix_queries)
        self._hits.labels(model, _ENGINE).inc(step.prefix_hits)
        self._preemptions.labels(model, _ENGINE).inc(step.preemptions)
        if step.computed_tokens:
            self._step_tokens.labels(model, _ENGINE).observe(step.computed_tokens)
        self._generated.labels(model, _ENGINE).inc(len(step.tokens))
        for finished in step.finished:
            self._finished(model, finished)

    def _finished(self, model: str, finished: Finished) -> None:
        self._success.labels(model, _ENGINE, finished.reason).inc()
        if finished.queued_s is not None:
            self._queued.labels(model, _ENGINE).observe(finished.queued_s)
            self._prompt.labels(model, _ENGINE).inc(finished.prompt_tokens)
        if finished.reason == Reason.ABORT.value:
            return
        self._prompt_sizes.labels(model, _ENGINE).observe(finished.prompt_tokens)
        self._reply_sizes.labels(model, _ENGINE).observe(finished.completion_tokens)
        if finished.prefill_s is not None and finished.decode_s is not None:
            self._prefill.labels(model, _ENGINE).observe(finished.prefill_s)
            self._decode.labels(model, _ENGINE).observe(finished.decode_s)
            self._inference.labels(model, _ENGINE).observe(finished.prefill_s + finished.decode_s)
            if finished.completion_tokens > 1:
                per_token = finished.decode_s / (finished.completion_tokens - 1)
                self._tpot.labels(model, _ENGINE).observe(per_token)

    def _create(self, shape: ModelShape, *, prefix_cache: bool) -> None:
        for metric in (
            self._running, self._waiting, self._kv_used, self._queries, self._hits, self._preemptions, self._prompt,
            self._generated, self._step_tokens, self._prompt_sizes, self._reply_sizes, self._max_tokens, self._ttft,
            self._itl, self._tpot, self._e2e, self._queued, self._prefill, self._decode, self._inference,
        ):  # fmt: skip
            metric.labels(shape.name, _ENGINE)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(shape.name, _ENGINE, reason)
        self._config.labels(shape.name, _ENGINE, str(BLOCK_TOKENS), str(shape.blocks), str(prefix_cache)).set(1)
