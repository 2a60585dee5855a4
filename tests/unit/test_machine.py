"""Rows for the live table from what engines tell."""

from exporter.engines import EngineView, ModelView
from exporter.labels import safe
from exporter.machine import EngineRow, GpuRow, engine_rows, gpu_rows
from probes.gpu_report import Gpu, GpuMemory, GpuReport, XidCount


def test_engines_that_tell_something_have_a_row_by_name() -> None:
    view = EngineView()
    view.models = {
        ("b", "second", "vllm"): ModelView(running=3.0, waiting=0.0, kv_usage_ratio=0.42),
        ("a", "first", "tgi"): ModelView(waiting=17.0),
        ("a", "gone", "tgi"): ModelView(totals={"requests": 101.0}),
    }
    assert engine_rows(view) == [
        EngineRow("a", "first", "tgi", waiting=17.0),
        EngineRow("b", "second", "vllm", running=3.0, waiting=0.0, kv_cache_usage_ratio=0.42),
    ]
    assert engine_rows(EngineView()) == []


def test_a_gpu_is_in_trouble_when_it_is_held_back_or_fails() -> None:
    well = GpuRow("GPU-a", 0, "Tesla T4", utilization_ratio=1.0)
    assert not well.is_in_trouble
    assert GpuRow("GPU-a", 0, "Tesla T4", throttled=("hw_slowdown",)).is_in_trouble
    assert GpuRow("GPU-a", 0, "Tesla T4", xids=((79, 1),)).is_in_trouble
    assert GpuRow("GPU-a", 0, "Tesla T4", problem="it is lost").is_in_trouble


def test_gpus_have_a_row_each() -> None:
    busy = Gpu(
        "GPU-a",
        0,
        "NVIDIA H200",
        utilization=0.87,
        memory=GpuMemory(total=150, used=101, reserved=3),
        power_watts=412.0,
        power_limit_watts=700.0,
        temperatures=(("gpu", 61.0), ("memory", 70.0)),
        throttled=(("sw_power_cap", True), ("hw_slowdown", False)),
        xids=(XidCount(13, 0, None), XidCount(43, 2, 1.5)),
    )
    lost = Gpu("GPU-b", 1, "evil\n", problem="it is\nlost")
    assert gpu_rows(GpuReport(0, 0.1, present=True, gpus=(busy, lost))) == [
        GpuRow("GPU-a", 0, "NVIDIA H200", 0.87, 101, 150, 412.0, 700.0, 61.0, ("sw_power_cap",), ((43, 2),)),
        GpuRow("GPU-b", 1, safe("evil\n"), problem=safe("it is\nlost")),
    ]
    assert "\n" not in safe("evil\n")
    assert gpu_rows(GpuReport(0, 0.1, present=False)) == []
