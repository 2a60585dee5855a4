"""The kernel_ and gpu_ families that an objective may be about, as a list that can be read without making them.

The privileged process checks the configuration, and the families' own modules bring numpy along. The list,
exporter/slo/metrics.json, is made from them by `python -m exporter.slo.catalogue`; a test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

LIST: Final = Path(__file__).with_name("metrics.json")
PREFIXES: Final = ("kernel_", "gpu_")


class KnownMetric(msgspec.Struct, frozen=True):
    """A family: its kind in OpenMetrics, its labels and unit, and the bucket bounds of a histogram."""

    kind: str
    labels: tuple[str, ...]
    unit: str = ""
    bounds: tuple[float, ...] = ()


@functools.cache
def known() -> Mapping[str, KnownMetric]:
    """Every one, by its name in the text format. Reads the file at the first call."""
    return msgspec.json.decode(LIST.read_bytes(), type=dict[str, KnownMetric])


def made() -> bytes:
    """What the file has to hold: made from the families."""
    from exporter.metrics import Metrics  # noqa: PLC0415 - not where the file is only read
    from exporter.slis import Slis  # noqa: PLC0415 - as above

    found = {
        spec.text_name(): KnownMetric(spec.kind.value, spec.labels, spec.unit, spec.bounds)
        for spec in Metrics(Slis()).specs
        if spec.name.startswith(PREFIXES)
    }
    return msgspec.json.format(msgspec.json.encode(found, order="sorted"), indent=1) + b"\n"


if __name__ == "__main__":
    LIST.write_bytes(made())
