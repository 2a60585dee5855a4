"""A driver of no GPU at all: builds the stand-in libnvidia-ml.so.1 and writes the script that it follows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("nvml.c")
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "nvml"
NAME = "libnvidia-ml.so.1"


def build(folder: Path) -> Path:
    """Compile it once; `Driver` copies it."""
    target = folder / NAME
    command = ["clang", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(SOURCE)]
    subprocess.run(command, check=True)
    return target


def fixture(name: str) -> dict[str, Any]:
    """What one machine says, by call."""
    with (FIXTURES / f"{name}.json").open(encoding="utf-8") as file:
        return dict(json.load(file))


class Driver:
    """One installed driver, in `folder`: what it says can be changed while its library is loaded."""

    def __init__(self, built: Path, folder: Path, machine: dict[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        shutil.copy(built, self.path)
        self._lines: dict[tuple[str, str], str] = {}
        self._faults: list[str] = []
        self._events: list[str] = []
        if machine is not None:
            self.use(machine)

    def use(self, machine: dict[str, Any]) -> None:
        """Say what the machine's fixture has."""
        self._lines = {("kernel", ""): machine["driver"], ("-", "nvmlSystemGetDriverVersion"): machine["driver"]}
        self._lines["count", ""] = str(len(machine["gpus"]))
        for index, gpu in enumerate(machine["gpus"]):
            self._tell(str(index), gpu)
            for place, instance in enumerate(gpu.get("mig", ())):
                self._tell(f"{index}.{place}", instance)
        self.write()

    def _tell(self, device: str, told: dict[str, Any]) -> None:
        self._lines[device, "nvmlDeviceGetUUID"] = told["uuid"]
        self._lines[device, "nvmlDeviceGetName"] = told["name"]
        for call, value in told["calls"].items():
            self._lines[device, call] = _text(value)

    def say(self, device: object, call: str, *values: object) -> None:
        """Answer `call` with `values` from now on."""
        self._lines[str(device), call] = _text(values)
        self.write()

    def hush(self, device: object, call: str) -> None:
        """Do not support `call` from now on."""
        del self._lines[str(device), call]
        self.write()

    def count(self, gpus: int) -> None:
        """List so many GPUs from now on."""
        self.say("count", "", gpus)

    def kernel(self, version: str) -> None:
        """Be another version from now on, the library too, if it is loaded again."""
        self._lines["-", "nvmlSystemGetDriverVersion"] = version
        self.say("kernel", "", version)

    def fail(self, device: object, call: str, code: int, after: int = 0) -> None:
        """Fail from now on, or once `after` calls of any kind were made."""
        self._faults.append(f"fail {device} {call} {code} {after}")
        self.write()

    def delay(self, device: object, call: str, milliseconds: int) -> None:
        """Take so long from now on."""
        self._faults.append(f"delay {device} {call} {milliseconds}")
        self.write()

    def heal(self) -> None:
        """Fail and delay no more."""
        self._faults = []
        self.write()

    def xid(self, gpu: int, code: int) -> None:
        """Let an XID error happen."""
        self._events.append(f"event {len(self._events) + 1} {gpu} {code}")
        self.write()

    def write(self) -> None:
        """Make it so, at one instant."""
        lines = [" ".join(part for part in (*where, value) if part) for where, value in self._lines.items()]
        new = Path(f"{self.path}.new")
        text = "\n".join([*lines, *self._faults, *self._events, ""])
        new.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(new, f"{self.path}.script")

    def record(self) -> None:
        """Begin to record calls, forgetting those before."""
        Path(f"{self.path}.calls").write_text("", encoding="utf-8")

    def recorded(self) -> list[str]:
        """Calls since `record`, as `DEVICE CALL`."""
        return Path(f"{self.path}.calls").read_text(encoding="utf-8").splitlines()


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(part) for part in value)
    return str(value)
