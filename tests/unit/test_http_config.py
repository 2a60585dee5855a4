"""How commands ask an agent that protects itself: the client file, and what is sent to whom."""

from __future__ import annotations

import base64
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from exporter.cli import main
from exporter.cli.asking import Url
from exporter.cli.http_config import Access, load
from exporter.cli.options import Request, agent_options
from exporter.reloading import merged
from probes.errors import ConfigError, FootlightError
from tests.certificates import authority, issue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    ours = authority(folder, "ours")
    issue(ours, folder, "server")
    issue(ours, folder, "client", "clientAuth")
    authority(folder, "theirs")
    (folder / "password").write_text("opening night\n")
    return folder


def access(folder: Path, text: str) -> Access:
    path = folder / "http.yml"
    path.write_text(text)
    return load(path)


class Agent(http.server.BaseHTTPRequestHandler):
    """Answers with what it was sent; redirects /away."""

    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("location", "/there")
            self.end_headers()
            return
        authorization = self.headers.get("authorization", "none")
        if self.path == "/secret" and authorization == "none":
            self.send_error(401)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(authorization.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def agent(folder: Path) -> Iterator[str]:
    """The URL of a server that wants a client's certificate."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        context.load_verify_locations(folder / "ours.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # a refused certificate ends the handshake, not a later read
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


FULL = """\
basic_auth: {username: søren, password_file: password}
tls_config: {ca_file: ours.crt, cert_file: client.crt, key_file: client.key}
"""


def test_everything(folder: Path, agent: str) -> None:
    given = access(folder, FULL)
    with Url(agent, given).open("/api/why") as response:
        assert response.read() == b"Basic " + base64.b64encode("søren:opening night".encode())
    assert "Basic" not in repr(given)


def test_a_password_is_not_sent_where_the_agent_points_to(folder: Path, agent: str) -> None:
    with Url(agent, access(folder, FULL)).open("/away") as response:
        assert response.read() == b"none"


@pytest.mark.parametrize(
    "text",
    [
        "tls_config: {ca_file: theirs.crt, cert_file: client.crt, key_file: client.key}\n",
        "tls_config: {ca_file: ours.crt}\n",
        "tls_config: {cert_file: client.crt, key_file: client.key}\n",
    ],
)
def test_without_the_right_certificates_the_next_step_is_named(folder: Path, agent: str, text: str) -> None:
    with pytest.raises(FootlightError, match="no agent answers") as caught:
        Url(agent, access(folder, text)).open("/api/why")
    assert caught.value.next_step.startswith("--http.config.file")


def test_who_speaks_no_tls_where_it_is_wanted_is_told(agent: str) -> None:
    with pytest.raises(FootlightError, match="no agent answers") as caught:
        Url(agent.replace("https://", "http://")).open("/api/why")
    assert caught.value.next_step.startswith(f"--url {agent}, if")


def test_without_a_password_the_next_step_is_named(folder: Path, agent: str) -> None:
    given = access(folder, "tls_config: {ca_file: ours.crt, cert_file: client.crt, key_file: client.key}\n")
    with pytest.raises(FootlightError, match="answered 401") as caught:
        Url(agent, given).open("/secret")
    assert caught.value.next_step.startswith("--http.config.file")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "is empty"),
        ("{}\n", 1, "nothing is configured"),
        ("basic_auth:\n  password: x\n", 2, "the key 'username' is missing"),
        ("basic_auth:\n  username: a\n", 2, "give one of"),
        ("basic_auth:\n  username: a\n  password: b\n  password_file: password\n", 2, "give one of"),
        ("basic_auth:\n  username: a\n  password_file: gone\n", 3, "cannot read .*gone: No such file"),
        ("basic_auth:\n  username: a:b\n  password: x\n", 2, "colon"),
        ("tls_config:\n  insecure_skip_verify: true\n", 2, "unknown key"),
        ("tls_config:\n  ca_file: client.key\n", 2, "holds no certificate"),
        ("tls_config:\n  cert_file: client.crt\n", 2, "belong together"),
        ("tls_config:\n  cert_file: client.crt\n  key_file: server.key\n", 2, "are no certificate and its key"),
    ],
)
def test_bad_files_are_refused_with_their_place(folder: Path, text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        access(folder, text)
    assert (caught.value.path, caught.value.line) == (str(folder / "http.yml"), line)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["why", "--port", "8000", "--http.config.file", "x"], "--http.config.file is for asking"),
        (["why", "--url", "http://a", "--web.config.file", "x"], "--url and --web.config.file cannot be given"),
        (["top", "--port", "8000", "--web.config.file", "x"], "--web.config.file protects what is served"),
    ],
)
def test_wrong_use(arguments: list[str], what: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done, click.testing.Result)
    assert (done.exit_code, what in done.output) == (2, True), done.output


def test_a_bad_web_configuration_ends_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "web.yml"
    path.write_text("tls_server_config:\n  cert_file: gone.crt\n  key_file: gone.key\n")
    done = CliRunner().invoke(main, ["run", "--port", "8000", "--web.config.file", str(path)])
    assert done.exit_code == 4
    assert f"error: {path}:2: tls_server_config.cert_file: cannot read {tmp_path}/gone.crt" in done.output


def test_a_reload_keeps_how_answers_are_protected(tmp_path: Path) -> None:
    config, web = tmp_path / "footlight.yaml", tmp_path / "web.yml"
    config.write_text("services: [{name: a, match: {port: 8000}}]\n")
    web.write_text("http_server_config: {headers: {X-Frame-Options: deny}}\n")
    seen: list[Request] = []

    @click.command()
    @agent_options(serves=True, level=0)
    def run(asked: Request) -> int:
        seen.append(asked)
        return 0

    done = CliRunner().invoke(run, ["--config", str(config), "--web.config.file", str(web)])
    assert done.exit_code == 0, done.output
    (asked,) = seen
    assert asked.config.web is not None and asked.config.web.headers == (("x-frame-options", "deny"),)
    web.unlink()
    assert asked.source is not None
    assert merged(asked.config, asked.source.read(), 7) == asked.config
