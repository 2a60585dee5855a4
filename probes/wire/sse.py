"""Decodes server-sent events from the bytes of one response body."""

from __future__ import annotations

from typing import Final

EVENT_LIMIT: Final = 1024 * 1024
"""Bytes that one line, or the data of one event, may have. A larger event is dropped and counted."""

_BOM: Final = b"\xef\xbb\xbf"


class SseDecoder:
    r"""Yields the `data` of each event, as the WHATWG specification dispatches them.

    Lines end with \n, \r\n or \r. Comments and fields but `data` are ignored, an event without `data` is none, and one
    that the stream does not complete is dropped. At most twice `limit` bytes are held.
    """

    __slots__ = ("_after_cr", "_at_event", "_data", "_dropping", "_has_data", "_limit", "_line", "_new", "oversize")

    oversize: int
    """Events that were dropped because they exceeded the limit."""

    def __init__(self, limit: int = EVENT_LIMIT) -> None:
        """`limit`: bytes that one line, or the data of one event with its line ends, may have."""
        self._limit = limit
        self._line = bytearray()  # the line that is not complete yet; one byte of it while dropping
        self._data = bytearray()  # the data lines of the open event, each with \n after it
        self._has_data = False
        self._dropping = False
        self._after_cr = False  # a \n that comes first belongs to the line end before it
        self._new = True  # no line was completed yet: a byte order mark may come
        self._at_event = False  # between events, nothing held, the byte order mark behind us
        self.oversize = 0

    def feed(self, body: bytes) -> list[bytes]:
        """Take the next bytes of the body; return the data of each event that they complete. Never raises."""
        # One frame is nearly always one write, and has one data line. `_after_cr` may stay: at worst it swallows an
        # empty line between two events, which means nothing.
        if self._at_event and body.startswith(b"data: "):
            end = body.find(b"\n")
            if end == len(body) - 2:
                if body.endswith(b"\n") and b"\r" not in body:
                    return [body[6:-2]]
            elif end == len(body) - 3 and body.endswith(b"\r\n\r\n") and body.find(b"\r") == end - 1:
                return [body[6:-4]]
        return self._feed_lines(body)

    def _feed_lines(self, body: bytes) -> list[bytes]:
        events: list[bytes] = []
        if not body:
            return events
        if self._after_cr and body.startswith(b"\n"):
            body = body[1:]
        self._after_cr = body.endswith(b"\r")
        for line in body.splitlines(keepends=True):  # of bytes: at \n, \r\n and \r, nowhere else
            if line[-1] not in b"\r\n":
                self._hold(line)
            else:
                self._take(line.rstrip(b"\r\n"), events)
        self._at_event = not (self._new or self._line or self._has_data or self._dropping)
        return events

    def _hold(self, piece: bytes) -> None:
        self._line += piece
        if self._dropping or len(self._line) > self._limit:
            self._drop()
            self._line += b"x"  # what remains to be known is that the line is not empty

    def _take(self, piece: bytes, events: list[bytes]) -> None:
        line = piece
        if self._line:
            line = bytes(self._line) + piece
            self._line.clear()
        too_long = len(line) > self._limit
        if self._new:
            self._new = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(events)
        elif too_long:
            self._drop()
        elif not self._dropping:
            self._take_field(line)

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        self._has_data = True
        self._data += value.removeprefix(b" ")
        self._data += b"\n"
        if len(self._data) > self._limit:
            self._drop()

    def _dispatch(self, events: list[bytes]) -> None:
        if self._dropping:
            self._dropping = False
        elif self._has_data:
            events.append(bytes(self._data[:-1]))
        self._data.clear()
        self._has_data = False

    def _drop(self) -> None:
        if not self._dropping:
            self.oversize += 1
        self._dropping = True
        self._line.clear()
        self._data.clear()
        self._has_data = False
