"""Continuous batching: which tokens of which sequences the next step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from examples.roleplay.kv_cache import BLOCK_TOKENS, BlockPool, extend_digests
from examples.roleplay.lookups import Announce, unannounced
from examples.roleplay.model import Chunk
from examples.roleplay.sampler import Choice
from examples.roleplay.tokens import END, TokenArray


class Reason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(slots=True, eq=False)
class SequenceState:
    """One request inside the engine. Times are nanoseconds of the scheduler's clock; 0 is not yet."""

    number: int
    prompt_tokens: int
    max_tokens: int
    choice: Choice
    tokens: TokenArray
    length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    cached_tokens: int | None = None
    queued_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0

    @classmethod
    def of_prompt(cls, number: int, prompt: TokenArray, max_tokens: int, choice: Choice) -> SequenceState:
        """Return a sequence that has a prompt of at least 1 token and room for `max_tokens` more."""
        tokens = np.empty(len(prompt) + max_tokens, dtype=np.uint16)
        tokens[: len(prompt)] = prompt
        return cls(number, len(prompt), max_tokens, choice, tokens, len(prompt))

    @property
    def generated(self) -> int:
        """Tokens generated so far, `END` included."""
        return self.length - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """The part of `sequence` that one step computes: `count` tokens from `sequence.computed` on."""

    sequence: SequenceState
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next one can be chosen."""
        return self.sequence.computed + self.count == self.sequence.length

    def chunk(self) -> Chunk:
        """Return the work as the model takes it."""
        start = self.sequence.computed
        return Chunk(self.sequence.tokens[start : start + self.count], start, self.sequence.blocks, self.samples)


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step gave: the tokens that were chosen, and the sequences that ended with one of them."""

    chosen: list[tuple[SequenceState, int]]
    ended: list[tuple[SequenceState, Reason]]


class Scheduler:
    """First come, first served, with a budget of tokens per step that running sequences use before waiting ones.

    Long prompts are computed over several steps, so they delay the others' next token by a step at most. When blocks
    run out, the sequence that was admitted last gives its blocks back and waits to be computed again (a preemption).

    Each sequence is looked up in the prefix cache once, when it is first admitted; `announce` is told with each one. A
    pool that remembers nothing is looked up too, and finds nothing.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        step_tokens: int,
        max_running: int,
        clock: Callable[[], int],
        announce: Announce = unannounced,
    ) -> None:
        self.pool = pool
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._clock = clock
        self._announce = announce

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self.waiting)

    def add(self, sequence: SequenceState) -> None:
        """Queue `sequence`. Raises ValueError when it could never fit, however empty the cache."""
        if -(-len(sequence.tokens) // BLOCK_TOKENS) > self.pool.blocks:
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit into {self.pool.blocks} blocks")
        sequence.queued_ns = self._clock()
        self.waiting.append(sequence)

    def abort(self, number: int) -> SequenceState | None:
        """Forget the sequence `number` and return it; None when it is not here (it may have ended already)."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.number == number:
                    queue.remove(sequence)
                    self._release(sequence)
                    return sequence
        return None

    def plan(self) -> list[Work]:
        """Choose the next step's work and take the blocks that it needs. Empty when there is nothing to do."""
        budget = self._step_tokens
        works: list[Work] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            count = min(sequence.length - sequence.computed, budget)
            while not self._grow(sequence, count):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                works.append(Work(sequence, count))
                budget -= count
                index += 1
        while self.waiting and budget and not preempted and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.length - sequence.computed, budget)
            self._grow(sequence, count)
            works.append(Work(sequence, count))
            budget -= count
        return works

    def advance(self, works: Sequence[Work], chosen: Sequence[int]) -> Advance:
        """Take in a computed step. `chosen` has a token for each of `works` that samples, in their order."""
        tokens = iter(chosen)
        result = Advance([], [])
        now = self._clock()
        for work in works:
            sequence, samples = work.sequence, work.samples
            sequence.computed += work.count
            self._name_full_blocks(sequence)
            if not samples:
                continue
            token = next(tokens)
            sequence.tokens[sequence.length] = token
            sequence.length += 1
            sequence.first_token_ns = sequence.first_token_ns or now
            result.chosen.append((sequence, token))
            reason = _reason_to_end(sequence, token)
            if reason is not None:
                result.ended.append((sequence, reason))
                self.running.remove(sequence)
                self._release(sequence)
        return result

    def _admit(self, sequence: SequenceState) -> bool:
        """Hold what is cached of `sequence`. False, with nothing held, when the rest of it would not fit now."""
        found: list[int] = []
        if self.pool.remember:
            extend_digests(sequence.digests, sequence.tokens[: sequence.length])
            # The last token must be computed in any case: its logits are what the next one is chosen from.
            found = self.pool.find(sequence.digests[: (sequence.length - 1) // BLOCK_TOKENS])
        if self.pool.free_after(found) < -(-sequence.length // BLOCK_TOKENS) - len(found):
            return False
        self.pool.hold(found)
        sequence.blocks = found
        sequence.computed = len(found) * BLOCK_TOKENS
        if sequence.cached_tokens is None:
            # A preempted sequence finds its own blocks again: that is no hit for the user.
            sequence.cached_tokens = sequence.computed
            sequence.scheduled_ns = self._clock()
            self.prefix_queries += sequence.length
            self.prefix_hits += sequence.computed
            self._announce(sequence.computed, sequence.length)
        return True

    def _grow(self, sequence: SequenceState, count: int) -> bool:
        """Take blocks for `count` more tokens. False when there are too few; the sequence keeps those taken so far."""
        needed = -(-(sequence.computed + count) // BLOCK_TOKENS)
        while len(sequence.blocks) < needed:
            if not self.pool.free:
                return False
            sequence.blocks.append(self.pool.take())
        return True

    def _preempt_last(self) -> SequenceState:
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return sequence

    def _release(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _name_full_blocks(self, sequence: SequenceState) -> None:
        if not self.pool.remember:
            return
        full = sequence.computed // BLOCK_TOKENS
        extend_digests(sequence.digests, sequence.tokens[: sequence.computed])
        for index in range(max(0, full - 1 - self._step_tokens // BLOCK_TOKENS), full):
            self.pool.name(sequence.blocks[index], sequence.digests[index])


def _reason_to_end(sequence: SequenceState, token: int) -> Reason | None:
    if token == END:
        return Reason.STOP
    if sequence.generated >= sequence.max_tokens:
        return Reason.LENGTH
    return None
