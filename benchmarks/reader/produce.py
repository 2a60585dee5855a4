"""Makes the system calls that the producer programs turn into records, at a steady rate.

`python -m benchmarks.reader.produce RECORDS_PER_SECOND SECONDS`. Starts when stdin says so; says the seconds it took.
"""

from __future__ import annotations

import ctypes
import sys
import time

RECORDS_PER_CALL = 101


def main() -> None:
    rate, seconds = float(sys.argv[1]), float(sys.argv[2])
    getpgid = ctypes.CDLL(None).getpgid
    calls = int(rate * seconds / RECORDS_PER_CALL)
    period_ns = 1e9 * RECORDS_PER_CALL / rate
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic_ns()
    for index in range(calls):
        # A late call is followed at once by the next: the mean rate holds as long as the CPU is given.
        while time.monotonic_ns() < began + index * period_ns:
            pass
        getpgid(0)
    print((time.monotonic_ns() - began) / 1e9)


if __name__ == "__main__":
    main()
