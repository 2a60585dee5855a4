"""Device files of GPUs: paths with wildcards into device numbers."""

import os
from pathlib import Path

import pytest

from probes import devices
from probes.devices import DeviceFile, find_devices

NULL, ZERO = 1 << 20 | 3, 1 << 20 | 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Names as of two GPUs and the files beside them; links stand for the devices."""
    folder = tmp_path / "dev"
    (folder / "nvidia-caps").mkdir(parents=True)
    (folder / "nvidia0").symlink_to("/dev/null")
    (folder / "nvidia1").symlink_to("/dev/zero")
    (folder / "nvidiactl").write_text("no device")
    (folder / "nvidia-gone").symlink_to("/dev/no-such-device")
    (folder / "nvidia-caps" / "nvidia-cap1").symlink_to("/dev/null")
    return tmp_path


def test_only_character_devices_that_match_are_found(root: Path) -> None:
    assert find_devices(["/dev/nvidia*"], [str(root)]) == (
        DeviceFile(f"{root}/dev/nvidia0", NULL),
        DeviceFile(f"{root}/dev/nvidia1", ZERO),
    )


def test_numbers_are_those_of_the_kernel_inside_of_it() -> None:
    status = Path("/dev/null").stat()
    assert find_devices(["/dev/null"], ["/"]) == (
        DeviceFile("/dev/null", os.major(status.st_rdev) << 20 | os.minor(status.st_rdev)),
    )


def test_a_device_with_several_names_is_one(root: Path) -> None:
    every = find_devices(["/dev/nvidia*", "/dev/nvidia-caps/*"], [str(root), "/"])
    assert [each.number for each in every] == [NULL, ZERO]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_devices(["/dev/nvidia*", "/dev/dri/*"], [str(tmp_path), "/no/such/root"]) == ()


def test_a_root_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "[a]").mkdir()
    (tmp_path / "[a]" / "gpu").symlink_to("/dev/null")
    assert [each.number for each in find_devices(["/gpu"], [f"{tmp_path}/[a]"])] == [NULL]


def test_two_stars_are_no_walk_through_the_host(root: Path) -> None:
    assert find_devices(["/**"], [str(root)]) == ()


def test_there_is_an_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DEVICES_MAX", 1)
    assert [each.number for each in find_devices(["/dev/nvidia*"], [str(root)])] == [NULL]


def test_the_end_is_the_map_s_size() -> None:
    source = (Path(__file__).parents[2] / "bpf" / "scheduler.bpf.c").read_text()
    before, _, _ = source.partition("} gpu_devices SEC")
    assert f"max_entries, {devices.DEVICES_MAX})" in before.rpartition("struct {")[2]
