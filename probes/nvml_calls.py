"""Asks the driver about one GPU, and remembers what it cannot answer."""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import pynvml  # type: ignore[import-untyped]  # it has no types

log = logging.getLogger("footlight")

Untyped: TypeAlias = Any
"""What pynvml takes and returns: it has no types."""

FAULTS: Final = (
    pynvml.NVMLError,
    pynvml.NVMLLibraryMismatchError,
    # What pynvml makes of an answer that makes no sense: text that is none, a count of four billion, a wrong index.
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,
    ctypes.ArgumentError,
)
"""All that a call of pynvml raises for what a driver does."""

# Errors that a GPU and its driver go on answering: the call is not made again until the library is opened anew.
_LASTING: Final = frozenset(
    {
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
    }
)
UNSUPPORTED: Final = _LASTING - {pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NO_PERMISSION}
"""Errors that say nothing about the state of the GPU."""
_GPU_GONE: Final = frozenset(
    {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND}
)
_DRIVER_GONE: Final = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
_FATAL: Final = _GPU_GONE | _DRIVER_GONE

_NAMES: Final = {
    getattr(pynvml, name): name.removeprefix("NVML_ERROR_").lower()
    for name in dir(pynvml)
    if name.startswith("NVML_ERROR_")
}

_NEXT_STEPS: Final = {
    pynvml.NVML_ERROR_NO_PERMISSION: "let the user nobody read and write /dev/nvidiactl and the GPUs' device files",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the kernel module with: modprobe nvidia",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the driver was updated: restart the container; on the host, load the kernel module again or restart it"
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: "look for Xid in the kernel's log; reset the GPU or restart the host",
    pynvml.NVML_ERROR_RESET_REQUIRED: "when nothing uses the GPU, run: nvidia-smi --gpu-reset",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "see whether nvidia-smi lists the GPU",
    pynvml.NVML_ERROR_INVALID_ARGUMENT: "see whether nvidia-smi lists the GPU",
    pynvml.NVML_ERROR_NOT_FOUND: "see whether nvidia-smi lists the GPU",
    pynvml.NVML_ERROR_UNKNOWN: "run nvidia-smi; a container may have lost its devices: restart it",
}


class DriverGone(Exception):
    """Nothing can be asked any more until the library is opened again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(words(error))
        self.error = error


def code_of(error: Exception) -> int | None:
    """The driver's error code; None where the driver gave none."""
    code = getattr(error, "value", None)
    return code if isinstance(code, int) else None


def name_of(error: Exception) -> str:
    """One of a fixed set of names for an error, fit for a label."""
    code = code_of(error)
    return "bad_answer" if code is None else _NAMES.get(code, "other")


def words(error: Exception) -> str:
    """What the driver calls it."""
    return f"{type(error).__name__}: {error}" if code_of(error) is None else str(error).rstrip(".")


def next_step(error: Exception) -> str:
    """What to try."""
    code = code_of(error)
    return _NEXT_STEPS.get(-1 if code is None else code, "run nvidia-smi")


class Calls:
    """The calls about one GPU, from opening the library to closing it.

    After `begin`, `ask` makes calls until `deadline_ns` of `clock`; then `late` is set, and no more are made.
    `failures` counts, by `name_of`, errors other than that something is not supported. `told` remembers what was
    logged of which GPU, also while the library is closed.
    """

    def __init__(self, who: str, clock: Callable[[], int], failures: Counter[str], told: set[tuple[str, str]]) -> None:
        self._who: Final = who
        self._clock: Final = clock
        self._failures: Final = failures
        self._told: Final = told
        self._refused: set[str] = set()
        self._not_told: set[str] = set()
        self._new: list[str] = []
        self._deadline_ns = 0
        self._answers = 0
        self._doubt: Exception | None = None
        self.lost: Exception | None = None
        self.late = False

    def begin(self, deadline_ns: int) -> None:
        """Before each look."""
        self._deadline_ns = deadline_ns
        self._answers = 0
        self._doubt = None
        self.late = False

    def end(self) -> None:
        """After each look: say what is new, and take a GPU that answered nothing for lost."""
        if self._doubt is not None and not self._answers:
            self.lost = self._doubt
        if self._new:
            log.info("%s does not tell: %s", self._who, ", ".join(self._new))
            self._new = []

    @property
    def not_told(self) -> tuple[str, ...]:
        """What is not asked any more."""
        return tuple(sorted(self._not_told))

    def may_ask(self) -> bool:
        """Whether there is a GPU and time."""
        if self.lost is not None:
            return False
        if self._clock() > self._deadline_ns:
            self.late = True
        return not self.late

    def ask(
        self, what: str, call: Callable[..., Any], *arguments: object, aside: bool = False, counts: bool = True
    ) -> Untyped:
        """What `call` returns, or None.

        `aside`: another call may tell the same, so that nobody is told of this one. `counts`: an answer shows that the
        GPU is there.
        """
        if what in self._refused or not self.may_ask():
            return None
        try:
            answer = call(*arguments)
        except FAULTS as error:
            self.failed(what, error, aside)
            return None
        self._answers += counts
        return answer

    def answered(self) -> None:
        """One of several answers of one call was good."""
        self._answers += 1

    def ask_maybe(self, call: Callable[..., Any], *arguments: object) -> Untyped:
        """As `ask`, of what is there at one time and not at another: it is asked again at the next look."""
        if not self.may_ask():
            return None
        try:
            answer = call(*arguments)
        except FAULTS as error:
            if code_of(error) in _FATAL:
                self.failed(getattr(call, "__name__", ""), error)
            return None
        self._answers += 1
        return answer

    def ask_samples(self, what: str, handle: Untyped, since_us: int) -> Untyped:
        """Samples of what processes use, or None where there are none, which the driver calls an error."""

        def call() -> Untyped:
            try:
                return pynvml.nvmlDeviceGetProcessUtilization(handle, since_us)
            except pynvml.NVMLError as error:
                # A driver that finds no sample says that it succeeded or NOT_FOUND, and pynvml raises either.
                if error.value in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_DATA):
                    return ()
                raise

        return self.ask(what, call)

    def is_refused(self, what: str) -> bool:
        """Whether it is not asked any more."""
        return what in self._refused

    def failed(self, what: str, error: Exception, aside: bool = False) -> None:
        """Learn from an error. Raises `DriverGone`."""
        code = code_of(error)
        if code not in UNSUPPORTED:
            self._failures[name_of(error)] += 1
            self._doubt = error
        if code in _DRIVER_GONE:
            raise DriverGone(error)
        if code in _GPU_GONE:
            self.lost = error
        elif code in _LASTING:
            self._refused.add(what)
            if not aside:
                self._not_told.add(what)
            if not aside and (self._who, what) not in self._told:
                self._told.add((self._who, what))
                self._new.append(f"{what} ({words(error)})")
