"""The commands of the role-play service."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from examples.roleplay.errors import Refusal
from examples.roleplay.personas import DIRECTORY


class _Group(click.Group):
    """Turns a Refusal into two lines and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  click's own signature
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            click.echo(f"error: {refusal.what}", err=True)
            click.echo(f"  try: {refusal.next_step}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """A role-play chat service and its users. The words are noise, the work is real.

    \b
    python -m examples.roleplay serve --port 8000
    python -m examples.roleplay users --url http://127.0.0.1:8000 --rate 2 --duration 60
    """


@main.command()
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Serve this model only; repeatable. [default: all]"
)
@click.option(
    "--personas",
    default=DIRECTORY,
    show_default="the built-in ones",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of persona files (YAML), read again when they change.",
)
@click.option("--prefix-cache/--no-prefix-cache", default=True, help="Reuse the KV cache of equal beginnings.")
@click.option("--max-waiting", default=256, type=click.IntRange(1), help="Waiting requests per model; more get 429.")
@click.option("--loop", default="auto", type=click.Choice(["auto", "asyncio", "uvloop"]), help="Event loop of the API.")
@click.option("--access-log", is_flag=True, help="Log each request.")
def serve(
    host: str,
    port: int,
    models: tuple[str, ...],
    personas: Path,
    prefix_cache: bool,
    max_waiting: int,
    loop: str,
    access_log: bool,
) -> None:
    """Serve the API until Ctrl-C or SIGTERM. Prints its URL on stdout when it is ready."""
    # Imported here: `users` needs none of it, and starts in a third of the time.
    from examples.roleplay.server import ServeOptions
    from examples.roleplay.server import serve as run_server
    from examples.roleplay.shapes import SHAPES

    unknown = [name for name in models if name not in SHAPES]
    if unknown:
        raise click.BadParameter(f"no model {unknown[0]!r}; there are {', '.join(SHAPES)}", param_hint="--model")
    shapes = tuple(shape for name, shape in SHAPES.items() if not models or name in models)
    _log_to_stderr()
    run_server(ServeOptions(host, port, shapes, personas, prefix_cache, max_waiting, loop, access_log))


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", help="The service; plain http only.")
@click.option("--seed", default=7, type=int, help="Equal seeds give equal users.")
@click.option("--rate", default=2.0, type=click.FloatRange(0, 1000, min_open=True), help="Mean requests per second.")
@click.option("--duration", default=60.0, type=click.FloatRange(0), help="Seconds until no more come; 0 is no end.")
@click.option(
    "--max-users", default=64, type=click.IntRange(1, 10000), help="At once; more are turned away and counted."
)
@click.option(
    "--patience", default=20.0, type=click.FloatRange(0.1), help="Median seconds until a user gives up waiting."
)
@click.option("--leave", default=0.05, type=click.FloatRange(0, 1), help="Part of the replies that is left half-read.")
@click.option("--max-tokens", default=256, type=click.IntRange(1, 1024), help="Most tokens of a reply.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def users(
    url: str,
    seed: int,
    rate: float,
    duration: float,
    max_users: int,
    patience: float,
    leave: float,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Talk to the service as its users do, then say what they felt.

    Conversations begin as a Poisson process. Personas follow a Zipf law, lengths of what users bring and say a
    log-normal one. A conversation has 1 to 8 turns, each with the whole history. Users think between turns; some
    give up.
    """
    from examples.roleplay.plan import Habits
    from examples.roleplay.users import run_users

    _log_to_stderr()
    habits = Habits(rate=rate, patience_s=patience, leave=leave, max_tokens=max_tokens)
    summary = run_users(url, habits, seed=seed, duration_s=duration or None, max_users=max_users)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    else:
        from examples.roleplay.summary import print_table

        print_table(summary)
    if not summary.requests:
        raise Refusal("no request was made", "a longer --duration or a higher --rate")


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
