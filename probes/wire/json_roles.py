"""Counts the messages of a user in a JSON array, without holding any of them."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

from probes.wire.json_patterns import CLOSING, FLAT, NESTED, OPENING, SPACE, UNENDED, end_of

_ROLE: Final = b"role"
_USER: Final = b"user"
_KEPT: Final = max(len(_ROLE), len(_USER)) + 1  # of a string: enough to tell it from both

# A whole message, as nearly all are: of values, flat containers and lists of such. The last role counts. Each byte can
# be matched in one way only, or a message of many roles would take for ever to be refused.
_LIST: Final = rb'\[(?:[^"\[\]{}]++|"[^"]*+"|' + FLAT + rb"){0,255}\]"
_IS_ROLE: Final = rb'"role"[ \t\r\n]*+:[ \t\r\n]*+"'
_VALUES: Final = rb'[^"\[\]{}]++|(?!' + _IS_ROLE + rb')"[^"]*+"|' + FLAT + rb"|" + _LIST
_MESSAGE: Final = re.compile(rb"\{(?:" + _IS_ROLE + rb'([^"]*+)"|' + _VALUES + rb"){0,63}\}")
# In a message, and in nothing within it: up to what has a meaning here.
_MEANINGLESS: Final = re.compile(rb'[^":\[\]{}]+')


class _State(IntEnum):
    """Where the next byte is. The values index `_STEPS`."""

    BETWEEN = 0  # before a message, or the end of the array
    AFTER = 1  # a message
    INSIDE = 2  # a message
    IN_STRING = 3  # of a message itself
    DEEPER = 4  # in a container in a message
    IN_DEEP_STRING = 5
    DONE = 6
    ODD = 7


class UserMessages:
    """Counts the objects of an array whose `role` is `user`, from the byte after its bracket on.

    Only framing is checked. A role that is written with escapes is not recognised. Holds a few bytes.
    """

    __slots__ = ("_before", "_depth", "_is_user", "_state", "_string", "count")

    count: int
    """Such objects so far."""

    def __init__(self) -> None:
        self.count = 0
        self._state = _State.BETWEEN
        self._depth = 0  # containers that are open in the array
        self._string = b""  # the beginning of the string that is being read
        self._before = b""  # `"role"` or `"role":`, where what comes next is a colon or a value
        self._is_user = False

    @property
    def done(self) -> bool:
        """The array was closed."""
        return self._state is _State.DONE

    @property
    def odd(self) -> bool:
        """Something else than an object was found: where `feed` stopped, in the array and in nothing else."""
        return self._state is _State.ODD

    def feed(self, clean: bytes, position: int) -> int:
        """Take the text from `position` on, its escapes blotted out. Returns where it stopped: at its end, or `odd`."""
        while position < len(clean) and self._state < _State.DONE:
            position = _STEPS[self._state](self, clean, position)
        return position

    def _step_between(self, clean: bytes, position: int) -> int:
        position = end_of(SPACE, clean, position)
        if position == len(clean):
            return position
        first = clean[position : position + 1]
        if first == b"]":
            self._state = _State.DONE
            return position + 1
        if first != b"{":
            self._state = _State.ODD
            return position
        match = _MESSAGE.match(clean, position)
        if match is not None:
            self.count += match[1] == _USER
            self._state = _State.AFTER
            return match.end()
        self._state = _State.INSIDE
        self._depth = 1
        self._before = b""
        self._is_user = False
        return position + 1

    def _step_after(self, clean: bytes, position: int) -> int:
        position = end_of(SPACE, clean, position)
        if position == len(clean):
            return position
        first = clean[position : position + 1]
        if first == b",":
            self._state = _State.BETWEEN
        elif first == b"]":
            self._state = _State.DONE
        else:
            self._state = _State.ODD
            return position
        return position + 1

    def _step_inside(self, clean: bytes, position: int) -> int:
        stop = end_of(_MEANINGLESS, clean, position)
        if clean[position:stop].strip(b" \t\r\n"):
            self._before = b""
        if stop == len(clean):
            return stop
        first = clean[stop : stop + 1]
        if first == b'"':
            self._state = _State.IN_STRING
            self._string = b""
        elif first == b":":
            self._before = b'"role":' if self._before == b'"role"' else b""
        elif first in b"{[":
            self._before = b""
            self._depth += 1
            self._state = _State.DEEPER
        else:
            self._depth = 0
            self.count += self._is_user
            self._state = _State.AFTER
        return stop + 1

    def _step_in_string(self, clean: bytes, position: int) -> int:
        end = clean.find(b'"', position)
        stop = len(clean) if end < 0 else end
        if len(self._string) < _KEPT:
            self._string += clean[position : min(stop, position + _KEPT - len(self._string))]
        if end < 0:
            return stop
        if self._before == b'"role":':
            self._is_user = self._string == _USER
            self._before = b""
        else:
            self._before = b'"role"' if self._string == _ROLE else b""
        self._state = _State.INSIDE
        return end + 1

    def _step_deeper(self, clean: bytes, position: int) -> int:
        match = NESTED.match(clean, position)
        if match is None:  # cannot be: the pattern matches the empty string too
            return len(clean)
        kind = match.lastindex
        stop = match.end()
        if kind == OPENING:
            self._depth += stop - match.start(OPENING)
        elif kind == CLOSING:
            stop = min(stop, match.start(CLOSING) + self._depth - 1)
            self._depth -= stop - match.start(CLOSING)
        elif kind == UNENDED:
            self._state = _State.IN_DEEP_STRING
        if self._depth == 1:
            self._state = _State.INSIDE
        return stop

    def _step_in_deep_string(self, clean: bytes, position: int) -> int:
        end = clean.find(b'"', position)
        if end < 0:
            return len(clean)
        self._state = _State.DEEPER
        return end + 1


_STEPS: Final = (
    UserMessages._step_between,
    UserMessages._step_after,
    UserMessages._step_inside,
    UserMessages._step_in_string,
    UserMessages._step_deeper,
    UserMessages._step_in_deep_string,
)
