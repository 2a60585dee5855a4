"""`--url` and `--read`: a command shows what a running agent or a file has, or measures by itself.

An agent with a --web.config.file is asked with the certificates and the password in --http.config.file.
"""

from __future__ import annotations

import functools
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from exporter.cli import usage_error
from exporter.cli.http_config import Access, load
from exporter.cli.options import agent_options
from exporter.config import DEFAULT_PORT
from exporter.document import http_url
from probes.errors import FootlightError

TIMEOUT_S: Final = 30.0
"""Without a byte from the agent for so long, it is not there."""


@dataclass(frozen=True, slots=True)
class Url:
    """A running agent's address, such as `http://127.0.0.1:9466`, and what it wants to see from who asks."""

    base: str
    access: Access = field(default_factory=Access)

    def open(self, path: str, **query: str) -> AbstractContextManager[http.client.HTTPResponse]:
        """GET a page. Raises FootlightError where there is no agent, or where it does not have that page."""
        target = f"{self.base.rstrip('/')}{path}{'?' if query else ''}{urllib.parse.urlencode(query)}"
        # an agent is on this host or in this network: what proxies the environment names are not asked
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.access.tls)
        )
        request = urllib.request.Request(target)
        if self.access.authorization is not None:
            request.add_unredirected_header("authorization", self.access.authorization)
        try:
            response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace").strip()
            step = "an agent of this version: footlight run"
            if error.code == 401:
                step = "--http.config.file FILE, with basic_auth: {username: NAME, password_file: FILE}"
            raise FootlightError(f"{target} answered {error.code}: {said}", step) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            step = "footlight run --port PORT, or its --listen address"
            if isinstance(reason, ssl.SSLError):
                step = "--http.config.file FILE, with tls_config: {ca_file: FILE}, cert_file and key_file"
            elif isinstance(reason, ConnectionResetError) and self.base.startswith("http://"):
                step = f"--url https://{self.base.removeprefix('http://')}, if it serves with TLS"
            why = reason if isinstance(reason, ssl.SSLError) else getattr(reason, "strerror", None) or reason
            raise FootlightError(f"no agent answers at {self.base}: {why}", step) from error
        return response

    def read(self, path: str, most_bytes: int) -> bytes:
        """GET a page, up to so many bytes of it. Raises as `open` does, and where it breaks off."""
        with self.open(path) as response:
            return self._went_on(lambda: response.read(most_bytes))

    def lines(self, path: str) -> Iterator[bytes]:
        """GET a page line by line. Raises as `read` does."""
        with self.open(path) as response:
            while line := self._went_on(response.readline):
                yield line

    def _went_on(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise FootlightError(f"the answer of {self.base} broke off: {reason}", "the log of the agent") from error


def agent_or_url(*, level: int, reads: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a command as `agent_options` does; with `--url` it is called with a `Url` in place of a `Request`.

    With `reads` it has `--read FILE`, too, and is then called with a `Path`; `-` stands for stdin.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        live = agent_options(serves=False, level=level)(command)
        shared: list[click.Parameter] = getattr(live, "__click_params__")  # noqa: B009 - click's own, untyped
        names = {str(parameter.name): parameter.opts[0] for parameter in shared}

        @functools.wraps(live)
        def wrapped(
            url: str | None,
            http_config: Path | None,
            read: Path | None = None,
            **options: Any,  # noqa: ANN401 - its own options
        ) -> int:
            if http_config is not None and url is None:
                raise usage_error("--http.config.file is for asking", "add --url https://ADDRESS")
            if url is None and read is None:
                return live(**options)
            used = "url" if read is None else "read"
            if url is not None and read is not None:
                raise usage_error("--url and --read cannot be given together", "keep one of the two")
            context = click.get_current_context()
            for name, option in names.items():
                if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                    raise usage_error(
                        f"--{used} and {option} cannot be given together",
                        f"--{used} alone: what is there has its targets",
                    )
            own = {name: value for name, value in options.items() if name not in names}
            if url is None:
                return command(read, **own)
            return command(_agent(url, http_config), **own)

        made: Callable[..., int] = wrapped
        if reads:
            made = click.option(
                "--read",
                type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
                metavar="FILE",
                help="Show what --json printed before; - is stdin. Needs no root.",
            )(made)
        return click.option(
            "--url",
            metavar="URL",
            help="Ask the agent that runs there (`footlight run`), such as http://127.0.0.1:9466. Needs no root.",
        )(_http_config_option("With --url: ")(made))

    return decorate


def running_agent(command: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command that only a running agent can answer: it is called with its `Url` and its own options."""

    @functools.wraps(command)
    def wrapped(url: str, http_config: Path | None, **own: Any) -> int:  # noqa: ANN401 - its own options
        return command(_agent(url, http_config), **own)

    return click.option(
        "--url",
        default=f"http://127.0.0.1:{DEFAULT_PORT}",
        show_default=True,
        metavar="URL",
        help="The agent (`footlight run`). Needs no root.",
    )(_http_config_option("")(wrapped))


def _http_config_option(when: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return click.option(
        "--http.config.file",
        "http_config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=f"{when}basic_auth and tls_config of an agent with --web.config.file, in promtool's form.",
    )


def _agent(url: str, http_config: Path | None) -> Url:
    return Url(_checked(url), Access() if http_config is None else load(http_config))


def _checked(url: str) -> str:
    given = url if "://" in url else f"http://{url}"
    parts = http_url(given)
    if parts is None or parts.query or parts.fragment:
        raise usage_error(f"{url!r} is no address of an agent", "--url http://127.0.0.1:9466")
    return given
