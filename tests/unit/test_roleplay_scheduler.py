"""Continuous batching: budgets, order, preemption, and every sequence's every token."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.roleplay.kv_cache import BLOCK_TOKENS, BlockPool
from examples.roleplay.sampler import Choice
from examples.roleplay.scheduler import Advance, Reason, Scheduler, SequenceState, Work
from examples.roleplay.tokens import END

CHOICE = Choice(1.0, 1.0, True, Random(1))
LETTER = ord("a")


def sequence(number: int, prompt: int, max_tokens: int, *, fill: int | None = None) -> SequenceState:
    tokens = np.full(prompt, number if fill is None else fill, dtype=np.uint16)
    return SequenceState.of_prompt(number, tokens, max_tokens, CHOICE)


def scheduler(
    blocks: int = 64,
    *,
    step_tokens: int = 32,
    max_running: int = 4,
    remember: bool = True,
    announced: list[tuple[int, int]] | None = None,
) -> Scheduler:
    ticks = iter(range(1, 1_000_000))
    heard: list[tuple[int, int]] = [] if announced is None else announced
    return Scheduler(
        BlockPool(blocks, remember=remember),
        step_tokens=step_tokens,
        max_running=max_running,
        clock=lambda: next(ticks),
        announce=lambda hits, queries: heard.append((hits, queries)),
    )


def numbers(works: list[Work]) -> list[tuple[int, int]]:
    return [(work.sequence.number, work.count) for work in works]


def step(subject: Scheduler, token: int = LETTER) -> Advance:
    works = subject.plan()
    return subject.advance(works, [token for work in works if work.samples])


def test_a_long_prompt_is_computed_over_several_steps_beside_running_sequences() -> None:
    subject = scheduler()
    subject.add(sequence(1, 5, 10))
    step(subject)
    subject.add(sequence(2, 70, 10))
    shapes = []
    for _ in range(4):
        shapes.append(numbers(subject.plan()))
        step(subject)
    assert shapes == [[(1, 1), (2, 31)], [(1, 1), (2, 31)], [(1, 1), (2, 8)], [(1, 1), (2, 1)]]


def test_no_more_run_than_allowed_and_the_next_comes_when_one_ends() -> None:
    subject = scheduler(max_running=2)
    for number, size in ((1, 2), (2, 3), (3, 2)):
        subject.add(sequence(number, 1, size))
    assert numbers(subject.plan()) == [(1, 1), (2, 1)]
    step(subject)
    advance = step(subject)
    assert [(ended.number, reason) for ended, reason in advance.ended] == [(1, Reason.LENGTH)]
    assert numbers(subject.plan()) == [(2, 1), (3, 1)]


def test_the_end_token_ends_and_is_counted() -> None:
    subject = scheduler()
    subject.add(sequence(1, 3, 10))
    step(subject)
    advance = step(subject, END)
    ((ended, reason),) = advance.ended
    assert (reason, ended.generated, subject.busy) == (Reason.STOP, 2, False)
    assert subject.pool.free == subject.pool.blocks


def test_the_prefix_of_an_ended_sequence_is_not_computed_again() -> None:
    subject = scheduler()
    subject.add(sequence(1, 50, 1, fill=7))
    while subject.busy:
        step(subject)
    subject.add(sequence(2, 50, 1, fill=7))
    assert numbers(subject.plan()) == [(2, 2)]
    assert (subject.prefix_queries, subject.prefix_hits) == (100, 48)


def test_the_last_token_is_computed_even_when_all_of_it_is_cached() -> None:
    subject = scheduler()
    for number in (1, 2):
        subject.add(sequence(number, 2 * BLOCK_TOKENS, 1, fill=7))
        works = subject.plan()
        subject.advance(works, [LETTER])
    assert numbers(works) == [(2, BLOCK_TOKENS)]


def test_the_youngest_gives_way_when_blocks_run_out_and_is_finished_later() -> None:
    subject = scheduler(blocks=4, remember=False)
    old, young = sequence(1, 30, 30), sequence(2, 30, 30)
    subject.add(old)
    subject.add(young)
    ended: list[int] = []
    for _ in range(200):
        ended += [one.number for one, _ in step(subject).ended]
    assert ended == [1, 2]
    assert subject.preemptions >= 1
    assert (old.generated, young.generated) == (30, 30)
    assert subject.pool.free == 4


def test_a_preempted_sequence_s_own_blocks_are_no_cache_hits() -> None:
    subject = scheduler(blocks=4)
    subject.add(sequence(1, 30, 30))
    subject.add(sequence(2, 30, 30))
    while subject.busy:
        step(subject)
    assert subject.preemptions >= 1
    assert (subject.prefix_queries, subject.prefix_hits) == (60, 0)


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("blocks", [4, 64])
def test_each_sequence_is_looked_up_once_and_all_three_accounts_agree(remember: bool, blocks: int) -> None:
    announced: list[tuple[int, int]] = []
    subject = scheduler(blocks, remember=remember, announced=announced)
    sequences = [sequence(number, 30, 20, fill=7) for number in range(5)]
    for one in sequences:
        subject.add(one)
        step(subject)
    while subject.busy:
        step(subject)
    assert (subject.preemptions > 0) == (blocks == 4)
    assert sorted(announced) == sorted((one.cached_tokens, one.prompt_tokens) for one in sequences)
    assert subject.prefix_hits == sum(hits for hits, _ in announced)
    assert subject.prefix_queries == sum(queries for _, queries in announced) == 150
    assert (subject.prefix_hits > 0) == remember


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_aborted_sequence_leaves_nothing_behind(steps: int) -> None:
    subject = scheduler(max_running=1)
    subject.add(sequence(1, 40, 20))
    subject.add(sequence(2, 40, 20))
    for _ in range(steps):
        step(subject)
    for number in (1, 2):
        aborted = subject.abort(number)
        assert aborted is not None
        assert aborted.number == number
    assert subject.abort(1) is None
    assert not subject.busy
    assert subject.plan() == []
    assert subject.pool.free == subject.pool.blocks


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        scheduler(blocks=4).add(sequence(1, 60, 5))


def test_times_are_in_order() -> None:
    subject = scheduler()
    one = sequence(1, 40, 2)
    subject.add(one)
    while subject.busy:
        step(subject)
    assert 0 < one.queued_ns < one.scheduled_ns < one.first_token_ns


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(7, 20),
    st.booleans(),
    st.lists(st.integers(1, 12), max_size=4),
)
def test_every_sequence_gets_every_token_once(
    sizes: list[tuple[int, int, int]], blocks: int, remember: bool, aborts: list[int]
) -> None:
    subject = scheduler(blocks, step_tokens=24, max_running=3, remember=remember)
    for number, (prompt, max_tokens, fill) in enumerate(sizes, 1):
        subject.add(sequence(number, prompt, max_tokens, fill=fill))
    given_tokens = dict.fromkeys(range(1, len(sizes) + 1), 0)
    ended: list[int] = []
    steps = 0
    while subject.busy:
        works = subject.plan()
        assert works, "busy, but nothing to do"
        assert sum(work.count for work in works) <= 24
        assert len({work.sequence.number for work in works}) == len(works)
        for work in works:
            assert len(work.sequence.blocks) * BLOCK_TOKENS >= work.sequence.computed + work.count
        advance = subject.advance(works, [LETTER for work in works if work.samples])
        for one, _ in advance.chosen:
            given_tokens[one.number] += 1
        ended += [one.number for one, _ in advance.ended]
        steps += 1
        if steps == 3:
            ended += [number for number in aborts if subject.abort(number) is not None]
    assert sorted(ended) == list(given_tokens)
    for number, (_, max_tokens, _) in enumerate(sizes, 1):
        assert given_tokens[number] == max_tokens or number in aborts
    assert subject.pool.free == blocks
