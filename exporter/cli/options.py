"""The options that several commands share, and the configuration they stand for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from exporter.cli import set_up_log, usage_error
from exporter.config import MAX_PID, Config, from_options, load, parse_address
from exporter.reloading import Source, Watch
from probes.errors import ConfigError

if TYPE_CHECKING:
    from exporter.web_config import WebConfig

TARGET_OPTIONS: Final = ("--port", "--pid", "--exe", "--cmdline", "--cgroup", "--container")


@dataclass(frozen=True, slots=True)
class Request:
    """What the shared options asked for. `waits`: a target that is not there yet is waited for.

    `source` is where the configuration came from; None where options named the targets.
    """

    config: Config
    transport: str
    serves: bool
    waits: bool
    source: Source | None = None


def checked_address(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check an address to listen on and return it as it was given."""
    try:
        if value is not None:
            parse_address(value)
    except ConfigError as error:
        raise click.BadParameter(f"{error.what}: {error.next_step}", ctx, param) from error
    return value


def agent_options(*, serves: bool, level: int) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a command that runs the agent: it is called with a `Request` first, then its own options.

    `serves`: /metrics is served without --listen, too. `level`: the log level without -v.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def wrapped(
            config: Path | None,
            port: tuple[int, ...],
            pid: tuple[int, ...],
            exe: tuple[str, ...],
            cmdline: tuple[str, ...],
            cgroup: tuple[str, ...],
            container: tuple[str, ...],
            service: str | None,
            listen: str | None,
            web_config: Path | None,
            transport: str,
            wait: bool,
            verbose: int,
            **own: Any,  # noqa: ANN401 - the command's own options
        ) -> int:
            set_up_log(logging.DEBUG if verbose > 1 else logging.INFO if verbose else level)
            given = any((port, pid, exe, cmdline, cgroup, container, service))
            if config is not None and given:
                raise usage_error("--config and target options cannot be given together", "keep one of the two")
            serving = serves or listen is not None
            if web_config is not None and not serving:
                raise usage_error("--web.config.file protects what is served", "add --listen ADDRESS")
            web = None if web_config is None else _load_web(web_config)
            source = None
            if config is not None:
                source = Source(Watch(config), functools.partial(_load, config, listen, web))
                wanted = source.read()
            elif any((port, pid, exe, cmdline, cgroup, container)):
                wanted = from_options(
                    pid=pid,
                    port=port,
                    exe=exe,
                    cmdline=cmdline,
                    cgroup=cgroup,
                    container=container,
                    service=service,
                    listen=listen,
                )
                wanted = msgspec.structs.replace(wanted, web=web)
            else:
                context = click.get_current_context()
                raise usage_error(
                    "no target is named",
                    f"{context.command_path} --port 8000, or {', '.join(TARGET_OPTIONS[1:])}, or --config FILE",
                )
            asked = Request(wanted, transport, serving, wait or config is not None, source)
            return command(asked, **own)

        return _with_options(wrapped, serves)

    return decorate


def _load_web(path: Path) -> WebConfig:
    from exporter import web_config

    return web_config.load(path)


def _load(path: Path, listen: str | None, web: WebConfig | None) -> Config:
    """The file's configuration of now; how answers are protected stays what it was when the agent began."""
    config = msgspec.structs.replace(load(path), web=web)
    return config if listen is None else msgspec.structs.replace(config, listen=parse_address(listen))


def _with_options(command: Callable[..., int], serves: bool) -> Callable[..., int]:
    listen_help = "Address of /metrics: HOST:PORT, [IPV6]:PORT, or :PORT for every interface."
    options = (
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="YAML file that names services and limits.",
        ),
        click.option(
            "--port",
            multiple=True,
            type=click.IntRange(1, 65535),
            metavar="PORT",
            help="Every process that listens on this TCP port, workers included. Repeatable, as all of these.",
        ),
        click.option(
            "--pid",
            multiple=True,
            type=click.IntRange(1, MAX_PID),
            metavar="PID",
            help="This process and what it started.",
        ),
        click.option("--exe", multiple=True, metavar="NAME", help="Processes of this executable: file name or path."),
        click.option("--cmdline", multiple=True, metavar="TEXT", help="Processes whose arguments contain the text."),
        click.option("--cgroup", multiple=True, metavar="PATH", help="Processes in this cgroup or below it."),
        click.option(
            "--container",
            multiple=True,
            metavar="ID",
            help="Processes in this container: 12 hex digits of its id or more.",
        ),
        click.option("--service", metavar="NAME", help="Name in the service_name label.  [default: from the target]"),
        click.option("--wait", is_flag=True, help="Wait for a target that is not there yet.  [default with --config]"),
        click.option(
            "--listen",
            callback=checked_address,
            metavar="ADDRESS",
            help=f"{listen_help}  [default: {'127.0.0.1:9466' if serves else 'do not serve'}]",
        ),
        click.option(
            "--web.config.file",
            "web_config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TLS, client certificates and users, as for Prometheus's exporters.  [default: plain HTTP, for all]",
        ),
        click.option(
            "--transport",
            type=click.Choice(["auto", "ring", "perf"]),
            default="auto",
            show_default=True,
            help="How records leave the kernel. auto: ring buffers where there are, else per-CPU perf buffers.",
        ),
        click.option("-v", "--verbose", count=True, help="Log more to stderr; -vv still more."),
    )
    for option in reversed(options):
        command = option(command)
    return command
