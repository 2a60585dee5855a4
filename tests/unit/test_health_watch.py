"""From what the agent counts to signals, events, the state file, /metrics and JSON."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import health_state
from exporter.config import HealthConfig, parse
from exporter.health import FEWEST, LOADS, RULES, SETTLED_S, SIGMAS, Signal
from exporter.health_metrics import health_families
from exporter.health_signals import quantile_of
from exporter.health_state import MOST_BYTES, NAME, STALE_S, Learnt, State
from exporter.health_watch import EVENTS, Health
from exporter.metrics import Metrics, Sources
from exporter.reloading import merged
from exporter.request import Failure
from exporter.slis import Series, Slis
from exporter.status import AgentStatus, DescriptorLeak, LeakTarget, Vitals
from probes.errors import ConfigError

S = 1_000_000_000
MS = 1_000_000
WALL_NS = 1_700_000_000 * S
HISTOGRAM = np.dtype([("sum_ns", np.uint64), ("counts", np.uint64, 28)])
SCHEDULER = np.dtype([("run_queue_wait", HISTOGRAM)])
TCP = np.dtype([("round_trip", HISTOGRAM)])


class World:
    """SLIs, kernel counters and an attacher's reports, second by second."""

    def __init__(self, folder: int | None = None, wall_ns: int = WALL_NS) -> None:
        self.now_ns = 1000 * S
        self.began_ns = self.now_ns
        self.wall_ns = wall_ns
        self.slis = Slis(clock=lambda: self.now_ns)
        self.services = ["roleplay", "", "other"]
        self.kernel = {"scheduler": np.zeros(3, SCHEDULER), "tcp": np.zeros(3, TCP)}
        self.health = Health(
            self.slis, self.services, folder, lambda: self.wall_ns + self.now_ns - self.began_ns
        )
        self.cpu_seconds = 0.0
        self.resident_bytes = 500 << 20
        self.eldest = 7
        self.leaks: tuple[DescriptorLeak, ...] = ()
        self.metrics = Metrics(self.slis, Sources(health=lambda: self.health), self.services)

    def series(self) -> Series:
        return self.slis.series("roleplay", "bard", "chat_completions", (), admit=True)

    def status(self) -> AgentStatus:
        return AgentStatus(
            at_ns=self.now_ns,
            transport="ring",
            probes=(),
            targets=(),
            reader_restarts=0,
            processes=(),
            vitals=(Vitals("roleplay", self.cpu_seconds, self.resident_bytes, 29, self.eldest),),
            leaks=self.leaks,
        )

    def second(self, cpus: float = 0.5, ttft_ms: int = 200, waits: int = 101, wait_ns: int = 50_000) -> None:
        self.now_ns += S
        self.cpu_seconds += cpus
        row = self.kernel["scheduler"]["run_queue_wait"][0]
        row["sum_ns"] += waits * wait_ns
        row["counts"][6] += waits
        for _ in range(3):
            self.series().first_token(ttft_ms * MS, self.now_ns)
        self.series().frame()
        self.health.tick(self.now_ns, self.status(), lambda: self.kernel)

    def value(self, signal: Signal) -> float | None:
        return self.health.services["roleplay"].baselines[signal].value


def test_the_signals_are_what_was_counted() -> None:
    world = World()
    for _ in range(30):
        world.second(cpus=0.7, wait_ns=60_000)
    assert world.value(Signal.CPU) == pytest.approx(0.7)
    assert world.value(Signal.RESIDENT_MEMORY) == 500 << 20
    assert world.value(Signal.OPEN_FILES) == 29
    assert world.value(Signal.RUN_QUEUE_WAIT) == pytest.approx(60e-6)
    assert world.value(Signal.ROUND_TRIP) is None
    assert world.value(Signal.TTFT_P50) == pytest.approx(0.2, rel=0.3)  # within its bucket
    assert world.value(Signal.IN_FLIGHT) == 0
    assert world.value(Signal.ERROR_RATIO) is None


def test_a_value_is_of_its_window_and_not_of_all_time() -> None:
    world = World()
    for _ in range(60):
        world.second(cpus=0.1)
    for _ in range(5):
        world.second(cpus=1.3)
    assert world.value(Signal.CPU) == pytest.approx(1.3)


def test_errors_are_those_of_the_service() -> None:
    world = World()
    world.second()
    series = world.series()
    series.requests += 20
    series.failures[Failure.client_error] += 9
    series.failures[Failure.server_error] += 7
    world.second()
    assert world.value(Signal.ERROR_RATIO) == pytest.approx(7 / 20)


def test_of_few_events_nothing_is_said() -> None:
    world = World()
    for _ in range(30):
        world.second(waits=1)
    assert world.value(Signal.RUN_QUEUE_WAIT) is None  # 5 waits in 5 s


def test_what_the_attacher_said_long_ago_is_not_now() -> None:
    world = World()
    world.second()
    told = world.status()
    world.now_ns += 6 * S
    world.health.tick(world.now_ns, told, lambda: world.kernel)
    assert world.value(Signal.RESIDENT_MEMORY) is None


def test_new_bucket_bounds_pass_over_a_window() -> None:
    world = World()
    for _ in range(30):
        world.second()
    world.slis.add_bounds({"ttft": [0.123]})
    world.second()
    assert world.value(Signal.TTFT_P50) is None
    for _ in range(31):
        world.second()
    assert world.value(Signal.TTFT_P50) is not None


def test_it_looks_once_a_second_however_often_it_is_called() -> None:
    world = World()
    for _ in range(8):
        world.now_ns += S // 4
        world.health.tick(world.now_ns, world.status(), lambda: world.kernel)
    signal = world.health.services["roleplay"].baselines[Signal.RESIDENT_MEMORY]
    assert signal.value is not None
    assert len(world.health._signals._past["roleplay"]) == 2  # the first look, and the one a second later


def test_a_service_that_is_gone_is_forgotten() -> None:
    world = World()
    world.second()
    world.services[0] = ""
    world.second()
    assert set(world.health.services) == {"other"}


@pytest.mark.parametrize(("quantile", "seconds"), [(0.5, 1.5), (0.99, 2.0), (0.1, 0.5), (1.0, 2.0)])
def test_quantiles_lie_within_their_bucket(quantile: float, seconds: float) -> None:
    # 20 up to 1 s, 60 up to 2 s, 20 beyond
    assert quantile_of([20, 60, 20], [1.0, 2.0], quantile) == pytest.approx(seconds)


# ---- events ----


def sick() -> World:
    world = World()
    for _ in range(180):
        world.second()
    for _ in range(15):
        world.second(cpus=1.7)
    return world


def test_an_anomaly_is_an_event_a_log_line_and_a_sample(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "footlight"):
        world = sick()
    (event,) = world.health.events
    assert (event.service, event.signal, event.what) == ("roleplay", "cpu", "began")
    assert event.normal == pytest.approx(0.5)
    assert "roleplay: cpu is not normal: 1.7 CPUs, usually 0.5 CPUs" in caplog.text
    text = world.metrics.render()[0].decode()
    assert 'footlight_health_anomaly{service_name="roleplay",signal="cpu"} 1.0' in text
    assert 'footlight_health_anomaly{service_name="roleplay",signal="open_files"} 0.0' in text
    assert 'footlight_health_anomalies_total{service_name="roleplay",signal="cpu"} 1.0' in text
    for _ in range(20):
        world.second()
    assert [each.what for each in world.health.events] == ["began", "ended"]


def test_what_stays_is_told_with_what_was_normal_before() -> None:
    world = sick()
    for _ in range(round(SETTLED_S)):
        world.second(cpus=1.7)
    event = world.health.events[-1]
    assert (event.signal, event.what) == ("cpu", "new_normal")
    assert event.value == pytest.approx(1.7)
    assert event.normal == pytest.approx(0.5)
    assert event.sigmas is not None and event.sigmas > SIGMAS
    assert world.health.services["roleplay"].baselines[Signal.CPU].normal() is None


def test_the_end_of_processes_is_told_with_what_they_had(caplog: pytest.LogCaptureFixture) -> None:
    world = sick()
    world.eldest = 8
    with caplog.at_level(logging.INFO, "footlight"):
        world.second()
    event = world.health.events[-1]
    assert (event.signal, event.what) == ("cpu", "ended")
    assert event.value == pytest.approx(1.7)
    assert event.normal == pytest.approx(0.5)
    assert event.sigmas is not None and event.sigmas > SIGMAS
    assert "roleplay: cpu is normal again: 1.7 CPUs" in caplog.text


def test_what_is_not_known_is_absent_from_the_page() -> None:
    world = World()
    world.second()
    text = world.metrics.render()[0].decode()
    assert "footlight_health_anomaly{" not in text
    assert "footlight_health_deviation_sigma{" not in text
    assert 'footlight_health_anomalies_total{service_name="roleplay",signal="cpu"} 0.0' in text
    assert 'footlight_descriptor_leaks_total{service_name="roleplay"} 0.0' in text


def test_without_anything_watched_the_families_are_empty() -> None:
    families = health_families(lambda: None)
    assert families
    for family in families:
        assert list(family.points(None)) == []  # type: ignore[arg-type]


LEAK = DescriptorLeak(
    "roleplay", 4711, 17 * S, 71.4, 923, 921, (("device", 900), ("tcp", 21)), (LeakTarget("device", "/dev/null", 900),)
)


def test_a_leak_is_told_once_however_often_it_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.leaks = (LEAK,)
    for _ in range(5):
        world.second()
    (event,) = world.health.events
    assert event.leak == LEAK
    assert world.health.leaks == {"roleplay": 1}
    assert "process 4711 leaks descriptors: 923 are open, 71 more each second; most are: 900 device" in caplog.text
    told = world.health.told()["events"][0]
    assert told["what"] == "descriptor_leak"
    assert told["leak"]["kinds"] == {"device": 900, "tcp": 21}
    assert told["leak"]["targets"] == [{"kind": "device", "name": "/dev/null", "count": 900}]


def test_what_is_told_is_json_and_the_events_are_bounded() -> None:
    world = sick()
    world.health.events.extend([world.health.events[0]] * 3 * EVENTS)
    told = json.loads(msgspec.json.encode(world.health.told()))
    assert len(told["events"]) == EVENTS
    service = next(each for each in told["services"] if each["service"] == "roleplay")
    assert [each["signal"] for each in service["signals"]] == [signal.value for signal in Signal]
    cpu = service["signals"][0]
    assert cpu["anomalous"] is True
    assert cpu["unit"] == "cpus"
    assert cpu["normal"] == pytest.approx(0.5)
    assert cpu["samples"] >= FEWEST


# ---- kept over restarts ----

SERVICES = "services: [{name: a, match: {port: 8000}}]\n"


def test_where_it_is_kept_is_configured() -> None:
    assert parse(SERVICES).health == HealthConfig(None)
    assert parse(SERVICES + "health: {folder: /var/lib/footlight}\n").health == HealthConfig("/var/lib/footlight")
    with pytest.raises(ConfigError, match="not an absolute path"):
        parse(SERVICES + "health: {folder: state}\n")
    with pytest.raises(ConfigError, match="unknown key 'folders'"):
        parse(SERVICES + "health: {folders: /a}\n")


def test_another_folder_needs_a_restart() -> None:
    running, wanted = parse(SERVICES), parse(SERVICES + "health: {folder: /a}\n")
    with pytest.raises(ConfigError, match="health: it changed"):
        merged(running, wanted, 17)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_what_was_learnt_is_known_after_a_restart(folder: int, tmp_path: Path) -> None:
    world = World(folder)
    for _ in range(180):
        world.second()
    world.health.save()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    again = World(folder, WALL_NS + 180 * S)
    again.second()
    again.second()
    baseline = again.health.services["roleplay"].baselines[Signal.CPU]
    normal = baseline.normal()
    assert normal is not None
    assert normal.median == pytest.approx(0.5)
    for _ in range(15):
        again.second(cpus=1.7)
    assert [each.signal for each in again.health.events] == ["cpu"]


def test_what_belongs_to_other_processes_is_not_known(folder: int) -> None:
    world = World(folder)
    for _ in range(180):
        world.second()
    world.health.save()
    again = World(folder, WALL_NS + 180 * S)
    again.eldest = 8
    again.second()
    baselines = again.health.services["roleplay"].baselines
    assert baselines[Signal.RESIDENT_MEMORY].normal() is None
    assert baselines[Signal.RUN_QUEUE_WAIT].normal() is not None


def test_it_is_saved_every_minute(folder: int, tmp_path: Path) -> None:
    world = World(folder)
    for _ in range(59):
        world.second()
    assert not (tmp_path / NAME).exists()
    for _ in range(3):
        world.second()
    assert (tmp_path / NAME).exists()


def test_what_is_too_old_is_not_taken(folder: int) -> None:
    health_state.save(folder, 1000.0, {"roleplay": Learnt(7, {"cpu": [1.0] * 30})})
    assert set(health_state.load(folder, 1000.0 + STALE_S)) == {"roleplay"}
    assert health_state.load(folder, 1001.0 + STALE_S) == {}
    assert health_state.load(folder, 999.0) == {}


def test_a_file_with_one_time_for_all_is_taken(folder: int, tmp_path: Path) -> None:
    text = '{"version":1,"written":1000,"services":{"roleplay":{"eldest":7,"samples":{"cpu":[0.5]}}}}'
    (tmp_path / NAME).write_text(text)
    assert health_state.load(folder, 1060.0) == {"roleplay": Learnt(7, {"cpu": [0.5]}, 1000.0)}
    assert health_state.load(folder, 1001.0 + STALE_S) == {}


def test_each_service_is_as_old_as_what_was_learnt_of_it(folder: int, tmp_path: Path) -> None:
    began_s = WALL_NS / S
    ages_s = {"gone": STALE_S - 90, "other": 0}
    learnt = {name: Learnt(7, {"cpu": [1.0] * 30}, began_s - age_s) for name, age_s in ages_s.items()}
    health_state.save(folder, began_s, learnt)
    world = World(folder)
    told = []
    for _ in range(3):
        for _ in range(61):
            world.second()
        told.append(msgspec.json.decode((tmp_path / NAME).read_bytes(), type=State).services)
    assert [set(each) for each in told] == [{"gone", "roleplay", "other"}, {"roleplay", "other"}, {"roleplay", "other"}]
    assert told[0]["gone"].written == began_s - STALE_S + 90
    assert "gone" not in health_state.load(folder, began_s + 183)
    world.services[1] = "gone"
    world.second()
    assert not world.health.services["gone"].baselines[Signal.CPU].known


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"version": 1}',
        '{"version": 2, "written": 1000, "services": {}}',
        '{"version": 1, "written": 1000, "services": {"a": {"eldest": "x", "samples": {}}}}',
        '{"version": 1, "written": 1000, "services": {"a": {"eldest": 1, "samples": {"cpu": ["x"]}}}}',
        " " * (MOST_BYTES + 1),
    ],
)
def test_a_bad_file_is_refused_and_learnt_anew(
    text: str, folder: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError):
        health_state.load(folder, 1000.0)
    world = World(folder)
    world.second()
    assert "it is learnt anew" in caplog.text


def test_too_many_samples_are_cut(folder: int, tmp_path: Path) -> None:
    state = State(1, 1000.0, {"roleplay": Learnt(7, {"cpu": [float(number) for number in range(1009)]})})
    (tmp_path / NAME).write_bytes(msgspec.json.encode(state))
    samples = health_state.load(folder, 1000.0)["roleplay"].samples["cpu"]
    assert samples == [float(number) for number in range(949, 1009)]
    assert all(math.isfinite(each) for each in samples)


@pytest.mark.parametrize(
    ("signal", "impossible"),
    [
        (Signal.RUN_QUEUE_WAIT, [710.0, -746.0, 51.0, -51.0, 1e300]),
        (Signal.TTFT_P50, [1e4, -1e4]),
        (Signal.CPU, [-0.5, -1e300]),
        (Signal.RESIDENT_MEMORY, [-1.0]),
        ("arrivals", [-1.0]),
        ("no_such_signal", [1.0]),
    ],
)
def test_samples_that_a_signal_cannot_have_are_dropped(
    signal: Signal | str, impossible: list[float], folder: int
) -> None:
    name = signal if isinstance(signal, str) else signal.value
    possible = [] if name == "no_such_signal" else [0.0, 0.5, 3.0]
    health_state.save(folder, WALL_NS / S, {"roleplay": Learnt(7, {name: [*impossible, *possible]})})
    assert health_state.load(folder, WALL_NS / S)["roleplay"].samples.get(name, []) == possible


@given(st.dictionaries(st.sampled_from([*(each.value for each in Signal), *LOADS]), st.floats(), min_size=1))
@settings(max_examples=60, deadline=None)
def test_no_file_ends_the_reader(samples: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            state = {"roleplay": Learnt(7, {name: [value] * 60 for name, value in samples.items()})}
            health_state.save(folder, WALL_NS / S, state)
            world = World(folder)
            for _ in range(5):
                world.second()
            msgspec.json.encode(world.health.told())
            world.metrics.render()
        finally:
            os.close(folder)


def test_a_link_is_not_followed(folder: int, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        health_state.load(folder, 1000.0)
    health_state.save(folder, 1000.0, {})
    assert (tmp_path / "elsewhere").read_text() == "{}"
    assert not (tmp_path / NAME).is_symlink()


def test_a_folder_that_takes_nothing_ends_nobody(folder: int, caplog: pytest.LogCaptureFixture) -> None:
    read_only = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        world = World(read_only)
        world.second()
        world.health.save()
    finally:
        os.close(read_only)
    assert "cannot be kept" in caplog.text
    assert set(RULES) == set(Signal)
