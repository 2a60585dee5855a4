"""Byte tokens: how text and chat turns become token numbers, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint16]

BEGIN: Final = 256
SYSTEM: Final = 257
USER: Final = 258
ASSISTANT: Final = 259
END: Final = 260
VOCABULARY: Final = 261

_ROLE_MARKS: Final = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "tool": USER,
    "assistant": ASSISTANT,
}

ROLES: Final = frozenset(_ROLE_MARKS)


def encode_text(text: str) -> TokenArray:
    """Return `BEGIN` and one token for each UTF-8 byte of `text`. Lone surrogates become `?`."""
    return np.concatenate([_marks(BEGIN), _bytes_of(text)])


def encode_chat(turns: Iterable[tuple[str, str]]) -> TokenArray:
    """Return the tokens of (role, text) `turns`, ending where the assistant's next words begin.

    Each turn is its role's mark, the bytes of its text and `END`. Raises KeyError for a role that is not in `ROLES`.
    """
    parts = [_marks(BEGIN)]
    for role, text in turns:
        parts += [_marks(_ROLE_MARKS[role]), _bytes_of(text), _marks(END)]
    parts.append(_marks(ASSISTANT))
    return np.concatenate(parts)


def decode_token(token: int) -> str:
    """Return the text of one generated token: a character, or nothing for a mark.

    The sampler only makes printable ASCII (see `model.reply_bias`), so no character is spread over two tokens.
    """
    return chr(token) if token < BEGIN else ""


def _marks(*marks: int) -> TokenArray:
    return np.array(marks, dtype=np.uint16)


def _bytes_of(text: str) -> TokenArray:
    return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint16)
