"""Keeps what was learnt of each service's health over restarts, in one small file of a folder.

The reader writes it by the folder's descriptor: it has no right to look the folder up by its path. What is read is
checked like anything else that comes from outside.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import msgspec

from exporter.health import LOAD, LOADS, RULES, SAMPLES

NAME: Final = "health.json"
VERSION: Final = 1
MOST_BYTES: Final = 4 << 20
STALE_S: Final = 86400.0
"""What was learnt longer ago is no longer what is normal."""
_PART: Final = NAME + ".part"
_RULES: Final = {signal.value: rule for signal, rule in RULES.items()} | dict.fromkeys(LOADS, LOAD)


class Learnt(msgspec.Struct, frozen=True):
    """What was learnt of one service: samples by signal, and the process that they belong to.

    `written` is in seconds since the epoch; None in a file of an agent that wrote one time for all.
    """

    eldest: int | None
    samples: dict[str, list[float]]
    written: float | None = None

    def is_fresh(self, now: float) -> bool:
        """Whether this may still be what is normal. `now` is in seconds since the epoch."""
        return self.written is not None and 0 <= now - self.written <= STALE_S


class State(msgspec.Struct, frozen=True):
    """The file. `written` is in seconds since the epoch."""

    version: int
    written: float
    services: dict[str, Learnt]


def load(folder: int, now: float) -> dict[str, Learnt]:
    """What was learnt, by service, without what is too old; nothing where there is no such file.

    Samples that their signal cannot have are left out: the reader would end on them, and again when it is restarted.
    `now` is in seconds since the epoch. Raises ValueError where the file is none of this agent's; OSError.
    """
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return {}
    with os.fdopen(fd, "rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        state = msgspec.json.decode(raw, type=State)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if state.version != VERSION:
        raise ValueError(f"it is of version {state.version}, not {VERSION}")
    found = {
        name: Learnt(
            each.eldest,
            {signal: _possible(signal, samples) for signal, samples in each.samples.items() if signal in _RULES},
            state.written if each.written is None else each.written,
        )
        for name, each in state.services.items()
    }
    return {name: each for name, each in found.items() if each.is_fresh(now)}


def _possible(signal: str, samples: list[float]) -> list[float]:
    return [sample for sample in samples if _RULES[signal].can_have(sample)][-SAMPLES:]


def save(folder: int, now: float, services: dict[str, Learnt]) -> None:
    """Write the file: it is the old one or the new one, never a half. Raises OSError."""
    told = msgspec.json.encode(State(VERSION, now, services))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(_PART, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(told)
        os.replace(_PART, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(_PART, dir_fd=folder)
        raise
