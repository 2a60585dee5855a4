"""Control groups for tests and benchmarks, against made mounts: where a controller is found, what a host is told."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from benchmarks.common import cgroups
from benchmarks.common.cgroups import Place


class Host:
    """A made mountinfo, and folders that stand for what it says."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.mountinfo = root / "mountinfo"
        self.mountinfo.write_text("23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n")

    def mount(self, name: str, kind: str, options: str, *, rights: str = "rw,relatime", controllers: str = "") -> Path:
        folder = self._root / name
        folder.mkdir()
        (folder / "cgroup.procs").touch()
        if kind == "cgroup2":
            (folder / "cgroup.controllers").write_text(controllers + "\n")
            (folder / "cgroup.subtree_control").write_text("pids\n")
        where = str(folder).replace(" ", "\\040")
        with self.mountinfo.open("a") as file:
            file.write(f"31 23 0:29 / {where} {rights} shared:9 - {kind} {kind} {options}\n")
        return folder


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_controller_is_found_in_the_version_that_has_it(host: Host):
    v1 = host.mount("cpu and more", "cgroup", "rw,cpuacct,cpu")
    host.mount("read only", "cgroup", "rw,blkio", rights="ro,relatime")
    v2 = host.mount("unified", "cgroup2", "rw", controllers="io hugetlb")
    assert cgroups.find("cpu", host.mountinfo) == Place(1, v1)
    assert cgroups.find("io", host.mountinfo) == Place(2, v2)
    assert cgroups.find("memory", host.mountinfo) is None


def test_a_host_without_the_controller_is_told_what_to_mount(host: Host):
    advice = cgroups.missing("memory", mountinfo=host.mountinfo)
    assert advice is not None
    assert "needs the cgroup controller memory" in advice
    assert "mount -t cgroup2 cgroup2 /sys/fs/cgroup, or mount -t cgroup -o memory" in advice
    host.mount("unified", "cgroup2", "rw", controllers="cpu")
    assert cgroups.missing("cpu", mountinfo=host.mountinfo) is None
    advice = cgroups.missing("cpu", "io", mountinfo=host.mountinfo)
    assert advice is not None
    assert advice.endswith(": mount -t cgroup -o blkio cgroup /sys/fs/cgroup/blkio")
    with (
        pytest.raises(click.ClickException, match="needs the cgroup controller io"),
        cgroups.group("io", mountinfo=host.mountinfo),
    ):
        pass
