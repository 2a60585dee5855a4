"""The transformer computes the same, however its work is cut, batched, paged or cached."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from examples.roleplay.kv_cache import BLOCK_TOKENS, BlockPool
from examples.roleplay.model import Chunk, ModelShape, Transformer, reply_bias
from examples.roleplay.sampler import Choice, sample
from examples.roleplay.scheduler import Scheduler, SequenceState
from examples.roleplay.tokens import END, VOCABULARY, encode_chat

SHAPE = ModelShape("tiny", layers=3, heads=4, kv_heads=2, head_width=8, context=256, kv_tokens=1024)
RNG = np.random.default_rng(11)
TOKENS = RNG.integers(0, VOCABULARY, 83).astype(np.uint16)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SHAPE, seed=5)


def naive_logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """Logits of the last of `tokens`, written down once more from the definition: no cache, no batch, float64."""
    shape = model.shape

    def rms(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        half = shape.head_width // 2
        angle = position * 10000.0 ** (-2 * np.arange(half) / shape.head_width)
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    x = model._embedding[tokens].astype(np.float64)
    wide, kv_wide = shape.width, shape.kv_heads * shape.head_width
    for layer in model._layers:
        q, k, v = np.split(rms(x) @ layer.qkv, [wide, wide + kv_wide], axis=1)
        attended = np.zeros_like(x)
        for head in range(shape.heads):
            own = slice(head * shape.head_width, (head + 1) * shape.head_width)
            shared_head = head // (shape.heads // shape.kv_heads)
            shared = slice(shared_head * shape.head_width, (shared_head + 1) * shape.head_width)
            keys = np.array([rotate(k[at, shared], at) for at in range(len(tokens))])
            for at in range(len(tokens)):
                scores = keys[: at + 1] @ rotate(q[at, own], at) / np.sqrt(shape.head_width)
                weights = np.exp(scores - scores.max())
                attended[at, own] = weights / weights.sum() @ v[: at + 1, shared]
        x = x + attended @ layer.out
        x = x + np.maximum(rms(x) @ layer.up, 0) ** 2 @ layer.down
    return rms(x[-1:])[0] @ model._head + model._bias


def pages(count: int, *, first: int = 0) -> list[int]:
    return list(range(first, first + -(-count // BLOCK_TOKENS)))


def whole(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    return model.forward([Chunk(tokens, 0, pages(len(tokens)), True)])[0]


def assert_close(one: np.ndarray, other: np.ndarray) -> None:
    possible = np.isfinite(other)
    assert (np.isfinite(one) == possible).all()
    np.testing.assert_allclose(one[possible], other[possible], atol=2e-4)


def test_it_computes_what_the_definition_says(model: Transformer) -> None:
    assert_close(whole(model, TOKENS), naive_logits(model, TOKENS))


@pytest.mark.parametrize("cuts", [[1], [16], [47], [16, 32, 48], [5, 6, 7, 80], list(range(1, 83))])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(model: Transformer, cuts: list[int]) -> None:
    expected = whole(model, TOKENS)
    blocks = RNG.permutation(SHAPE.blocks)[: len(pages(len(TOKENS)))].tolist()
    for start, end in zip([0, *cuts], [*cuts, len(TOKENS)], strict=True):
        last = model.forward([Chunk(TOKENS[start:end], start, blocks, end == len(TOKENS))])
    assert last.shape == (1, VOCABULARY)
    assert_close(last[0], expected)


def test_a_batch_gives_each_sequence_its_own_logits(model: Transformer) -> None:
    prompts = [TOKENS[:size] for size in (1, 17, 83, 31)]
    alone = [whole(model, prompt) for prompt in prompts]
    chunks = [Chunk(prompt, 0, pages(len(prompt), first=10 * row), True) for row, prompt in enumerate(prompts)]
    # One sequence of the batch is in the midst of its prompt: it has no logits.
    chunks.insert(2, Chunk(TOKENS[:13], 0, pages(13, first=50), False))
    together = model.forward(chunks)
    assert together.shape == (len(prompts), VOCABULARY)
    for row, expected in zip(together, alone, strict=True):
        assert_close(row, expected)


def test_what_stands_behind_a_block_s_end_is_never_read(model: Transformer) -> None:
    expected = whole(model, TOKENS)
    model._cache[:] = np.nan
    assert_close(whole(model, TOKENS), expected)


def test_equal_seeds_give_equal_models_and_others_do_not(model: Transformer) -> None:
    assert (whole(Transformer(SHAPE, seed=5), TOKENS) == whole(model, TOKENS)).all()
    assert (whole(Transformer(SHAPE, seed=6), TOKENS) != whole(model, TOKENS)).any()


def test_parameters_are_counted(model: Transformer) -> None:
    width = SHAPE.width
    per_layer = width * (width + 2 * 16) + width * width + 2 * width * 4 * width
    assert model.parameters == 3 * per_layer + 2 * VOCABULARY * width


def test_replies_are_text_that_ends() -> None:
    bias = reply_bias()
    allowed = [token for token in range(VOCABULARY) if np.isfinite(bias[token])]
    assert END in allowed
    assert all(0x20 <= token < 0x7F for token in allowed if token != END)


@pytest.mark.parametrize("remember", [True, False])
def test_the_prefix_cache_changes_no_logits(model: Transformer, remember: bool) -> None:
    pool = BlockPool(SHAPE.blocks, remember=remember)
    scheduler = Scheduler(pool, step_tokens=24, max_running=4, clock=lambda: 1)
    history = [("system", "You keep a lighthouse. " * 3), ("user", "Who goes there?")]
    cached: list[int | None] = []
    for number in range(5):
        prompt = encode_chat(history)
        sequence = SequenceState.of_prompt(number, prompt, 19, Choice(0.0, 1.0, False, None))  # type: ignore[arg-type]  # greedy needs no random
        scheduler.add(sequence)
        while scheduler.busy:
            works = scheduler.plan()
            logits = model.forward([work.chunk() for work in works])
            if len(logits):
                so_far = sequence.tokens[: sequence.length].copy()
                blocks = [block for block in range(SHAPE.blocks) if block not in sequence.blocks][: len(so_far)]
                kept = model._cache.copy()
                assert_close(logits[0], model.forward([Chunk(so_far, 0, blocks[: len(pages(len(so_far)))], True)])[0])
                model._cache[:] = kept
            scheduler.advance(works, sample(logits, [sequence.choice] * len(logits)))
        cached.append(sequence.cached_tokens)
        said = "".join(map(chr, sequence.tokens[len(prompt) : sequence.length]))
        history = [*history, ("assistant", said), ("user", f"And then, {number}?")]
        history = history if number < 3 else history[:2]
    if remember:
        # Each turn finds all of the turn before it but the last, unfinished block.
        assert cached[0] == 0
        assert all(after > before for before, after in pairwise(cached[:4]))  # type: ignore[operator]  # admitted: not None
        assert cached[4] == (len(encode_chat(history[:2])) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    else:
        assert cached == [0] * 5
