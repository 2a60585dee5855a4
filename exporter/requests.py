"""Follows what happens on each connection, and finds the requests in it.

A `Conversations` takes the probe's records in order. Each connection has two decoders, one per direction; a request
begins in the one and is answered in the other, and what it comes to is kept by `exporter.live_request`.

A frame must never count for another request than its own. As long as the bytes that the service writes follow on
each other, the first request that waits is the one being answered. After a gap that is so only when nothing that was
read was lost, and one request alone can be meant. Otherwise all that wait are given up, and the connection is followed
again from its next request on: missing beats wrong. Which requests were lost cannot be told where a client sends the
next one before the answer to the last; there, after a loss, this rests on clients that do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from exporter.config import NONE
from exporter.live_request import Request
from exporter.request import Capture, FinishedRequest
from probes.wire.apis import api_of
from probes.wire.http1 import (
    Body,
    Broken,
    End,
    Gap,
    Reason,
    RequestDecoder,
    RequestHead,
    ResponseDecoder,
    ResponseHead,
    Start,
    looks_like_chunk,
    looks_like_request,
    looks_like_response,
)

if TYPE_CHECKING:
    from exporter.config import Service
    from exporter.slis import Slis

__all__ = ["Conversations", "Request"]

POSITIONS: Final = 2**32
"""TCP positions wrap here, and so do counts of lost records."""
SEGMENTS_LIMIT: Final = 64
"""Segments that are remembered while the service has not read them."""
PIPELINE_LIMIT: Final = 64
"""Requests of one connection that may wait for their answer."""
LINGER_NS: Final = 1_000_000_000
"""How long a complete response whose client had half closed waits for a reset that makes it an abort."""
ABANDONED_NS: Final = 7_680_000_000_000
"""A request of which nothing was seen for this long is no longer followed: the largest bound of the durations."""

_HALF: Final = POSITIONS // 2
_CLOSED_LIMIT: Final = 1024
_ABANDONED_EVERY_NS: Final = 60_000_000_000
_UNKNOWN: Final = -1

_TCP_ESTABLISHED: Final = 1
_TCP_FIN_WAIT1: Final = 4
_TCP_CLOSE: Final = 7
_TCP_CLOSE_WAIT: Final = 8
_TCP_LAST_ACK: Final = 9
_NO_MORE_WRITES: Final = frozenset({_TCP_FIN_WAIT1, _TCP_LAST_ACK, _TCP_CLOSE})
_PEER_FIRST: Final = frozenset({_TCP_CLOSE_WAIT, _TCP_LAST_ACK})  # only reached when the FIN of the peer came first
_SWITCHING: Final = 101
_WANTED_RESPONSE: Final = frozenset({b"content-type", b"content-encoding"})


class Connection:
    """One TCP connection of a watched service.

    `rx` is what the service reads, `tx` what it writes. A direction is synced while its decoder knows where it stands;
    where tx is not, rx is not either.
    """

    __slots__ = (
        "client_left_ns",
        "id",
        "lingering",
        "opaque",
        "peer",
        "reading",
        "request_decoder",
        "requests",
        "response_decoder",
        "rx_base",
        "rx_loss",
        "rx_lost",
        "rx_position",
        "rx_synced",
        "seeking",
        "segments",
        "server_left_ns",
        "service",
        "tcp_state",
        "tx_loss",
        "tx_lost",
        "tx_position",
        "tx_synced",
        "unseen_start",
        "was_reset",
    )

    def __init__(self, conn: int, service: int, peer: str, rx_position: int, tx_position: int, born: bool) -> None:
        self.id = conn
        self.service = service
        self.peer = peer
        self.tcp_state = _TCP_ESTABLISHED  # as the last event said
        self.rx_position = rx_position  # of the next byte, or _UNKNOWN
        self.tx_position = tx_position
        self.rx_base = rx_position  # the position at which the request decoder's offset is 0
        self.rx_lost = 0  # records, as the last one said
        self.tx_lost = 0
        self.rx_loss = False  # a loss was told whose gap has not come yet
        self.tx_loss = False
        self.rx_synced = born
        self.tx_synced = born
        self.seeking = False  # after a gap in a stream, until a write begins with a chunk
        self.opaque = False  # it speaks another protocol from here on
        self.unseen_start = None if born else Capture.start_unseen  # what to count for an answer without its request
        # Lists, although they are queues: they are short, and an empty deque takes 620 bytes.
        self.segments: list[tuple[int, int, int]] = []  # position, size, ns; in order of arrival
        self.request_decoder: RequestDecoder | None = None
        self.response_decoder: ResponseDecoder | None = None
        self.requests: list[Request] = []  # oldest first; the first one is being answered
        self.reading: Request | None = None  # the one whose bytes are still coming in, answered already or not
        self.client_left_ns: int | None = None
        self.server_left_ns: int | None = None
        self.was_reset = False
        self.lingering: list[Request] = []  # answered after the client had shut its side

    def note_losses(self, rx_lost: int, tx_lost: int) -> tuple[bool, bool]:
        """Take what a record says was lost before it; tell in which directions that is more than was known."""
        reads, writes = _is_after(rx_lost, self.rx_lost), _is_after(tx_lost, self.tx_lost)
        if reads:
            self.rx_lost = rx_lost
            self.rx_loss = True
        if writes:
            self.tx_lost = tx_lost
            self.tx_loss = True
        return reads, writes

    def drop_read_segments(self) -> None:
        """Forget the segments that the service has read to their end."""
        segments = self.segments
        while segments and not _is_after(segments[0][0] + segments[0][1], self.rx_position):
            segments.pop(0)

    def arrival_of(self, position: int) -> int | None:
        """When the byte at `position` arrived: the earliest segment that covers it. None: no such segment was seen."""
        for start, size, ns in self.segments:
            if (position - start) % POSITIONS < size:
                return ns
        return None


class Conversations:
    """Follows every connection. Implements `probes.records.Handler`.

    `services` are the configured ones, by the index that the probe uses. `on_finished` gets each finished LLM request,
    `on_first_token` each streamed one when its first token was handed over, if that was seen.
    At most `limit` connections are kept; the oldest goes first.
    """

    def __init__(
        self,
        services: Sequence[Service],
        label_names: Sequence[str],
        slis: Slis,
        on_finished: Callable[[FinishedRequest], None],
        limit: int = 65536,
        on_first_token: Callable[[Request], None] | None = None,
    ) -> None:
        self._label_names = label_names
        self._on_first_token = on_first_token
        self._slis = slis
        self._on_finished = on_finished
        self._limit = limit
        self._connections: dict[int, Connection] = {}
        self._closed: dict[int, None] = {}  # the last connections that ended: a record may come late
        self._lingering: set[int] = set()
        self._next_abandoned_ns = 0
        self._numbers = itertools.count(1)
        slis.in_flight = self.in_flight
        self.reconfigure(services)

    def __len__(self) -> int:
        """How many connections state is held for."""
        return len(self._connections)

    def reconfigure(self, services: Sequence[Service]) -> None:
        """Take other services: each stands where it stood, new ones behind them. The names of labels stay."""
        self._services = services
        self._labels = [_label_readers(service, self._label_names) for service in services]
        self._wanted_request = frozenset(
            label.header.encode("latin-1") for service in services for label in service.labels.values()
        )
        for service in services:
            self._slis.service(service.name)

    def in_flight(self) -> Iterator[tuple[str, str | None, str, tuple[str, ...]]]:
        """(service, model, api, extra labels) of every LLM request under way."""
        for connection in self._connections.values():
            for request in connection.requests:
                if request.api is not None:
                    yield request.service, request.model, request.api.value, request.extra

    def under_way(self) -> Iterator[tuple[Request, bool]]:
        """Every LLM request that is not over, the oldest connections first, and whether its client has left."""
        for connection in self._connections.values():
            if connection.requests or connection.lingering:
                has_left = connection.client_left_ns is not None
                for request in (*connection.lingering, *connection.requests):
                    if request.api is not None:
                        yield request, has_left

    # ---- what happens to a connection ----

    def opened(
        self, conn: int, seen_ns: int, service: int, peer: str, born: bool, rx_position: int, tx_position: int
    ) -> None:
        """See `probes.records.Handler`."""
        known = self._connections.get(conn)
        if known is not None:
            self._drop(known)
        elif len(self._connections) >= self._limit:
            self._drop(next(iter(self._connections.values())))
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
        if connection.rx_position != _UNKNOWN and not _is_after(position + size, connection.rx_position):
            return  # sent again, but the service has read it
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
        connection.was_reset = True
        self._client_leaves(connection, seen_ns)
        self._end_lingering(connection)

    def state(
        self, conn: int, seen_ns: int, old: int, new: int, tgid: int, rx_position: int, tx_position: int, error: int
    ) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            return
        if not old:  # told when the kernel had used the socket's memory for another connection
            self._drop(connection)
            self._forget(connection)
            return
        if connection.tcp_state != old:
            for request in connection.requests:
                request.spoil(Capture.lost_events)  # when its end began is not known
        connection.tcp_state = new
        if error:
            self.reset(conn, seen_ns)  # or the peer could no longer be reached, which is the same to the service
        elif old in _PEER_FIRST or new in _PEER_FIRST:
            self._client_leaves(connection, seen_ns)
        elif connection.client_left_ns is None and connection.server_left_ns is None:
            # Without a FIN or RST from the peer, only the service's side leaves ESTABLISHED.
            connection.server_left_ns = seen_ns
        if new in _NO_MORE_WRITES:
            self._check_ends(connection, rx_position, tx_position)
            self._service_is_done(connection, seen_ns)
        if new == _TCP_CLOSE:
            self._forget(connection)

    def sweep(self, now_ns: int) -> None:
        """Finish what only waits for a reset that did not come, and what was abandoned. Call it several times a second.

        Costs 0.1 us for each connection, once a minute.
        """
        for conn in list(self._lingering):
            connection = self._connections[conn]
            if now_ns - connection.lingering[-1].last_write_ns >= LINGER_NS:
                self._end_lingering(connection)
        if now_ns >= self._next_abandoned_ns:
            self._next_abandoned_ns = now_ns + _ABANDONED_EVERY_NS
            self._drop_abandoned(now_ns - ABANDONED_NS)

    def _drop_abandoned(self, before_ns: int) -> None:
        """Drop requests that are under way for ever: the record of their connection's end was lost."""
        abandoned = [
            connection
            for connection in self._connections.values()
            if connection.requests  # the last one was read last, the first one answered last
            and connection.requests[-1].last_write_ns < before_ns
            and connection.requests[0].last_write_ns < before_ns
        ]
        for connection in abandoned:
            self._drop(connection)

    def _client_leaves(self, connection: Connection, seen_ns: int) -> None:
        if connection.client_left_ns is None and connection.server_left_ns is None:
            connection.client_left_ns = seen_ns

    def _check_ends(self, connection: Connection, rx_position: int, tx_position: int) -> None:
        """Find out whether records were lost after the last ones that came."""
        if connection.tx_position == _UNKNOWN or _is_after(tx_position, connection.tx_position):
            connection.tx_position = tx_position
            if connection.requests:
                self._give_up(connection, Capture.lost_events)
        if connection.rx_position != _UNKNOWN and _is_after(rx_position, connection.rx_position):
            missing = (rx_position - connection.rx_position) % POSITIONS
            connection.rx_position = rx_position
            if connection.rx_synced:
                self._miss_reads(connection, missing, Capture.lost_events)

    def _service_is_done(self, connection: Connection, seen_ns: int) -> None:
        """The service can send nothing more: what ends with the connection is complete, the rest never will be."""
        decoder = connection.response_decoder
        known = connection.tx_synced and not connection.seeking
        if connection.requests and known and decoder is not None:
            request = connection.requests[0]
            if any(type(event) is End for event in decoder.eof()):
                self._end_answer(connection, request.last_write_ns, by_close=True)
        while connection.requests:
            request = connection.requests.pop(0)
            if not known:
                self._lose_end(connection, request)
            elif connection.client_left_ns is not None:
                self._finish(connection, request, connection.client_left_ns, aborted=True)
            else:
                self._finish(connection, request, connection.server_left_ns or seen_ns, cut_off=True)

    def _forget(self, connection: Connection) -> None:
        self._end_lingering(connection)
        self._connections.pop(connection.id, None)
        self._closed[connection.id] = None
        if len(self._closed) > _CLOSED_LIMIT:
            del self._closed[next(iter(self._closed))]

    def _drop(self, connection: Connection) -> None:
        """Follow the connection no longer, although it may live on."""
        self._end_lingering(connection)
        while connection.requests:
            self._lose_end(connection, connection.requests.pop(0))
        self._connections.pop(connection.id, None)

    def _stray(
        self, conn: int, service: int, rx_position: int, tx_position: int, rx_lost: int, tx_lost: int
    ) -> Connection | None:
        """Begin in the middle of a connection whose `opened` was lost, or that was dropped. None: it has ended."""
        if conn in self._closed:
            return None
        self.opened(conn, 0, service, "", False, rx_position, tx_position)
        connection = self._connections[conn]
        connection.rx_lost, connection.tx_lost = rx_lost, tx_lost
        if rx_lost or tx_lost:
            connection.unseen_start = Capture.lost_events
        return connection

    # ---- bytes that the service read ----

    def read(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        lost_other: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """See `probes.records.Handler`."""
        connection = self._connections.get(conn)
        if connection is None:
            connection = self._stray(conn, service, position, _UNKNOWN, lost, lost_other)
            if connection is None:
                return
        connection.service = service
        missing = _distance(position, connection.rx_position)
        connection.rx_position = (position + len(data) + uncaptured) % POSITIONS
        connection.note_losses(lost, lost_other)
        if missing:
            why = _why(connection.rx_loss)
            connection.rx_loss = False
            if connection.rx_synced:
                self._miss_reads(connection, missing, why)
        if connection.rx_synced or self._resync(connection, position, data):
            decoder = connection.request_decoder
            if decoder is None:
                decoder = connection.request_decoder = RequestDecoder(self._wanted_request)
            self._take_request(connection, decoder.feed(data), at_ns, tgid, tid)
            if uncaptured and connection.rx_synced:
                self._take_request(connection, decoder.skip(uncaptured), at_ns, tgid, tid)
        connection.drop_read_segments()

    def _miss_reads(self, connection: Connection, missing: int, why: Capture) -> None:
        """`missing` bytes were read that no record carried."""
        if missing >= _HALF or connection.request_decoder is None:
            self._lose_requests(connection, why)
            return
        if connection.reading is not None:
            connection.reading.spoil(why)
        # Nothing can begin in it, so it needs no instant and no thread.
        self._take_request(connection, connection.request_decoder.skip(missing), 0, 0, 0, why)

    def _lose_reads(self, connection: Connection) -> None:
        """Records of reads were lost, and how many bytes they carried is not known yet."""
        if connection.reading is not None:
            connection.reading.spoil(Capture.lost_events)
        elif connection.rx_synced:
            self._lose_requests(connection, Capture.lost_events)

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

    def _resync(self, connection: Connection, position: int, data: bytes) -> bool:
        """Begin anew where a read starts with a request line, unless it is known that other answers come first."""
        if connection.opaque or not looks_like_request(data):
            return False
        if connection.tx_synced and connection.requests:
            lost = connection.rx_lost or connection.tx_lost
            name = self._services[connection.service].name
            self._slis.capture(name, Capture.lost_events if lost else Capture.undecodable)
            return False
        while connection.requests:
            self._lose_end(connection, connection.requests.pop(0))
        connection.reading = None
        connection.rx_base = position
        connection.request_decoder = RequestDecoder(self._wanted_request)
        connection.response_decoder = None
        connection.rx_synced = connection.tx_synced = True
        connection.seeking = False
        connection.unseen_start = None
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
                    if connection.reading is not None:
                        connection.reading.take_body(data)
                case Start(offset):
                    if not self._begin(connection, offset, at_ns, tgid, tid):
                        return
                case RequestHead():
                    self._take_head(connection, event)
                case End():
                    if connection.reading is not None:
                        connection.reading.end_body()
                        connection.reading = None
                case Gap():
                    if connection.reading is not None:
                        connection.reading.miss_body()
                case Broken():
                    self._lose_requests(connection, why)
                    return

    def _begin(self, connection: Connection, offset: int, at_ns: int, tgid: int, tid: int) -> bool:
        """A request begins. False: too many wait for their answer."""
        if len(connection.requests) >= PIPELINE_LIMIT:
            self._lose_requests(connection, Capture.undecodable)
            return False
        arrived_ns = connection.arrival_of((connection.rx_base + offset) % POSITIONS)
        if arrived_ns is not None and arrived_ns > at_ns:
            arrived_ns = None  # sent again, and the first time was not seen
        if connection.response_decoder is None:
            connection.response_decoder = ResponseDecoder(_WANTED_RESPONSE)
        connection.reading = Request(arrived_ns, at_ns, tgid, tid, connection.peer)
        connection.requests.append(connection.reading)
        return True

    def _take_head(self, connection: Connection, head: RequestHead) -> None:
        request = connection.reading
        decoder = connection.response_decoder
        if request is None or decoder is None:
            return  # cannot be: both begin with its first byte
        request.method = head.method
        if request.status is not None:
            return  # answered before its head was there
        decoder.push_method(head.method)
        api = api_of(head.method, head.target)
        if api is not None:
            service = self._services[connection.service].name
            extra = tuple(reader(head.headers) for reader in self._labels[connection.service])
            number = next(self._numbers)
            request.follow(api, head.target, service, extra, number, self._slis, self._on_first_token)

    # ---- bytes that the service wrote ----

    def wrote(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        lost_other: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """See `probes.records.Handler`. Called for every frame: the plain case comes first and does little."""
        connection = self._connections.get(conn)
        if connection is None:
            connection = self._stray(conn, service, _UNKNOWN, position, lost_other, lost)
            if connection is None:
                return
        expected = connection.tx_position
        connection.tx_position = (position + len(data) + uncaptured) % POSITIONS
        in_step = position == expected and lost_other == connection.rx_lost and not connection.seeking
        if not in_step and not self._catch_up(connection, _distance(position, expected), data, lost, lost_other):
            return
        requests = connection.requests
        decoder = connection.response_decoder
        if not requests or not connection.tx_synced or decoder is None:
            self._take_unasked(connection, data)
            return
        request = requests[0]
        request.last_write_ns = at_ns
        request.writer_tid = tid
        events = decoder.feed(data)
        if len(events) == 1 and type(events[0]) is Body:
            request.take_answer(events[0].data, at_ns, connection.client_left_ns)
        else:
            self._take_answer(connection, events, at_ns)
        if uncaptured:
            self._take_answer(connection, decoder.skip(uncaptured), at_ns)

    def _catch_up(self, connection: Connection, missing: int | None, data: bytes, lost: int, lost_other: int) -> bool:
        """Something came between the last record and this one. False: nobody can tell what `data` belongs to."""
        lost_reads, lost_writes = connection.note_losses(lost_other, lost)
        if missing is None:
            missing = _HALF if connection.tx_loss else 0
        why = _why(connection.tx_loss)
        if missing:
            connection.tx_loss = False
        if lost_reads:
            self._lose_reads(connection)
        if not connection.tx_synced or not connection.requests or not (missing or connection.seeking):
            return True
        if lost_reads or not connection.rx_synced or missing >= _HALF:
            self._give_up(connection, why)
            return False
        if looks_like_response(data):
            return self._bridge_to_head(connection, lost_writes, why)
        return self._bridge_to_body(connection, missing, data, why)

    def _bridge_to_head(self, connection: Connection, lost_writes: bool, why: Capture) -> bool:
        """After a gap comes the head of a response. With two requests it is the second one's: the gap took the first.

        With one whose answer had not begun it is its own, and the gap took an interim response; were it another's, the
        request to it would stand in the queue. With more it may be anybody's.
        """
        requests, decoder = connection.requests, connection.response_decoder
        request = requests[0]
        if request.status is not None or len(requests) == 2:
            requests.pop(0)
            request.spoil(why)
            request.end_answer()
            self._lose_end(connection, request)
        elif lost_writes:  # since it was read; what was lost before is of an answer to another
            request.spoil(why)
        if len(requests) != 1 or decoder is None:
            self._give_up(connection, why)
            return False
        connection.seeking = False
        decoder.resync(decoder.offset, [requests[0].method])
        return True

    def _bridge_to_body(self, connection: Connection, missing: int, data: bytes, why: Capture) -> bool:
        """After a gap comes the middle of a response: of the only request, and where in it its framing must tell."""
        requests, decoder = connection.requests, connection.response_decoder
        if len(requests) != 1 or decoder is None:
            self._give_up(connection, why)
            return False
        request = requests[0]
        if request.is_stream and looks_like_chunk(data):
            request.miss_answer(why)
            connection.seeking = False
            decoder.resync_chunk(decoder.offset)
        elif not connection.seeking:
            request.spoil(why)
            request.end_seen = False  # where the response ended within the gap
            self._take_answer(connection, decoder.skip(missing), request.last_write_ns, why)
            if connection.requests:
                request.end_seen = True
        return not connection.seeking and connection.tx_synced

    def _give_up(self, connection: Connection, why: Capture) -> None:
        """Both directions are out of step until the connection's next request; what waits has an unknown end."""
        connection.tx_synced = connection.seeking = False
        if connection.rx_synced and not connection.requests:
            self._lose_requests(connection, why)
        connection.rx_synced = False
        connection.reading = None
        for request in connection.requests:
            request.spoil(why)

    def _take_unasked(self, connection: Connection, data: bytes) -> None:
        """Bytes of a response whose request was not seen: it was under way when the agent attached, or out of step."""
        if connection.requests:
            return
        if connection.tx_synced:
            # 4xx: servers send 408 to a client that keeps them waiting; 1xx answers nothing.
            if connection.rx_synced and looks_like_response(data) and data[9:10] not in b"14":
                self._lose_requests(connection, Capture.lost_events)
        elif connection.unseen_start is not None and b"data:" in data:
            self._slis.capture(self._services[connection.service].name, connection.unseen_start)
            connection.unseen_start = None

    def _take_answer(
        self, connection: Connection, events: Sequence[object], at_ns: int, why: Capture = Capture.undecodable
    ) -> None:
        requests = connection.requests
        for event in events:
            if type(event) is Broken:
                self._break_answer(connection, event, why)
                return
            if not requests:
                continue
            request = requests[0]
            if type(event) is Body:
                request.take_answer(event.data, at_ns, connection.client_left_ns)
            elif type(event) is End:
                self._end_answer(connection, at_ns)
            elif type(event) is Start:
                request.first_byte_ns = at_ns
            elif type(event) is ResponseHead:
                request.take_answer_head(event)
                if event.status == _SWITCHING or (request.method == b"CONNECT" and 200 <= event.status < 300):
                    self._turn_opaque(connection)
            elif type(event) is Gap:
                request.miss_answer(why)

    def _break_answer(self, connection: Connection, broken: Broken, why: Capture) -> None:
        requests = connection.requests
        if broken.reason is Reason.GAP and len(requests) == 1 and requests[0].is_stream:
            requests[0].miss_answer(why)
            connection.seeking = True
        else:
            self._give_up(connection, why)

    def _turn_opaque(self, connection: Connection) -> None:
        """The connection goes on in another protocol, such as WebSocket: nothing on it is a request any more.

        It counts once, whatever it carries: nobody can tell whether that is for an LLM.
        """
        connection.opaque = True
        connection.rx_synced = connection.tx_synced = False
        connection.reading = None
        if all(request.api is None for request in connection.requests):
            self._slis.capture(self._services[connection.service].name, Capture.undecodable)
        while connection.requests:
            request = connection.requests.pop(0)
            request.spoil(Capture.undecodable)
            self._finish(connection, request, request.last_write_ns)

    # ---- the end ----

    def _end_answer(self, connection: Connection, at_ns: int, *, by_close: bool = False) -> None:
        """The response is complete; `by_close`: only because the connection ended."""
        request = connection.requests.pop(0)
        if request.api is None:
            return
        left_ns = connection.client_left_ns
        whole = request.end_answer()
        if by_close and not whole:
            # The close is all that ended it, and it had not said that it was finished.
            if left_ns is not None:
                self._finish(connection, request, left_ns, aborted=True)
            else:
                self._finish(connection, request, at_ns, cut_off=True)
            return
        if not whole and not request.is_stream:
            request.spoil(Capture.undecodable)
        if left_ns is None or at_ns <= left_ns or request.said_done(left_ns):
            self._finish(connection, request, at_ns)
        else:
            if len(connection.lingering) >= PIPELINE_LIMIT:
                self._end_lingering(connection)
            connection.lingering.append(request)
            self._lingering.add(connection.id)

    def _end_lingering(self, connection: Connection) -> None:
        """A client that closed its side while it was answered either waits for the answer, or has gone and resets."""
        if not connection.lingering:
            return
        self._lingering.discard(connection.id)
        waiting, connection.lingering = connection.lingering, []
        for request in waiting:
            request.waste(connection.was_reset)
            if connection.was_reset and connection.client_left_ns is not None:
                self._finish(connection, request, connection.client_left_ns, aborted=True)
            else:
                self._finish(connection, request, request.last_write_ns)

    def _lose_end(self, connection: Connection, request: Request) -> None:
        """It is over, or followed no longer: when and how it ended was not seen."""
        request.end_seen = False
        request.spoil(Capture.end_unseen)
        self._finish(connection, request, request.last_write_ns)

    def _finish(
        self,
        connection: Connection,
        request: Request,
        ended_ns: int,
        *,
        aborted: bool = False,
        cut_off: bool = False,
    ) -> None:
        if request.api is None:
            return
        finished = request.finish(ended_ns, aborted=aborted, cut_off=cut_off)
        request.series().finished(finished)
        self._slis.capture(finished.service, finished.capture)
        self._on_finished(finished)


def _distance(position: int, expected: int) -> int | None:
    """How far `position` is beyond what was expected, modulo 2**32; None where nothing could be expected."""
    return None if expected == _UNKNOWN else (position - expected) % POSITIONS


def _is_after(position: int, other: int) -> bool:
    """Tell whether `position` is beyond `other`, in the half of the circle that is ahead of it."""
    return 0 < (position - other) % POSITIONS < _HALF


def _why(lost: bool) -> Capture:
    """Why bytes are missing: their records were lost, or a call moved them that is not followed."""
    return Capture.lost_events if lost else Capture.undecodable


def _label_readers(service: Service, names: Sequence[str]) -> tuple[Callable[[Mapping[bytes, bytes]], str], ...]:
    """For each configured label name, a function from a request's headers to this service's value of it."""

    def reader(name: str) -> Callable[[Mapping[bytes, bytes]], str]:
        label = service.labels.get(name)
        if label is None:
            return lambda _: NONE
        header = label.header.encode("latin-1")
        return lambda headers: label.value_of(headers.get(header))

    return tuple(reader(name) for name in names)
