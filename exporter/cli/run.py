"""`footlight run`: the exporter."""

from __future__ import annotations

import logging

import click

from exporter.cli.options import Request, agent_options


@click.command(short_help="Measure and serve /metrics.")
@agent_options(serves=True, level=logging.INFO)
def run(asked: Request) -> int:
    """Attach, measure, and serve /metrics until Ctrl-C or SIGTERM.

    Needs root. The process that decodes traffic gives its privileges up before it reads the first byte. Also served: a
    live page at /, /-/healthy, and /-/ready, which is 200 once every wanted probe is attached.

    The file of --config is read again when it changes, on SIGHUP to the process with privileges, and on a POST to
    /-/reload, which answers why it was refused.

    \b
    Examples:
      footlight run --port 8000
      footlight run --config /etc/footlight.yaml --listen :9466
      footlight run --port 8000 --listen :9466 --web.config.file web.yaml
    """
    from exporter import attacher
    from exporter.fronts import ServeFront

    return attacher.run(
        asked.config,
        ServeFront(),
        transport=asked.transport,
        wait_for_targets=asked.waits,
        source=asked.source,
    )
