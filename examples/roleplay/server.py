"""Runs the service: binds the port, starts the engines, serves, and ends all of it on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import signal
import socket
import time
from collections.abc import Generator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn

from examples.roleplay.api import Api
from examples.roleplay.engines import Engine
from examples.roleplay.errors import Refusal
from examples.roleplay.lookups import LIBRARY
from examples.roleplay.metrics import ServiceMetrics
from examples.roleplay.model import ModelShape
from examples.roleplay.personas import PersonaStore
from examples.roleplay.process import name_thread, raise_open_file_limit

_KEEP_ALIVE_SECONDS: Final = 75
_SHUTDOWN_SECONDS: Final = 2
_BACKLOG: Final = 2048

log = logging.getLogger("roleplay")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked for. `loop` is uvicorn's: auto, asyncio or uvloop. Port 0 takes a free one."""

    host: str
    port: int
    shapes: tuple[ModelShape, ...]
    personas: Path
    prefix_cache: bool
    max_waiting: int
    loop: str
    access_log: bool


def serve(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises Refusal when the port is taken or an engine does not start."""
    if not options.personas.is_dir():
        raise Refusal(f"{options.personas} is no directory", "--personas DIRECTORY with a YAML file per persona")
    if options.loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        raise Refusal("uvloop is not installed", "pip install uvloop, or --loop asyncio")
    if not LIBRARY.exists():
        log.warning("%s is not built (make native): look-ups in the prefix cache cannot be watched", LIBRARY.name)
    raise_open_file_limit()
    name_thread("roleplay-api")
    with bind(options.host, options.port) as listener:
        metrics = ServiceMetrics(options.shapes, prefix_cache=options.prefix_cache)
        config = uvicorn.Config(
            lambda: None,
            loop=options.loop,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=options.access_log,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            backlog=_BACKLOG,
            server_header=False,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(options, config, listener, metrics))


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises Refusal when the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Refusal(f"port {port} of {host} is taken", f"--port {port + 1}, or --port 0 for a free one") from None
        raise Refusal(f"cannot bind {host} port {port}: {error.strerror}", "--host 127.0.0.1 and a free port") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process before the engines have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _serve(
    options: ServeOptions, config: uvicorn.Config, listener: socket.socket, metrics: ServiceMetrics
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    engines = {
        shape.name: Engine(
            shape, prefix_cache=options.prefix_cache, max_waiting=options.max_waiting, on_step=metrics.step
        )
        for shape in options.shapes
    }
    api = Api(engines, PersonaStore(options.personas, time.monotonic_ns), metrics)
    async with AsyncExitStack() as stack:
        for engine in engines.values():
            stack.push_async_callback(engine.stop)
        if not await _unless(stop, asyncio.gather(*(engine.start() for engine in engines.values()))):
            return
        keepers = [asyncio.create_task(engine.keep_running()) for engine in engines.values()]
        config.app = api.app()
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        _announce(options, listener, engines)
        # A server that ends by itself has failed; `await serving` below raises what it raised.
        stopped = asyncio.create_task(_until(stop))
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        api.closing = True
        stopped.cancel()
        for keeper in keepers:
            keeper.cancel()
        for engine in engines.values():
            engine.break_off()
        server.should_exit = True
        await serving
    log.info("stopped")


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


async def _unless(stop: asyncio.Event, work: asyncio.Future[list[None]]) -> bool:
    """Wait for `work`. False, with `work` cancelled, when `stop` came first; raises what `work` raises."""
    stopped = asyncio.create_task(_until(stop))
    either: set[asyncio.Future[Any]] = {work, stopped}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        stopped.cancel()
        work.result()
        return True
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    return False


def _announce(options: ServeOptions, listener: socket.socket, engines: dict[str, Engine]) -> None:
    for name, engine in engines.items():
        log.info("engine %s: %.1f million parameters, pid %s", name, engine.parameters / 1e6, engine.pid)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    log.info("serving; Ctrl-C ends it")
    # On stdout, so that a script can wait for it and read the port.
    print(f"http://{host}:{port}", flush=True)
