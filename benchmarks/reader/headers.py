"""Gives BCC kernel headers on a kernel that has none of its own."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def borrowed_headers(modules: Path = Path("/lib/modules"), release: str | None = None) -> Iterator[str | None]:
    """Let BCC find another kernel's headers as the running one's, and take the links away afterwards.

    BCC compiles on the host and looks in /lib/modules/RELEASE/{build,source}. The producer reads no kernel structure,
    so any version's headers do. Yields a sentence when none can be found, else None. Raises PermissionError without
    root.
    """
    own = modules / (release or platform.release())
    if (own / "build").exists():
        yield None
        return
    others = sorted(path.parent for path in modules.glob("*/build") if path.exists())
    if not others:
        yield f"no kernel headers in {modules}: apt-get install linux-headers-amd64 (or -arm64)"
        return
    made_folder = not own.exists()
    own.mkdir(exist_ok=True)
    links = [own / name for name in ("build", "source") if (others[-1] / name).exists()]
    try:
        for link in links:
            link.symlink_to(others[-1] / link.name)
        yield None
    finally:
        for link in links:
            link.unlink(missing_ok=True)
        if made_folder:
            own.rmdir()
