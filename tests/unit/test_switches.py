"""What is made of the kernel's counts of switches."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.errors import ProbeError
from probes.switches import counted_by_kernel, silent_among


def test_who_comes_and_never_goes_is_silent() -> None:
    assert silent_among([(7, 3, 0), (5, 2, 0), (9, 3, 3), (11, 30, 28), (13, 0, 2)]) == (5, 7)


def test_who_came_once_may_be_running() -> None:
    assert silent_among([(7, 1, 0)]) == ()


def test_kernels_own_count(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 2 3\nintr 99 1 2\nctxt 123456789012\nbtime 17\n")
    assert counted_by_kernel(stat) == 123456789012


def test_count_that_is_not_there(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 2 3\n")
    with pytest.raises(ProbeError, match="no line `ctxt`"):
        counted_by_kernel(stat)
