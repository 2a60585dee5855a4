"""Reads what a client heard: when each frame with content was there.

Written for the benchmarks' own services and without any code of the agent's, so that the two can disagree.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, pairwise

from benchmarks.common.client import Heard


@dataclass(frozen=True, slots=True)
class Transcript:
    """One streamed response, in ns of CLOCK_MONOTONIC: `content_ns` has one instant for each frame with content.

    A frame is there when its last byte is.
    """

    number: int
    lane: int
    port: int
    model: str
    sent_ns: int
    content_ns: tuple[int, ...]
    finished_ns: int
    completion_tokens: int | None

    @property
    def ttft_ns(self) -> int:
        """Time to first token."""
        return self.content_ns[0] - self.sent_ns

    @property
    def gaps_ns(self) -> list[int]:
        """Times between frames with content."""
        return [later - earlier for earlier, later in pairwise(self.content_ns)]

    @property
    def duration_ns(self) -> int:
        """From the request to the response's last byte."""
        return self.finished_ns - self.sent_ns


def transcribe(heard: Heard) -> Transcript:
    """Read a complete chunked event stream. Raises ValueError where it is not one."""
    raw = b"".join(data for _, data in heard.pieces)
    ends = list(accumulate(len(data) for _, data in heard.pieces))
    body, places = _dechunked(raw)
    content: list[int] = []
    model, tokens = "", None
    start = 0
    while (end := body.find(b"\n\n", start)) >= 0:
        event = body[start:end]
        start = end + 2
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            continue
        frame = json.loads(event[6:])
        model = frame.get("model", model)
        usage = frame.get("usage")
        if usage:
            tokens = usage["completion_tokens"]
        if any(_text(choice) for choice in frame["choices"]):
            last_byte = _place(places, start - 1)
            content.append(heard.pieces[bisect_left(ends, last_byte + 1)][0])
    if start != len(body):
        raise ValueError(f"{len(body) - start} bytes after the last event")
    return Transcript(
        heard.number, heard.lane, heard.port, model, heard.sent_ns, tuple(content), heard.pieces[-1][0], tokens
    )


def _text(choice: dict[str, object]) -> object:
    delta = choice.get("delta")
    return delta.get("content") if isinstance(delta, dict) else choice.get("text")


def _dechunked(raw: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the body, and for each chunk (its offset in the body, its offset in `raw`)."""
    head, separator, _ = raw.partition(b"\r\n\r\n")
    if b"\r\ntransfer-encoding: chunked" not in head.lower():
        raise ValueError(f"not a chunked response: {head[:200]!r}")
    position = len(head) + len(separator)
    parts, places, length = [], [], 0
    while True:
        line_end = raw.index(b"\r\n", position)
        size = int(raw[position:line_end], 16)
        position = line_end + 2
        if not size:
            break
        places.append((length, position))
        parts.append(raw[position : position + size])
        length += size
        position += size + 2
    if raw[position:] != b"\r\n":
        raise ValueError(f"{len(raw) - position} bytes after the last chunk")
    return b"".join(parts), places


def _place(places: list[tuple[int, int]], offset: int) -> int:
    """Where a byte of the body is in what was received."""
    chunk = bisect_left(places, (offset + 1, 0)) - 1
    in_body, in_raw = places[chunk]
    return in_raw + offset - in_body
