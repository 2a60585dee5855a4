"""The families of the KV cache: what was looked up and found, by whose word, and how far the conversation had come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.kv_cache import Source, Turn
from exporter.slis import Histogram, Series, Slis

if TYPE_CHECKING:
    from exporter.kv_cache import Lookups

ALL: Final = "_all"
"""Value of `api` and of the configured labels where a source does not tell requests apart."""


def cache_families(slis: Slis) -> Sequence[Family]:
    """All of them. The first three have the labels of the requests' families."""
    labels = ("service_name", "model_name", "api", *slis.label_names)
    every = (ALL,) * (len(labels) - 2)

    def counted(
        wire: Callable[[Series, int], float | Histogram | None], others: Callable[[Lookups, int], float | None]
    ) -> Callable[[Scrape], Iterator[Point]]:
        def points(scrape: Scrape) -> Iterator[Point]:
            for series in scrape.series:
                value = wire(series, scrape.now_ns)
                if value is not None:
                    yield series.labels, value
            for cache in slis.caches.models():
                told = cache.counted()
                more = None if told is None else others(told, scrape.now_ns)
                if more is not None:
                    yield (*cache.labels, *every), more

        return points

    def sources(_: Scrape) -> Iterator[Point]:
        for cache in slis.caches.models():
            if cache.source is not None:
                yield (*cache.labels, cache.source.value), 1

    def by_source(get: Callable[[Lookups], int]) -> Callable[[Scrape], Iterator[Point]]:
        def points(_: Scrape) -> Iterator[Point]:
            for cache in slis.caches.models():
                for source in Source:
                    if source in cache.by_source:
                        yield (*cache.labels, source.value), get(cache.by_source[source])

        return points

    def by_turn(get: Callable[[Lookups, int], float | None]) -> Callable[[Scrape], Iterator[Point]]:
        def points(scrape: Scrape) -> Iterator[Point]:
            for cache in slis.caches.models():
                for turn in Turn:
                    value = get(cache.by_turn[turn], scrape.now_ns) if turn in cache.by_turn else None
                    if value is not None:
                        yield (*cache.labels, turn.value), value

        return points

    source_labels = ("service_name", "model_name", "source")
    turn_labels = ("service_name", "model_name", "turn")
    return (
        Family(
            Spec(
                "llm_prefix_cache_queries",
                Kind.COUNTER,
                "Prompt tokens that were looked up in the KV cache, by the one source that counts for the model.",
                labels,
            ),
            counted(lambda series, _: series.cache_queries, lambda told, _: told.queries),
        ),
        Family(
            Spec(
                "llm_prefix_cache_hits",
                Kind.COUNTER,
                "Prompt tokens that were served from the KV cache, by the one source that counts for the model.",
                labels,
            ),
            counted(lambda series, _: series.cache_hits, lambda told, _: told.hits),
        ),
        Family(
            Spec(
                "llm_kv_cache_hit_ratio",
                Kind.GAUGE,
                "Prefix cache hits by queries, last 5 minutes.",
                labels,
                "ratio",
            ),
            counted(Series.cache_hit_ratio, lambda told, now_ns: told.ratio(now_ns)),
        ),
        Family(
            Spec(
                "llm_kv_cache_source",
                Kind.INFO,
                "Whose word counts for the model's KV cache: wire (usage), engine (its metrics) or probe_point.",
                source_labels,
            ),
            sources,
        ),
        Family(
            Spec(
                "llm_kv_cache_source_lookup_tokens",
                Kind.COUNTER,
                "Prompt tokens looked up in the KV cache by what each source says, whether it counts or not.",
                source_labels,
                "tokens",
            ),
            by_source(lambda told: told.queries),
        ),
        Family(
            Spec(
                "llm_kv_cache_source_hit_tokens",
                Kind.COUNTER,
                "Prompt tokens served from the KV cache by what each source says, whether it counts or not.",
                source_labels,
                "tokens",
            ),
            by_source(lambda told: told.hits),
        ),
        Family(
            Spec(
                "llm_prefix_cache_turn_queries",
                Kind.COUNTER,
                "Prompt tokens looked up in the KV cache by messages of the user in the conversation, by usage.",
                turn_labels,
            ),
            by_turn(lambda told, _: told.queries),
        ),
        Family(
            Spec(
                "llm_prefix_cache_turn_hits",
                Kind.COUNTER,
                "Prompt tokens served from the KV cache by messages of the user in the conversation, by usage.",
                turn_labels,
            ),
            by_turn(lambda told, _: told.hits),
        ),
        Family(
            Spec(
                "llm_kv_cache_turn_hit_ratio",
                Kind.GAUGE,
                "Prefix cache hits by queries by messages of the user in the conversation, by usage, last 5 minutes.",
                turn_labels,
                "ratio",
            ),
            by_turn(lambda told, now_ns: told.ratio(now_ns)),
        ),
    )
