"""The probe points as the attacher sees them: places in an engine's code that tell of look-ups in its KV cache."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol

from probes.probe import OBJECTS, Count, Probe, Transport
from probes.user_probes import Scope, Symbol, UserProbes

_USDT_PROGRAM: Final = "statically_defined"
_ANY_SERVICE: Final = 0xFFFFFFFF
_U32: Final = struct.Struct("=I")
_POINT: Final = struct.Struct("=4I")


class Point(Protocol):
    """What the configuration says of a point; see `exporter.config.ProbePoint`."""

    @property
    def library(self) -> str:
        """A file name, or an absolute path."""

    @property
    def symbol(self) -> str | None:
        """A function, or None for a USDT probe."""

    @property
    def usdt(self) -> str | None:
        """`provider:name`, or None for a function."""

    @property
    def model(self) -> int | None:
        """Number of the argument that is the model's name, from 1."""

    @property
    def hit_tokens(self) -> int:
        """The same of the tokens that were found."""

    @property
    def looked_up_tokens(self) -> int:
        """The same of the tokens that were looked up."""

    @property
    def service(self) -> str | None:
        """The only service for which it counts, if it is one."""


@dataclass(frozen=True, slots=True)
class PointsMap:
    """The slots of the points, for the reader to map; see `probes.points_table`."""

    object_path: Path
    fd: int
    slots: int


class ProbePointsProbe(Probe):
    """The loaded probe; `follow_processes` attaches it to the libraries that processes of services map.

    `points` and `services` are the configuration's, in its order. `slots` is for how many models, of services at
    points, there is room: at most and by default as many as the object has.
    """

    name: ClassVar[str] = "probe_points"
    reasons: ClassVar[tuple[Count, ...]] = (
        Count.UNREADABLE,
        Count.IMPLAUSIBLE_LOOKUPS,
        Count.MODEL_NAMES_CUT,
        Count.SLOTS_FULL,
    )

    def __init__(
        self,
        points: Sequence[Point],
        services: Sequence[str],
        transport: Transport,
        *,
        memory_bytes: int = 120 * 2**20,
        slots: int | None = None,
        shares_with: Probe | None = None,
        object_path: Path | None = None,
    ) -> None:
        numbers = {name: number for number, name in enumerate(services)}
        self._points = [(point, None if point.service is None else numbers[point.service]) for point in points]
        path = object_path or OBJECTS / f"{self.name}.bpf.o"
        super().__init__(
            transport, memory_bytes=memory_bytes, services=len(services), shares_with=shares_with, object_path=path
        )
        for number, (point, service) in enumerate(self._points):
            arguments = (point.model or 0, point.hit_tokens, point.looked_up_tokens)
            value = _POINT.pack(*arguments, _ANY_SERVICE if service is None else service)
            self.map("points").update(_U32.pack(number), value)
        table = self.map("slots")
        for slot in range(table.max_entries if slots is None else slots):
            self.map("free_slots").update(b"", _U32.pack(slot))
        self.points_map: PointsMap = PointsMap(path, table.fd, table.max_entries)
        self._stack.callback(self._places.close)

    @classmethod
    def seen_counts(cls) -> tuple[Count, ...]:
        """The counter of look-ups that were due."""
        return (Count.SEEN_LOOKUPS,)

    def _set_up(self) -> None:
        symbols = [
            Symbol(
                _program(number, point),
                point.library,
                point.symbol or point.usdt or "",
                cookie=number if point.symbol is None else 0,
                usdt=point.symbol is None,
                service=service,
            )
            for number, (point, service) in enumerate(self._points)
        ]
        used = {symbol.program for symbol in symbols}
        for program in self._object.programs:
            program.set_autoload(program.name in used)
        # Children count from their first call on, and each look-up is to be counted: no other scope does both.
        self._places = UserProbes(self._object, symbols, scope=Scope.FILE)

    def attach(self) -> None:
        """Do nothing yet: there is nothing to attach to until a process is followed."""

    def follow_processes(self, targets: Mapping[int, int]) -> None:
        """Attach to what these processes (tgid -> service) map, detach from what no other does. Once a second."""
        self._places.follow(targets)

    def notes(self) -> tuple[str, ...]:
        """Why points are not attached, a sentence for each reason: for `check` and the logs."""
        seen = {*self._places.files, *(each.path for each in self._places.missing)}
        said = [
            f"{point.symbol or point.usdt}: no followed process maps {point.library}"
            for point, _ in self._points
            if not any(_may_be(path, point.library) for path in seen)
        ]
        said += [f"{each.name or 'all points'}: {each.path}: {each.reason}" for each in self._places.missing]
        return tuple(dict.fromkeys(said))

    @property
    def files(self) -> tuple[str, ...]:
        """The libraries with at least one point attached, as their processes see them."""
        return self._places.files

    @property
    def attached(self) -> frozenset[int]:
        """The processes that map one of them."""
        return self._places.attached


def _may_be(path: str, library: str) -> bool:
    """Whether a file may be what a point calls so: behind a symbolic link it has another name, or a version."""
    name, wanted = path.rpartition("/")[2], library.rpartition("/")[2]
    return name.startswith(wanted.partition(".so")[0])


def _program(number: int, point: Point) -> str:
    return _USDT_PROGRAM if point.symbol is None else f"function_{number}"
