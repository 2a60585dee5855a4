"""What every end-to-end test needs: the tools, the compiled probe, and root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import ROOT, Service, service


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    assert os.geteuid() == 0, "the agent needs root; try: sudo make test"
    assert (ROOT / "probes/objects/requests.bpf.o").is_file(), "the probe is not built; try: make bpf"


@pytest.fixture(params=["ring", "perf"], scope="module")
def transport(request: pytest.FixtureRequest) -> str:
    """Both ways that records take out of the kernel."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def threaded(tmp_path: Path) -> Iterator[Service]:
    """A service with a thread for each connection, of the test's own."""
    with service("threaded", tmp_path) as running:
        yield running


@pytest.fixture
def uvicorn(tmp_path: Path) -> Iterator[Service]:
    """A service on uvicorn, of the test's own."""
    with service("uvicorn-uvloop", tmp_path) as running:
        yield running
