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
    GpuConfig,
    HeaderLabel,
    Limits,
    Match,
    ProbePoint,
    Probes,
    RecorderConfig,
    Service,
    from_options,
    load,
    parse,
    parse_address,
)
from exporter.document import parse_duration, parse_percent, parse_size
from exporter.slis import Sli
from exporter.slo.declared import MAX_SLOS, SLO_SLIS, Slo
from probes.errors import ConfigError

FULL = """\
listen: 0.0.0.0:9467
services:
  - name: roleplay
    match: {port: 8000, exe: [python3.11, /usr/bin/vllm]}
    labels:
      release: {header: X-Release-Stage, values: [stable, canary, no, 1]}
    engine_metrics: http://10.0.0.7:8001/metrics
  - name: team/companion.eu-1
    engine_metrics: off
    match:
      cgroup: /kubepods/burstable
      cmdline: "uvicorn app:main"
      pid: [23, 29]
probes: {requests: on, syscalls: on, block: off, gpu: on, cuda: yes}
gpu: {library: /opt/driver/libnvidia-ml.so.1, period: 500ms, devices: /dev/nvidia7}
probe_points:
  - {name: look-up, library: libllm_kv.so, symbol: llm_kv_lookup, model: 1, hit_tokens: 2, looked_up_tokens: 3}
  - name: twin
    service: roleplay
    library: /usr/lib/libllm_kv.so
    usdt: roleplay:kv_lookup
    hit_tokens: 2
    looked_up_tokens: 1
limits: {models_per_service: 7, connections: 4099, memory: 1.5GiB, cpu: 0.5%}
slos:
  - {name: first-token, sli: ttft, below: 300ms, target: 99%}
  - name: smooth-2
    sli: longest_gap
    below: 1.5 s
    target: 99.9%
    window: 7d
    service: team/companion.eu-1
    model_name: bard/7b
  - {name: every, sli: itl, below: 50ms, target: 95%, service: "*", model_name: "*"}
recorder: {folder: /var/lib/footlight, files: 7, size: 1GiB}
"""

BASE = "services:\n  - name: a\n    match: {port: 80}\n"
SLO_ITEM = "  - {name: a, sli: ttft, below: 300ms, target: 99%}\n"
SLO = "slos:\n" + SLO_ITEM
POINT = "probe_points:\n  - {name: p, library: a.so, symbol: f, hit_tokens: 2, looked_up_tokens: 3}\n"


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
                "http://10.0.0.7:8001/metrics",
            ),
            Service(
                "team/companion.eu-1",
                Match(pid=(23, 29), cmdline=("uvicorn app:main",), cgroup=("/kubepods/burstable",)),
                engine_metrics="off",
            ),
        ),
        probes=Probes(requests=True, syscalls=True, block=False, gpu="on", cuda=True),
        limits=Limits(models_per_service=7, connections=4099, memory=3 * 2**29, cpu=0.005),
        slos=(
            Slo("first-token", "ttft", 0.3, 0.99),
            Slo("smooth-2", "longest_gap", 1.5, 0.999, 7 * 86400, "team/companion.eu-1", "bard/7b"),
            Slo("every", "itl", 0.05, 0.95),
        ),
        recorder=RecorderConfig("/var/lib/footlight", 7, 2**30),
        gpu=GpuConfig("/opt/driver/libnvidia-ml.so.1", 0.5, ("/dev/nvidia7",)),
        probe_points=(
            ProbePoint("look-up", "libllm_kv.so", "llm_kv_lookup", None, 1, 2, 3),
            ProbePoint("twin", "/usr/lib/libllm_kv.so", None, "roleplay:kv_lookup", None, 2, 1, "roleplay"),
        ),
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
        (BASE + "slo: []\n", 4, "unknown key 'slo'", "did you mean 'slos'? allowed here: listen, services, probes"),
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
        # probes
        (BASE + "probes: {sceduler: off}\n", 4, "unknown key 'sceduler'", "did you mean 'scheduler'?"),
        (BASE + "probes: {syscalls: 1}\n", 4, "probes.syscalls: must be on or off", "`on`"),
        # objectives
        (BASE + SLO + "slos: []\n", 6, "the key 'slos' is given twice", "keep one"),
        (BASE + SLO + SLO_ITEM, 6, "slos[1]: the name 'a' is given twice", "name of its own"),
        (BASE + SLO.replace("name: a", "name: A"), 5, "'A' is not the name of an objective", "a-z 0-9 -"),
        (BASE + SLO.replace("ttft", "ttftt"), 5, "slos[0].sli: unknown sli 'ttftt'", "did you mean 'ttft'?"),
        (BASE + SLO.replace("ttft", "read_delay"), 5, "unknown sli 'read_delay'", "allowed here: ttft, itl, tpot"),
        (BASE + SLO.replace("300ms", "300"), 5, "slos[0].below: must be a time", "ms"),
        (BASE + SLO.replace("300ms", "3h"), 5, "slos[0].below: must be a time", "ms"),
        (BASE + SLO.replace("99%", "100%"), 5, "100% leaves no room for a single slow request", "99.9%"),
        (BASE + SLO.replace("99%", "101%"), 5, "slos[0].target: must be", "%"),
        (BASE + SLO.replace("99%", "0.99"), 5, "slos[0].target: must be", "%"),
        (BASE + SLO.replace("99%}", "99%, window: 59m}"), 5, "slos[0].window: must be a time", "d"),
        (BASE + SLO.replace("99%}", "99%, service: aa}"), 5, "there is no service 'aa'", "did you mean 'a'?"),
        (BASE + "slos:\n  - {name: a, sli: ttft, target: 99%}\n", 5, "the key 'below' is missing", "`below:`"),
        (BASE + "slos: {name: a}\n", 4, "slos: must be a list", "- item"),
        # recordings
        (BASE + "recorder: {folder: var/lib}\n", 4, "'var/lib' is not an absolute path", "/var/lib/footlight"),
        (BASE + "recorder: {files: 0}\n", 4, "recorder.files: must be a whole number from 1", "digits"),
        (BASE + "recorder: {size: 1kB}\n", 4, "recorder.size: must be a size", "MiB"),
        (BASE + "recorder: {folders: /x}\n", 4, "unknown key 'folders'", "did you mean 'folder'?"),
        # GPUs and engines
        (BASE + "probes: {gpu: maybe}\n", 4, "probes.gpu: must be on, off or auto, not 'maybe'", "`auto`"),
        (BASE + "probes: {gpu: [auto]}\n", 4, "probes.gpu: must be on, off or auto, not a list", "`auto`"),
        (BASE + "probes: {cuda: auto}\n", 4, "probes.cuda: must be on or off", "`on`"),
        (BASE + "gpu: {library: libnvidia-ml.so.1}\n", 4, "is not an absolute path", "/usr/lib64/libnvidia-ml.so.1"),
        (BASE + "gpu: {period: 10ms}\n", 4, "gpu.period: must be a time from 100ms to 1m", "ms"),
        (BASE + "gpu: {devices: []}\n", 4, "the list is empty", "remove the key"),
        (BASE + "gpu: {devices: nvidia0}\n", 4, "'nvidia0' is not an absolute path", "/dev/nvidia*"),
        (BASE + f"gpu: {{devices: [{', '.join(f'/dev/{n}' for n in range(17))}]}}\n", 4, "17 paths", "wildcards"),
        (BASE + "    engine_metrics: /metrics\n", 4, "is not where an engine's metrics are", "http://127.0.0.1:8000/"),
        (BASE + "    engine_metrics: file:///etc/shadow\n", 4, "is not where an engine's metrics are", "`auto`"),
        (BASE + "    engine_metrics: http://u:p@host/metrics\n", 4, "is not where an engine's metrics are", "`off`"),
        (BASE + "    engine_metrics: http://[::1/metrics\n", 4, "is not where an engine's metrics are", "`off`"),
        (BASE + "    engine_metrics: http://host:99999/\n", 4, "is not where an engine's metrics are", "`off`"),
        (BASE + "    engine_metrics: [auto]\n", 4, "engine_metrics: must be text, not a list", "value"),
        (BASE + POINT.replace("symbol: f, ", ""), 5, "give one of `symbol` and `usdt`", "provider:name"),
        (BASE + POINT.replace("symbol: f", "symbol: f, usdt: 'a:b'"), 5, "give one of `symbol` and `usdt`", "function"),
        (BASE + POINT.replace("symbol: f", "usdt: ab"), 5, "'ab' is not a USDT probe", "provider:name"),
        (BASE + POINT.replace("symbol: f", "symbol: f()"), 5, "'f()' is not the name of a function", "nm -D"),
        (BASE + POINT.replace("a.so", "lib/a.so"), 5, "'lib/a.so' is not an absolute path", "/usr/lib"),
        (BASE + POINT.replace("hit_tokens: 2", "hit_tokens: 7"), 5, "must be a whole number from 1 to 6", "digits"),
        (BASE + POINT.replace("hit_tokens: 2", "hit_tokens: 3"), 5, "two values cannot be one argument", "its own"),
        (BASE + POINT.replace("name: p", "service: aa, name: p"), 5, "there is no service 'aa'", "did you mean 'a'?"),
        (BASE + POINT.replace("name: p", "name: P"), 5, "'P' is not the name of a probe point", "a-z"),
        (BASE + POINT + POINT.partition("\n")[2], 6, "the name 'p' is given twice", "of its own"),
        (BASE + POINT + POINT.partition("\n")[2] * 8, 5, "there are 9 probe points", "at most 8"),
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
        ("a: &x [1]\nb: *x\n", 2, "an alias (*name) is not allowed", "in quotes where it begins with *"),
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
    ("written", "ids"),
    [
        ("3f00aa3f00aa", ("3f00aa3f00aa",)),
        ("102030405060", ("102030405060",)),  # a number to YAML
        ("1234567890e5", ("1234567890e5",)),
        ("docker://" + "0f" * 32, ("0f" * 32,)),
        ("[3f00aa3f00aa, cri-o://3f00aa3f00ab]", ("3f00aa3f00aa", "3f00aa3f00ab")),
    ],
)
def test_a_container_is_given_by_its_id(written: str, ids: tuple[str, ...]) -> None:
    (service,) = parse(f"services:\n  - {{name: a, match: {{container: {written}}}}}\n").services
    assert service.match == Match(container=ids)


@pytest.mark.parametrize("written", ["3f00aa3f00a", "0f" * 33, "vllm", "3F00AA3F00AA", '""', "{a: b}", '"://3f00aa3f00aa"'])
def test_what_is_no_containers_id_is_refused(written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"services:\n  - {{name: a, match: {{container: {written}}}}}\n")
    assert caught.value.line == 2
    assert "services[0].match.container" in caught.value.what


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": [8000, 8001]}, "port-8000"),
        ({"pid": [23]}, "pid-23"),
        ({"cgroup": ["/system.slice/vllm.service/"]}, "vllm.service"),
        ({"cmdline": ["uvicorn app:main --reload"]}, "uvicorn-app-main---reload"),
        ({"cmdline": ["/// "]}, "service"),
        ({"exe": ["..x"]}, "x"),
        ({"container": ["containerd://" + "0f" * 32]}, "container-0f0f0f0f0f0f"),
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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("300ms", 0.3), ("100us", 0.0001), ("70.7 ms", 0.0707), ("1.5 s", 1.5)),
        *(("250us", 0.00025), ("30m", 1800), ("1h", 3600), ("28d", 28 * 86400)),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "ms", "-1s", "1 S", "1e3s", "1s 2ms", "1.s", "\u0665s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_objectives_are_bounded() -> None:
    items = "".join(SLO_ITEM.replace("name: a", f"name: a{number}") for number in range(MAX_SLOS))
    assert len(parse(BASE + "slos:\n" + items).slos) == MAX_SLOS
    assert f"there are {MAX_SLOS + 1} objectives" in refused(BASE + "slos:\n" + items + SLO_ITEM).what


def test_the_slis_of_objectives_are_histograms() -> None:
    """The threshold of an objective is a bucket bound of its latency: both sides know the same names."""
    assert set(SLO_SLIS) <= {sli.value for sli in Sli}


def test_what_is_dear_is_off_by_default() -> None:
    wanted = parse(BASE).probes
    assert [name for name in Probes.__struct_fields__ if not getattr(wanted, name)] == ["syscalls", "cuda"]
    assert wanted.gpu == "auto"
    assert parse(BASE).services[0].engine_metrics == "auto"
    some = parse(BASE + "probes: {scheduler: off, tcp: no, process: false, syscalls: yes}\n").probes
    assert some == Probes(scheduler=False, tcp=False, process=False, syscalls=True)


def test_recordings_are_opt_in() -> None:
    assert parse(BASE).recorder == RecorderConfig(None, 20, 256 * 2**20)
    assert parse(BASE + "recorder: {folder: /a}\n").recorder == RecorderConfig("/a", 20, 256 * 2**20)


def test_the_attacher_pays_for_nothing_it_does_not_need() -> None:
    modules = "exporter.config, exporter.fronts, probes.discovery, probes.host, probes.privileges"
    heavy = "{'numpy', 'yaml', 'rich', 'starlette', 'uvicorn', 'prometheus_client'}"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"
