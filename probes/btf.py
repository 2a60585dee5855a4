"""Turns the C types in a BPF object's BTF into numpy's: the C structure stays the only definition.

A type is in an object's BTF only when a variable or a map names it; clang drops the others. Formats: the kernel's
Documentation/bpf/btf.rst, and ELF-64.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from probes.errors import ProbeError

_ELF_HEADER: Final = struct.Struct("=16sHHIQQQIHHHHHH")
_SECTION_HEADER: Final = struct.Struct("=IIQQQQIIQQ")
_BTF_HEADER: Final = struct.Struct("=HBBIIIII")
_BTF_TYPE: Final = struct.Struct("=III")
_BTF_MAGIC: Final = 0xEB9F
_INT_SIGNED: Final = 1
_INT_BOOL: Final = 4
_MAX_DEPTH: Final = 32  # of typedefs, arrays and structures within one another


class _Kind(IntEnum):
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_TRANSPARENT: Final = frozenset({_Kind.TYPEDEF, _Kind.VOLATILE, _Kind.CONST, _Kind.RESTRICT, _Kind.TYPE_TAG})


@dataclass(frozen=True, slots=True)
class _Type:
    """One entry of the type section; `size_or_type` and `extra` mean what btf.rst says for the kind."""

    name: str
    kind: _Kind
    count: int
    flag: bool
    size_or_type: int
    extra: tuple[int, ...]


def _extra_words(kind: _Kind, count: int) -> int:
    """Return how many 32-bit words follow a type's first three."""
    match kind:
        case _Kind.INT | _Kind.VAR | _Kind.DECL_TAG:
            return 1
        case _Kind.ARRAY:
            return 3
        case _Kind.STRUCT | _Kind.UNION | _Kind.DATASEC | _Kind.ENUM64:
            return 3 * count
        case _Kind.ENUM | _Kind.FUNC_PROTO:
            return 2 * count
        case _:
            return 0


def _section(data: bytes, wanted: bytes) -> bytes:
    """Return an ELF-64 section's bytes. Raises ValueError, IndexError or struct.error for anything else."""
    if data[:4] != b"\x7fELF" or data[4] != 2:
        raise ValueError("not an ELF-64 file")
    header = _ELF_HEADER.unpack_from(data)
    offset, entry_bytes, count, names_index = header[6], header[11], header[12], header[13]
    sections = [_SECTION_HEADER.unpack_from(data, offset + entry_bytes * index) for index in range(count)]
    names_offset = sections[names_index][4]
    for section in sections:
        name_offset, position, size = names_offset + section[0], section[4], section[5]
        if data[name_offset : name_offset + len(wanted) + 1] == wanted + b"\0":
            return data[position : position + size]
    raise ValueError(f"no section {wanted.decode()}")


def _parse(btf: bytes) -> tuple[tuple[_Type, ...], bytes]:
    """Return the types of a .BTF section, 0 (void) included, and its strings. Raises ValueError, struct.error."""
    magic, _, _, header_bytes, types_offset, types_bytes, strings_offset, strings_bytes = _BTF_HEADER.unpack_from(btf)
    if magic != _BTF_MAGIC:
        raise ValueError("its BTF is of another byte order, or no BTF")
    strings = btf[header_bytes + strings_offset :][:strings_bytes]
    types = btf[header_bytes + types_offset :][:types_bytes]
    result = [_Type("void", _Kind.FWD, 0, False, 0, ())]
    position = 0
    while position < len(types):
        name_offset, info, size_or_type = _BTF_TYPE.unpack_from(types, position)
        position += _BTF_TYPE.size
        kind, count = _Kind(info >> 24 & 0x1F), info & 0xFFFF
        words = _extra_words(kind, count)
        extra = struct.unpack_from(f"={words}I", types, position)
        position += 4 * words
        result.append(_Type(_text(strings, name_offset), kind, count, bool(info >> 31), size_or_type, extra))
    return tuple(result), strings


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a ProbeError."""
    try:
        yield
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ProbeError(f"{path} has no usable BTF: {error}", "compile it for BPF, with -g") from error


class _Btf:
    """The types of one object file, with its string section for the names of members."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with _sound(path):
                self._types, self._strings = _parse(_section(path.read_bytes(), b".BTF"))
        except OSError as error:
            what = f"cannot read the BPF object {path}: {error.strerror}"
            raise ProbeError(what, "build the objects: make bpf") from error

    def find(self, kinds: frozenset[_Kind], name: str) -> _Type:
        for each in self._types:
            if each.kind in kinds and each.name == name:
                return each
        what = f"the BTF of {self._path} has no {min(kinds).name.lower()} {name}"
        raise ProbeError(what, "name the type in a variable or map of the object")

    def members(self, of: _Type) -> Iterator[tuple[str, int, int]]:
        """Yield name, type number and byte offset of each member. Raises ProbeError for bit fields."""
        for name_offset, number, offset in zip(of.extra[::3], of.extra[1::3], of.extra[2::3], strict=True):
            name = _text(self._strings, name_offset)
            bits, offset_bits = (offset >> 24, offset & 0xFFFFFF) if of.flag else (0, offset)
            if bits or offset_bits % 8:
                raise self._refused(f"{of.name}.{name} is a bit field")
            yield name, number, offset_bits // 8

    def dtype(self, number: int, depth: int) -> np.dtype[Any]:
        """Return the dtype of one field."""
        if depth > _MAX_DEPTH:
            raise self._refused(f"types nest more than {_MAX_DEPTH} deep")
        each = self._types[number]
        if each.kind in _TRANSPARENT:
            return self.dtype(each.size_or_type, depth + 1)
        match each.kind:
            case _Kind.INT:
                return self._integer(each)
            case _Kind.PTR:
                return np.dtype(np.uint64)
            case _Kind.FLOAT:
                return np.dtype(f"f{each.size_or_type}")
            case _Kind.ENUM | _Kind.ENUM64:
                return np.dtype(f"{'i' if each.flag else 'u'}{each.size_or_type}")
            case _Kind.ARRAY:
                return self._array(each, depth)
            case _Kind.STRUCT | _Kind.UNION:
                return self.structure(each, depth)
            case _:
                raise self._refused(f"{each.kind.name} {each.name} has no numpy type")

    def _integer(self, each: _Type) -> np.dtype[Any]:
        encoding = each.extra[0] >> 24 & 0x0F
        if encoding & _INT_BOOL:
            return np.dtype(np.bool_)
        if each.size_or_type not in {1, 2, 4, 8}:
            raise self._refused(f"an integer of {each.size_or_type} bytes has no numpy type")
        return np.dtype(f"{'i' if encoding & _INT_SIGNED else 'u'}{each.size_or_type}")

    def _array(self, each: _Type, depth: int) -> np.dtype[Any]:
        number, _, count = each.extra
        if self._types[number].kind == _Kind.INT and self._types[number].name == "char":
            return np.dtype(f"S{count}")
        return np.dtype((self.dtype(number, depth + 1), (count,)))

    def structure(self, each: _Type, depth: int = 0) -> np.dtype[Any]:
        fields = list(self._fields(each, 0, depth))
        return np.dtype(
            {
                "names": [name for name, _, _ in fields],
                "formats": [kind for _, kind, _ in fields],
                "offsets": [offset for _, _, offset in fields],
                "itemsize": each.size_or_type,
            }
        )

    def _fields(self, each: _Type, start: int, depth: int) -> Iterator[tuple[str, np.dtype[Any], int]]:
        """Yield name, dtype and byte offset; members of an anonymous structure or union count as the outer's own."""
        if depth > _MAX_DEPTH:
            raise self._refused(f"structures nest more than {_MAX_DEPTH} deep")
        for name, number, offset in self.members(each):
            if name:
                yield name, self.dtype(number, depth + 1), start + offset
            else:
                yield from self._fields(self._types[number], start + offset, depth + 1)

    def enumerators(self, each: _Type) -> dict[str, int]:
        if each.kind is _Kind.ENUM:
            bits, names, values = 32, each.extra[::2], list(each.extra[1::2])
        else:
            bits, names = 64, each.extra[::3]
            values = [low | high << 32 for low, high in zip(each.extra[1::3], each.extra[2::3], strict=True)]
        if each.flag:
            values = [value - (1 << bits) if value >> (bits - 1) else value for value in values]
        return {_text(self._strings, name): value for name, value in zip(names, values, strict=True)}

    def _refused(self, why: str) -> ProbeError:
        return ProbeError(f"{self._path}: {why}", "keep records to integers, floats, arrays and structures of them")


@functools.lru_cache(maxsize=16)
def _btf_of(path: Path) -> _Btf:
    return _Btf(path)


def dtype_of(object_path: Path, struct_name: str) -> np.dtype[Any]:
    """Return the structured dtype of `struct struct_name`, padding and size as the compiler laid it out.

    `char[n]` becomes bytes up to the trailing zeros, `u8[n]` a sub-array, an enum an unsigned (or signed) integer, a
    pointer u64; anonymous members are flattened, a union's members overlap. The file is read once per process. Raises
    ProbeError for a missing file or type, and for bit fields.
    """
    btf = _btf_of(object_path)
    with _sound(object_path):
        return btf.structure(btf.find(frozenset({_Kind.STRUCT}), struct_name))


def enum_of(object_path: Path, enum_name: str) -> dict[str, int]:
    """Return the enumerators of `enum enum_name` in the order of the C source. Raises ProbeError."""
    btf = _btf_of(object_path)
    with _sound(object_path):
        return btf.enumerators(btf.find(frozenset({_Kind.ENUM, _Kind.ENUM64}), enum_name))
