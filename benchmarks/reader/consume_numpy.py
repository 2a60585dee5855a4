"""The reader that Footlight uses: batches of records as numpy arrays.

`python -m benchmarks.reader.consume_numpy OBJECT TGID RING_BYTES ring|perf`. Says "ready" on stdout once attached,
reads every 20 ms until stdin ends, then says what came as one JSON object.
"""

from __future__ import annotations

import json
import mmap
import select
import struct
import sys
import time
from pathlib import Path

import numpy as np

from probes.btf import dtype_of, enum_of
from probes.libbpf import Object
from probes.perf_buffers import open_perf_buffers
from probes.transport import PerfSource, RecordSource, RingSource

BUCKETS = 61
POLL_SECONDS = 0.02
BATCH_RECORDS = 16384  # 768 KiB of ring: the second look at a batch finds it in a cache of 1 MiB


def drain(source: RecordSource, histogram: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Add what is there to `histogram`, (BUCKETS,). Ends with the first short batch, not with an empty one: while it
    counts a batch, the producer makes the next few records, and the loop would never sleep."""
    short = False
    while not short:
        batch = source.pending(BATCH_RECORDS)
        histogram += np.bincount(batch["bucket"], minlength=BUCKETS)
        source.consume(len(batch))
        short = len(batch) < BATCH_RECORDS


def main() -> None:
    path, tgid, ring_bytes, transport = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    perf = transport == "perf"
    with Object(path) as bpf:
        bpf.set_global("tgid", tgid)
        bpf.set_global("use_perf", perf)
        bpf.map("ring").max_entries = ring_bytes
        bpf.map("ring" if perf else "perf").set_autocreate(False)
        bpf.load()
        dtype = dtype_of(path, "bench_record")
        source: RecordSource
        if perf:
            pages = ring_bytes // mmap.PAGESIZE
            source = PerfSource(open_perf_buffers(bpf.map("perf"), pages), pages, dtype)
        else:
            source = RingSource(bpf.map("ring").fd, ring_bytes, dtype)
        histogram = np.zeros(BUCKETS, np.int64)
        bpf.attach()
        print("ready", flush=True)
        began = time.process_time()
        while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            drain(source, histogram)
        if perf:
            time.sleep(0.003)  # what is younger than 2 ms is held back
        drain(source, histogram)
        cpu_seconds = time.process_time() - began
        numbers = enum_of(path, "count")
        counts = {name: bpf.map("counts").lookup(struct.pack("=I", number)) for name, number in numbers.items()}
        offered, lost = (struct.unpack("=Q", counts[name] or b"")[0] for name in ("CNT_OFFERED", "CNT_LOST"))
        result = {"received": int(histogram.sum()), "offered": offered, "lost": lost, "cpu_seconds": cpu_seconds}
        print(json.dumps(result | {"histogram": histogram.tolist()}))


if __name__ == "__main__":
    main()
