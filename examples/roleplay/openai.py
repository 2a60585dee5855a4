"""OpenAI's API as bytes: which requests are understood, and how replies, frames and errors are written."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec

from examples.roleplay.errors import ApiError
from examples.roleplay.tokens import ROLES

MAX_BODY: Final = 1 << 20
DEFAULT_MAX_TOKENS: Final = 1024
DONE: Final = b"data: [DONE]\n\n"

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Stops = Annotated[list[StopText], msgspec.Meta(max_length=16)]


class TextPart(msgspec.Struct, frozen=True):
    """One part of a message. Only text is understood."""

    type: str
    text: str = ""


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The words of the turn. Raises ApiError 422 for a part that is not text."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type != "text":
                raise ApiError(422, f"Content of type `{part.type}` is not understood, only `text`.", param="messages")
        return "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries beside its text."""

    include_usage: bool = False


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request have. Fields that are not listed are ignored, as OpenAI-compatible engines do.

    `ignore_eos` is vLLM's: generate up to `max_tokens` whatever the model says.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    seed: Seed | None = None
    stop: StopText | Stops | None = None
    ignore_eos: bool = False
    n: int | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end the reply."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a frame of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common, frozen=True, kw_only=True):
    """Body of /v1/chat/completions. `persona` is this service's own: a character from /v1/personas."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    persona: str | None = None
    logprobs: bool | None = None

    def turns(self) -> list[tuple[str, str]]:
        """Return (role, text) of the messages. Raises ApiError 422 for a role or content that is not understood."""
        for message in self.messages:
            if message.role not in ROLES:
                known = ", ".join(sorted(ROLES))
                raise ApiError(422, f"`{message.role[:64]}` is not a role. Roles are {known}.", param="messages")
        return [(message.role, message.text) for message in self.messages]


class CompletionRequest(Common, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]
    logprobs: int | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


_Request = TypeVar("_Request", ChatRequest, CompletionRequest)


def parse(kind: type[_Request], body: bytes) -> _Request:
    """Return the request in `body`. Raises ApiError: 400 where it is not JSON, 422 where it is not such a request."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        _, _, path = message.partition(" - at `$.")
        raise ApiError(422, message, param=path.rstrip("`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    if request.n not in (None, 1):
        raise ApiError(422, "Only one reply per request is made: `n` must be 1.", param="n")
    if request.logprobs not in (None, False):
        raise ApiError(422, "Probabilities are not reported: leave out `logprobs`.", param="logprobs")
    return request


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        """Return the usage of `prompt` tokens, `cached` of them from the prefix cache, and `completion` tokens."""
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached))


class Form:
    """How one reply is written. `frame` is the hot path: everything but the text is made once."""

    def __init__(self, model: str, *, chat: bool, null_usage: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        # OpenAI's streams that end with usage carry "usage": null in every other frame.
        self._tail = {"usage": None} if null_usage else {}
        mark = "<text>"
        before, _, after = self._event({"delta": {"content": mark}} if chat else {"text": mark}, None).partition(
            b'"<text>"'
        )
        self._before, self._after = before, after

    def frame(self, text: str) -> bytes:
        """Return the event that carries `text`."""
        return self._before + msgspec.json.encode(text) + self._after

    def role(self) -> bytes:
        """Return the first event of a chat stream: who speaks, and no text."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None)

    def end(self, reason: str) -> bytes:
        """Return the event that says why the reply ends."""
        return self._event({"delta": {}} if self._chat else {"text": ""}, reason)

    def usage(self, usage: Usage) -> bytes:
        """Return the event after the last choice that carries `usage`."""
        return _data(self._head | {"choices": [], "usage": usage})

    def whole(self, text: str, reason: str, usage: Usage) -> bytes:
        """Return the body of a reply that is not streamed."""
        said: dict[str, object] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        kind = {"object": "chat.completion"} if self._chat else {}
        return msgspec.json.encode(self._head | kind | {"choices": [choice], "usage": usage})

    def _event(self, said: Mapping[str, object], reason: str | None) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return _data(self._head | {"choices": [choice]} | self._tail)


def error_body(error: ApiError) -> bytes:
    """Return `error` as OpenAI writes it."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_event(error: ApiError) -> bytes:
    """Return `error` as an event, for a stream whose status was sent long ago."""
    return b"data: " + error_body(error) + b"\n\n"


def _data(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
