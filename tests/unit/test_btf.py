"""BTF written byte by byte, as btf.rst has it, so that no compiler is needed; kernel/ checks clang's."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.btf import dtype_of, enum_of
from probes.errors import ProbeError

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, CONST, FUNC_PROTO, VAR = 1, 2, 3, 4, 5, 6, 8, 10, 13, 14
DATASEC, FLOAT, DECL_TAG, ENUM64 = 15, 16, 17, 19
SIGNED, BOOL = 1 << 24, 4 << 24


@dataclass
class Writer:
    """Builds a .BTF section and an ELF file around it."""

    types: bytes = b""
    strings: bytes = b"\0"
    count: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def text(self, text: str) -> int:
        if not text:
            return 0
        if text not in self.names:
            self.names[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return self.names[text]

    def add(self, kind: int, name: str = "", size: int = 0, *extra: int, count: int = 0, flag: bool = False) -> int:
        info = flag << 31 | kind << 24 | count
        self.types += struct.pack(f"<{3 + len(extra)}I", self.text(name), info, size, *extra)
        self.count += 1
        return self.count

    def integer(self, name: str, size: int, encoding: int = 0) -> int:
        return self.add(INT, name, size, encoding | size * 8)

    def array(self, of: int, count: int) -> int:
        return self.add(ARRAY, "", 0, of, 1, count)

    def struct(
        self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, bitfields: bool = False
    ) -> int:
        """Members are name, type, offset in bits."""
        extra = [word for name, kind, offset in members for word in (self.text(name), kind, offset)]
        return self.add(kind, name, size, *extra, count=len(members), flag=bitfields)

    def section(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings

    def write(self, path: Path, name: bytes = b".BTF") -> Path:
        btf, names = self.section(), b"\0.shstrtab\0" + name + b"\0"
        elf = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 1, 247, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 1)
        start = 64 + 3 * 64
        sections = bytes(64)
        sections += struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, start, len(names), 0, 0, 1, 0)
        sections += struct.pack("<IIQQQQIIQQ", 11, 1, 0, 0, start + len(names), len(btf), 0, 0, 1, 0)
        path.write_bytes(elf + sections + names + btf)
        return path


def test_each_integer_float_enum_and_pointer_has_its_dtype(tmp_path: Path) -> None:
    w = Writer()
    u32, u64 = w.integer("unsigned int", 4), w.integer("unsigned long", 8)
    members = [
        ("u64", w.add(TYPEDEF, "u64", u64), 0),
        ("u32", w.add(CONST, "", u32), 64),
        ("s16", w.integer("short", 2, SIGNED), 96),
        ("s8", w.integer("signed char", 1, SIGNED), 112),
        ("flag", w.integer("_Bool", 1, BOOL), 120),
        ("f64", w.add(FLOAT, "double", 8), 128),
        ("where", w.add(PTR, "", u64), 192),
        ("kind", w.add(ENUM, "kind", 4, w.text("ONE"), 1, count=1), 256),
    ]
    w.struct("record", 40, *members)
    expected: Any = {
        "names": ["u64", "u32", "s16", "s8", "flag", "f64", "where", "kind"],
        "formats": ["u8", "u4", "i2", "i1", "?", "f8", "u8", "u4"],
        "offsets": [0, 8, 12, 14, 15, 16, 24, 32],
        "itemsize": 40,
    }
    assert dtype_of(w.write(tmp_path / "o"), "record") == np.dtype(expected)


def test_padding_and_size_are_the_compilers(tmp_path: Path) -> None:
    w = Writer()
    u8, u64 = w.integer("unsigned char", 1), w.integer("unsigned long", 8)
    w.struct("record", 24, ("small", u8, 0), ("big", u64, 64), ("last", u8, 128))
    dtype = dtype_of(w.write(tmp_path / "o"), "record")
    assert dtype.itemsize == 24
    data = bytes([7]) + b"\xee" * 7 + (1 << 63).to_bytes(8, "little") + bytes([9]) + b"\xee" * 7
    assert np.frombuffer(data * 2, dtype).tolist() == [(7, 1 << 63, 9)] * 2


def test_char_arrays_are_strings_and_byte_arrays_are_arrays(tmp_path: Path) -> None:
    w = Writer()
    char, u8 = w.integer("char", 1, SIGNED), w.integer("unsigned char", 1)
    grid = w.array(w.array(u8, 2), 3)
    w.struct("record", 18, ("name", w.array(char, 8), 0), ("payload", w.array(u8, 4), 64), ("grid", grid, 96))
    (record,) = np.frombuffer(
        b"uvicorn\0" + bytes([1, 0, 2, 0]) + bytes(range(6)), dtype_of(w.write(tmp_path / "o"), "record")
    )
    assert record["name"] == b"uvicorn"
    assert record["payload"].tolist() == [1, 0, 2, 0]
    assert record["grid"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_structures_nest_and_anonymous_members_are_the_outers(tmp_path: Path) -> None:
    w = Writer()
    u32 = w.integer("unsigned int", 4)
    header = w.struct("header", 8, ("a", u32, 0), ("b", u32, 32))
    either = w.struct("", 8, ("wide", header, 0), ("narrow", u32, 0), kind=UNION)
    w.struct("record", 24, ("header", header, 0), ("", either, 64), ("list", w.array(header, 1), 128))
    words = np.arange(6, dtype="<u4").tobytes()
    (record,) = np.frombuffer(words, dtype_of(w.write(tmp_path / "o"), "record"))
    assert (record["header"]["a"], record["header"]["b"]) == (0, 1)
    assert (record["wide"]["a"], record["wide"]["b"], record["narrow"]) == (2, 3, 2)
    assert record["list"]["b"].tolist() == [5]


def test_kinds_that_no_record_uses_are_stepped_over(tmp_path: Path) -> None:
    w = Writer()
    u32 = w.integer("unsigned int", 4)
    w.add(FUNC_PROTO, "", u32, 0, u32, w.text("x"), u32, count=2)
    variable = w.add(VAR, "v", u32, 1)
    w.add(DATASEC, ".bss", 4, variable, 0, 4, count=1)
    w.add(DECL_TAG, "tag", variable, 0xFFFFFFFF)
    w.struct("record", 4, ("a", u32, 0))
    assert dtype_of(w.write(tmp_path / "o"), "record").names == ("a",)


def test_enums_keep_order_sign_and_width(tmp_path: Path) -> None:
    w = Writer()
    w.add(ENUM, "plain", 4, w.text("A"), 0, w.text("B"), 0xFFFFFFFF, count=2)
    w.add(ENUM, "signed", 4, w.text("MINUS"), 0xFFFFFFFF, w.text("PLUS"), 7, count=2, flag=True)
    w.add(ENUM64, "wide", 8, w.text("HIGH"), 5, 1 << 31, w.text("LOW"), 6, 0, count=2)
    w.add(ENUM, "empty", 4)
    path = w.write(tmp_path / "o")
    assert list(enum_of(path, "plain").items()) == [("A", 0), ("B", 0xFFFFFFFF)]
    assert enum_of(path, "signed") == {"MINUS": -1, "PLUS": 7}
    assert enum_of(path, "wide") == {"HIGH": 5 | 1 << 63, "LOW": 6}
    assert enum_of(path, "empty") == {}


def test_bit_fields_are_refused(tmp_path: Path) -> None:
    w = Writer()
    u32 = w.integer("unsigned int", 4)
    w.struct("record", 4, ("three", u32, 3 << 24), bitfields=True)
    w.struct("whole", 8, ("a", u32, 0), ("b", u32, 32), bitfields=True)
    path = w.write(tmp_path / "o")
    with pytest.raises(ProbeError, match=r"record\.three is a bit field"):
        dtype_of(path, "record")
    assert dtype_of(path, "whole").names == ("a", "b")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    w = Writer()
    w.integer("unsigned int", 4)
    path = w.write(tmp_path / "o")
    with pytest.raises(ProbeError, match="has no struct record; name the type"):
        dtype_of(path, "record")
    with pytest.raises(ProbeError, match="has no enum kind"):
        enum_of(path, "kind")
    with pytest.raises(ProbeError, match="No such file"):
        dtype_of(tmp_path / "none", "record")
    with pytest.raises(ProbeError, match=r"no section \.BTF"):
        dtype_of(w.write(tmp_path / "p", b".BTX"), "record")
    (tmp_path / "text").write_text("no ELF at all")
    with pytest.raises(ProbeError, match="not an ELF-64 file"):
        dtype_of(tmp_path / "text", "record")


def test_a_structure_that_holds_itself_is_refused(tmp_path: Path) -> None:
    w = Writer()
    w.struct("named", 4, ("again", 1, 0))
    w.struct("anonymous", 4, ("", 2, 0))
    path = w.write(tmp_path / "o")
    for name in ("named", "anonymous"):
        with pytest.raises(ProbeError, match="deep"):
            dtype_of(path, name)


@given(keep=st.integers(0, 400), at=st.integers(0, 500), byte=st.integers(0, 255))
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, keep: int, at: int, byte: int
) -> None:
    w = Writer()
    u32 = w.integer("unsigned int", 4)
    w.struct("record", 16, ("a", u32, 0), ("b", w.array(u32, 3), 32))
    folder = tmp_path_factory.mktemp("damaged")
    whole = bytearray(w.write(folder / "o").read_bytes())
    for number, data in enumerate((whole[:keep], whole[:at] + bytes([byte]) + whole[at + 1 :])):
        damaged = folder / f"damaged{number}"
        damaged.write_bytes(data)
        try:
            dtype_of(damaged, "record")
        except ProbeError as error:
            assert str(damaged) in error.what
