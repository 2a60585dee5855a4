"""What can go wrong, by whose fault it is, and which exit code says so."""

from __future__ import annotations


class FootlightError(Exception):
    """A failure that a person has to read.

    `what` says what happened, `next_step` what to try. `exit_code` is the command's exit status.
    """

    exit_code = 1

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what}; {self.next_step}"


class HostError(FootlightError):
    """This host cannot do it: a privilege, BPF, BTF or a library is missing."""

    exit_code = 3


class ConfigError(FootlightError):
    """The configuration is wrong. `path` is the file, `line` the 1-based line, where known."""

    exit_code = 4

    def __init__(self, what: str, next_step: str, path: str | None = None, line: int | None = None) -> None:
        super().__init__(what, next_step)
        self.path = path
        self.line = line


class TargetError(FootlightError):
    """The process, port or executable that was named is not there."""


class ProbeError(FootlightError):
    """A probe did not load or attach although the host should allow it. The text ends with libbpf's log."""
