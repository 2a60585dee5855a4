"""Reads what the SLIs need from the requests and responses of OpenAI's text APIs, as many servers speak them.

Text is never kept: of a frame's content only that there is some, of a body a model name and a few numbers.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, ClassVar, Final

import msgspec

from probes.wire.json_scan import TopLevelScanner

TOKENS_LIMIT: Final = 2**40
"""The most tokens that a usage may claim. A larger number is taken for no number."""
MODEL_LIMIT: Final = 256
"""Characters of a model name that are kept; the last is an ellipsis where there were more."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Api(Enum):
    """The APIs that are understood. The values are those of the `api` label."""

    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"


class Usage(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one request as the response itself counts them; None where it does not say.

    `cached_tokens` is the part of `prompt_tokens` that came from the prefix cache.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class Frame(msgspec.Struct, frozen=True, gc=False):
    """What one event of a streamed response says.

    `content`: it carries generated text (semantics.md, `first_token`). `done`: it is the `[DONE]` at the end.
    `finish`: a choice says why it ended. `error`: the server failed in the middle of the stream. `model` is safe as
    a label value.
    """

    content: bool
    done: bool
    finish: bool
    error: bool
    usage: Usage | None
    model: str | None


def api_of(method: bytes, target: bytes) -> Api | None:
    """Tell which API a request line asks for: POST, and the end of the path decides. None: neither of them."""
    if method != b"POST":
        return None
    path = target.partition(b"?")[0]
    if path.endswith(b"/chat/completions"):
        return Api.CHAT_COMPLETIONS
    if path.endswith(b"/completions"):
        return Api.COMPLETIONS
    return None


def safe_model(raw: bytes | str) -> str | None:
    """Make a model name fit for a label and a terminal; None where there is none.

    `raw` is the name, or, as bytes, the JSON value that holds it. What is not printable (control characters, lone
    surrogates, marks that turn the writing direction) becomes U+FFFD. At most `MODEL_LIMIT` characters.
    """
    name = _decode_string(raw) if isinstance(raw, bytes) else raw
    if not name:
        return None
    if len(name) > MODEL_LIMIT:
        name = name[: MODEL_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if name.isprintable():
        return name
    return "".join(char if char.isprintable() else _REPLACEMENT for char in name)


# Only what is needed is declared, so that the decoder passes over the rest. What servers disagree about stays raw.
_NULL: Final = msgspec.Raw(b"null")


class _Function(msgspec.Struct, gc=False):
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    function: _Function | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _ChatChoice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _TextChoice(msgspec.Struct, gc=False):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    model: str | None = None
    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL
    timings: msgspec.Raw = _NULL


class _ChatChunk(_Chunk, gc=False):
    choices: list[_ChatChoice] | None = None


class _TextChunk(_Chunk, gc=False):
    choices: list[_TextChoice] | None = None


_DONE: Final = Frame(content=False, done=True, finish=False, error=False, usage=None, model=None)
_CHAT: Final = Api.CHAT_COMPLETIONS
_decode_chat: Final = msgspec.json.Decoder(_ChatChunk).decode
_decode_text: Final = msgspec.json.Decoder(_TextChunk).decode


def parse_frame(api: Api, data: bytes) -> Frame | None:
    """Read the data of one server-sent event; None when it is neither `[DONE]` nor a JSON object. Never raises."""
    if data == b"[DONE]":
        return _DONE
    content = finish = False
    chunk: _ChatChunk | _TextChunk
    try:
        if api is _CHAT:
            chunk = chat = _decode_chat(data)
            for choice in chat.choices or ():
                delta = choice.delta
                if delta is not None and (
                    delta.content
                    or delta.reasoning_content
                    or delta.reasoning
                    or delta.refusal
                    or (delta.tool_calls and _has_arguments(delta.tool_calls))
                    or (delta.function_call is not None and delta.function_call.arguments)
                ):
                    content = True
                if choice.finish_reason:
                    finish = True
        else:
            chunk = text = _decode_text(data)
            for part in text.choices or ():
                if part.text:
                    content = True
                if part.finish_reason:
                    finish = True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_leniently(api, data)
    if not chunk.choices or chunk.error is not _NULL:
        return _parse_leniently(api, data)  # once a stream: usage alone, or an error in one of several shapes
    usage = None
    if chunk.usage is not _NULL or chunk.timings is not _NULL:
        usage = _usage(_loads(bytes(chunk.usage)), _loads(bytes(chunk.timings)))
    model = chunk.model
    if model is not None and not (model.isprintable() and 0 < len(model) <= MODEL_LIMIT):
        model = safe_model(model)
    return Frame(content, False, finish, False, usage, model)


def _has_arguments(calls: list[_ToolCall]) -> bool:
    return any(call.function is not None and call.function.arguments for call in calls)


class _JsonBody:
    """What requests and responses share: a scanner that is fed, and the model."""

    __slots__ = ("_finished", "_scanner")

    _KEYS: ClassVar[frozenset[str]]

    def __init__(self) -> None:
        self._scanner = TopLevelScanner(self._KEYS)
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
    """Finds the model that a request asks for, and whether it wants a stream, in the bytes of the request's body.

    Memory: see `TopLevelScanner`. A model name of more bytes than that keeps is taken for none.
    """

    __slots__ = ()

    _KEYS = frozenset(("model", "stream"))

    @property
    def stream(self) -> bool:
        """Whether `stream` is true."""
        return self._scanner.values.get("stream") == b"true"


class ResponseBody(_JsonBody):
    """Finds model, usage and error in the body of a response that is not streamed. Memory: see `TopLevelScanner`."""

    __slots__ = ()

    _KEYS = frozenset(("model", "usage", "timings", "error", "object"))

    @property
    def usage(self) -> Usage | None:
        """The usage, where the body has one."""
        values = self._scanner.values
        return _usage(_loads(values.get("usage", b"null")), _loads(values.get("timings", b"null")))

    @property
    def error(self) -> bool:
        """Whether the body is an error: a top-level `error` that is not null, or `"object": "error"`."""
        values = self._scanner.values
        if "error" in self._scanner.oversize or values.get("error", b"null") != b"null":
            return True
        return _decode_string(values.get("object", b"")) == "error"


_LENIENT_LIMIT: Final = 64 * 1024  # bytes; json.loads makes objects of everything, up to 30 times the size of the text


def _parse_leniently(api: Api, data: bytes) -> Frame | None:
    """Read a frame whose shape or text is unusual: 5 to 10 times slower, with the same answers."""
    if data.strip() == b"[DONE]":
        return _DONE
    chunk = _loads(data)
    if not isinstance(chunk, dict):
        return None
    choices = [choice for choice in _list(chunk.get("choices")) if isinstance(choice, dict)]
    has_content = _chat_content if api is _CHAT else _text_content
    model = chunk.get("model")
    return Frame(
        content=any(map(has_content, choices)),
        done=False,
        finish=any(_filled(choice.get("finish_reason")) for choice in choices),
        error=chunk.get("error") is not None or chunk.get("object") == "error",
        usage=_usage(chunk.get("usage"), chunk.get("timings")),
        model=safe_model(model) if isinstance(model, str) else None,
    )


def _chat_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    if any(_filled(delta.get(name)) for name in ("content", "reasoning_content", "reasoning", "refusal")):
        return True
    calls = [call.get("function") for call in _list(delta.get("tool_calls")) if isinstance(call, dict)]
    calls.append(delta.get("function_call"))
    return any(isinstance(call, dict) and _filled(call.get("arguments")) for call in calls)


def _text_content(choice: dict[str, Any]) -> bool:
    return _filled(choice.get("text"))


def _filled(value: object) -> bool:
    """Tell whether a value is text, or a list of parts of a text, and not empty."""
    return isinstance(value, str | list) and len(value) > 0


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _usage(usage: object, timings: object) -> Usage | None:
    """Read a `usage` object; llama.cpp's `timings` beside it fills what it lacks.

    The cached tokens have a name of their own in each family of servers: OpenAI, vLLM and SGLang; proxies for
    Anthropic's models; DeepSeek; Moonshot; llama.cpp.
    """
    fields = usage if isinstance(usage, dict) else {}
    times = timings if isinstance(timings, dict) else {}
    details = fields.get("prompt_tokens_details")
    prompt = _count(fields.get("prompt_tokens"))
    completion = _count(fields.get("completion_tokens"))
    cached = None
    for value in (
        details.get("cached_tokens") if isinstance(details, dict) else None,
        fields.get("cache_read_input_tokens"),
        fields.get("prompt_cache_hit_tokens"),
        fields.get("cached_tokens"),
        times.get("cache_n"),
    ):
        cached = _count(value)
        if cached is not None:
            break
    if completion is None:
        completion = _count(times.get("predicted_n"))
    evaluated, reused = _count(times.get("prompt_n")), _count(times.get("cache_n"))
    if prompt is None and evaluated is not None and reused is not None:
        prompt = evaluated + reused
    if cached is not None and prompt is not None and cached > prompt:
        cached = None  # more hits than look-ups: one of the two is wrong, and a ratio above 1 would be
    if prompt is None and completion is None and cached is None:
        return None
    return Usage(prompt, completion, cached)


def _count(value: object) -> int | None:
    """Return a number of tokens, None for whatever is not one: bool is an int to Python, but not here."""
    if type(value) is int and 0 <= value <= TOKENS_LIMIT:
        return value
    return None


def _loads(text: bytes) -> object:
    """Decode JSON leniently: NaN, lone surrogates, bad UTF-8, long numbers. None where it cannot be done in bounds."""
    if len(text) > _LENIENT_LIMIT:
        return None
    try:
        return _decode_leniently(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _parse_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= 20 else None  # int() itself raises above 4,300 digits


_decode_leniently: Final = json.JSONDecoder(parse_int=_parse_int).decode


def _decode_string(raw: bytes) -> str | None:
    value = _loads(raw)
    return value if isinstance(value, str) else None
