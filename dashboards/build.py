"""Writes dashboards/*.json from the code beside it: `python -m dashboards.build`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

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


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when a file is not what would be written.")
def main(check: bool) -> None:
    """See the module's docstring, which is the command's help."""
    if check:
        names = stale()
        if names:
            raise click.ClickException(f"stale: {', '.join(names)}; run: make docs")
        return
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
