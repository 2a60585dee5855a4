"""Decides, for each model, whose word counts for what its KV cache served: one source's, never two for one request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from enum import Enum

from exporter.labels import UNKNOWN
from exporter.quantiles import WindowSums

SILENT_REQUESTS = 3
"""Complete answers without a word on cached tokens after which the wire is given up, where another source speaks."""
QUIET_NS = 60_000_000_000
"""How long the other sources wait for the wire's first word, from their own."""
ENGINE_FIRST_NS = 15_000_000_000
"""How long a probe point waits for the engine's first word, from its own: the engine is asked every 5 s."""


class Source(Enum):
    """Who says what was looked up and found. The value is the label value of `source`. The first that speaks counts."""

    WIRE = "wire"  # the usage of the responses
    ENGINE = "engine"  # the engine's own metrics
    PROBE_POINT = "probe_point"  # a function or USDT probe in the engine


class Turn(Enum):
    """How far a conversation has come. The value is the label value of `turn`: messages of the user."""

    FIRST = "1"
    EARLY = "2-4"
    LATE = "5+"


def turn_of(messages: int) -> Turn:
    """The turn of a conversation with this many messages of the user, at least one."""
    if messages <= 1:
        return Turn.FIRST
    return Turn.EARLY if messages <= 4 else Turn.LATE


class Lookups:
    """Prompt tokens that were looked up, and those of them that were found: since the start and over the window."""

    __slots__ = ("_window", "hits", "queries")

    def __init__(self) -> None:
        self.queries = 0
        self.hits = 0
        self._window = WindowSums(2)

    def add(self, queries: int, hits: int, now_ns: int) -> None:
        """Count tokens."""
        self.queries += queries
        self.hits += hits
        self._window.add(0, queries, now_ns)
        self._window.add(1, hits, now_ns)

    def ratio(self, now_ns: int) -> float | None:
        """Hits by queries over the window; None without queries, and where there were more hits than queries."""
        queries, hits = self._window.totals(now_ns)
        return hits / queries if queries and hits <= queries else None


class ModelCache:
    """The KV cache of one model of a service, by source and by turn. Made by `CacheSources`.

    `source` is None until it is decided, and then for good.
    """

    __slots__ = ("_may_count", "by_source", "by_turn", "first_ns", "labels", "seen", "silent", "source")

    def __init__(self, labels: tuple[str, str], may_count: Callable[[ModelCache, Source], bool]) -> None:
        self.labels = labels  # service_name, model_name
        self.source: Source | None = None
        self.by_source: defaultdict[Source, Lookups] = defaultdict(Lookups)
        self.by_turn: defaultdict[Turn, Lookups] = defaultdict(Lookups)
        self.first_ns: dict[Source, int] = {}  # when a source told of a first query
        self.seen = False  # one of its requests was followed to its end
        self.silent = 0  # of those, complete ones that said nothing of the cache
        self._may_count = may_count

    def take_silence(self, whole: bool) -> None:
        """A request is over that told nothing of the cache. `whole`: it had the chance to."""
        self.seen = True
        self.silent += whole

    def take_usage(self, queries: int, hits: int, turn: int | None, now_ns: int) -> bool:
        """A request is over, and its usage told of the cache. Returns whether that counts: the wire is the source.

        `turn` is how many messages of the user its conversation has, where that is known.
        """
        self.seen = True
        self.add(Source.WIRE, queries, hits, now_ns)
        if turn is not None:
            self.by_turn[turn_of(turn)].add(queries, hits, now_ns)
        if self.source is None and self._may_count(self, Source.WIRE):
            self.source = Source.WIRE
        return self.source is Source.WIRE

    def add(self, source: Source, queries: int, hits: int, now_ns: int) -> None:
        """Count what a source tells."""
        self.by_source[source].add(queries, hits, now_ns)
        if queries:
            self.first_ns.setdefault(source, now_ns)

    def counted(self) -> Lookups | None:
        """What the source that counts has told, where that is not the wire: its counts have more labels."""
        if self.source is None or self.source is Source.WIRE:
            return None
        return self.by_source.get(self.source)

    def choice(self, now_ns: int) -> Source | None:
        """Which other source than the wire it is time to choose; None: none, or not yet."""
        engine, point = self.first_ns.get(Source.ENGINE), self.first_ns.get(Source.PROBE_POINT)
        first_ns = min((ns for ns in (engine, point) if ns is not None), default=None)
        if first_ns is None:
            return None
        if self.silent < SILENT_REQUESTS and now_ns - first_ns < QUIET_NS:
            return None
        if engine is not None:
            return Source.ENGINE
        return Source.PROBE_POINT if now_ns - first_ns >= ENGINE_FIRST_NS else None


class CacheSources:
    """All models' caches. `label` gives service_name and model_name for names as a source tells them.

    The wire counts as soon as one usage of the model tells cached tokens. Where `SILENT_REQUESTS` complete answers told
    none, or no request told any within `QUIET_NS`, it is the engine, and where that is silent too, a probe point. What
    was told before the decision is kept and counted then.

    A model of which no request was ever seen may be another one by a second name (an alias, an adapter's base), and one
    without a name may be any. What is told of them may be about requests that another source tells of by another name.
    So they and the other models of their service are never counted by different sources: the first decision holds.
    """

    def __init__(self, label: Callable[[str, str | None], tuple[str, str]]) -> None:
        self._label = label
        self._services: dict[str, dict[str, ModelCache]] = {}

    def model(self, service_name: str, model_name: str) -> ModelCache:
        """The cache of a model, by its labels."""
        models = self._services.setdefault(service_name, {})
        found = models.get(model_name)
        if found is None:
            found = models[model_name] = ModelCache((service_name, model_name), self._may_count)
        return found

    def add(self, source: Source, service: str, model: str | None, queries: int, hits: int, now_ns: int) -> None:
        """Count `queries` tokens looked up and `hits` found since the last call, as the engine or a probe point says.

        `model` is None where the source does not say. Negative numbers are no counts, and ignored.
        """
        if queries < 0 or hits < 0 or (queries == 0 and hits == 0):
            return
        cache = self.model(*self._label(service, model))
        cache.add(source, queries, hits, now_ns)
        self._decide(cache, now_ns)

    def settle(self, now_ns: int) -> None:
        """Decide what time alone decides. Call it before reading."""
        for cache in self.models():
            self._decide(cache, now_ns)

    def models(self) -> Iterator[ModelCache]:
        """Every model's cache, in the order of its labels."""
        for _, models in sorted(self._services.items()):
            for _, cache in sorted(models.items()):
                yield cache

    def find(self, service_name: str, model_name: str) -> ModelCache | None:
        """The cache of a model, by its labels; None where nothing was ever told of it."""
        return self._services.get(service_name, {}).get(model_name)

    def _decide(self, cache: ModelCache, now_ns: int) -> None:
        if cache.source is not None:
            return
        choice = cache.choice(now_ns)
        if choice is not None and self._may_count(cache, choice):
            cache.source = choice

    def _may_count(self, cache: ModelCache, source: Source) -> bool:
        service, name = cache.labels
        return not any(
            other.source not in (None, source) and (_may_be_another(cache) or _may_be_another(other))
            for model, other in self._services[service].items()
            if model != name
        )


def _may_be_another(cache: ModelCache) -> bool:
    """Tell whether what is told of this model may be about requests that were seen under another name."""
    return not cache.seen or cache.labels[1] == UNKNOWN
