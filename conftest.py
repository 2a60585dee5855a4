"""What all tests share: in CI (CI=true) a skipped test is a failed one; and who may fail once, on what kernel.

There are kernels, of sandboxes, that call no tracepoint while one of certain threads runs (`probes.switches`,
`footlight check`): an event that an interrupt brings at that moment reaches no probe. Only where that was just seen
to be so, a test of tests/kernel or tests/e2e that fails is run again. What it failed of is printed all the same, and
where more than a few needed it the run fails.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Final

import pytest

from probes import switches
from probes.errors import FootlightError

pytest_plugins = ["pytester"]
IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
LOOK_S: Final = 4.0
RERUNS: Final = 2
MOST: Final = 0.01
"""Of the tests that look at the kernel, the share that may be run again: else it is not the kernel that is wrong."""
_HIDDEN: Final = pytest.StashKey[switches.Switches]()
_LOOKING: Final = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    looking = [item for item in items if {"kernel", "e2e"} & set(item.path.relative_to(config.rootpath).parts)]
    if not looking:
        return
    try:
        seen = switches.observe(LOOK_S)
    except FootlightError:
        return  # the tests themselves say what this host lacks
    if seen.left_out:
        config.stash[_HIDDEN] = seen
        config.stash[_LOOKING] = len(looking)
        for item in looking:
            item.add_marker(pytest.mark.flaky(reruns=RERUNS))


def _run_again(reporter: pytest.TerminalReporter) -> dict[str, list[pytest.TestReport]]:
    found: dict[str, list[pytest.TestReport]] = {}
    for report in reporter.stats.get("rerun", ()):
        found.setdefault(report.nodeid, []).append(report)
    return found


def _too_many(config: pytest.Config, again: int) -> bool:
    return again > max(1, config.stash.get(_LOOKING, 0) * MOST)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and exitstatus == 0 and _too_many(session.config, len(_run_again(reporter))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    again = _run_again(terminalreporter)
    if not again or _HIDDEN not in config.stash:
        return
    seen = config.stash[_HIDDEN]
    terminalreporter.section("run again")
    for nodeid, reports in again.items():
        for report in reports:
            terminalreporter.write_sep("_", nodeid)
            terminalreporter.write_line(report.longreprtext)
    kept = f"this kernel kept {seen.left_out} of {seen.counted} switches from its tracepoints"
    line = f"{kept}: {len(again)} tests ran again"
    if _too_many(config, len(again)):
        terminalreporter.write_line(f"{line}, which is too many: this run failed", red=True, bold=True)
    else:
        terminalreporter.write_line(line, yellow=True)


def _no_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}\nCI=true: a skip counts as a failure"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _no_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skip(report)
    return report
