"""The enums that paths and recordings read are those of bpf/records.h, as the compiled probes have them."""

from __future__ import annotations

from enum import Enum, IntEnum

import pytest

from exporter.timeline import MessageKind, Reason, Waker
from exporter.trace_event import BLOCK_NAMES, TcpKind
from probes import btf
from probes.probe import OBJECTS

Operation = IntEnum("Operation", [name.upper() for name in BLOCK_NAMES], start=0)


@pytest.mark.parametrize(
    ("probe", "name", "prefix", "ours", "end"),
    [
        ("scheduler", "wait_reason", "WAIT_", Reason, {"MAX": len(Reason)}),
        ("scheduler", "waker", "WAKER_", Waker, {"MAX": len(Waker)}),
        ("scheduler", "message_kind", "MESSAGE_", MessageKind, {}),
        ("tcp", "tcp_event_kind", "TCP_", TcpKind, {}),
        ("block", "block_operation", "BLOCK_", Operation, {"MAX": len(Operation)}),
    ],
)
def test_the_enums_are_those_of_records_h(
    probe: str, name: str, prefix: str, ours: type[Enum], end: dict[str, int]
) -> None:
    in_c = {key.removeprefix(prefix): value for key, value in btf.enum_of(OBJECTS / f"{probe}.bpf.o", name).items()}
    assert in_c == {member.name: member.value for member in ours} | end
