"""Writes the page of all metrics, docs/metrics.md, from the families themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from exporter.families import Kind, Spec
from exporter.metrics import Metrics
from exporter.slis import Slis

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_QUESTIONS = {
    "llm_": ("llm_*: what the users feel", "Labels that the config names come after `api`."),
    "kernel_": (
        "kernel_*: why",
        "Counted in the kernel, per service. Histograms are right within a factor of two between their bounds.",
    ),
    "gpu_": (
        "gpu_*: the hardware",
        "What NVIDIA's driver says, and what the CUDA probe counts where it is on. docs/dcgm.md has DCGM's names.",
    ),
    "footlight_": ("footlight_*: the agent itself", "Everything that was lost, and what the agent costs."),
}

_INTRODUCTION = """\
# Metrics

Made by `python -m exporter.metrics_doc` from the families themselves. Do not edit.

What exactly each one means, and how it differs from what other tools call the same, is in the semantics page.
A value that was not measured is absent, never zero. Known values of `reason`, `phase` and `outcome` are there from
the start, at zero. `model_name` has at most as many values per service as `limits: models_per_service` says, and two
more: `_other` for all further names and those that the service refused, `_unknown` for requests that named none.
Where a source does not tell requests apart, `api` and the configured labels are `_all`.
"""


_HEAD = "| metric | type | unit | labels | what it is |\n| --- | --- | --- | --- | --- |\n"


def page() -> str:
    """The whole page, as Markdown."""
    specs = Metrics(Slis()).specs
    parts = [_INTRODUCTION]
    for prefix, (title, text) in _QUESTIONS.items():
        mine = [spec for spec in specs if spec.text_name().startswith(prefix)]
        parts.append(f"\n## {title}\n\n{text}\n\n{_HEAD}")
        parts.extend(_row(spec) for spec in mine)
    parts.append("\n## Bucket bounds, in seconds\n\n| metric | bounds |\n| --- | --- |\n")
    parts.extend(
        f"| `{spec.name}` | {' '.join(f'{bound:.12g}' for bound in spec.bounds)} |\n"
        for spec in specs
        if spec.kind is Kind.HISTOGRAM
    )
    return "".join(parts)


def _row(spec: Spec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    return f"| `{spec.text_name()}` | {spec.kind.value} | {spec.unit} | {labels} | {spec.help} |\n"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the page is not what would be written.")
@click.option("--output", type=click.Path(path_type=Path), default=PAGE, help="The page. Default: docs/metrics.md.")
def main(check: bool, output: Path) -> None:
    """Write the page, or compare it."""
    if not check:
        output.write_text(page(), encoding="utf-8")
    elif not output.is_file() or output.read_text(encoding="utf-8") != page():
        click.echo(f"error: {output} is stale\n  try: make docs", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
