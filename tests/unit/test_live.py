"""The live page's data: what stands in it is what the SLIs, the paths and the attacher say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.critical_path import Cause
from exporter.history import History
from exporter.live import SHOWN_SLOW, Live, Parts
from exporter.quantiles import SLOT_NS
from exporter.slis import CausePhase, Slis
from exporter.status import AgentStatus, Loss, ProbeLosses, ProbeStatus, ProcessUsage, ReaderStatus, TargetStatus
from exporter.why import Explained
from tests.unit.finished import REQUEST as FINISHED
from tests.unit.finished import later

MS = 1_000_000
NOW_NS = 1000 * SLOT_NS
WALL_NS = 1_795_000_000 * 10**9
REQUEST = replace(
    later(FINISHED, NOW_NS),
    service="stage",
    model="alto",
    first_token_ns=NOW_NS + 30 * MS,
    last_token_ns=NOW_NS + 60 * MS,
    finished_ns=NOW_NS + 61 * MS,
    frames=7,
    longest_gap_ns=5 * MS,
)
STATUS = AgentStatus(
    NOW_NS,
    "ring",
    (
        ProbeStatus("requests", True, "", 7, 0, 0, (Loss("unreadable", 3), Loss("calls_full", 0))),
        ProbeStatus("tcp", False, "no BTF", 0, None, None, ()),
    ),
    (TargetStatus("stage", 3, 1),),
    2,
    (ProcessUsage("attacher", 5, 1.0, 30 << 20, 10 << 20), ProcessUsage("reader", 6, 2.0, 90 << 20, 80 << 20)),
)


def explained(number: int, ttft_ms: int) -> Explained:
    request = replace(REQUEST, number=number, first_token_ns=NOW_NS + ttft_ms * MS)
    return Explained(request, (), {Cause.lock: ttft_ms * MS}, {}, True, {})


class Told:
    """The page's data with everything that they are made from."""

    def __init__(self) -> None:
        self.now_ns = NOW_NS
        self.status: AgentStatus | None = STATUS
        self.recent: list[Explained] = []
        self.slis = Slis(clock=lambda: self.now_ns)
        self.history = History(self.slis)
        self.live = Live(
            Parts(
                self.slis,
                self.history,
                lambda: self.status,
                lambda: ReaderStatus(11, (ProbeLosses("requests", (Loss("reader_restart", 5),)),)),
                "1.2",
                lambda: self.recent,
                objectives=lambda: [{"name": "first-token"}],
                gpus=lambda: [{"index": 0}],
                engines=lambda: [{"engine": "vllm"}],
                clock=lambda: self.now_ns,
                wall_clock=lambda: WALL_NS + self.now_ns - NOW_NS,
            )
        )


@pytest.fixture
def told() -> Told:
    return Told()


def test_each_model_has_its_row_and_its_causes(told: Told) -> None:
    series = told.slis.series("stage", "alto", "chat_completions", (), True)
    series.first_token(30 * MS, told.now_ns)
    series.explain(CausePhase.TTFT, {Cause.lock: 20 * MS, Cause.on_cpu: 10 * MS})
    (row,) = told.live.now()["models"]
    assert row["ttft_p50_seconds"] == pytest.approx(0.03, rel=0.01)
    assert row["causes"] == pytest.approx({"lock": 0.02, "on_cpu": 0.01})
    assert row["why"] == {"cause": "lock", "share": pytest.approx(2 / 3)}


def test_the_slowest_come_first_without_their_steps(told: Told) -> None:
    told.recent = [explained(number, 7 * number) for number in range(1, 24)]
    slow = told.live.now()["slow"]
    assert [each["number"] for each in slow] == list(range(23, 23 - SHOWN_SLOW, -1))
    assert slow[0]["time_to_first_token_seconds"] == pytest.approx(0.161)
    assert all("steps" not in each for each in slow)


def test_one_request_has_its_path(told: Told) -> None:
    told.recent = [explained(7, 30)]
    found = told.live.why(7)
    assert found is not None
    assert (found["number"], found["steps"]) == (7, [])
    assert told.live.why(8) is None


def test_the_agent_tells_of_itself(told: Told) -> None:
    now = told.live.now()
    assert (now["ready"], now["state"]) == (False, "Not ready: not attached: tcp: no BTF")
    assert now["targets"] == [{"service": "stage", "processes": 3, "ports": 1}]
    agent = now["agent"]
    assert agent["probes"] == [
        {"name": "requests", "up": True, "reason": "", "lost": 8},
        {"name": "tcp", "up": False, "reason": "no BTF", "lost": 0},
    ]
    assert (agent["memory_bytes"], agent["connections"], agent["reader_restarts"]) == (90 << 20, 11, 2)
    assert agent["cpu_ratio"] is None  # one measurement is no rate
    later = replace(STATUS.processes[1], cpu_seconds=2.5)
    told.status = replace(STATUS, at_ns=NOW_NS + 5 * 10**9, processes=(STATUS.processes[0], later))
    assert told.live.now()["agent"]["cpu_ratio"] == pytest.approx(0.1)


def test_before_the_first_report_nothing_is_made_up(told: Told) -> None:
    told.status = None
    now = told.live.now()
    assert (now["ready"], now["targets"], now["agent"]["probes"], now["agent"]["memory_bytes"]) == (False, [], [], None)


def test_rows_of_others_are_passed_on(told: Told) -> None:
    now = told.live.now()
    assert now["objectives"] == [{"name": "first-token"}]
    assert (now["gpus"], now["engines"]) == ([{"index": 0}], [{"engine": "vllm"}])
    assert now["explains"]


def test_the_past_has_a_time_for_each_step(told: Told) -> None:
    told.history.tick(told.now_ns)
    told.slis.series("stage", "alto", "chat_completions", (), True).frame()
    told.now_ns += SLOT_NS
    told.history.tick(told.now_ns)
    past = told.live.past()
    assert past["times"][-1] == pytest.approx(WALL_NS / 1e9)
    (model,) = past["models"]
    assert (model["service"], model["model"], model["api"]) == ("stage", "alto", "chat_completions")
    assert model["frames"][-1] == 1
    assert len(model["ttft_p50"]) == len(model["heat"]) == len(past["times"])
