"""The libbpf binding against the running kernel."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from probes import libbpf
from probes.errors import HostError, ProbeError
from probes.libbpf import Object
from tests.kernel.compile import compile_bpf

SOURCE = Path(__file__).parent / "bpf/transport_records.bpf.c"

_getpgid = ctypes.CDLL(None).getpgid


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_bpf(SOURCE, tmp_path_factory.mktemp("bpf"))


@pytest.fixture
def bpf(compiled: Path) -> Iterator[Object]:
    """The test's object, set up for the ring buffer, neither loaded nor attached."""
    with Object(compiled) as opened:
        opened.set_global("tgid", os.getpid())
        opened.map("perf").set_autocreate(False)
        yield opened


def seen(bpf: Object) -> int:
    value = bpf.map("counts").lookup(struct.pack("=I", 0))
    assert value is not None
    return sum(struct.unpack(f"={len(value) // 8}Q", value))


def key(number: int) -> bytes:
    return struct.pack("=Q", number)


def test_a_links_life_is_the_attachments(bpf: Object) -> None:
    bpf.load()
    (link,) = bpf.attach()
    _getpgid(ctypes.c_int(7))
    link.destroy()
    link.destroy()
    _getpgid(ctypes.c_int(5))
    assert seen(bpf) == 7


def test_a_forked_child_that_closes_detaches_nothing(bpf: Object) -> None:
    bpf.load()
    bpf.attach()
    child = os.fork()
    if not child:
        bpf.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    _getpgid(ctypes.c_int(11))
    assert seen(bpf) == 11


def test_run_statistics_count_the_runs(bpf: Object) -> None:
    bpf.load()
    bpf.attach()
    program = bpf.program("make_records")
    _getpgid(ctypes.c_int(1))
    before = program.stats().runs
    with closing(os.fdopen(libbpf.enable_run_stats(), "rb")):
        for _ in range(101):
            _getpgid(ctypes.c_int(1))
        stats = program.stats()
    assert stats.runs - before >= 101  # the tracepoint fires for every process
    assert 0 < stats.run_ns < 101 * 1_000_000
    assert stats.misses == 0


def test_a_map_with_5003_entries_comes_back_whole(bpf: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    bpf.load()
    numbers = bpf.map("numbers")
    expected = {key(number): struct.pack("=I", number ^ 0x5A5A) for number in range(5003)}
    for each, value in expected.items():
        numbers.update(each, value)
    assert dict(numbers.items()) == expected
    assert len(list(numbers.items())) == 5003
    monkeypatch.setattr(libbpf, "_BATCH_BYTES", 1)  # one entry fits: hash buckets with more make the batch grow
    assert dict(numbers.items()) == expected
    assert dict(numbers._items_one_by_one()) == expected
    assert numbers.delete(key(23))
    assert not numbers.delete(key(23))
    assert numbers.lookup(key(23)) is None
    assert len(dict(numbers.items())) == 5002


def test_a_full_map_says_so(bpf: Object) -> None:
    bpf.map("numbers").max_entries = 13
    bpf.load()
    with pytest.raises(ProbeError, match="update: Argument list too long"):
        for number in range(1009):
            bpf.map("numbers").update(key(number), bytes(4))


def test_per_cpu_values_come_joined(bpf: Object) -> None:
    bpf.load()
    counts = bpf.map("counts")
    assert counts.entry_size == 8 * libbpf.possible_cpus()
    assert dict(counts.items()) == {struct.pack("=I", number): bytes(counts.entry_size) for number in range(3)}


def test_keys_and_values_of_a_wrong_size_are_refused(bpf: Object) -> None:
    bpf.load()
    numbers = bpf.map("numbers")
    with pytest.raises(ProbeError, match="a key of 4 bytes, wanted 8"):
        numbers.lookup(bytes(4))
    with pytest.raises(ProbeError, match="a value of 8 bytes, wanted 4"):
        numbers.update(bytes(8), bytes(8))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("use_perf", 256, "does not fit the 1 bytes"), ("tgid", -(1 << 31) - 1, "does not fit the 4 bytes")],
)
def test_globals_that_do_not_fit_are_refused(bpf: Object, name: str, value: int, why: str) -> None:
    with pytest.raises(ProbeError, match=why):
        bpf.set_global(name, value)


def test_what_is_not_in_the_object_is_named(bpf: Object) -> None:
    with pytest.raises(ProbeError, match="no global nothing"):
        bpf.set_global("nothing", 1)
    with pytest.raises(ProbeError, match="no map nothing"):
        bpf.map("nothing")
    with pytest.raises(ProbeError, match="no program nothing"):
        bpf.program("nothing")


def test_descriptors_exist_after_load_for_what_was_wanted(bpf: Object) -> None:
    with pytest.raises(ProbeError, match="was not made"):
        bpf.map("ring").fd  # noqa: B018 asking is what fails
    with pytest.raises(ProbeError, match="is not loaded"):
        bpf.program("make_records").fd  # noqa: B018 asking is what fails
    bpf.load()
    assert bpf.map("ring").fd > 0
    assert bpf.program("make_records").fd > 0
    with pytest.raises(ProbeError, match="was not made"):
        bpf.map("perf").fd  # noqa: B018 asking is what fails
    with pytest.raises(ProbeError, match="set after load"):
        bpf.set_global("tgid", 1)


def test_programs_that_are_not_wanted_are_not_loaded(bpf: Object) -> None:
    bpf.program("make_records").set_autoload(False)
    bpf.load()
    assert bpf.attach() == []


def test_a_refused_program_comes_with_the_verifiers_log(compiled: Path) -> None:
    with Object(compiled) as bpf:
        bpf.set_global("use_perf", 1)
        bpf.map("perf").set_autocreate(False)
        with pytest.raises(ProbeError, match="BPF map 'perf' is referenced but wasn't created") as raised:
            bpf.load()
    assert len(raised.value.what) < 3000


def test_files_that_are_no_objects(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="there is no BPF object"):
        Object(tmp_path / "none")
    text = tmp_path / "text"
    text.write_text("no ELF at all, but some text that is long enough for a header of sixty-four bytes or more")
    with pytest.raises(ProbeError, match="BPF object format invalid"):
        Object(text)


def test_a_closed_object_is_not_touched(bpf: Object) -> None:
    bpf.load()
    numbers, program = bpf.map("numbers"), bpf.program("make_records")
    bpf.close()
    bpf.close()
    for use in (lambda: numbers.lookup(bytes(8)), program.attach, program.stats, bpf.load):
        with pytest.raises(ProbeError, match="is closed"):
            use()


def test_without_tracefs_the_message_says_how_to_mount_it(bpf: Object, tmp_path: Path) -> None:
    program = bpf.program("make_records")
    missing = program._attach_failure(2, sysfs=tmp_path)
    assert isinstance(missing, HostError)
    assert missing.next_step == f"mount -t tracefs tracefs {tmp_path}/kernel/tracing"
    (tmp_path / "kernel/tracing/events").mkdir(parents=True)
    unknown = program._attach_failure(2, sysfs=tmp_path)
    assert "no tracepoint syscalls/sys_enter_getpgid" in unknown.what


def test_without_privileges_the_host_is_at_fault(compiled: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        try:
            libbpf.has_ring_buffer()
        except HostError as error:
            os.write(writer, error.next_step.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        assert said.read() == b"run as root"


def test_features_are_found_by_trying() -> None:
    assert libbpf.version().startswith("v1.")
    assert libbpf.has_ring_buffer()
    assert libbpf.has_btf_tracepoint("tcp_probe")
    assert not libbpf.has_btf_tracepoint("nothing")


def test_the_privileged_side_imports_no_numpy() -> None:
    code = "import sys, probes.libbpf, probes.perf_buffers; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
