"""Write dashboards/*.json from the code beside it: `python -m dashboards.build`; with --check, say which are stale."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dashboards.agent import agent
from dashboards.gpu import gpu
from dashboards.overview import overview
from dashboards.slos import slos
from dashboards.why import why

FOLDER: Final = Path(__file__).parent


def dashboards() -> Mapping[str, str]:
    """File name -> content, of every dashboard."""
    return {
        "overview.json": overview(),
        "why.json": why(),
        "gpu-and-cache.json": gpu(),
        "slos.json": slos(),
        "agent.json": agent(),
    }


def stale() -> list[str]:
    """Names of files that are not what the code makes, that are missing, or that it does not make at all."""
    made = dashboards()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    return sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))


def main() -> int:
    """Write them, or with --check compare them; returns the exit status."""
    if sys.argv[1:] == ["--check"]:
        names = stale()
        if names:
            sys.stderr.write(f"stale: {', '.join(names)}; run: python -m dashboards.build\n")
        return int(bool(names))
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
