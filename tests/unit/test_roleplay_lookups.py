"""Each look-up in the prefix cache is announced once, with the numbers that the engine counts."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path

import pytest

from examples.roleplay import engine, lookups
from examples.roleplay.lookups import announcer, unannounced

TOLD = """
#include <stdint.h>
#include <stdio.h>
char told[4096];
void llm_kv_lookup(const char *model, uint64_t hit_tokens, uint64_t looked_up_tokens)
{
    static int size;
    size += snprintf(told + size, sizeof(told) - size, "%s %lu %lu\\n", model, hit_tokens, looked_up_tokens);
}
"""


def compiled(folder: Path, source: str) -> Path:
    (folder / "library.c").write_text(source)
    command = ["clang", "-shared", "-fPIC", "-o", str(folder / "library.so"), str(folder / "library.c")]
    subprocess.run(command, check=True)
    return folder / "library.so"


def test_the_function_is_called_with_the_model_the_hits_and_the_queries(tmp_path: Path) -> None:
    library = compiled(tmp_path, TOLD)
    announce = announcer("understudy", library)
    announce(16, 101)
    announce(0, 2**40)
    told = (ctypes.c_char * 4096).in_dll(ctypes.CDLL(str(library)), "told").value
    assert told == b"understudy 16 101\nunderstudy 0 1099511627776\n"


def test_the_engine_s_own_library_takes_the_call() -> None:
    assert lookups.LIBRARY.exists(), "it is not built; try: make native"
    announcer("headliner")(3, 7)


def test_without_the_library_the_engine_announces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIBRARY", tmp_path / "none.so")
    announce = engine._announcer("understudy")
    assert announce is unannounced
    announce(1, 2)


@pytest.mark.parametrize("broken", ["nonsense", "empty"])
def test_a_library_that_does_not_do_is_said_and_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    library = tmp_path / "library.so"
    if broken == "nonsense":
        library.write_bytes(b"\x7fELF and no more")
    else:
        compiled(tmp_path, "int nothing;")
    monkeypatch.setattr(engine, "LIBRARY", library)
    monkeypatch.setattr(engine, "announcer", lambda model: announcer(model, library))
    with caplog.at_level(logging.WARNING):
        assert engine._announcer("understudy") is unannounced
    (record,) = caplog.records
    assert "look-ups of understudy cannot be watched" in record.getMessage()
