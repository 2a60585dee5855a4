"""Reads objectives in Sloth's format `prometheus/v1`: PromQL that its author answers for, with a window left open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from typing import Final

from exporter.document import Value, document, read_text, shown
from exporter.slo.declared import MAX_SLOS, slo_id
from exporter.slo.model import WINDOW, AlertStyle, Events, Measure, Objective, Ratio, selector
from exporter.slo.native import ALERT

VERSION: Final = "prometheus/v1"
PERIOD_S: Final = 30 * 86400
"""Sloth's files say nothing of the period; this is its default, too."""
OPTION: Final = "--sloth"

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,62}")
_TEMPLATE: Final = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_TAKEN: Final = frozenset("sloth_id sloth_service sloth_slo sloth_window".split())
_MAX_QUERY: Final = 1 << 16
_MARKER: Final = re.compile(r"^---(?=\s|\Z)", re.MULTILINE)
"""Begins a YAML document. It can stand nowhere else, in a text over several lines neither."""
_EMPTY: Final = re.compile(r"(---|\.\.\.)?\s*(#.*)?|%.*")
_TOKEN: Final = re.compile(r"""#.*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`|["'`()\[\]{}]""")
"""What is to be told apart in PromQL: comments, strings, a quote that begins none, and brackets."""
_CLOSES: Final = {")": "(", "]": "[", "}": "{"}


def load(path: str | os.PathLike[str], taken: AbstractSet[str] = frozenset()) -> list[Objective]:
    """The objectives of a file; other objectives have the ids `taken`. Raises `ConfigError` with path and line."""
    name = os.fspath(path)
    return parse(read_text(name, OPTION), name, taken)


def parse(text: str, path: str = "<sloth>", taken: AbstractSet[str] = frozenset()) -> list[Objective]:
    """The objectives in all documents of a text; `path` is only named in errors. Raises `ConfigError`."""
    ids = set(taken)
    objectives: list[Objective] = []
    for part in _documents(text):
        objectives += _read(document(part, path, f"write a file that begins with `version: {VERSION}`"), ids)
    return objectives


def _documents(text: str) -> Iterator[str]:
    """Each YAML document by itself, after so many empty lines that its own are numbered as in the file."""
    is_empty = True
    starts = [0, *(match.start() for match in _MARKER.finditer(text)), len(text)]
    for start, end in pairwise(starts):
        part = text[start:end]
        if not all(map(_EMPTY.fullmatch, part.splitlines())):
            is_empty = False
            yield "\n" * text.count("\n", 0, start) + part
    if is_empty:
        yield ""


def _read(root: Value, taken: set[str]) -> list[Objective]:
    """The objectives of a document, whose ids are taken from now on."""
    found = root.keys()
    if "kind" in found or "apiVersion" in found:
        root.fail("this is an object of Kubernetes", f"write its spec as a file with `version: {VERSION}`")
    keys = root.fields("version", "service", "labels", "slos", required=("version", "service", "slos"))
    version = keys["version"].literal()
    if version != VERSION:
        keys["version"].fail(f"{shown(version)} is not a version that is read", f"write `version: {VERSION}`")
    service = _name(keys["service"])
    labels = _labels(keys["labels"]) if "labels" in keys else {}
    items = keys["slos"].items()
    if not 1 <= len(items) <= MAX_SLOS:
        keys["slos"].fail(f"there are {len(items)} objectives", f"list 1 to {MAX_SLOS}")
    objectives: list[Objective] = []
    for item in items:
        objective = _objective(item, service, labels)
        if objective.id in taken:
            item.fail(f"there is another objective with the id {shown(objective.id)}", "rename one of them")
        taken.add(objective.id)
        objectives.append(objective)
    return objectives


def _objective(value: Value, service: str, common: dict[str, str]) -> Objective:
    keys = value.fields(
        *("name", "description", "objective", "labels", "sli", "alerting"),
        required=("name", "objective", "sli", "alerting"),
    )
    name = _name(keys["name"])
    sli = _sli(keys["sli"])
    labels = {**common, **(_labels(keys["labels"]) if "labels" in keys else {})}
    alert, page, ticket = _alerting(keys["alerting"])
    target = _target(keys["objective"])
    sentence = keys["description"].literal() if "description" in keys else f"{target * 100}% good"
    kind = f"sli_total:{sli.measure.value}5m" if isinstance(sli, Events) else "sli_error:ratio_rate5m"
    return Objective(
        service=service,
        name=name,
        target=target,
        window_s=PERIOD_S,
        sli=sli,
        absent=f"absent(slo:{kind}{{{selector({'sloth_id': slo_id(service, name)})}}})",
        sentence=" ".join(sentence.split()),
        spec=VERSION,
        alert_name=alert,
        labels=labels,
        page=page,
        ticket=ticket,
    )


def _name(value: Value) -> str:
    name = value.text()
    if not _NAME.fullmatch(name):
        value.fail(f"{shown(name)} is not a name", "use 1 to 63 of A-Z a-z 0-9 . _ -, a letter or digit at both ends")
    return name


def _target(value: Value) -> Decimal:
    text = value.literal()
    try:
        percent = Decimal(text) if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", text) else Decimal("NaN")
    except InvalidOperation:
        percent = Decimal("NaN")
    if not percent.is_finite() or not 0 < percent < 100:
        value.fail(f"must be a percentage between 0 and 100, not {value.described()}", "write one, such as 99.9")
    return (percent / 100).normalize()


def _sli(value: Value) -> Events | Ratio:
    keys = value.fields("events", "raw", "plugin")
    if "plugin" in keys:
        keys["plugin"].fail("plugins are programs of Sloth's, and not read", "write `events:` with the two queries")
    if len(keys) != 1:
        value.fail("give one of `events` and `raw`", "write `events:` with error_query and total_query")
    if "raw" in keys:
        raw = keys["raw"].fields("error_ratio_query", required=("error_ratio_query",))
        return Ratio(_query(raw["error_ratio_query"]))
    events = keys["events"].fields("error_query", "total_query", required=("error_query", "total_query"))
    return Events(_query(events["error_query"]), _query(events["total_query"]), Measure.UNITLESS)


def _query(value: Value) -> str:
    text = value.literal().strip()
    code = _TOKEN.sub(lambda token: "" if token[0].startswith("#") else token[0], text)
    if not code.strip() or not len(text) <= _MAX_QUERY or not text.replace("\n", " ").replace("\t", " ").isprintable():
        value.fail("is not a query", "write PromQL, without control characters")
    for hole in _TEMPLATE.findall(text):
        if hole.strip("- \t") != ".window":
            value.fail(f"{shown('{{' + hole + '}}')} is not filled in", f"only {WINDOW} is")
    if not _TEMPLATE.search(code):
        value.fail("has no window", f"write [{WINDOW}] where the range stands")
    _refuse_loose_ends(value, text)
    return _TEMPLATE.sub(lambda _: WINDOW, text)


def _refuse_loose_ends(value: Value, query: str) -> None:
    """Refuse a query with a bracket or a string that does not end."""
    opened: list[str] = []
    for token in _TOKEN.finditer(query):
        text = token[0]
        if text in {"(", "[", "{"}:
            opened.append(text)
        elif text in _CLOSES:
            before = opened.pop() if opened else None
            if before is None:
                value.fail(f"{text!r} closes no bracket", "remove it, or open one before it")
            if before != _CLOSES[text]:
                value.fail(f"{before!r} is closed by {text!r}", "close brackets in the order they were opened")
        elif text in {'"', "'", "`"}:
            begin = shown(query[token.start() :])
            value.fail(f"the string that begins with {begin} has no end", f"close it with {text}")
    if opened:
        value.fail(f"{opened[-1]!r} is not closed", "close it")


def _alerting(value: Value) -> tuple[str, AlertStyle, AlertStyle]:
    keys = value.fields("name", "labels", "annotations", "page_alert", "ticket_alert")
    name = keys["name"].text() if "name" in keys else ALERT
    labels = _labels(keys["labels"]) if "labels" in keys else {}
    annotations = _annotations(keys["annotations"]) if "annotations" in keys else {}

    def style(key: str) -> AlertStyle:
        if key not in keys:
            return AlertStyle(True, labels, annotations)
        own = keys[key].fields("disable", "labels", "annotations")
        return AlertStyle(
            not (own["disable"].switch() if "disable" in own else False),
            {**labels, **(_labels(own["labels"]) if "labels" in own else {})},
            {**annotations, **(_annotations(own["annotations"]) if "annotations" in own else {})},
        )

    return name, style("page_alert"), style("ticket_alert")


def _labels(value: Value) -> dict[str, str]:
    found = {}
    for name, item in value.keys().items():
        if not _LABEL.fullmatch(name) or name.startswith("__"):
            item.fail(f"{shown(name)} is not a label name", "use letters, digits and _, and begin with a letter")
        if name in _TAKEN:
            item.fail(f"the label {shown(name)} is taken", "choose another name")
        found[name] = item.literal()
    return found


def _annotations(value: Value) -> dict[str, str]:
    found = {}
    for name, item in value.keys().items():
        if not _LABEL.fullmatch(name):
            item.fail(f"{shown(name)} is not the name of an annotation", "use letters, digits and _")
        found[name] = item.literal()
    return found
