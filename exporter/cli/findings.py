"""What `check` finds beside the host: threads that the kernel hides, GPUs, uprobes, probe points, engines' metrics."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - a host's name needs it, and nobody may not read it
import json
import logging
import os
import select
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from exporter.config import AUTO, OFF, ON, Config, GpuConfig, ProbePoint, Probes
from exporter.labels import safe
from probes import libbpf, privileges, switches
from probes.devices import DeviceFile, find_devices
from probes.elf import ElfError, find_functions, find_usdt_probes
from probes.engine_metrics import Endpoint, EndpointReport, EngineSource
from probes.engine_page import Failure
from probes.errors import FootlightError
from probes.gpu_report import GpuReport
from probes.host import Check
from probes.nvml import NvmlSource
from probes.procfs import ProcFs
from probes.switches import Switches

ENGINE_TIMEOUT_S: Final = 2.0
PATIENCE_S: Final = 30.0
"""After this time whoever looks without privileges is ended."""
UPROBES: Final = Path("/sys/bus/event_source/devices/uprobe/type")
SWITCHES_S: Final = 2.0
"""How long switches are looked at. A quiet host makes some fifty a second."""
_ANSWER_BYTES: Final = 1 << 20
_PATHS_SHOWN: Final = 4

_NEXT_STEPS: Final = {
    Failure.REFUSED: "start the engine, or mend the port in engine_metrics",
    Failure.TIMEOUT: "see whether the engine is stuck; footlight asks again by itself",
    Failure.HTTP_STATUS: "mend the path in engine_metrics; mostly it is /metrics",
    Failure.NOT_METRICS: "mend the path in engine_metrics; mostly it is /metrics",
    Failure.UNKNOWN_ENGINE: "write `engine_metrics: off`: no figure of it is understood",
    Failure.TLS: "give the engine a certificate that this host trusts, or use http",
}


def examine(config: Config | None) -> list[Check]:
    """What is found; with a config, for what it wants. Asks engines, so it may take some seconds."""
    gpu = config.gpu if config is not None else GpuConfig()
    wanted = config.probes if config is not None else Probes()
    found: list[Check] = []
    if wanted.gpu != OFF:
        found += as_nobody(lambda: [gpu_check(NvmlSource(gpu.library).look(), wanted.gpu == ON)], "GPU")
    found += [devices_check(find_devices(gpu.devices), gpu.devices), cuda_check(wanted.cuda)]
    found += [probe_point_check(point) for point in (config.probe_points if config is not None else ())]
    asked = engine_endpoints(config) if config is not None else {}
    if asked:
        found += as_nobody(lambda: engine_checks(asked), "engine metrics")
    return found


def switches_check(observe: Callable[[float], Switches] | None = None) -> Check:
    """Whether the kernel tells its tracepoints everything; looks for `SWITCHES_S`. A probe can be attached here."""
    name = "hidden threads"
    proc = ProcFs()
    try:
        found = (observe or switches.observe)(SWITCHES_S)
    except FootlightError as error:
        return Check(name, False, False, error.what, error.next_step)
    if not found.left_out:
        return Check(name, True, False, f"none: all {found.counted} switches of {SWITCHES_S:g} s were told")
    owners = sorted({tgid for tid in found.silent if (tgid := proc.tgid(tid)) is not None})
    names = [f"{safe(stat.comm)} ({tgid})" for tgid in owners if (stat := proc.stat(tgid)) is not None]
    return Check(
        name,
        False,
        False,
        f"this kernel kept {found.left_out} of {found.counted} switches in {SWITCHES_S:g} s from its tracepoints"
        + (f", while threads of {', '.join(names)} ran" if names else ""),
        "another kernel: here an event that falls into such a moment is not seen, a packet's or a switch of a service",
    )


def gpu_check(report: GpuReport, wanted: bool) -> Check:
    """What the driver tells of the GPUs; that it is missing stands in the way only where GPUs are `wanted`."""
    if report.problem is not None and not report.gpus:
        step = report.next_step or "write probes: {gpu: off} where there is no GPU"
        return Check("GPU", False, wanted, report.problem, step)
    names = Counter(safe(gpu.name) for gpu in report.gpus)
    not_told = {call for gpu in report.gpus for call in gpu.not_told}
    parts = [
        ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU",
        f"driver {safe(report.driver_version)}" if report.driver_version else "",
        f"library {safe(report.library)}" if report.library else "",
        f"{len(not_told)} calls not supported" if not_told else "",
        report.problem or "",
    ]
    well = bool(report.gpus) and report.problem is None
    return Check("GPU", well, wanted and not report.gpus, "; ".join(filter(None, parts)), report.next_step)


def devices_check(found: Sequence[DeviceFile], patterns: Sequence[str]) -> Check:
    """Which files are GPUs', in which a wait is one for a GPU."""
    if not found:
        return Check(
            "GPU devices",
            False,
            False,
            f"no device file matches {', '.join(patterns)}: waits for a GPU are not told from others",
            "nothing where there is no GPU; else name its files in the config: gpu: {devices: [/dev/...]}",
        )
    names = [device.path for device in found]
    more = f" and {len(names) - _PATHS_SHOWN} more" if len(names) > _PATHS_SHOWN else ""
    return Check("GPU devices", True, False, f"{', '.join(names[:_PATHS_SHOWN])}{more}")


def cuda_check(
    wanted: bool, uprobes: Path = UPROBES, by_process: Callable[[], bool] = libbpf.has_uprobe_multi
) -> Check:
    """Whether calls of the CUDA driver could be, or can be, counted."""
    if not uprobes.exists():
        return Check(
            "CUDA calls",
            False,
            False,
            "this kernel has no uprobes",
            "boot a kernel with CONFIG_UPROBE_EVENTS" if wanted else "nothing, unless probes: {cuda: on} is wanted",
        )
    who = "only the service's processes pay" if by_process() else "each process that maps the library pays"
    return Check("CUDA calls", True, False, f"uprobes, {who}" + ("" if wanted else "; off without probes: {cuda: on}"))


def probe_point_check(point: ProbePoint) -> Check:
    """Whether the file has what a probe point is to be put on, where the config says which file that is."""
    name = f"probe point {point.name}"
    if not point.library.startswith("/"):
        return Check(name, True, False, f"{point.library} is looked for in the services' processes, by a running agent")
    wanted = point.symbol or point.usdt or ""
    try:
        there = _points_in(point)
    except FileNotFoundError:
        detail = f"{point.library} is not on this host; a container's own files are seen by a running agent"
        return Check(name, False, False, detail, "nothing if a container has it; else mend library in the config")
    except (OSError, ElfError) as error:
        reason = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else str(error)
        return Check(name, False, False, f"{point.library}: {reason}", "mend library in the config")
    if wanted in there:
        return Check(name, True, False, f"{point.library} has {wanted}")
    if point.symbol is not None:
        return Check(name, False, False, f"{point.library} has no function {wanted}", f"nm -D {point.library}")
    others = ", ".join(sorted(map(safe, there))[:_PATHS_SHOWN])
    step = f"name one of those that it has: {others}" if others else "build it with its USDT probes, or name a symbol"
    return Check(name, False, False, f"{point.library} has no USDT probe {wanted}", step)


def _points_in(point: ProbePoint) -> Collection[str]:
    fd = os.open(point.library, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ElfError("is no file")
        return find_usdt_probes(fd) if point.symbol is None else find_functions(fd, (point.symbol,)).offsets
    finally:
        os.close(fd)


# ---- engines ----


def engine_endpoints(config: Config) -> dict[str, tuple[Endpoint, ...]]:
    """Where the config says that engines tell their metrics. What is discovered needs an agent that runs."""
    return {
        service.name: (Endpoint(service.engine_metrics),)
        for service in config.services
        if service.engine_metrics not in {AUTO, OFF}
    }


def engine_checks(asked: dict[str, tuple[Endpoint, ...]], timeout_s: float = ENGINE_TIMEOUT_S) -> list[Check]:
    """Ask each engine once, and say what it is."""
    report = EngineSource(lambda: asked, time.monotonic_ns, timeout_s).look()
    return [_engine_check(endpoint) for endpoint in report.endpoints]


def _engine_check(said: EndpointReport) -> Check:
    place = urlsplit(said.url)  # without what may be a secret, such as a token in the query
    where = safe(f"{said.service}, {place.scheme}://{place.netloc}{place.path}")
    if not said.up:
        reason = "nothing understood" if said.failure is None else said.failure.value.replace("_", " ")
        step = _NEXT_STEPS.get(said.failure) if said.failure is not None else None
        return Check("engine metrics", False, False, f"{where}: {reason}", step or "mend engine_metrics in the config")
    engines = sorted({model.engine for model in said.models})
    names = sorted({safe(model.model) for model in said.models if model.model is not None})
    models = f", models: {', '.join(names[:_PATHS_SHOWN])}" if names else ""
    more = f" and {len(names) - _PATHS_SHOWN} more" if len(names) > _PATHS_SHOWN else ""
    return Check("engine metrics", True, False, f"{where}: {', '.join(engines)}{models}{more}")


# ---- without privileges ----


def as_nobody(look: Callable[[], Iterable[Check]], name: str, patience_s: float = PATIENCE_S) -> list[Check]:
    """What `look` finds in a child process that has given up its privileges, as the reader has.

    What it asks is not trusted, and what root would be told need not be what the reader is. One finding called `name`
    where nothing came back, or where the privileges cannot be given up: then nothing is asked.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            logging.disable()  # what it would log is in what it finds
            try:
                privileges.drop_to_nobody([writing])
            except FootlightError as error:
                found: Iterable[Check] = [
                    Check(name, False, False, f"not looked at with privileges: {error.what}", error.next_step)
                ]
            else:
                found = look()
            answer = json.dumps([asdict(check) for check in found]).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer[:_ANSWER_BYTES])
        finally:
            os._exit(0)
    os.close(writing)
    try:
        said = _read(reading, time.monotonic() + patience_s)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        return [Check(**each) for each in json.loads(said)]
    except (ValueError, TypeError):
        return [Check(name, False, False, "whoever looked for it came to no end", "run it again")]


def _read(descriptor: int, deadline: float) -> bytes:
    said = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(descriptor, 65536) if ready else b""
        if not more or len(said) > _ANSWER_BYTES:
            return said
        said += more
