"""Blocks of KV-cache memory: who holds them, what they remember, which is taken next."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np

from examples.roleplay.tokens import TokenArray

BLOCK_TOKENS: Final = 16
_ROOT: Final = b""


class BlockPool:
    """Hands out block numbers; remembers the content of full blocks until they are taken for something else.

    A block without holder keeps its content and stays findable. The one released longest ago is taken first (LRU).
    Content is named by a digest over all tokens up to the block's end, so an equal digest means an equal prefix.
    With `remember` false nothing is findable: prefix caching is off.
    """

    def __init__(self, blocks: int, *, remember: bool = True) -> None:
        if blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {blocks}")
        self.blocks = blocks
        self.remember = remember
        self._holders = [0] * blocks
        self._digest_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        """Blocks that nobody holds, remembered ones included."""
        return len(self._free)

    @property
    def used_ratio(self) -> float:
        """Held blocks over all blocks, 0 to 1."""
        return 1.0 - len(self._free) / self.blocks

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks that hold the longest known prefix of `digests`. Takes nothing."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def free_after(self, found: Sequence[int]) -> int:
        """Return how many blocks would be free once `found` were held."""
        return len(self._free) - sum(1 for block in found if not self._holders[block])

    def hold(self, found: Sequence[int]) -> None:
        """Hold blocks that `find` returned, beside whoever holds them already."""
        for block in found:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def take(self) -> int:
        """Return a block with undefined content, forgetting what it held. Raises LookupError when none is free."""
        if not self._free:
            raise LookupError("every block is held")
        block, _ = self._free.popitem(last=False)
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None
        self._holders[block] = 1
        return block

    def name(self, block: int, digest: bytes) -> None:
        """Say what a full, computed block holds. Where another block holds the same, that one stays the one found."""
        if self.remember and self._digest_of[block] is None and digest not in self._block_of:
            self._digest_of[block] = digest
            self._block_of[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each of `blocks`, which stand in the order of their tokens.

        The last is released first, so that a prefix outlives what was built on it.
        """
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is not held")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                # A block without a name is of no use to anybody: take it before any that could still be found.
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)


def extend_digests(digests: list[bytes], tokens: TokenArray) -> None:
    """Append the digests of those full blocks of `tokens` that `digests` does not name yet."""
    for index in range(len(digests), len(tokens) // BLOCK_TOKENS):
        parent = digests[-1] if digests else _ROOT
        content = np.ascontiguousarray(tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]).tobytes()
        digests.append(hashlib.blake2b(parent + content, digest_size=16).digest())
