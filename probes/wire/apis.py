"""The APIs that are understood: which one a request asks for, how its frames are read, what its bodies say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import ClassVar, Final

from probes.wire.anthropic import messages_usage, parse_messages
from probes.wire.frames import Frame, Usage, decode_string, loads, safe_model
from probes.wire.json_scan import TopLevelScanner
from probes.wire.openai import completion_usage, native_usage, parse_chat, parse_text
from probes.wire.responses import parse_response, response_usage


class Api(Enum):
    """The APIs that are understood. The values are those of the `api` label: the end of the path in snake case."""

    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    COMPLETION = "completion"  # llama.cpp's own
    MESSAGES = "messages"
    RESPONSES = "responses"


ParseFrame = Callable[[bytes], Frame | None]

_PARSERS: Final[Mapping[Api, ParseFrame]] = {
    Api.CHAT_COMPLETIONS: parse_chat,
    Api.COMPLETIONS: parse_text,
    Api.COMPLETION: parse_text,
    Api.MESSAGES: parse_messages,
    Api.RESPONSES: parse_response,
}
# The member of a request that holds the conversation.
_CONVERSATION: Final[Mapping[Api, str]] = {
    Api.CHAT_COMPLETIONS: "messages",
    Api.MESSAGES: "messages",
    Api.RESPONSES: "input",
}
# With one of these the server holds the conversation so far, and the request only what is new.
_ELSEWHERE: Final = ("previous_response_id", "conversation")


def api_of(method: bytes, target: bytes) -> Api | None:
    """Tell which API a request line asks for: POST, and the end of the path decides. None: none of them.

    `/messages` and `/responses` are names that other services use too, so more of the path is asked for there.
    """
    if method != b"POST":
        return None
    path = target.partition(b"?")[0]
    if path.endswith(b"/chat/completions"):
        return Api.CHAT_COMPLETIONS
    if path.endswith(b"/completions"):
        return Api.COMPLETIONS
    if path.endswith(b"/completion"):
        return Api.COMPLETION
    if path.endswith(b"/v1/messages"):
        return Api.MESSAGES
    if path == b"/responses" or path.endswith((b"/v1/responses", b"/openai/responses")):
        return Api.RESPONSES
    return None


def parser_of(api: Api) -> ParseFrame:
    """The function that reads one frame of an answer: the data of one server-sent event, see `Frame`.

    It gives None for what is no frame of the API, and never raises.
    """
    return _PARSERS[api]


class _JsonBody:
    """What requests and responses share: a scanner that is fed, and the model."""

    __slots__ = ("_api", "_finished", "_scanner")

    def __init__(self, api: Api, scanner: TopLevelScanner) -> None:
        self._api = api
        self._scanner = scanner
        self._finished = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Never raises."""
        self._scanner.feed(data)

    def gap(self) -> None:
        """Say that bytes of the body were not captured here: what was found before stays, nothing more is found."""
        self._scanner.gap()

    def finish(self) -> None:
        """Say that the body is complete."""
        self._finished = True

    @property
    def model(self) -> str | None:
        """The model's name, safe as a label value; None where it was not found (yet)."""
        return safe_model(self._scanner.values.get("model", b""))

    @property
    def broken(self) -> bool:
        """The body is not one JSON object: it has an error or a gap, or it was finished before its end."""
        return self._scanner.broken or (self._finished and not self._scanner.complete)


class RequestBody(_JsonBody):
    """Finds the model that a request asks for, whether it wants a stream, and how far its conversation has come.

    Memory: see `TopLevelScanner`. A model name of more bytes than that keeps is taken for none.
    """

    __slots__ = ()

    _KEYS: ClassVar[frozenset[str]] = frozenset(("model", "stream"))

    def __init__(self, api: Api) -> None:
        conversation = _CONVERSATION.get(api)
        keys = self._KEYS.union(_ELSEWHERE) if api is Api.RESPONSES else self._KEYS
        super().__init__(api, TopLevelScanner(keys, counted=conversation))

    @property
    def stream(self) -> bool:
        """Whether `stream` is true."""
        return self._scanner.values.get("stream") == b"true"

    @property
    def turn(self) -> int | None:
        """How many messages of the user the conversation has, the one to be answered included.

        None where it has none or the API has no conversation; where the body was not seen whole; and where the server
        holds what came before.
        """
        scanner = self._scanner
        if not scanner.complete:
            return None
        if scanner.oversize.intersection(_ELSEWHERE):
            return None
        if any(scanner.values.get(key, b"null") != b"null" for key in _ELSEWHERE):
            return None
        return scanner.count or None


class ResponseBody(_JsonBody):
    """Finds model, usage and error in the body of a response that is not streamed. Memory: see `TopLevelScanner`."""

    __slots__ = ()

    _KEYS: ClassVar[frozenset[str]] = frozenset(("model", "usage", "error", "object", "type"))
    _TEXT_KEYS: ClassVar[frozenset[str]] = frozenset(("timings", "tokens_evaluated", "tokens_predicted"))

    def __init__(self, api: Api) -> None:
        more = api not in (Api.MESSAGES, Api.RESPONSES)
        super().__init__(api, TopLevelScanner(self._KEYS | self._TEXT_KEYS if more else self._KEYS))

    @property
    def usage(self) -> Usage | None:
        """The usage, where the body has one."""
        usage = self._value("usage")
        if self._api is Api.MESSAGES:
            return messages_usage(usage)
        if self._api is Api.RESPONSES:
            return response_usage(usage)
        known = completion_usage(usage, self._value("timings"))
        if self._api is Api.CHAT_COMPLETIONS:
            return known
        return native_usage({name: self._value(name) for name in ("tokens_evaluated", "tokens_predicted")}, known)

    @property
    def error(self) -> bool:
        """Whether the body is an error: a top-level `error` that is not null, or an object or type of that name."""
        values = self._scanner.values
        if "error" in self._scanner.oversize or values.get("error", b"null") != b"null":
            return True
        return "error" in (decode_string(values.get("object", b"")), decode_string(values.get("type", b"")))

    def _value(self, name: str) -> object:
        return loads(self._scanner.values.get(name, b"null"))
