"""What is known of one request once it is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Capture(Enum):
    """How much of a request was seen. The value is the label value of `footlight_capture_total{outcome}`.

    One request has one outcome: where several fit, the one that took the most of the truth away.
    """

    complete = "complete"
    arrival_unseen = "arrival_unseen"  # its bytes were first seen when the service read them
    start_unseen = "start_unseen"  # it was under way already when the agent attached
    model_unseen = "model_unseen"  # the request named no model that could be read
    end_unseen = "end_unseen"  # the agent stopped following before the response ended, or was not told of its end
    undecodable = "undecodable"  # its bytes were no HTTP, SSE or JSON that a decoder accepts
    lost_events = "lost_events"  # a record of it was lost on the way from the kernel


class Failure(Enum):
    """Why a request failed on the service's side. The value is the label value of `reason`."""

    client_error = "client_error"  # 4xx but 429
    rate_limited = "rate_limited"  # 429
    server_error = "server_error"  # 5xx, or an error frame in the stream
    cut_off = "cut_off"  # the server closed before the response was complete


class Phase(Enum):
    """Where a request stood when its client left. The value is the label value of `phase`."""

    waiting = "waiting"  # before the first token
    streaming = "streaming"  # after it


@dataclass(frozen=True, slots=True)
class Causes:
    """Where the time of a request went: nanoseconds by cause (the value of `Cause`), those above zero.

    The parts of `ttft` add up to first_token - arrived, those of `decode` to last_token - first_token; `decode` is
    empty where that phase was not followed.
    """

    ttft: Mapping[str, int]
    decode: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request from its arrival to its end.

    Instants are CLOCK_MONOTONIC in nanoseconds, defined in the semantics page; None is "never happened, or not seen".
    `arrived_ns` equals `read_ns` where the arrival was not seen. Token counts are the response's own; None is "it did
    not say". Names are as they came over the wire: whoever prints or labels them makes them safe.
    """

    number: int  # counts the requests of this agent, from 1
    service: str
    model: str | None
    api: str
    extra: tuple[str, ...]  # values of the configured labels, in their order
    streamed: bool
    status: int | None
    arrived_ns: int
    read_ns: int
    first_byte_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    finished_ns: int  # where the end was not seen, the last write that was
    frames: int  # frames with content
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    wasted_tokens: int  # generated after the client had left
    longest_gap_ns: int | None
    failure: Failure | None
    aborted: Phase | None
    end_seen: bool  # else neither how it ended nor how long it took is known
    capture: Capture
    method: str
    target: str  # the path only; a query string may hold secrets
    peer: str
    tgid: int
    tid: int
    causes: Causes | None = None  # None: it has no path
    turn: int | None = None  # messages of the user in its conversation; None: not known, or it has none
