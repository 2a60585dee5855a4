"""Decodes HTTP/1.x messages from the bytes of one direction of a connection.

The decoders follow RFC 9112 as a bystander: they decide where messages begin and end, not whether they are good.
They are strict where two parsers could disagree about framing (lengths, chunk sizes, conflicting headers) and lenient
elsewhere (bare LF in a head, obs-fold, blank lines between messages). What cannot be framed ends in one `Broken`; the
decoder then ignores every byte until `resync`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from functools import lru_cache
from typing import ClassVar, Final, TypeAlias

import msgspec

HEAD_LIMIT: Final = 64 * 1024
"""Bytes that a start line with its headers, or a trailer section, may have."""
SIZE_LINE_LIMIT: Final = 256
"""Bytes that a chunk-size line may have, its extensions and line end included."""
BODY_LIMIT: Final = 2**53
"""Bytes that a body or a chunk may announce. More than that is not a length but an attack."""
PIPELINE_LIMIT: Final = 1024
"""Requests that may wait for their response on one connection."""


class Reason(Enum):
    """Why a stream cannot be followed any further."""

    START_LINE = "start_line"
    """The first line is no request or status line of HTTP/1.x: another protocol, TLS, or the middle of a body."""
    HEADER = "header"
    """A header line without a name, with a space in its name, or with a NUL."""
    HEAD_TOO_LARGE = "head_too_large"
    """No end of the head within `HEAD_LIMIT`."""
    CONTENT_LENGTH = "content_length"
    """Content-Length is no plain decimal number, is above `BODY_LIMIT`, or is given twice with different values."""
    TRANSFER_ENCODING = "transfer_encoding"
    """A request's body has no end that could be known, or chunked is applied twice."""
    FRAMING_CONFLICT = "framing_conflict"
    """A request with both Content-Length and Transfer-Encoding: two parsers would see two bodies."""
    CHUNK_SIZE = "chunk_size"
    """A chunk-size line is longer than `SIZE_LINE_LIMIT`, no hexadecimal number, or above `BODY_LIMIT`."""
    CHUNK_END = "chunk_end"
    """A chunk's data is not followed by CRLF."""
    TRAILER_TOO_LARGE = "trailer_too_large"
    """No end of the trailers within `HEAD_LIMIT`."""
    PIPELINE_TOO_DEEP = "pipeline_too_deep"
    """More than `PIPELINE_LIMIT` requests wait for their response."""
    GAP = "gap"
    """Bytes that were not captured may have held framing."""
    CUT_OFF = "cut_off"
    """The stream ended inside a message."""


# Structs of msgspec, not dataclasses: one is made per response frame, in 50 ns instead of 200 (frozen dataclass).
class Start(msgspec.Struct, frozen=True, gc=False):
    """The first byte of a message was seen. `offset` is the number of bytes of the stream before it."""

    offset: int


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """A request's head is complete.

    `version` is `b"1.1"` or alike. `headers` has lower-case names, only the wanted ones and those that frame the
    body; the values of a repeated header are joined by `, `.
    """

    method: bytes
    target: bytes
    version: bytes
    headers: dict[bytes, bytes]


class ResponseHead(msgspec.Struct, frozen=True, gc=False):
    """A final response's head is complete. `headers` as in `RequestHead`."""

    status: int
    headers: dict[bytes, bytes]


class Body(msgspec.Struct, frozen=True, gc=False):
    """Some bytes of the body, without chunked coding. Never empty; splits mean nothing."""

    data: bytes


class Gap(msgspec.Struct, frozen=True, gc=False):
    """`size` bytes of the body that were not captured."""

    size: int


class End(msgspec.Struct, frozen=True, gc=False):
    """The message is complete."""


class Broken(msgspec.Struct, frozen=True, gc=False):
    """The stream cannot be followed; nothing comes after this until `resync`."""

    reason: Reason


Event: TypeAlias = Start | RequestHead | ResponseHead | Body | Gap | End | Broken


class _State(IntEnum):
    """Where in a message the next byte stands. The values index `_STEPS`."""

    START = 0
    HEAD = 1
    CHUNK_SIZE = 2
    CHUNK_LINE = 3
    CHUNK_DATA = 4
    CHUNK_END = 5
    TRAILER = 6
    LENGTH = 7
    UNTIL_EOF = 8
    BROKEN = 9


# A global look-up instead of one on the enum class: this one is compared for every frame.
_CHUNK_SIZE: Final = _State.CHUNK_SIZE
_CRLF: Final = b"\r\n"
_END: Final = End()
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_BLANK_LINES: Final = re.compile(rb"[\r\n]*")
_BLANK_LINE: Final = re.compile(rb"\n\r?\n")
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")
_FIELDS: Final = re.compile(rb"(?:" + _TOKEN + rb"++:[^\0\n]*+\n)*\r?\n")
_METHOD_LIMIT: Final = 32
_METHOD: Final = re.compile(_TOKEN + rb"{1,32} ")
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([^\x00-\x20\x7f]+) HTTP/(1\.[0-9])\r?\n")
_STATUS_PREFIX_BYTES: Final = len("HTTP/1.1 200")
_STATUS_PREFIX: Final = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: [^\0\n]*)?\r?\n")
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
_LIKELY_REQUEST: Final = re.compile(rb"[A-Z]{3,32} (?:/|\*|https?://)")
_LIKELY_RESPONSE: Final = re.compile(rb"HTTP/1\.[0-9] [1-9]")
_LIKELY_CHUNK: Final = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(?:;[^\r\n]*)?\r\n")
# The sizes of ordinary frames as they are written. int() would take `0x1f`, `+1f` and `1_f` too, and a pattern costs
# twice as much as this look-up.
_SMALL_SIZES: Final = {form % size: size for form in (b"%x", b"%X") for size in range(1, 1024)}
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding"))
_NO_BODY: Final = frozenset((204, 304))


def looks_like_request(data: bytes) -> bool:
    """Tell whether `data` begins with a method in capitals, a space and the beginning of a target.

    For finding the next request after a gap or in the middle of a connection. A guess: a body may say so too.
    """
    return _LIKELY_REQUEST.match(data) is not None


def looks_like_response(data: bytes) -> bool:
    """Tell whether `data` begins with a status line of HTTP/1.x. A guess: a body may say so too."""
    return _LIKELY_RESPONSE.match(data) is not None


def looks_like_chunk(data: bytes) -> bool:
    """Tell whether `data` begins with a chunk-size line, for `ResponseDecoder.resync_chunk`. A guess."""
    return _LIKELY_CHUNK.match(data, 0, SIZE_LINE_LIMIT) is not None


class _Decoder:
    """What both directions share: heads are collected, bodies are cut by their framing."""

    __slots__ = ("_begun", "_held", "_late", "_left", "_offset", "_start", "_state", "_wanted", "broken")

    _STARTS_AT_ONCE: ClassVar[bool] = False

    broken: Reason | None
    """Why nothing is decoded any more, or None."""

    def __init__(self, wanted: Iterable[bytes]) -> None:
        """`wanted` are the names, in any case, of the headers to keep beside those that frame the body."""
        self._wanted = _with_framing(frozenset(wanted))
        self._held = bytearray()
        self._late: list[Event] = []
        self._reset(0)

    def _reset(self, offset: int) -> None:
        self._held.clear()
        self._state = _State.START
        self._left = 0
        self._offset = offset
        self._start = offset
        self._begun = False
        self._late.clear()
        self.broken = None

    @property
    def offset(self) -> int:
        """Bytes of the stream that were fed or skipped so far."""
        return self._offset

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes of the stream and return what they complete. Never raises."""
        if self._state is _CHUNK_SIZE:
            # One write of a streamed response is nearly always one whole chunk.
            end = data.find(_CRLF, 0, 5)
            if end > 0:
                size = _SMALL_SIZES.get(data[:end])
                if size is not None and len(data) == size + end + 4 and data.endswith(_CRLF):
                    self._offset += len(data)
                    return [Body(data[end + 2 : -2])]
        return self._walk(data)

    def skip(self, size: int) -> list[Event]:
        """Pass over `size` bytes of the stream that were not captured.

        Inside a body of known framing they become a `Gap`, and so does the CRLF after a chunk. Anywhere else they may
        hold framing, and the stream is `Broken`.
        """
        events = self._begin()
        if size <= 0:
            return events
        self._offset += size
        if self._state is _State.UNTIL_EOF:
            events.append(Gap(size))
            return events
        if self._state in (_State.LENGTH, _State.CHUNK_DATA):
            taken = min(size, self._left)
            events.append(Gap(taken))
            self._take_body(taken, events)
            size -= taken
        if self._state is _State.CHUNK_END:
            taken = min(size, self._left)
            self._take_chunk_end(taken)
            size -= taken
        if size > 0:
            self._break(Reason.GAP, events)
        return events

    def eof(self) -> list[Event]:
        """End the stream. A body that lasts until the end is complete now; another open message is `CUT_OFF`."""
        events = self._begin()
        if self._state is _State.UNTIL_EOF:
            self._end(events)
        elif self._state is not _State.START:
            self._break(Reason.CUT_OFF, events)
        return events

    def _begin(self) -> list[Event]:
        events = self._late.copy()
        self._late.clear()
        return events

    def _walk(self, data: bytes) -> list[Event]:
        events = self._begin()
        self._offset += len(data)
        position = 0
        while position < len(data):
            position = _STEPS[self._state](self, data, position, events)
        return events

    def _break(self, reason: Reason, events: list[Event]) -> None:
        if self.broken is not None:
            return
        self._held.clear()
        self._state = _State.BROKEN
        self.broken = reason
        events.append(Broken(reason))

    def _end(self, events: list[Event]) -> None:
        self._state = _State.START
        events.append(_END)

    # One step per state: takes the data and where to go on, returns where it stopped.

    def _step_start(self, data: bytes, position: int, events: list[Event]) -> int:
        blank = _BLANK_LINES.match(data, position)
        if blank is not None and blank.end() > position:
            return blank.end()
        self._start = self._offset - len(data) + position
        self._begun = False
        self._state = _State.HEAD
        if self._STARTS_AT_ONCE:
            events.append(Start(self._start))
        return position

    def _step_head(self, data: bytes, position: int, events: list[Event]) -> int:
        before = len(self._held)
        blank = self._find_blank_line(data, position)
        if not self._begun and not self._begin_message(self._held, blank is not None, events):
            self._break(Reason.START_LINE, events)
            return len(data)
        if blank is not None:
            head = bytes(self._held[:blank])
            self._held.clear()
            self._take_head(head, events)
            return position + blank - before
        taken = len(self._held) - before
        if len(self._held) >= HEAD_LIMIT:
            self._break(Reason.HEAD_TOO_LARGE, events)
        return position + taken

    def _step_chunk_size(self, data: bytes, position: int, events: list[Event]) -> int:
        room = SIZE_LINE_LIMIT - len(self._held)
        end = data.find(b"\n", position, position + room)
        if end < 0:
            self._held += data[position : position + room]
            self._state = _State.CHUNK_LINE
            if len(self._held) >= SIZE_LINE_LIMIT:
                self._break(Reason.CHUNK_SIZE, events)
            return len(data)
        line = _SIZE_LINE.fullmatch(bytes(self._held) + data[position : end + 1])
        self._held.clear()
        size = -1 if line is None else int(line[1], 16)
        if not 0 <= size <= BODY_LIMIT:
            self._break(Reason.CHUNK_SIZE, events)
        elif size == 0:
            # The line end of the last chunk is half of the blank line that ends an empty trailer section.
            self._held += b"\n"
            self._state = _State.TRAILER
        else:
            self._left = size
            self._state = _State.CHUNK_DATA
        return end + 1

    def _step_body(self, data: bytes, position: int, events: list[Event]) -> int:
        piece = data[position : position + self._left]
        events.append(Body(piece))
        self._take_body(len(piece), events)
        return position + len(piece)

    def _step_chunk_end(self, data: bytes, position: int, events: list[Event]) -> int:
        piece = data[position : position + self._left]
        if not _CRLF[-self._left :].startswith(piece):
            self._break(Reason.CHUNK_END, events)
            return len(data)
        self._take_chunk_end(len(piece))
        return position + len(piece)

    def _step_trailer(self, data: bytes, position: int, events: list[Event]) -> int:
        before = len(self._held)
        blank = self._find_blank_line(data, position)
        if blank is not None:
            self._held.clear()
            self._end(events)
            return position + blank - before
        taken = len(self._held) - before
        if len(self._held) >= HEAD_LIMIT:
            self._break(Reason.TRAILER_TOO_LARGE, events)
        return position + taken

    def _step_until_eof(self, data: bytes, position: int, events: list[Event]) -> int:
        events.append(Body(data[position:]))
        return len(data)

    def _step_broken(self, data: bytes, position: int, events: list[Event]) -> int:
        return len(data)

    def _find_blank_line(self, data: bytes, position: int) -> int | None:
        """Hold some of the bytes; return the length of what ends with a blank line, if one is held now.

        Not more than is held already, or 1 KiB: many short heads in one feed must not copy its rest for each.
        """
        before = len(self._held)
        self._held += data[position : position + min(HEAD_LIMIT - before, max(1024, before))]
        blank = _BLANK_LINE.search(self._held, max(0, before - 2))
        return None if blank is None else blank.end()

    def _take_body(self, size: int, events: list[Event]) -> None:
        self._left -= size
        if self._left > 0:
            return
        if self._state is _State.LENGTH:
            self._end(events)
        else:
            self._state = _State.CHUNK_END
            self._left = len(_CRLF)

    def _take_chunk_end(self, size: int) -> None:
        self._left -= size
        if self._left == 0:
            self._state = _State.CHUNK_SIZE

    def _fields(self, block: bytes, events: list[Event]) -> dict[bytes, bytes] | None:
        """Decode header lines and the blank line after them; None where they are broken."""
        if b"\n " in block or b"\n\t" in block:
            block = _FOLD.sub(b" ", block)
        if _FIELDS.fullmatch(block) is None:
            self._break(Reason.HEADER, events)
            return None
        found: dict[bytes, list[bytes]] = {}
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in self._wanted:
                found.setdefault(name, []).append(value.strip(b" \t\r"))
        return {name: b", ".join(values) for name, values in found.items()}

    def _expect_length(self, value: bytes, events: list[Event]) -> None:
        size = _content_length(value)
        if size is None:
            self._break(Reason.CONTENT_LENGTH, events)
        elif size == 0:
            self._end(events)
        else:
            self._left = size
            self._state = _State.LENGTH

    def _begin_message(self, held: bytearray, complete: bool, events: list[Event]) -> bool:
        """Look at the first bytes of a head until `_begun`; False when they cannot be one."""
        raise NotImplementedError

    def _take_head(self, head: bytes, events: list[Event]) -> None:
        """Decode a whole head, emit it and choose the state that its body needs."""
        raise NotImplementedError


_STEPS: Final[tuple[Callable[[_Decoder, bytes, int, list[Event]], int], ...]] = (
    _Decoder._step_start,
    _Decoder._step_head,
    _Decoder._step_chunk_size,
    _Decoder._step_chunk_size,
    _Decoder._step_body,
    _Decoder._step_chunk_end,
    _Decoder._step_trailer,
    _Decoder._step_body,
    _Decoder._step_until_eof,
    _Decoder._step_broken,
)


class RequestDecoder(_Decoder):
    """Decodes what a client sends. `Start` comes with the very first byte of a request."""

    __slots__ = ()

    _STARTS_AT_ONCE = True

    def resync(self, offset: int) -> None:
        """Forget everything: the next byte is the first of a message, `offset` bytes into the stream."""
        self._reset(offset)

    def _begin_message(self, held: bytearray, complete: bool, events: list[Event]) -> bool:
        if len(held) > _METHOD_LIMIT or complete:
            self._begun = True
            return _METHOD.match(held) is not None
        return True

    def _take_head(self, head: bytes, events: list[Event]) -> None:
        line = _REQUEST_LINE.match(head)
        if line is None:
            self._break(Reason.START_LINE, events)
            return
        headers = self._fields(head[line.end() :], events)
        if headers is None:
            return
        events.append(RequestHead(line[1], line[2], line[3], headers))
        coding = headers.get(b"transfer-encoding")
        length = headers.get(b"content-length")
        if coding is not None and length is not None:
            self._break(Reason.FRAMING_CONFLICT, events)
        elif coding is not None:
            if _is_chunked(coding) is not True:
                self._break(Reason.TRANSFER_ENCODING, events)
                return
            self._state = _State.CHUNK_SIZE
        elif length is not None:
            self._expect_length(length, events)
        else:
            self._end(events)


class ResponseDecoder(_Decoder):
    """Decodes what a server sends.

    `Start` comes when the first 12 bytes are there (`HTTP/1.1 200`), because interim responses (1xx but 101) are
    swallowed whole. After 101, and after a 2xx to CONNECT, everything is body until `eof`.
    """

    __slots__ = ("_methods",)

    _KINDS: ClassVar[dict[bytes, bytes]] = {b"HEAD": b"HEAD", b"CONNECT": b"CONNECT"}

    def __init__(self, wanted: Iterable[bytes]) -> None:
        """`wanted` as in `RequestDecoder`."""
        super().__init__(wanted)
        self._methods: list[bytes] = []  # not a deque: an empty one has 624 bytes, for each connection

    def push_method(self, method: bytes) -> None:
        """Say the method of the next request that waits for its response. Without one, a body is assumed.

        More than `PIPELINE_LIMIT` of them break the stream; the next call returns that.
        """
        if len(self._methods) < PIPELINE_LIMIT:
            self._methods.append(self._KINDS.get(method, b""))
        else:
            self._break(Reason.PIPELINE_TOO_DEEP, self._late)

    def resync(self, offset: int, pending: Iterable[bytes] = ()) -> None:
        """Forget everything: the next byte is the first of a message, `offset` bytes into the stream.

        `pending` are the methods of the requests that still wait for a response, oldest first.
        """
        self._reset(offset)
        self._methods.clear()
        for method in pending:
            self.push_method(method)

    def resync_chunk(self, offset: int) -> None:
        """Go on inside a chunked body: the next byte, `offset` bytes into the stream, is the first of a size line.

        For a response that was already streaming when it was first seen, or that lost bytes: its `Body` and `End`
        follow, without `Start` and head. Pending methods stay.
        """
        self._reset(offset)
        self._state = _State.CHUNK_SIZE

    def _begin_message(self, held: bytearray, complete: bool, events: list[Event]) -> bool:
        if len(held) < _STATUS_PREFIX_BYTES:
            return not complete
        prefix = _STATUS_PREFIX.match(held)
        if prefix is None:
            return False
        self._begun = True
        if not _is_interim(int(prefix[1])):
            events.append(Start(self._start))
        return True

    def _take_head(self, head: bytes, events: list[Event]) -> None:
        line = _STATUS_LINE.match(head)
        if line is None:
            self._break(Reason.START_LINE, events)
            return
        headers = self._fields(head[line.end() :], events)
        if headers is None:
            return
        status = int(line[1])
        if _is_interim(status):
            self._state = _State.START
            return
        method = self._methods.pop(0) if self._methods else b""
        events.append(ResponseHead(status, headers))
        coding = headers.get(b"transfer-encoding")
        length = headers.get(b"content-length")
        if status == 101 or (method == b"CONNECT" and 200 <= status < 300):
            self._state = _State.UNTIL_EOF
        elif method == b"HEAD" or status in _NO_BODY:
            self._end(events)
        elif coding is not None:
            chunked = _is_chunked(coding)
            if chunked is None:
                self._break(Reason.TRANSFER_ENCODING, events)
                return
            self._state = _State.CHUNK_SIZE if chunked else _State.UNTIL_EOF
        elif length is not None:
            self._expect_length(length, events)
        else:
            self._state = _State.UNTIL_EOF


@lru_cache(maxsize=16)
def _with_framing(wanted: frozenset[bytes]) -> frozenset[bytes]:
    """Cached so that all connections share one set."""
    return _FRAMING.union(name.lower() for name in wanted)


def _is_interim(status: int) -> bool:
    return 100 <= status < 200 and status != 101


def _is_chunked(coding: bytes) -> bool | None:
    """Tell whether chunked is the last transfer coding; None where it also stands before."""
    names = [name.strip(b" \t").lower() for name in coding.split(b",")]
    if b"chunked" in names[:-1]:
        return None
    return names[-1] == b"chunked"


def _content_length(value: bytes) -> int | None:
    """Decode a Content-Length, repeated or not; None unless it is one number that all decoders agree on."""
    values = {part.strip(b" \t") for part in value.split(b",")}
    if len(values) != 1:
        return None
    (digits,) = values
    if not digits.isdigit() or len(digits) > 20:  # bytes.isdigit knows ASCII digits only
        return None
    size = int(digits)
    return size if size <= BODY_LIMIT else None
