"""A YAML file as a tree of values that know where they stand, so that every error names its place and the next step.

Everything that no configuration of ours needs is refused: duplicate keys, aliases, tags, depth, more than one document.
The privileged attacher imports this module, so PyYAML is imported only when a file is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar
from urllib.parse import SplitResult, urlsplit

from probes.errors import ConfigError

if TYPE_CHECKING:
    import yaml

MAX_FILE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_TEXT: Final = 4096

WHOLE: Final = re.compile(r"[0-9]{1,18}")
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
NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
"""Of what the configuration names itself."""
ON_WORDS: Final = frozenset({"on", "true", "yes"})
OFF_WORDS: Final = frozenset({"off", "false", "no"})


class Named(Protocol):
    """Something of a list in which each has a name of its own."""

    @property
    def name(self) -> str:
        """It."""


T = TypeVar("T")
N = TypeVar("N", bound=Named)


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


def is_plain_text(text: str) -> bool:
    """Whether it is not empty, not long, and can be printed as it is."""
    return 0 < len(text) <= MAX_TEXT and text.isprintable()


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
            # which one is not said: it may be a password that begins with a star
            step = "write the value out, or in quotes where it begins with *"
            raise ConfigError("an alias (*name) is not allowed", step, path, line)
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
        if not is_plain_text(value):
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
        if not WHOLE.fullmatch(value) or not low <= int(value) <= high:
            self.fail(
                f"must be a whole number from {low} to {high}, not {self.described()}",
                "write it in digits, without quotes",
            )
        return int(value)

    def switch(self) -> bool:
        """`on` or `off` (or true, false, yes, no)."""
        value = str(self.node.value).lower() if self.node.id == "scalar" and not self.node.style else ""
        if value not in ON_WORDS and value not in OFF_WORDS:
            self.fail(f"must be on or off, not {self.described()}", "write `on` or `off`")
        return value in ON_WORDS

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

    def number(self, low: float, high: float) -> float:
        """A number without a unit."""
        text = self.node.value if self.node.id == "scalar" and not self.node.style else ""
        if not _DECIMAL.fullmatch(text) or not low <= float(text) <= high:
            self.fail(f"must be a number from {low:g} to {high:g}, not {self.described()}", "write it without a unit")
        return float(text)

    def named(self, most: int, one: str, many: str, read: Callable[[Value], N]) -> tuple[N, ...]:
        """A list of at most `most` things, each with a name of its own; `one` and `many` are words for them."""
        found: list[N] = []
        items = self.items()
        if len(items) > most:
            self.fail(f"there are {len(items)} {many}", f"list at most {most}")
        for item in items:
            thing = read(item)
            if any(thing.name == other.name for other in found):
                item.fail(f"the name {shown(thing.name)} is given twice", f"give each {one} a name of its own")
            found.append(thing)
        return tuple(found)

    def name_of(self, thing: str) -> str:
        """The name of `thing`, such as `an objective`."""
        name = self.text()
        if not NAME.fullmatch(name):
            self.fail(f"{shown(name)} is not the name of {thing}", "use 1 to 63 of a-z 0-9 - and begin with a letter")
        return name

    def service(self, services: AbstractSet[str]) -> str | None:
        """The name of a configured service; None for `*`, which is every one."""
        name = self.text()
        if name == "*":
            return None
        if name not in services:
            near = did_you_mean(name, sorted(services))
            self.fail(f"there is no service {shown(name)}", f"{near}list it under services")
        return name

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
    unit = max((bytes_, unit) for unit, bytes_ in _SIZE_UNITS.items() if bytes_ <= size and size % bytes_ == 0)
    return f"{size // unit[0]}{unit[1]}"


def _time(seconds: float) -> str:
    unit = max((size, unit) for unit, size in _TIME_UNITS.items() if size <= seconds)
    return f"{seconds / unit[0]:g}{unit[1]}"


def exact_time(seconds: float) -> str:
    """A time as one would write it in the file: in us, ms or s, with all its digits."""
    unit = max((size, unit) for unit, size in _TIME_UNITS.items() if size <= seconds and size <= 1)
    return f"{round(seconds / unit[0], 9):.12g}{unit[1]}"


def http_url(text: str) -> SplitResult | None:
    """The parts of an http or https URL with a host, in printable ASCII; None for any other text."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    plain = text.isascii() and text.isprintable() and " " not in text and len(text) <= MAX_TEXT
    return parts if known and plain else None


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    """The beginning of a next step: the allowed word that is nearest; empty where none is near."""
    import difflib  # noqa: PLC0415 - only needed on the way out

    near = difflib.get_close_matches(word[:64].lower(), allowed, 1, 0.6)
    return f"did you mean '{near[0]}'? " if near else ""
