"""Finds functions and USDT probes in an ELF file that strangers wrote.

Only what a uprobe needs: where in the file a function's first instruction is, and which probes there are. Everything in
the file is a claim: sizes are bounded, offsets are checked, and the file may shrink while it is read, so it is never
mapped.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

_TABLE_BYTES: Final = 32 << 20
_SECTIONS: Final = 4096
_SEGMENTS: Final = 256
_PLACES: Final = 8
"""Where a name may stand in a table of strings: as itself, or as the end of longer ones."""
_TRIES: Final = 10_000
_HEADER: Final = struct.Struct("=16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("=IIQQQQQQ")
_SECTION: Final = struct.Struct("=IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("=IBBHQQ")
_TAG: Final = struct.Struct("=QQ")
_PT_LOAD: Final = 1
_PF_X: Final = 1
_SHT_SYMTAB: Final = 2
_SHT_DYNAMIC: Final = 6
_SHT_NOTE: Final = 7
_SHT_DYNSYM: Final = 11
_DT_SONAME: Final = 14
_STT_FUNC: Final = 2
_NOTE: Final = struct.Struct("=III")
_USDT_NOTE: Final = 3
_USDT_OWNER: Final = b"stapsdt\0"
_USDT_ADDRESSES: Final = 24  # of the probe, of what prelink moved, of the semaphore
_NOTES: Final = 10_000
_NOTE_SECTIONS: Final = 16


class ElfError(Exception):
    """The file is not one whose functions can be found; the text says why."""


@dataclass(frozen=True, slots=True)
class Functions:
    """What was found in a file: its SONAME, empty where it has none, and offsets in the file by a function's name."""

    soname: str
    offsets: Mapping[str, int]


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int


class _Segment(NamedTuple):
    offset: int
    address: int
    size: int


def find_functions(fd: int, names: Iterable[str]) -> Functions:
    """Look the names up in the file's tables of symbols. Those that it does not define are left out.

    `fd` is a regular file, open for reading. Raises ElfError, or OSError from reading.
    """
    sections, code = _tables(fd)
    wanted = set(names)
    offsets: dict[str, int] = {}
    for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
        section = _first(sections, kind)
        if section is not None and wanted - offsets.keys():
            symbols, strings = _table(fd, section), _strings(fd, sections, section)
            for name in sorted(wanted - offsets.keys()):
                offset = _find(symbols, strings, name.encode(), code)
                if offset is not None:
                    offsets[name] = offset
    return Functions(_soname(fd, sections), offsets)


def find_usdt_probes(fd: int) -> frozenset[str]:
    """Return the USDT probes of a file, each as `provider:name`. Raises as `find_functions` does."""
    found = set()
    notes = [section for section in _tables(fd)[0] if section.kind == _SHT_NOTE]
    for section in notes[:_NOTE_SECTIONS]:
        for description in _usdt_notes(_table(fd, section)):
            provider, name, *_ = (*description[_USDT_ADDRESSES:].split(b"\0", 2), b"", b"")
            found.add(f"{os.fsdecode(provider)}:{os.fsdecode(name)}")
    return frozenset(found)


def _usdt_notes(notes: bytes) -> Iterator[bytes]:
    at = 0
    for _ in range(_NOTES):
        if at + _NOTE.size > len(notes):
            return
        owner_size, size, kind = _NOTE.unpack_from(notes, at)
        owner_at = at + _NOTE.size
        at = owner_at + -(-owner_size // 4) * 4
        if kind == _USDT_NOTE and notes[owner_at : owner_at + owner_size] == _USDT_OWNER:
            yield notes[at : at + size]
        at += -(-size // 4) * 4


def _tables(fd: int) -> tuple[list[_Section], list[_Segment]]:
    """The sections, and the segments with code."""
    identity, kind, _, _, _, segments_at, sections_at, _, _, segment_size, segment_count, section_size, count, _ = (
        _HEADER.unpack(_read(fd, 0, _HEADER.size))
    )
    order = 1 if sys.byteorder == "little" else 2
    if identity[:4] != b"\x7fELF":
        raise ElfError("is no ELF file")
    if identity[4] != 2 or identity[5] != order or kind not in (2, 3):
        raise ElfError("is no program or library of this machine's kind, 64-bit")
    if segment_size != _SEGMENT.size or section_size != _SECTION.size:
        raise ElfError("has no tables of sections and segments")
    if segment_count > _SEGMENTS or count > _SECTIONS:
        raise ElfError("has too many sections or segments")
    raw = _read(fd, segments_at, segment_count * segment_size)
    code = [
        _Segment(offset, address, size)
        for type_, flags, offset, address, _, size, _, _ in _SEGMENT.iter_unpack(raw)
        if type_ == _PT_LOAD and flags & _PF_X
    ]
    raw = _read(fd, sections_at, count * section_size)
    sections = [
        _Section(type_, offset, size, link)
        for _, type_, _, _, offset, size, link, _, _, _ in _SECTION.iter_unpack(raw)
    ]
    return sections, code


def _find(symbols: bytes, strings: bytes, name: bytes, code: list[_Segment]) -> int | None:
    for place in _occurrences(strings, name + b"\0", 1, _PLACES):
        for at in _occurrences(symbols, struct.pack("=I", place), _SYMBOL.size, _TRIES):
            if at + _SYMBOL.size > len(symbols):
                continue
            _, info, _, section, address, _ = _SYMBOL.unpack_from(symbols, at)
            if info & 0xF != _STT_FUNC or section == 0:
                continue
            for segment in code:
                if segment.address <= address < segment.address + segment.size:
                    return int(address - segment.address + segment.offset)
    return None


def _occurrences(data: bytes, what: bytes, step: int, limit: int) -> Iterator[int]:
    """Where `what` stands in `data`, at multiples of `step`; at most `limit` places are looked at."""
    at = -1
    for _ in range(limit):
        at = data.find(what, at + 1)
        if at < 0:
            return
        if at % step == 0:
            yield at


def _soname(fd: int, sections: list[_Section]) -> str:
    section = _first(sections, _SHT_DYNAMIC)
    if section is None:
        return ""
    raw = _table(fd, section)
    for tag, value in _TAG.iter_unpack(raw[: len(raw) // _TAG.size * _TAG.size]):
        if tag == _DT_SONAME:
            strings = _strings(fd, sections, section)
            return os.fsdecode(strings[value : strings.find(b"\0", value)][:256])
    return ""


def _first(sections: Iterable[_Section], kind: int) -> _Section | None:
    """The section of a kind of which a file has one: what claims thousands is not read thousands of times."""
    return next((each for each in sections if each.kind == kind), None)


def _strings(fd: int, sections: list[_Section], of: _Section) -> bytes:
    if of.link >= len(sections):
        raise ElfError("has a table of symbols without names")
    return _table(fd, sections[of.link])


def _table(fd: int, section: _Section) -> bytes:
    if section.size > _TABLE_BYTES:
        raise ElfError(f"has a table of {section.size >> 20} MiB")
    return _read(fd, section.offset, section.size)


def _read(fd: int, offset: int, size: int) -> bytes:
    if offset >= 1 << 62:
        raise ElfError("is damaged")
    pieces = []
    while size > 0:
        piece = os.pread(fd, size, offset)
        if not piece:
            raise ElfError("is cut short")
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)
