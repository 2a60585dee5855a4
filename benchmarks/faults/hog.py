"""Burns a CPU until stdin is closed, and then says when it had it: `taskset -c 0 python -m benchmarks.faults.hog`.

It reads the clock without a pause. Two readings that are further apart than `GAP_NS` mean that something else had the
CPU between them. It prints "running" when it begins, and at the end a JSON list of (from ns, until ns).
"""

from __future__ import annotations

import gc
import json
import select
import sys
import time
from typing import Final

import click

from benchmarks.common.processes import end_with_parent
from benchmarks.faults.service import ignore_interrupt

GAP_NS: Final = 50_000
_LOOK_NS: Final = 20_000_000


@click.command(help=__doc__)
def main() -> None:
    ignore_interrupt()
    end_with_parent()
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    gc.disable()
    stretches: list[tuple[int, int]] = []
    now_ns = time.monotonic_ns
    print("running", flush=True)
    since = last = now_ns()
    look = last + _LOOK_NS
    while True:
        now = now_ns()
        if now - last > GAP_NS:
            stretches.append((since, last))
            since = now
        last = now
        if now > look:
            if poll.poll(0):
                break
            look = now + _LOOK_NS
            last = now_ns()
    stretches.append((since, last))
    print(json.dumps(stretches), flush=True)


if __name__ == "__main__":
    main()
