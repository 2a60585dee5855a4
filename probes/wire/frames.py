"""What a frame of a stream and a usage say, whatever the API; and how JSON is read leniently, in bounds.

Text is never kept: of a frame's content only that there is some, of a body a model name and a few numbers.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

TOKENS_LIMIT: Final = 2**40
"""The most tokens that a usage may claim. A larger number is taken for no number."""
MODEL_LIMIT: Final = 256
"""Characters of a model name that are kept; the last is an ellipsis where there were more."""
LENIENT_LIMIT: Final = 64 * 1024
"""Bytes that are read leniently: json.loads makes objects of everything, up to 30 times the size of the text."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Usage(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one request as the response itself counts them; None where it does not say.

    `cached_tokens` is the part of `prompt_tokens` that came from the prefix cache.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class Frame(msgspec.Struct, frozen=True, gc=False):
    """What one event of a streamed response says.

    `content`: it carries generated text (semantics.md, `first_token`). `done`: it says that the stream is at its end,
    as `[DONE]` does. `finish`: it says why the generation ended. `error`: the server failed in the middle of the
    stream. `model` is safe as a label value.
    """

    content: bool
    done: bool
    finish: bool
    error: bool
    usage: Usage | None
    model: str | None


DONE: Final = Frame(content=False, done=True, finish=False, error=False, usage=None, model=None)
"""What `[DONE]` says."""


def safe_model(raw: bytes | str) -> str | None:
    """Make a model name fit for a label and a terminal; None where there is none.

    `raw` is the name, or, as bytes, the JSON value that holds it. What is not printable (control characters, lone
    surrogates, marks that turn the writing direction) becomes U+FFFD. At most `MODEL_LIMIT` characters.
    """
    name = decode_string(raw) if isinstance(raw, bytes) else raw
    if not name:
        return None
    if len(name) > MODEL_LIMIT:
        name = name[: MODEL_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if name.isprintable():
        return name
    return "".join(char if char.isprintable() else _REPLACEMENT for char in name)


def usage_of(prompt: int | None, completion: int | None, cached: int | None) -> Usage | None:
    """Put a usage together; None where it would say nothing.

    More hits than look-ups are no hits: one of the two is wrong, and a ratio above 1 would be.
    """
    if cached is not None and prompt is not None and cached > prompt:
        cached = None
    if prompt is None and completion is None and cached is None:
        return None
    return Usage(prompt, completion, cached)


def count_of(value: object) -> int | None:
    """Return a number of tokens, None for whatever is not one: bool is an int to Python, but not here."""
    if type(value) is int and 0 <= value <= TOKENS_LIMIT:
        return value
    return None


def filled(value: object) -> bool:
    """Tell whether a value is text, or a list of parts of a text, and not empty."""
    return isinstance(value, str | list) and len(value) > 0


def as_list(value: object) -> list[Any]:
    """Return a list as it is, and an empty one for whatever is none."""
    return value if isinstance(value, list) else []


def as_dict(value: object) -> dict[str, Any]:
    """Return an object as it is, and an empty one for whatever is none."""
    return value if isinstance(value, dict) else {}


def loads(text: bytes) -> object:
    """Decode JSON leniently: NaN, lone surrogates, bad UTF-8, long numbers. None where it cannot be done in bounds."""
    if len(text) > LENIENT_LIMIT:
        return None
    try:
        return _decode_leniently(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def decode_string(raw: bytes) -> str | None:
    """Decode a JSON string leniently; None for any other value."""
    value = loads(raw)
    return value if isinstance(value, str) else None


def _parse_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= 20 else None  # int() itself raises above 4,300 digits


_decode_leniently: Final = json.JSONDecoder(parse_int=_parse_int).decode
