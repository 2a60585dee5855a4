"""Top-level JSON scanning: the same answers as json.loads, in any pieces, however deep or long."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire.json_scan import TopLevelScanner

WANTED = frozenset(("model", "stream", "usage"))
BODY = (
    b' {"messages": [{"role": "user", "content": "say \\"model\\": \\"no\\" \\\\"}, [[{"model": "deep"}]], "]}", {}],'
    b'\n "m\\u006fdel" : "a\\"b\\\\", "modelx":1,"mode":2,"":3,"usage" :{"a":[1,{"b":"}]"}], "stream":false},'
    b'\t"temperature":-1.5e3 , "stream":true}\r\n'
)
BODY_VALUES = {
    "model": b'"a\\"b\\\\"',
    "usage": b'{"a":[1,{"b":"}]"}], "stream":false}',
    "stream": b"true",
}


def scanned(pieces: Iterable[bytes], max_value: int = 4096) -> TopLevelScanner:
    scanner = TopLevelScanner(WANTED, max_value, "messages")
    for piece in pieces:
        scanner.feed(piece)
    return scanner


def state(scanner: TopLevelScanner) -> tuple[dict[str, bytes], frozenset[str], bool, bool]:
    return scanner.values, scanner.oversize, scanner.broken, scanner.complete


def all_of(scanner: TopLevelScanner) -> tuple[object, ...]:
    return *state(scanner), scanner.count if scanner.complete else None


def test_finds_only_the_top_level() -> None:
    assert state(scanned([BODY])) == (BODY_VALUES, frozenset(), False, True)


def test_every_split_in_two_and_byte_by_byte() -> None:
    whole = state(scanned([BODY]))
    assert state(scanned(bytes([byte]) for byte in BODY)) == whole
    for at in range(len(BODY) + 1):
        assert state(scanned([BODY[:at], BODY[at:]])) == whole


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("piece", [61, 4096, 2**20])
def test_a_long_prompt_before_or_after(place: str, piece: int) -> None:
    messages = [{"role": "user", "content": 'He said "yes", \\ and\n\u4f60\u597d {[' * 9001}]
    body = {"model": "m", "messages": messages} if place == "first" else {"messages": messages, "model": "m"}
    data = json.dumps(body).encode()
    scanner = scanned(data[at : at + piece] for at in range(0, len(data), piece))
    assert state(scanner) == ({"model": b'"m"'}, frozenset(), False, True)


def test_the_last_of_equal_keys_counts() -> None:
    text = b'{"model":"a","model":{"b":1},"\\u006dodel":"c"}'
    assert scanned([text]).values == {"model": b'"c"'}
    assert json.loads(text) == {"model": "c"}
    assert scanned([b'{"model":"a","model":' + b" " * 99 + b'"' + b"x" * 5000 + b'"}']).oversize == {"model"}
    assert scanned([b'{"model":"' + b"x" * 5000 + b'","model":"a"}']).values == {"model": b'"a"'}
    assert scanned([b'{"model":"a","model":']).values == {}


@pytest.mark.parametrize("value", [b'"' + b"x" * 39 + b'"', b"[" + b"1," * 19 + b"1]", b"7" * 41])
@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_values_up_to_the_limit(value: bytes, piece: int) -> None:
    text = b'{"model":' + value + b',"stream":true}'
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    assert scanned(pieces, len(value)).values == {"model": value, "stream": b"true"}
    short = scanned(pieces, len(value) - 1)
    assert (short.values, short.oversize) == ({"stream": b"true"}, frozenset({"model"}))


@pytest.mark.parametrize(
    "text",
    [
        b"[1]",
        b'"model"',
        b"x",
        b"{,}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a" 1}',
        b'{"a":1}}',
        b"{}x",
        b"{a:1}",
        b'{"a":1\\}',
        b'{\\"a":1}',
        b'{"a":"b""c"}',
        b'{"a"::1}',
        b'{"a":[]]}',
        b"\0",
        b'{"a":1,,"b":1}',
    ],
)
def test_what_is_no_object_is_broken(text: bytes) -> None:
    assert scanned([text]).broken
    assert state(scanned(bytes([byte]) for byte in text)) == state(scanned([text]))
    with pytest.raises(json.JSONDecodeError):
        if not isinstance(json.loads(text), dict):
            raise json.JSONDecodeError("no object", "", 0)


@pytest.mark.parametrize(
    "text", [b"", b" ", b"{", b'{"model', b'{"model":"a"', b'{"model":"a","messages":[', b'{"a":"\\']
)
def test_what_is_cut_off_is_neither_broken_nor_complete(text: bytes) -> None:
    scanner = scanned([text])
    assert not scanner.broken
    assert not scanner.complete


def test_a_byte_order_mark_may_come_first() -> None:
    assert scanned([b"\xef\xbb", b'\xbf{"model":"a"}']).values == {"model": b'"a"'}


def test_a_gap_ends_it_but_not_what_was_found() -> None:
    scanner = scanned([b'{"model":"a","messages":"'])
    scanner.gap()
    scanner.feed(b'","stream":true}')
    assert state(scanner) == ({"model": b'"a"'}, frozenset(), True, False)
    done = scanned([b"{}"])
    done.gap()
    assert done.complete


TEXT = st.text(
    st.one_of(st.sampled_from('"\\{}[]:, \n\0\u2028\U0001f600modelstreamusage'), st.characters(codec="utf-8"))
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=41,
)
OBJECTS = st.dictionaries(st.sampled_from(["model", "stream", "usage", "messages", "a"]) | TEXT, VALUES, max_size=11)


@settings(deadline=None)  # other work shares the machine
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.lists(st.integers(1, 61), min_size=1, max_size=7))
def test_the_same_answers_as_json_loads(
    obj: dict[str, object], ascii_only: bool, indent: int | None, sizes: list[int]
) -> None:
    data = json.dumps(obj, ensure_ascii=ascii_only, indent=indent).encode()
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    scanner = scanned(pieces, 2**20)
    assert scanner.complete
    assert {name: json.loads(value) for name, value in scanner.values.items()} == {
        name: json.loads(json.dumps(value)) for name, value in obj.items() if name in WANTED
    }
    assert state(scanned([data], 2**20)) == state(scanner)


SCRAPS = st.sampled_from(
    [
        *(bytes([byte]) for byte in b'"\\{}[]:,1 \n'),
        *(b'"model"', b'"stream":true', b"[[", b"]]", b'"x"', BODY, b'{"messages":[', b"]}"),
        *(b'{"role":"user"}', b'"role"', b'"user"', b'"role":"user"', b'"role":"user",'),
    ]
)


@settings(deadline=None)  # other work shares the machine
@given(st.lists(SCRAPS | st.binary(max_size=5), max_size=67))
def test_no_bytes_raise_and_splits_mean_nothing(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    whole = all_of(scanned([data]))
    assert all_of(scanned(pieces)) == whole
    assert all_of(scanned(bytes([byte]) for byte in data)) == whole
    try:
        value = json.loads(data)
    except ValueError:
        return
    assert whole[3] == isinstance(value, dict)


@pytest.mark.parametrize(
    ("start", "noise"),
    [
        (b"", b" " * 65_536),
        (b'{"model":"', b"x" * 65_536),
        (b'{"model":', b"9" * 65_536),
        (b'{"usage":', b"[" * 65_536),
        (b'{"usage":', b'{"a":' * 13_007),
        (b'{"', b"k" * 65_536),
        (b'{"', b"\\u006d" * 10_007),
        (b'{"a":1', b',"a":1' * 10_007),
        (b'{"a":1', b',"model":[[]]' * 5003),
        (b'{"a":[', b"[[]],{}," * 8191),
        (b'{"a":"', b"\\" * 65_537),
        (b'{"messages":[', b'{"role":"user"},' * 5003),
        (b'{"messages":[{"role":"', b"user" * 10_007),
        (b'{"messages":[{', b'"role":"user",' * 5003),
        (b'{"messages":[{"a":', b"[" * 65_536),
        (b'{"messages":[{"a":', b'"x":[[]],' * 8191),
        (b'{"messages":[{"', b"k" * 65_536),
        (b'{"messages":[7', b",[[]],{}" * 8191),
    ],
)
def test_endless_streams_are_held_in_bounds(start: bytes, noise: bytes) -> None:
    scanner = scanned([start])
    scanner.feed(noise)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(7):
        scanner.feed(noise)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 8192


def test_nested_200_000_deep() -> None:
    data = (
        b'{"a":'
        + b"[" * 200_000
        + b"]" * 200_000
        + b',"b":'
        + b'{"c":' * 200_000
        + b"1"
        + b"}" * 200_000
        + b',"model":"m"}'
    )
    assert state(scanned(data[at : at + 4096] for at in range(0, len(data), 4096))) == (
        {"model": b'"m"'},
        frozenset(),
        False,
        True,
    )


def test_a_message_of_many_roles_is_counted_once_and_soon() -> None:
    """Were there two ways to match each of them, this took 10 s."""
    began = time.process_time()
    for roles in (1, 31, 63, 64, 997):
        message = b"{" + b",".join([b'"role":"user"'] * roles)
        scanner = scanned([b'{"messages":[' + message])
        assert not scanner.complete
        scanner.feed(b'},{"role" : "user","a":[[{"role":"user"}]]}]}')
        assert (scanner.count, scanner.complete) == (2, True)
    assert time.process_time() - began < 1


def test_messages_nested_200_000_deep() -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    data = b'{"messages":[{"role":"user","content":' + deep + b'},{"role":"user"}],"model":"m"}'
    scanner = scanned(data[at : at + 4096] for at in range(0, len(data), 4096))
    assert (scanner.count, scanner.values, scanner.complete) == (2, {"model": b'"m"'}, True)
