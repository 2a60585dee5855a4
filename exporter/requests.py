"""The life of a request: turns what happened on each connection into requests with their instants.

What each instant and outcome means is defined in docs/semantics.md. A `Conversations` takes the probe's records in order.
Each connection has two decoders, one per direction; a request begins in the one and is answered in the other. What a
client feels is recorded as it happens (first token, each gap), the rest when the request is over. Nothing here keeps
text: a frame is looked at and dropped.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from exporter.request import Capture, Failure, FinishedRequest, Phase
from probes.wire.http1 import (
    Body,
    Broken,
    End,
    Gap,
    RequestDecoder,
    RequestHead,
    ResponseDecoder,
    ResponseHead,
    Start,
    looks_like_chunk,
    looks_like_request,
    looks_like_response,
)
from probes.wire.openai import Api, RequestBody, ResponseBody, Usage, api_of, parse_frame
from probes.wire.sse import SseDecoder

if TYPE_CHECKING:
    from exporter.config import Service
    from exporter.slis import Series, Slis

POSITIONS: Final = 2**32
"""TCP positions wrap here."""
SEGMENTS_LIMIT: Final = 64
"""Segments that are remembered while the service has not read them."""
PIPELINE_LIMIT: Final = 256
"""Requests of one connection that may wait for their answer."""
LINGER_NS: Final = 1_000_000_000
"""How long a complete response whose client had half closed waits for a reset that makes it an abort."""

_TCP_CLOSE: Final = 7
_TCP_CLOSE_WAIT: Final = 8
_NO_MORE_WRITES: Final = frozenset({4, 9, _TCP_CLOSE})  # FIN_WAIT1, LAST_ACK
_RATE_LIMITED: Final = 429
_WANTED_RESPONSE: Final = frozenset({b"content-type"})


class Request:
    """One request while it is under way. Instants are CLOCK_MONOTONIC ns; None is "not yet"."""

    __slots__ = (
        "api",
        "arrival_seen",
        "arrived_ns",
        "body",
        "cached_tokens",
        "capture",
        "completion_tokens",
        "done_ns",
        "error",
        "extra",
        "first_byte_ns",
        "first_token_ns",
        "frames",
        "gap_open",
        "last_token_ns",
        "last_write_ns",
        "longest_gap_ns",
        "method",
        "model",
        "number",
        "prompt_tokens",
        "read_ns",
        "response_body",
        "series",
        "sse",
        "status",
        "target",
        "tgid",
        "tid",
        "wasted",
    )

    def __init__(self, arrived_ns: int, arrival_seen: bool, read_ns: int, tgid: int, tid: int) -> None:
        self.arrived_ns = arrived_ns
        self.arrival_seen = arrival_seen
        self.read_ns = read_ns
        self.tgid = tgid
        self.tid = tid
        self.number = 0
        self.api: Api | None = None
        self.method = ""
        self.target = ""
        self.extra: tuple[str, ...] = ()
        self.model: str | None = None
        self.body: RequestBody | None = None
        self.series: Series | None = None
        self.status: int | None = None
        self.sse: SseDecoder | None = None
        self.response_body: ResponseBody | None = None
        self.first_byte_ns: int | None = None
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.last_write_ns = read_ns
        self.longest_gap_ns: int | None = None
        self.frames = 0
        self.gap_open = False  # frames may be missing since the last one: the next gap is none
        self.wasted = 0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.done_ns: int | None = None  # it said that it was complete: [DONE], or a choice's finish reason
        self.error = False
        self.capture = Capture.complete if arrival_seen else Capture.arrival_unseen

    def spoil(self, capture: Capture) -> None:
        """Something of the request was not seen. The first loss that is worse than an unseen arrival stays."""
        if self.capture in _MILD:
            self.capture = capture

    def take_usage(self, usage: Usage) -> None:
        """Remember the response's own counts; a later usage replaces an earlier one, for they are running totals."""
        self.prompt_tokens = usage.prompt_tokens if usage.prompt_tokens is not None else self.prompt_tokens
        self.completion_tokens = (
            usage.completion_tokens if usage.completion_tokens is not None else self.completion_tokens
        )
        self.cached_tokens = usage.cached_tokens if usage.cached_tokens is not None else self.cached_tokens


_MILD: Final = (Capture.complete, Capture.arrival_unseen)


class Connection:
    """One TCP connection of a watched service."""

    __slots__ = (
        "client_left_ns",
        "id",
        "lingering",
        "peer",
        "reading",
        "request_decoder",
        "requests",
        "response_decoder",
        "response_start_ns",
        "rx_base",
        "rx_lost",
        "rx_position",
        "rx_synced",
        "segments",
        "server_left_ns",
        "service",
        "start_unseen",
        "tx_lost",
        "tx_position",
        "tx_synced",
    )

    def __init__(self, conn: int, service: int, peer: str, rx_position: int, tx_position: int, born: bool) -> None:
        self.id = conn
        self.service = service
        self.peer = peer
        self.rx_position = rx_position
        self.tx_position = tx_position
        self.rx_base = rx_position  # the position at which the request decoder's offset is 0
        self.rx_lost = 0
        self.tx_lost = 0
        self.rx_synced = born
        self.tx_synced = born
        self.start_unseen = False
        self.segments: deque[tuple[int, int, int]] = deque()  # position, size, ns
        self.request_decoder: RequestDecoder | None = None
        self.response_decoder: ResponseDecoder | None = None
        self.requests: deque[Request] = deque()  # oldest first; the first one is being answered
        self.reading: Request | None = None  # the one whose bytes are still coming in
        self.response_start_ns = 0
        self.client_left_ns: int | None = None
        self.server_left_ns: int | None = None
        self.lingering: Request | None = None


class Conversations:
    """Follows every connection. Implements `probes.records.Handler`.

    `services` are the configured ones, by the index that the probe uses. `on_finished` gets each finished LLM request.
    At most `limit` connections are kept; the oldest goes first.
    """

    def __init__(
        self,
        services: Sequence[Service],
        label_names: Sequence[str],
        slis: Slis,
        on_finished: Callable[[FinishedRequest], None],
        limit: int = 65536,
    ) -> None:
        self._services = services
        self._slis = slis
        self._on_finished = on_finished
        self._limit = limit
        self._connections: dict[int, Connection] = {}
        self._lingering: set[int] = set()
        self._numbers = itertools.count(1)
        self._labels = [_label_readers(service, label_names) for service in services]
        wanted = {label.header.encode("latin-1") for service in services for label in service.labels.values()}
        self._wanted_request: Final = frozenset(wanted | {b"content-type"})
        for service in services:
            slis.service(service.name)
        slis.in_flight = self.in_flight

    def __len__(self) -> int:
        """How many connections state is held for."""
        return len(self._connections)

    def in_flight(self) -> Iterator[tuple[str, str | None, str, tuple[str, ...]]]:
        """(service, model, api, extra labels) of every LLM request under way."""
        for connection in self._connections.values():
            for request in connection.requests:
                if request.api is not None:
                    yield self._services[connection.service].name, request.model, request.api.value, request.extra

    # ---- what happens to a connection ----

    def opened(
        self, conn: int, seen_ns: int, service: int, peer: str, born: bool, rx_position: int, tx_position: int
    ) -> None:
        """See `probes.records.Handler`."""
        if len(self._connections) >= self._limit:
            self._evict()
        self._connections[conn] = Connection(conn, service, peer, rx_position, tx_position, born)

    def accepted(self, conn: int, service: int) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is not None:
            connection.service = service

    def segment(self, conn: int, seen_ns: int, position: int, size: int) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            return
        segments = connection.segments
        if len(segments) >= SEGMENTS_LIMIT:
            # The first one may hold the start of a request that nobody has read yet; those behind it are its body.
            del segments[1]
        segments.append((position, size, seen_ns))

    def reset(self, conn: int, seen_ns: int) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            return
        self._client_leaves(connection, seen_ns)
        self._end_lingering(connection, reset=True)

    def state(self, conn: int, seen_ns: int, old: int, new: int, tgid: int) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            return
        if new == _TCP_CLOSE_WAIT:
            self._client_leaves(connection, seen_ns)
        elif connection.client_left_ns is None and connection.server_left_ns is None:
            # Without a FIN or RST from the peer, only the service's side leaves ESTABLISHED.
            connection.server_left_ns = seen_ns
        if new in _NO_MORE_WRITES:
            self._service_is_done(connection, seen_ns)
        if new == _TCP_CLOSE:
            self._forget(connection)

    def sweep(self, now_ns: int) -> None:
        """Finish what only waits for a reset that did not come. Call it a few times a second."""
        for conn in list(self._lingering):
            connection = self._connections.get(conn)
            if connection is None or connection.lingering is None:
                self._lingering.discard(conn)
            elif now_ns - connection.lingering.last_write_ns >= LINGER_NS:
                self._end_lingering(connection, reset=False)

    def _client_leaves(self, connection: Connection, seen_ns: int) -> None:
        if connection.client_left_ns is None and connection.server_left_ns is None:
            connection.client_left_ns = seen_ns

    def _service_is_done(self, connection: Connection, seen_ns: int) -> None:
        """The service can send nothing more: what ends with the connection is complete, the rest never will be."""
        decoder = connection.response_decoder
        if connection.requests and connection.tx_synced and decoder is not None:
            request = connection.requests[0]
            if any(type(event) is End for event in decoder.eof()):
                self._end_response(connection, request.last_write_ns, by_close=True)
        while connection.requests:
            request = connection.requests.popleft()
            if connection.client_left_ns is not None:
                self._finish(connection, request, connection.client_left_ns, aborted=True)
            else:
                self._finish(connection, request, connection.server_left_ns or seen_ns, cut_off=True)

    def _forget(self, connection: Connection) -> None:
        self._end_lingering(connection, reset=False)
        self._connections.pop(connection.id, None)

    def _evict(self) -> None:
        oldest = next(iter(self._connections.values()))
        for request in oldest.requests:
            request.spoil(Capture.end_unseen)
            self._finish(oldest, request, request.last_write_ns)
        oldest.requests.clear()
        self._connections.pop(oldest.id)

    # ---- bytes that the service read ----

    def read(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            # Its `opened` was lost, or it was evicted: begin in the middle.
            self.opened(conn, at_ns, service, "", False, position, 0)
            connection = self._connections[conn]
        connection.service = service
        missing = (position - connection.rx_position) % POSITIONS
        was_lost = lost != connection.rx_lost
        connection.rx_lost = lost
        if missing:
            self._miss_read(connection, missing, was_lost, at_ns, tgid, tid)
        if not connection.rx_synced and not self._resync_requests(connection, position, data):
            connection.rx_position = (position + len(data) + uncaptured) % POSITIONS
            return
        decoder = connection.request_decoder
        if decoder is None:
            decoder = connection.request_decoder = RequestDecoder(self._wanted_request)
        self._take_request(connection, decoder.feed(data), at_ns, tgid, tid)
        if uncaptured:
            self._take_request(connection, decoder.skip(uncaptured), at_ns, tgid, tid)
        connection.rx_position = (position + len(data) + uncaptured) % POSITIONS
        segments = connection.segments
        while segments and (connection.rx_position - segments[0][0] - segments[0][1]) % POSITIONS < POSITIONS // 2:
            segments.popleft()

    def _miss_read(
        self, connection: Connection, missing: int, was_lost: bool, at_ns: int, tgid: int, tid: int
    ) -> None:
        """`missing` bytes were read that no record carried."""
        if not connection.rx_synced:
            return
        why = Capture.lost_events if was_lost else Capture.undecodable
        if missing >= POSITIONS // 2 or connection.request_decoder is None:
            self._lose_requests(connection, why)
            return
        request = connection.reading
        self._take_request(connection, connection.request_decoder.skip(missing), at_ns, tgid, tid, why)
        if request is not None:
            request.spoil(why)

    def _lose_requests(self, connection: Connection, why: Capture) -> None:
        """The request direction is out of step until a read begins with a request line."""
        connection.rx_synced = False
        request = connection.reading
        connection.reading = None
        if request is not None:
            request.spoil(why)
        if request is None or not request.method:
            # It may have been an LLM request; nobody will ever know.
            self._slis.capture(self._services[connection.service].name, why)

    def _resync_requests(self, connection: Connection, position: int, data: bytes) -> bool:
        """Begin anew where a read starts with a request line; whatever was under way is over, its end unseen."""
        if not looks_like_request(data):
            return False
        for request in connection.requests:
            request.spoil(Capture.end_unseen)
            self._finish(connection, request, request.last_write_ns)
        connection.requests.clear()
        connection.reading = None
        connection.rx_synced = True
        connection.rx_base = position
        connection.request_decoder = RequestDecoder(self._wanted_request)
        connection.response_decoder = ResponseDecoder(_WANTED_RESPONSE)
        connection.tx_synced = True
        connection.start_unseen = False
        return True

    def _take_request(
        self,
        connection: Connection,
        events: Sequence[object],
        at_ns: int,
        tgid: int,
        tid: int,
        why: Capture = Capture.undecodable,
    ) -> None:
        for event in events:
            match event:
                case Body(data):
                    if connection.reading is not None and connection.reading.body is not None:
                        connection.reading.body.feed(data)
                case Start(offset):
                    self._begin(connection, offset, at_ns, tgid, tid)
                case RequestHead():
                    self._take_head(connection, event)
                case End():
                    self._end_request(connection)
                case Gap():
                    if connection.reading is not None and connection.reading.body is not None:
                        connection.reading.body = None
                case Broken():
                    self._lose_requests(connection, why)
                    return

    def _begin(self, connection: Connection, offset: int, at_ns: int, tgid: int, tid: int) -> None:
        position = (connection.rx_base + offset) % POSITIONS
        arrived_ns = _arrival(connection.segments, position)
        seen = arrived_ns is not None and arrived_ns <= at_ns
        request = Request(arrived_ns if arrived_ns is not None and seen else at_ns, seen, at_ns, tgid, tid)
        self._end_lingering(connection, reset=False)
        if len(connection.requests) >= PIPELINE_LIMIT:
            self._lose_requests(connection, Capture.undecodable)
            return
        connection.reading = request
        connection.requests.append(request)

    def _take_head(self, connection: Connection, head: RequestHead) -> None:
        if connection.response_decoder is None:
            connection.response_decoder = ResponseDecoder(_WANTED_RESPONSE)
        connection.response_decoder.push_method(head.method)
        request = connection.reading
        if request is None:
            return
        request.method = head.method.decode("latin-1")
        request.api = api_of(head.method, head.target)
        if request.api is None:
            return
        request.number = next(self._numbers)
        request.target = head.target.partition(b"?")[0].decode("latin-1")
        request.extra = tuple(reader(head.headers) for reader in self._labels[connection.service])
        request.body = RequestBody()

    def _end_request(self, connection: Connection) -> None:
        request = connection.reading
        connection.reading = None
        if request is not None:
            self._take_model(request)

    def _take_model(self, request: Request) -> None:
        if request.body is None:
            return
        request.body.finish()
        request.model = request.body.model
        request.body = None

    # ---- bytes that the service wrote ----

    def wrote(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """See `probes.records.Handler`. Called for every frame: the plain case comes first and does little."""
        connection = self._connections.get(conn)
        if connection is None:
            self.opened(conn, at_ns, service, "", False, 0, position)
            connection = self._connections[conn]
        if position != connection.tx_position:
            self._miss_write(connection, position, data, lost != connection.tx_lost, at_ns)
        connection.tx_lost = lost
        connection.tx_position = (position + len(data) + uncaptured) % POSITIONS
        decoder = connection.response_decoder
        requests = connection.requests
        if not connection.tx_synced or decoder is None or not requests:
            self._unexpected_write(connection, data)
            return
        requests[0].last_write_ns = at_ns
        self._answer(connection, decoder.feed(data), at_ns)
        if uncaptured:
            self._answer(connection, decoder.skip(uncaptured), at_ns)

    def _miss_write(
        self, connection: Connection, position: int, data: bytes, was_lost: bool, at_ns: int
    ) -> None:
        """Bytes were written that no record carried; `data` is what comes after them."""
        decoder, requests = connection.response_decoder, connection.requests
        if not connection.tx_synced or decoder is None or not requests:
            return
        why = Capture.lost_events if was_lost else Capture.undecodable
        if looks_like_response(data):
            # The end of one response and the head of the next: what was answered before the last request is over.
            while len(requests) > 1:
                request = requests.popleft()
                request.spoil(why)
                self._finish(connection, request, request.last_write_ns)
            decoder.resync(decoder.offset, [requests[0].method.encode("latin-1")])
            return
        requests[0].spoil(why)
        if requests[0].sse is not None and looks_like_chunk(data):
            requests[0].sse = SseDecoder()
            requests[0].gap_open = True
            decoder.resync_chunk(decoder.offset)
            return
        missing = (position - connection.tx_position) % POSITIONS
        if missing >= POSITIONS // 2:
            self._lose_response(connection, why)
        else:
            self._answer(connection, decoder.skip(missing), at_ns, why)

    def _lose_response(self, connection: Connection, why: Capture) -> None:
        """The response direction is out of step until the connection's next request."""
        connection.tx_synced = False
        connection.rx_synced = False
        for request in connection.requests:
            request.spoil(why)

    def _unexpected_write(self, connection: Connection, data: bytes) -> None:
        """Bytes of a response whose request was not seen: it was under way when the agent attached, or out of step."""
        if connection.start_unseen or connection.requests or b"data:" not in data:
            return
        connection.start_unseen = True
        self._slis.capture(self._services[connection.service].name, Capture.start_unseen)

    def _answer(
        self,
        connection: Connection,
        events: Sequence[object],
        at_ns: int,
        why: Capture = Capture.undecodable,
    ) -> None:
        for event in events:
            if type(event) is Body:
                request = connection.requests[0] if connection.requests else None
                if request is None or request.api is None:
                    continue
                if request.sse is not None:
                    for data in request.sse.feed(event.data):
                        self._frame(connection, request, data, at_ns)
                elif request.response_body is not None:
                    request.response_body.feed(event.data)
            elif type(event) is End:
                self._end_response(connection, at_ns)
            elif type(event) is Start:
                connection.response_start_ns = at_ns
            elif type(event) is ResponseHead:
                self._response_head(connection, event)
            elif type(event) is Gap:
                self._response_gap(connection)
            elif type(event) is Broken:
                self._lose_response(connection, why)
                return

    def _response_head(self, connection: Connection, head: ResponseHead) -> None:
        if not connection.requests:
            return
        request = connection.requests[0]
        request.status = head.status
        request.first_byte_ns = connection.response_start_ns
        if request.api is None:
            return
        if request.body is not None and request is not connection.reading:
            self._take_model(request)
        if head.headers.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
            request.sse = SseDecoder()
        else:
            request.response_body = ResponseBody()

    def _response_gap(self, connection: Connection) -> None:
        """Some of the body is unknown: what a frame or the usage would have said is not said."""
        if not connection.requests:
            return
        request = connection.requests[0]
        request.response_body = None
        if request.sse is not None:
            request.sse = SseDecoder()
            request.gap_open = True
            request.spoil(Capture.undecodable)

    def _frame(self, connection: Connection, request: Request, data: bytes, at_ns: int) -> None:
        assert request.api is not None
        frame = parse_frame(request.api, data)
        if frame is None:
            request.spoil(Capture.undecodable)
            return
        if frame.content:
            series = request.series
            if series is None:
                if frame.model is not None and request.model is None:
                    request.model = frame.model
                series = self._series_of(connection, request)
            last = request.last_token_ns
            if last is None:
                request.first_token_ns = at_ns
                series.first_token(max(0, at_ns - request.arrived_ns), at_ns)
            elif request.gap_open:
                request.gap_open = False
            else:
                gap = max(0, at_ns - last)
                series.gap(gap)
                longest = request.longest_gap_ns
                if longest is None or gap > longest:
                    request.longest_gap_ns = gap
            request.last_token_ns = at_ns
            request.frames += 1
            series.frame()
            if connection.client_left_ns is not None:
                request.wasted += 1
        if frame.usage is not None:
            request.take_usage(frame.usage)
        if (frame.done or frame.finish) and request.done_ns is None:
            request.done_ns = at_ns
        if frame.error:
            request.error = True
        if request.model is None and frame.model is not None:
            request.model = frame.model

    def _series_of(self, connection: Connection, request: Request) -> Series:
        if request.series is None:
            assert request.api is not None
            client_error = request.status is not None and 400 <= request.status < 500
            request.series = self._slis.series(
                self._services[connection.service].name,
                request.model,
                request.api.value,
                request.extra,
                request.status is not None and not client_error,
            )
        return request.series

    # ---- the end ----

    def _end_response(self, connection: Connection, at_ns: int, *, by_close: bool = False) -> None:
        """The response is complete; `by_close`: only because the connection ended."""
        if not connection.requests:
            return
        request = connection.requests.popleft()
        if connection.reading is request:
            # Answered before it was read to its end, as an error may be: the rest of its body belongs to nobody.
            connection.reading = None
        if request.api is None:
            return
        if request.response_body is not None:
            self._take_response_body(request, request.response_body)
        if by_close and request.sse is not None and request.done_ns is None:
            # The close is all that ended it, and it had not said that it was finished.
            if connection.client_left_ns is not None:
                self._finish(connection, request, connection.client_left_ns, aborted=True)
            else:
                self._finish(connection, request, at_ns, cut_off=True)
        elif connection.client_left_ns is not None and (request.wasted or request.sse is None):
            connection.lingering = request
            self._lingering.add(connection.id)
        else:
            self._finish(connection, request, at_ns)

    def _take_response_body(self, request: Request, body: ResponseBody) -> None:
        body.finish()
        if body.broken and request.status is not None and request.status < 400:
            request.spoil(Capture.undecodable)
        if body.usage is not None:
            request.take_usage(body.usage)
        if body.error:
            request.error = True
        if request.model is None:
            request.model = body.model

    def _end_lingering(self, connection: Connection, reset: bool) -> None:
        """A client that closed its side while it was answered either waits for the answer, or has gone and resets."""
        request = connection.lingering
        connection.lingering = None
        self._lingering.discard(connection.id)
        if request is None:
            return
        if reset and connection.client_left_ns is not None:
            if request.sse is None:
                request.wasted = request.completion_tokens or 0
            self._finish(connection, request, connection.client_left_ns, aborted=True)
        else:
            request.wasted = 0
            self._finish(connection, request, request.last_write_ns)

    def _finish(
        self,
        connection: Connection,
        request: Request,
        finished_ns: int,
        *,
        aborted: bool = False,
        cut_off: bool = False,
    ) -> None:
        if request.api is None:
            return
        if connection.reading is request:
            connection.reading = None
        self._take_model(request)
        service = self._services[connection.service].name
        if request.done_ns is not None and request.done_ns <= finished_ns:
            aborted = cut_off = False  # everything but the framing's last bytes had been sent
        if request.model is None:
            request.spoil(Capture.model_unseen)
        phase = None
        if aborted:
            phase = Phase.waiting if request.first_token_ns is None else Phase.streaming
        finished = FinishedRequest(
            number=request.number,
            service=service,
            model=request.model,
            api=request.api.value,
            extra=request.extra,
            streamed=request.sse is not None,
            status=request.status,
            arrived_ns=request.arrived_ns,
            read_ns=request.read_ns,
            first_byte_ns=request.first_byte_ns,
            first_token_ns=request.first_token_ns,
            last_token_ns=request.last_token_ns,
            finished_ns=max(finished_ns, request.arrived_ns),
            frames=request.frames,
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.completion_tokens,
            cached_tokens=request.cached_tokens,
            wasted_tokens=request.wasted,
            longest_gap_ns=request.longest_gap_ns,
            failure=None if aborted else _failure(request, cut_off),
            aborted=phase,
            capture=request.capture,
            method=request.method,
            target=request.target,
            peer=connection.peer,
            tgid=request.tgid,
            tid=request.tid,
        )
        self._series_of(connection, request).finished(finished)
        self._slis.capture(service, request.capture)
        self._on_finished(finished)


def _failure(request: Request, cut_off: bool) -> Failure | None:
    status = request.status
    if status == _RATE_LIMITED:
        return Failure.rate_limited
    if status is not None and 400 <= status < 500:
        return Failure.client_error
    if (status is not None and status >= 500) or request.error:
        return Failure.server_error
    return Failure.cut_off if cut_off else None


def _arrival(segments: deque[tuple[int, int, int]], position: int) -> int | None:
    """When the byte at `position` arrived: the earliest segment that covers it. None: no such segment was seen."""
    for start, size, ns in segments:
        if (position - start) % POSITIONS < size:
            return ns
    return None


def _label_readers(service: Service, names: Sequence[str]) -> tuple[Callable[[Mapping[bytes, bytes]], str], ...]:
    """For each configured label name, a function from a request's headers to this service's value of it."""

    def reader(name: str) -> Callable[[Mapping[bytes, bytes]], str]:
        label = service.labels.get(name)
        if label is None:
            return lambda _: ""
        header = label.header.encode("latin-1")
        return lambda headers: label.value_of(headers.get(header))

    return tuple(reader(name) for name in names)
