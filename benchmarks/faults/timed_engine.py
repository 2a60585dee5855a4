"""A chat service of two processes: an API whose frames cost CPU time, and an engine whose steps only take time.

The engine stands for one that waits for a GPU: it sleeps until its next token is due, and sends it over a Unix socket:
whether or not the API keeps up, or, in step, only when the API has sent the last one to the user.

`python -m benchmarks.faults.timed_engine` prints the API's URL when it serves; the engine is the API's child. One
request at a time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Final

import click

from benchmarks.common import frames
from benchmarks.common.processes import end_with_parent
from benchmarks.faults.service import HEAD, Ask, chunk, ignore_interrupt, name_thread, received_request

_TOKEN: Final = b"t"


def engine(connection: socket.socket, step_s: float) -> None:
    """Send as many tokens as asked for, one each `step_s`, until the API is gone."""
    while asked := connection.recv(16):
        due = time.monotonic()
        for _ in range(int(asked)):
            due += step_s
            time.sleep(max(0.0, due - time.monotonic()))
            connection.sendall(_TOKEN)


async def serve(listener: socket.socket, link: socket.socket, frame_cpu_s: float, *, in_step: bool) -> None:
    """Serve until the process ends; each frame costs `frame_cpu_s` of CPU time."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    link.setblocking(False)
    while True:
        connected, _ = await loop.sock_accept(listener)
        with connected:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask = await received_request(loop, connected)
            if ask is not None:
                await _reply(loop, connected, link, ask, frame_cpu_s, in_step)


async def _reply(
    loop: asyncio.AbstractEventLoop,
    connected: socket.socket,
    link: socket.socket,
    ask: Ask,
    frame_cpu_s: float,
    in_step: bool,
) -> None:
    await loop.sock_sendall(connected, HEAD + chunk(frames.frame(ask.model, {"role": "assistant", "content": ""})))
    if not in_step:
        await loop.sock_sendall(link, str(ask.script.frames).encode())
    for _ in range(ask.script.frames):
        if in_step:
            await loop.sock_sendall(link, b"1")
        await loop.sock_recv(link, len(_TOKEN))
        end = time.thread_time() + frame_cpu_s
        while time.thread_time() < end:
            pass
        await loop.sock_sendall(connected, chunk(frames.frame(ask.model, {"content": "word"})))
    await loop.sock_sendall(connected, chunk(frames.usage(ask.model, ask.script.frames)))
    await loop.sock_sendall(connected, chunk(frames.DONE) + b"0\r\n\r\n")


@click.command(help=__doc__)
@click.option("--step", "step_s", default=0.010, show_default=True, help="Seconds that the engine takes for a token.")
@click.option("--frame-cpu", "frame_cpu_s", default=0.004, show_default=True, help="CPU seconds of the API per frame.")
@click.option("--in-step", is_flag=True, help="Let the engine wait for the API before each token.")
def main(step_s: float, frame_cpu_s: float, in_step: bool) -> None:
    ignore_interrupt()
    end_with_parent()
    ours, theirs = socket.socketpair()
    if not os.fork():
        end_with_parent()
        ours.close()
        name_thread("engine")
        engine(theirs, step_s)
        os._exit(0)
    theirs.close()
    name_thread("api")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.write(1, f"http://127.0.0.1:{listener.getsockname()[1]}\n".encode())
        asyncio.run(serve(listener, ours, frame_cpu_s, in_step=in_step))


if __name__ == "__main__":
    main()
