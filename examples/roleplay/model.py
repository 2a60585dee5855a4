"""A decoder-only transformer with random weights, computed in float32 by numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from examples.roleplay.kv_cache import BLOCK_TOKENS
from examples.roleplay.tokens import END, VOCABULARY, TokenArray

Floats = npt.NDArray[np.float32]

# Per mille, roughly as in English prose. It gives the noise the rhythm of words.
_LETTERS: Final = {
    " ": 180, "e": 102, "t": 75, "a": 65, "o": 62, "i": 57, "n": 57, "s": 53, "h": 50, "r": 49, "d": 35, "l": 33,
    "u": 23, "c": 22, "m": 20, "f": 18, "w": 19, "g": 16, "y": 16, "p": 15, "b": 13, "v": 8, "k": 6, ",": 12, ".": 8,
    "'": 3, "?": 2, "!": 2, "x": 1, "j": 1, "q": 1, "z": 1,
}  # fmt: skip
_END_PER_MILLE: Final = 7


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a model. `width` is heads * head_width; `context` and `kv_tokens` count tokens."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    kv_tokens: int

    @property
    def width(self) -> int:
        """Numbers per token between the layers."""
        return self.heads * self.head_width

    @property
    def blocks(self) -> int:
        """Blocks of KV cache."""
        return self.kv_tokens // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Chunk:
    """Successive tokens of one sequence. Their positions are `start`, `start + 1`, ...

    `blocks` holds the sequence from position 0 to the last of `tokens`; what stands before `start` has been computed.
    """

    tokens: TokenArray
    start: int
    blocks: Sequence[int]
    wants_logits: bool


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Floats
    out: Floats
    up: Floats
    down: Floats


class Transformer:
    """RMS norm, rotary positions, grouped-query attention, squared-ReLU MLP; owns its paged KV cache.

    Weights come from `seed`: equal shapes and seeds give equal models. One thread; `forward` blocks while it computes.
    """

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        self.shape = shape
        rng = np.random.default_rng(seed)
        width, kv_width = shape.width, shape.kv_heads * shape.head_width

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Floats:
            values = rng.standard_normal((rows, columns), dtype=np.float32)
            values *= np.float32(gain / np.sqrt(rows))
            return values

        # The two matrices that add to the residual are scaled down so that it does not grow with depth.
        residual = 1.0 / np.sqrt(2.0 * shape.layers)
        self._embedding = rng.standard_normal((VOCABULARY, width), dtype=np.float32)
        self._layers = [
            _Layer(
                qkv=matrix(width, width + 2 * kv_width),
                out=matrix(width, width, residual),
                up=matrix(width, 4 * width),
                down=matrix(4 * width, width, residual),
            )
            for _ in range(shape.layers)
        ]
        # Below 1, so that the bias decides more than chance which letters come and how soon a reply ends.
        self._head = matrix(width, VOCABULARY, 0.5)
        self._bias = reply_bias()
        angles = np.outer(np.arange(shape.context), 10000.0 ** (-np.arange(0, shape.head_width, 2) / shape.head_width))
        self._cos = np.cos(angles).astype(np.float32)[:, None, :]
        self._sin = np.sin(angles).astype(np.float32)[:, None, :]
        # Pages of it become memory only when they are first written.
        self._cache = np.empty((shape.layers, shape.blocks, BLOCK_TOKENS, 2 * kv_width), dtype=np.float32)

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        per_layer = sum(m.size for layer in self._layers[:1] for m in (layer.qkv, layer.out, layer.up, layer.down))
        return self._embedding.size + self._head.size + per_layer * self.shape.layers

    def forward(self, chunks: Sequence[Chunk]) -> Floats:
        """Compute `chunks` as one batch, store their keys and values, and return logits.

        The result has a row of `VOCABULARY` numbers for the last token of each chunk that wants them, in their order.
        No two chunks may belong to one sequence.
        """
        shape = self.shape
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.start + len(chunk.tokens)) for chunk in chunks])
        tables = [np.asarray(chunk.blocks, dtype=np.intp) for chunk in chunks]
        slots = np.concatenate([_slots(chunk, table) for chunk, table in zip(chunks, tables, strict=True)])
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
        cos, sin = self._cos[positions], self._sin[positions]
        keyed = (shape.heads + shape.kv_heads) * shape.head_width
        x = self._embedding[tokens]
        attended = np.empty((len(tokens), shape.width), dtype=np.float32)
        for index, layer in enumerate(self._layers):
            qkv = _rms(x) @ layer.qkv
            _rotate(qkv[:, :keyed].reshape(len(tokens), -1, shape.head_width), cos, sin)
            self._cache[index].reshape(-1, qkv.shape[1] - shape.width)[slots] = qkv[:, shape.width :]
            for end, chunk, table in zip(ends.tolist(), chunks, tables, strict=True):
                rows = slice(end - len(chunk.tokens), end)
                attended[rows] = self._attend(index, qkv[rows, : shape.width], table, chunk.start + len(chunk.tokens))
            x += attended @ layer.out
            hidden = _rms(x) @ layer.up
            np.maximum(hidden, 0.0, out=hidden)
            hidden *= hidden
            x += hidden @ layer.down
        wanted = [end - 1 for end, chunk in zip(ends.tolist(), chunks, strict=True) if chunk.wants_logits]
        logits: Floats = _rms(x[wanted]) @ self._head + self._bias
        return logits

    def _attend(self, layer: int, queries: Floats, table: npt.NDArray[np.intp], length: int) -> Floats:
        """Return what the last `len(queries)` of `length` tokens attend to: one row of `width` numbers each."""
        shape = self.shape
        count, groups = len(queries), shape.heads // shape.kv_heads
        pages = self._cache[layer].take(table, axis=0)
        memory = pages.reshape(-1, 2, shape.kv_heads, shape.head_width)[:length]
        keys, values = memory[:, 0].transpose(1, 2, 0), memory[:, 1].transpose(1, 0, 2)
        queries = queries.reshape(count, shape.kv_heads, groups, shape.head_width).transpose(1, 2, 0, 3)
        queries = queries.reshape(shape.kv_heads, groups * count, shape.head_width) * np.float32(shape.head_width**-0.5)
        scores = queries @ keys
        if count > 1:
            future = np.triu(np.full((count, count), -np.inf, dtype=np.float32), 1)
            scores.reshape(shape.kv_heads, groups, count, length)[..., length - count :] += future
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = (scores @ values) / scores.sum(axis=-1, keepdims=True)
        mixed = mixed.reshape(shape.kv_heads, groups, count, shape.head_width).transpose(2, 0, 1, 3)
        rows: Floats = mixed.reshape(count, shape.width)
        return rows


def reply_bias() -> Floats:
    """Return what is added to logits so that replies are ASCII text with the letter frequencies of English, and end.

    Shape (VOCABULARY,). Tokens that must not be generated have -inf.
    """
    bias = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    for letter, per_mille in _LETTERS.items():
        bias[ord(letter)] = np.log(per_mille / 1000)
    bias[END] = np.log(_END_PER_MILLE / 1000)
    return bias


def _slots(chunk: Chunk, table: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    positions = np.arange(chunk.start, chunk.start + len(chunk.tokens))
    slots: npt.NDArray[np.intp] = table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    return slots


def _rms(x: Floats) -> Floats:
    scaled: Floats = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6))
    return scaled


def _rotate(heads: Floats, cos: Floats, sin: Floats) -> None:
    """Turn `heads` (tokens, heads, head_width) by the angle of their positions, in place."""
    half = heads.shape[-1] // 2
    left, right = heads[..., :half].copy(), heads[..., half:]
    heads[..., :half] = left * cos - right * sin
    heads[..., half:] = right * cos + left * sin
