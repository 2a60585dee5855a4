"""Asking engines for their metrics: endpoints that hang, drip, lie and flood cost a timeout and a counter each."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes import engine_metrics
from probes.engine_metrics import ENDPOINTS_LIMIT, WORKERS, Endpoint, EndpointReport, EngineReport, EngineSource
from probes.engine_page import EngineModel, Failure

S = 1_000_000_000
TIMEOUT_S = 0.3
PATIENCE_S = 5.0
"""Of those that need none: the machine may be busy."""
LIMIT = 300_000
PAGE = (Path(__file__).parents[1] / "fixtures" / "engines" / "tgi.txt").read_bytes()
MODELS = (EngineModel("tgi", None, running=5, waiting=3, requests=302, prompt_tokens=71_993, generation_tokens=27_011),)
TEXT = b"content-type: text/plain; version=0.0.4\r\n"

Answer = Callable[[socket.socket, bytes], None]


def page(body: bytes = PAGE, *, status: bytes = b"200 OK", head: bytes = TEXT, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s" % (status, head, size, body)


class Server:
    """Answers each connection in a thread of its own, after it has read the request's head."""

    def __init__(self, answer: bytes | Answer, *, reads: bool = True) -> None:
        self.requests: list[bytes] = []
        self.ending = threading.Event()
        self._answer = answer
        self._reads = reads
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        port = self._listener.getsockname()[1]
        assert isinstance(port, int)
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self.ending.is_set():
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while self._reads and b"\r\n\r\n" not in head:
                piece = connection.recv(65_536)
                if not piece:
                    return
                head += piece
            self.requests.append(head)
            if isinstance(self._answer, bytes):
                connection.sendall(self._answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
            else:
                self._answer(connection, head)

    def close(self) -> None:
        self.ending.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
        self._listener.close()
        for thread in self._threads:
            thread.join()


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(answer: bytes | Answer = b"", *, reads: bool = True) -> Server:
            server = Server(answer or page(), reads=reads)
            stack.callback(server.close)
            return server

        yield start


class Clock:
    """The real one, that can be put forward."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.ahead_ns

    def forward(self, seconds: float) -> None:
        self.ahead_ns += round(seconds * S)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def source(
    *urls: str | Endpoint, clock: Callable[[], int] = time.monotonic_ns, timeout_s: float = PATIENCE_S
) -> EngineSource:
    several = [Endpoint(url) if isinstance(url, str) else url for url in urls]
    return EngineSource(lambda: {"roleplay": several}, clock, timeout_s, LIMIT)


def only(report: EngineReport) -> EndpointReport:
    (endpoint,) = report.endpoints
    return endpoint


def counted(report: EngineReport, service: str = "roleplay") -> dict[Failure, int]:
    return {failure: count for (of, failure), count in report.failures.items() if of == service and count}


def test_engine_is_asked_plainly_and_told(serve: Serve) -> None:
    server = serve()
    report = source(server.url).look()
    told = only(report)
    assert (told.service, told.url, told.known, told.up, told.failure) == ("roleplay", server.url, True, True, None)
    assert told.models == MODELS
    assert 0 < told.seconds < PATIENCE_S
    assert counted(report) == {}
    assert set(report.failures) == {("roleplay", failure) for failure in Failure}
    (request,) = server.requests
    assert request.startswith(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.port)
    assert b"Accept-Encoding: identity\r\n" in request


def test_query_is_sent_and_proxies_are_not_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = serve()
    assert only(source(server.url + "?model=a%20b").look()).up
    assert server.requests[0].startswith(b"GET /metrics?model=a%20b HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n" + TEXT + b"\r\n" + PAGE,
        b"HTTP/1.0 200 OK\r\n" + TEXT + b"\r\n" + PAGE,
        b"HTTP/1.1 200 OK\r\n%stransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (TEXT, len(PAGE), PAGE),
        b"HTTP/1.1 100 Continue\r\n\r\n" + page(),
        page(head=b"Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
        page(head=b"Content-Type: TEXT/PLAIN\r\nContent-Encoding: identity\r\n"),
    ],
    ids=["to the end", "http 1.0", "chunked", "continue", "openmetrics", "plain"],
)
def test_every_framing_is_read(serve: Serve, answer: bytes) -> None:
    assert only(source(serve(answer).url).look()).models == MODELS


# ---- answers that are none: each costs one counter, at once ----

HOSTILE: Mapping[str, tuple[bytes, Failure]] = {
    "json": (page(b'{"metrics": []}'), Failure.NOT_METRICS),
    "json by its type": (page(head=b"content-type: application/json\r\n"), Failure.NOT_METRICS),
    "html": (page(b"<!doctype html>\n<p>tgi_queue_size 3\n"), Failure.NOT_METRICS),
    "no type": (page(head=b""), Failure.NOT_METRICS),
    "gzip": (page(gzip.compress(PAGE), head=TEXT + b"content-encoding: gzip\r\n"), Failure.NOT_METRICS),
    "plain that says it is compressed": (page(head=TEXT + b"content-encoding: br\r\n"), Failure.NOT_METRICS),
    "gzip that does not say so": (page(gzip.compress(PAGE)), Failure.NOT_METRICS),
    "gzip bomb": (
        page(gzip.compress(b"#" * 50_000_000), head=TEXT + b"content-encoding: gzip\r\n"),
        Failure.NOT_METRICS,
    ),
    "half a line": (page(PAGE[:-3]), Failure.TRUNCATED),
    "half a page": (page(PAGE[: PAGE.index(b"# TYPE tgi_request_dur")], length=len(PAGE)), Failure.TRUNCATED),
    "half a chunk": (
        b"HTTP/1.1 200 OK\r\n%stransfer-encoding: chunked\r\n\r\nffff\r\n%s" % (TEXT, PAGE),
        Failure.TRUNCATED,
    ),
    "no chunk": (b"HTTP/1.1 200 OK\r\n%stransfer-encoding: chunked\r\n\r\nzz\r\n" % TEXT, Failure.TRUNCATED),
    "negative chunk": (
        b"HTTP/1.1 200 OK\r\n%stransfer-encoding: chunked\r\n\r\n-7\r\n%s" % (TEXT, PAGE),
        Failure.NOT_HTTP,
    ),
    "nothing": (page(b""), Failure.UNKNOWN_ENGINE),
    "another program": (page(b"# HELP up Up.\nup 1\n"), Failure.UNKNOWN_ENGINE),
    "not found": (page(status=b"404 Not Found"), Failure.HTTP_STATUS),
    "no content": (page(status=b"204 No Content"), Failure.HTTP_STATUS),
    "error": (page(status=b"500 Oh"), Failure.HTTP_STATUS),
    "not http": (b"SSH-2.0-OpenSSH_9.2p1\r\n", Failure.NOT_HTTP),
    "http 0.9": (PAGE, Failure.NOT_HTTP),
    "http 7": (page().replace(b"HTTP/1.1", b"HTTP/7.0"), Failure.NOT_HTTP),
    "binary": (bytes(range(256)) * 101, Failure.NOT_HTTP),
    "long status": (b"HTTP/1.1 200 " + b"O" * 100_000 + b"\r\n\r\n", Failure.NOT_HTTP),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 211 + b"\r\n", Failure.NOT_HTTP),
    "redirect to another port": (
        page(status=b"302 Found", head=b"location: http://127.0.0.1:1/\r\n"),
        Failure.REDIRECT,
    ),
    "redirect to another host": (page(status=b"301 Moved", head=b"location: //example.com/\r\n"), Failure.REDIRECT),
    "redirect to a file": (page(status=b"307 There", head=b"location: file:///etc/passwd\r\n"), Failure.REDIRECT),
    "redirect to nowhere": (page(status=b"308 There", head=b"location: http://[/\r\n"), Failure.REDIRECT),
    "redirect loop": (page(status=b"302 Found", head=b"location: /metrics\r\n"), Failure.REDIRECT),
    "redirect that splits": (page(status=b"302 Found", head=b"location: /a b\xff\r\n"), Failure.REDIRECT),
    "many series": (
        page(b"".join(b'vllm:prompt_tokens_total{model_name="%d"} 1\n' % number for number in range(5_003))),
        Failure.TOO_MANY_SERIES,
    ),
    "too large": (page(b"# metrics\n" * 40_009), Failure.TOO_LARGE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_answer_that_is_none_costs_one_counter(serve: Serve, name: str) -> None:
    answer, failure = HOSTILE[name]
    bad, good = serve(answer), serve()
    report = source(bad.url, good.url).look()
    assert counted(report) == {failure: 1}
    first, second = report.endpoints
    assert (first.up, first.failure, first.models) == (False, failure, ())
    assert second.models == MODELS
    assert max(first.seconds, second.seconds) < PATIENCE_S


def test_bad_samples_are_counted_and_the_rest_is_used(serve: Serve) -> None:
    bomb = b'tgi_queue_size{a="' + b"x" * 200_000 + b'"} 3\n'
    report = source(serve(page(bomb + b"tgi_batch_current_size 5\ntgi_request_success NaN\n")).url).look()
    assert only(report).models == (EngineModel("tgi", None, running=5),)
    assert counted(report) == {Failure.BAD_SAMPLE: 1}


def test_redirect_on_the_same_host_is_followed_once(serve: Serve) -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        there = head.startswith(b"GET /metrics/?x=1 ")
        connection.sendall(page() if there else page(status=b"307 There", head=b"location: /metrics/?x=1\r\n"))

    server = serve(answer)
    assert only(source(server.url).look()).models == MODELS
    assert len(server.requests) == 2


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert counted(source(f"http://127.0.0.1:{port}/metrics").look()) == {Failure.REFUSED: 1}


def test_connection_that_breaks(serve: Serve) -> None:
    def reset(connection: socket.socket, _: bytes) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    def close(_connection: socket.socket, _head: bytes) -> None:
        return

    report = source(serve(reset).url, serve(close).url, serve(close, reads=False).url).look()
    assert counted(report) == {Failure.UNREACHABLE: 3}


def test_host_without_address() -> None:
    assert counted(source("http://nobody.invalid/metrics").look()) == {Failure.UNREACHABLE: 1}


# ---- endpoints that never end: each costs one timeout, and delays nobody else by more ----


def hang(connection: socket.socket, _: bytes) -> None:
    connection.recv(1)


def hang_in_the_body(connection: socket.socket, _: bytes) -> None:
    connection.sendall(page(PAGE[:101], length=len(PAGE)))
    connection.recv(1)


def dripping(head: bytes, drop: bytes) -> Answer:
    def drip(connection: socket.socket, _: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(drop)
            time.sleep(0.01)

    return drip


ENDLESS: Mapping[str, Answer] = {
    "hangs": hang,
    "hangs in the body": hang_in_the_body,
    "drips its head": dripping(b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "drips its status": dripping(b"", b"H"),
    "drips continues": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "drips its body": dripping(b"HTTP/1.1 200 OK\r\n" + TEXT + b"\r\n# ", b"z"),
    "drips chunks": dripping(b"HTTP/1.1 200 OK\r\n" + TEXT + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n#\r\n"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_answer_costs_one_timeout(serve: Serve, name: str) -> None:
    bad, good = serve(ENDLESS[name]), serve()
    began = time.monotonic()
    report = source(bad.url, good.url, timeout_s=TIMEOUT_S).look()
    took = time.monotonic() - began
    assert TIMEOUT_S <= took < TIMEOUT_S + 1
    assert counted(report) == {Failure.TIMEOUT: 1}
    first, second = report.endpoints
    assert (first.up, first.failure) == (False, Failure.TIMEOUT)
    assert second.models == MODELS
    assert second.seconds < TIMEOUT_S


@pytest.mark.parametrize("head", [b"content-length: 104857600\r\n", b"", b"transfer-encoding: chunked\r\n"])
def test_flood_of_100_mb_is_cut_off(serve: Serve, head: bytes) -> None:
    sent: list[int] = []
    line = b'vllm:time_to_first_token_seconds_bucket{model_name="m",le="0.5"} 7\n' * 977
    piece = b"%x\r\n%s\r\n" % (len(line), line) if b"chunked" in head else line

    def flood(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + TEXT + head + b"\r\n")
        while sum(sent) < 100 << 20:
            connection.sendall(piece)
            sent.append(len(piece))

    report = source(serve(flood).url).look()
    assert counted(report) == {Failure.TOO_LARGE: 1}
    assert sum(sent) < 20 << 20  # what the sockets hold, and not the flood


def test_a_crowd_that_hangs_is_asked_in_turns(serve: Serve) -> None:
    server = serve(hang)
    crowd = [f"{server.url}?{number}" for number in range(WORKERS + 3)]
    began = time.monotonic()
    report = source(*crowd, serve().url, timeout_s=TIMEOUT_S).look()
    assert time.monotonic() - began < 2 * TIMEOUT_S + 1
    assert counted(report) == {Failure.TIMEOUT: WORKERS + 3}
    assert [endpoint.up for endpoint in report.endpoints] == [False] * (WORKERS + 3) + [True]


def test_name_server_that_hangs_is_not_waited_for_nor_asked_again(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    answered = threading.Event()
    asked: list[str] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address[0])
        answered.wait()
        raise OSError

    monkeypatch.setattr(engine_metrics.socket, "create_connection", connect)
    crowd = source(
        *(f"http://engine-{number}/metrics" for number in range(WORKERS + 5)), clock=clock, timeout_s=TIMEOUT_S
    )
    report = crowd.look()
    assert counted(report) == {Failure.TIMEOUT: WORKERS, Failure.NOT_ASKED: 5}
    clock.forward(30)
    assert counted(crowd.look()) == {Failure.TIMEOUT: WORKERS + 5, Failure.NOT_ASKED: 5}
    assert len(asked) == len(set(asked)) == WORKERS + 5
    answered.set()


def test_no_more_endpoints_are_asked_than_the_limit(serve: Serve) -> None:
    server = serve()
    report = source(*(f"{server.url}?{number}" for number in range(ENDPOINTS_LIMIT + 7))).look()
    assert counted(report) == {Failure.NOT_ASKED: 7}
    assert len(report.endpoints) == len(server.requests) == ENDPOINTS_LIMIT


# ---- when they are asked again ----


def looks(asking: EngineSource, clock: Clock, server: Server, every_s: float, seconds: float) -> list[float]:
    """Look again and again; returns at which seconds the server was asked."""
    asked: list[float] = []
    for number in range(round(seconds / every_s)):
        before = len(server.requests)
        asking.look()
        if len(server.requests) > before:
            asked.append(number * every_s)
        clock.forward(every_s)
    return asked


def test_engine_is_asked_at_each_look(serve: Serve, clock: Clock) -> None:
    server = serve()
    asking = source(Endpoint(server.url, found=True), clock=clock)
    assert looks(asking, clock, server, 5, 35) == [0, 5, 10, 15, 20, 25, 30]


def test_engine_that_fails_is_asked_less_often_but_once_a_minute(serve: Serve, clock: Clock) -> None:
    server = serve(page(status=b"503 Busy"))
    asked = looks(source(server.url, clock=clock), clock, server, 5, 300)
    assert asked[:5] == [0, 5, 15, 35, 70]
    assert {later - earlier for earlier, later in pairwise(asked[4:])} <= {60, 65}


def test_port_that_is_no_engine_is_asked_every_ten_minutes(serve: Serve, clock: Clock) -> None:
    server = serve(page(b"up 1\n"))
    asking = source(Endpoint(server.url, found=True), clock=clock)
    asked = looks(asking, clock, server, 30, 3000)
    assert asked[1] in {60, 90}
    assert {later - earlier for earlier, later in pairwise(asked[4:])} <= {600, 630}
    assert not only(asking.look()).known


def test_port_that_refused_is_asked_again_soon(clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    asking = source(Endpoint(f"http://127.0.0.1:{port}/metrics", found=True), clock=clock)
    asking.look()
    clock.forward(5)
    assert counted(asking.look()) == {Failure.REFUSED: 2}


def test_engine_once_known_stays_known(serve: Serve, clock: Clock) -> None:
    answers = [page(), page(status=b"500 Oh"), page()]
    server = serve(lambda connection, _: connection.sendall(answers.pop(0)))
    asking = source(Endpoint(server.url, found=True), clock=clock)
    states: list[tuple[bool, bool]] = []
    for _ in range(3):
        states.append(((told := only(asking.look())).known, told.up))
        clock.forward(5)
    assert states == [(True, True), (True, False), (True, True)]


def test_found_port_is_asked_at_the_other_place_too(serve: Serve) -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        there = head.startswith(b"GET /prometheus/metrics ")
        connection.sendall(page() if there else page(b"[]", head=b"content-type: application/json\r\n"))

    server = serve(answer)
    asking = source(Endpoint(server.url, found=True))
    asking.look()
    told = only(asking.look())
    assert told.url == f"http://127.0.0.1:{server.port}/prometheus/metrics"
    assert told.models == MODELS
    assert len(server.requests) == 3
    assert counted(source(server.url).look()) == {Failure.NOT_METRICS: 1}


def test_endpoint_that_is_no_target_any_more_is_forgotten(serve: Serve) -> None:
    server = serve()
    targets: dict[str, Sequence[Endpoint]] = {"roleplay": [Endpoint(server.url)]}
    asking = EngineSource(lambda: targets, timeout_s=TIMEOUT_S)
    assert len(asking.look().endpoints) == 1
    targets["roleplay"] = []
    report = asking.look()
    assert report.endpoints == ()
    assert set(report.failures) == {("roleplay", failure) for failure in Failure}


# ---- https ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
            *("-keyout", path, "-out", path.with_suffix(".crt")),
        ],
        check=True,
        capture_output=True,
    )
    return path


def test_https_is_verified(serve: Serve, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate.with_suffix(".crt"), certificate)

    def answer(connection: socket.socket, _: bytes) -> None:
        with server_side.wrap_socket(connection.dup(), server_side=True) as encrypted:
            encrypted.recv(65_536)
            encrypted.sendall(page())

    url = serve(answer, reads=False).url.replace("http:", "https:")
    assert counted(source(url).look()) == {Failure.TLS: 1}
    trusting = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
    monkeypatch.setattr(engine_metrics, "_tls", lambda: trusting)
    assert only(source(url).look()).models == MODELS
    hanging = serve(hang).url.replace("http:", "https:")
    assert counted(source(hanging, timeout_s=TIMEOUT_S).look()) == {Failure.TIMEOUT: 1}


# ---- any bytes ----


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [
                    *(
                        b"HTTP/1.1 200 OK\r\n",
                        b"HTTP/1.1 100 C\r\n\r\n",
                        b"HTTP/1.0 302 F\r\nlocation: ",
                        TEXT,
                        b"\r\n",
                    ),
                    *(b"content-length: ", b"transfer-encoding: chunked\r\n", b"-1", b"9" * 30, b"5\r\n", b"0\r\n\r\n"),
                    *(PAGE, b"\n", b"tgi_queue_size 1", b":", b" "),
                ]
            ),
        ),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_answer_raises(monkeypatch: pytest.MonkeyPatch, parts: list[bytes]) -> None:
    def connect(*_: object) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(b"".join(parts))
        return ours

    monkeypatch.setattr(engine_metrics, "_connect", connect)
    # a worker that raises would not have answered, and that is a timeout
    told = only(source("http://engine/metrics").look())
    assert told.up or told.failure not in {None, Failure.TIMEOUT}


def test_without_room_for_threads_nobody_is_asked_and_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = EngineSource(lambda: {"stage": [Endpoint("http://127.0.0.1:9/metrics")]}, timeout_s=0.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        (endpoint,) = source.look().endpoints
    assert endpoint.failure is Failure.NOT_ASKED
    assert source.look().failures["stage", Failure.NOT_ASKED] == 1
