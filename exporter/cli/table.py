"""Draws the live table: what is slow now, on one screen, in 120 columns or what there is.

Colour is kept for what is wrong. A healthy table has none but the green dot.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from exporter.fronts import shortened, span
from exporter.machine import EngineRow, GpuRow
from exporter.status import AgentStatus, CpuMeter, why_not_ready

if TYPE_CHECKING:
    from exporter.config import Address, Config
    from exporter.slis import Row

WINDOW_SECONDS: Final = 300
PLAIN_WIDTH: Final = 120
"""Columns where the output is no terminal."""
WHY_FROM: Final = 114
"""Columns from which on there is room for the largest cause."""

TTFT_SLOW_S: Final = (0.3, 1.0)
ITL_SLOW_S: Final = (0.1, 0.3)
FAILING: Final = (0.0, 0.05)
UNSEEN: Final = (0.005, 0.05)
"""Where a figure turns yellow, and red: seconds of a p99, or shares of the requests. A first token within 0.3 s is
what role-play services promise; the rest are habits. Objectives of one's own are what alert rules are for."""

_WARN: Final = "yellow"
_BAD: Final = "bold red"
_QUIET: Final = "dim"
_NAME: Final = "bold"

_LEGEND: Final = (
    "Last 5 minutes. TTFT: to the first token. ITL: between tokens. left: client gone. seen: captured.",
    "Yellow, red: TTFT p99 > 0.3s, 1s; ITL p99 > 0.1s, 0.3s; failed > 0, 5%; unseen > 0.5%, 5%.",
)


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that one drawing shows. `now_ns` is CLOCK_MONOTONIC, `wall_s` seconds since the epoch."""

    rows: Sequence[Row]
    status: AgentStatus | None
    config: Config
    address: Address | None
    now_ns: int
    wall_s: float
    cpu: float | None = None
    """CPUs that the agent's two processes use, from the last two reports."""
    gpus: Sequence[GpuRow] = ()
    engines: Sequence[EngineRow] = ()


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int  # without the space before it
    cell: Callable[[Row], Text]
    least_screen: int = 0  # shown from this many columns on


class LiveTable:
    """A table on a terminal (`live`: drawn in place, on a screen of its own) or on any stream, one after another."""

    def __init__(self, file: TextIO, live: bool) -> None:
        self._console: Final = Console(file=file, highlight=False, markup=False, soft_wrap=False)
        if not self._console.is_terminal:
            self._console.width = PLAIN_WIDTH
        self._live: Live | None = None
        if live and self._console.is_terminal:
            self._live = Live(console=self._console, screen=True, auto_refresh=False, transient=True)
            self._live.start()
        self._last: Scene | None = None
        self._cpu = CpuMeter()

    def show(
        self,
        rows: Sequence[Row],
        status: AgentStatus | None,
        config: Config,
        address: Address | None,
        now_ns: int,
        wall_s: float,
        gpus: Sequence[GpuRow] = (),
        engines: Sequence[EngineRow] = (),
    ) -> None:
        """Draw the table. Raises BrokenPipeError when nobody reads the stream any more."""
        cpu = self._cpu.measure(status)
        self._last = Scene(rows, status, config, address, now_ns, wall_s, cpu, gpus, engines)
        if self._live is not None:
            self._live.update(self._drawn(self._last, self._console.height), refresh=True)
        else:
            self._console.print(self._drawn(self._last, None))
            self._console.file.flush()

    def close(self) -> None:
        """Leave the screen; the last table stays on the terminal."""
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._last is not None:
            self._console.print(self._drawn(self._last, None))

    def _drawn(self, scene: Scene, height: int | None) -> Group:
        return Group(*draw(scene, self._console.width, height))


def draw(scene: Scene, width: int, height: int | None) -> list[Text]:
    """Return the lines of the table, each at most `width` columns; at most `height` lines, where that is given."""
    head = [_title(scene, width), _health(scene), Text("")]
    foot = [Text(""), *_legend(width)]
    columns = [column for column in _COLUMNS if column.least_screen <= width]
    name_width = min(40, width - 1 - sum(column.width + 1 for column in columns))
    nothing = [] if scene.rows else _nothing(scene)
    full = (2 + len(scene.rows) + len({row.service for row in scene.rows})) if scene.rows else len(nothing)
    beside_room = None if height is None else max(height - len(head) - full, height // 3)
    beside = _beside(scene, width, beside_room)
    if height is not None and height < len(head) + full + len(beside) + len(foot):
        foot = []
    room = None if height is None else height - len(head) - len(beside) - len(foot) - 2
    body = [*_header(columns, name_width), *_body(scene, columns, name_width, room)] if scene.rows else nothing
    lines = [*head, *body, *beside, *foot][:height]
    for line in lines:
        line.no_wrap = True
        line.overflow = "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return lines


def _title(scene: Scene, width: int) -> Text:
    left = Text.assemble((" footlight", "bold"), ("  what users feel, seen from the kernel", _QUIET))
    url = f"{scene.config.scheme}://{scene.address}/metrics   " if scene.address is not None else ""
    right = Text.assemble((url, _QUIET), time.strftime("%H:%M:%S", time.localtime(scene.wall_s)), " ")
    if left.cell_len + right.cell_len + 2 > width:
        left = Text(" footlight", style="bold")
    left.append(" " * max(2, width - left.cell_len - right.cell_len))
    return left.append_text(right)


def _health(scene: Scene) -> Text:
    status = scene.status
    why = why_not_ready(status, scene.now_ns)
    if status is None:
        return Text.assemble((" ○ ", _WARN), "attaching")
    if why is not None:
        return Text.assemble((" ● ", _BAD), (why, _BAD))
    lost = {(probe.name, loss.reason): loss.count for probe in status.probes for loss in probe.losses if loss.count}
    line = Text(" ● ", style=_WARN if lost else "green")
    line.append(f"{', '.join(probe.name for probe in status.probes if probe.up)} attached", style="default")
    for probe in status.probes:
        if not probe.up:
            line.append(f"   {probe.name}: {probe.reason or 'not up'}", style=_WARN)
    if lost:
        reasons = ", ".join(
            f"{count:,} {reason}" for (_, reason), count in sorted(lost.items(), key=lambda item: -item[1])
        )
        line.append(f"   lost since start: {reasons}", style=_WARN)
    else:
        line.append("   nothing lost", style=_QUIET)
    if status.reader_restarts:
        line.append(f"   reader restarted {status.reader_restarts}x", style=_WARN)
    memory = [usage.proportional_bytes for usage in status.processes if usage.proportional_bytes is not None]
    cost = [f"{sum(memory) / 2**20:.0f} MiB"] if memory else []
    cost += [f"{scene.cpu:.1%} of a CPU"] if scene.cpu is not None else []
    return line.append(f"   agent: {', '.join(cost)}" if cost else "", style=_QUIET)


def _header(columns: Sequence[_Column], name_width: int) -> list[Text]:
    groups, titles = Text(" " * (name_width + 1), style=_QUIET), Text(" MODEL".ljust(name_width + 1), style=_QUIET)
    index = 0
    while index < len(columns):
        members = [column for column in columns[index:] if column.title[:4] == columns[index].title[:4]]
        group = _GROUPS.get(columns[index].title[:4])
        taken = len(members) if group else 1
        room = sum(column.width + 1 for column in columns[index : index + taken])
        if group:
            groups.append(f"  {f' {group} '.center(room - 2, '─')}" if taken > 1 else group.rjust(room))
        else:
            groups.append(" " * room)
        for column in columns[index : index + taken]:
            titles.append(" " + (column.title[5:] if group else column.title).rjust(column.width))
        index += taken
    return [groups, titles]


def _body(scene: Scene, columns: Sequence[_Column], name_width: int, room: int | None) -> list[Text]:
    services = sorted({row.service for row in scene.rows})
    # By name, so that no line moves while somebody reads it. Where not all fit, the busiest ones are shown.
    shown = sorted(scene.rows, key=lambda row: -row.requests_per_second)
    shown = sorted(shown[: room and max(1, room - len(services) - 1)], key=lambda row: (row.model, row.api))
    names = Counter((row.service, row.model) for row in scene.rows)
    lines: list[Text] = []
    for service in services:
        lines.append(_service_line(service, [row for row in scene.rows if row.service == service], scene.status))
        for row in shown:
            if row.service != service:
                continue
            api = f" {row.api.removesuffix('_completions')}" if names[(service, row.model)] > 1 else ""
            name = shortened(row.model, name_width - 2 - len(api)) + api
            line = Text(f"   {name}".ljust(name_width + 1))
            for column in columns:
                cell = column.cell(row)
                line.append(" " * max(1, column.width + 1 - cell.cell_len)).append_text(cell)
            lines.append(line)
    hidden = len(scene.rows) - len(shown)
    if hidden:
        lines.append(
            Text(f"   and {hidden} less busy one{'' if hidden == 1 else 's'}: a taller window shows more", style=_QUIET)
        )
    return lines


def _service_line(service: str, rows: Sequence[Row], status: AgentStatus | None) -> Text:
    facts = [
        f"{sum(row.requests_per_second for row in rows):.1f} req/s",
        f"{sum(row.in_flight for row in rows)} open",
        f"{sum(row.tokens_per_second for row in rows):,.0f} tok/s",
    ]
    target = next((target for target in status.targets if target.service == service), None) if status else None
    if target is not None:
        facts.append(f"{target.processes} process{'' if target.processes == 1 else 'es'}")
    line = Text.assemble((f" {service}", _NAME), (f"   {'  '.join(facts)}", _QUIET))
    if target is not None and not target.processes:
        line.append("  no process runs", style=_BAD)
    return line


def _nothing(scene: Scene) -> list[Text]:
    lines = []
    processes = {target.service: target.processes for target in scene.status.targets} if scene.status else {}
    for service in scene.config.services:
        line = Text.assemble((f" {service.name}", _NAME), (f"   {service.match}   ", _QUIET))
        if processes.get(service.name):
            line.append(f"{processes[service.name]} followed, waiting for the first request")
        else:
            line.append("no such process yet", style=_WARN)
        lines.append(line)
    return lines


# ---- GPUs and engines ----


def _beside(scene: Scene, width: int, room: int | None) -> list[Text]:
    """What stands below the models, in at most `room` lines. Where GPUs do not all fit, those in trouble come first."""
    wanted = (len(scene.gpus) + 2 if scene.gpus else 0) + (len(scene.engines) + 2 if scene.engines else 0)
    gpus = sorted(scene.gpus, key=lambda gpu: gpu.index)
    if room is not None and wanted > room:
        gpus.sort(key=lambda gpu: not gpu.is_in_trouble)
    lines = [*_gpu_lines(gpus, width), *_engine_lines(scene.engines, width)]
    if room is None or len(lines) <= room:
        return lines
    kept = lines[: max(0, room - 1)]
    while kept and not kept[-1].plain.startswith("   "):  # a title alone says nothing
        kept.pop()
    if not kept:
        return []
    return [*kept, Text("   and more: a taller window shows all GPUs and engines", style=_QUIET)]


def _gpu_lines(gpus: Sequence[GpuRow], width: int) -> list[Text]:
    if not gpus:
        return []
    name_width = min(max(len(gpu.name) for gpu in gpus), 32 if width >= PLAIN_WIDTH else 20)
    title = f" {'GPU':<5}  {'':<{name_width}} {'util':>5} {'memory GiB':>13} {'power W':>9} {'temp':>5}"
    lines = [Text(""), Text(title, style=_QUIET)]
    for gpu in gpus:
        line = Text(f" {gpu.index:>5}  {shortened(gpu.name, name_width):<{name_width}}")
        if gpu.problem and gpu.utilization_ratio is gpu.memory_used_bytes is None:
            lines.append(line.append(f"  {gpu.problem}", style=_BAD))
            continue
        for cell, room in (
            (_share(gpu.utilization_ratio), 5),
            (_of(_gib(gpu.memory_used_bytes), _gib(gpu.memory_total_bytes), digits=1), 13),
            (_of(gpu.power_watts, gpu.power_limit_watts), 9),
            (_degrees(gpu.temperature_celsius), 5),
        ):
            line.append(" " * max(1, room + 1 - cell.cell_len)).append_text(cell)
        if gpu.xids:
            told = ", ".join(f"{code}" + (f" {count}x" if count > 1 else "") for code, count in gpu.xids)
            line.append(f"  XID {told}", style=_BAD)
        if gpu.throttled:
            line.append(f"  throttled: {', '.join(gpu.throttled)}", style=_WARN)
        if gpu.problem:
            line.append(f"  {gpu.problem}", style=_BAD)
        lines.append(line)
    return lines


def _engine_lines(engines: Sequence[EngineRow], width: int) -> list[Text]:
    if not engines:
        return []
    names = [f"{row.service}/{row.model}" for row in engines]
    name_width = min(max(map(len, names)), 48 if width >= PLAIN_WIDTH else 30)
    engine_width = max(6, *(len(row.engine) for row in engines))
    title = f" {'ENGINE':<{engine_width + 2}}  {'':<{name_width}} {'running':>8} {'waiting':>8} {'KV cache':>9}"
    lines = [Text(""), Text(title, style=_QUIET)]
    for name, row in zip(names, engines, strict=True):
        line = Text(f"   {row.engine:<{engine_width}}  {shortened(name, name_width):<{name_width}}")
        for cell, room in (
            (_requests(row.running), 8),
            (_requests(row.waiting), 8),
            (_share(row.kv_cache_usage_ratio), 9),
        ):
            line.append(" " * max(1, room + 1 - cell.cell_len)).append_text(cell)
        lines.append(line)
    return lines


def _of(value: float | None, whole: float | None, digits: int = 0) -> Text:
    """A part of something, such as `412/700`."""
    if value is None:
        return Text("-", style=_QUIET)
    shown = Text(f"{value:.{digits}f}")
    return shown if whole is None else shown.append(f"/{whole:.{digits}f}", style=_QUIET)


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _degrees(value: float | None) -> Text:
    return Text("-", style=_QUIET) if value is None else Text.assemble(f"{value:.0f}", ("C", _QUIET))


def _requests(value: float | None) -> Text:
    return Text("-", style=_QUIET) if value is None else _count(value)


def _legend(width: int) -> list[Text]:
    lines = [line for text in _LEGEND for line in textwrap.wrap(text, max(20, width - 2))]
    return [Text(f" {line}", style=_QUIET) for line in lines]


def _level(value: float, bounds: tuple[float, float]) -> str:
    return _BAD if value > bounds[1] else _WARN if value > bounds[0] else ""


def _time(seconds: float | None, bounds: tuple[float, float] | None = None) -> Text:
    if seconds is None:
        return Text("-", style=_QUIET)
    shown = span(seconds * 1e9)
    digits = shown.rstrip("mus")
    style = "" if bounds is None else _level(seconds, bounds)
    return Text.assemble((digits, style), (shown[len(digits) :], style or _QUIET))


def _share(value: float | None, style: str = "") -> Text:
    if value is None:
        return Text("-", style=_QUIET)
    # 99.96 % must not read as 100 %: whoever looks for the missing request would not look
    shown = 100 if value >= 1 else min(99, round(value * 100))
    return Text.assemble((f"{shown}", style), ("%", style or _QUIET))


def _count(value: float, style: str = "") -> Text:
    if not value:
        return Text("0", style=_QUIET)
    digits = f"{value:.0f}" if value < 9999.5 else f"{value / 1000:.0f}k" if value < 999_500 else f"{value / 1e6:.0f}M"
    return Text(digits, style=style)


def _rate(value: float) -> Text:
    return (
        Text("0", style=_QUIET)
        if not value
        else Text(f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 999.5 else f"{value:.0f}")
    )


def _failures(row: Row) -> Text:
    requests = max(row.requests_per_second * WINDOW_SECONDS, row.failures)
    return _count(row.failures, _level(row.failures / requests, FAILING) if row.failures else "")


def _why(row: Row) -> Text:
    if row.why is None:
        return Text("-", style=_QUIET)
    cause, share = row.why
    return Text.assemble(cause, (f" {share:.0%}", _QUIET))


_GROUPS: Final = {"ttft": "TTFT", "itl ": "ITL"}
_COLUMNS: Final = (
    _Column("req/s", 5, lambda row: _rate(row.requests_per_second)),
    _Column("open", 4, lambda row: _count(row.in_flight)),
    _Column("ttft p50", 6, lambda row: _time(row.ttft_p50), least_screen=72),
    _Column("ttft p90", 6, lambda row: _time(row.ttft_p90), least_screen=96),
    _Column("ttft p99", 6, lambda row: _time(row.ttft_p99, TTFT_SLOW_S)),
    _Column("itl  p50", 6, lambda row: _time(row.itl_p50), least_screen=72),
    _Column("itl  p90", 6, lambda row: _time(row.itl_p90), least_screen=96),
    _Column("itl  p99", 6, lambda row: _time(row.itl_p99, ITL_SLOW_S)),
    _Column("tok/s", 5, lambda row: _count(row.tokens_per_second)),
    _Column("cache", 5, lambda row: _share(row.cache_hit_ratio), least_screen=88),
    _Column("fail", 4, _failures),
    _Column("left", 4, lambda row: _count(row.aborts), least_screen=84),
    _Column(
        "seen", 4, lambda row: _share(row.coverage, "" if row.coverage is None else _level(1 - row.coverage, UNSEEN))
    ),
    _Column("why (of TTFT)", 16, _why, least_screen=WHY_FROM),
)
