"""Builds the stand-in for libcuda.so.1, and talks to the program that calls it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from probes.cuda import FUNCTIONS
from probes.elf import find_functions

HERE = Path(__file__).parent


def build(folder: Path, *flags: str) -> tuple[Path, Path]:
    """Compile both into `folder`; return the library, as programs ask for it, and the program.

    `flags` are for the library: they say with which instruction its functions begin, which a breakpoint costs by.
    """
    library, program = folder / "libcuda.so.1", folder / "caller"
    real = folder / "libcuda.so.550.54.15"  # a driver's library has its version in its name, and a link to it
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    _clang([*shared, *flags, "-o", str(real), str(HERE / "libcuda.c")])
    library.symlink_to(real.name)
    _clang(["-pthread", "-o", str(program), str(HERE / "caller.c"), "-ldl"])
    return library, program


class Caller:
    """A process that calls the library as it is told."""

    def __init__(self, command: list[str], *, preload: Path | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ) | ({"LD_PRELOAD": str(preload)} if preload else {}),
        )
        self.pid = int(self.said())

    def tell(self, order: str, count: int = 1, argument: int = 0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {count} {argument}\n" if count else f"{order}\n")
        self._process.stdin.flush()

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def do(self, order: str, count: int = 1, argument: int = 0) -> str:
        """Have something done; return what it said of that."""
        self.tell(order, count, argument)
        return self.said()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end, and wait for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self.kill()
            self._process.stdout.close()


def breakpoints(pid: int, library: Path) -> int:
    """How many of the library's functions begin with a breakpoint in the memory of a process."""
    real = library.resolve()
    with real.open("rb") as file:
        offsets = find_functions(file.fileno(), FUNCTIONS).offsets
        originals = {offset: os.pread(file.fileno(), 4, offset) for offset in offsets.values()}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "x" in line.split()[1] and line.endswith(str(real)):
            start, file_offset = int(line.partition("-")[0], 16), int(line.split()[2], 16)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return sum(
            os.pread(memory.fileno(), 4, start + offset - file_offset) != original
            for offset, original in originals.items()
        )


def _clang(arguments: list[str]) -> None:
    done = subprocess.run(["clang", "-O2", "-Wall", "-Werror", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
