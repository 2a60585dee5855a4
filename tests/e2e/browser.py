"""Opens a page in a real browser."""

from __future__ import annotations

import subprocess
import tempfile
from typing import Final

from tests.e2e.processes import need

PATIENCE_S: Final = 60.0


def opened(url: str, *more: str, seconds: int | None = 5) -> tuple[str, str]:
    """The page as it stands so long after it was opened, and what the browser's console said.

    The seconds are the page's, which pass in no time but stand still while an answer is awaited; None are none of them:
    the page as it stands when all its parts are loaded.
    """
    until = () if seconds is None else (f"--virtual-time-budget={1000 * seconds}",)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                need("chromium", "chromium"),
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
                *("--enable-logging=stderr", "--dump-dom", f"--user-data-dir={profile}", *until, *more, url),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, said
