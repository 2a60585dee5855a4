"""Compiles a test's own BPF programs, with the flags of the shipped ones."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path


def compile_bpf(source: Path, folder: Path) -> Path:
    """Compile `source` into `folder`; return the object. Fails the test with clang's words."""
    target = folder / source.name.replace(".bpf.c", ".bpf.o")
    multiarch = sysconfig.get_config_var("MULTIARCH")
    machine = {"x86_64": "x86", "aarch64": "arm64"}[os.uname().machine]
    flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{machine}", "-Wall", "-Wextra", "-Werror"]
    command = ["clang", *flags, f"-I/usr/include/{multiarch}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run(["llvm-strip", "-g", str(target)], check=True)
    return target
