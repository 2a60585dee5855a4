"""What the reader benchmark concludes, and the links that it makes for BCC."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.reader.__main__ import BCC, RING, C, Row, Run, bars, expected, summed
from benchmarks.reader.headers import borrowed_headers


@pytest.mark.parametrize("offered", [0, 1, 60, 61, 62, 1009])
def test_the_expected_histogram_is_that_of_the_numbers(offered: int) -> None:
    assert expected(offered) == [Counter(number % 61 for number in range(offered))[bucket] for bucket in range(61)]


def row(name: str, per_cpu_second: float, lost: int = 0, offered_per_second: float = 3.2e6) -> Row:
    return Row(name, 1009, 1009 - lost, lost, offered_per_second, 1.0, per_cpu_second, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([row(RING, 80e6), row(BCC, 2e6), row(C, 200e6)], []),
        ([row(RING, 79e6), row(BCC, 2e6), row(C, 197e6)], ["BCC"]),
        ([row(RING, 80e6), row(BCC, 2e6), row(C, 201e6)], ["C program"]),
        ([row(RING, 80e6, lost=1), row(BCC, 2e6), row(C, 200e6)], ["lost"]),
        ([row(RING, 80e6, offered_per_second=2.9e6), row(BCC, 2e6), row(C, 200e6)], ["offered"]),
        ([row(RING, 80e6), row(C, 200e6)], ["BCC"]),
    ],
)
def test_what_is_missed_is_named(rows: list[Row], missed: list[str]) -> None:
    found = [bar.what for bar in bars(rows) if not bar.met]
    assert len(found) == len(missed)
    assert all(word in what for word, what in zip(missed, found, strict=True))


def test_runs_are_summed_and_their_rates_kept_apart() -> None:
    runs = [Run(303, 300, 3, 3.0, 1.0), Run(303, 303, 0, 3.0, 3.0), Run(303, 301, 2, 3.0, 1.0)]
    assert summed("x", runs) == Row("x", 909, 904, 5, 101.0, 904 / 9, 300.0, 101.0, 301.0)


def test_borrowed_headers_are_linked_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / "6.1/build").mkdir(parents=True)
    (tmp_path / "6.1/source").mkdir()
    with borrowed_headers(tmp_path, "6.18") as missing:
        assert missing is None
        assert (tmp_path / "6.18/build").readlink() == tmp_path / "6.1/build"
        assert (tmp_path / "6.18/source").readlink() == tmp_path / "6.1/source"
    assert not (tmp_path / "6.18").exists()


def test_own_headers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "6.18/build").mkdir(parents=True)
    with borrowed_headers(tmp_path, "6.18") as missing:
        assert missing is None
    assert (tmp_path / "6.18/build").exists()
    assert not (tmp_path / "6.18/source").exists()


def test_without_any_headers_the_package_is_named(tmp_path: Path) -> None:
    with borrowed_headers(tmp_path, "6.18") as missing:
        assert missing is not None
        assert "apt-get install linux-headers" in missing
    assert list(tmp_path.iterdir()) == []
