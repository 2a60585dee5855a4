"""An agent that protects itself: a real Prometheus with certificate and password scrapes it, others do not get in."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bcrypt
import psutil
import pytest

from tests.certificates import authority, issue
from tests.e2e.agent import FOOTLIGHT, Metrics, footlight
from tests.e2e.client import Ask, talk
from tests.e2e.processes import START_S, Service, Started, answers, free_port, need, service, started, wait_for
from tests.e2e.test_unreadable_checkout import hidden, python

__all__ = ["hidden", "python"]  # fixtures

Query = Callable[[str], dict[str, str]]
"""The value of each job."""

PASSWORD = "opening night"
SLOW = bcrypt.hashpw(b"never tried", bcrypt.gensalt(13)).decode()  # takes a while to look at, which is what is wanted
WEB = """\
tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ours.crt
http_server_config:
  headers: {{X-Frame-Options: sameorigin}}
basic_auth_users:
  prometheus: {hash}
  slow: {slow}
"""


@dataclass(slots=True)
class Protected(Started):
    """An agent with TLS, and where its certificates are."""

    port: int
    folder: Path

    def ask(
        self, path: str, password: str | None = PASSWORD, user: str = "prometheus", certificate: str | None = "client"
    ) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers and text of a page."""
        context = ssl.create_default_context(cafile=self.folder / "ours.crt")
        if certificate is not None:
            context.load_cert_chain(self.folder / f"{certificate}.crt", self.folder / f"{certificate}.key")
        headers = {}
        if password is not None:
            headers["authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

    def metrics(self) -> Metrics:
        """Scrape it."""
        status, _, text = self.ask("/metrics")
        assert status == 200, text
        return Metrics(text)

    def wait_ready(self) -> None:
        """Wait until every probe is attached; fail where it ends before."""

        def ready() -> bool:
            assert self.alive(), self.said()
            try:
                return self.ask("/-/ready")[0] == 200
            except OSError:
                return False

        wait_for("the agent", ready, START_S)


@contextlib.contextmanager
def protected(
    folder: Path,
    watched: Service,
    command: Sequence[str] = FOOTLIGHT,
    env: Mapping[str, str] | None = None,
) -> Iterator[Protected]:
    """Run an agent that only root's files let serve, within the context."""
    ours, theirs = authority(folder, "ours"), authority(folder, "theirs")
    server = issue(ours, folder, "server")
    issue(ours, folder, "client", "clientAuth")
    issue(theirs, folder, "stranger", "clientAuth")
    server.key.chmod(0o400)
    web = folder / "web.yml"
    web.write_text(WEB.format(hash=bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode(), slow=SLOW))
    web.chmod(0o400)
    port = free_port()
    options = ["run", "--port", str(watched.port), "--service", "stage", "--listen", f"127.0.0.1:{port}"]
    options += ["--web.config.file", str(web)]
    with started([*command, *options], folder / "agent.log", env=env) as process:
        agent = Protected(process.process, process.log, port, folder)
        agent.wait_ready()
        yield agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    """An agent with TLS that has counted 23 requests."""
    folder = tmp_path_factory.mktemp("protected")
    with service("threaded", folder) as running, protected(folder, running) as agent:
        talk(running.port, [Ask(script={"frames": 3})] * 23)
        wait_for("the count of 23 requests", lambda: agent.metrics().sum("llm_requests_total") >= 23)
        yield agent
        assert "Traceback" not in agent.said()


def test_prometheus_scrapes_it_and_others_do_not_get_in(agent: Protected, tmp_path: Path) -> None:
    with prometheus(agent, tmp_path) as ask:
        wait_for("the fourth scrape of each job", lambda: len(ask("count_over_time(up[1m]) >= 4")) == 5)
        assert ask("up") == {"right": "1", "password": "0", "certificate": "0", "stranger": "0", "plain": "0"}
        assert ask('sum by (job) (llm_requests_total{service_name="stage"})') == {"right": "23"}


def test_no_path_is_free_of_a_password(agent: Protected) -> None:
    status, headers, _ = agent.ask("/metrics", password=None)
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="footlight"')
    for path in ("/", "/-/healthy", "/-/ready", "/api/why", "/nothing"):
        assert agent.ask(path, password=None)[0] == 401
    assert agent.ask("/-/healthy", user="nobody")[0] == 401
    assert agent.ask("/-/healthy")[1].get_all("x-frame-options") == ["sameorigin"]


def jobs(address: str) -> list[dict[str, Any]]:
    """One that may come in, and others with something wrong."""
    user = {"username": "prometheus", "password": PASSWORD}
    files = {"ca_file": "ours.crt", "cert_file": "client.crt", "key_file": "client.key"}
    stranger = {"ca_file": "ours.crt", "cert_file": "stranger.crt", "key_file": "stranger.key"}
    ways = {
        "right": ("https", user, files),
        "password": ("https", {**user, "password": "dress rehearsal"}, files),
        "certificate": ("https", user, {"ca_file": "ours.crt"}),
        "stranger": ("https", user, stranger),
        "plain": ("http", user, {}),
    }
    return [
        {
            "job_name": name,
            "scheme": scheme,
            "basic_auth": auth,
            "tls_config": tls,
            "static_configs": [{"targets": [address]}],
        }
        for name, (scheme, auth, tls) in ways.items()
    ]


@contextlib.contextmanager
def prometheus(agent: Protected, folder: Path) -> Iterator[Query]:
    """Ask a Prometheus that scrapes the agent in several ways."""
    config = agent.folder / "prometheus.yml"  # next to the certificates
    interval = {"scrape_interval": "500ms", "scrape_timeout": "400ms"}
    config.write_text(json.dumps({"global": interval, "scrape_configs": jobs(f"127.0.0.1:{agent.port}")}))
    port = free_port()
    command = [
        need("prometheus", "prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(text: str) -> dict[str, str]:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        with opener.open(url, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return {each["metric"]["job"]: each["value"][1] for each in answer["data"]["result"]}

    def ready() -> bool:
        with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/-/ready", timeout=10):
            return True
        return False

    with started(command, folder / "prometheus.log"):
        wait_for("Prometheus", ready)
        yield ask


def test_commands_ask_it_with_a_client_file(agent: Protected, tmp_path: Path) -> None:
    (agent.folder / "password").write_text(f"{PASSWORD}\n")
    client = agent.folder / "http.yml"
    client.write_text(
        "basic_auth: {username: prometheus, password_file: password}\n"
        "tls_config: {ca_file: ours.crt, cert_file: client.crt, key_file: client.key}\n"
    )
    url = f"https://127.0.0.1:{agent.port}"
    done = footlight("why", "--url", url, "--all", "--http.config.file", str(client))
    assert done.returncode == 0, done.stderr
    output = tmp_path / "trace.json"
    done = footlight("record", "--url", url, "--http.config.file", str(client), "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["traceEvents"]
    done = footlight("why", "--url", url)
    assert done.returncode == 1
    assert "--http.config.file" in done.stderr


def test_a_guess_does_not_hold_up_scrapes(agent: Protected) -> None:
    answered = threading.Event()
    statuses = []

    def guess() -> None:
        statuses.append(agent.ask("/metrics", user="slow", password="a guess")[0])
        answered.set()

    thread = threading.Thread(target=guess)
    thread.start()
    scrapes = 0
    while not answered.is_set():
        assert agent.ask("/metrics")[0] == 200
        scrapes += 1
    thread.join()
    assert statuses == [401]
    assert scrapes >= 5  # on the loop the hash would have let none through


def test_who_connects_and_says_nothing_holds_nobody_up(agent: Protected) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(101):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", agent.port), 5))
            silent.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" if number % 2 else b"\x16\x03")
        assert agent.ask("/-/ready")[0] == 200


def test_another_reader_protects_itself_as_the_first_one_did(agent: Protected) -> None:
    (reader,) = psutil.Process(agent.pid).children()
    assert reader.uids().real == 65534
    os.kill(reader.pid, signal.SIGSEGV)
    wait_for("another reader", lambda: "starting it again" in agent.said())
    agent.wait_ready()
    assert agent.ask("/metrics", password=None)[0] == 401


def test_in_a_place_that_only_root_can_read(python: list[str], threaded: Service, tmp_path: Path) -> None:
    command = [*python, "-m", "exporter.cli"]
    with protected(tmp_path, threaded, command, {"PYTHONDONTWRITEBYTECODE": "1"}) as agent:
        for user, status in (("prometheus", 200), ("nobody", 401)):
            assert agent.ask("/metrics", user=user)[0] == status
        assert agent.ask("/metrics", password=None)[0] == 401
        assert "Traceback" not in agent.said()
        assert "crashed" not in agent.said()


def test_a_bad_file_is_refused_before_anything_is_attached(threaded: Service, tmp_path: Path) -> None:
    port = free_port()
    web = tmp_path / "web.yml"
    web.write_text("basic_auth_users:\n  prometheus: opening night\n")
    options = ["--port", str(threaded.port), "--listen", f"127.0.0.1:{port}", "--web.config.file", str(web)]
    done = subprocess.run([*FOOTLIGHT, "run", *options], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 4
    error, step = done.stderr.splitlines()  # and no line of the log before them
    assert error == f"error: {web}:2: basic_auth_users.prometheus: this is no bcrypt hash"
    assert "htpasswd" in step
    assert not answers(port)
