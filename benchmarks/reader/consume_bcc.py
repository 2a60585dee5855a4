"""The reader on BCC's ring-buffer callback, one Python call per record.

Run with the system's Python, which has BCC: `python3 consume_bcc.py TGID RING_BYTES`. Says "ready" on stdout once
attached, reads every 20 ms until stdin ends, then says what came as one JSON object.
"""

from __future__ import annotations

import json
import mmap
import select
import sys
import time
from pathlib import Path
from typing import Any

from bcc import BPF  # type: ignore[import-not-found]  # Debian's python3-bpfcc, not in the virtual environment

BUCKETS = 61
POLL_SECONDS = 0.02


def main() -> None:
    tgid, ring_bytes = int(sys.argv[1]), int(sys.argv[2])
    text = (Path(__file__).parent / "producer_bcc.c").read_text()
    flags = [f"-DTGID={tgid}", f"-DPAGES={ring_bytes // mmap.PAGESIZE}", "-Wno-macro-redefined"]
    bpf = BPF(text=text, cflags=flags)
    ring = bpf["ring"]
    histogram = [0] * BUCKETS

    def on_record(_context: Any, data: Any, _size: int) -> None:  # noqa: ANN401 ctypes' own pointers
        histogram[ring.event(data).bucket] += 1

    ring.open_ring_buffer(on_record)
    print("ready", flush=True)
    began = time.process_time()
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        bpf.ring_buffer_consume()
    bpf.ring_buffer_consume()
    cpu_seconds = time.process_time() - began
    offered, lost = (bpf["counts"][index].value for index in range(2))
    result = {"received": sum(histogram), "offered": offered, "lost": lost, "cpu_seconds": cpu_seconds}
    print(json.dumps(result | {"histogram": histogram}))


if __name__ == "__main__":
    main()
