"""Builds a library with places to attach to, and a program that visits them."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path) -> tuple[Path, Path]:
    """Compile both into `folder`; return the library and the program."""
    library, program = folder / "libplaces.so.1.2", folder / "visitor"
    shared = ["-shared", "-fPIC", "-Wl,-soname,libplaces.so.1"]
    for arguments in (
        [*shared, "-o", str(library), str(HERE / "places.c")],
        ["-o", str(program), str(HERE / "visitor.c"), "-ldl"],
    ):
        command = ["clang", "-O2", "-Wall", "-Werror", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return library, program
