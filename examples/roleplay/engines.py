"""The API process's side of an engine: its process, its socket, the requests that are in it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import Enum
from pathlib import Path
from typing import Final, cast

import msgspec

from examples.roleplay.errors import ApiError, Refusal
from examples.roleplay.model import ModelShape
from examples.roleplay.protocol import Abort, Finished, Frames, Generate, ProtocolError, Ready, Step, encode
from examples.roleplay.tokens import TokenArray

START_SECONDS: Final = 30.0
_RESTART_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 2.0
_IMPORT_ROOT: Final = Path(__file__).resolve().parents[2]

log = logging.getLogger("roleplay")


class Broke(Enum):
    """Why a generation ends without the engine having finished it."""

    ENGINE_DIED = "the engine died"
    SHUTTING_DOWN = "the service is shutting down"


class Generation:
    """The tokens of one request as they come. Iterate over it; each item is one token, and then it ends.

    Afterwards exactly one of `finished` and `broke` is set, or neither when `abandon` ended it.
    """

    def __init__(self, number: int, abort: Callable[[Abort], None]) -> None:
        self.number = number
        self.finished: Finished | None = None
        self.broke: Broke | None = None
        self.abandoned = False
        self._abort = abort
        self._tokens: deque[int] = deque()
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def abandon(self) -> None:
        """End the iteration now and have the engine stop computing: nobody waits. Does nothing after the end."""
        if not self._ended:
            self.abandoned = True
            self._abort(Abort(self.number, stopped=False))
            self._end()

    async def complete(self) -> None:
        """Have the engine stop computing because the text is complete, and wait until it has."""
        if not self._ended:
            self._abort(Abort(self.number, stopped=True))
        async for _ in self:
            pass

    def put(self, token: int) -> None:
        """Add the next token."""
        self._tokens.append(token)
        self._wake()

    def finish(self, finished: Finished) -> None:
        """The engine is done with it."""
        self.finished = finished
        self._end()

    def break_off(self, why: Broke) -> None:
        """No more tokens will come."""
        if not self._ended:
            self.broke = why
            self._end()

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self._tokens or self.abandoned:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._tokens.popleft()

    def _end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineLink(asyncio.Protocol):
    """The requests of one engine, over its socket. The engine's process is somebody else's business.

    `on_step` sees each step after the generations have it. `max_waiting` bounds requests that wait in the engine.
    """

    def __init__(self, model: str, max_waiting: int, on_step: Callable[[str, Step], None]) -> None:
        self.model = model
        self.ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_step = on_step
        self._max_waiting = max_waiting
        self._frames = Frames()
        self._decoder = msgspec.msgpack.Decoder(Ready | Step)
        self._numbers = itertools.count(1)
        self._generations: dict[int, Generation] = {}
        self._started: set[int] = set()
        self._transport: asyncio.WriteTransport | None = None

    def generate(self, prompt: TokenArray, options: Options) -> Generation:
        """Queue a request. Raises ApiError 503 without an engine, 429 when too many wait already."""
        if self._transport is None:
            raise ApiError(503, f"The engine of `{self.model}` is not running. Try again in a few seconds.")
        if len(self._generations) - len(self._started) >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._max_waiting} requests wait for `{self.model}` already. Try again later.",
                code="rate_limit_exceeded",
            )
        generation = Generation(next(self._numbers), self._send)
        self._generations[generation.number] = generation
        self._send(
            Generate(
                generation.number,
                prompt.astype("<u2").tobytes(),
                options.max_tokens,
                options.temperature,
                options.top_p,
                options.seed,
                options.may_end,
            )
        )
        return generation

    def break_off(self, why: Broke) -> None:
        """End every generation."""
        for generation in list(self._generations.values()):
            self._send(Abort(generation.number, stopped=False))
            generation.break_off(why)
        self._generations.clear()
        self._started.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls it with the socket's transport."""
        # uvloop's transports have the methods but not the base class.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """asyncio calls it with bytes from the engine."""
        try:
            for body in self._frames.feed(data):
                message = self._decoder.decode(body)
                if isinstance(message, Ready):
                    self.ready.set_result(message.parameters)
                else:
                    self._take(message)
        except (ProtocolError, msgspec.DecodeError) as error:
            log.error("the engine of %s sent what nobody understands: %s", self.model, error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio calls it when the engine has gone."""
        self._transport = None
        self.break_off(Broke.ENGINE_DIED)
        if not self.lost.done():
            self.lost.set_result(None)
        if not self.ready.done():
            self.ready.cancel()

    def close(self) -> None:
        """Close the socket, at which the engine ends."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, step: Step) -> None:
        for number, token in step.tokens:
            self._started.add(number)
            generation = self._generations.get(number)
            if generation is not None:
                generation.put(token)
        for finished in step.finished:
            self._started.discard(finished.number)
            generation = self._generations.pop(finished.number, None)
            if generation is not None:
                generation.finish(finished)
        self._on_step(self.model, step)

    def _send(self, message: Generate | Abort) -> None:
        if self._transport is not None:
            self._transport.write(encode(message))


class Options(msgspec.Struct, frozen=True):
    """How to generate, all defaults filled in. `may_end` false goes on to `max_tokens` whatever the model says."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    may_end: bool


class Engine:
    """One engine process, started again when it dies."""

    def __init__(
        self, shape: ModelShape, *, prefix_cache: bool, max_waiting: int, on_step: Callable[[str, Step], None]
    ) -> None:
        self.shape = shape
        self.parameters = 0
        self.restarts = 0
        self._prefix_cache = prefix_cache
        self._max_waiting = max_waiting
        self._on_step = on_step
        self._process: subprocess.Popen[bytes] | None = None
        self._link: EngineLink | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        link = self._link
        return link is not None and link.ready.done() and not link.lost.done()

    @property
    def pid(self) -> int | None:
        """The engine's process id, while it has one."""
        return self._process.pid if self._process is not None else None

    def generate(self, prompt: TokenArray, options: Options) -> Generation:
        """Queue a request; see `EngineLink.generate`."""
        if self._link is None or not self.ready:
            raise ApiError(503, f"The engine of `{self.shape.name}` is starting. Try again in a few seconds.")
        return self._link.generate(prompt, options)

    def break_off(self) -> None:
        """End every generation because the service ends."""
        if self._link is not None:
            self._link.break_off(Broke.SHUTTING_DOWN)

    async def start(self) -> None:
        """Start the process and wait until its model is in memory. Raises Refusal when that fails."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "examples.roleplay.engine", *self._arguments(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                # Ctrl-C goes to the foreground process group. The API process decides when an engine ends.
                process_group=0,
            )
        loop = asyncio.get_running_loop()
        link = EngineLink(self.shape.name, self._max_waiting, self._on_step)
        self._link = link
        await loop.create_unix_connection(lambda: link, sock=ours)
        try:
            self.parameters = await asyncio.wait_for(asyncio.shield(link.ready), START_SECONDS)
        except (TimeoutError, asyncio.CancelledError):
            if not link.lost.done() and not link.ready.cancelled():
                raise
            status = self._process.wait(timeout=_STOP_SECONDS)
            raise Refusal(
                f"the engine of {self.shape.name} ended with status {status} before it was ready",
                "read the lines above; it needs numpy and about 150 MB",
            ) from None

    async def keep_running(self) -> None:
        """Start the process again whenever it dies. Runs until it is cancelled."""
        while True:
            if self._link is not None:
                await asyncio.shield(self._link.lost)
            status = await self._reap()
            self.restarts += 1
            log.error("the engine of %s ended with status %s; starting it again", self.shape.name, status)
            await asyncio.sleep(_RESTART_SECONDS)
            with contextlib.suppress(Refusal, TimeoutError, OSError):
                await self.start()

    async def stop(self) -> None:
        """End the process. Takes 2 seconds at most."""
        if self._link is not None:
            self._link.close()
        await self._reap()

    async def _reap(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return await asyncio.to_thread(process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _arguments(self, fd: int) -> list[str]:
        cache = "--prefix-cache" if self._prefix_cache else "--no-prefix-cache"
        return ["--model", self.shape.name, "--fd", str(fd), "--parent", str(os.getpid()), cache]


def _environment() -> dict[str, str]:
    """Return this process's environment with one BLAS thread and the package importable."""
    paths = [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
