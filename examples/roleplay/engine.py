"""The engine process: takes requests from its socket, computes them in batches, sends the tokens back."""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import sys
import time
from random import Random
from typing import Final

import click
import msgspec
import numpy as np

from examples.roleplay.kv_cache import BlockPool
from examples.roleplay.lookups import LIBRARY, Announce, announcer, unannounced
from examples.roleplay.model import Transformer
from examples.roleplay.process import die_with_parent, name_thread
from examples.roleplay.protocol import Abort, Finished, Frames, Gauges, Generate, Ready, Step, encode
from examples.roleplay.sampler import Choice, sample
from examples.roleplay.scheduler import Reason, Scheduler, SequenceState
from examples.roleplay.shapes import SHAPES

# More tokens per step make prefill a little cheaper and everybody else's next token later.
STEP_TOKENS: Final = 128
MAX_RUNNING: Final = 16


class Engine:
    """A model and its scheduler, without the socket: commands in, steps out."""

    def __init__(self, model: Transformer, scheduler: Scheduler) -> None:
        self._model = model
        self._scheduler = scheduler
        self._ended: list[Finished] = []

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return self._scheduler.busy or bool(self._ended)

    def take(self, command: Generate | Abort) -> None:
        """Queue a request, or end one. Raises ValueError for a request that cannot fit the KV cache."""
        if isinstance(command, Abort):
            sequence = self._scheduler.abort(command.number)
            if sequence is not None:
                reason = Reason.STOP if command.stopped else Reason.ABORT
                self._ended.append(_finished(sequence, reason, time.monotonic_ns()))
            return
        prompt = np.frombuffer(command.prompt, dtype="<u2")
        choice = Choice(command.temperature, command.top_p, command.may_end, Random(command.seed))
        self._scheduler.add(SequenceState.of_prompt(command.number, prompt, command.max_tokens, choice))

    def step(self) -> Step:
        """Compute one step and return what it gave. Blocks while it computes."""
        scheduler = self._scheduler
        before = (scheduler.prefix_queries, scheduler.prefix_hits, scheduler.preemptions)
        works = scheduler.plan()
        tokens: list[tuple[int, int]] = []
        if works:
            logits = self._model.forward([work.chunk() for work in works])
            chosen = sample(logits, [work.sequence.choice for work in works if work.samples])
            advance = scheduler.advance(works, chosen)
            now = time.monotonic_ns()
            tokens = [(sequence.number, token) for sequence, token in advance.chosen]
            self._ended += [_finished(sequence, reason, now) for sequence, reason in advance.ended]
        ended, self._ended = self._ended, []
        return Step(
            computed_tokens=sum(work.count for work in works),
            prefix_queries=scheduler.prefix_queries - before[0],
            prefix_hits=scheduler.prefix_hits - before[1],
            preemptions=scheduler.preemptions - before[2],
            tokens=tokens,
            finished=ended,
            gauges=Gauges(len(scheduler.running), len(scheduler.waiting), scheduler.pool.used_ratio),
        )


def serve(engine: Engine, connection: socket.socket) -> None:
    """Serve requests from `connection` until the other side closes it."""
    frames = Frames()
    decoder = msgspec.msgpack.Decoder(Generate | Abort)
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while True:
        # With work to do the socket is only looked at; without, the process sleeps here.
        if poller.poll(0 if engine.busy else None):
            data = connection.recv(1 << 16)
            if not data:
                return
            for body in frames.feed(data):
                engine.take(decoder.decode(body))
        if engine.busy:
            connection.sendall(encode(engine.step()))


def _announcer(model: str) -> Announce:
    """What the scheduler announces its look-ups with; nothing where the library is missing, which `serve` has said."""
    if not LIBRARY.exists():
        return unannounced
    try:
        return announcer(model)
    except (OSError, AttributeError) as error:
        logging.getLogger("roleplay").warning("look-ups of %s cannot be watched: %s", model, error)
        return unannounced


def _finished(sequence: SequenceState, reason: Reason, now_ns: int) -> Finished:
    def between(start_ns: int, end_ns: int) -> float | None:
        return (end_ns - start_ns) / 1e9 if start_ns and end_ns else None

    return Finished(
        number=sequence.number,
        reason=reason.value,
        prompt_tokens=sequence.prompt_tokens,
        completion_tokens=sequence.generated,
        cached_tokens=sequence.cached_tokens or 0,
        queued_s=between(sequence.queued_ns, sequence.scheduled_ns),
        prefill_s=between(sequence.scheduled_ns, sequence.first_token_ns),
        decode_s=between(sequence.first_token_ns, now_ns),
    )


@click.command(help="One engine. Started by `serve`, not by hand.")
@click.option("--model", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--fd", type=int, required=True, help="Descriptor of the connected socket to the API process.")
@click.option("--parent", type=int, required=True, help="Process id of the API process; the engine ends with it.")
@click.option("--prefix-cache/--no-prefix-cache", default=True)
def main(model: str, fd: int, parent: int, prefix_cache: bool) -> None:
    """Run the engine of `model` until the API process closes the socket or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not die_with_parent(parent):
        return
    name_thread(f"eng:{model}")
    transformer = Transformer(SHAPES[model])
    pool = BlockPool(SHAPES[model].blocks, remember=prefix_cache)
    scheduler = Scheduler(
        pool,
        step_tokens=STEP_TOKENS,
        max_running=MAX_RUNNING,
        clock=time.monotonic_ns,
        announce=_announcer(model),
    )
    gc.freeze()
    with socket.socket(fileno=fd) as connection:
        try:
            engine = Engine(transformer, scheduler)
            connection.sendall(encode(Ready(transformer.parameters)))
            # An empty step: the gauges of an engine that died before this one must not stay as they were.
            connection.sendall(encode(engine.step()))
            serve(engine, connection)
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)


if __name__ == "__main__":
    main()
