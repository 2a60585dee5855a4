"""Each gpu_* metric has the driver's value in its base unit, and a scrape asks the driver for nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.families import Kind, Scrape
from exporter.gpu_metrics import gpu_families
from exporter.status import AgentStatus, ReaderStatus, TargetStatus
from probes.gpu_report import Gpu, GpuProcess, GpuReport, XidCount
from probes.nvml import NvmlSource
from tests.standins.nvml import Driver, build, fixture

DCGM = Path(__file__).resolve().parents[2] / "docs" / "dcgm.md"
NOW = 1_763_733_600.0
MIB = 1 << 20
H100 = 'uuid="GPU-1f0f2a11-0b1c-4d5e-8f60-000000000100"'

Look = Callable[[str], GpuReport]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def look(built: Path, tmp_path: Path) -> Iterator[Look]:
    """What the second look at a machine tells."""
    now_ns = [0]

    def report(name: str) -> GpuReport:
        driver = Driver(built, tmp_path / name, fixture(name))
        source = NvmlSource(str(driver.path), lambda: now_ns[0], lambda: NOW)
        source.look()
        now_ns[0] += 1_000_000_000
        told = source.look()
        source.close()
        driver.path.unlink()
        return told

    yield report


def scraped(report: GpuReport | None, *targets: TargetStatus) -> dict[str, float]:
    """All samples, as the text format writes them."""
    status = AgentStatus(0, "ring", (), targets, 0, ())
    scrape = Scrape(0, 0.0, (), status, ReaderStatus(0), gpus=report)
    samples = {}
    for family in gpu_families():
        for values, value in family.points(scrape):
            labels = ",".join(f'{label}="{text}"' for label, text in zip(family.spec.labels, values, strict=True))
            assert isinstance(value, float | int)
            name = f"{family.spec.text_name()}{{{labels}}}"
            assert name not in samples
            samples[name] = value
    return samples


def test_every_metric_of_an_h100(look: Look) -> None:
    samples = scraped(look("h100"), TargetStatus("chat", 2, 1, (4001, 4003)), TargetStatus("other", 1, 1, (9,)))
    assert {name: value for name, value in samples.items() if H100 in name and "gpu_xid" not in name} == {
        f'gpu_info{{{H100},name="NVIDIA H100 80GB HBM3",index="0",driver_version="550.90.07",mig_profile=""}}': 1,
        f"gpu_up{{{H100}}}": 1,
        f"gpu_utilization_ratio{{{H100}}}": 0.97,
        f"gpu_memory_utilization_ratio{{{H100}}}": 0.53,
        f"gpu_memory_used_bytes{{{H100}}}": 70003 * MIB,
        f"gpu_memory_total_bytes{{{H100}}}": 81559 * MIB,
        f"gpu_memory_reserved_bytes{{{H100}}}": 551 * MIB,
        f"gpu_power_watts{{{H100}}}": 412.331,
        f"gpu_power_limit_watts{{{H100}}}": 700,
        f"gpu_energy_joules_total{{{H100}}}": 9007199254.741,
        f'gpu_temperature_celsius{{{H100},sensor="gpu"}}': 61,
        f'gpu_temperature_celsius{{{H100},sensor="memory"}}': 73,
        f'gpu_clock_hertz{{{H100},domain="graphics"}}': 1755e6,
        f'gpu_clock_hertz{{{H100},domain="sm"}}': 1755e6,
        f'gpu_clock_hertz{{{H100},domain="memory"}}': 2619e6,
        f'gpu_clock_hertz{{{H100},domain="video"}}': 1470e6,
        f'gpu_throttled{{{H100},reason="sw_power_cap"}}': 1,
        f'gpu_throttled{{{H100},reason="hw_slowdown"}}': 0,
        f'gpu_throttled{{{H100},reason="sync_boost"}}': 0,
        f'gpu_throttled{{{H100},reason="sw_thermal_slowdown"}}': 0,
        f'gpu_throttled{{{H100},reason="hw_thermal_slowdown"}}': 0,
        f'gpu_throttled{{{H100},reason="hw_power_brake_slowdown"}}': 0,
        f'gpu_throttled_seconds_total{{{H100},reason="power"}}': 73.000000019,
        f'gpu_throttled_seconds_total{{{H100},reason="thermal"}}': 0,
        f'gpu_throttled_seconds_total{{{H100},reason="sync_boost"}}': 0,
        f'gpu_throttled_seconds_total{{{H100},reason="board_limit"}}': 0,
        f'gpu_throttled_seconds_total{{{H100},reason="reliability"}}': 0,
        f'gpu_ecc_errors_total{{{H100},severity="corrected",counter="volatile"}}': 0,
        f'gpu_ecc_errors_total{{{H100},severity="corrected",counter="aggregate"}}': 2,
        f'gpu_ecc_errors_total{{{H100},severity="uncorrected",counter="volatile"}}': 0,
        f'gpu_ecc_errors_total{{{H100},severity="uncorrected",counter="aggregate"}}': 0,
        f'gpu_remapped_rows{{{H100},cause="correctable"}}': 0,
        f'gpu_remapped_rows{{{H100},cause="uncorrectable"}}': 0,
        f"gpu_row_remap_pending{{{H100}}}": 0,
        f"gpu_row_remap_failure{{{H100}}}": 0,
        f"gpu_pcie_replays_total{{{H100}}}": 0,
        f'gpu_pcie_bytes_total{{{H100},direction="sent"}}': 733007751853,
        f'gpu_pcie_bytes_total{{{H100},direction="received"}}': 211106232533,
        f'gpu_nvlink_bytes_total{{{H100},direction="sent"}}': 57512341 * 1024,
        f'gpu_nvlink_bytes_total{{{H100},direction="received"}}': 57490003 * 1024,
        f"gpu_sm_active_ratio{{{H100}}}": pytest.approx(0.837),
        f"gpu_sm_occupancy_ratio{{{H100}}}": pytest.approx(0.413),
        f"gpu_tensor_active_ratio{{{H100}}}": pytest.approx(0.291),
        f"gpu_dram_active_ratio{{{H100}}}": pytest.approx(0.679),
        f'gpu_service_memory_used_bytes{{service_name="chat",{H100}}}': 61203283968 + 12197036032,
    }
    assert samples["footlight_gpu_look_seconds{}"] == 0  # the clock of this test stood still
    assert not any("other" in name for name in samples)


@pytest.mark.parametrize(
    ("machine", "name", "value"),
    [
        ("h200", "gpu_memory_total_bytes", 143771 * MIB),
        ("h200", "gpu_power_watts", 523.457),
        ("h200", "gpu_dram_active_ratio", 67.9 / 100),
        ("a100_mig", "gpu_utilization_ratio", None),
        ("a100_mig", "gpu_remapped_rows", 1),
        ("a100_mig", "gpu_sm_active_ratio", None),
        ("t4", "gpu_ecc_errors_total", 3),
        ("t4", "gpu_pcie_bytes_total", None),
        ("t4", "gpu_row_remap_failure", None),
        ("geforce", "gpu_ecc_errors_total", None),
        ("geforce", "gpu_energy_joules_total", 777777.777),
        ("geforce", "gpu_nvlink_bytes_total", None),
    ],
)
def test_other_gpus(look: Look, machine: str, name: str, value: float | None) -> None:
    samples = scraped(look(machine))
    found = [sample for key, sample in samples.items() if key.startswith(f"{name}{{uuid=\"GPU-")]
    assert found[:1] == ([] if value is None else [value])


def test_mig_devices_have_a_profile_memory_and_activity(look: Look) -> None:
    samples = scraped(look("h200_mig"), TargetStatus("chat", 1, 1, (4019,)))
    uuid = 'uuid="MIG-5b0f2a11-0b1c-4d5e-8f60-000000000211"'
    assert {name: value for name, value in samples.items() if uuid in name} == {
        f'gpu_info{{{uuid},name="NVIDIA H200 MIG 1g.18gb",index="0:0",driver_version="570.124.06",'
        f'mig_profile="1g.18gb"}}': 1,
        f"gpu_memory_used_bytes{{{uuid}}}": 11003 * MIB,
        f"gpu_memory_total_bytes{{{uuid}}}": 16384 * MIB,
        f"gpu_memory_reserved_bytes{{{uuid}}}": 0,
        f"gpu_sm_active_ratio{{{uuid}}}": 53.9 / 100,
        f"gpu_sm_occupancy_ratio{{{uuid}}}": 17.3 / 100,
        f"gpu_tensor_active_ratio{{{uuid}}}": 7.1 / 100,
        f"gpu_dram_active_ratio{{{uuid}}}": 31.7 / 100,
        f'gpu_service_memory_used_bytes{{service_name="chat",{uuid}}}': 11532238848,
    }


def report_of(*processes: GpuProcess) -> GpuReport:
    return GpuReport(0, 0.0, True, gpus=(Gpu("GPU-1", 0, "one"), Gpu("GPU-2", 1, "two")), processes=processes)


def test_services_have_what_their_processes_have() -> None:
    report = report_of(
        GpuProcess(11, "GPU-1", 1009, 0.25),
        GpuProcess(13, "GPU-1", 2003, 0.5),
        GpuProcess(13, "GPU-2", 3001, None),
        GpuProcess(17, "GPU-2", 5003, 0.125),
        GpuProcess(19, "GPU-1", 7001, 1.0),  # of no service
    )
    samples = scraped(report, TargetStatus("a", 2, 1, (11, 13)), TargetStatus("b\n", 1, 1, (17,)))
    assert {name: value for name, value in samples.items() if "service" in name} == {
        'gpu_service_memory_used_bytes{service_name="a",uuid="GPU-1"}': 3012,
        'gpu_service_memory_used_bytes{service_name="a",uuid="GPU-2"}': 3001,
        'gpu_service_memory_used_bytes{service_name="b\ufffd",uuid="GPU-2"}': 5003,
        'gpu_service_sm_utilization_ratio{service_name="a",uuid="GPU-1"}': 0.75,
        'gpu_service_sm_utilization_ratio{service_name="b\ufffd",uuid="GPU-2"}': 0.125,
    }


def test_a_service_of_which_not_every_process_is_known_has_no_sum() -> None:
    report = report_of(GpuProcess(11, "GPU-1", 1009, 0.25), GpuProcess(13, "GPU-1", 2003, 0.5))
    samples = scraped(report, TargetStatus("a", 67, 1, (11,)), TargetStatus("b", 1, 1, (13,)))
    assert {name: value for name, value in samples.items() if "service" in name} == {
        'gpu_service_memory_used_bytes{service_name="b",uuid="GPU-1"}': 2003,
        'gpu_service_sm_utilization_ratio{service_name="b",uuid="GPU-1"}': 0.5,
    }


def test_a_sum_that_misses_a_process_is_absent() -> None:
    known, unknown = GpuProcess(11, "GPU-1", 1009, None), GpuProcess(13, "GPU-1", None, None)
    for processes in ((known, unknown), (unknown, known)):
        assert not any("service" in name for name in scraped(report_of(*processes), TargetStatus("a", 2, 1, (11, 13))))


def test_a_lost_gpu_is_down_and_its_errors_stay() -> None:
    xids = (XidCount(0, 3, NOW), XidCount(74, 0, None), XidCount(79, 2, NOW + 1))
    report = GpuReport(0, 0.5, True, gpus=(Gpu("", 0, "", "lost"), Gpu("GPU-2", 1, "two", "GPU is lost", xids=xids)))
    label = 'uuid="GPU-2"'
    assert scraped(report) == {
        f'gpu_info{{{label},name="two",index="1",driver_version="_unknown",mig_profile=""}}': 1,
        f"gpu_up{{{label}}}": 0,
        f'gpu_xid_errors_total{{{label},xid="other"}}': 3,
        f'gpu_xid_errors_total{{{label},xid="74"}}': 0,
        f'gpu_xid_errors_total{{{label},xid="79"}}': 2,
        f'gpu_xid_last_time_seconds{{{label},xid="other"}}': NOW,
        f'gpu_xid_last_time_seconds{{{label},xid="79"}}': NOW + 1,
        "footlight_gpu_look_seconds{}": 0.5,
    }


def test_failed_calls_are_counted_by_error() -> None:
    report = GpuReport(0, 0.0, True, problem="Unknown Error", failures=(("timeout", 3), ("unknown", 7)))
    samples = scraped(report)
    assert samples['footlight_gpu_call_failures_total{error="timeout"}'] == 3
    assert samples['footlight_gpu_call_failures_total{error="unknown"}'] == 7


def test_without_a_report_there_is_nothing() -> None:
    assert scraped(None) == {}


def test_a_scrape_reads_the_report_alone() -> None:
    # The module that renders cannot ask the driver: nothing of it brings pynvml along.
    check = "import sys, exporter.gpu_metrics; assert not {'pynvml', 'probes.nvml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_names_and_units_follow_the_rules() -> None:
    specs = [family.spec for family in gpu_families()]
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert not spec.unit or spec.name.endswith(f"_{spec.unit}")
        assert spec.kind in (Kind.COUNTER, Kind.GAUGE, Kind.INFO) and spec.help.endswith(".")


def test_the_page_has_a_row_for_each_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `(gpu_\w+)` \| (.+?) \|", DCGM.read_text(encoding="utf-8"), re.MULTILINE)
    names = [spec.text_name() for spec in (family.spec for family in gpu_families()) if spec.name.startswith("gpu")]
    assert [name for name, _ in rows] == names
    assert all("DCGM_FI_" in theirs or theirs == "none" for _, theirs in rows)
