"""Blocks are never lost, never handed out twice, and forgotten in the order of their last use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.roleplay.kv_cache import BLOCK_TOKENS, BlockPool, extend_digests


def named(pool: BlockPool, *digests: bytes) -> list[int]:
    blocks = [pool.take() for _ in digests]
    for block, digest in zip(blocks, digests, strict=True):
        pool.name(block, digest)
    return blocks


def test_a_released_block_stays_findable_until_it_is_needed() -> None:
    pool = BlockPool(3)
    pool.release(named(pool, b"a", b"b"))
    assert pool.free == 3
    assert len(pool.find([b"a", b"b", b"c"])) == 2
    pool.take()
    assert len(pool.find([b"a", b"b"])) == 2


def test_the_block_released_longest_ago_is_forgotten_first_and_the_tail_before_the_head() -> None:
    pool = BlockPool(4)
    first, second = named(pool, b"1 head", b"1 tail"), named(pool, b"2 head", b"2 tail")
    pool.release(first)
    pool.release(second)
    pool.hold(pool.find([b"1 head"]))
    pool.release(first[:1])
    known = [b"1 head", b"1 tail", b"2 head", b"2 tail"]
    forgotten = []
    for _ in range(4):
        pool.take()
        gone = next(digest for digest in known if digest not in forgotten and not pool.find([digest]))
        forgotten.append(gone)
    assert forgotten == [b"1 tail", b"2 tail", b"2 head", b"1 head"]


def test_a_block_without_a_name_is_taken_before_any_that_can_be_found() -> None:
    pool = BlockPool(2)
    pool.release(named(pool, b"a"))
    pool.take()
    nameless = pool.take()
    assert not pool.find([b"a"])
    pool.release([nameless])
    assert pool.take() == nameless


def test_a_shared_block_is_free_only_when_everybody_gave_it_back() -> None:
    pool = BlockPool(2)
    blocks = named(pool, b"a")
    pool.hold(pool.find([b"a"]))
    pool.release(blocks)
    assert pool.free == 1
    pool.release(blocks)
    assert pool.free == 2
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)


def test_an_exhausted_pool_says_so() -> None:
    pool = BlockPool(1)
    pool.take()
    assert pool.used_ratio == 1.0
    with pytest.raises(LookupError):
        pool.take()


def test_without_remembering_nothing_is_found() -> None:
    pool = BlockPool(2, remember=False)
    pool.release(named(pool, b"a"))
    assert pool.find([b"a"]) == []


def test_equal_content_behind_another_beginning_has_another_digest() -> None:
    block = np.arange(BLOCK_TOKENS, dtype=np.uint16)
    one: list[bytes] = []
    other: list[bytes] = []
    extend_digests(one, np.concatenate([block, block]))
    extend_digests(other, np.concatenate([block + 1, block]))
    assert len(set(one + other)) == 4


@given(st.lists(st.integers(0, 260), max_size=100), st.integers(0, 100))
def test_digests_do_not_depend_on_when_they_are_made(values: list[int], cut: int) -> None:
    tokens = np.array(values, dtype=np.uint16)
    at_once: list[bytes] = []
    in_two: list[bytes] = []
    extend_digests(at_once, tokens)
    extend_digests(in_two, tokens[:cut])
    extend_digests(in_two, tokens)
    assert at_once == in_two
    assert len(at_once) == len(values) // BLOCK_TOKENS


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 6)), max_size=200))
def test_no_order_of_use_loses_or_doubles_a_block(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(5)
    held: list[tuple[int, bytes]] = []
    for action, number in actions:
        digest = bytes([number])
        if action == "take" and pool.free:
            block = pool.take()
            assert block not in [other for other, _ in held]
            pool.name(block, digest)
            held.append((block, digest))
        elif action == "hold":
            found = pool.find([digest])
            assert len(found) <= 1
            before = pool.free
            after = pool.free_after(found)
            pool.hold(found)
            assert pool.free == after <= before
            held += [(block, digest) for block in found]
        elif action == "release" and held:
            block, _ = held.pop(number % len(held))
            pool.release([block])
        assert pool.free == 5 - len({block for block, _ in held})
