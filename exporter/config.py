"""What the user asked for: the configuration file and the target options, checked and typed.

Everything that is not allowed is refused with its path, its line and what is allowed. `exporter.document` reads YAML.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from exporter.document import (
    OFF_WORDS,
    ON_WORDS,
    WHOLE,
    Value,
    document,
    http_url,
    is_plain_text,
    read_text,
    shown,
)
from exporter.labels import OTHER, RESERVED
from exporter.slo.declared import Slo, read_slos
from probes.errors import ConfigError

if TYPE_CHECKING:
    from exporter.web_config import WebConfig

T = TypeVar("T")

DEFAULT_PORT: Final = 9466
NONE: Final = "_none"
"""Label value of a request without the header."""

MAX_SERVICES: Final = 64
MAX_LABELS: Final = 4
MAX_LABEL_VALUES: Final = 32
MAX_PROBE_POINTS: Final = 8
MAX_GPU_DEVICES: Final = 16
MAX_ALERTMANAGERS: Final = 8
MAX_ALERT_LABELS: Final = 16
MAX_PID: Final = 1 << 22

_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_LABEL_NAME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,62}")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_SYMBOL: Final = re.compile(r"[A-Za-z_.$][A-Za-z0-9_.$@]{0,255}")
_USDT: Final = re.compile(r"[A-Za-z0-9_]{1,64}:[A-Za-z0-9_]{1,64}")
_CONTAINER: Final = re.compile(r"(?:[a-z][a-z0-9.-]{0,31}://)?([0-9a-f]{12,64})")
_MAX_ARGUMENT: Final = 6
"""A function's arguments beyond the sixth are not in registers; USDT probes count the same way."""
AUTO: Final = "auto"
OFF: Final = "off"
ON: Final = "on"
ALERT_LABELS: Final = frozenset(
    "alertname severity kind service_name model_name probe sloth_id sloth_service sloth_slo sloth_severity".split()
)
"""Labels that the agent's alerts have of themselves."""

RESERVED_LABELS: Final = RESERVED | frozenset("service stage env type probe instance job".split())
"""Label names that the metrics use themselves, that Prometheus adds, or that would clash in dashboards."""


class Address(msgspec.Struct, frozen=True):
    """Where to listen. An empty host means every interface; port 0 means one that is free."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        """Return `host:port`, with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Match(msgspec.Struct, frozen=True):
    """Which processes belong to a service.

    Every condition that is given must hold; a condition with several values holds when one of them does.
    What each condition means is defined in `probes.discovery`.
    """

    pid: tuple[int, ...] = ()
    port: tuple[int, ...] = ()
    exe: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    cgroup: tuple[str, ...] = ()
    container: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the conditions as the user would write them, such as `port 8000 and exe uvicorn`."""
        given = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return " and ".join(f"{name} {' or '.join(map(str, values))}" for name, values in given if values)


class HeaderLabel(msgspec.Struct, frozen=True):
    """An extra label taken from a request header. `header` is lower-case."""

    header: str
    values: tuple[str, ...]

    def value_of(self, raw: bytes | None) -> str:
        """Return the label value for a header's bytes: one of `values`, `_other`, or `_none` without the header."""
        if raw is None:
            return NONE
        text = raw.strip().decode("latin-1")
        return text if text in self.values else OTHER


class Service(msgspec.Struct, frozen=True):
    """A service to watch: its name in the `service_name` label, its processes, its extra labels.

    `engine_metrics` says where the engine's own metrics are: a URL, `auto` (at /metrics of the ports on which a request
    to a model was seen) or `off`.
    """

    name: str
    match: Match
    labels: dict[str, HeaderLabel] = {}
    engine_metrics: str = AUTO


class Probes(msgspec.Struct, frozen=True):
    """Which probes are wanted. `syscalls` costs every system call of the host, `cuda` every CUDA call: they are off.

    `gpu` is `on`, `off` or `auto`: where there is an NVIDIA driver.
    """

    requests: bool = True
    scheduler: bool = True
    tcp: bool = True
    block: bool = True
    memory: bool = True
    process: bool = True
    syscalls: bool = False
    gpu: str = AUTO
    cuda: bool = False


class GpuConfig(msgspec.Struct, frozen=True):
    """How GPUs are asked: `library` is the path of libnvidia-ml.so.1, where it is not in one of the usual folders.

    `devices` are the paths of the GPUs' device files, with wildcards; a wait in them is one for the GPU.
    """

    library: str | None = None
    period_s: float = 1.0
    devices: tuple[str, ...] = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dri/*", "/dev/kfd")


class ProbePoint(msgspec.Struct, frozen=True):
    """A place in an engine's code that tells of a look-up in its KV cache.

    `library` is a library or executable as the process sees it: a file name, or an absolute path. Exactly one of
    `symbol` (a function, seen at its entry) and `usdt` (`provider:name`) is given. The others are numbers of arguments,
    from 1: the model's name (a pointer to text that ends with a zero byte), tokens found and tokens looked up. None for
    `model` leaves the model unnamed; None for `service` means every one.
    """

    name: str
    library: str
    symbol: str | None
    usdt: str | None
    model: int | None
    hit_tokens: int
    looked_up_tokens: int
    service: str | None = None


class Limits(msgspec.Struct, frozen=True):
    """What the agent may use. `memory` is in bytes, PSS of both processes; `cpu` is a fraction of one CPU."""

    models_per_service: int = 64
    connections: int = 65536
    memory: int = 120 * 2**20
    cpu: float = 0.02


class RecorderConfig(msgspec.Struct, frozen=True):
    """Where recordings are kept that the agent makes by itself; None: it makes none. `size` is in bytes, of all."""

    folder: str | None = None
    files: int = 20
    size: int = 256 * 2**20


class Alertmanager(msgspec.Struct, frozen=True):
    """An Alertmanager that the agent posts to itself: its URL, with the path before /api/v2/alerts where it has one.

    `labels` come on every alert: what Prometheus has as external_labels, so that both say the same of one thing.
    `agent_labels` come on those about what this agent alone sees: the job and instance that Prometheus knows it by.
    """

    url: str
    labels: dict[str, str] = {}
    agent_labels: dict[str, str] = {}
    timeout_s: float = 2.0


class HealthConfig(msgspec.Struct, frozen=True):
    """Where what was learnt of the services' health is kept over restarts; None: nowhere."""

    folder: str | None = None


class Config(msgspec.Struct, frozen=True):
    """Everything the agent was asked to do."""

    listen: Address = Address()
    services: tuple[Service, ...] = ()
    probes: Probes = Probes()
    limits: Limits = Limits()
    slos: tuple[Slo, ...] = ()
    recorder: RecorderConfig = RecorderConfig()
    health: HealthConfig = HealthConfig()
    gpu: GpuConfig = GpuConfig()
    probe_points: tuple[ProbePoint, ...] = ()
    alertmanagers: tuple[Alertmanager, ...] = ()
    web: WebConfig | None = None
    """How /metrics is protected: from a file of its own (--web.config.file), so it is no key of this one."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the configured labels of all services, sorted. A service without one has the value `NONE`."""
        return tuple(sorted({name for service in self.services for name in service.labels}))

    @property
    def scheme(self) -> str:
        """How URLs of the agent begin: `https` where it has a certificate, else `http`."""
        return "http" if self.web is None or self.web.tls is None else "https"


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file.

    Raises `ConfigError` with `path` and, where there is one, the 1-based `line`.
    """
    name = os.fspath(path)
    return _config(document(read_text(name), name))


def parse(text: str, path: str = "<config>") -> Config:
    """Check a configuration given as text; `path` is only named in errors. Raises `ConfigError`."""
    return _config(document(text, path))


def from_options(
    *,
    pid: Sequence[int] = (),
    port: Sequence[int] = (),
    exe: Sequence[str] = (),
    cgroup: Sequence[str] = (),
    cmdline: Sequence[str] = (),
    container: Sequence[str] = (),
    service: str | None = None,
    listen: str | None = None,
) -> Config:
    """Return the configuration that target options on the command line stand for: one service.

    Without `service` its name is made from the first condition, such as `port-8000`. Raises `ConfigError`.
    """
    containers = tuple(map(parse_container, container))
    match = Match(tuple(pid), tuple(port), tuple(exe), tuple(cmdline), tuple(cgroup), containers)
    if match == Match():
        raise ConfigError(
            "no target is named",
            "name one with --port, --pid, --exe, --cmdline, --cgroup or --container, or give --config FILE",
        )
    for number in match.pid:
        _check(1 <= number <= MAX_PID, f"pid {number} is out of range", f"give a process id from 1 to {MAX_PID}")
    for number in match.port:
        _check(1 <= number <= 65535, f"port {number} is out of range", "give a TCP port from 1 to 65535")
    for text in (*match.exe, *match.cmdline, *match.cgroup):
        _check(is_plain_text(text), f"{text!r} cannot match any process", "give text without control characters")
    if service is not None and not _SERVICE_NAME.fullmatch(service):
        raise ConfigError(f"{service!r} is not a service name", _SERVICE_NAME_RULE)
    address = Address() if listen is None else parse_address(listen)
    return Config(listen=address, services=(Service(service or _name_for(match), match),))


def parse_container(text: str) -> str:
    """Parse a container's id, or how it begins, with or without the runtime's name before it. Raises `ConfigError`."""
    found = _CONTAINER.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{shown(text)} is not the id of a container",
            "write 12 to 64 of its hex digits, as `crictl ps` and `docker ps` print them",
        )
    return found[1]


def parse_address(text: str) -> Address:
    """Parse `HOST:PORT`, `[IPV6]:PORT` or `:PORT` (every interface). Raises `ConfigError`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or not WHOLE.fullmatch(port) or int(port) > 65535 or not _is_host(host, bracketed):
        raise ConfigError(
            f"{text!r} is not an address to listen on",
            "write HOST:PORT with a port from 0 to 65535, "
            f"such as 127.0.0.1:{DEFAULT_PORT}, [::1]:{DEFAULT_PORT} or :{DEFAULT_PORT}",
        )
    return Address(host, int(port))


_SERVICE_NAME_RULE: Final = "use 1 to 63 of A-Z a-z 0-9 . _ / - and begin with a letter or digit"


def _check(holds: bool, what: str, next_step: str) -> None:
    if not holds:
        raise ConfigError(what, next_step)


def _is_host(host: str, bracketed: bool) -> bool:
    try:
        return (ipaddress.ip_address(host).version == 6) == bracketed
    except ValueError:
        return not bracketed and (host == "" or _HOST_NAME.fullmatch(host) is not None)


def _name_for(match: Match) -> str:
    for text in (*match.exe, *match.cgroup, *match.cmdline):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rstrip("/").rpartition("/")[2]).lstrip("._-")[:63]
        if name:
            return name
    if match.container:
        return f"container-{match.container[0][:12]}"
    return f"port-{match.port[0]}" if match.port else f"pid-{match.pid[0]}" if match.pid else "service"


# ---- the tree, up to the typed configuration ----


def _config(root: Value) -> Config:
    allowed = (name for name in Config.__struct_fields__ if name != "web")
    keys = root.fields(*allowed, required=("services",))
    services = _services(keys["services"])
    names = {service.name for service in services}
    return Config(
        listen=_listen(keys["listen"]) if "listen" in keys else Address(),
        services=services,
        probes=_probes(keys["probes"]) if "probes" in keys else Probes(),
        limits=_limits(keys["limits"]) if "limits" in keys else Limits(),
        slos=read_slos(keys["slos"], names) if "slos" in keys else (),
        recorder=_recorder(keys["recorder"]) if "recorder" in keys else RecorderConfig(),
        health=_health(keys["health"]) if "health" in keys else HealthConfig(),
        gpu=_gpu(keys["gpu"]) if "gpu" in keys else GpuConfig(),
        probe_points=_probe_points(keys["probe_points"], names) if "probe_points" in keys else (),
        alertmanagers=_alertmanagers(keys["alertmanagers"]) if "alertmanagers" in keys else (),
    )


def _listen(value: Value) -> Address:
    text = value.literal()  # YAML 1.1 reads some addresses as numbers to base 60
    try:
        return parse_address(text)
    except ConfigError as error:
        value.fail(error.what, error.next_step)


def _services(value: Value) -> tuple[Service, ...]:
    items = value.items()
    if not 1 <= len(items) <= MAX_SERVICES:
        value.fail(f"there are {len(items)} services", f"list 1 to {MAX_SERVICES} services")
    services: list[Service] = []
    for item in items:
        service = _service(item)
        for other in services:
            if other.name == service.name:
                item.fail(f"the name {shown(service.name)} is given twice", "give each service a name of its own")
            if other.match == service.match:
                item.fail(f"matches the same processes as {shown(other.name)}", "make the two matches differ")
        services.append(service)
    return tuple(services)


def _service(value: Value) -> Service:
    keys = value.fields(*Service.__struct_fields__, required=("name", "match"))
    name = keys["name"].text()
    if not _SERVICE_NAME.fullmatch(name):
        keys["name"].fail(f"{shown(name)} is not a service name", _SERVICE_NAME_RULE)
    return Service(
        name,
        _match(keys["match"]),
        _labels(keys["labels"]) if "labels" in keys else {},
        _engine_metrics(keys["engine_metrics"]) if "engine_metrics" in keys else AUTO,
    )


def _engine_metrics(value: Value) -> str:
    text = value.literal()
    if text.lower() in OFF_WORDS:
        return OFF
    if text == AUTO:
        return AUTO
    url = http_url(text)
    if url is None or url.username is not None:
        value.fail(
            f"{shown(text)} is not where an engine's metrics are",
            "write a URL such as http://127.0.0.1:8000/metrics, or `auto`, or `off`",
        )
    return text


def _match(value: Value) -> Match:
    keys = value.fields(*Match.__struct_fields__)
    if not keys:
        value.fail("no condition is given", f"give at least one of {', '.join(Match.__struct_fields__)}")

    def texts(name: str) -> tuple[str, ...]:
        return keys[name].one_or_more(Value.text) if name in keys else ()

    return Match(
        pid=keys["pid"].one_or_more(lambda item: item.whole(1, MAX_PID)) if "pid" in keys else (),
        port=keys["port"].one_or_more(lambda item: item.whole(1, 65535)) if "port" in keys else (),
        exe=texts("exe"),
        cmdline=texts("cmdline"),
        cgroup=texts("cgroup"),
        container=keys["container"].one_or_more(_container) if "container" in keys else (),
    )


def _container(value: Value) -> str:
    text = value.literal()  # YAML takes hex digits that are none but 0 to 9 for a number
    try:
        return parse_container(text)
    except ConfigError as error:
        value.fail(error.what, error.next_step)


def _labels(value: Value) -> dict[str, HeaderLabel]:
    labels: dict[str, HeaderLabel] = {}
    entries = value.keys()
    if len(entries) > MAX_LABELS:
        value.fail(
            f"there are {len(entries)} labels", f"keep at most {MAX_LABELS}: each one multiplies the number of series"
        )
    for name, item in entries.items():
        if not _LABEL_NAME.fullmatch(name):
            item.fail(f"{shown(name)} is not a label name", "use letters, digits and _, and begin with a letter")
        if name in RESERVED_LABELS:
            item.fail(f"the label name '{name}' is taken", "choose another name")
        labels[name] = _header_label(item)
    return labels


def _header_label(value: Value) -> HeaderLabel:
    keys = value.fields("header", "values", required=("header", "values"))
    header = keys["header"].text()
    if not _HEADER_NAME.fullmatch(header):
        keys["header"].fail(
            f"{shown(header)} is not the name of an HTTP header", "write a name such as x-release-stage"
        )
    values = keys["values"].one_or_more(_label_value)
    if len(values) > MAX_LABEL_VALUES:
        keys["values"].fail(
            f"there are {len(values)} values", f"list at most {MAX_LABEL_VALUES}; others are counted as {OTHER}"
        )
    return HeaderLabel(header.lower(), values)


def _label_value(value: Value) -> str:
    text = value.literal()  # `no`, `1` and the like are values as good as any
    if not 0 < len(text) <= 128 or not text.isascii() or not text.isprintable() or text != text.strip():
        value.fail(
            f"{shown(text)} is not a label value", "use 1 to 128 printable ASCII characters, no space at either end"
        )
    if text in {OTHER, NONE}:
        value.fail(f"'{text}' is what the agent itself reports", "remove it: unlisted values are counted by themselves")
    return text


def _probes(value: Value) -> Probes:
    keys = value.fields(*Probes.__struct_fields__)
    gpu = _on_off_auto(keys.pop("gpu")) if "gpu" in keys else AUTO
    wanted = {name: item.switch() for name, item in keys.items()}
    if not wanted.get("requests", True):
        keys["requests"].fail("cannot be off: all others build on it", "remove the line or write `on`")
    return Probes(**wanted, gpu=gpu)


def _on_off_auto(value: Value) -> str:
    if value.node.id == "scalar" and value.node.value == AUTO:
        return AUTO
    if value.node.id != "scalar" or str(value.node.value).lower() not in ON_WORDS | OFF_WORDS:
        value.fail(f"must be on, off or auto, not {value.described()}", "write `on`, `off` or `auto`")
    return ON if value.switch() else OFF


def _limits(value: Value) -> Limits:
    keys = value.fields(*Limits.__struct_fields__)
    default = Limits()
    models = keys["models_per_service"].whole(1, 4096) if "models_per_service" in keys else default.models_per_service
    connections = keys["connections"].whole(64, 1 << 20) if "connections" in keys else default.connections
    memory = keys["memory"].size(64 * 2**20, 64 * 2**30) if "memory" in keys else default.memory
    cpu = keys["cpu"].percent(64.0) if "cpu" in keys else default.cpu
    return Limits(models, connections, memory, cpu)


def _gpu(value: Value) -> GpuConfig:
    keys = value.fields("library", "period", "devices")
    default = GpuConfig()
    devices = default.devices
    if "devices" in keys:
        devices = keys["devices"].one_or_more(lambda item: item.absolute("/dev/nvidia*"))
        if len(devices) > MAX_GPU_DEVICES:
            keys["devices"].fail(f"there are {len(devices)} paths", f"list at most {MAX_GPU_DEVICES}; use wildcards")
    return GpuConfig(
        keys["library"].absolute("/usr/lib64/libnvidia-ml.so.1") if "library" in keys else None,
        keys["period"].duration(0.1, 60) if "period" in keys else default.period_s,
        devices,
    )


def _probe_points(value: Value, services: AbstractSet[str]) -> tuple[ProbePoint, ...]:
    return value.named(
        MAX_PROBE_POINTS, "probe point", "probe points", lambda item: _probe_point(item, services)
    )


def _probe_point(value: Value, services: AbstractSet[str]) -> ProbePoint:
    keys = value.fields(
        *ProbePoint.__struct_fields__, required=("name", "library", "hit_tokens", "looked_up_tokens")
    )
    name = keys["name"].name_of("a probe point")
    library = keys["library"].text()
    if "/" in library:
        keys["library"].absolute("/usr/lib/libllm_kv.so")
    if ("symbol" in keys) == ("usdt" in keys):
        value.fail("give one of `symbol` and `usdt`", "name a function, or a USDT probe as provider:name")
    symbol = keys["symbol"].text() if "symbol" in keys else None
    if symbol is not None and not _SYMBOL.fullmatch(symbol):
        keys["symbol"].fail(f"{shown(symbol)} is not the name of a function", "write it as `nm -D` prints it")
    usdt = keys["usdt"].text() if "usdt" in keys else None
    if usdt is not None and not _USDT.fullmatch(usdt):
        keys["usdt"].fail(f"{shown(usdt)} is not a USDT probe", "write provider:name")
    numbers = {
        key: keys[key].whole(1, _MAX_ARGUMENT) for key in ("model", "hit_tokens", "looked_up_tokens") if key in keys
    }
    if len(set(numbers.values())) != len(numbers):
        value.fail("two values cannot be one argument", "give each its own number, from 1")
    return ProbePoint(
        name,
        library,
        symbol,
        usdt,
        numbers.get("model"),
        numbers["hit_tokens"],
        numbers["looked_up_tokens"],
        keys["service"].service(services) if "service" in keys else None,
    )


def _alertmanagers(value: Value) -> tuple[Alertmanager, ...]:
    found: list[Alertmanager] = []
    items = value.items()
    if len(items) > MAX_ALERTMANAGERS:
        value.fail(f"there are {len(items)} Alertmanagers", f"list at most {MAX_ALERTMANAGERS}")
    for item in items:
        one = _alertmanager(item)
        if any(one.url == other.url for other in found):
            item.fail(f"the url {shown(one.url)} is given twice", "list each Alertmanager once")
        found.append(one)
    return tuple(found)


def _alertmanager(value: Value) -> Alertmanager:
    keys = value.fields("url", "labels", "agent_labels", "timeout", required=("url",))
    url = keys["url"].text()
    parts = http_url(url)
    if parts is None or parts.query or parts.fragment or parts.username or parts.password:
        keys["url"].fail(
            f"{shown(url)} is not the URL of an Alertmanager", "write one such as http://127.0.0.1:9093"
        )
    return Alertmanager(
        url.rstrip("/"),
        _alert_labels(keys["labels"]) if "labels" in keys else {},
        _alert_labels(keys["agent_labels"]) if "agent_labels" in keys else {},
        keys["timeout"].duration(0.1, 60) if "timeout" in keys else Alertmanager(url).timeout_s,
    )


def _alert_labels(value: Value) -> dict[str, str]:
    labels = value.keys()
    if len(labels) > MAX_ALERT_LABELS:
        value.fail(f"there are {len(labels)} labels", f"keep at most {MAX_ALERT_LABELS}")
    for name, item in labels.items():
        if not _LABEL_NAME.fullmatch(name):
            item.fail(f"{shown(name)} is not a label name", "use letters, digits and _, and begin with a letter")
        if name in ALERT_LABELS:
            item.fail(f"the label name '{name}' is taken", "remove it: the agent sets it")
    return {name: _label_value(item) for name, item in labels.items()}


def _health(value: Value) -> HealthConfig:
    keys = value.fields(*HealthConfig.__struct_fields__)
    return HealthConfig(keys["folder"].absolute("/var/lib/footlight") if "folder" in keys else None)


def _recorder(value: Value) -> RecorderConfig:
    keys = value.fields(*RecorderConfig.__struct_fields__)
    default = RecorderConfig()
    folder = keys["folder"].absolute("/var/lib/footlight") if "folder" in keys else None
    return RecorderConfig(
        folder,
        keys["files"].whole(1, 10_000) if "files" in keys else default.files,
        keys["size"].size(2**20, 2**40) if "size" in keys else default.size,
    )
