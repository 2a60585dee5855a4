"""Who may fail once: the rule of the top-level conftest.py, tried on small suites of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.switches import Switches

CONFTEST = Path(__file__).parents[2] / "conftest.py"
FAILS_ONCE = """
    times = []

    def test_it():
        times.append(1)
        assert len(times) > 1, "the first time"
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite under the rule, on a kernel that hides threads."""
    monkeypatch.setattr("probes.switches.observe", lambda _: Switches(400, 3, (75,)))
    pytester.makeconftest(CONFTEST.read_text())
    return pytester


def write(suite: pytest.Pytester, folder: str, text: str, name: str = "it") -> None:
    place = suite.path / "tests" / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / f"test_{name}.py").write_text("\n".join(line.removeprefix("    ") for line in text.splitlines()))


def test_a_test_of_the_kernel_is_run_again_and_says_why(suite: pytest.Pytester) -> None:
    write(suite, "kernel", FAILS_ONCE)
    result = suite.runpytest()
    assert result.parseoutcomes() == {"passed": 1, "rerun": 1}
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*AssertionError: the first time*", "*kept 3 of 400 switches*: 1 tests ran again"])


def test_a_unit_test_is_not(suite: pytest.Pytester) -> None:
    write(suite, "unit", FAILS_ONCE)
    suite.runpytest().assert_outcomes(failed=1)


def test_nothing_is_where_the_kernel_tells_all(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.switches.observe", lambda _: Switches(400, 0, ()))
    write(suite, "e2e", FAILS_ONCE)
    suite.runpytest().assert_outcomes(failed=1)


def test_what_always_fails_fails(suite: pytest.Pytester) -> None:
    write(suite, "e2e", "    def test_it():\n        assert False")
    result = suite.runpytest()
    assert result.parseoutcomes() == {"failed": 1, "rerun": 2}
    assert result.ret == 1


def test_too_many_second_runs_fail_the_run(suite: pytest.Pytester) -> None:
    write(suite, "kernel", FAILS_ONCE, "one")
    write(suite, "kernel", FAILS_ONCE, "two")
    result = suite.runpytest()
    assert result.parseoutcomes() == {"passed": 2, "rerun": 2}
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*2 tests ran again, which is too many: this run failed"])
