"""`footlight check`: what this host can do, and whether a configuration is right."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

import click

from exporter.cli import fail
from exporter.config import Config, load
from probes import host, privileges
from probes.errors import ConfigError, FootlightError, HostError
from probes.host import Check

_READER: Final = "reader's privileges"


@click.command(short_help="What this host can do; whether a configuration is right.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Check this configuration, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per finding, one a line.")
def check(config: Path | None, as_json: bool) -> int:
    """Say what this host can do, what each process of the agent may do, and what to mend.

    Changes nothing. Counts the host's context switches for two seconds, and asks the engines that a configuration names
    for their metrics, once. Exits with 0 when the agent can run here, 3 when not, 4 when the configuration is wrong.

    \b
    Examples:
      footlight check
      footlight check --config footlight.yaml --json
    """
    from exporter.cli import findings

    report = host.examine()
    checks = [*report.checks, reader_check()]
    if report.able:
        checks.append(findings.switches_check())
    error: ConfigError | None = None
    wanted: Config | None = None
    if config is not None:
        try:
            wanted = load(config)
            checks.append(Check("configuration", True, True, f"{config}: {_described(wanted)}"))
        except ConfigError as wrong:
            error = wrong
            place = wrong.path if wrong.line is None else f"{wrong.path}:{wrong.line}"
            checks.append(Check("configuration", False, True, f"{place}: {wrong.what}", wrong.next_step))
    if error is None:
        checks += findings.examine(wanted)
    for finding in checks:
        click.echo(_as_json(finding) if as_json else _as_text(finding))
    if error is not None:
        return fail(error)
    missing = [finding for finding in checks if finding.required and not finding.ok]
    if not as_json:
        click.echo()
        click.echo("This host can run Footlight." if not missing else "This host cannot run Footlight yet: see above.")
    if not missing:
        return 0
    names = ", ".join(finding.name for finding in missing)
    return fail(HostError(f"this host cannot run the probes: {names}", missing[0].next_step))


def reader_check() -> Check:
    """Give up privileges in a child process, as the reader does, and say what is left."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            left = privileges.drop_to_nobody([writing])
            os.write(writing, f"+{left}".encode())
        except FootlightError as error:
            os.write(writing, f"-{error.what}".encode()[:4096])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    os.waitpid(child, 0)
    if said.startswith("+"):
        return Check(_READER, True, True, said[1:])
    return Check(
        _READER, False, True, said[1:] or "the child process ended early", "run it as root: sudo footlight ..."
    )


def _described(config: Config) -> str:
    services = ", ".join(f"{service.name} ({service.match})" for service in config.services)
    return f"{services}; listen {config.listen}"


def _as_json(finding: Check) -> str:
    return json.dumps(
        {
            "check": finding.name,
            "ok": finding.ok,
            "required": finding.required,
            "detail": finding.detail,
            "next_step": finding.next_step or None,
        }
    )


def _as_text(finding: Check) -> str:
    mark, colour = ("ok  ", "green") if finding.ok else ("FAIL", "red") if finding.required else ("note", "yellow")
    # click drops the colour on a pipe, but does not know NO_COLOR
    shown = mark if os.environ.get("NO_COLOR") else click.style(mark, fg=colour)
    line = f" {shown} {finding.name:<20} {finding.detail}"
    return line if finding.ok or not finding.next_step else f"{line}\n{'':<26} try: {finding.next_step}"
