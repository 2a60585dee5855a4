"""Whatever the driver does: no exception, what it did not say is absent, and the rest is right."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes.gpu_report import Gpu, GpuMemory, GpuReport
from probes.nvml import NvmlSource
from probes.poller import Poller
from tests.standins.nvml import Driver, build, fixture

SECOND = 1_000_000_000
NOW = 1_763_733_600.0
# Those that NVML's documentation gives for calls that only ask, and two that it does not know.
EVERY_ERROR = (*range(1, 8), 9, 10, 12, 13, 15, 16, 18, 20, 21, 25, 27, 28, 999, 77, 4_294_967_295)
NOT_SUPPORTED = 3
FUNCTION_NOT_FOUND = 13
VERSION_OF_ARGUMENT = 25
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
IS_LOST = 15
VERSION_MISMATCH = 18
UNKNOWN = 999

Open = Callable[[Driver], NvmlSource]


class Clock:
    def __init__(self) -> None:
        self.ns = SECOND

    def __call__(self) -> int:
        return self.ns

    def step(self, seconds: float = 1.0) -> None:
        self.ns += round(seconds * SECOND)

    def wall(self) -> float:
        return NOW + self.ns / SECOND - 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(built: Path, tmp_path: Path) -> Driver:
    return Driver(built, tmp_path, fixture("h100"))


@pytest.fixture
def opened(clock: Clock) -> Iterator[Open]:
    sources = []

    def make(driver: Driver) -> NvmlSource:
        source = NvmlSource(str(driver.path), clock, clock.wall)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def looks(source: NvmlSource, clock: Clock, count: int) -> GpuReport:
    for _ in range(count - 1):
        source.look()
        clock.step()
    return source.look()


def told(gpu: Gpu) -> set[str]:
    """Which fields have a value."""
    empty = Gpu("", 0, "")
    return {
        field.name for field in dataclasses.fields(gpu) if getattr(gpu, field.name) != getattr(empty, field.name)
    } - {"uuid", "index", "name", "problem", "next_step", "not_told", "xids"}


ALL_TOLD = {
    *("utilization", "memory_utilization", "memory", "power_watts", "power_limit_watts", "energy_joules"),
    *("temperatures", "clocks", "throttled", "throttled_seconds", "ecc_errors", "remapped_rows", "row_remap_pending"),
    *("row_remap_failure", "pcie_replays", "pcie_bytes", "nvlink_bytes", "activity"),
}


# 1 and 2: no driver, wrong version; 9: permission; 10: unknown error, of the library as a whole


@pytest.mark.parametrize(
    ("code", "problem", "step"),
    [
        (DRIVER_NOT_LOADED, "Driver Not Loaded", "modprobe nvidia"),
        (VERSION_MISMATCH, "version mismatch", "the driver was updated"),
        (NO_PERMISSION, "Insufficient Permissions", "/dev/nvidiactl"),
        (UNKNOWN, "Unknown Error", "restart it"),
    ],
)
def test_a_driver_that_does_not_start_is_asked_again_later_and_later(
    driver: Driver, opened: Open, clock: Clock, code: int, problem: str, step: str
) -> None:
    driver.fail("-", "nvmlInitWithFlags", code)
    driver.record()
    source = opened(driver)
    tried = []
    for second in range(200):
        before = driver.recorded().count("- nvmlInitWithFlags")
        report = source.look()
        assert (report.present, report.gpus, report.processes) == (True, (), ())
        assert report.problem is not None and problem in report.problem and not report.problem.endswith(".")
        assert step in report.next_step
        if driver.recorded().count("- nvmlInitWithFlags") > before:
            tried.append(second)
        clock.step()
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    driver.heal()
    clock.step(60)
    report = source.look()
    assert (report.problem, report.next_step, len(report.gpus)) == (None, "", 2)
    driver.fail("*", "*", code)  # and the next time it is asked soon again
    tried.clear()
    for second in range(9):
        before = driver.recorded().count("- nvmlInitWithFlags")
        clock.step()
        assert source.look().problem is not None
        if driver.recorded().count("- nvmlInitWithFlags") > before:
            tried.append(second)
    assert tried == [1, 3, 7]


# 3: a GPU is lost


@pytest.mark.parametrize(("code", "step"), [(IS_LOST, "Xid"), (16, "--gpu-reset"), (UNKNOWN, "nvidia-smi")])
def test_a_lost_gpu_is_said_to_be_lost_and_the_other_one_is_read_on(
    driver: Driver, opened: Open, clock: Clock, code: int, step: str
) -> None:
    source = opened(driver)
    looks(source, clock, 2)
    driver.xid(0, 79)
    driver.fail(0, "*", code)
    for second in range(20):
        clock.step()
        driver.say(1, "nvmlDeviceGetPowerUsage", 1000 * second)
        report = source.look()
        lost, other = report.gpus
        assert lost.uuid == "GPU-1f0f2a11-0b1c-4d5e-8f60-000000000100"
        assert (lost.name, told(lost)) == ("NVIDIA H100 80GB HBM3", set())
        assert lost.problem is not None and step in lost.next_step
        assert {xid.code: xid.count for xid in lost.xids if xid.count} == {79: 1}
        assert (other.problem, other.power_watts) == (None, second)
        assert other.memory == GpuMemory(85520809984, 3145728, 577765376)
        assert report.problem is not None and report.problem.startswith(f"1 of 2 GPUs: {lost.uuid}: ")
        assert all(process.uuid == other.uuid for process in report.processes)
    driver.heal()
    for _ in range(60):
        clock.step()
        report = source.look()
    assert report.problem is None
    assert [told(gpu) for gpu in report.gpus] == [ALL_TOLD, ALL_TOLD]


def test_a_gpu_that_has_no_name_any_more_is_lost(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    looks(source, clock, 2)
    driver.fail(0, "nvmlDeviceGetUUID", UNKNOWN)
    clock.step()
    lost, other = source.look().gpus
    assert (told(lost), lost.problem) == (set(), "Unknown Error")
    assert (told(other), other.problem) == (ALL_TOLD, None)


@pytest.mark.parametrize("code", [2, NO_PERMISSION, 10, UNKNOWN])
def test_a_gpu_that_tells_nothing_but_its_name_is_lost(driver: Driver, opened: Open, clock: Clock, code: int) -> None:
    driver.record()
    source = opened(driver)
    looks(source, clock, 2)
    asked = {line.split()[1].split(":")[0] for line in driver.recorded()} | {"field"}
    for function in asked - {"nvmlDeviceGetUUID", "nvmlDeviceGetFieldValues"}:
        driver.fail(0, function, code)
    clock.step()
    lost, other = source.look().gpus
    assert told(lost) == set()
    assert lost.problem is not None and lost.next_step
    assert (told(other), other.problem) == (ALL_TOLD, None)


def test_a_name_that_is_no_text_is_none(driver: Driver, opened: Open) -> None:
    driver.say(0, "nvmlDeviceGetName", "\udcff\udcfe")
    driver.say(1, "nvmlDeviceGetUUID", "\udcff")
    report = opened(driver).look()
    assert (report.gpus[0].name, told(report.gpus[0])) == ("", ALL_TOLD - {"activity"})
    assert (report.gpus[1].uuid, told(report.gpus[1])) == ("", set())
    assert dict(report.failures) == {"bad_answer": 2}


def test_a_gpu_that_was_lost_before_the_agent_began_has_no_name_but_a_place(driver: Driver, opened: Open) -> None:
    driver.fail(0, "*", IS_LOST)
    lost, other = opened(driver).look().gpus
    assert (lost.uuid, lost.index, lost.problem) == ("", 0, "GPU is lost")
    assert (other.index, other.problem, told(other)) == (1, None, ALL_TOLD - {"activity"})


# 4: not supported, field by field

FIELDS: dict[str, set[str]] = {
    "nvmlDeviceGetUtilizationRates": {"utilization", "memory_utilization"},
    "nvmlDeviceGetMemoryInfo_v2": {"memory"},
    "nvmlDeviceGetPowerUsage": {"power_watts"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_watts"},
    "nvmlDeviceGetTotalEnergyConsumption": {"energy_joules"},
    "nvmlDeviceGetTemperature:0": {"temperatures"},
    "field:82:0": {"temperatures"},
    "nvmlDeviceGetClockInfo:0": {"clocks"},
    "nvmlDeviceGetClockInfo:3": {"clocks"},
    "nvmlDeviceGetCurrentClocksEventReasons": {"throttled"},
    "nvmlDeviceGetSupportedClocksEventReasons": set(),
    "nvmlDeviceGetViolationStatus:0": {"throttled_seconds"},
    "nvmlDeviceGetViolationStatus:5": {"throttled_seconds"},
    "nvmlDeviceGetTotalEccErrors:0": {"ecc_errors"},
    "nvmlDeviceGetTotalEccErrors:11": {"ecc_errors"},
    "nvmlDeviceGetRemappedRows": {"remapped_rows", "row_remap_pending", "row_remap_failure"},
    "nvmlDeviceGetPcieReplayCounter": {"pcie_replays"},
    "field:197:0": {"pcie_bytes"},
    "field:198:0": {"pcie_bytes"},
    "field:138:4294967295": {"nvlink_bytes"},
    "field:139:4294967295": {"nvlink_bytes"},
    "nvmlGpmQueryDeviceSupport": {"activity"},
    "nvmlGpmSampleGet": {"activity"},
    "nvmlDeviceGetMigMode": set(),
    "nvmlDeviceGetComputeRunningProcesses_v3": set(),
    "nvmlDeviceGetProcessUtilization": set(),
}


def without(gpu: Gpu, names: set[str]) -> Gpu:
    empty = Gpu("", 0, "")
    changes: dict[str, Any] = {name: getattr(empty, name) for name in {*names, "not_told"}}
    return dataclasses.replace(gpu, **changes)


@pytest.mark.parametrize("call", FIELDS)
@pytest.mark.parametrize("code", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, VERSION_OF_ARGUMENT])
def test_a_field_that_is_not_supported_is_absent_alone(
    driver: Driver, opened: Open, clock: Clock, call: str, code: int
) -> None:
    source = opened(driver)
    whole = looks(source, clock, 2).gpus[0]
    source.close()
    if code == NOT_SUPPORTED and call != "nvmlGpmSampleGet":
        driver.hush(0, call)
    else:
        driver.fail(0, call, code)
    clock.step()
    report = looks(opened(driver), clock, 2)
    gpu = report.gpus[0]
    assert report.problem is None
    assert without(gpu, FIELDS[call]) == without(whole, FIELDS[call])
    for name in FIELDS[call]:
        before, now = getattr(whole, name), getattr(gpu, name)
        if isinstance(before, tuple):
            assert set(now) < set(before) and len(now) in (len(before) - 1, 0)
        elif name == "activity":
            assert None in dataclasses.astuple(now)
        else:
            assert now is None
    assert told(report.gpus[1]) == ALL_TOLD


# 5: sentinels


@pytest.mark.parametrize(
    ("call", "values", "absent"),
    [
        ("nvmlDeviceGetUtilizationRates", ("0xFFFFFFFF", 7), {"utilization"}),
        ("nvmlDeviceGetUtilizationRates", (7, "0xFFFFFFFF"), {"memory_utilization"}),
        ("nvmlDeviceGetPowerUsage", ("0xFFFFFFFF",), {"power_watts"}),
        ("nvmlDeviceGetEnforcedPowerLimit", ("0xFFFFFFFF",), {"power_limit_watts"}),
        ("nvmlDeviceGetTotalEnergyConsumption", ("0xFFFFFFFFFFFFFFFF",), {"energy_joules"}),
        ("nvmlDeviceGetPcieReplayCounter", ("0xFFFFFFFF",), {"pcie_replays"}),
        ("nvmlDeviceGetRemappedRows", (1, 2, "0xFFFFFFFF", 0), {"row_remap_pending"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", ("0xFFFFFFFFFFFFFFFF",), {"throttled"}),
    ],
)
def test_a_sentinel_is_absent(
    driver: Driver, opened: Open, clock: Clock, call: str, values: tuple[object, ...], absent: set[str]
) -> None:
    driver.say(0, call, *values)
    report = looks(opened(driver), clock, 2)
    assert told(report.gpus[0]) == ALL_TOLD - absent
    assert (report.problem, told(report.gpus[1])) == (None, ALL_TOLD)


def test_sentinels_in_lists_are_absent_alone(driver: Driver, opened: Open) -> None:
    driver.say(0, "nvmlDeviceGetMemoryInfo_v2", 1009, "0xFFFFFFFFFFFFFFFF", 0, 503)
    driver.say(0, "nvmlDeviceGetClockInfo:1", "0xFFFFFFFF")
    driver.say(0, "nvmlDeviceGetTemperature:0", "0xFFFFFFFF")
    driver.say(0, "field:82:0", "uint", "0xFFFFFFFF")
    driver.say(0, "field:197:0", "wide", "0xFFFFFFFFFFFFFFFF")
    driver.say(0, "field:138:4294967295", "nonsense", 7)
    driver.say(0, "nvmlDeviceGetTotalEccErrors:1", "0xFFFFFFFFFFFFFFFF")
    driver.say(0, "nvmlDeviceGetViolationStatus:0", 1, "0xFFFFFFFFFFFFFFFF")
    driver.say(0, "nvmlDeviceGetComputeRunningProcesses_v3", "11:0xFFFFFFFFFFFFFFFF", "13:17")
    driver.say(0, "nvmlDeviceGetProcessUtilization", "11:1763733599500000:4294967295", "13:1763733599500000:3")
    report = opened(driver).look()
    gpu = report.gpus[0]
    assert gpu.memory == GpuMemory(1009, 503, None)
    assert [domain for domain, _ in gpu.clocks] == ["graphics", "memory", "video"]
    assert gpu.temperatures == ()
    assert gpu.pcie_bytes == (("received", 211106232533),)
    assert gpu.nvlink_bytes == (("received", 57490003 * 1024),)
    assert ("corrected", "aggregate") not in {error[:2] for error in gpu.ecc_errors} and len(gpu.ecc_errors) == 3
    assert [reason for reason, _ in gpu.throttled_seconds] == ["thermal", "sync_boost", "board_limit", "reliability"]
    use = [(process.memory_bytes, process.sm_utilization) for process in report.processes]
    assert use == [(None, None), (17, 0.03)]


# 6: MIG


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, 6])
def test_mig_devices_that_may_not_be_read_leave_the_gpu(
    built: Path, tmp_path: Path, opened: Open, clock: Clock, code: int
) -> None:
    driver = Driver(built, tmp_path, fixture("h200_mig"))
    driver.fail(0, "nvmlDeviceGetMigDeviceHandleByIndex", code)
    (gpu,) = looks(opened(driver), clock, 2).gpus
    assert (gpu.mig, gpu.problem, gpu.power_watts) == ((), None, 523.457)
    driver.heal()
    driver.fail("0.1", "*", code)
    clock.step()
    source = opened(driver)
    (gpu,) = looks(source, clock, 2).gpus
    assert [instance.profile for instance in gpu.mig] == ["1g.18gb"]


# 7: taken out


def test_a_gpu_taken_out_in_the_midst_of_a_look_is_missed_and_found_again(
    driver: Driver, opened: Open, clock: Clock
) -> None:
    driver.record()
    source = opened(driver)
    looks(source, clock, 2)
    calls = len(driver.recorded())
    source.close()
    for after in range(1, calls // 2, 7):
        clock.step()
        driver.heal()
        driver.count(2)
        source = NvmlSource(str(driver.path), clock, clock.wall)
        looks(source, clock, 2)
        # The library counts its calls from its loading on, and each look makes about as many.
        driver.fail(1, "*", 2, calls + after)
        for _ in range(3):
            clock.step()
            report = source.look()
        driver.count(1)
        for _ in range(5):
            clock.step()
            report = source.look()
        stays, gone = report.gpus
        # While one is missing the library is opened anew again and again, each time without an older GPM sample.
        assert (stays.problem, told(stays) | {"activity"}) == (None, ALL_TOLD)
        assert (gone.uuid, told(gone)) == ("GPU-1f0f2a11-0b1c-4d5e-8f60-000000000101", set())
        assert gone.problem == "the driver no longer lists it"
        driver.heal()
        driver.count(2)
        clock.step(60)
        source.look()
        clock.step()
        report = source.look()
        assert [told(gpu) for gpu in report.gpus] == [ALL_TOLD, ALL_TOLD]
        source.close()


def test_a_gpu_that_is_put_in_is_found(driver: Driver, opened: Open, clock: Clock) -> None:
    driver.count(1)
    source = opened(driver)
    assert len(looks(source, clock, 2).gpus) == 1
    driver.count(2)
    assert len(looks(source, clock, 4).gpus) == 2


# 8: slow calls


def test_two_seconds_a_call_delay_the_look_and_nobody_else(driver: Driver) -> None:
    source = NvmlSource(str(driver.path), wall=lambda: NOW)
    poller = Poller("gpus", source.look, 0.01)
    poller.start()
    while poller.latest() is None:
        time.sleep(0.01)
    driver.delay(0, "nvmlDeviceGetPowerUsage", 2000)
    while poller.waiting_ns() < 1.5 * SECOND:
        began = time.monotonic()
        latest = poller.latest()
        assert time.monotonic() - began < 0.1
        assert latest is not None and len(latest[0].gpus) == 2
        time.sleep(0.01)
    began = time.monotonic()
    source.close()  # a look is under way: the end does not wait for it
    assert time.monotonic() - began < 0.1
    driver.heal()
    poller.stop(10)
    latest = poller.latest()
    assert latest is not None
    report = latest[0]
    assert report.seconds >= 2
    assert [gpu.power_watts for gpu in report.gpus] == [412.331, 71.123]
    assert report.problem is None
    source.close()


def test_a_look_ends_when_all_calls_are_slow_and_the_gpus_take_turns(driver: Driver) -> None:
    driver.delay("*", "*", 10)
    source = NvmlSource(str(driver.path), wall=lambda: NOW, patience_ns=200_000_000)
    read: set[int] = set()
    for _ in range(4):
        report = source.look()
        assert report.seconds < 1.5
        assert report.problem is not None and "too slowly" in report.problem
        read |= {gpu.index for gpu in report.gpus if told(gpu)}
    assert read == {0, 1}
    driver.heal()
    assert source.look().problem is None
    source.close()


# 9: permission, of single calls


def test_what_is_not_permitted_is_absent_and_the_rest_is_there(driver: Driver, opened: Open, clock: Clock) -> None:
    for call in ("nvmlGpmSampleGet", "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceRegisterEvents"):
        driver.fail("*", call, NO_PERMISSION)
    source = opened(driver)
    report = looks(source, clock, 3)
    assert [told(gpu) for gpu in report.gpus] == [ALL_TOLD - {"activity"}] * 2
    assert report.problem is None
    assert report.gpus[0].xids == ()  # nobody listens: a zero would be a lie
    assert {"GPM", "nvmlDeviceGetComputeRunningProcesses_v3"} <= set(report.gpus[0].not_told)
    assert dict(report.failures) == {"no_permission": 2 * 3}  # once for each GPU: it is not asked again


def test_a_gpu_that_may_not_be_opened_leaves_the_other_one(driver: Driver, opened: Open) -> None:
    driver.fail(1, "nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION)
    report = opened(driver).look()
    assert told(report.gpus[0]) == ALL_TOLD - {"activity"}
    assert report.gpus[1].problem == "Insufficient Permissions"
    assert report.problem == "1 of 2 GPUs: GPU 1: Insufficient Permissions"


# 10: unknown error, of single calls


def test_an_unknown_error_is_counted_and_the_call_made_again(driver: Driver, opened: Open, clock: Clock) -> None:
    driver.fail(0, "nvmlDeviceGetPowerUsage", UNKNOWN)
    source = opened(driver)
    report = looks(source, clock, 3)
    assert told(report.gpus[0]) == ALL_TOLD - {"power_watts"}
    assert (report.problem, report.failures) == (None, (("unknown", 3),))
    driver.heal()
    clock.step()
    assert source.look().gpus[0].power_watts == 412.331


# 11: empty list


def test_no_gpus_are_said_and_looked_for_again(driver: Driver, opened: Open, clock: Clock) -> None:
    driver.count(0)
    source = opened(driver)
    report = source.look()
    assert (report.gpus, report.present, report.problem) == ((), True, "the driver sees no GPU")
    assert "NVIDIA_VISIBLE_DEVICES" in report.next_step
    driver.count(2)
    clock.step()
    assert len(source.look().gpus) == 2


# 12: the driver is loaded again


def test_a_driver_whose_library_is_taken_away_is_missed(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    assert len(source.look().gpus) == 2
    aside = driver.path.rename(driver.path.with_suffix(".aside"))
    driver.kernel("560.35.03")
    for _ in range(17):
        clock.step()
        report = source.look()
        assert report.present and report.problem is not None
        assert [(gpu.index, gpu.utilization, gpu.problem) for gpu in report.gpus] == [
            (0, None, report.problem),
            (1, None, report.problem),
        ]
    assert "is not a file" in report.problem
    aside.rename(driver.path)
    for _ in range(64):
        clock.step()
        report = source.look()
    assert (report.problem, [gpu.problem for gpu in report.gpus]) == (None, [None, None])


def test_after_an_update_of_the_driver_its_library_is_loaded_again(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    driver.say(0, "nvmlDeviceGetTotalEnergyConsumption", 5000)
    looks(source, clock, 2)
    driver.xid(0, 13)
    clock.step()
    assert source.look().driver_version == "550.90.07"
    driver.kernel("560.35.03")
    driver.say(0, "nvmlDeviceGetTotalEnergyConsumption", 1000)
    clock.step()
    report = source.look()
    assert report.problem is not None and "mismatch" in report.problem
    assert report.driver_version is None
    assert [(gpu.index, told(gpu)) for gpu in report.gpus] == [(0, set()), (1, set())]
    clock.step()
    assert source.look().driver_version == "560.35.03"
    driver.say(0, "nvmlDeviceGetTotalEnergyConsumption", 1700)
    clock.step()
    report = source.look()
    assert report.problem is None
    assert [told(gpu) for gpu in report.gpus] == [ALL_TOLD, ALL_TOLD]
    assert report.gpus[0].energy_joules == 5.7  # what the driver forgot stays
    assert {xid.code: xid.count for xid in report.gpus[0].xids if xid.count} == {13: 1}


# any error, anywhere


def finite(report: GpuReport) -> None:
    """No value that cannot be."""
    for gpu in report.gpus:
        ratios = [gpu.utilization, gpu.memory_utilization, *dataclasses.astuple(gpu.activity)]
        assert all(ratio is None or 0 <= ratio <= 1 for ratio in ratios)
        values = [gpu.power_watts, gpu.power_limit_watts, gpu.energy_joules]
        values += [value for pairs in (gpu.clocks, gpu.throttled_seconds, gpu.remapped_rows) for _, value in pairs]
        values += [value for pairs in (gpu.pcie_bytes, gpu.nvlink_bytes) for _, value in pairs]
        values += [count for _, _, count in gpu.ecc_errors]
        assert all(value is None or (math.isfinite(value) and value >= 0) for value in values)


def test_any_error_of_any_call_is_survived(built: Path, tmp_path: Path, clock: Clock) -> None:
    machine = fixture("h100")
    machine["gpus"][1] = fixture("h200_mig")["gpus"][0]
    driver = Driver(built, tmp_path, machine)
    driver.record()
    source = NvmlSource(str(driver.path), clock, clock.wall)
    whole = looks(source, clock, 2)
    source.close()
    functions = {line.split()[1].split(":")[0] for line in driver.recorded()}
    assert len(functions) > 30 and whole.problem is None
    Path(f"{driver.path}.calls").unlink()
    for function in sorted(functions | {"field"}):
        for code in EVERY_ERROR:
            driver.heal()
            driver.fail("*", function, code)
            source = NvmlSource(str(driver.path), clock, clock.wall)
            for _ in range(2):
                report = source.look()
                clock.step()
                finite(report)
                assert len(report.gpus) in (0, 2)
                assert report.problem is None or report.next_step
            source.close()


NUMBERS = st.sampled_from([0, 1, 101, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, "-1", "nan", "", "x", "\udcff"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_answer_of_any_call_is_survived(built: Path, tmp_path: Path, data: st.DataObject) -> None:
    machine = fixture("h100")
    machine["gpus"][1] = fixture("h200_mig")["gpus"][0]
    for gpu in machine["gpus"]:
        for device in (gpu, *gpu.get("mig", ())):
            for call in data.draw(st.sets(st.sampled_from(sorted(device["calls"])), max_size=6)):
                values = data.draw(st.lists(NUMBERS, max_size=4))
                kind = [data.draw(st.sampled_from(["uint", "int", "wide", "double", "x"]))] if "field" in call else []
                text = " ".join(str(value) for value in kind + values)
                device["calls"][call] = text.encode(errors="replace").decode()
    clock = Clock()
    driver = Driver(built, tmp_path, machine)
    source = NvmlSource(str(driver.path), clock, clock.wall)
    for _ in range(3):
        finite(source.look())
        clock.step()
    source.close()
