"""What the user asked for: the configuration file and the target options, checked and typed.

The file is YAML. Everything that is not allowed is refused with its path, its line and what is allowed:
unknown keys, wrong types, impossible values, duplicate keys, aliases, tags, more than one document.
The privileged attacher imports this module, so PyYAML is imported only when a file is read.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import msgspec

from exporter.labels import OTHER, RESERVED
from probes.errors import ConfigError

if TYPE_CHECKING:
    import yaml

    from exporter.slo.catalogue import KnownMetric
    from exporter.web_config import WebConfig

T = TypeVar("T")

DEFAULT_PORT: Final = 9466
NONE: Final = "_none"
"""Label value of a request without the header."""

MAX_FILE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_SERVICES: Final = 64
MAX_LABELS: Final = 4
MAX_LABEL_VALUES: Final = 32
MAX_SLOS: Final = 64
MAX_PROBE_POINTS: Final = 8
MAX_GPU_DEVICES: Final = 16
MAX_ALERTMANAGERS: Final = 8
MAX_ALERT_LABELS: Final = 16
MAX_TEXT: Final = 4096
MAX_PID: Final = 1 << 22

_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_LABEL_NAME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,62}")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_WHOLE: Final = re.compile(r"[0-9]{1,18}")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_DECIMAL: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)")
_SIZE_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([a-z]+)")
_TIME_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SLO_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_SLO_KEYS: Final = ("name", "sli", "below", "at_least", "target", "window", "service", "model_name", "reasons")
SLO_SLIS: Final = ("ttft", "itl", "tpot", "longest_gap", "duration")
"""Latencies that an objective may be about, by the value of their `Sli`."""
SLO_ERRORS: Final = "errors"
SLO_ABORTS: Final = "aborts"
SLO_CACHE: Final = "kv_cache_hit_ratio"
SLO_SPEED: Final = "decode_tokens_per_second"
SLO_METRIC: Final = re.compile(r"(kernel|gpu)_[a-z0-9_]{1,100}")
"""An objective may also be about a family of these, by its name."""
SLO_REASONS: Final = ("client_error", "rate_limited", "server_error", "cut_off")
"""Why a request failed, by the value of its `Failure`. The first one is the client's own fault."""
SLO_SHORTEST_S: Final = 3 * 86400
"""An objective's period is at least the longest window over which its burn rate is looked at."""
_ALL_SLIS: Final = (*SLO_SLIS, SLO_ERRORS, SLO_ABORTS, SLO_CACHE, SLO_SPEED)
_SYMBOL: Final = re.compile(r"[A-Za-z_.$][A-Za-z0-9_.$@]{0,255}")
_USDT: Final = re.compile(r"[A-Za-z0-9_]{1,64}:[A-Za-z0-9_]{1,64}")
_MAX_ARGUMENT: Final = 6
"""A function's arguments beyond the sixth are not in registers; USDT probes count the same way."""
AUTO: Final = "auto"
OFF: Final = "off"
ON: Final = "on"
_ON: Final = frozenset({"on", "true", "yes"})
_OFF: Final = frozenset({"off", "false", "no"})

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


class Slo(msgspec.Struct, frozen=True):
    """An objective: the fraction `target` of the events of `sli` is good.

    `sli` is the value of a latency's `Sli` (good: at most `below` seconds), `decode_tokens_per_second` (good: a
    response with `at_least` so many), `errors` (good: a request that did not fail for one of `reasons`), `aborts`
    (good: one whose client stayed), `kv_cache_hit_ratio` (good: a prompt token that was looked up and found), or the
    name of a kernel_ or gpu_ family (good: an observation of the histogram, or a minute of the gauge, that is at most
    `below` or `at_least` so much, in the family's unit). `window_s` is its period. None for `service` or `model_name`
    means every one.
    """

    name: str
    sli: str
    below: float | None
    target: float
    window_s: int = 30 * 86400
    service: str | None = None
    model_name: str | None = None
    at_least: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def below_s(self) -> float | None:
        """The latency in seconds up to which an event is good; None where the objective is about something else."""
        if self.sli == SLO_SPEED and self.at_least is not None:
            return round(1 / self.at_least, 9)  # of the time per output token
        return self.below if self.sli in SLO_SLIS else None


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
    service: str | None = None,
    listen: str | None = None,
) -> Config:
    """Return the configuration that target options on the command line stand for: one service.

    Without `service` its name is made from the first condition, such as `port-8000`. Raises `ConfigError`.
    """
    match = Match(tuple(pid), tuple(port), tuple(exe), tuple(cmdline), tuple(cgroup))
    if match == Match():
        raise ConfigError(
            "no target is named", "name one with --port, --pid, --exe, --cmdline or --cgroup, or give --config FILE"
        )
    for number in match.pid:
        _check(1 <= number <= MAX_PID, f"pid {number} is out of range", f"give a process id from 1 to {MAX_PID}")
    for number in match.port:
        _check(1 <= number <= 65535, f"port {number} is out of range", "give a TCP port from 1 to 65535")
    for text in (*match.exe, *match.cmdline, *match.cgroup):
        _check(_is_plain_text(text), f"{text!r} cannot match any process", "give text without control characters")
    if service is not None and not _SERVICE_NAME.fullmatch(service):
        raise ConfigError(f"{service!r} is not a service name", _SERVICE_NAME_RULE)
    address = Address() if listen is None else parse_address(listen)
    return Config(listen=address, services=(Service(service or _name_for(match), match),))


def parse_address(text: str) -> Address:
    """Parse `HOST:PORT`, `[IPV6]:PORT` or `:PORT` (every interface). Raises `ConfigError`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or not _WHOLE.fullmatch(port) or int(port) > 65535 or not _is_host(host, bracketed):
        raise ConfigError(
            f"{text!r} is not an address to listen on",
            "write HOST:PORT with a port from 0 to 65535, "
            f"such as 127.0.0.1:{DEFAULT_PORT}, [::1]:{DEFAULT_PORT} or :{DEFAULT_PORT}",
        )
    return Address(host, int(port))


def parse_size(text: str) -> int:
    """Parse a size with its unit (B, kB, MB, GB, KiB, MiB, GiB) into bytes. Raises `ValueError`."""
    found = _SIZE.fullmatch(text)
    if found is None or found[2] not in _SIZE_UNITS:
        raise ValueError(text)
    return round(float(found[1]) * _SIZE_UNITS[found[2]])


def parse_duration(text: str) -> float:
    """Parse a time with its unit (us, ms, s, m, h, d) into seconds. Raises `ValueError`."""
    found = _DURATION.fullmatch(text)
    if found is None or found[2] not in _TIME_UNITS:
        raise ValueError(text)
    return round(float(found[1]) * _TIME_UNITS[found[2]], 12)  # 100 * 1e-6 is less than 0.0001


def parse_percent(text: str) -> float:
    """Parse a percentage such as `2%` into a fraction. Raises `ValueError`."""
    if not text.endswith("%") or not _DECIMAL.fullmatch(text[:-1].rstrip(" ")):
        raise ValueError(text)
    return round(float(text[:-1]) / 100, 12)  # 99.9 / 100 is more than 0.999


_SERVICE_NAME_RULE: Final = "use 1 to 63 of A-Z a-z 0-9 . _ / - and begin with a letter or digit"


def _check(holds: bool, what: str, next_step: str) -> None:
    if not holds:
        raise ConfigError(what, next_step)


def _is_plain_text(text: str) -> bool:
    return 0 < len(text) <= MAX_TEXT and text.isprintable()


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
    return f"port-{match.port[0]}" if match.port else f"pid-{match.pid[0]}" if match.pid else "service"


# ---- the file, down to a tree of nodes that know where they stand ----


def read_regular(path: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError, or ValueError where it is none or has more than `most` bytes."""
    # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise hang for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(most + 1)
    finally:
        os.close(fd)
    if len(raw) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return raw


def read_text(path: str, option: str = "--config") -> str:
    """The text of a YAML file that `option` named. Raises `ConfigError`."""
    try:
        raw = read_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"cannot read the configuration: {reason}", f"check the path given with {option}", path
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"byte {error.start} is not UTF-8", "save the file as UTF-8", path, line) from error


def document(
    text: str, path: str, when_empty: str = "name at least one service: see the README for an example"
) -> Value:
    """The root of the only YAML document in a text; `when_empty` is what to write where there is none.

    `path` is only named in errors. Raises `ConfigError` for what is no YAML and for what no configuration needs.
    """
    import yaml  # noqa: PLC0415 - 1.1 MiB that an agent started with --port need not hold

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_traps(yaml.parse(text, Loader=loader), path)
        root = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be parsed"
        what, step = f"not valid YAML: {problem}", "correct the line, or the one before it"
        if "expected a single document" in str(error):
            what, step = (
                "there is more than one YAML document",
                "keep one document: remove the `---` and what follows it",
            )
        elif mark is not None and _char_at(text, mark.line, mark.column) == "\t":
            what, step = "a tab stands where YAML wants spaces", "indent with spaces"
        raise ConfigError(what, step, path, None if mark is None else mark.line + 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        raise ConfigError(
            "a character is not allowed in YAML", "remove control characters from the file", path, line
        ) from error
    if root is None:
        raise ConfigError("the configuration is empty", when_empty, path, 1)
    return Value(root, "", path)


def _char_at(text: str, line: int, column: int) -> str:
    lines = text.splitlines()
    return lines[line][column : column + 1] if line < len(lines) else ""


def _refuse_traps(events: Iterable[yaml.Event], path: str) -> None:
    """Refuse what a configuration never needs, before anything recursive walks it.

    Aliases can make a small file enormous, tags can name types, and nesting can exhaust the stack.
    """
    import yaml  # noqa: PLC0415 - as above

    depth = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"the alias *{event.anchor} is not allowed", "write the value out", path, line)
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) not in (None, "!"):
            raise ConfigError("a YAML tag (!...) is not allowed", "remove the tag", path, line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(
                    f"nested more than {MAX_DEPTH} deep", "see the README for the form of the file", path, line
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


@dataclass(frozen=True, slots=True)
class Value:
    """A YAML node, with the place where it stands: `at` such as `services[0].match`, and its file."""

    node: Any  # a yaml.Node; its type stubs know neither `id` nor `style`
    at: str
    path: str

    def fail(self, what: str, next_step: str) -> NoReturn:
        """Raise `ConfigError` with this place."""
        raise ConfigError(
            f"{self.at}: {what}" if self.at else what, next_step, self.path, self.node.start_mark.line + 1
        )

    def keys(self) -> dict[str, Value]:
        """The entries of a mapping. Refuses duplicate keys and keys that are not text."""
        if self.node.id != "mapping":
            self.fail(
                f"must be a mapping of keys to values, not {self.described()}",
                "write `key: value` lines, indented with spaces",
            )
        entries: dict[str, Value] = {}
        for key_node, value_node in self.node.value:
            key = Value(key_node, self.at, self.path)
            if key_node.id != "scalar":
                key.fail("a key must be text", "write `key: value`")
            name = key_node.value
            if name in entries:
                key.fail(f"the key {shown(name)} is given twice", "keep one of the two")
            entries[name] = Value(value_node, f"{self.at}.{name}" if self.at else name, self.path)
        return entries

    def fields(self, *allowed: str, required: Sequence[str] = ()) -> dict[str, Value]:
        """The entries of a mapping with known keys. Refuses others, with the nearest known one."""
        entries = self.keys()
        for key_node, _ in self.node.value:
            if key_node.value not in allowed:
                Value(key_node, self.at, self.path).fail(
                    f"unknown key {shown(key_node.value)}",
                    f"{did_you_mean(key_node.value, allowed)}allowed here: {', '.join(allowed)}",
                )
        for name in required:
            if name not in entries:
                self.fail(f"the key '{name}' is missing", f"add `{name}:`")
        return entries

    def items(self) -> list[Value]:
        """The items of a list."""
        if self.node.id != "sequence":
            self.fail(f"must be a list, not {self.described()}", "write `[a, b]`, or one `- item` a line")
        return [Value(item, f"{self.at}[{index}]", self.path) for index, item in enumerate(self.node.value)]

    def one_or_more(self, read: Callable[[Value], T]) -> tuple[T, ...]:
        """A single value or a list of them, without duplicates."""
        if self.node.id != "sequence":
            return (read(self),)
        if not self.node.value:
            self.fail("the list is empty", "give at least one value, or remove the key")
        return tuple(dict.fromkeys(read(item) for item in self.items()))

    def literal(self) -> str:
        """A scalar as it is written, whatever type YAML would give it."""
        if self.node.id != "scalar" or (self.node.tag.endswith(":null") and not self.node.style):
            self.fail(f"must be text, not {self.described()}", "give a value")
        return str(self.node.value)

    def text(self) -> str:
        """A text. Refuses numbers and switches, which are nearly always a mistake where a text is wanted."""
        value = self.literal()
        if not self.node.tag.endswith(":str"):
            self.fail(f"must be text, not {self.described()}", f'write it in quotes: "{value}"')
        if not _is_plain_text(value):
            self.fail("must be 1 to 4096 characters without control characters", "correct the text")
        return value

    def absolute(self, such_as: str) -> str:
        """An absolute path."""
        path = self.text()
        if not path.startswith("/"):
            self.fail(f"{shown(path)} is not an absolute path", f"write one, such as {such_as}")
        return path

    def whole(self, low: int, high: int) -> int:
        """A whole number within bounds, in plain decimal digits."""
        value = self.node.value if self.node.id == "scalar" and not self.node.style else ""
        if not _WHOLE.fullmatch(value) or not low <= int(value) <= high:
            self.fail(
                f"must be a whole number from {low} to {high}, not {self.described()}",
                "write it in digits, without quotes",
            )
        return int(value)

    def switch(self) -> bool:
        """`on` or `off` (or true, false, yes, no)."""
        value = str(self.node.value).lower() if self.node.id == "scalar" and not self.node.style else ""
        if value not in _ON and value not in _OFF:
            self.fail(f"must be on or off, not {self.described()}", "write `on` or `off`")
        return value in _ON

    def size(self, low: int, high: int) -> int:
        """A size with its unit, in bytes."""
        try:
            value = parse_size(self.literal())
        except ValueError:
            value = -1
        if not low <= value <= high:
            self.fail(
                f"must be a size from {_size(low)} to {_size(high)}, not {self.described()}",
                f"write a number and a unit ({', '.join(_SIZE_UNITS)}), such as 120MiB",
            )
        return value

    def duration(self, low: float, high: float) -> float:
        """A time with its unit, in seconds."""
        try:
            value = parse_duration(self.literal())
        except ValueError:
            value = -1.0
        if not low <= value <= high:
            self.fail(
                f"must be a time from {_time(low)} to {_time(high)}, not {self.described()}",
                f"write a number and a unit ({', '.join(_TIME_UNITS)}), such as 300ms",
            )
        return value

    def percent(self, high: float) -> float:
        """A percentage above zero, as a fraction."""
        try:
            value = parse_percent(self.literal())
        except ValueError:
            value = -1.0
        if not 0 < value <= high:
            self.fail(
                f"must be above 0% and at most {high:.0%}, not {self.described()}", "write a percentage, such as 2%"
            )
        return value

    def described(self) -> str:
        """What stands there, for an error message."""
        if self.node.id == "mapping":
            return "a mapping"
        if self.node.id == "sequence":
            return "a list"
        if self.node.tag.endswith(":null") and not self.node.style:
            return "nothing"
        kind = {"int": "the number ", "float": "the number ", "bool": "the switch ", "timestamp": "the date "}
        return kind.get(self.node.tag.rpartition(":")[2], "") + shown(self.node.value)


def shown(text: str) -> str:
    """A text as an error message shows it: in quotes, escaped, and not long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _size(size: int) -> str:
    return f"{size // 2**30}GiB" if size >= 2**30 else f"{size // 2**20}MiB"


def _time(seconds: float) -> str:
    unit = max((size, unit) for unit, size in _TIME_UNITS.items() if size <= seconds)
    return f"{seconds / unit[0]:g}{unit[1]}"


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    """The beginning of a next step: the allowed word that is nearest; empty where none is near."""
    import difflib  # noqa: PLC0415 - only needed on the way out

    near = difflib.get_close_matches(word[:64].lower(), allowed, 1, 0.6)
    return f"did you mean '{near[0]}'? " if near else ""


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
        slos=_slos(keys["slos"], names) if "slos" in keys else (),
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
    if text.lower() in _OFF:
        return OFF
    if text == AUTO:
        return AUTO
    try:
        url = urlsplit(text)
        right = url.scheme in {"http", "https"} and url.hostname and url.port != 0 and text.isascii()
    except ValueError:
        right = False
    if not right or not text.isprintable() or " " in text or len(text) > MAX_TEXT or url.username is not None:
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
    )


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
    if value.node.id != "scalar" or str(value.node.value).lower() not in _ON | _OFF:
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


def _slos(value: Value, services: AbstractSet[str]) -> tuple[Slo, ...]:
    slos: list[Slo] = []
    items = value.items()
    if len(items) > MAX_SLOS:
        value.fail(f"there are {len(items)} objectives", f"list at most {MAX_SLOS}")
    for item in items:
        slo = _slo(item, services)
        if any(slo.name == other.name for other in slos):
            item.fail(f"the name {shown(slo.name)} is given twice", "give each objective a name of its own")
        slos.append(slo)
    return tuple(slos)


def _slo(value: Value, services: AbstractSet[str]) -> Slo:
    keys = value.fields(*_SLO_KEYS, required=("name", "sli"))
    name = keys["name"].text()
    if not _SLO_NAME.fullmatch(name):
        keys["name"].fail(
            f"{shown(name)} is not the name of an objective", "use 1 to 63 of a-z 0-9 - and begin with a letter"
        )
    sli = keys["sli"].text()
    if sli not in _ALL_SLIS and not SLO_METRIC.fullmatch(sli):
        keys["sli"].fail(
            f"unknown sli {shown(sli)}",
            f"{did_you_mean(sli, _ALL_SLIS)}allowed here: {', '.join(_ALL_SLIS)}, or a kernel_ or gpu_ metric",
        )
    below, at_least, target = _slo_wants(value, sli, keys)
    window_s = _slo_window(keys["window"]) if "window" in keys else 30 * 86400
    reasons: tuple[str, ...] = SLO_REASONS[1:] if sli == SLO_ERRORS else ()
    if "reasons" in keys:
        if sli != SLO_ERRORS:
            keys["reasons"].fail(f"is for objectives about {SLO_ERRORS}", "remove the line")
        reasons = keys["reasons"].one_or_more(_slo_reason)
    model = keys["model_name"].text() if "model_name" in keys else "*"
    service = _service_of(keys["service"], services) if "service" in keys else None
    if not sli.startswith(("kernel_", "gpu_")):
        return Slo(name, sli, below, target, window_s, service, None if model == "*" else model, at_least, reasons)
    labels = known_metrics()[sli].labels
    for key, label, wanted in (("service", "service_name", service), ("model_name", "model_name", model)):
        if wanted not in (None, "*") and label not in labels:
            keys[key].fail(f"{sli} does not tell {key}s apart", "remove the line")
    return Slo(name, sli, below, target, window_s, service, None if model == "*" else model, at_least)


def _slo_wants(value: Value, sli: str, keys: Mapping[str, Value]) -> tuple[float | None, float | None, float]:
    """`below`, `at_least` and `target`, of which an objective has those that its sli needs."""

    def need(key: str) -> Value:
        if key not in keys:
            value.fail(f"the key '{key}' is missing", f"add `{key}:`")
        return keys[key]

    def refuse(*unwanted: str) -> None:
        for key in unwanted:
            if key in keys:
                keys[key].fail(f"has no meaning for {sli}", "remove the line")

    if sli == SLO_CACHE:
        refuse("below", "target")  # the ratio is the objective: it is good tokens by all
        return None, None, _slo_percent(need("at_least"), "a token that is not found")
    target = _slo_percent(need("target"), "a single bad event" if sli not in SLO_SLIS else "a single slow request")
    if sli in SLO_SLIS:
        refuse("at_least")
        return need("below").duration(0.0001, 7680), None, target
    if sli == SLO_SPEED:
        refuse("below")
        return None, _number(need("at_least"), 0.1, 10_000), target
    if sli in (SLO_ERRORS, SLO_ABORTS):
        refuse("below", "at_least")
        return None, None, target
    return (*_metric_wants(value, sli, keys), target)


def _metric_wants(value: Value, sli: str, keys: Mapping[str, Value]) -> tuple[float | None, float | None]:
    """`below` or `at_least` of a kernel_ or gpu_ family."""
    known = known_metrics()
    metric = known.get(sli)
    if metric is None:
        keys["sli"].fail(f"there is no metric {shown(sli)}", f"{did_you_mean(sli, sorted(known))}see docs/metrics.md")
    if metric.kind not in {"gauge", "histogram"}:
        keys["sli"].fail(f"{sli} is a {metric.kind}", "an objective is about a histogram or a gauge")
    given = [key for key in ("below", "at_least") if key in keys]
    if len(given) != 1:
        value.fail("give one of `below` and `at_least`", "add `below:` with the largest value that is good")
    (key,) = given
    if metric.kind == "histogram":
        if key == "at_least":
            keys[key].fail(f"{sli} is a histogram", "write `below:` with one of its bucket bounds")
        return _bound_of(keys[key], metric.bounds), None
    threshold = _in_unit(keys[key], metric.unit)
    return (threshold, None) if key == "below" else (None, threshold)


def _bound_of(value: Value, bounds: Sequence[float]) -> float:
    """A time that is one of the bounds, which are kept in the kernel and cannot be added to."""
    seconds = value.duration(bounds[0], bounds[-1])
    for bound in bounds:
        if abs(bound - seconds) < 1e-12:
            return bound
    below = max(bound for bound in bounds if bound < seconds)
    above = min(bound for bound in bounds if bound > seconds)
    value.fail(f"{value.described()} is no bucket bound", f"write {_exact_time(below)} or {_exact_time(above)}")


def _exact_time(seconds: float) -> str:
    unit = max((size, unit) for unit, size in _TIME_UNITS.items() if size <= seconds and size <= 1)
    return f"{round(seconds / unit[0], 9):.12g}{unit[1]}"


def _in_unit(value: Value, unit: str) -> float:
    if unit == "bytes":
        return value.size(1, 2**60)
    if unit == "seconds":
        return value.duration(1e-6, 366 * 86400)
    if unit == "ratio":
        return value.percent(1.0)
    return _number(value, 0, 1e15)


def _number(value: Value, low: float, high: float) -> float:
    text = value.node.value if value.node.id == "scalar" and not value.node.style else ""
    if not _DECIMAL.fullmatch(text) or not low <= float(text) <= high:
        value.fail(f"must be a number from {low:g} to {high:g}, not {value.described()}", "write it without a unit")
    return float(text)


def _slo_percent(value: Value, one: str) -> float:
    target = value.percent(1.0)
    if target == 1:
        value.fail(f"100% leaves no room for {one}", "write less, such as 99.9%")
    return target


def _slo_window(value: Value) -> int:
    seconds = value.duration(3600, 90 * 86400)
    if seconds < SLO_SHORTEST_S:
        value.fail(
            f"{value.described()} is shorter than the longest window of the burn rate",
            f"write a period from {SLO_SHORTEST_S // 86400}d to 90d, such as 7d or 30d",
        )
    if seconds % 3600:
        value.fail(f"{value.described()} is no whole number of hours", "write whole days or hours, such as 30d")
    return round(seconds)


def _slo_reason(value: Value) -> str:
    reason = value.text()
    if reason not in SLO_REASONS:
        value.fail(
            f"unknown reason {shown(reason)}",
            f"{did_you_mean(reason, SLO_REASONS)}allowed here: {', '.join(SLO_REASONS)}",
        )
    return reason


def known_metrics() -> Mapping[str, KnownMetric]:
    """The kernel_ and gpu_ families, by their name in the text format, as the installed package lists them."""
    from exporter.slo.catalogue import known  # noqa: PLC0415 - only an objective about one of them needs it

    return known()


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
    points: list[ProbePoint] = []
    items = value.items()
    if len(items) > MAX_PROBE_POINTS:
        value.fail(f"there are {len(items)} probe points", f"list at most {MAX_PROBE_POINTS}")
    for item in items:
        point = _probe_point(item, services)
        if any(point.name == other.name for other in points):
            item.fail(f"the name {shown(point.name)} is given twice", "give each probe point a name of its own")
        points.append(point)
    return tuple(points)


def _probe_point(value: Value, services: AbstractSet[str]) -> ProbePoint:
    keys = value.fields(
        *ProbePoint.__struct_fields__, required=("name", "library", "hit_tokens", "looked_up_tokens")
    )
    name = keys["name"].text()
    if not _SLO_NAME.fullmatch(name):
        keys["name"].fail(
            f"{shown(name)} is not the name of a probe point", "use 1 to 63 of a-z 0-9 - and begin with a letter"
        )
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
        _service_of(keys["service"], services) if "service" in keys else None,
    )


def _service_of(value: Value, services: AbstractSet[str]) -> str | None:
    """The name of a configured service; None for `*`, which is every one."""
    name = value.text()
    if name == "*":
        return None
    if name not in services:
        near = did_you_mean(name, sorted(services))
        value.fail(f"there is no service {shown(name)}", f"{near}list it under services")
    return name


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
    if not _is_base_url(url):
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


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return known and plain and not (parts.query or parts.fragment or parts.username or parts.password)


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
