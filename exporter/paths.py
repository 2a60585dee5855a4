"""Why requests took their time: which of them get a critical path, and what all of them together come to.

A path costs some microseconds a step and may have thousands, so not every request gets one on a busy host: the slow
ones do (above the 95th percentile of their series' last five minutes, or over their objective), and of the others as
many as the budget allows, chosen at random. What a request without a path took is divided by the causes of those of its
series that had one in the same round, so that the parts of `llm_latency_cause_seconds_total` always add up to what all
requests took.

A path is walked soon after its token was seen, because the records that it needs are kept for seconds only. So a long
decode phase is walked in stretches, each from one token to an earlier one, for a bounded number of requests at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

from exporter.critical_path import Cause, Step, Window, Worker, totals, walk_on
from exporter.request import Causes, FinishedRequest
from exporter.slis import CausePhase, Sli
from exporter.why import Explained

if TYPE_CHECKING:
    from exporter.live_request import Request
    from exporter.slis import Series
    from exporter.timeline import Timeline, View

PATHS_PER_SECOND: Final = 50
"""Paths that requests which are not slow may cost."""
SLOW_PATHS_PER_SECOND: Final = 64
"""Paths of slow requests, which is 5 % of 1,280 a second; what is slow beyond that is treated as the others."""
DECODES: Final = 32
"""Requests whose decode phase is followed at a time."""
CPU_SHARE: Final = 0.02
"""Part of a CPU that paths may use, however long they are, where the config does not say."""
CPU_BURST_NS: Final = 50_000_000
"""And at the most at once, give or take a path."""
DECODE_BURST_NS: Final = CPU_BURST_NS // 2
"""Of that for decode phases: one second of a busy loop is a thousand steps, a time to the first token mostly ten."""
STRETCH_NS: Final = 1_000_000_000
"""A decode phase is walked when this much of it is new."""
SLOW_QUANTILE: Final = 0.95
SLOW_MARGIN: Final = 1.02
"""A quantile is read off within 1 %: of requests that all take the same, none is to be slow."""
SLOW_KEPT: Final = 256
OTHERS_KEPT: Final = 128
KEPT_NS: Final = 300_000_000_000
"""How long a path is kept for those who ask."""
STEPS_KEPT: Final = 40_000
"""Of all paths together, those of requests under way included: 250 bytes each, 10 MB. One path can have 4,000."""
CARRIED_NS: Final = 60_000_000_000
"""How long requests wait for one of their series that has a path."""

_QUANTILE_EVERY_NS: Final = 1_000_000_000
_HOLDERS: Final = frozenset({Cause.on_cpu, Cause.lock})  # their detail is a thread
_Key = tuple["Series", CausePhase, bool]


@dataclasses.dataclass(slots=True)
class _Followed:
    """A request whose first token was seen and whose end was not."""

    request: Request
    series: Series
    slow: bool = False
    ttft: Mapping[Cause, int] | None = None
    """Where its time to the first token went; None where it has no path."""
    steps: tuple[Step, ...] = ()
    decode: Counter[Cause] = dataclasses.field(default_factory=Counter)
    decode_until_ns: int = 0
    """Where the next stretch of its decode phase begins, where that is, or was, followed."""
    workers: Sequence[Worker] = ()
    """Who worked for it when it was last walked."""

    def begins_ns(self) -> int:
        """How far back the next stretch of its decode phase looks."""
        return min([self.decode_until_ns, *(worker.at_ns for worker in self.workers)])


class _Budget:
    """So many paths a second, and at most a second's worth of them at once."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._left = float(per_second)

    def refill(self, elapsed_ns: int) -> None:
        self._left = min(self._left + self._per_second * elapsed_ns / 1e9, self._per_second)

    def take(self) -> bool:
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _no_objective(_series: Series, _sli: Sli) -> float | None:
    return None


class Paths:
    """Walks the paths of requests over a `timeline`.

    `on_finished` gets each finished request, with its causes where it has a path; `on_explained` after it the path.
    `threshold` is the objective of a latency of a series, in seconds. `cpu_share` is the part of a
    CPU that paths may use. `chance` chooses among requests. `cpu_clock` is the CPU time of this thread in ns.
    """

    def __init__(
        self,
        timeline: Timeline,
        on_finished: Callable[[FinishedRequest], None],
        on_explained: Callable[[Explained], None],
        threshold: Callable[[Series, Sli], float | None] = _no_objective,
        cpu_share: float = CPU_SHARE,
        chance: random.Random | None = None,
        cpu_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._timeline = timeline
        self._on_finished = on_finished
        self._on_explained = on_explained
        self._threshold = threshold
        self._chance = chance or random.Random()
        self._started: list[_Followed] = []
        self._ended: list[FinishedRequest] = []
        self._followed: dict[int, _Followed] = {}
        self._decoding: dict[int, _Followed] = {}
        """Those whose decode phase is followed."""
        self._budget = _Budget(PATHS_PER_SECOND)
        self._slow_budget = _Budget(SLOW_PATHS_PER_SECOND)
        self._last_round_ns: int | None = None
        self._slow_above: dict[Series, tuple[int, float | None]] = {}
        self._unsampled: Counter[_Key] = Counter()
        self._unsampled_since: dict[_Key, int] = {}
        self._cpu_share = cpu_share
        self._cpu_clock = cpu_clock
        self._cpu_ns = 0.0
        """CPU time that walks have used and that did not become free again since."""
        self.walked = 0
        """Windows that were walked."""
        self.spent_ns = 0
        """CPU time that this took."""
        self._steps = 0
        self._recent: dict[bool, deque[Explained]] = {True: deque(), False: deque()}

    def recent(self) -> Sequence[Explained]:
        """The requests of the last minutes that have a path: slow ones, then some of the others. A copy."""
        return [*self._recent[True], *self._recent[False]]

    def first_token(self, request: Request) -> None:
        """A streamed request handed over its first token."""
        self._started.append(_Followed(request, request.series()))

    def finished(self, finished: FinishedRequest) -> None:
        """A request is over. It is handed on by the next round."""
        self._ended.append(finished)

    def round(self, now_ns: int) -> None:
        """Walk what is due. Call it after the records were drained: requests first, then the timeline's."""
        elapsed_ns = 0 if self._last_round_ns is None else now_ns - self._last_round_ns
        self._last_round_ns = now_ns
        self._budget.refill(elapsed_ns)
        self._slow_budget.refill(elapsed_ns)
        self._cpu_ns = max(0.0, self._cpu_ns - self._cpu_share * elapsed_ns)
        found: dict[_Key, Counter[Cause]] = defaultdict(Counter)
        started, self._started = self._started, []
        ended, self._ended = self._ended, []
        over = {finished.number for finished in ended}
        begins_ns = [each.request.arrived_ns for each in started]
        if self._affordable(DECODE_BURST_NS):
            for each, *_ in self._due_decodes(over):
                begins_ns.append(each.begins_ns())
        if begins_ns:
            view: View | None = None
            since_ns = min(begins_ns)
            if self._affordable():
                with self._costing():
                    view = self._timeline.view(since_ns, now_ns)
            self._walk_first_tokens(view, started, found, now_ns)
            # Again: a short answer has begun and ended since the last round.
            for followed, token_ns, tid in list(self._due_decodes(over)):
                if view is not None and self._affordable(DECODE_BURST_NS) and followed.begins_ns() >= since_ns:
                    self._walk_decode(view, followed, token_ns, tid, found)
        for finished in ended:
            self._finish(finished, found)
        self._share(found, now_ns)
        for kept in self._recent.values():
            while kept and now_ns - kept[0].request.finished_ns > KEPT_NS:
                self._forget(kept)

    # ---- the time to the first token ----

    def _walk_first_tokens(
        self, view: View | None, started: list[_Followed], found: dict[_Key, Counter[Cause]], now_ns: int
    ) -> None:
        for followed in started:
            self._followed[followed.request.number] = followed
            followed.slow = self._is_slow(followed, now_ns)
        self._chance.shuffle(started)
        walked = self.walked
        for followed in started:
            request = followed.request
            token = request.first_token
            assert token is not None
            key = (followed.series, CausePhase.TTFT, followed.slow)
            # What the view cost is spent. Where that alone is more than there is, none would ever be walked.
            affordable = view is not None and (self._affordable() or self.walked == walked)
            if not affordable or not ((followed.slow and self._slow_budget.take()) or self._budget.take()):
                self._unsampled[key] += max(0, token[0] - request.arrived_ns)
                continue
            assert view is not None
            steps = self._walk(view, followed, request.arrived_ns, *token)
            followed.ttft = totals(steps)
            self._hold(followed, steps)
            found[key].update(followed.ttft)
            if len(self._decoding) < DECODES:
                self._decoding[request.number] = followed
                followed.decode_until_ns = token[0]

    def _is_slow(self, followed: _Followed, now_ns: int) -> bool:
        token = followed.request.first_token
        assert token is not None
        known = self._slow_above.get(followed.series)
        if known is None or now_ns - known[0] > _QUANTILE_EVERY_NS:
            quantile = followed.series.quantile(Sli.TTFT, SLOW_QUANTILE, now_ns)
            limits = (quantile and quantile * SLOW_MARGIN, self._threshold(followed.series, Sli.TTFT))
            above = min((limit for limit in limits if limit is not None), default=None)
            known = self._slow_above[followed.series] = (now_ns, above)
        return known[1] is not None and token[0] - followed.request.arrived_ns > known[1] * 1e9

    def _walk(self, view: View, followed: _Followed, begin_ns: int, end_ns: int, tid: int) -> list[Step]:
        with self._costing():
            steps, workers = walk_on(view, _window(followed.request, begin_ns, end_ns, tid), followed.workers)
        self.walked += 1
        # Those who have long stopped would make every later view reach back to them.
        followed.workers = [worker for worker in workers if end_ns - worker.at_ns <= STRETCH_NS]
        return steps

    @contextlib.contextmanager
    def _costing(self) -> Iterator[None]:
        began_ns = self._cpu_clock()
        yield
        spent_ns = self._cpu_clock() - began_ns
        self.spent_ns += spent_ns
        self._cpu_ns += spent_ns

    def _affordable(self, burst_ns: int = CPU_BURST_NS) -> bool:
        """Whether paths have used less CPU time than they may; the more of it is left, the longer they did not."""
        return self._cpu_ns < burst_ns

    # ---- the decode phase ----

    def _due_decodes(self, over: AbstractSet[int]) -> Iterator[tuple[_Followed, int, int]]:
        """What has a long new stretch, or is among those over; its last token, and the thread that wrote it."""
        for followed in self._decoding.values():
            token = followed.request.last_token
            assert token is not None
            new_ns = token[0] - followed.decode_until_ns
            if new_ns > 0 and (new_ns >= STRETCH_NS or followed.request.number in over):
                yield followed, *token

    def _walk_decode(
        self, view: View, followed: _Followed, token_ns: int, tid: int, found: dict[_Key, Counter[Cause]]
    ) -> None:
        parts = totals(self._walk(view, followed, followed.decode_until_ns, token_ns, tid))
        followed.decode.update(parts)
        followed.decode_until_ns = token_ns
        found[(followed.series, CausePhase.DECODE, False)].update(parts)

    # ---- the end ----

    def _finish(self, finished: FinishedRequest, found: dict[_Key, Counter[Cause]]) -> None:
        followed = self._followed.pop(finished.number, None)
        if followed is None:
            self._on_finished(finished)
            return
        causes: Causes | None = None
        first_ns, last_ns = finished.first_token_ns, finished.last_token_ns
        assert first_ns is not None and last_ns is not None
        self._decoding.pop(finished.number, None)
        rest_ns = last_ns - max(first_ns, followed.decode_until_ns)
        if rest_ns > 0:  # was not walked: what it went to is divided like that of others, and not said of it
            self._unsampled[(followed.series, CausePhase.DECODE, False)] += rest_ns
            followed.decode.clear()
        if followed.ttft is not None:
            causes = Causes(_named(followed.ttft), _named(followed.decode))
        explained = dataclasses.replace(finished, causes=causes)
        self._on_finished(explained)
        if followed.ttft is not None and followed.steps:
            names = {tid: self._timeline.thread_name(tid) or "" for tid in _threads(followed.steps)}
            told = Explained(
                request=explained,
                steps=followed.steps,
                ttft=followed.ttft,
                decode=dict(followed.decode),
                slow=followed.slow,
                names=names,
            )
            self._keep(told)
            self._on_explained(told)

    # ---- the memory for steps ----

    def _hold(self, followed: _Followed, steps: Sequence[Step]) -> None:
        """Keep a path until its request is over. Older ones go for it; if that is not enough, only its causes stay."""
        for kept in (self._recent[False], self._recent[True]):
            while kept and self._steps + len(steps) > STEPS_KEPT:
                self._forget(kept)
        if self._steps + len(steps) <= STEPS_KEPT:
            followed.steps = tuple(steps)
            self._steps += len(steps)

    def _keep(self, told: Explained) -> None:
        """Keep a path for those who ask; its steps are counted already."""
        kept = self._recent[told.slow]
        kept.append(told)
        if len(kept) > (SLOW_KEPT if told.slow else OTHERS_KEPT):
            self._forget(kept)

    def _forget(self, kept: deque[Explained]) -> None:
        self._steps -= len(kept.popleft().steps)

    # ---- what all requests come to ----

    def _share(self, found: Mapping[_Key, Mapping[Cause, int]], now_ns: int) -> None:
        """Add what was found to the series, and divide by it what requests without a path took."""
        for key, parts in found.items():
            series, phase, _ = key
            whole = sum(parts.values())
            scale = 1 + self._unsampled[key] / whole if whole else 1.0
            if whole:
                del self._unsampled[key]
            series.explain(phase, {cause: ns * scale for cause, ns in parts.items()})
        # With no path in its series for a minute, nothing can be said about a request.
        since = self._unsampled_since
        self._unsampled_since = {key: since.get(key, now_ns) for key in self._unsampled}
        for key, since_ns in self._unsampled_since.items():
            if now_ns - since_ns >= CARRIED_NS:
                key[0].explain(key[1], {Cause.unexplained: float(self._unsampled.pop(key))})


def _window(request: Request, begin_ns: int, end_ns: int, tid: int) -> Window:
    peer, peer_port = address_of(request.peer)
    return Window(
        begin_ns=begin_ns,
        end_ns=end_ns,
        writer_tid=tid,
        arrived_ns=request.arrived_ns,
        read_ns=request.read_ns,
        reader_tid=request.tid,
        peer=peer,
        peer_port=peer_port,
    )


def address_of(peer: str) -> tuple[bytes, int]:
    """Address and port of `IP:PORT` or `[IPV6]:PORT` as records have them: IPv4 in the first four of 16 bytes."""
    host, _, port = peer.rpartition(":")
    if not host:
        return b"", 0
    return ipaddress.ip_address(host.strip("[]")).packed.ljust(16, b"\0"), int(port)


def _named(parts: Mapping[Cause, int]) -> dict[str, int]:
    return {cause.value: ns for cause, ns in parts.items() if ns}


def _threads(steps: Iterable[Step]) -> set[int]:
    tids = {tid for step in steps for tid in (step.tid, step.woken_by) if tid}
    return tids | {int(step.detail) for step in steps if step.cause in _HOLDERS and step.detail.isdecimal()}
