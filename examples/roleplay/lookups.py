"""Tells whoever watches the engine from outside what it finds in its prefix cache, by calls of native/kv_lookup.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Final

LIBRARY: Final = Path(__file__).parent / "native" / "libllm_kv.so"
"""Compiled by `make native`. The service runs without it, and then nobody can watch."""

Announce = Callable[[int, int], None]
"""Takes the tokens that were found, and those that were looked up."""


def announcer(model: str, library: Path = LIBRARY) -> Announce:
    """Return what announces a look-up of `model`. Raises OSError when the library cannot be loaded."""
    function = ctypes.CDLL(str(library)).llm_kv_lookup
    function.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]
    function.restype = None
    name = model.encode()

    def announce(hit_tokens: int, looked_up_tokens: int) -> None:
        function(name, hit_tokens, looked_up_tokens)

    return announce


def unannounced(hit_tokens: int, looked_up_tokens: int) -> None:
    """Stand in for an announcer where there is no library."""
