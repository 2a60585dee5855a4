"""Finds a few top-level values of a JSON object without holding the object.

Only the framing of JSON is checked, and only at the top level: what a server would refuse for its contents may pass
here. Nothing is decoded but keys; values come back as they were written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Final

import msgspec

from probes.wire.json_patterns import CLOSING, FLAT, NESTED, OPENING, SPACE, UNENDED, end_of
from probes.wire.json_roles import UserMessages


class _State(IntEnum):
    """What the next byte at the top level has to be. The values index `_STEPS`."""

    OBJECT = 0
    FIRST_KEY = 1
    KEY = 2
    IN_KEY = 3
    COLON = 4
    VALUE = 5
    IN_STRING = 6
    IN_SCALAR = 7
    IN_NESTED = 8
    IN_NESTED_STRING = 9
    IN_COUNTED = 10
    COMMA = 11
    DONE = 12
    BROKEN = 13


# A byte that is nothing in JSON, in place of both bytes of an escape. See `TopLevelScanner._without_escapes`.
_NOTHING: Final = b"\0"
# A byte order mark may come first: json.loads, behind most Python servers, allows it.
_SPACE_OR_BOM: Final = re.compile(rb"[ \t\r\n\xef\xbb\xbf]*")
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]*")
_OBJECT: Final = {ord("{"): _State.FIRST_KEY}
_KEY_OR_END: Final = {ord('"'): _State.IN_KEY, ord("}"): _State.DONE}
_KEY: Final = {ord('"'): _State.IN_KEY}
_COLON: Final = {ord(":"): _State.VALUE}
_COMMA_OR_END: Final = {ord(","): _State.KEY, ord("}"): _State.DONE}
_QUOTE: Final = ord('"')
_LIST: Final = ord("[")


class TopLevelScanner:
    """Collects the values of `wanted` keys at depth 1 of one JSON object.

    Of one more key, `counted`, only the messages of a user are counted. Of a key that is given twice the last value
    counts, as in the parsers of CPython, JavaScript, Go and nlohmann's for C++. Memory: `max_value` bytes for each
    wanted key and a bounded rest, however long or deep the object is.
    """

    __slots__ = (
        "_capture",
        "_counted",
        "_depth",
        "_escaped",
        "_key",
        "_key_limit",
        "_name",
        "_state",
        "_uninteresting",
        "_users",
        "_wanted",
        "count",
        "max_value",
        "oversize",
        "values",
    )

    values: dict[str, bytes]
    """Of each wanted key that was seen whole, its value as it was written."""
    oversize: frozenset[str]
    """Wanted keys whose last value was longer than `max_value` bytes, and is not in `values`."""

    count: int | None
    """Messages of a user in the value of the key `counted`: objects of an array whose `role` is `user`, or 1 where it
    is a text. None where it was not seen whole or is neither."""

    def __init__(self, wanted: frozenset[str], max_value: int = 4096, counted: str | None = None) -> None:
        names = wanted if counted is None else wanted | {counted}
        self._wanted = _by_bytes(names)
        self._uninteresting = _members_without(names)
        self._counted = counted
        self._users: UserMessages | None = None
        self.count = None
        self.max_value = max_value
        self.values = {}
        self.oversize = frozenset()
        self._state = _State.OBJECT
        self._depth = 0
        self._escaped = False  # the next byte is the second of an escape
        self._key = bytearray()
        self._key_limit = 12 * max(map(len, names), default=0)  # a character is two \uXXXX at most
        self._name: str | None = None  # the wanted key whose value is being read
        self._capture = bytearray()

    @property
    def broken(self) -> bool:
        """The bytes so far are not one JSON object, or bytes are missing."""
        return self._state is _State.BROKEN

    @property
    def complete(self) -> bool:
        """The object was closed, and nothing but space came after it."""
        return self._state is _State.DONE

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the text. Never raises."""
        clean = self._without_escapes(data)
        position = 0
        while position < len(data):
            position = _STEPS[self._state](self, data, clean, position)

    def gap(self) -> None:
        """Say that bytes are missing here. What follows cannot be placed; values that were found stay."""
        if self._state is not _State.DONE:
            self._break()

    def _without_escapes(self, data: bytes) -> bytes:
        """Return `data` with its escapes blotted out, so that each quote left begins or ends a string.

        Positions stay. This is what makes long prompts cheap: strings can then be passed by a search for a quote.
        """
        if self._escaped and data:
            data = _NOTHING + data[1:]
            self._escaped = False
        if b"\\" in data:
            data = data.replace(b"\\\\", _NOTHING * 2).replace(b'\\"', _NOTHING * 2)
            self._escaped = data.endswith(b"\\")
        return data

    def _break(self) -> None:
        self._state = _State.BROKEN
        self._capture.clear()
        self._key.clear()
        self._name = None

    # One step per state: takes the data, the same without escapes and where to go on; returns where it stopped.
    # A step that breaks leaves its byte to `_step_broken`.

    def _step_object(self, data: bytes, clean: bytes, position: int) -> int:
        return self._expect(_OBJECT, clean, position, _SPACE_OR_BOM)

    def _step_first_key(self, data: bytes, clean: bytes, position: int) -> int:
        return self._expect(_KEY_OR_END, clean, position)

    def _step_key(self, data: bytes, clean: bytes, position: int) -> int:
        # Most members of most objects are passed here at once, without a step for each of their parts.
        return self._expect(_KEY, clean, end_of(self._uninteresting, clean, position))

    def _step_in_key(self, data: bytes, clean: bytes, position: int) -> int:
        end = clean.find(b'"', position)
        stop = len(data) if end < 0 else end
        self._key += data[position : min(stop, position + self._key_limit + 1 - len(self._key))]
        if end < 0:
            return stop
        self._name = self._wanted_name(bytes(self._key))
        self._key.clear()
        if self._name is not None:
            self.values.pop(self._name, None)
            self.oversize -= {self._name}
            if self._name == self._counted:
                self.count = None
        self._state = _State.COLON
        return end + 1

    def _step_colon(self, data: bytes, clean: bytes, position: int) -> int:
        return self._expect(_COLON, clean, position)

    def _step_value(self, data: bytes, clean: bytes, position: int) -> int:
        position = end_of(SPACE, clean, position)
        if position == len(clean):
            return position
        first = clean[position]
        if self._name is not None and self._name == self._counted:
            return self._count_value(clean, position)
        if first == _QUOTE:
            self._state = _State.IN_STRING
        elif first in b"{[":
            self._state = _State.IN_NESTED
            self._depth = 1
        elif end_of(_SCALAR, clean, position) > position:
            self._state = _State.IN_SCALAR
            return position
        else:
            self._break()
            return position
        self._keep(data, position, position + 1)
        return position + 1

    def _count_value(self, clean: bytes, position: int) -> int:
        """The value of the counted key begins here: it is counted, and not kept."""
        self._name = None
        if clean[position] == _QUOTE:
            self.count = 1  # should it not end, the object is not complete
        elif clean[position] == _LIST:
            self._users = UserMessages()
            self._state = _State.IN_COUNTED
            return position + 1
        return position

    def _step_in_counted(self, data: bytes, clean: bytes, position: int) -> int:
        users = self._users
        if users is None:  # cannot be: it is there in this state
            return len(data)
        position = users.feed(clean, position)
        if users.done:
            self.count = users.count
            self._state = _State.COMMA
        elif users.odd:  # no conversation: pass what is left of it like any other value
            self._depth = 1
            self._state = _State.IN_NESTED
        return position

    def _step_in_string(self, data: bytes, clean: bytes, position: int) -> int:
        end = clean.find(b'"', position)
        stop = len(data) if end < 0 else end + 1
        self._keep(data, position, stop)
        if end >= 0:
            self._end_value()
        return stop

    def _step_in_scalar(self, data: bytes, clean: bytes, position: int) -> int:
        stop = end_of(_SCALAR, clean, position)
        self._keep(data, position, stop)
        if stop < len(clean):
            self._end_value()
        return stop

    def _step_in_nested(self, data: bytes, clean: bytes, position: int) -> int:
        match = NESTED.match(clean, position)
        if match is None:  # cannot be: the pattern matches the empty string too
            return len(data)
        kind = match.lastindex
        stop = match.end()
        if kind == OPENING:
            self._depth += stop - match.start(OPENING)
        elif kind == CLOSING:
            stop = min(stop, match.start(CLOSING) + self._depth)
            self._depth -= stop - match.start(CLOSING)
        elif kind == UNENDED:
            self._state = _State.IN_NESTED_STRING
        self._keep(data, position, stop)
        if self._depth == 0:
            self._end_value()
        return stop

    def _step_in_nested_string(self, data: bytes, clean: bytes, position: int) -> int:
        end = clean.find(b'"', position)
        stop = len(data) if end < 0 else end + 1
        self._keep(data, position, stop)
        if end >= 0:
            self._state = _State.IN_NESTED
        return stop

    def _step_comma(self, data: bytes, clean: bytes, position: int) -> int:
        return self._expect(_COMMA_OR_END, clean, position)

    def _step_done(self, data: bytes, clean: bytes, position: int) -> int:
        return self._expect({}, clean, position)

    def _step_broken(self, data: bytes, clean: bytes, position: int) -> int:
        return len(data)

    def _expect(
        self, states: Mapping[int, _State], clean: bytes, position: int, space: re.Pattern[bytes] = SPACE
    ) -> int:
        """After space, expect one of the bytes of `states`, which say what state comes next."""
        position = end_of(space, clean, position)
        if position == len(clean):
            return position
        state = states.get(clean[position])
        if state is None:
            self._break()
            return position
        self._state = state
        return position + 1

    def _wanted_name(self, key: bytes) -> str | None:
        if b"\\" not in key:
            return self._wanted.get(key)
        if len(key) > self._key_limit:
            return None
        try:
            name = msgspec.json.decode(b'"' + key + b'"', type=str)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return name if name in self._wanted.values() else None

    def _keep(self, data: bytes, start: int, stop: int) -> None:
        if self._name is None:
            return
        if len(self._capture) + stop - start > self.max_value:
            self.oversize |= {self._name}
            self._name = None
            self._capture.clear()
        else:
            self._capture += data[start:stop]

    def _end_value(self) -> None:
        if self._name is not None:
            self.values[self._name] = bytes(self._capture)
            self._capture.clear()
            self._name = None
        self._state = _State.COMMA


_STEPS: Final[tuple[Callable[[TopLevelScanner, bytes, bytes, int], int], ...]] = (
    TopLevelScanner._step_object,
    TopLevelScanner._step_first_key,
    TopLevelScanner._step_key,
    TopLevelScanner._step_in_key,
    TopLevelScanner._step_colon,
    TopLevelScanner._step_value,
    TopLevelScanner._step_in_string,
    TopLevelScanner._step_in_scalar,
    TopLevelScanner._step_in_nested,
    TopLevelScanner._step_in_nested_string,
    TopLevelScanner._step_in_counted,
    TopLevelScanner._step_comma,
    TopLevelScanner._step_done,
    TopLevelScanner._step_broken,
)


@lru_cache(maxsize=16)
def _by_bytes(wanted: frozenset[str]) -> Mapping[bytes, str]:
    """Cached so that all scanners share one."""
    return {name.encode(): name for name in wanted}


@lru_cache(maxsize=16)
def _members_without(wanted: frozenset[str]) -> re.Pattern[bytes]:
    """Match members, each with the comma after it, whose names are not wanted, as far as that shows at once.

    Members with escapes in their names, or with containers in containers, are not matched.
    """
    space = rb"[ \t\r\n]*+"
    names = b"|".join(re.escape(name.encode()) for name in sorted(wanted))
    unwanted = rb'"(?!(?:' + names + rb')")[^"\\\0]*+"'
    value = rb'(?:"[^"]*+"|[-+.0-9A-Za-z]++|' + FLAT + rb")"
    return re.compile(rb"(?:" + space + unwanted + space + rb":" + space + value + space + rb",){0,255}")
