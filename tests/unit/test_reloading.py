"""A configuration that changes in a running agent: what may change, and that every service keeps its place."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from exporter.config import Config, HeaderLabel, Limits, Match, ProbePoint, Probes, Service, parse
from exporter.reloading import MAX_ENCODED_BYTES, SPARE_SERVICES, Changed, Watch, changed, is_gone, merged, places
from exporter.slo.declared import Slo
from probes.errors import ConfigError

A, B, C = (Service(name, Match(port=(port,))) for name, port in (("a", 80), ("b", 81), ("c", 82)))
RELEASE = {"release": HeaderLabel("x-release", ("stable", "canary"))}
RUNNING = Config(services=(A, B))


def go_on(running: Config, *services: Service, room: int = 18) -> Config:
    return merged(running, Config(services=services), room)


def names(config: Config) -> list[str]:
    return [f"({each.name})" if is_gone(each) else each.name for each in config.services]


def test_every_service_keeps_its_place() -> None:
    later = go_on(RUNNING, C, B)
    assert names(later) == ["(a)", "b", "c"]
    assert names(go_on(later, A, C)) == ["a", "(b)", "c"]  # one that comes back is where it was


def test_a_service_takes_its_new_rule_at_once() -> None:
    moved = Service("a", Match(port=(8080,)), engine_metrics="off")
    assert go_on(RUNNING, moved, B).services == (moved, B)


def test_one_that_is_gone_matches_nobody() -> None:
    (gone, _) = go_on(RUNNING, B).services
    assert is_gone(gone)
    assert gone.match.pid == (-1,)
    assert not is_gone(A)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("limits", Limits(memory=99 * 2**20)),
        ("probes", Probes(tcp=False)),
        ("probe_points", (ProbePoint("p", "a.so", "f", None, 1, 2, 3),)),
    ],
)
def test_what_was_sized_or_loaded_at_the_start_needs_a_restart(section: str, value: object) -> None:
    wanted = msgspec.structs.replace(RUNNING, **{section: value})
    with pytest.raises(ConfigError, match=f"{section}: it changed") as caught:
        merged(RUNNING, wanted, 18)
    assert "restart" in caught.value.next_step


def test_a_new_label_needs_a_restart_but_other_values_do_not() -> None:
    labelled = Service("a", A.match, RELEASE)
    with pytest.raises(ConfigError, match="labels: release is new"):
        go_on(RUNNING, labelled, B)
    running = Config(services=(labelled, B))
    fewer = Service("a", A.match, {"release": HeaderLabel("x-release", ("stable",))})
    assert go_on(running, fewer, B).services[0] == fewer
    assert go_on(running, A, B).label_names == ()  # it is absent from now on, and known to the series


def test_a_label_that_the_series_have_may_come_back() -> None:
    labelled = Service("a", A.match, RELEASE)
    without = go_on(Config(services=(labelled, B)), A, B)
    with pytest.raises(ConfigError, match="labels: release is new"):
        go_on(without, labelled, B)
    assert merged(without, Config(services=(labelled, B)), 18, labels=("release",)).services[0] == labelled


def test_there_is_room_for_so_many_services_and_no_more() -> None:
    assert places(RUNNING) == 2 + SPARE_SERVICES
    many = [Service(f"s{number}", Match(port=(number + 1,))) for number in range(3)]
    assert len(go_on(RUNNING, A, B, *many, room=5).services) == 5
    with pytest.raises(ConfigError, match="5 were named since the agent began, and it has room for 4"):
        go_on(RUNNING, *many, room=4)


def test_what_does_not_fit_a_packet_is_refused() -> None:
    long = Service("a", Match(cmdline=tuple("x" * 4000 + str(number) for number in range(400))))
    with pytest.raises(ConfigError, match="bytes"):
        go_on(RUNNING, long)
    assert MAX_ENCODED_BYTES < 400 * 4000
    with pytest.raises(ConfigError, match="bytes") as caught:
        merged(RUNNING, RUNNING, 18, most_bytes=53)
    assert "below 53" in caught.value.next_step


def test_what_crosses_comes_out_as_it_went_in() -> None:
    labelled = Service("a", A.match, RELEASE, "http://127.0.0.1:1/metrics")
    config = Config(services=(labelled, B), slos=(Slo("first-token", "ttft", 0.3, 0.99, service="a"),))
    told = changed(config)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Changed) == told


def test_a_file_is_another_one_when_it_was_written_or_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("x")
    watch = Watch(file)
    assert not watch.changed()
    os.utime(file, ns=(1, 1))
    assert watch.changed()
    assert not watch.changed()
    new = tmp_path / "b.yaml"
    new.write_text("y")
    os.utime(new, ns=(1, 1))
    new.rename(file)
    assert watch.changed()


def test_a_config_map_is_replaced_by_its_link(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.yaml").write_text(folder)
    (tmp_path / "data").symlink_to("one")
    watch = Watch(tmp_path / "data" / "a.yaml")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(tmp_path / "data")
    assert watch.changed()


def test_a_file_that_is_gone_has_not_changed_and_is_seen_when_it_is_back(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("x")
    watch = Watch(file)
    file.unlink()
    assert not watch.changed()
    file.write_text("yy")
    assert watch.changed()


def test_no_file_can_name_a_service_that_is_gone() -> None:
    with pytest.raises(ConfigError):
        parse("services:\n  - name: a\n    match: {pid: -1}\n")
