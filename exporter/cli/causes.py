"""Draws where the time of requests went: bars of causes, lists of requests, the path of one of them.

Each cause has a letter and a colour, so that a bar reads on paper, in a pipe and to a person who sees no red.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, TextIO

from rich.console import Console
from rich.text import Text

from exporter.fronts import shortened, span
from exporter.why import (
    JsonObject,
    Line,
    ModelSummary,
    Summary,
    dominant,
    fold,
    main_detail,
    model_of,
    ordered,
    thread_label,
    window_s,
)

PLAIN_WIDTH: Final = 100
"""Columns where the output is no terminal."""
LEAST_WIDTH: Final = 60
PATH_IN_LIST: Final = 16
"""Lines of the path of the slowest request, below a list."""

_QUIET: Final = "dim"
_BOLD: Final = "bold"
_BAD: Final = "bold red"

# Okabe and Ito's colours, which people who see no red or no green tell apart, and greys.
_LOOKS: Final = {
    "on_cpu": ("C", "black on #56b4e9"),
    "run_queue": ("R", "black on #e69f00"),
    "cpu_quota": ("Q", "white on #b34700"),
    "lock": ("L", "black on #cc79a7"),
    "disk": ("D", "white on #00805d"),
    "memory": ("M", "black on #f0e442"),
    "network": ("N", "white on #005f94"),
    "upstream": ("U", "white on #6a4c93"),
    "gpu": ("G", "black on #a6d854"),
    "sleep": ("S", "black on #a8a8a8"),
    "stopped": ("T", "white on #606060"),
    "unexplained": ("?", "black on #e4e4e4"),
}
_WITHOUT_TID: Final = re.compile(r" \([0-9]+\)")
_UNKNOWN: Final = ("?", "black on #e4e4e4")


class Screen:
    """A terminal, or any stream: a bar is coloured where there are colours, else it is made of letters."""

    def __init__(self, file: TextIO, width: int | None = None) -> None:
        self._console: Final = Console(file=file, highlight=False, markup=False, soft_wrap=False, width=width)
        if not self._console.is_terminal and width is None:
            self._console.width = PLAIN_WIDTH
        self._width: Final = max(LEAST_WIDTH, self._console.width)
        self._coloured: Final = self._console.color_system is not None and not os.environ.get("NO_COLOR")

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._print([Text(f" {text}")])

    def overview(self, summary: Summary, count: int, finished: int | None) -> None:
        """The slowest requests, the models, the legend, and the path of the slowest."""
        shown = summary.kept[:count]
        lines = [self._headline(summary, len(shown), finished)]
        if shown:
            lines += [Text(), *self._list(shown, header=True)]
        if summary.models:
            lines += [Text(), *self._models(summary.models)]
            causes = {cause for model in summary.models for cause in model.causes}
            lines += [Text(), *self._legend(causes)]
        if shown and shown[0]["steps"]:
            lines += [Text(), *self._path(shown[0], PATH_IN_LIST)]
        self._print(lines)

    def requests(self, told: Sequence[JsonObject], header: bool) -> None:
        """A line for each; with `header` the titles before them."""
        self._print(self._list(told, header))

    def path(self, told: JsonObject, lines: int) -> None:
        """The path of one request, in about so many lines; 0: every step."""
        causes = {**told["causes"]["ttft"], **told["causes"]["decode"]}
        self._print([*self._path(told, lines), Text(), *self._legend(causes)])

    def _print(self, lines: Sequence[Text]) -> None:
        for line in lines:
            line.no_wrap = True
            line.truncate(self._width, overflow="ellipsis")
            line.rstrip()
            self._console.print(line)
        self._console.file.flush()

    # ---- lists ----

    def _headline(self, summary: Summary, shown: int, finished: int | None) -> Text:
        explained = sum(model.requests for model in summary.models)
        slow = sum(model.slow for model in summary.models)
        counts = "" if finished is None else f"{finished} finished, "
        line = Text.assemble((f" {slow} slow", _BOLD), f" of {explained} requests with a path")
        if not explained:
            line = Text(" no request with a path was seen")
        line.append(f"   ({counts}{shown} shown, the slowest first)" if explained else "", style=_QUIET)
        if explained and not slow and not shown:
            line = Text.assemble((" nothing was slow", _BOLD), f" among {explained} requests with a path; ")
            line.append("--all shows those that were not")
        return line

    def _columns(self) -> tuple[int, int, int]:
        """Widths of the model, the bar and the words after it."""
        for least, model, words in ((160, 32, 56), (120, 22, 32), (100, 18, 32), (76, 14, 17)):
            if self._width >= least:
                return model, self._width - words - model - 30, words
        return 10, self._width - 50, 10

    def _list(self, told: Sequence[JsonObject], header: bool) -> list[Text]:
        model, bar, words = self._columns()
        title = f" {'NUMBER':>6}  {'TIME':<8}  {'MODEL':<{model}}  {'TTFT':>6}  {'CAUSES':<{bar}}  MOST OF IT"
        lines = [Text(title, style=_QUIET)] if header else []
        for each in told:
            line = Text(f" {each['number']:>6}  {_local(each['time'], '%H:%M:%S')}  ")
            line.append(f"{shortened(model_of(each), model):<{model}}  ")
            line.append(f"{span(window_s(each) * 1e9):>6}  ", style=_BAD if each["slow"] else "")
            line.append_text(self._bar(each["causes"]["ttft"], bar)).append("  ")
            line.append(self._words(each, words))
            lines.append(line)
        return lines

    def _words(self, told: JsonObject, width: int) -> str:
        cause = dominant(told["causes"]["ttft"])
        if cause is None:
            return ""
        text = f"{cause} {_share(told['causes']['ttft'][cause], window_s(told))}"
        detail = main_detail(told, cause)
        room = width - len(text) - 1
        return text if detail is None or room < min(len(detail), 16) else f"{text} {shortened(detail, room)}"

    def _models(self, models: Sequence[ModelSummary]) -> list[Text]:
        name, bar, words = self._columns()
        # the columns of the list, so that the bars stand below each other: its number and time are 18 wide
        title = f" {'MODEL':<{name + 4}} {'REQUESTS':>8} {'SLOW':>4}  {'MEAN':>6}  {'CAUSES':<{bar}}  SHARES"
        lines = [Text(title, style=_QUIET)]
        several = len({model.service for model in models}) > 1
        for model in models:
            label = f"{model.service}/{model.model}" if several else model.model
            line = Text(f" {shortened(label, name + 4):<{name + 4}} {model.requests:>8} ")
            line.append(f"{model.slow:>4}", style=_BAD if model.slow else "")
            line.append(f"  {span(model.seconds / model.requests * 1e9):>6}  ")
            line.append_text(self._bar(model.causes, bar)).append("  ")
            line.append(_fitting(model.causes, words))
            lines.append(line)
        return lines

    def _legend(self, causes: Mapping[str, float] | set[str]) -> list[Text]:
        lines = [Text(" ")]
        for cause, _ in ordered(dict.fromkeys(causes, 1.0)):
            letter, style = _LOOKS.get(cause, _UNKNOWN)
            entry = Text.assemble((f" {letter} ", style)) if self._coloured else Text(letter)
            entry.append(f" {cause}   ", style=_QUIET)
            if lines[-1].cell_len + entry.cell_len > self._width:
                lines.append(Text(" "))
            lines[-1].append_text(entry)
        return lines

    def _bar(self, causes: Mapping[str, float], width: int) -> Text:
        parts = ordered(causes)
        bar = Text()
        for (cause, _), cells in zip(parts, apportion([seconds for _, seconds in parts], width), strict=True):
            letter, style = _LOOKS.get(cause, _UNKNOWN)
            if not self._coloured:
                bar.append(letter * cells)
                continue
            label = cause if len(cause) + 2 <= cells else letter if cells else ""
            bar.append(label.center(cells), style=style)
        bar.append(" " * (width - bar.cell_len))
        return bar

    # ---- the path ----

    def _path(self, told: JsonObject, count: int) -> list[Text]:
        ttft_s = window_s(told)
        head = Text.assemble((f" request {told['number']}", _BOLD), f"  {told['service']}/{model_of(told)}")
        head.append(f"  {told['method']} {told['target']}  from {told['peer']}", style=_QUIET)
        facts = Text(f" ended {_local(told['time'], '%H:%M:%S.%f')[:12]}, first token after {span(ttft_s * 1e9)}")
        facts.append(f"   {_fitting(told['causes']['ttft'], self._width - facts.cell_len - 4)}", style=_QUIET)
        lines = [head, facts, Text(" ").append_text(self._bar(told["causes"]["ttft"], self._width - 2))]
        if not told["steps"]:
            return [*lines, Text(" its steps were not kept", style=_QUIET)]
        scale = min(60, self._width // 4) if self._width >= 110 else 0
        who = 22 if self._width < 100 else 26
        what = self._width - 10 - 8 - who - 13 - scale - 6
        title = f" {'OFFSET/ms':>9}  {'TOOK':>6}  {'THREAD':<{who}}  {'CAUSE':<11}  {'WHAT':<{what}}"
        lines += [Text(), Text(title, style=_QUIET)]
        shown = fold(told["steps"], count)
        for index, each in enumerate(shown):
            line = Text(f" {each.offset_s * 1e3:>9.3f}  {span(each.duration_s * 1e9):>6}  ")
            line.append_text(self._step(each, shown[index - 1] if index else None, who, what))
            if scale:
                line.append("  ").append_text(self._place(each, ttft_s, scale))
            lines.append(line)
        return lines

    def _step(self, line: Line, before: Line | None, who: int, what: int) -> Text:
        step = line.step
        if step is None:
            text = Text(f"{f'{line.folded} short steps':<{who}}  {'':<11}  ", style=_QUIET)
            return text.append(f"{_fitting(line.causes, what):<{what}}")
        label = thread_label(step["thread"], step["tid"])
        same = before is not None and before.step is not None and before.step["tid"] == step["tid"]
        text = Text(f"{shortened(label, who):<{who}}  ", style=_QUIET if same else "")
        letter_style = _LOOKS.get(step["cause"], _UNKNOWN)[1]
        text.append(f"{step['cause']:<11}", style=letter_style if self._coloured else "").append("  ")
        said = [step["detail"]] if step["detail"] else []
        holder = thread_label(step["woken_by_thread"], step["woken_by"])
        if step["woken_by"] and step["detail"] != f"held by {holder}":  # who held the lock woke whoever waited
            said.append(f"woken by {holder}")
        told = ", ".join(said)
        # a name says more than half a name with its number
        told = told if len(told) <= what else _WITHOUT_TID.sub("", told)
        return text.append(f"{shortened(told, what):<{what}}")

    def _place(self, line: Line, ttft_s: float, width: int) -> Text:
        """Where in the window the line lies."""
        if ttft_s <= 0:
            return Text()
        first = min(width - 1, max(0, math.floor(line.offset_s / ttft_s * width)))
        end = min(width, max(first + 1, math.ceil((line.offset_s + line.duration_s) / ttft_s * width)))
        return Text(" " * first).append_text(self._bar(line.causes, end - first)).append(" " * (width - end))


def apportion(parts: Sequence[float], cells: int) -> list[int]:
    """Whole cells for each part, `cells` in all: each share rounded down, the rest to the largest remainders."""
    total = math.fsum(parts)
    if total <= 0:
        return [0] * len(parts)
    exact = [part / total * cells for part in parts]
    found = [math.floor(each) for each in exact]
    by_rest = sorted(range(len(parts)), key=lambda index: found[index] - exact[index])
    for index in by_rest[: cells - sum(found)]:
        found[index] += 1
    return found


def _fitting(causes: Mapping[str, float], width: int) -> str:
    """The largest causes with their shares, as many as fit."""
    total = math.fsum(causes.values())
    text = ""
    for cause, seconds in sorted(ordered(causes), key=lambda part: -part[1]):
        more = f"{', ' if text else ''}{cause} {_share(seconds, total)}"
        if len(text) + len(more) > width:
            break
        text += more
    return text


def _share(part: float, total: float) -> str:
    percent = 100 * part / total if total else 0.0
    return "<1%" if 0 < percent < 0.5 else ">99%" if 99.5 <= percent < 99.9999 else f"{percent:.0f}%"


def _local(at: str, form: str) -> str:
    """An instant of the JSON types (UTC, nanoseconds) as local time."""
    seconds = datetime.fromisoformat(f"{at[:26]}+00:00").timestamp()
    return datetime.fromtimestamp(seconds).strftime(form)
