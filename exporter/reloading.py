"""Another configuration for a running agent: what may change, what keeps its place, how a change is noticed.

The kernel and the reader know services by their index. So a service keeps its place for as long as the agent runs: a
new one goes behind the others, one that is gone leaves its place to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from exporter.config import MAX_SERVICES, Alertmanager, Match, Service
from exporter.slo.declared import Slo
from probes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from exporter.config import Config

SPARE_SERVICES: Final = 16
"""Places for services that a running agent can be given, beside those that it began with."""
MAX_ENCODED_BYTES: Final = 1 << 20
"""A larger configuration does not go over to the reader in one packet."""
_NOBODY: Final = Match(pid=(-1,))
_FIXED: Final = ("listen", "probes", "limits", "recorder", "health", "gpu", "probe_points")
"""Sections that decide what is loaded, opened or sized when the agent starts."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a configuration comes from: its file, watched since before it was read, and how (raises ConfigError)."""

    watch: Watch
    read: Callable[[], Config]


class Changed(msgspec.Struct, frozen=True):
    """What of a configuration another one can change in a running agent, as it crosses to the reader."""

    services: tuple[Service, ...]
    slos: tuple[Slo, ...]
    alertmanagers: tuple[Alertmanager, ...] = ()


def changed(config: Config) -> Changed:
    """That part of a configuration."""
    return Changed(config.services, config.slos, config.alertmanagers)


def places(config: Config) -> int:
    """How many services an agent has room for that begins with this configuration."""
    return min(MAX_SERVICES, len(config.services) + SPARE_SERVICES)


def is_gone(service: Service) -> bool:
    """Whether a service was taken out of the configuration and only keeps its place."""
    return service.match == _NOBODY


def merged(
    running: Config,
    wanted: Config,
    room: int,
    *,
    labels: Sequence[str] | None = None,
    most_bytes: int = MAX_ENCODED_BYTES,
) -> Config:
    """The configuration to go on with: what is wanted, with each service in its place.

    `labels` are those that the series have, by default the running configuration's. Raises ConfigError where only a
    restart can bring what is wanted, more than `room` services were named in all, or it needs more than `most_bytes`.
    """
    for section in _FIXED:
        if getattr(wanted, section) != getattr(running, section):
            raise ConfigError(
                f"{section}: it changed, and is only read when the agent starts",
                "restart the agent, or put it back as it was",
            )
    new_labels = set(wanted.label_names) - set(running.label_names if labels is None else labels)
    if new_labels:
        raise ConfigError(
            f"labels: {', '.join(sorted(new_labels))} is new, and every series would need it",
            "restart the agent, or put it back as it was",
        )
    services = _placed(running.services, wanted.services)
    if len(services) > room:
        raise ConfigError(
            f"services: {len(services)} were named since the agent began, and it has room for {room}",
            "restart the agent",
        )
    made = msgspec.structs.replace(wanted, services=services, web=running.web)
    size = len(msgspec.json.encode(changed(made)))
    if size > most_bytes:
        raise ConfigError(f"the configuration has {size} bytes", f"keep it below {most_bytes}, or restart the agent")
    return made


def _placed(running: Sequence[Service], wanted: Sequence[Service]) -> tuple[Service, ...]:
    by_name = {service.name: service for service in wanted}
    known = {service.name for service in running}
    kept = [by_name.get(service.name) or msgspec.structs.replace(service, match=_NOBODY) for service in running]
    return (*kept, *(service for service in wanted if service.name not in known))


class Watch:
    """Notices that a file became another: its content, or what a symbolic link leads to, as in a ConfigMap."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether it is another one than at the last call, or when this was made. One that is gone has not changed."""
        state = self._state()
        if state is None or state == self._seen:
            return False
        self._seen = state
        return True

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
