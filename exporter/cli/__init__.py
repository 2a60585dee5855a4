"""The `footlight` command: finds the subcommand, sets up the log, and turns every error into an exit status."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from exporter import VERSION
from probes.errors import ConfigError, FootlightError

COMMANDS: Final = ("run", "top", "trace", "why", "record", "slo", "health", "check", "demo")
INTERRUPTED: Final = 130


class Commands(click.Group):
    """The subcommands, each imported when it is asked for; and the only place that turns errors into exit codes.

    Exit codes: 0 done, 1 failed, 2 usage, 3 this host cannot, 4 bad config, 130 interrupted.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"exporter.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name in the error."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"footlight {near[0]}" if near else "footlight --help"
            raise _Usage(f"there is no command {args[0]!r}", ctx, hint)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # noqa: ANN401 - click's own signature
    ) -> Any:  # noqa: ANN401 - click's own signature
        """Run and, in standalone mode, exit with the status that the contract gives."""
        plain = {"args": args, "prog_name": prog_name, "complete_var": complete_var, **extra}
        if not standalone_mode:
            return super().main(**plain, standalone_mode=False)
        try:
            code = super().main(**plain, standalone_mode=False)
            sys.stdout.flush()
        except FootlightError as error:
            code = fail(error)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.UsageError as error:
            _say(error.format_message(), _usage_hint(error))
            code = error.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except BrokenPipeError:
            # what is still buffered must not raise again when the interpreter flushes at exit
            with open(os.devnull, "w", encoding="ascii") as null:  # noqa: PTH123 - a descriptor is what is wanted
                os.dup2(null.fileno(), sys.stdout.fileno())
            code = 1  # as click does where it notices first
        sys.exit(code if isinstance(code, int) else 0)


class _Usage(click.UsageError):
    def __init__(self, message: str, ctx: click.Context | None, hint: str) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def usage_error(message: str, hint: str) -> click.UsageError:
    """Return the error for a wrong use of options (exit 2); `hint` is what to type instead."""
    return _Usage(message, None, hint)


def fail(error: FootlightError) -> int:
    """Print an error for a person and return its exit code."""
    place = ""
    if isinstance(error, ConfigError) and error.path is not None:
        place = f"{error.path}:{error.line}: " if error.line is not None else f"{error.path}: "
    _say(f"{place}{error.what}", error.next_step)
    return error.exit_code


def set_up_log(level: int) -> None:
    """Log to stderr, one line an event, with the time in UTC."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = _utc
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def give_terminal_back(code: int) -> int:
    """Leave the live table's screen and show the cursor, where a reader that crashed could not; returns `code`."""
    if code != 0 and sys.stdout.isatty():
        sys.stdout.write("\x1b[?1049l\x1b[?25h")
        sys.stdout.flush()
        _say("the agent gave up; its table hid the log", "the same command with 2>footlight.log, and read that")
    return code


def _utc(seconds: float | None) -> Any:  # noqa: ANN401 - what logging wants is a time.struct_time
    import time

    return time.gmtime(seconds)


def _usage_hint(error: click.UsageError) -> str:
    if isinstance(error, _Usage):
        return error.hint
    return f"{error.ctx.command_path} --help" if error.ctx is not None else "footlight --help"


def _say(what: str, next_step: str) -> None:
    click.echo(f"error: {what}", err=True)
    click.echo(f"  try: {next_step}", err=True)


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"footlight {VERSION}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print it and exit."
)
def main() -> None:
    """See what the users of a streaming language-model service feel, from the kernel.

    \b
    Examples:
      footlight check                         what this host can do
      footlight demo                          a service, users and the live table
      footlight top --port 8000               the service on port 8000, live
      footlight trace --exe uvicorn --json    one JSON object per request
      footlight why --port 8000               where the time of slow requests went
      footlight record --port 8000            20 seconds of everything, for ui.perfetto.dev
      footlight run --config footlight.yaml   serve /metrics for Prometheus
      footlight slo rules --config FILE       its objectives as rules and alerts

    Data goes to stdout, logs to stderr. NO_COLOR is respected. Tab completion for bash (zsh and fish alike):

    \b
      eval "$(_FOOTLIGHT_COMPLETE=bash_source footlight)"

    Exit status: 0 done, 1 failed, 2 wrong usage, 3 this host cannot, 4 bad configuration, 130 interrupted.
    """


if __name__ == "__main__":
    main()
