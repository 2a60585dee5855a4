"""The configuration: what is taken, and that what is refused is named with its path, line and remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.config import (
    Address,
    Config,
    HeaderLabel,
    Limits,
    Match,
    Probes,
    Service,
    from_options,
    load,
    parse,
    parse_address,
    parse_percent,
    parse_size,
)
from probes.errors import ConfigError

FULL = """\
listen: 0.0.0.0:9467
services:
  - name: roleplay
    match: {port: 8000, exe: [python3.11, /usr/bin/vllm]}
    labels:
      release: {header: X-Release-Stage, values: [stable, canary, no, 1]}
  - name: team/companion.eu-1
    match:
      cgroup: /kubepods/burstable
      cmdline: "uvicorn app:main"
      pid: [23, 29]
probes: {requests: on}
limits: {models_per_service: 7, connections: 4099, memory: 1.5GiB, cpu: 0.5%}
"""

BASE = "services:\n  - name: a\n    match: {port: 80}\n"


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "agent.yaml")
    assert caught.value.path == "agent.yaml"
    assert caught.value.exit_code == 4
    assert caught.value.next_step
    return caught.value


def test_every_key_of_the_contract_is_read(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(FULL)
    assert load(file) == Config(
        listen=Address("0.0.0.0", 9467),
        services=(
            Service(
                "roleplay",
                Match(port=(8000,), exe=("python3.11", "/usr/bin/vllm")),
                {"release": HeaderLabel("x-release-stage", ("stable", "canary", "no", "1"))},
            ),
            Service(
                "team/companion.eu-1",
                Match(pid=(23, 29), cmdline=("uvicorn app:main",), cgroup=("/kubepods/burstable",)),
            ),
        ),
        probes=Probes(requests=True),
        limits=Limits(models_per_service=7, connections=4099, memory=3 * 2**29, cpu=0.005),
    )
    assert load(file).label_names == ("release",)


def test_only_services_are_required() -> None:
    assert parse(BASE) == Config(services=(Service("a", Match(port=(80,))),))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load(file).services[0].name == "a"


@pytest.mark.parametrize(
    ("text", "line", "what", "next_step"),
    [
        # keys
        (BASE + "lisen: 1:2\n", 4, "unknown key 'lisen'", "did you mean 'listen'?"),
        (BASE + "slos: []\n", 4, "unknown key 'slos'", "allowed here: listen, services, probes, limits"),
        ("services:\n- name: a\n  match:\n    prot: 80\n", 4, "services[0].match: unknown key 'prot'", "'port'"),
        ("services:\n- match: {port: 80}\n", 2, "services[0]: the key 'name' is missing", "`name:`"),
        ("services:\n- name: a\n", 2, "services[0]: the key 'match' is missing", "`match:`"),
        ("listen: :1\n", 1, "the key 'services' is missing", "`services:`"),
        (BASE + "limits:\n  cpu: 1%\n  cpu: 2%\n", 6, "limits: the key 'cpu' is given twice", "keep one"),
        (BASE + "? [a, b]\n: 1\n", 4, "a key must be text", "key: value"),
        (BASE + "<<: {listen: ':1'}\n", 4, "unknown key '<<'", "allowed here"),
        # types
        ("services: roleplay\n", 1, "services: must be a list, not 'roleplay'", "- item"),
        ("services: []\n", 1, "services: there are 0 services", "1 to 64"),
        ("services:\n- 8000\n", 2, "services[0]: must be a mapping of keys to values, not the number '8000'", "key: v"),
        ("services:\n- name: 7\n  match: {port: 80}\n", 2, "services[0].name: must be text, not the number", '"7"'),
        ("services:\n- name:\n  match: {port: 80}\n", 2, "services[0].name: must be text, not nothing", "give a value"),
        ("services:\n- name: a\n  match: {}\n", 3, "services[0].match: no condition is given", "pid, port, exe"),
        (
            "services:\n- name: a\n  match: {port: '80'}\n",
            3,
            "whole number from 1 to 65535, not '80'",
            "without quotes",
        ),
        ("services:\n- name: a\n  match: {port: []}\n", 3, "services[0].match.port: the list is empty", "at least one"),
        (
            "services:\n- name: a\n  match: {port: [80, 65536]}\n",
            3,
            "services[0].match.port[1]: must be a wh",
            "digits",
        ),
        ("services:\n- name: a\n  match: {port: 1_000}\n", 3, "must be a whole number", "digits"),
        ("services:\n- name: a\n  match: {port: +7}\n", 3, "must be a whole number", "digits"),
        ("services:\n- name: a\n  match: {pid: 1:30}\n", 3, "services[0].match.pid: must be a whole number", "digits"),
        ("services:\n- name: a\n  match: {port: 0}\n", 3, "from 1 to 65535, not the number '0'", "digits"),
        (
            "services:\n- name: a\n  match: {exe: on}\n",
            3,
            "services[0].match.exe: must be text, not the switch",
            '"on"',
        ),
        ('services:\n- name: a\n  match: {exe: "a\\nb"}\n', 3, "without control characters", "correct the text"),
        # values
        ("services:\n- name: 'a b'\n  match: {port: 80}\n", 2, "'a b' is not a service name", "A-Z a-z 0-9"),
        (BASE + "  - name: a\n    match: {port: 81}\n", 4, "the name 'a' is given twice", "name of its own"),
        (BASE + "  - name: b\n    match: {port: 80}\n", 4, "matches the same processes as 'a'", "differ"),
        (BASE + "listen: localhost\n", 4, "listen: 'localhost' is not an address", "HOST:PORT"),
        (BASE + "listen: 127.0.0.1:65536\n", 4, "listen: '127.0.0.1:65536' is not an address", "0 to 65535"),
        (BASE + "probes: {requests: maybe}\n", 4, "probes.requests: must be on or off, not 'maybe'", "`on`"),
        (BASE + "probes: {requests: off}\n", 4, "probes.requests: cannot be off", "remove the line"),
        (BASE + "limits: {memory: 120}\n", 4, "limits.memory: must be a size from 64MiB to 64GiB", "such as 120MiB"),
        (BASE + "limits: {memory: 120Mb}\n", 4, "limits.memory: must be a size", "kB, MB, GB, KiB, MiB, GiB"),
        (BASE + "limits: {memory: 1MiB}\n", 4, "limits.memory: must be a size from 64MiB", "120MiB"),
        (BASE + "limits: {cpu: 2}\n", 4, "limits.cpu: must be above 0%", "such as 2%"),
        (BASE + "limits: {cpu: 0%}\n", 4, "limits.cpu: must be above 0%", "such as 2%"),
        (BASE + "limits: {cpu: .nan}\n", 4, "limits.cpu: must be above 0%", "such as 2%"),
        (BASE + "limits: {models_per_service: 0}\n", 4, "must be a whole number from 1 to 4096", "digits"),
        # labels
        (BASE + "    labels: {api: {header: x, values: [a]}}\n", 4, "the label name 'api' is taken", "another"),
        (BASE + "    labels: {le: {header: x, values: [a]}}\n", 4, "the label name 'le' is taken", "another"),
        (BASE + "    labels: {a-b: {header: x, values: [a]}}\n", 4, "'a-b' is not a label name", "letters, digits"),
        (BASE + "    labels: {r: {header: 'x y', values: [a]}}\n", 4, "not the name of an HTTP header", "x-release-s"),
        (BASE + "    labels: {r: {header: x, values: [_other]}}\n", 4, "'_other' is what the agent", "remove it"),
        (BASE + "    labels: {r: {header: x, values: [' a']}}\n", 4, "' a' is not a label value", "no space"),
        (BASE + "    labels: {r: {header: x}}\n", 4, "services[0].labels.r: the key 'values' is missing", "`values:`"),
        # YAML itself
        ("", 1, "the configuration is empty", "README"),
        ("# nothing\n", 1, "the configuration is empty", "README"),
        ("services:\n\t- name: a\n", 2, "a tab stands where YAML wants spaces", "indent with spaces"),
        ("services: [\n", 2, "not valid YAML", "correct the line"),
        ("services: 'a\n", 2, "not valid YAML", "correct the line"),
        (BASE + "---\n" + BASE, 4, "more than one YAML document", "`---`"),
        ("a: &x [1]\nb: *x\n", 2, "the alias *x is not allowed", "write the value out"),
        ("a: !!python/object:os.system x\n", 1, "a YAML tag (!...) is not allowed", "remove the tag"),
        ("a: !!int 3\n", 1, "a YAML tag", "remove the tag"),
        ("[" * 33 + "]" * 33, 1, "nested more than 32 deep", "README"),
        ("a: b\n\x07", 2, "a character is not allowed in YAML", "control characters"),
    ],
)
def test_what_is_refused_is_named(text: str, line: int, what: str, next_step: str) -> None:
    error = refused(text)
    assert what in error.what
    assert next_step in error.next_step
    assert error.line == line


def test_the_depth_of_the_nesting_costs_nothing() -> None:
    assert "nested more than 32 deep" in refused("[" * 500_000).what


def test_a_billion_laughs_are_refused_at_the_first_alias() -> None:
    laughs = "a: &a [lol, lol]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert refused(laughs).line == 2


def test_labels_are_bounded() -> None:
    labels = "".join(f"      l{number}: {{header: x, values: [a]}}\n" for number in range(5))
    assert "there are 5 labels" in refused(BASE + "    labels:\n" + labels).what
    values = ", ".join(f"v{number}" for number in range(33))
    error = refused(BASE + f"    labels:\n      r: {{header: x, values: [{values}]}}\n")
    assert (error.what, error.line) == ("services[0].labels.r.values: there are 33 values", 5)


def test_a_header_value_becomes_one_of_the_listed_ones() -> None:
    label = HeaderLabel("x-release-stage", ("stable", "canary"))
    assert label.value_of(b" stable ") == "stable"
    assert label.value_of(b"evil\xff") == "_other"
    assert label.value_of(None) == "_none"


# ---- the file ----


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(tmp_path / "none.yaml")
    assert caught.value.path == str(tmp_path / "none.yaml")
    assert caught.value.line is None


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path / "fifo")


def test_bytes_that_are_no_utf8_have_a_line(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_bytes(b"listen: :1\n# caf\xe9\n")
    with pytest.raises(ConfigError, match="byte 16 is not UTF-8") as caught:
        load(file)
    assert caught.value.line == 2


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load(file)


def test_a_path_with_a_null_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="null byte"):
        load("a\0b")


# ---- the command line ----


def test_options_make_one_service() -> None:
    config = from_options(port=[8000], exe=["/usr/bin/vllm"], listen="[::1]:0")
    assert config.services == (Service("vllm", Match(port=(8000,), exe=("/usr/bin/vllm",))),)
    assert config.listen == Address("::1", 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": [8000, 8001]}, "port-8000"),
        ({"pid": [23]}, "pid-23"),
        ({"cgroup": ["/system.slice/vllm.service/"]}, "vllm.service"),
        ({"cmdline": ["uvicorn app:main --reload"]}, "uvicorn-app-main---reload"),
        ({"cmdline": ["/// "]}, "service"),
        ({"exe": ["..x"]}, "x"),
    ],
)
def test_a_service_is_named_after_its_first_condition(options: dict[str, list[str]], name: str) -> None:
    assert from_options(**options).services[0].name == name  # type: ignore[arg-type]  # one dict for all options


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "no target is named"),
        ({"port": [65536]}, "port 65536 is out of range"),
        ({"pid": [0]}, "pid 0 is out of range"),
        ({"exe": [""]}, "cannot match any process"),
        ({"port": [1], "service": "a b"}, "is not a service name"),
        ({"port": [1], "listen": "nope"}, "is not an address"),
    ],
)
def test_options_are_checked(options: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        from_options(**options)  # type: ignore[arg-type]  # one dict for all options


# ---- values with units ----


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9466", Address("127.0.0.1", 9466)),
        (":0", Address("", 0)),
        ("[::]:1", Address("::", 1)),
        ("node-1.example:80", Address("node-1.example", 80)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "9466", "::1:80", "[127.0.0.1]:80", "a_b:80", "a:", "a:\u0661", "a:-1", "-a:1", "a b:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


def test_sizes_and_percentages() -> None:
    assert [parse_size(text) for text in ("7B", "2kB", "1.5MiB", "3 GB")] == [7, 2000, 3 * 2**19, 3 * 10**9]
    assert [parse_percent(text) for text in ("2%", "12.5 %")] == [0.02, 0.125]
    for text in ("", "7", "MiB", "-1MiB", "1e3MiB", "7 mib", "\u0661MiB"):
        with pytest.raises(ValueError, match="^" + text):
            parse_size(text)
    for text in ("", "2", "%", "-1%", "1e2%", "nan%"):
        with pytest.raises(ValueError, match="^" + text):
            parse_percent(text)


def test_the_attacher_pays_for_nothing_it_does_not_need() -> None:
    modules = "exporter.config, exporter.fronts, probes.discovery, probes.host, probes.privileges"
    heavy = "{'numpy', 'yaml', 'rich', 'starlette', 'uvicorn', 'prometheus_client'}"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"
