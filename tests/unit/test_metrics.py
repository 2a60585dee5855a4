"""The text of /metrics: golden, by two parsers, by promtool, and byte for byte against the library's own encoders."""

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import prometheus_client.openmetrics.exposition
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest

from exporter.critical_path import Cause
from exporter.families import Kind
from exporter.kernel_metrics import BUCKETS, OFF_CPU_REASONS, OPERATIONS
from exporter.metrics import Format, Metrics, Sources, choose_format
from exporter.metrics_doc import PAGE, page
from exporter.quantiles import SLOT_NS
from exporter.request import Capture, Failure, FinishedRequest, Phase
from exporter.slis import CausePhase, Slis
from exporter.status import (
    AgentStatus,
    Loss,
    ProbeLosses,
    ProbeStatus,
    ProcessUsage,
    ReaderStatus,
    ServiceProcesses,
    SyscallLatency,
    TargetStatus,
    why_not_ready,
)
from probes import btf
from probes.probe import OBJECTS
from tests.unit.finished import REQUEST, later

GOLDEN = Path(__file__).parent.parent / "fixtures" / "metrics"
MS = 1_000_000
START_NS = 1_000_003 * SLOT_NS

STATUS = AgentStatus(
    at_ns=START_NS,
    transport="ring",
    probes=(
        ProbeStatus("requests", True, "", 1_009, 53_000_000, 2_011, (Loss("reads_ring_full", 3), Loss("capped", 0))),
    ),
    targets=(TargetStatus("roleplay", 3, 1),),
    reader_restarts=1,
    processes=(
        ProcessUsage("attacher", 11, 1.25, 23_000_000, 13_000_000),
        ProcessUsage("reader", 13, 7.5, 61_000_000, None),
    ),
    services=(ServiceProcesses("roleplay", 101, 0.25, 7, 211_000_000, 3),),
    syscalls=(SyscallLatency("roleplay", "futex", 1_009_000, (2, 3, *[0] * 25, 1)),),
)
READER = ReaderStatus(
    connections=17,
    losses=(ProbeLosses("requests", (Loss("reads_ring_full", 2), Loss("gap", 0))),),
    paths=1_013,
    path_cpu_ns=407_000_000,
)

# Every metric of the semantics page that this version has, by the name it has there.
FAMILIES = """
llm_requests_total llm_request_failures_total llm_requests_aborted_total llm_requests_in_flight
llm_time_to_first_token_seconds llm_inter_token_latency_seconds llm_request_time_per_output_token_seconds
llm_request_longest_gap_seconds llm_request_duration_seconds llm_request_read_delay_seconds llm_prompt_tokens_total
llm_generation_tokens_total llm_frames_total llm_wasted_generation_tokens_total llm_prefix_cache_queries_total
llm_prefix_cache_hits_total llm_kv_cache_hit_ratio llm_prefill_tokens_per_second llm_decode_tokens_per_second
llm_latency_quantile_seconds footlight_capture_total footlight_capture_ratio footlight_lost_events_total
footlight_probe_up footlight_probe_required footlight_probe_events_total footlight_probe_cpu_seconds_total
llm_latency_cause_seconds_total
kernel_run_queue_wait_seconds kernel_on_cpu_seconds_total kernel_off_cpu_seconds_total kernel_cpu_quota_seconds_total
kernel_cpu_migrations_total kernel_context_switches_total kernel_tcp_connect_seconds kernel_tcp_round_trip_seconds
kernel_tcp_receive_queue_seconds kernel_tcp_send_stall_seconds kernel_tcp_retransmits_total kernel_tcp_resets_total
kernel_block_io_seconds kernel_block_io_bytes_total kernel_direct_reclaim_seconds kernel_oom_kills_total
kernel_syscall_seconds kernel_open_files kernel_open_files_growth_per_second kernel_threads
kernel_resident_memory_bytes kernel_major_page_faults_total
llm_kv_cache_source_info llm_kv_cache_source_lookup_tokens_total llm_kv_cache_source_hit_tokens_total
llm_prefix_cache_turn_queries_total llm_prefix_cache_turn_hits_total llm_kv_cache_turn_hit_ratio llm_engine_info
llm_engine_up llm_engine_scrape_failures_total llm_engine_scrape_seconds llm_engine_requests_running
llm_engine_requests_waiting llm_engine_kv_cache_usage_ratio llm_engine_prefix_cache_queries_total
llm_engine_prefix_cache_hits_total llm_engine_preemptions_total llm_engine_requests_total
llm_engine_prompt_tokens_total llm_engine_generation_tokens_total llm_engine_time_to_first_token_mean_seconds
llm_engine_time_to_first_token_difference_seconds llm_engine_requests_difference llm_probe_point_calls_total
llm_probe_point_looked_up_tokens_total llm_probe_point_hit_tokens_total kernel_gpu_wait_seconds gpu_info gpu_up
gpu_utilization_ratio gpu_memory_utilization_ratio gpu_memory_used_bytes gpu_memory_total_bytes
gpu_memory_reserved_bytes gpu_power_watts gpu_power_limit_watts gpu_energy_joules_total gpu_temperature_celsius
gpu_clock_hertz gpu_throttled gpu_throttled_seconds_total gpu_ecc_errors_total gpu_remapped_rows gpu_row_remap_pending
gpu_row_remap_failure gpu_xid_errors_total gpu_xid_last_time_seconds gpu_pcie_replays_total gpu_pcie_bytes_total
gpu_nvlink_bytes_total gpu_sm_active_ratio gpu_sm_occupancy_ratio gpu_tensor_active_ratio gpu_dram_active_ratio
gpu_service_memory_used_bytes gpu_service_sm_utilization_ratio gpu_cuda_launches_total gpu_cuda_synchronize_seconds
gpu_cuda_copies_total gpu_cuda_copy_bytes_total gpu_cuda_allocations_total gpu_cuda_frees_total
gpu_cuda_outstanding_bytes gpu_cuda_errors_total
llm_slo_info llm_slo_objective_ratio llm_slo_events_total llm_slo_good_events_total llm_slo_violations_total
llm_slo_burn_rate llm_slo_error_budget_remaining_ratio llm_slo_covered_seconds llm_slo_unfollowed
""".split()
STATS = {name: f"{name}_stats" for name in ("scheduler", "tcp", "block", "memory")}


def finished(model: str, release: str, **more: object) -> FinishedRequest:
    request = replace(later(REQUEST, START_NS), model=model, extra=(release,))
    return replace(request, **more)  # type: ignore[arg-type]  # each of them is of its field's type


def counters() -> dict[str, np.ndarray[tuple[int], np.dtype[np.void]]]:
    """What the probes counted for `roleplay`, 1, 2, 3, ... in the order of the structures; nothing for `idle`."""
    made = {}
    for probe, record in STATS.items():
        dtype = btf.dtype_of(OBJECTS / f"{probe}.bpf.o", record)
        words = np.zeros((2, dtype.itemsize // 8), np.uint64)
        words[0] = np.arange(1, dtype.itemsize // 8 + 1)
        made[probe] = words.view(dtype)[:, 0]
    return made


def scene(timer: Callable[[], float]) -> Metrics:
    """Two models, one with usage; a failure; an abort; a hostile name; an idle service; two requests in flight."""
    slis = Slis(("release",), models_per_service=3, clock=lambda: START_NS + SLOT_NS)
    slis.service("idle")
    for model, more in (
        ("bard", {"prompt_tokens": 101, "completion_tokens": 23, "cached_tokens": 64}),
        ("bard", {"failure": Failure.rate_limited, "status": 429, "frames": 0, "first_token_ns": None}),
        ("jester", {"aborted": Phase.streaming, "wasted_tokens": 5, "capture": Capture.arrival_unseen}),
        ('evil"\\\n\ud800', {"capture": Capture.lost_events}),
        ("one too many", {}),
    ):
        series = slis.series("roleplay", model, "chat_completions", ("stable",), admit=True)
        request = finished(model, "stable", **more)
        if request.first_token_ns is not None:
            series.first_token(53 * MS, START_NS)
            for number in range(request.frames):
                series.frame()
                if number:
                    series.gap(10 * MS)
        series.explain(CausePhase.TTFT, {Cause.lock: 13e6, Cause.on_cpu: 40e6})
        series.finished(request)
        slis.capture("roleplay", request.capture)
    slis.in_flight = lambda: [
        ("roleplay", "bard", "chat_completions", ("stable",)),
        ("roleplay", None, "completions", ("canary",)),
    ]
    slis.explains = True
    return Metrics(
        slis,
        Sources(lambda: STATUS, lambda: READER, counters),
        ["roleplay", "idle"],
        version="0.0.0-test",
        timer=timer,
    )


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    monkeypatch.setattr("platform.python_version", lambda: "3.11.0")
    return scene(timer=lambda: 5.0)


@pytest.mark.parametrize(
    ("accept", "name"), [("", "golden.txt"), ("application/openmetrics-text", "golden.openmetrics")]
)
def test_the_text_is_the_golden_one(metrics: Metrics, accept: str, name: str) -> None:
    """After a change that is meant: write the new text there, and read the difference."""
    text, _ = metrics.render(accept)
    assert text.decode() == (GOLDEN / name).read_text()


def test_the_text_is_what_the_library_would_write(metrics: Metrics) -> None:
    assert metrics.render()[0] == prometheus_client.generate_latest(metrics.registry)
    openmetrics, _ = metrics.render("application/openmetrics-text")
    assert openmetrics == prometheus_client.openmetrics.exposition.generate_latest(metrics.registry)


def test_the_openmetrics_text_parses_and_has_units(metrics: Metrics) -> None:
    text, _ = metrics.render("application/openmetrics-text")
    families = {
        family.name: family
        for family in prometheus_client.openmetrics.parser.text_string_to_metric_families(text.decode())
    }
    assert {spec.name for spec in metrics.specs} == set(families)
    for spec in metrics.specs:
        assert families[spec.name].unit == spec.unit
        assert families[spec.name].type == spec.kind.value
        assert families[spec.name].documentation == spec.help
        assert spec.help.endswith(".")
    assert not [name for family in families.values() for name, *_ in family.samples if name.endswith("_created")]


def test_the_plain_text_parses_and_says_the_same(metrics: Metrics) -> None:
    plain = prometheus_client.parser.text_string_to_metric_families(metrics.render()[0].decode())
    found = {(s.name, tuple(sorted(s.labels.items())), s.value) for family in plain for s in family.samples}
    collected = {
        (s.name, tuple(sorted(s.labels.items())), float(s.value)) for f in metrics.collect() for s in f.samples
    }
    assert found == collected
    assert len(found) > 500


@pytest.mark.parametrize("empty", [True, False])
def test_promtool_finds_nothing_to_say(metrics: Metrics, empty: bool) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("apt-get install -y --no-install-recommends prometheus")
    text, _ = (Metrics(Slis(), version="1") if empty else metrics).render()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_kernels_enums_and_buckets_are_those_of_the_headers() -> None:
    folder = Path(__file__).parents[2] / "bpf"
    records = (folder / "records.h").read_text()

    def members(name: str) -> list[str]:
        body = re.search(rf"enum {name} {{(.*?)}};", records, re.DOTALL)
        assert body is not None
        return [word.lower() for word in re.findall(r"^\t([A-Z_]+),", body[1], re.MULTILINE)]

    assert members("wait_reason") == ["wait_cpu", *(f"wait_{name}" for name in OFF_CPU_REASONS[1:]), "wait_max"]
    assert members("block_operation") == [*(f"block_{name}" for name in OPERATIONS), "block_max"]
    assert f"#define HISTOGRAM_BUCKETS {BUCKETS}\n" in (folder / "service_stats.bpf.h").read_text()


def test_causes_are_absent_where_nobody_looks_for_them(metrics: Metrics) -> None:
    assert value(metrics, "llm_latency_cause_seconds_total", phase="ttft", cause="lock", **BARD) == 0.026
    assert value(metrics, "llm_latency_cause_seconds_total", phase="decode", cause="gpu", **BARD) == 0
    silent = Metrics(Slis(clock=lambda: START_NS))
    assert b"llm_latency_cause_seconds_total{" not in silent.render()[0]


def test_kernel_counters_are_those_of_their_service(metrics: Metrics) -> None:
    # words of struct scheduler_stats: the histogram's sum is 1 ns, its buckets count 2 to 29, then the rest
    labels = {"service_name": "roleplay"}
    assert value(metrics, "kernel_run_queue_wait_seconds_sum", **labels) == 1e-9
    assert value(metrics, "kernel_run_queue_wait_seconds_bucket", le="1e-06", **labels) == 2
    assert value(metrics, "kernel_run_queue_wait_seconds_bucket", le="2e-06", **labels) == 2 + 3
    assert value(metrics, "kernel_run_queue_wait_seconds_count", **labels) == sum(range(2, 30))
    assert value(metrics, "kernel_on_cpu_seconds_total", **labels) == 30e-9
    assert value(metrics, "kernel_off_cpu_seconds_total", reason="futex", **labels) == 32e-9
    assert value(metrics, "kernel_on_cpu_seconds_total", service_name="idle") == 0
    assert value(metrics, "kernel_syscall_seconds_count", syscall="futex", **labels) == 6


def test_every_family_of_the_semantics_page_is_there(metrics: Metrics) -> None:
    names = {spec.text_name() for spec in metrics.specs}
    assert set(FAMILIES) <= names
    assert not [name for name in names if name not in FAMILIES and not name.startswith("footlight_")]
    described = {family.name for family in metrics.describe()}
    assert described == {spec.name for spec in metrics.specs}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


BARD = {"service_name": "roleplay", "model_name": "bard", "api": "chat_completions", "release": "stable"}
JESTER = {**BARD, "model_name": "jester"}


def test_known_values_of_labels_exist_at_zero(metrics: Metrics) -> None:
    assert value(metrics, "llm_request_failures_total", reason="rate_limited", **BARD) == 1
    assert [value(metrics, "llm_request_failures_total", reason=f.value, **JESTER) for f in Failure] == [0, 0, 0, 0]
    assert [value(metrics, "llm_requests_aborted_total", phase=p.value, **BARD) for p in Phase] == [0, 0]
    assert [value(metrics, "footlight_capture_total", service_name="idle", outcome=c.value) for c in Capture] == [0] * 7
    assert value(metrics, "llm_requests_in_flight", **JESTER) == 0


def test_what_was_not_measured_is_absent(metrics: Metrics) -> None:
    for name in (
        "llm_prompt_tokens_total",
        "llm_prefix_cache_queries_total",
        "llm_prefix_cache_hits_total",
        "llm_kv_cache_hit_ratio",
        "llm_prefill_tokens_per_second",
    ):
        assert value(metrics, name, **BARD) is not None
        assert value(metrics, name, **JESTER) is None
    assert value(metrics, "footlight_capture_ratio", service_name="idle") is None
    assert value(metrics, "footlight_process_proportional_memory_bytes", process="reader") is None


def test_before_the_attacher_reports_its_metrics_are_absent() -> None:
    metrics = Metrics(Slis(), version="1")
    assert value(metrics, "footlight_probe_up", probe="requests") is None
    assert value(metrics, "footlight_reader_restarts_total") is None
    assert value(metrics, "footlight_connections_tracked") == 0
    assert value(metrics, "footlight_build_info", version="1", python_version=platform.python_version()) == 1


def test_a_probe_without_which_the_agent_is_ready_is_told_apart() -> None:
    probes = [replace(STATUS.probes[0], name=name, up=False, required=name == "tcp") for name in ("tcp", "gpu")]
    metrics = Metrics(Slis(), Sources(lambda: replace(STATUS, probes=tuple(probes)), lambda: READER, lambda: {}))
    for probe in probes:
        assert value(metrics, "footlight_probe_up", probe=probe.name) == 0
        assert value(metrics, "footlight_probe_required", probe=probe.name) == probe.required


def test_losses_of_the_kernel_and_the_reader_add_up(metrics: Metrics) -> None:
    lost = [
        value(metrics, "footlight_lost_events_total", probe="requests", reason=reason)
        for reason in ("reads_ring_full", "capped", "gap")
    ]
    assert lost == [5, 0, 0]


def test_quantiles_are_those_of_the_window(metrics: Metrics) -> None:
    for quantile in ("0.5", "0.9", "0.99"):
        found = value(metrics, "llm_latency_quantile_seconds", sli="itl", quantile=quantile, **BARD)
        assert found == pytest.approx(0.010, rel=0.01)
    assert value(metrics, "llm_latency_quantile_seconds", sli="read_delay", quantile="0.5", **BARD) is None


def test_the_scrape_tells_how_long_it_took() -> None:
    ticks = iter((5.0, 5.25))
    metrics = scene(timer=lambda: next(ticks))
    assert value(metrics, "footlight_scrape_duration_seconds") == 0.25


def test_gathered_gaps_are_in_the_next_scrape() -> None:
    slis = Slis(clock=lambda: START_NS)
    slis.series("roleplay", "bard", "completions", (), True).gap(7 * MS)
    text, _ = Metrics(slis, version="1").render(names=["llm_inter_token_latency_seconds_count"])
    assert b'_count{api="completions",model_name="bard",service_name="roleplay"} 1.0\n' in text


@pytest.mark.parametrize("form", Format)
def test_large_numbers_are_written_in_full(form: Format) -> None:
    slis = Slis(clock=lambda: START_NS)
    series = slis.series("roleplay", "bard", "completions", (), True)
    metrics = Metrics(slis, version="1", timer=lambda: 0.0)
    for frames in (999_999, 1_000_000, 12_345_678, 2**53):
        series.frames = frames
        text, _ = metrics.render(form.value, ["llm_frames_total"])
        (line,) = (line for line in text.decode().splitlines() if line.startswith("llm_frames_total{"))
        assert float(line.split()[-1]) == frames


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llm_requests_total", "llm_requests_total"),
        ("llm_request_duration_seconds_bucket", "llm_request_duration_seconds"),
        ("llm_request_duration_seconds", "llm_request_duration_seconds"),
        ("footlight_build_info", "footlight_build_info"),
    ],
)
def test_names_choose_families(metrics: Metrics, name: str, family: str) -> None:
    text, _ = metrics.render(names=[name, "no_such_metric"])
    assert [line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")] == [family]


def test_names_that_do_not_exist_choose_nothing(metrics: Metrics) -> None:
    assert metrics.render(names=["\ud800", ""])[0] == b""
    assert metrics.render("application/openmetrics-text", names=["x"])[0] == b"# EOF\n"


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        (BROWSER, Format.TEXT),
        (PROMETHEUS_2, Format.OPENMETRICS),
        (PROMETHEUS_3, Format.OPENMETRICS),
        ("Application/OpenMetrics-Text ; Version=1.0.0", Format.OPENMETRICS),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=2.0.0", Format.TEXT),
        ("application/openmetrics-text;q=0", Format.TEXT),
        ("application/openmetrics-text;q=0.5,text/plain;q=0.7", Format.TEXT),
        ("application/openmetrics-text;q=nan", Format.TEXT),
        ("application/openmetrics-text;q=1_0", Format.TEXT),
        ("application/openmetrics-text;q=\u0661", Format.TEXT),
        (";;;,=,;q", Format.TEXT),
    ],
)
def test_the_format_follows_the_accept_header(accept: str, form: Format) -> None:
    assert choose_format(accept) is form


def test_64_models_stay_within_the_memory_that_is_promised() -> None:
    """A full window of four latencies with a spread of 0.7 in the logarithm, for each of 64 models: 20 MB at most."""
    import tracemalloc

    now_ns = START_NS
    slis = Slis(clock=lambda: now_ns)
    rng = np.random.default_rng(7)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(26):
        for model in range(64):
            series = slis.series("roleplay", f"model-{model}", "completions", (), True)
            for gap in rng.lognormal(17, 0.7, 101).astype(int).tolist():
                series.gap(gap)
            for ttft in rng.lognormal(19, 0.7, 7).astype(int).tolist():
                series.first_token(ttft, now_ns)
                series.finished(
                    finished("m", "stable", first_token_ns=START_NS + ttft, last_token_ns=START_NS + 3 * ttft)
                )
        slis.tick(now_ns)
        now_ns += SLOT_NS
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(slis.all_series()) == 64
    assert (after - before) < 20e6


def test_the_page_of_metrics_is_fresh() -> None:
    assert PAGE.read_text() == page(), "stale: run `make docs`"
    for name in FAMILIES:
        assert f"`{name}`" in page()


def test_every_histogram_of_the_page_has_its_bounds() -> None:
    for spec in Metrics(Slis()).specs:
        assert bool(spec.bounds) == (spec.kind is Kind.HISTOGRAM)


def test_the_status_crosses_as_json_and_is_checked() -> None:
    line = msgspec.json.encode(STATUS)
    assert msgspec.json.decode(line, type=AgentStatus) == STATUS
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(line.replace(b'"events":1009', b'"events":"1009"'), type=AgentStatus)


def test_readiness_says_what_is_missing() -> None:
    down = ProbeStatus("requests", False, "tracefs is not mounted", 0, None, None, ())
    status = AgentStatus(START_NS, "ring", (*STATUS.probes, down), (), 0, ())
    assert why_not_ready(None, START_NS) == "the attacher has not reported yet"
    assert why_not_ready(STATUS, START_NS + 10_000 * MS) is None
    assert why_not_ready(STATUS, START_NS + 11_000 * MS) == "the attacher has not reported for 11 s"
    assert why_not_ready(status, START_NS) == "not attached: requests: tracefs is not mounted"
    assert why_not_ready(AgentStatus(START_NS, "ring", (), (), 0, ()), START_NS) == "no probe is wanted"
