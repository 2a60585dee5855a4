"""What GPUs say arrives in base units, counts never go back, and everything taken from the library is given back."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from probes import nvml_library
from probes.gpu_report import Gpu, GpuActivity, GpuMemory, GpuProcess, GpuReport, XidCount
from probes.nvml import NvmlSource
from probes.nvml_gpu import KNOWN_XIDS, MAX_XIDS
from probes.nvml_library import FOLDERS, LibraryProblem
from tests.standins.nvml import Driver, build, fixture

SECOND = 1_000_000_000
NOW = 1_763_733_600.0  # half a second after the fixtures' samples
MIB = 1 << 20

Open = Callable[[Driver], NvmlSource]


class Clock:
    def __init__(self) -> None:
        self.ns = SECOND
        self.wall = NOW

    def __call__(self) -> int:
        return self.ns

    def step(self, seconds: float = 1.0) -> None:
        self.ns += round(seconds * SECOND)
        self.wall += seconds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(built: Path, tmp_path: Path) -> Driver:
    return Driver(built, tmp_path / "driver", fixture("h100"))


@pytest.fixture
def opened(clock: Clock) -> Iterator[Open]:
    sources = []

    def make(driver: Driver) -> NvmlSource:
        source = NvmlSource(str(driver.path), clock, lambda: clock.wall)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def second_look(source: NvmlSource, clock: Clock) -> GpuReport:
    source.look()
    clock.step()
    return source.look()


def xids(gpu: Gpu) -> dict[int, int]:
    return {xid.code: xid.count for xid in gpu.xids if xid.count}


def test_an_h100_in_base_units(driver: Driver, opened: Open, clock: Clock) -> None:
    report = second_look(opened(driver), clock)
    assert (report.present, report.library, report.problem) == (True, str(driver.path), None)
    assert (report.driver_version, report.at_ns, report.failures) == ("550.90.07", clock.ns, ())
    gpu, idle = report.gpus
    assert gpu == Gpu(
        "GPU-1f0f2a11-0b1c-4d5e-8f60-000000000100",
        0,
        "NVIDIA H100 80GB HBM3",
        utilization=0.97,
        memory_utilization=0.53,
        memory=GpuMemory(81559 * MIB, 70003 * MIB, 551 * MIB),
        power_watts=412.331,
        power_limit_watts=700.0,
        energy_joules=9007199254.741,
        temperatures=(("gpu", 61.0), ("memory", 73.0)),
        clocks=(
            *(("graphics", 1_755_000_000), ("sm", 1_755_000_000)),
            *(("memory", 2_619_000_000), ("video", 1_470_000_000)),
        ),
        throttled=(
            *(("sw_power_cap", True), ("hw_slowdown", False), ("sync_boost", False), ("sw_thermal_slowdown", False)),
            *(("hw_thermal_slowdown", False), ("hw_power_brake_slowdown", False)),
        ),
        throttled_seconds=(
            *(("power", 73.000000019), ("thermal", 0.0), ("sync_boost", 0.0)),
            *(("board_limit", 0.0), ("reliability", 0.0)),
        ),
        ecc_errors=(
            *(("corrected", "volatile", 0), ("corrected", "aggregate", 2)),
            *(("uncorrected", "volatile", 0), ("uncorrected", "aggregate", 0)),
        ),
        remapped_rows=(("correctable", 0), ("uncorrectable", 0)),
        row_remap_pending=False,
        row_remap_failure=False,
        pcie_replays=0,
        pcie_bytes=(("sent", 733007751853), ("received", 211106232533)),
        nvlink_bytes=(("sent", 57512341 * 1024), ("received", 57490003 * 1024)),
        activity=GpuActivity(83.7 / 100, 41.3 / 100, 29.1 / 100, 67.9 / 100),
        xids=tuple(XidCount(code, 0, None) for code in KNOWN_XIDS),
    )
    assert (idle.utilization, idle.power_watts) == (0.0, 71.123)


def test_what_processes_have(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    uuid = "GPU-1f0f2a11-0b1c-4d5e-8f60-000000000100"
    busy, other = source.look().processes
    assert busy == GpuProcess(4001, uuid, 61203283968, 0.79)
    assert other == GpuProcess(4003, uuid, 12197036032, 0.11)
    clock.step()
    assert [process.sm_utilization for process in source.look().processes] == [None, None]  # those samples are old
    driver.say(0, "nvmlDeviceGetProcessUtilization", f"4003:{NOW:.0f}100000:30", f"4003:{NOW:.0f}200000:53")
    clock.step()
    assert [process.sm_utilization for process in source.look().processes] == [None, pytest.approx(0.415)]


def test_a_clock_that_is_set_back_hides_no_samples(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    source.look()
    clock.step(-3600)
    clock.ns += 7200 * SECOND
    driver.say(0, "nvmlDeviceGetProcessUtilization", f"4001:{int(clock.wall * 1e6) + 7}:13")
    assert source.look().processes[0].sm_utilization == 0.13


def test_samples_of_no_process_or_no_time_are_none(driver: Driver, opened: Open) -> None:
    driver.say(0, "nvmlDeviceGetProcessUtilization", "0:0:0", "4001:0:50", f"0:{NOW:.0f}100000:7")
    assert [process.sm_utilization for process in opened(driver).look().processes] == [None, None]


def test_a_process_in_two_lists_is_one(driver: Driver, opened: Open) -> None:
    driver.say(0, "nvmlDeviceGetMPSComputeRunningProcesses_v3", "4001:61203283968", "4005:17")
    memory = {process.tgid: process.memory_bytes for process in opened(driver).look().processes}
    assert memory == {4001: 61203283968, 4003: 12197036032, 4005: 17}


def test_mig_devices_have_their_own_memory_activity_and_processes(built: Path, tmp_path: Path, opened: Open) -> None:
    clock = Clock()
    driver = Driver(built, tmp_path, fixture("h200_mig"))
    source = NvmlSource(str(driver.path), clock, lambda: clock.wall)
    report = second_look(source, clock)
    (gpu,) = report.gpus
    assert (gpu.utilization, gpu.activity, gpu.power_watts) == (None, GpuActivity(), 523.457)
    small, large = gpu.mig
    assert (small.profile, small.memory) == ("1g.18gb", GpuMemory(16384 * MIB, 11003 * MIB, 0))
    assert small.activity == GpuActivity(53.9 / 100, 17.3 / 100, 7.1 / 100, 31.7 / 100)
    assert (large.profile, large.activity.sm_active) == ("3g.71gb", 0.0)
    assert report.processes == (GpuProcess(4019, small.uuid, 11532238848, None),)
    source.close()


def test_mig_devices_come_and_go(built: Path, tmp_path: Path, opened: Open, clock: Clock) -> None:
    machine = fixture("h200_mig")
    driver = Driver(built, tmp_path, machine)
    source = opened(driver)
    second_look(source, clock)
    library = ctypes.CDLL(str(driver.path))
    assert library.standin_samples() == 4
    del machine["gpus"][0]["mig"][0]
    driver.use(machine)
    clock.step()
    (gpu,) = source.look().gpus
    assert [instance.profile for instance in gpu.mig] == ["3g.71gb"]
    assert library.standin_samples() == 4 - 2 - 2 + 2  # place 0 has now what place 1 had
    source.close()
    assert library.standin_samples() == 0


def test_an_old_driver_names_no_profile_and_it_is_made_of_the_slices(built: Path, tmp_path: Path, opened: Open) -> None:
    machine = fixture("a100_mig")
    machine["gpus"][0]["mig"][0]["name"] = "NVIDIA A100-SXM4-40GB"
    machine["gpus"][0]["mig"][0]["calls"]["nvmlDeviceGetAttributes_v2"] = [3, 1, 19968]
    (gpu,) = opened(Driver(built, tmp_path, machine)).look().gpus
    assert [instance.profile for instance in gpu.mig] == ["1c.3g.20gb", "1g.5gb"]
    assert gpu.temperatures == (("gpu", 37.0), ("memory", 43.0))  # by the call that old drivers have
    assert len(gpu.throttled) == 6


@pytest.mark.parametrize("call", ["nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"])
def test_either_call_for_the_temperature_will_do(built: Path, tmp_path: Path, opened: Open, call: str) -> None:
    driver = Driver(built, tmp_path, fixture("h200"))
    driver.hush(0, f"{call}:0")
    (gpu,) = opened(driver).look().gpus
    assert dict(gpu.temperatures)["gpu"] == 61.0
    assert not any("Temperature" in what for what in gpu.not_told)


def test_a_t4_throttles_and_has_neither_rows_nor_links(built: Path, tmp_path: Path, opened: Open) -> None:
    (gpu,) = opened(Driver(built, tmp_path, fixture("t4"))).look().gpus
    assert [reason for reason, now in gpu.throttled if now] == ["sw_thermal_slowdown"]
    assert gpu.throttled_seconds == (("power", 17e-9), ("thermal", 5.003))
    assert gpu.ecc_errors[:2] == (("corrected", "volatile", 3), ("corrected", "aggregate", 19))
    assert (gpu.remapped_rows, gpu.row_remap_pending, gpu.nvlink_bytes, gpu.pcie_bytes) == ((), None, (), ())
    assert gpu.temperatures == (("gpu", 71.0),)


def test_a_geforce_idles_without_being_throttled(built: Path, tmp_path: Path, opened: Open) -> None:
    report = opened(Driver(built, tmp_path, fixture("geforce"))).look()
    (gpu,) = report.gpus
    assert gpu.throttled and not any(now for _, now in gpu.throttled)
    assert gpu.ecc_errors == gpu.throttled_seconds == ()
    assert gpu.pcie_bytes == ()  # 32 bits wrap more than once between two looks
    assert report.processes[0].memory_bytes is None
    assert "NVML_FI_DEV_MEMORY_TEMP" in gpu.not_told and "nvmlDeviceGetMigMode" not in gpu.not_told


def test_only_supported_reasons_are_told(driver: Driver, opened: Open) -> None:
    driver.say(0, "nvmlDeviceGetSupportedClocksEventReasons", "0x44")
    gpu = opened(driver).look().gpus[0]
    assert gpu.throttled == (("sw_power_cap", True), ("hw_thermal_slowdown", False))


def test_links_that_are_only_told_one_by_one_add_up(driver: Driver, opened: Open, clock: Clock) -> None:
    driver.hush(0, "field:138:4294967295")
    driver.hush(0, "field:139:4294967295")
    driver.say(0, "field:202:0", "wide", 1009)
    driver.say(0, "field:202:17", "wide", 2003)
    driver.say(0, "field:204:17", "wide", 3001)
    source = opened(driver)
    assert source.look().gpus[0].nvlink_bytes == (("sent", 3012), ("received", 3001))
    driver.say(0, "field:202:0", "error", 10)  # one link does not answer: its bytes stay in the sum
    driver.say(0, "field:202:17", "wide", 2011)
    clock.step()
    assert source.look().gpus[0].nvlink_bytes == (("sent", 3020), ("received", 3001))


def test_counts_never_go_back(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    driver.say(0, "nvmlDeviceGetTotalEnergyConsumption", 5000)
    assert source.look().gpus[0].energy_joules == 5.0
    told = []
    for millijoules in (7000, 1000, 1500, 900, 900):
        driver.say(0, "nvmlDeviceGetTotalEnergyConsumption", millijoules)
        clock.step()
        told.append(source.look().gpus[0].energy_joules)
    assert told == [7.0, 7.0, 7.5, 7.5, 7.5]


def test_xid_errors_are_counted_with_their_time(driver: Driver, opened: Open, clock: Clock) -> None:
    driver.xid(0, 31)  # before anybody listened: it is not told
    source = opened(driver)
    assert xids(source.look().gpus[0]) == {}
    for gpu, code in ((0, 79), (1, 13), (0, 79), (0, 137)):
        driver.xid(gpu, code)
    clock.step(2)
    first, second = source.look().gpus
    assert xids(first) == {79: 2, 137: 1}
    assert xids(second) == {13: 1}
    assert {xid.last_time for xid in first.xids if xid.count} == {NOW + 2}


def test_more_codes_than_there_is_room_for_are_one(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    source.look()
    for code in range(1001, 1101):
        driver.xid(0, code)
    clock.step()
    counts = xids(source.look().gpus[0])
    assert len(source.look().gpus[0].xids) == MAX_XIDS + 1
    assert sum(counts.values()) == 100 and counts[0] == 100 - (MAX_XIDS - len(KNOWN_XIDS))


def test_the_first_look_has_no_activity(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    assert source.look().gpus[0].activity == GpuActivity()
    clock.step(0.05)  # too short for the driver
    assert source.look().gpus[0].activity == GpuActivity()
    clock.step()
    full = source.look().gpus[0].activity
    assert full.sm_active == 83.7 / 100
    clock.step(0.05)
    driver.say(0, "gpm:2", 1.0)
    assert source.look().gpus[0].activity == full


@pytest.mark.parametrize(
    ("percent", "ratio"), [("100.4", 1.0), ("-3", None), ("nan", None), ("inf", None), ("1e9", None)]
)
def test_activity_that_cannot_be_is_absent(
    driver: Driver, opened: Open, clock: Clock, percent: str, ratio: float | None
) -> None:
    driver.say(0, "gpm:2", percent)
    driver.hush(0, "gpm:10")
    activity = second_look(opened(driver), clock).gpus[0].activity
    assert (activity.sm_active, activity.sm_occupancy, activity.dram_active) == (ratio, 41.3 / 100, None)


def test_everything_is_given_back_and_the_library_is_unloaded(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    second_look(source, clock)
    library = ctypes.CDLL(str(driver.path))
    assert (library.standin_samples(), library.standin_sets()) == (4, 1)
    source.close()
    assert (library.standin_samples(), library.standin_sets()) == (0, 0)
    assert pynvml.nvmlLib is None
    import _ctypes

    _ctypes.dlclose(library._handle)
    assert str(driver.path) not in Path("/proc/self/maps").read_text()


def test_a_closed_source_opens_again(driver: Driver, opened: Open, clock: Clock) -> None:
    source = opened(driver)
    source.close()
    assert len(source.look().gpus) == 2
    source.close()
    source.close()
    assert len(source.look().gpus) == 2


def test_what_is_not_supported_is_asked_once_and_said_once(
    built: Path, tmp_path: Path, opened: Open, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "footlight")
    driver = Driver(built, tmp_path, fixture("t4"))
    driver.record()
    source = opened(driver)
    for _ in range(5):
        source.look()
        clock.step()
    assert driver.recorded().count("0 nvmlDeviceGetRemappedRows") == 1
    assert driver.recorded().count("0 nvmlDeviceGetPowerUsage") == 5
    assert driver.recorded().count("0 nvmlDeviceGetMigMode") == 1
    driver.kernel("470.256.03")  # a new driver may support more
    for _ in range(3):
        source.look()
        clock.step()
    assert driver.recorded().count("0 nvmlDeviceGetRemappedRows") == 2
    said = [record.getMessage() for record in caplog.records if "does not tell" in record.getMessage()]
    assert len(said) == 1
    assert "nvmlDeviceGetRemappedRows (Not Supported)" in said[0]


def test_the_usual_folders_are_searched_before_the_loader_is_asked(built: Path, tmp_path: Path) -> None:
    there = Driver(built, tmp_path / "b", fixture("t4"))
    os.mkdir(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / there.path.name)  # opening it would hang
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / there.path.name).write_text("not a library")
    folders = [str(tmp_path / name) for name in ("none", "a", "c", "b")]
    try:
        assert nvml_library.load(None, folders) == str(there.path)
    finally:
        nvml_library.unload()
    assert any(folder.startswith("/usr/local/nvidia") for folder in FOLDERS)


def test_a_library_that_is_none_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a library")
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("text", "cannot be loaded"), ("fifo", "is not a file"), ("none", "is not a file")):
        with pytest.raises(LibraryProblem, match=words) as raised:
            nvml_library.load(str(tmp_path / name))
        assert raised.value.present == (name == "text")
        assert "gpu: library" in raised.value.next_step


def test_without_any_library_there_is_no_driver(tmp_path: Path) -> None:
    source = NvmlSource(load=lambda configured: nvml_library.load(configured, [str(tmp_path)], ask_loader=False))
    report = source.look()
    assert not report.present and report.gpus == ()
    assert report.problem is not None and "no NVIDIA driver is installed" in report.problem
    assert "probes: {gpu: off}" in report.next_step
