"""Finished requests for tests to vary: everything about them is known."""

from __future__ import annotations

from dataclasses import replace

from exporter.request import Capture, FinishedRequest

MS = 1_000_000

REQUEST = FinishedRequest(
    number=1,
    service="roleplay",
    model="bard",
    api="chat_completions",
    extra=(),
    streamed=True,
    status=200,
    arrived_ns=0,
    read_ns=2 * MS,
    first_byte_ns=3 * MS,
    first_token_ns=53 * MS,
    last_token_ns=153 * MS,
    finished_ns=157 * MS,
    frames=11,
    prompt_tokens=None,
    completion_tokens=None,
    cached_tokens=None,
    wasted_tokens=0,
    longest_gap_ns=10 * MS,
    failure=None,
    aborted=None,
    end_seen=True,
    capture=Capture.complete,
    method="POST",
    target="/v1/chat/completions",
    peer="127.0.0.1:40000",
    tgid=101,
    tid=103,
)
"""Read after 2 ms, first token after 53 ms, 11 frames 10 ms apart, finished at 157 ms. Its answer had no usage."""

TOLD = replace(
    REQUEST,
    model="headliner",
    first_byte_ns=5 * MS,
    first_token_ns=100 * MS,
    last_token_ns=338 * MS,
    finished_ns=340 * MS,
    frames=101,
    prompt_tokens=312,
    completion_tokens=103,
    cached_tokens=256,
    longest_gap_ns=12 * MS,
)
"""A longer one, whose answer told its usage."""


def later(request: FinishedRequest, ns: int) -> FinishedRequest:
    """The same request, with each of its instants `ns` later."""

    def moved(at_ns: int | None) -> int | None:
        return None if at_ns is None else at_ns + ns

    return replace(
        request,
        arrived_ns=request.arrived_ns + ns,
        read_ns=request.read_ns + ns,
        first_byte_ns=moved(request.first_byte_ns),
        first_token_ns=moved(request.first_token_ns),
        last_token_ns=moved(request.last_token_ns),
        finished_ns=request.finished_ns + ns,
    )
