"""Label values that any scraper and any terminal can take."""

from __future__ import annotations

MAX_LABEL_CHARS = 256
UNKNOWN = "_unknown"  # the name was not seen
OTHER = "_other"  # the name is one too many, or one that the service refused

# Names that the llm_ metrics themselves use; a configured label must not take one.
RESERVED = frozenset(
    {"service_name", "model_name", "api", "le", "quantile", "sli", "reason", "phase", "outcome", "cause"}
)


def safe(value: str) -> str:
    """`value` without what cannot be encoded or printed, at most `MAX_LABEL_CHARS` long.

    Lone surrogates, control and format characters, separators but the space, and unassigned code points become U+FFFD.
    A value that was cut ends with an ellipsis. An empty value is `_unknown`: Prometheus takes an empty label for none.
    """
    if len(value) > MAX_LABEL_CHARS:
        value = value[: MAX_LABEL_CHARS - 1] + "…"
    if not value.isprintable():
        value = "".join(char if char.isprintable() else "\ufffd" for char in value)
    return value or UNKNOWN
