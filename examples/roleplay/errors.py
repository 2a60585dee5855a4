"""What the service refuses: on the command line, and over HTTP in OpenAI's form."""

from __future__ import annotations


class Refusal(Exception):
    """A command cannot go on. `what` says what happened, `next_step` what to try."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(f"{what}; {next_step}")
        self.what = what
        self.next_step = next_step


class ApiError(Exception):
    """A request gets this HTTP status and OpenAI's error body."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def type(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"
