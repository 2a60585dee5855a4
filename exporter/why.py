"""Where the time of requests went: a request with its path, as JSON types, and what a list of them says in all.

Everything that is shown is made from the JSON types, so that what a running agent answers to `footlight why --url` and
what `footlight why` saw itself look the same.
"""

from __future__ import annotations

import heapq
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

from exporter.fronts import STOP_S, Clock, Output, prepare_output, trace_object
from exporter.labels import safe

if TYPE_CHECKING:
    from exporter.critical_path import Cause, Step
    from exporter.fronts import Reader
    from exporter.request import FinishedRequest

CAUSES: Final = ("on_cpu run_queue cpu_quota lock disk memory network upstream gpu sleep stopped unexplained").split()
"""Values of `Cause`, in the order in which they are shown; a test holds the two together."""

SHOWN: Final = 10
"""Requests in a list, where the user does not say."""
KEPT: Final = 1000
"""Requests that a front keeps at the most: the slowest. Their steps are what costs memory."""

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Explained:
    """A finished request whose path was walked.

    `steps` are those of the time to first token, in order and without a gap; empty where the path was not kept.
    `ttft` and `decode` are nanoseconds by cause and add up to their window each; empty where it was not walked.
    `slow`: over its objective, or among the slowest of its window. `names` are those of the threads in the steps; empty
    or missing where one was not seen.
    """

    request: FinishedRequest
    steps: tuple[Step, ...]
    ttft: Mapping[Cause, int]
    decode: Mapping[Cause, int]
    slow: bool
    names: Mapping[int, str]


def encode(explained: Explained, wall_ns: int, label_names: Sequence[str]) -> JsonObject:
    """Everything about an explained request as JSON types: what `trace --json` has, `slow`, causes and steps.

    `wall_ns` is when the request finished, since the epoch. Times are seconds, exact to the nanosecond: rounded to
    that, the parts of a window add up to it. A step's `offset_seconds` counts from the request's arrival. Threads are
    named where their name was seen; else null.
    """
    request = explained.request

    def name(tid: int) -> str | None:
        found = explained.names.get(tid)
        return safe(found) if found else None

    def step_object(step: Step) -> JsonObject:
        return {
            "offset_seconds": (step.begin_ns - request.arrived_ns) / 1e9,
            "duration_seconds": (step.end_ns - step.begin_ns) / 1e9,
            "tid": step.tid,
            "thread": name(step.tid),
            "cause": step.cause.value,
            "detail": _detail(step, name),
            "woken_by": step.woken_by or None,
            "woken_by_thread": name(step.woken_by) if step.woken_by else None,
        }

    return {
        **trace_object(request, wall_ns, label_names),
        "slow": explained.slow,
        "causes_sampled": True,
        "causes": {"ttft": _causes(explained.ttft), "decode": _causes(explained.decode)},
        "steps": [step_object(step) for step in explained.steps],
    }


def _causes(parts: Mapping[Cause, int]) -> dict[str, float]:
    return {cause.value: nanoseconds / 1e9 for cause, nanoseconds in parts.items() if nanoseconds}


def _detail(step: Step, name: Callable[[int], str | None]) -> str | None:
    """What a person is told of a step: the holder of the lock, the peer; None for nothing."""
    if not step.detail:
        return None
    if step.cause.value in {"lock", "on_cpu"} and step.detail.isdecimal():
        tid = int(step.detail)
        if tid == step.tid:
            return None
        holder = thread_label(name(tid), tid)
        return f"held by {holder}" if step.cause.value == "lock" else holder
    return safe(step.detail)


def thread_label(name: str | None, tid: int | None) -> str:
    """`NAME (TID)`, or what of it is known."""
    if not tid:
        return "-"
    return f"thread {tid}" if name is None else f"{name} ({tid})"


# ---- what the JSON types say ----


def check(told: Any) -> JsonObject:  # noqa: ANN401 - what a JSON parser returned
    """Return `told` where it is what `encode` makes, as far as it is shown; else raise ValueError."""
    try:
        times = [*told["causes"]["ttft"].values(), *told["causes"]["decode"].values(), window_s(told)]
        for step in told["steps"]:
            times += [step["offset_seconds"], step["duration_seconds"]]
            names = [step[key] for key in ("thread", "detail", "woken_by_thread")]
            if not _printable(step["cause"]) or not all(name is None or _printable(name) for name in names):
                raise ValueError("a step whose cause or names are no text")
            if not all(tid is None or isinstance(tid, int) for tid in (step["tid"], step["woken_by"])):
                raise ValueError("a thread that is no number")
        if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in times):
            raise ValueError("a time that is no number")
        datetime.fromisoformat(f"{told['time'][:26]}+00:00")
        texts = [told[key] for key in ("service", "method", "target", "peer")]
        texts += [told["model"] or "", *told["causes"]["ttft"], *told["causes"]["decode"]]
        if not isinstance(told["number"], int) or not all(map(_printable, texts)):
            raise ValueError("a name that is no text")
        bool(told["slow"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return dict(told)


def _printable(text: object) -> bool:
    """Whether it is a text that a terminal may be given: a file or an agent could hold escape sequences."""
    return isinstance(text, str) and text.isprintable()


def window_s(told: JsonObject) -> float:
    """The length of the explained window in seconds: arrival to first token."""
    causes = math.fsum(told["causes"]["ttft"].values())
    return causes or told["time_to_first_token_seconds"] or 0.0


def model_of(told: JsonObject) -> str:
    """The name under which a request is counted: its model, or what stands for an unknown one."""
    return safe(told["model"] or "")


def main_detail(told: JsonObject, cause: str) -> str | None:
    """The detail that most of a cause's time in the path went to; None where no step of it has one."""
    times: dict[str, float] = {}
    for step in told["steps"]:
        if step["cause"] == cause and step["detail"]:
            times[step["detail"]] = times.get(step["detail"], 0.0) + step["duration_seconds"]
    return max(times, key=lambda detail: times[detail]) if times else None


def ordered(causes: Mapping[str, float]) -> list[tuple[str, float]]:
    """Causes with their seconds in the order of `CAUSES`; names that this version does not know come last."""
    rank = {cause: index for index, cause in enumerate(CAUSES)}
    return sorted(
        ((cause, seconds) for cause, seconds in causes.items() if seconds > 0),
        key=lambda part: (rank.get(part[0], len(rank)), part[0]),
    )


def dominant(causes: Mapping[str, float]) -> str | None:
    """The cause with the most time; None without any."""
    parts = ordered(causes)
    return max(parts, key=lambda part: part[1])[0] if parts else None


@dataclass(slots=True)
class ModelSummary:
    """One service and model: all of its explained requests."""

    service: str
    model: str
    requests: int = 0
    slow: int = 0
    seconds: float = 0.0
    causes: dict[str, float] = field(default_factory=dict)

    def add(self, told: JsonObject) -> None:
        """Count a request in."""
        self.requests += 1
        self.slow += bool(told["slow"])
        self.seconds += window_s(told)
        for cause, seconds in told["causes"]["ttft"].items():
            self.causes[cause] = self.causes.get(cause, 0.0) + seconds


class Summary:
    """Adds up explained requests by service and model; keeps the slowest.

    `keep` bounds how many, with their steps. `all_requests`: also those that are not slow are kept.
    """

    def __init__(self, keep: int = KEPT, model: str | None = None, all_requests: bool = False) -> None:
        self._keep = keep
        self._model = model
        self._all = all_requests
        self._kept: list[tuple[float, int, JsonObject]] = []
        self._models: dict[tuple[str, str], ModelSummary] = {}
        self._order = 0
        self.slowest: JsonObject | None = None
        """Of all that were added, slow or not."""

    def wants(self, told: JsonObject) -> bool:
        """Whether a request is one that the user asked to see."""
        return self._of_model(told) and (self._all or bool(told["slow"]))

    def add(self, told: JsonObject) -> None:
        """Count a request in, and keep it where it is among the slowest."""
        if not self._of_model(told):
            return
        key = (told["service"], model_of(told))
        self._models.setdefault(key, ModelSummary(*key)).add(told)
        if self.slowest is None or window_s(told) > window_s(self.slowest):
            self.slowest = told
        if self.wants(told):
            self._order += 1
            # the order breaks ties: objects do not compare, and of two equals the earlier one stays
            heapq.heappush(self._kept, (window_s(told), -self._order, told))
            if len(self._kept) > self._keep:
                heapq.heappop(self._kept)

    def _of_model(self, told: JsonObject) -> bool:
        return self._model is None or model_of(told) == self._model

    @property
    def kept(self) -> list[JsonObject]:
        """The slowest, the slowest first."""
        return [told for _, _, told in sorted(self._kept, key=lambda item: item[:2], reverse=True)]

    @property
    def models(self) -> list[ModelSummary]:
        """By service and model."""
        return [self._models[key] for key in sorted(self._models)]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a timeline: a step, or `folded` steps that are too short for lines of their own.

    `offset_s` and `duration_s` are seconds since the arrival. `causes` are the seconds of each cause in it.
    """

    offset_s: float
    duration_s: float
    causes: Mapping[str, float]
    folded: int
    step: JsonObject | None


def fold(steps: Sequence[JsonObject], lines: int) -> list[Line]:
    """The path in about that many lines: the longest steps have their own, what lies between two of them shares one.

    A step that stands alone between two long ones is not folded. `lines` of 0 is every step. No time is left out.
    """
    if not lines or len(steps) <= lines:
        return [_line([step]) for step in steps]
    # every long step may leave one stretch of short ones before it
    longest = sorted(range(len(steps)), key=lambda index: -steps[index]["duration_seconds"])[: max(1, lines // 2)]
    alone = set(longest)
    found: list[Line] = []
    group: list[JsonObject] = []
    for index, step in enumerate(steps):
        if index in alone:
            found += [_line(group)] if group else []
            found.append(_line([step]))
            group = []
        else:
            group.append(step)
    return found + ([_line(group)] if group else [])


def _line(steps: Sequence[JsonObject]) -> Line:
    causes: dict[str, float] = {}
    for step in steps:
        causes[step["cause"]] = causes.get(step["cause"], 0.0) + step["duration_seconds"]
    (alone,) = steps if len(steps) == 1 else (None,)
    total = math.fsum(step["duration_seconds"] for step in steps)
    return Line(steps[0]["offset_seconds"], total, causes, 0 if alone else len(steps), alone)


# ---- the front ----


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked `footlight why` to show."""

    as_json: bool = False
    model: str | None = None
    top: int | None = None
    """Requests at the most; None: `SHOWN` in a list, all in JSON."""
    all_requests: bool = False
    """Also those that are not slow."""
    request: int | None = None
    """Only this one, with its path."""
    lines: int = 40
    """Lines of a path; 0: every step."""

    def summary(self) -> Summary:
        """Where to put what is found."""
        every = self.all_requests or self.request is not None
        return Summary(min(self.top or KEPT, KEPT), self.model, every)


class WhyFront:
    """Collects explained requests for `duration_s` seconds and shows the slow ones; with `follow` each as it ends.

    With `wanted.request` it ends as soon as that request was explained. Ctrl-C shows what there is. `duration_s` None:
    until Ctrl-C.
    """

    fds: tuple[int, ...] = ()
    stop_s: float = STOP_S

    def __init__(
        self,
        wanted: Wanted,
        *,
        duration_s: float | None = 10.0,
        follow: bool = False,
        serves: bool = False,
        out: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.serves = serves
        self._wanted: Final = wanted
        self._duration_ns: Final = None if duration_s is None else round(duration_s * 1e9)
        self._follow: Final = follow
        self._out: Final = Output(out)
        self._clock: Final = clock or Clock()
        self._summary = wanted.summary()
        self._finished = 0
        self._shown = 0
        self._end_ns: int | None = None
        self._labels: tuple[str, ...] = ()
        self._wall_offset_ns: Final = self._clock.wall_ns() - self._clock.monotonic_ns()

    def prepare(self) -> None:
        """Load what draws."""
        prepare_output()
        if not self._wanted.as_json:
            from rich.cells import cell_len  # noqa: PLC0415 - rich is 2.7 MB that only a terminal needs

            import exporter.cli.causes  # noqa: F401, PLC0415 - as above

            cell_len("\u4e16\u754c")
            # the time zone is in a file, too
            time.localtime()

    def started(self, reader: Reader) -> None:
        """The time starts to count."""
        self._labels = reader.slis.label_names
        if self._duration_ns is not None:
            self._end_ns = self._clock.monotonic_ns() + self._duration_ns
        if sys.stderr.isatty() and not self._follow:
            span = "until Ctrl-C" if self._duration_ns is None else f"for {self._duration_ns / 1e9:g} s"
            sys.stderr.write(f"watching {span}; Ctrl-C shows what there is\n")

    def finished(self, request: FinishedRequest) -> None:
        """Count it: the list says how many there were."""
        self._finished += 1

    def explained(self, explained: Explained) -> None:
        """Keep the request; with `follow` print it."""
        if self._wanted.request is not None and explained.request.number != self._wanted.request:
            return
        told = encode(explained, explained.request.finished_ns + self._wall_offset_ns, self._labels)
        self._summary.add(told)
        if self._follow and self._summary.wants(told) and not self._enough():
            self._shown += 1
            self._print([told])

    def tick(self, reader: Reader) -> None:
        """End the agent when the time is over, or everything was shown."""
        over = self._end_ns is not None and self._clock.monotonic_ns() >= self._end_ns
        found = self._wanted.request is not None and self._summary.slowest is not None
        if over or found or self._out.closed or (self._follow and self._enough()):
            reader.stop()

    def stopped(self, reader: Reader) -> None:
        """Show what was collected."""
        if not self._follow:
            self._out.attempt(lambda: show(self._summary, self._wanted, self._out.file, self._finished))
        elif not self._wanted.as_json:
            self._out.attempt(lambda: show(self._summary, replace(self._wanted, top=0), self._out.file, self._finished))

    def _enough(self) -> bool:
        return self._wanted.top is not None and self._shown >= self._wanted.top

    def _print(self, told: list[JsonObject]) -> None:
        if self._wanted.as_json:
            self._out.attempt(lambda: write_json(told, self._out.file))
            return
        from exporter.cli.causes import Screen  # noqa: PLC0415 - rich is 2.7 MB that only a terminal needs

        self._out.attempt(lambda: Screen(self._out.file).requests(told, header=self._shown == 1))


def show(summary: Summary, wanted: Wanted, file: TextIO, finished: int | None = None) -> None:
    """Print what was asked for. `finished` is how many requests there were, with or without a path; None: not known.

    Raises BrokenPipeError when nobody reads the stream any more.
    """
    if wanted.as_json:
        write_json(summary.kept, file)
        return
    from exporter.cli.causes import Screen  # noqa: PLC0415 - rich is 2.7 MB that only a terminal needs

    screen = Screen(file)
    if wanted.request is None:
        screen.overview(summary, SHOWN if wanted.top is None else wanted.top, finished)
    elif summary.kept:
        screen.path(summary.kept[0], wanted.lines)
    else:
        screen.say(f"request {wanted.request} was not seen, or has no path: a sample of the requests and the slow have")


def write_json(told: Iterable[JsonObject], file: TextIO) -> None:
    """One object a line."""
    for each in told:
        file.write(json.dumps(each) + "\n")
    file.flush()
