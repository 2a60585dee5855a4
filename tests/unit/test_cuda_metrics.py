"""The gpu_cuda_* families over counters as the kernel's map has them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from exporter.cuda_metrics import DIRECTIONS, ERRORS, LAUNCHES, WAITS, cuda_families
from exporter.families import Kind, Scrape
from exporter.kernel_metrics import BUCKETS
from exporter.slis import Histogram
from exporter.status import ReaderStatus
from probes import btf
from probes.probe import OBJECTS

OBJECT = OBJECTS / "cuda.bpf.o"
Values = dict[tuple[str, ...], float | Histogram]


def scrape(**members: object) -> Scrape:
    """A scrape of two services; the first one's counters are `members`, the rest is zero."""
    counters = np.zeros(2, btf.dtype_of(OBJECT, "cuda_stats"))
    for name, value in members.items():
        counters[name][0] = value
    return Scrape(0, 0.0, (), None, ReaderStatus(0), services=("chat", "idle"), kernel={"cuda": counters})


def values(of: Scrape) -> Mapping[str, Values]:
    return {family.spec.name: dict(family.points(of)) for family in cuda_families()}


def test_each_counter_is_where_its_name_says() -> None:
    found = values(
        scrape(
            launches=[10_007, 3],
            copies=[2, 101, 5, 7],
            copied_bytes=[11, 413_999, 13, 17],
            allocations=23,
            frees=19,
            allocated_bytes=1 << 40,
            freed_bytes=1,
            wait_errors=29,
            copy_errors=31,
            allocation_errors=37,
            free_errors=41,
        )
    )
    assert found["gpu_cuda_launches"][("chat", "kernel")] == 10_007
    assert found["gpu_cuda_launches"][("chat", "graph")] == 3
    assert [found["gpu_cuda_copies"][("chat", each)] for each in DIRECTIONS] == [2, 101, 5, 7]
    assert found["gpu_cuda_copies"][("chat", "host_to_device")] == 101
    assert found["gpu_cuda_copies"][("chat", "device_to_host")] == 5
    assert found["gpu_cuda_copy_bytes"][("chat", "host_to_device")] == 413_999
    assert found["gpu_cuda_allocations"][("chat",)] == 23
    assert found["gpu_cuda_frees"][("chat",)] == 19
    assert found["gpu_cuda_outstanding_bytes"][("chat",)] == (1 << 40) - 1
    errors = {call: found["gpu_cuda_errors"][("chat", call)] for call in ERRORS}
    assert errors == {"synchronize": 29, "copy": 31, "allocate": 37, "free": 41}


def test_waits_are_histograms_by_what_was_waited_for() -> None:
    waits = np.zeros(len(WAITS), btf.dtype_of(OBJECT, "cuda_stats")["waits"].base)
    waits[WAITS.index("stream")] = (53 * 20_000_000, [0] * 15 + [53] + [0] * (BUCKETS - 16))
    found = values(scrape(waits=waits))["gpu_cuda_synchronize_seconds"]
    stalls, others = found[("chat", "stream")], found[("chat", "event")]
    assert isinstance(stalls, Histogram)
    assert isinstance(others, Histogram)
    assert (stalls.sum_ns, sum(stalls.counts)) == (53 * 20_000_000, 53)
    assert sum(others.counts) == 0


def test_memory_is_never_negative() -> None:
    found = values(scrape(allocated_bytes=3, freed_bytes=5))
    assert found["gpu_cuda_outstanding_bytes"][("chat",)] == 0


def test_every_service_and_label_is_there_from_the_start() -> None:
    for name, points in values(scrape()).items():
        services = [labels[0] for labels in points]
        assert services.count("chat") == services.count("idle") > 0, name


def test_room_for_services_that_are_not_there_is_not_shown() -> None:
    given = scrape(allocations=3)
    nameless = Scrape(0, 0.0, (), None, ReaderStatus(0), services=("chat", ""), kernel=given.kernel)
    assert {labels[0] for points in values(nameless).values() for labels in points} == {"chat"}


def test_there_is_nothing_where_the_probe_is_off() -> None:
    empty = Scrape(0, 0.0, (), None, ReaderStatus(0), services=("chat",))
    assert not any(values(empty).values())


def test_labels_are_as_many_as_the_c_structure_has_places() -> None:
    dtype = btf.dtype_of(OBJECT, "cuda_stats")
    assert dtype["launches"].shape == (len(LAUNCHES),)
    assert dtype["copies"].shape == dtype["copied_bytes"].shape == (len(DIRECTIONS),)
    assert dtype["waits"].shape == (len(WAITS),)
    assert {name for name in dtype.names or () if name.endswith("_errors")} == set(ERRORS.values())


@pytest.mark.parametrize("family", cuda_families(), ids=lambda family: family.spec.name)
def test_names_follow_the_contract(family: object) -> None:
    (spec,) = [each.spec for each in cuda_families() if each is family]
    assert spec.name.startswith("gpu_cuda_")
    assert not spec.name.endswith("_total")
    assert not spec.unit or spec.name.endswith(spec.unit)
    assert bool(spec.bounds) == (spec.kind is Kind.HISTOGRAM)
