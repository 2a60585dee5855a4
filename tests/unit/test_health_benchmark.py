"""The benchmark of health: what it takes for a leak that was found, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.health.__main__ import LEAST_LEAKED, Found, bars, snapshot
from benchmarks.health.service import LEAKED_KIND, LEAKED_NAME

NULL = {"kind": LEAKED_KIND, "name": LEAKED_NAME, "count": 727}
SOCKETS = {"kind": "tcp", "name": "listens on 127.0.0.1:8000", "count": 729}


def missed(event: dict[str, Any]) -> list[str]:
    """The bars that a leak misses which was found in time by this event."""
    largest, leaked = snapshot(event)
    found = Found("descriptors", "open_files", 11.3, 12.0, (), largest, leaked)
    return [bar.what for bar in bars(None, [found]) if not bar.met]


def test_a_leak_is_found_with_a_snapshot_of_what_leaks() -> None:
    assert snapshot({"leak": {"targets": [NULL, SOCKETS]}}) == ("727 /dev/null", 727)
    assert missed({"leak": {"targets": [NULL, SOCKETS]}}) == []


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"leak": {"targets": []}},
        {"leak": {"targets": [SOCKETS, NULL]}},
        {"leak": {"targets": [NULL | {"kind": "file"}]}},
        {"leak": {"targets": [NULL | {"count": LEAST_LEAKED - 1}]}},
    ],
    ids=["no snapshot", "an empty one", "most are others", "of another kind", "too few"],
)
def test_without_it_the_bar_is_missed(event: dict[str, Any]) -> None:
    assert missed(event) == ["descriptors: leaked ones in the snapshot"]


def test_other_faults_have_no_snapshot() -> None:
    found = Found("cpu", "cpu", 6.1, 15.0, ())
    assert [bar.what for bar in bars(None, [found])] == ["cpu: found after"]
