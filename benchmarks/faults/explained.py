"""What the agent says of requests: `footlight trace --json`, as far as the benchmarks of causes read it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

import click
import msgspec

from benchmarks.common.agent import Agent, Traced

PHASES: Final = ("ttft", "decode")
_TOLD_S: Final = 20.0
_EVEN_S: Final = 2e-9


class Explained(Traced, frozen=True):
    """A line with what the time went to: seconds by cause, of each phase. Causes that took none are left out.

    `causes_sampled` is whether the request got a path; without one all of it is `unexplained`.
    """

    causes: dict[str, dict[str, float]] | None = None
    causes_sampled: bool = False

    @property
    def port(self) -> int:
        """The client's."""
        return int(self.peer.rpartition(":")[2])

    def parts(self, phase: str) -> dict[str, float]:
        """What a phase went to; nothing where that was not told."""
        return (self.causes or {}).get(phase, {})

    def window_s(self, phase: str) -> float:
        """How long a phase was, by the agent's other figures; 0 where there was none."""
        if phase == "ttft":
            return self.time_to_first_token_seconds or 0.0
        return (self.mean_inter_token_latency_seconds or 0.0) * (self.frames - 1)

    @property
    def uneven(self) -> int:
        """How many phases have parts that do not add up to them; 0 where nothing was told."""
        if self.causes is None:
            return 0
        # parts are whole nanoseconds; the mean gap times the gaps is rounded
        apart = (abs(sum(self.parts(phase).values()) - self.window_s(phase)) for phase in PHASES)
        return sum(each > _EVEN_S * max(self.frames, 1) for each in apart)


def told(watching: Agent, ports: Iterable[int]) -> dict[int, Explained]:
    """Return what the agent said, by the client's port; waits until it has said it of all, 20 s at most."""
    wanted = set(ports)
    deadline = time.monotonic() + _TOLD_S
    while True:
        watching.out.seek(0)
        lines = (msgspec.json.decode(line, type=Explained) for line in watching.out if line.endswith(b"\n"))
        found = {line.port: line for line in lines}
        if wanted <= found.keys() or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if said := watching.log():
        click.echo(f"\n{said}", err=True, nl=False)
    return found
