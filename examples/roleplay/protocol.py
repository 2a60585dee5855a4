"""The messages between the API process and an engine process, and how they are framed."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct("<I")
MAX_MESSAGE: Final = 1 << 24


class Generate(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """API to engine: compute. `prompt` is little-endian 16-bit tokens; with `max_tokens` more it fits the context."""

    number: int
    prompt: bytes
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    may_end: bool


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """API to engine: compute no more of this. `stopped`: its text is complete; otherwise nobody waits for it."""

    number: int
    stopped: bool


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Engine to API, once: the model is in memory."""

    parameters: int


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A request that the engine is done with. Times are seconds on the engine's own clock; None was never reached."""

    number: int
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_s: float | None
    prefill_s: float | None
    decode_s: float | None


class Gauges(msgspec.Struct, frozen=True, array_like=True):
    """The engine's state after a step."""

    running: int
    waiting: int
    kv_used_ratio: float


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Engine to API: what one step gave. `tokens` are pairs (request number, token)."""

    computed_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    tokens: list[tuple[int, int]]
    finished: list[Finished]
    gauges: Gauges


class ProtocolError(Exception):
    """The other side sent what this protocol does not have."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Generate | Abort | Ready | Step) -> bytes:
    """Return `message` as a frame: its length in 4 bytes, then msgpack."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the bodies that `data` completes. Raises ProtocolError for one above `MAX_MESSAGE` bytes."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes; the limit is {MAX_MESSAGE}")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            bodies.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return bodies
