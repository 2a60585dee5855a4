"""Compiles the BPF objects into the package when a wheel is built; everything else is in pyproject.toml."""

from __future__ import annotations

import subprocess

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithObjects(build_py):
    """`build_py` that first runs `make bpf`, so that the commands to compile are written down once.

    An editable install leaves the objects to `make bpf`, which knows when they are stale.
    """

    def run(self) -> None:
        """Compile, then copy. Raises CalledProcessError when clang, llvm-strip or libbpf's headers are missing."""
        if not self.editable_mode:
            subprocess.run(["make", "bpf"], check=True)
            self.data_files = self._get_data_files()
        super().run()


setup(cmdclass={"build_py": BuildWithObjects})
