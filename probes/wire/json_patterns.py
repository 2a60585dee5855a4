"""Patterns that pass over JSON text quickly. They work on text whose escapes were blotted out, see `json_scan`."""

from __future__ import annotations

import re
from typing import Final

SPACE: Final = re.compile(rb"[ \t\r\n]*")

# Everything in a container, and then brackets that have to be counted or a string that does not end yet. Whole strings,
# and containers without containers in them, are passed by the pattern itself. Repeats of a group are bounded, because
# the matcher remembers each, and not possessive, because CPython before 3.11.5 loses its place in those (gh-106052);
# repeats of a single character are.
PLAIN: Final = rb'(?:[^"\[\]{}]++|"[^"]*+"){0,255}'
FLAT: Final = rb"\{" + PLAIN + rb"\}|\[" + PLAIN + rb"\]"
NESTED: Final = re.compile(rb'(?:[^"\[\]{}]++|"[^"]*+"|' + FLAT + rb'){0,255}(?:([\[{]++)|([\]}]++)|("))?')
OPENING: Final = 1
"""The group of `NESTED` that matched, where it stopped at brackets that open."""
CLOSING: Final = 2
"""The same of brackets that close."""
UNENDED: Final = 3
"""The same of a string that does not end."""


def end_of(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    """Return where a match that may be empty ends."""
    match = pattern.match(data, position)
    return position if match is None else match.end()
