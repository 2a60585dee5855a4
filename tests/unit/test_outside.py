"""What the reader learns from others than the kernel: fresh or not there, told once, and never waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from exporter import outside
from exporter.config import Config, GpuConfig, Match, ProbePoint, Probes, Service
from exporter.kv_cache import Source
from exporter.outside import Outside
from exporter.reloading import merged
from exporter.slis import Slis
from exporter.status import AgentStatus, ProbeStatus, TargetStatus
from probes.engine_metrics import EndpointReport, EngineReport
from probes.engine_page import EngineModel
from probes.gpu_report import Gpu, GpuReport
from probes.points_table import PointSlot

SECOND_NS = 10**9
SERVICE = Service("stage", Match(port=(8000,)))
POINT = ProbePoint("look-up", "libllm_kv.so", "llm_kv_lookup", None, 1, 2, 3)
REPORT = GpuReport(0, 0.01, True, "/lib/libnvidia-ml.so.1", "580.1", gpus=(Gpu("GPU-1", 0, "H200"),))
STATUS = AgentStatus(
    0,
    "ring",
    (ProbeStatus("requests", True, "", 0, None, None, ()),),
    (TargetStatus("stage", 1, 1, (101,), (8000,)),),
    0,
    (),
)


class FakePoller:
    """A poller that has the answer that the test gives it."""

    def __init__(self, name: str, ask: Callable[[], object], period_s: float) -> None:
        self.name, self.ask, self.period_s = name, ask, period_s
        self.answer: tuple[Any, int] | None = None
        self.waited_ns = 0
        self.begun = self.stopped = False

    def start(self) -> None:
        self.begun = True

    def stop(self, _patience_s: float) -> None:
        self.stopped = True

    def latest(self) -> tuple[Any, int] | None:
        return self.answer

    def waiting_ns(self) -> int:
        return self.waited_ns


class Table:
    """The slots of the probe points."""

    def __init__(self) -> None:
        self.slots: list[PointSlot] = []

    def read(self) -> list[PointSlot]:
        return self.slots


class Told:
    """An `Outside` whose sources say what the test wants, at the time that it wants."""

    def __init__(self, config: Config) -> None:
        self.now_ns = 1000 * SECOND_NS
        self.config = config
        self.table = Table()
        self.slis = Slis(clock=lambda: self.now_ns)
        table: Any = self.table if config.probe_points else None
        self.outside = Outside(config, ["stage"], table, clock=lambda: self.now_ns)

    @property
    def gpus(self) -> FakePoller:
        poller = self.outside._gpus
        assert isinstance(poller, FakePoller)
        return poller

    @property
    def engines(self) -> FakePoller:
        poller = self.outside._engines
        assert isinstance(poller, FakePoller)
        return poller

    def tick(self, status: AgentStatus | None = STATUS) -> None:
        self.outside.tick(self.config, status, self.slis, self.now_ns)


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "Poller", FakePoller)


def told(gpu: str = "auto", points: tuple[ProbePoint, ...] = ()) -> Told:
    return Told(Config(services=(SERVICE,), probes=Probes(gpu=gpu), probe_points=points))


# ---- GPUs ----


def test_what_a_driver_said_long_ago_is_not_said_any_more() -> None:
    it = told()
    assert it.outside.gpus() is None
    it.gpus.answer = REPORT, it.now_ns
    assert it.outside.gpus() is REPORT
    it.now_ns += 10 * SECOND_NS
    assert it.outside.gpus() is REPORT
    it.now_ns += 1
    assert it.outside.gpus() is None


def test_a_slow_period_is_no_silence() -> None:
    it = Told(Config(services=(SERVICE,), gpu=GpuConfig(period_s=30)))
    assert it.gpus.period_s == 30
    it.gpus.answer = REPORT, it.now_ns
    it.now_ns += 150 * SECOND_NS
    assert it.outside.gpus() is REPORT


@pytest.mark.parametrize(("wanted", "held"), [("off", False), ("auto", True), ("on", True)])
def test_the_library_for_gpus_is_loaded_before_it_is_needed_and_only_then(wanted: str, held: bool) -> None:
    code = (
        "import sys, exporter.reader\n"
        "from exporter import outside\n"
        "from exporter.config import Config, Match, Probes, Service\n"
        f"config = Config(services=(Service('stage', Match(port=(8000,))),), probes=Probes(gpu='{wanted}'))\n"
        "assert 'pynvml' not in sys.modules\n"
        "outside.Outside.prepare(config)\n"
        "before = set(sys.modules)\n"
        "outside.Outside(config, ['stage'])\n"
        "print('pynvml' in before, *sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == [str(held)]


def test_nobody_asks_where_gpus_are_off() -> None:
    it = told("off")
    assert it.outside._gpus is None
    assert (it.outside.gpus(), it.outside.probes()) == (None, ())
    it.outside.start()
    it.outside.stop()


@pytest.mark.parametrize(
    ("wanted", "report", "states"),
    [
        ("auto", None, []),  # the first answer is under way
        ("on", None, [(False, True)]),
        ("auto", REPORT, [(True, False)]),
        ("on", REPORT, [(True, True)]),
        ("auto", GpuReport(0, 0.0, False, problem="there is no driver"), []),
        ("on", GpuReport(0, 0.0, False, problem="there is no driver"), [(False, True)]),
        ("auto", replace(REPORT, problem="the driver is not loaded"), [(False, False)]),
    ],
)
def test_a_missing_driver_counts_only_where_one_is_wanted(
    wanted: str, report: GpuReport | None, states: list[tuple[bool, bool]]
) -> None:
    it = told(wanted)
    it.gpus.answer = None if report is None else (report, it.now_ns)
    found = it.outside.probes()
    assert [(each.up, each.required) for each in found] == states
    assert all(each.name == "gpu" and bool(each.reason) != each.up for each in found)


def test_a_driver_that_hangs_is_named_with_how_long() -> None:
    it = told()
    it.gpus.answer = REPORT, it.now_ns
    it.now_ns += 60 * SECOND_NS
    it.gpus.waited_ns = 59 * SECOND_NS
    (state,) = it.outside.probes()
    assert (state.up, state.reason) == (False, "the driver has not answered for 59 s")


# ---- engines ----


def engine_report(now_ns: int, queries: float, hits: float) -> EngineReport:
    model = EngineModel("vllm", "alto", prefix_queries=queries, prefix_hits=hits, requests=0.0)
    url = "http://127.0.0.1:8000/metrics"
    return EngineReport(now_ns, (EndpointReport("stage", url, True, None, (model,), now_ns, 0.01),))


def test_each_report_of_the_engines_is_taken_once() -> None:
    it = told()
    it.slis.series("stage", "alto", "chat_completions", (), True)
    it.engines.answer = engine_report(it.now_ns, 0.0, 0.0), it.now_ns
    it.tick()
    it.now_ns += 5 * SECOND_NS
    it.engines.answer = engine_report(it.now_ns, 101.0, 64.0), it.now_ns
    for _ in range(3):
        it.tick()
    (model,) = it.outside.engines.models.values()
    assert (model.totals["prefix_queries"], model.totals["prefix_hits"]) == (101, 64)
    (cache,) = it.slis.caches.models()
    lookups = cache.by_source[Source.ENGINE]
    assert (lookups.queries, lookups.hits) == (101, 64)


def test_where_nobody_looks_at_requests_nothing_is_compared() -> None:
    it = told()
    down = replace(STATUS, probes=(replace(STATUS.probes[0], up=False, reason="no BTF"),))
    for seconds, status in ((0, STATUS), (5, STATUS), (10, down)):
        it.engines.answer = engine_report(it.now_ns + seconds, 0.0, 0.0), it.now_ns
        it.tick(status)
        (model,) = it.outside.engines.models.values()
        assert (model.comparison is None) == (seconds != 5)


def test_only_services_that_were_seen_to_speak_are_asked() -> None:
    it = told()
    it.tick()
    assert it.outside._endpoints == {}
    it.slis.series("stage", "alto", "chat_completions", (), True)
    it.tick(None)  # before the first report no port is known
    assert it.outside._endpoints == {}
    it.tick()
    (endpoint,) = it.outside._endpoints["stage"]
    assert endpoint.url == "http://127.0.0.1:8000/metrics"


def test_one_that_is_named_is_asked_from_the_start() -> None:
    url = "http://10.0.0.7:1/metrics"
    it = Told(Config(services=(Service("stage", SERVICE.match, engine_metrics=url),)))
    assert [each.url for each in it.outside._endpoints["stage"]] == [url]
    assert not it.outside.has_news()
    it.engines.answer = engine_report(it.now_ns, 0.0, 0.0), it.now_ns
    assert it.outside.has_news()
    it.tick()
    assert not it.outside.has_news()


def test_engine_of_a_service_that_was_taken_out_is_not_asked_any_more() -> None:
    other = Service("other", Match(port=(8001,)))
    running = Config(services=(Service("stage", Match(port=(8000,)), engine_metrics="http://engine:9/metrics"), other))
    it = Told(running)
    it.tick()
    assert set(it.outside._endpoints) == {"stage"}
    it.config = merged(running, Config(services=(other,)), 2)
    it.tick()
    assert it.outside._endpoints == {}


def test_starting_and_stopping_reach_both() -> None:
    it = told()
    it.outside.start()
    assert it.gpus.begun
    assert it.engines.begun
    it.outside.stop()
    assert it.gpus.stopped
    assert it.engines.stopped


# ---- probe points ----


def test_look_ups_of_points_reach_the_cache_and_the_scrape() -> None:
    it = told(points=(POINT,))
    it.table.slots = [PointSlot(0, 0, b"alto", 3, 64, 101)]
    it.tick()
    (total,) = it.outside.points()
    assert (total.service, total.model, total.point) == ("stage", "alto", "look-up")
    assert (total.calls, total.hit_tokens, total.looked_up_tokens) == (3, 64, 101)
    it.tick()  # what was told is not told again
    (cache,) = it.slis.caches.models()
    assert set(cache.by_source) == {Source.PROBE_POINT}
    lookups = cache.by_source[Source.PROBE_POINT]
    assert (lookups.queries, lookups.hits) == (101, 64)


def test_without_points_there_are_none() -> None:
    assert told().outside.points() == ()
