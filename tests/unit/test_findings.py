"""What `check` finds about GPUs' files, uprobes and engines."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from exporter.cli import findings
from exporter.config import AUTO, OFF, Config, Match, ProbePoint, Probes, Service
from probes import privileges
from probes.devices import DeviceFile
from probes.errors import HostError
from probes.gpu_report import Gpu, GpuReport
from probes.host import Check
from probes.switches import Switches

FIXTURES = Path(__file__).parents[1] / "fixtures" / "engines"


@contextmanager
def page(body: bytes, content_type: str = "text/plain; version=0.0.4", status: int = 200) -> Iterator[str]:
    """A server with this page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def config(*urls: str) -> Config:
    return Config(services=tuple(Service(f"s{i}", Match(port=(i + 1,)), {}, url) for i, url in enumerate(urls)))


@pytest.fixture(autouse=True)
def no_privileges_to_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "drop_to_nobody", lambda _: None)


WELL = GpuReport(
    0,
    0.1,
    present=True,
    library="/usr/lib64/libnvidia-ml.so.1",
    driver_version="580.65",
    gpus=(
        Gpu("GPU-a", 0, "NVIDIA H200", not_told=("nvmlDeviceGetFanSpeed", "nvmlDeviceGetRetiredPages")),
        Gpu("GPU-b", 1, "NVIDIA H200", not_told=("nvmlDeviceGetFanSpeed",)),
        Gpu("GPU-c", 2, "Tesla T4"),
    ),
)


def test_gpus_are_counted_by_name() -> None:
    assert findings.gpu_check(WELL, wanted=False) == Check(
        "GPU",
        True,
        False,
        "2 x NVIDIA H200, 1 x Tesla T4; driver 580.65; library /usr/lib64/libnvidia-ml.so.1; 2 calls not supported",
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_a_missing_driver_stands_in_the_way_only_of_who_wants_gpus(wanted: bool) -> None:
    report = GpuReport(0, 0.1, present=False, problem="no libnvidia-ml.so.1", next_step="install the driver")
    assert findings.gpu_check(report, wanted) == Check(
        "GPU", False, wanted, "no libnvidia-ml.so.1", "install the driver"
    )


def test_a_lost_gpu_among_others_is_a_note() -> None:
    found = findings.gpu_check(replace(WELL, problem="GPU 1 is lost", next_step="reset it"), wanted=True)
    assert (found.ok, found.required, found.next_step) == (False, False, "reset it")
    assert found.detail.endswith("; GPU 1 is lost")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_driver_without_a_gpu_is_no_good_to_who_wants_one(wanted: bool) -> None:
    found = findings.gpu_check(GpuReport(0, 0.1, present=True, driver_version="580.65"), wanted)
    assert (found.ok, found.required, found.detail) == (False, wanted, "no GPU; driver 580.65")


def test_who_wants_no_gpus_is_told_of_none() -> None:
    off = Config(services=config(AUTO).services, probes=Probes(gpu=OFF))
    assert [each.name for each in findings.examine(off)] == ["GPU devices", "CUDA calls"]


def test_device_files_are_named_up_to_a_few() -> None:
    files = [DeviceFile(f"/dev/nvidia{number}", 195 << 20 | number) for number in range(7)]
    assert findings.devices_check(files, ["/dev/nvidia*"]) == Check(
        "GPU devices", True, False, "/dev/nvidia0, /dev/nvidia1, /dev/nvidia2, /dev/nvidia3 and 3 more"
    )


def test_no_device_file_is_a_note() -> None:
    found = findings.devices_check([], ["/dev/nvidia*", "/dev/kfd"])
    assert (found.ok, found.required) == (False, False)
    assert "/dev/nvidia*, /dev/kfd" in found.detail
    assert "gpu: {devices:" in found.next_step


@pytest.mark.parametrize(
    ("there", "by_process", "wanted", "ok", "detail"),
    [
        (True, True, False, True, "uprobes, only the service's processes pay; off without probes: {cuda: on}"),
        (True, False, True, True, "uprobes, each process that maps the library pays"),
        (False, False, False, False, "this kernel has no uprobes"),
        (False, False, True, False, "this kernel has no uprobes"),
    ],
)
def test_whether_cuda_calls_can_be_counted(
    tmp_path: Path, there: bool, by_process: bool, wanted: bool, ok: bool, detail: str
) -> None:
    sign = tmp_path / "type"
    if there:
        sign.write_text("8\n")
    found = findings.cuda_check(wanted, sign, lambda: by_process)
    assert (found.ok, found.required, found.detail) == (ok, False, detail)
    assert bool(found.next_step) is not ok


LIBRARY = str(Path(__file__).parents[2] / "examples/roleplay/native/libllm_kv.so")


@pytest.mark.parametrize(
    ("library", "symbol", "usdt", "well", "words"),
    [
        (LIBRARY, "llm_kv_lookup", None, True, "has llm_kv_lookup"),
        (LIBRARY, "llm_kv_look", None, False, "has no function llm_kv_look"),
        (LIBRARY, None, "roleplay:kv_lookup", True, "has roleplay:kv_lookup"),
        (LIBRARY, None, "roleplay:kv", False, "name one of those that it has: roleplay:kv_lookup"),
        (sys.executable, None, "roleplay:kv_lookup", False, "has no USDT probe"),
        (__file__, "llm_kv_lookup", None, False, "is no ELF file"),
        ("/usr", "llm_kv_lookup", None, False, "is no file"),
        ("/nowhere/libllm_kv.so", "llm_kv_lookup", None, False, "is not on this host"),
        ("libllm_kv.so", "llm_kv_lookup", None, True, "by a running agent"),
    ],
)
def test_whether_a_library_has_a_probe_point(
    library: str, symbol: str | None, usdt: str | None, well: bool, words: str
) -> None:
    check = findings.probe_point_check(ProbePoint("kv", library, symbol, usdt, 1, 2, 3))
    assert (check.name, check.ok, check.required) == ("probe point kv", well, False)
    assert words in f"{check.detail} {check.next_step}"
    assert well is not bool(check.next_step)


def test_only_configured_engines_are_asked() -> None:
    assert list(findings.engine_endpoints(config(AUTO, OFF, "http://127.0.0.1:1/metrics"))) == ["s2"]


def test_an_engine_is_named_with_its_models() -> None:
    with page((FIXTURES / "vllm.txt").read_bytes()) as url:
        (found,) = findings.engine_checks(findings.engine_endpoints(config(f"{url}/metrics?token=secret")))
    assert found.ok
    assert found.detail.startswith(f"s0, {url}/metrics: vllm, models: ")
    assert "secret" not in found.detail


@pytest.mark.parametrize(
    ("body", "content_type", "status", "reason"),
    [
        (b"{}", "application/json", 200, "not metrics"),
        (b"up 1\n", "text/plain", 200, "unknown engine"),
        (b"", "text/plain", 404, "http status"),
    ],
)
def test_what_is_no_engine_is_a_note_that_says_why(body: bytes, content_type: str, status: int, reason: str) -> None:
    with page(body, content_type, status) as url:
        (found,) = findings.engine_checks(findings.engine_endpoints(config(f"{url}/metrics")))
    assert found == Check("engine metrics", False, False, f"s0, {url}/metrics: {reason}", found.next_step)
    assert found.next_step


def test_nobody_listens() -> None:
    with page(b"") as url:
        pass
    (found,) = findings.engine_checks(findings.engine_endpoints(config(f"{url}/metrics")))
    assert found.detail == f"s0, {url}/metrics: refused"


def test_engines_are_asked_by_a_child_without_privileges() -> None:
    with page((FIXTURES / "sglang.txt").read_bytes()) as url:
        found = findings.examine(config(f"{url}/metrics"))
    assert [each.name for each in found] == ["GPU", "GPU devices", "CUDA calls", "engine metrics"]
    assert "sglang" in found[-1].detail


def test_nothing_is_asked_with_privileges_that_cannot_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise HostError("setresuid is refused", "run as root")

    monkeypatch.setattr(privileges, "drop_to_nobody", refuse)
    given = [Check("engine metrics", True, False, "asked")]
    assert findings.as_nobody(lambda: given, "engine metrics") == [
        Check("engine metrics", False, False, "not looked at with privileges: setresuid is refused", "run as root")
    ]


def test_findings_cross_from_the_child_whole() -> None:
    given = [Check("a", True, False, "b\u00e9"), Check("c", False, True, "d", "e")]
    assert findings.as_nobody(lambda: given, "a") == given


def test_a_child_that_dies_or_hangs_is_a_finding() -> None:
    def die() -> list[Check]:
        raise SystemExit(1)

    def hang() -> list[Check]:
        threading.Event().wait()
        return []

    for look in (die, hang):
        (found,) = findings.as_nobody(look, "engine metrics", patience_s=0.05)
        assert (found.name, found.ok, found.required) == ("engine metrics", False, False)


# ---- threads that the kernel hides from its tracepoints ----


def test_all_switches_were_told() -> None:
    found = findings.switches_check(lambda _: Switches(314, 0, ()))
    assert found == Check("hidden threads", True, False, "none: all 314 switches of 2 s were told")


def test_hidden_threads_are_told_by_their_process() -> None:
    hidden = (threading.get_native_id(), 2**22 + 1)  # no tid is that large
    found = findings.switches_check(lambda _: Switches(314, 15, hidden))
    name = Path("/proc/self/comm").read_text().strip()
    assert (found.ok, found.required) == (False, False)
    assert found.detail.startswith("this kernel kept 15 of 314 switches in 2 s from its tracepoints, ")
    assert found.detail.endswith(f", while threads of {name} ({os.getpid()}) ran")
    assert found.next_step


def test_hidden_threads_that_are_not_known() -> None:
    found = findings.switches_check(lambda _: Switches(314, 1, ()))
    assert found.detail == "this kernel kept 1 of 314 switches in 2 s from its tracepoints"


def test_switches_that_cannot_be_counted() -> None:
    def refused(_: float) -> Switches:
        raise HostError("no BPF here", "boot another kernel")

    assert findings.switches_check(refused) == Check(
        "hidden threads", False, False, "no BPF here", "boot another kernel"
    )
