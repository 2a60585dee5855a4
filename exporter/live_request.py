"""One request while it is under way: its instants, and what its bytes say that the SLIs need.

What each instant and outcome means is defined in docs/semantics.md. What a user feels is recorded as it happens (first
token, each gap), the rest when the request is over. Nothing here keeps text: a frame is looked at and dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.request import Capture, Failure, FinishedRequest, Phase
from probes.wire.apis import Api, ParseFrame, RequestBody, ResponseBody, parser_of
from probes.wire.sse import SseDecoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from exporter.slis import Series, Slis
    from probes.wire.frames import Usage
    from probes.wire.http1 import ResponseHead

_RATE_LIMITED: Final = 429
_NO_CONTENT: Final = 204
_MILD: Final = (Capture.complete, Capture.arrival_unseen)


class Request:
    """One request of a connection. Instants are CLOCK_MONOTONIC ns; None is "not yet", or "not seen".

    Until `follow` it is any HTTP request, which only stands in the connection's queue: `api` is None, and whatever is
    said to it but its method, status and instants is ignored. `finish` is for requests that are followed.
    """

    __slots__ = (
        "_body",
        "_cached_tokens",
        "_capture",
        "_completion_tokens",
        "_done_ns",
        "_error",
        "_first_token_ns",
        "_first_token_tid",
        "_frames",
        "_gap",
        "_last_token_ns",
        "_last_token_tid",
        "_longest_gap_ns",
        "_on_first_token",
        "_parse",
        "_prompt_tokens",
        "_response_body",
        "_series",
        "_slis",
        "_sse",
        "_streamed",
        "_target",
        "_turn",
        "_wants_stream",
        "_wasted",
        "api",
        "arrived_ns",
        "end_seen",
        "extra",
        "first_byte_ns",
        "last_write_ns",
        "method",
        "model",
        "number",
        "peer",
        "read_ns",
        "service",
        "status",
        "tgid",
        "tid",
        "writer_tid",
    )

    def __init__(self, arrived_ns: int | None, read_ns: int, tgid: int, tid: int, peer: str = "") -> None:
        """A request of `peer` whose first byte was read at `read_ns` by thread `tid` of process `tgid`."""
        self.arrived_ns = read_ns if arrived_ns is None else arrived_ns
        self.read_ns = read_ns
        self.tgid = tgid
        self.tid = tid
        self.peer = peer
        self.writer_tid = tid  # thread that wrote to its connection last
        self.method = b""
        self.status: int | None = None
        self.first_byte_ns: int | None = None
        self.last_write_ns = read_ns
        self.end_seen = True  # as long as nothing says that it was missed
        self.api: Api | None = None
        self.model: str | None = None
        self.service = ""
        self.extra: tuple[str, ...] = ()
        self._capture = Capture.arrival_unseen if arrived_ns is None else Capture.complete
        self._slis: Slis | None = None
        self._series: Series | None = None
        self.number = 0
        self._on_first_token: Callable[[Request], None] | None = None
        self._target = ""
        self._body: RequestBody | None = None
        self._turn: int | None = None
        self._parse: ParseFrame | None = None
        self._streamed = False
        self._wants_stream = False
        self._sse: SseDecoder | None = None
        self._response_body: ResponseBody | None = None
        self._first_token_ns: int | None = None
        self._last_token_ns: int | None = None
        self._first_token_tid = tid
        self._last_token_tid = tid
        self._longest_gap_ns: int | None = None
        self._gap = False  # frames may be missing since the last one
        self._frames = 0
        self._wasted = 0
        self._done_ns: int | None = None  # it said that it was complete: [DONE] or the like, or why it ended
        self._error = False
        self._prompt_tokens: int | None = None
        self._completion_tokens: int | None = None
        self._cached_tokens: int | None = None

    def follow(
        self,
        api: Api,
        target: bytes,
        service: str,
        extra: tuple[str, ...],
        number: int,
        slis: Slis,
        on_first_token: Callable[[Request], None] | None = None,
    ) -> None:
        """Its head says that it is for an LLM: from here on its bytes are looked at."""
        self._on_first_token = on_first_token
        self.api = api
        self.service = service
        self.extra = extra
        self.number = number
        # A query string may hold secrets.
        self._target = target.partition(b"?")[0].decode("latin-1")
        self._slis = slis
        self._body = RequestBody(api)
        self._parse = parser_of(api)

    def spoil(self, capture: Capture) -> None:
        """Something of the request was not seen. The first loss that is worse than an unseen arrival stays."""
        if self._capture in _MILD:
            self._capture = capture

    @property
    def is_stream(self) -> bool:
        """Whether its answer is a stream of frames that can be read."""
        return self._sse is not None

    @property
    def first_token(self) -> tuple[int, int] | None:
        """When its first token was handed over and the thread that did it; None where that was not seen."""
        return None if self._first_token_ns is None else (self._first_token_ns, self._first_token_tid)

    @property
    def last_token(self) -> tuple[int, int] | None:
        """The same of its last token until now."""
        return None if self._last_token_ns is None else (self._last_token_ns, self._last_token_tid)

    @property
    def is_whole(self) -> bool:
        """Whether all of it was seen until now, from its first read on."""
        return self._capture in _MILD

    def awaits_first_token_since(self) -> int | None:
        """When it arrived, where it asks for a stream that has no frame yet and did not fail; else None."""
        waits = self._wants_stream and not self._frames and self._done_ns is None and not self._error
        return self.arrived_ns if waits and (self.status is None or _succeeded(self.status)) else None

    def longest_gap_by(self, now_ns: int) -> int | None:
        """The longest time without a token after its first one, the one that lasts at that instant included."""
        last_ns = self._last_token_ns
        if last_ns is None or self._done_ns is not None:
            return self._longest_gap_ns
        return max(now_ns - last_ns, self._longest_gap_ns or 0)

    def said_done(self, by_ns: int) -> bool:
        """Tell whether the answer had said by then that it was complete, as streams do before their last byte."""
        return self._done_ns is not None and self._done_ns <= by_ns

    # ---- what the client says ----

    def take_body(self, data: bytes) -> None:
        """Bytes of the request's body."""
        if self._body is not None:
            self._body.feed(data)

    def miss_body(self) -> None:
        """Some bytes of the request's body were not captured. The model may have been found before."""
        if self._body is not None:
            self._body.gap()

    def end_body(self) -> None:
        """The request's body is complete, or nothing more of it will be seen."""
        body = self._body
        if body is None:
            return
        self._body = None
        body.finish()
        self._turn = body.turn
        self._wants_stream = body.stream
        if self.model is None:
            self.model = body.model

    # ---- what the service answers ----

    def take_answer_head(self, head: ResponseHead) -> None:
        """The response's head: whether it is a stream."""
        self.status = head.status
        if self.api is None:
            return
        kind = head.headers.get(b"content-type", b"")
        self._streamed = kind.lower().startswith(b"text/event-stream")
        coding = head.headers.get(b"content-encoding", b"").lower()
        if coding not in (b"", b"identity"):
            if _succeeded(head.status):
                self.spoil(Capture.undecodable)  # compressed: no frame and no usage can be read
        elif self._streamed:
            self._sse = SseDecoder()
        else:
            self._response_body = ResponseBody(self.api)

    def take_answer(self, data: bytes, at_ns: int, client_left_ns: int | None) -> None:
        """Bytes of the response's body, handed over at `at_ns`."""
        if self._sse is not None:
            for payload in self._sse.feed(data):
                self._take_frame(payload, at_ns, client_left_ns)
        elif self._response_body is not None:
            self._response_body.feed(data)

    def miss_answer(self, why: Capture) -> None:
        """Some of the response's body is unknown: what a frame or the usage would have said is not said."""
        self.spoil(why)
        if self._sse is not None:
            self._sse = SseDecoder()
            self._gap = True
        elif self._response_body is not None:
            self._response_body.gap()

    def end_answer(self) -> bool:
        """Nothing more of the response comes. Returns whether what came says that it is whole."""
        if self._sse is not None:
            return self._done_ns is not None
        body = self._response_body
        if body is None:
            return True
        self._response_body = None
        body.finish()
        if body.usage is not None:
            self._take_usage(body.usage)
        if body.error:
            self._error = True
        if self.model is None:
            self.model = body.model
        return not (body.broken and _succeeded(self.status))

    def _take_frame(self, data: bytes, at_ns: int, client_left_ns: int | None) -> None:
        assert self._parse is not None
        frame = self._parse(data)
        if frame is None:
            self._take_riddle(data)
            return
        if frame.content:
            if self.model is None:
                self._find_model(frame.model)
            series = self._series or self.series()
            last = self._last_token_ns
            if self._gap:
                # What came before it, and when, is not known: it is neither the first token nor the end of a gap.
                self._gap = False
            elif last is None:
                self._first_token_ns = at_ns
                self._first_token_tid = self.writer_tid
                series.first_token(at_ns - self.arrived_ns, at_ns)
                if self._on_first_token is not None:
                    self._on_first_token(self)
            else:
                gap = at_ns - last  # below zero where two threads write at once: it is discarded, and counted
                series.gap(gap)
                longest = self._longest_gap_ns
                if gap >= 0 and (longest is None or gap > longest):
                    self._longest_gap_ns = gap
            self._last_token_ns = at_ns
            self._last_token_tid = self.writer_tid
            self._frames += 1
            series.frame()
            if client_left_ns is not None:
                self._wasted += 1
            self._done_ns = None  # one of several choices may have finished before
        if frame.finish or frame.done:
            self._done_ns = self._done_ns or at_ns
        if frame.usage is not None:
            self._take_usage(frame.usage)
        if frame.error:
            self._error = True
        if self.model is None:
            self.model = frame.model

    def _take_riddle(self, data: bytes) -> None:
        """Take a frame that says nothing; an empty one is a keep-alive, another may have been content."""
        if data.strip():
            self.spoil(Capture.undecodable)
            self._gap = True

    def _find_model(self, said: str | None) -> None:
        """The answer has begun: whatever names the model now has to do, for the series is chosen by it."""
        self.model = said if self._body is None else self._body.model or said

    def _take_usage(self, usage: Usage) -> None:
        """Remember the response's own counts; a later usage replaces an earlier one, for they are running totals.

        But not of the prompt, where it says less of it: Anthropic's first and last usage need not say the same.
        """
        if usage.prompt_tokens is not None and (usage.cached_tokens is not None or self._cached_tokens is None):
            self._prompt_tokens = usage.prompt_tokens
        if usage.completion_tokens is not None:
            self._completion_tokens = usage.completion_tokens
        if usage.cached_tokens is not None:
            self._cached_tokens = usage.cached_tokens

    # ---- the end ----

    def waste(self, wasted: bool) -> None:
        """Say whether what was handed over after the client had shut its side reached nobody."""
        if not wasted:
            self._wasted = 0
        elif not self._streamed:
            self._wasted = self._completion_tokens or 0

    def series(self) -> Series:
        """The series that counts it. Chosen once: when its first token is seen, or else when it is over."""
        if self._series is None:
            assert self.api is not None and self._slis is not None
            answered = self.status is not None and not 400 <= self.status < 500
            self._series = self._slis.series(self.service, self.model, self.api.value, self.extra, answered)
        return self._series

    def finish(self, ended_ns: int, *, aborted: bool = False, cut_off: bool = False) -> FinishedRequest:
        """It is over since `ended_ns`; `aborted`: because the client left then, `cut_off`: because the service did."""
        assert self.api is not None
        self.end_body()
        if self.said_done(ended_ns):
            aborted = cut_off = False  # everything but the framing's last bytes had been sent
        if self._sse is not None and self._sse.oversize:
            self.spoil(Capture.undecodable)
        if self.model is None:
            self.spoil(Capture.model_unseen)
        return FinishedRequest(
            number=self.number,
            service=self.service,
            model=self.model,
            api=self.api.value,
            extra=self.extra,
            streamed=self._streamed,
            status=self.status,
            arrived_ns=self.arrived_ns,
            read_ns=self.read_ns,
            first_byte_ns=self.first_byte_ns,
            first_token_ns=self._first_token_ns,
            last_token_ns=self._last_token_ns,
            finished_ns=max(ended_ns, self.arrived_ns),
            frames=self._frames,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens,
            wasted_tokens=self._wasted,
            longest_gap_ns=self._longest_gap_ns,
            failure=None if aborted else self._failure(cut_off),
            aborted=self._phase(ended_ns) if aborted else None,
            end_seen=self.end_seen,
            capture=self._capture,
            method=self.method.decode("latin-1"),
            target=self._target,
            peer=self.peer,
            tgid=self.tgid,
            tid=self.tid,
            turn=self._turn,
        )

    def _phase(self, left_ns: int) -> Phase:
        """Where it stood when the client left: tokens that were handed over after that were for nobody."""
        if self._first_token_ns is not None:
            return Phase.waiting if left_ns < self._first_token_ns else Phase.streaming
        return Phase.streaming if self._frames > self._wasted else Phase.waiting

    def _failure(self, cut_off: bool) -> Failure | None:
        status = self.status
        if status == _RATE_LIMITED:
            return Failure.rate_limited
        if status is not None and 400 <= status < 500:
            return Failure.client_error
        if (status is not None and status >= 500) or self._error:
            return Failure.server_error
        return Failure.cut_off if cut_off else None


def _succeeded(status: int | None) -> bool:
    """Tell whether an answer with this status has a body that says something."""
    return status is not None and 200 <= status < 300 and status != _NO_CONTENT
