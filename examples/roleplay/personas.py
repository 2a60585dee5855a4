"""Characters from YAML files, read again when a file changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import yaml

DIRECTORY: Final = Path(__file__).parent / "personas"
_LOOK_AGAIN_NS: Final = 1_000_000_000
_MAX_BYTES: Final = 64 * 1024

log = logging.getLogger("roleplay")


class Persona(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A character. `summary` is for lists, `character` for the model, `greeting` is what it says first."""

    name: str
    summary: str
    character: str
    greeting: str

    @property
    def instructions(self) -> str:
        """The text that stands before every conversation with this persona."""
        return f"You are {self.name}. {self.character.strip()}\nStay in character.\n"


class PersonaStore:
    """The personas of a directory, by file name without `.yaml`.

    Looks at the directory again when it is asked, at most once a second of `clock` (nanoseconds). A file that turns bad
    keeps its last good version and is logged once.
    """

    def __init__(self, directory: Path, clock: Callable[[], int]) -> None:
        self._directory = directory
        self._clock = clock
        self._looked_ns: int | None = None
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._personas: dict[str, Persona] = {}

    def all(self) -> dict[str, Persona]:
        """Return the personas as they are now, in the order of their ids."""
        now = self._clock()
        if self._looked_ns is None or now - self._looked_ns >= _LOOK_AGAIN_NS:
            self._looked_ns = now
            self._look()
        return self._personas

    def _look(self) -> None:
        stamps: dict[str, tuple[int, int, int]] = {}
        try:
            for path in sorted(self._directory.glob("*.yaml")):
                status = path.stat()
                stamps[path.stem] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError as error:
            # A file went away between the listing and the look at it; the next look sees the directory settled.
            log.warning("personas: %s", error)
            return
        if stamps == self._stamps:
            return
        personas: dict[str, Persona] = {}
        for name, stamp in stamps.items():
            known = self._personas.get(name)
            persona = known if stamp == self._stamps.get(name) else self._read(name) or known
            if persona is not None:
                personas[name] = persona
        if self._stamps:
            log.info("personas: %d of %d files are in use after a change", len(personas), len(stamps))
        self._stamps, self._personas = stamps, personas

    def _read(self, name: str) -> Persona | None:
        path = self._directory / f"{name}.yaml"
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
            if len(text) > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            return msgspec.convert(yaml.safe_load(text), Persona)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            log.error("personas: %s is left out: %s", path, " ".join(str(error).split()))
            return None
