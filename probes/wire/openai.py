"""Reads frames and usage of OpenAI's completions APIs, as many servers speak them, and of llama.cpp's own."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from probes.wire.frames import (
    DONE,
    MODEL_LIMIT,
    Frame,
    Usage,
    as_dict,
    as_list,
    count_of,
    filled,
    loads,
    safe_model,
    usage_of,
)

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
    content: str | None = None
    stop: bool | None = None


_decode_chat: Final = msgspec.json.Decoder(_ChatChunk).decode
_decode_text: Final = msgspec.json.Decoder(_TextChunk).decode


def parse_chat(data: bytes) -> Frame | None:
    """Read the data of one server-sent event of a chat completion.

    None when it is neither `[DONE]` nor a JSON object. Never raises.
    """
    if data == b"[DONE]":
        return DONE
    content = finish = False
    try:
        chunk = _decode_chat(data)
        for choice in chunk.choices or ():
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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse_chat_leniently(data)
    if not chunk.choices or chunk.error is not _NULL:
        return parse_chat_leniently(data)  # once a stream: usage alone, or an error in one of several shapes
    return _frame(chunk, content, finish)


def parse_text(data: bytes) -> Frame | None:
    """Read the data of one server-sent event of a text completion, OpenAI's or llama.cpp's own, which has no choices.

    None when it is neither `[DONE]` nor a JSON object. Never raises.
    """
    if data == b"[DONE]":
        return DONE
    content = finish = False
    try:
        chunk = _decode_text(data)
        for choice in chunk.choices or ():
            if choice.text:
                content = True
            if choice.finish_reason:
                finish = True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse_text_leniently(data)
    if chunk.error is not _NULL:
        return parse_text_leniently(data)
    if not chunk.choices:
        if chunk.choices is not None or chunk.content is None or chunk.stop is not False:
            return parse_text_leniently(data)  # once a stream, as above; or llama.cpp's last frame
        content = bool(chunk.content)
    return _frame(chunk, content, finish)


def _has_arguments(calls: list[_ToolCall]) -> bool:
    return any(call.function is not None and call.function.arguments for call in calls)


def _frame(chunk: _Chunk, content: bool, finish: bool) -> Frame:
    usage = None
    if chunk.usage is not _NULL or chunk.timings is not _NULL:
        usage = completion_usage(loads(bytes(chunk.usage)), loads(bytes(chunk.timings)))
    model = chunk.model
    if model is not None and not (model.isprintable() and 0 < len(model) <= MODEL_LIMIT):
        model = safe_model(model)
    return Frame(content, False, finish, False, usage, model)


def parse_chat_leniently(data: bytes) -> Frame | None:
    """`parse_chat` for a frame whose shape or text is unusual: 5 to 10 times slower, with the same answers."""
    if data.strip() == b"[DONE]":
        return DONE
    chunk = loads(data)
    if not isinstance(chunk, dict):
        return None
    choices = [choice for choice in as_list(chunk.get("choices")) if isinstance(choice, dict)]
    finish = any(filled(choice.get("finish_reason")) for choice in choices)
    return _lenient_frame(
        chunk,
        any(map(_chat_content, choices)),
        finish,
        completion_usage(chunk.get("usage"), chunk.get("timings")),
    )


def parse_text_leniently(data: bytes) -> Frame | None:
    """`parse_text` for a frame whose shape or text is unusual: 5 to 10 times slower, with the same answers."""
    if data.strip() == b"[DONE]":
        return DONE
    chunk = loads(data)
    if not isinstance(chunk, dict):
        return None
    usage = completion_usage(chunk.get("usage"), chunk.get("timings"))
    if chunk.get("choices") is None:
        stop = chunk.get("stop") is True
        if stop:
            usage = native_usage(chunk, usage)
        return _lenient_frame(chunk, filled(chunk.get("content")), stop, usage)
    choices = [choice for choice in as_list(chunk.get("choices")) if isinstance(choice, dict)]
    content = any(filled(choice.get("text")) for choice in choices)
    finish = any(filled(choice.get("finish_reason")) for choice in choices)
    return _lenient_frame(chunk, content, finish, usage)


def _lenient_frame(chunk: dict[str, Any], content: bool, finish: bool, usage: Usage | None) -> Frame:
    model = chunk.get("model")
    return Frame(
        content=content,
        done=False,
        finish=finish,
        error=chunk.get("error") is not None or chunk.get("object") == "error",
        usage=usage,
        model=safe_model(model) if isinstance(model, str) else None,
    )


def _chat_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    if any(filled(delta.get(name)) for name in ("content", "reasoning_content", "reasoning", "refusal")):
        return True
    calls = [call.get("function") for call in as_list(delta.get("tool_calls")) if isinstance(call, dict)]
    calls.append(delta.get("function_call"))
    return any(isinstance(call, dict) and filled(call.get("arguments")) for call in calls)


def completion_usage(usage: object, timings: object) -> Usage | None:
    """Read a `usage` object; llama.cpp's `timings` beside it fills what it lacks.

    The cached tokens have a name of their own in each family of servers: OpenAI, vLLM and SGLang; proxies for
    Anthropic's models; DeepSeek; Moonshot; llama.cpp.
    """
    fields, times = as_dict(usage), as_dict(timings)
    details = as_dict(fields.get("prompt_tokens_details"))
    prompt = count_of(fields.get("prompt_tokens"))
    completion = count_of(fields.get("completion_tokens"))
    cached = None
    for value in (
        details.get("cached_tokens"),
        fields.get("cache_read_input_tokens"),
        fields.get("prompt_cache_hit_tokens"),
        fields.get("cached_tokens"),
        times.get("cache_n"),
    ):
        cached = count_of(value)
        if cached is not None:
            break
    if completion is None:
        completion = count_of(times.get("predicted_n"))
    evaluated, reused = count_of(times.get("prompt_n")), count_of(times.get("cache_n"))
    if prompt is None and evaluated is not None and reused is not None:
        prompt = evaluated + reused
    return usage_of(prompt, completion, cached)


def native_usage(body: dict[str, Any], usage: Usage | None) -> Usage | None:
    """What llama.cpp's own API says beside its `timings`: `tokens_evaluated` is the whole prompt.

    Not its `tokens_cached`: that is what the slot holds when the answer is over, the answer included.
    """
    prompt, completion = count_of(body.get("tokens_evaluated")), count_of(body.get("tokens_predicted"))
    if usage is None:
        return usage_of(prompt, completion, None)
    return usage_of(
        prompt if usage.prompt_tokens is None else usage.prompt_tokens,
        completion if usage.completion_tokens is None else usage.completion_tokens,
        usage.cached_tokens,
    )
