"""What the slots of probe points become: totals by name, news for the KV cache, families."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from exporter.config import ProbePoint
from exporter.families import Kind, Scrape
from exporter.labels import OTHER, UNKNOWN
from exporter.probe_points import PointDelta, PointsView, PointTotal, probe_point_families
from exporter.status import ReaderStatus
from probes.points_table import PointSlot

FUNCTION = ProbePoint("function", "libllm_kv.so", "llm_kv_lookup", None, 1, 2, 3)
TWIN = ProbePoint("twin", "libllm_kv.so", None, "roleplay:kv_lookup", 1, 2, 3)


class Table:
    """Slots that a test writes."""

    def __init__(self, *slots: PointSlot) -> None:
        self.slots = list(slots)

    def read(self) -> list[PointSlot]:
        return list(self.slots)


def slot(service: int, point: int, model: bytes, calls: int, hits: int, queries: int) -> PointSlot:
    return PointSlot(service, point, model, calls, hits, queries)


def view(table: Table, *, models: int = 64, resumes: bool = False, points: Sequence[ProbePoint] = (FUNCTION, TWIN)):
    return PointsView(table, points, ["chat", "other"], models_per_service=models, resumes=resumes)


def test_totals_have_the_names_of_services_models_and_points() -> None:
    subject = view(Table(slot(0, 0, b"alto", 7, 11, 101), slot(1, 1, b"bass", 1, 0, 13)))
    assert subject.totals() == [
        PointTotal("chat", "alto", "function", 7, 11, 101),
        PointTotal("other", "bass", "twin", 1, 0, 13),
    ]


def test_names_are_safe_and_those_that_look_the_same_add_up() -> None:
    subject = view(Table(slot(0, 0, b"a\xff", 1, 2, 3), slot(0, 0, b"a\xfe", 10, 20, 30), slot(0, 0, b"", 1, 0, 5)))
    assert subject.totals() == [
        PointTotal("chat", "a\ufffd", "function", 11, 22, 33),
        PointTotal("chat", UNKNOWN, "function", 1, 0, 5),
    ]


def test_models_beyond_the_limit_are_one_and_none_changes_its_name() -> None:
    table = Table(*(slot(0, 0, b"m%d" % number, 1, 0, 10) for number in range(5)), slot(1, 0, b"z", 1, 0, 10))
    subject = view(table, models=3)
    before = subject.totals()
    assert [(total.model, total.looked_up_tokens) for total in before] == [
        *(("m0", 10), ("m1", 10), ("m2", 10)),
        *((OTHER, 20), ("z", 10)),
    ]
    # A slot before the others that counted nothing until now.
    table.slots.insert(0, slot(0, 0, b"late", 1, 0, 7))
    assert {total.model: total.looked_up_tokens for total in subject.totals()} == {
        **{"m0": 10, "m1": 10, "m2": 10, "z": 10},
        OTHER: 27,
    }


def test_news_is_what_came_since_the_last_look_from_one_point_of_a_service() -> None:
    table = Table(slot(0, 1, b"alto", 2, 5, 20), slot(0, 0, b"alto", 2, 5, 20), slot(1, 1, b"alto", 1, 3, 4))
    subject = view(table)
    assert subject.deltas() == [PointDelta("chat", "alto", 20, 5), PointDelta("other", "alto", 4, 3)]
    assert subject.deltas() == []
    table.slots[0] = slot(0, 1, b"alto", 9, 99, 999)
    assert subject.deltas() == []
    table.slots[1] = slot(0, 0, b"alto", 3, 12, 31)
    assert subject.deltas() == [PointDelta("chat", "alto", 11, 7)]


def test_news_of_a_point_without_names_is_of_no_model() -> None:
    assert view(Table(slot(0, 0, b"", 1, 5, 7))).deltas() == [PointDelta("chat", None, 7, 5)]


def test_a_point_that_never_counts_is_no_source_and_the_choice_stays() -> None:
    table = Table(slot(0, 1, b"alto", 1, 0, 7))
    subject = view(table)
    assert subject.deltas() == [PointDelta("chat", "alto", 7, 0)]
    table.slots.append(slot(0, 0, b"alto", 1, 0, 7))
    assert subject.deltas() == []


def test_a_reader_that_resumes_has_no_news_of_what_was_before() -> None:
    table = Table(slot(0, 0, b"alto", 1, 3, 7))
    subject = view(table, resumes=True)
    assert subject.deltas() == []
    table.slots[0] = slot(0, 0, b"alto", 2, 4, 12)
    assert subject.deltas() == [PointDelta("chat", "alto", 5, 1)]
    assert subject.totals() == [PointTotal("chat", "alto", "function", 2, 4, 12)]


NAMES = st.binary(max_size=127)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), NAMES, st.integers(1, 2**40)), max_size=30))
def test_nothing_is_lost_or_told_twice(rows: list[tuple[int, int, bytes, int]]) -> None:
    table = Table()
    subject = view(table, models=5)
    news: list[PointDelta] = []
    for row, (service, point, model, tokens) in enumerate(rows, 1):
        table.slots.append(slot(service, point, model, 1, tokens // 2, tokens))
        totals = subject.totals()
        assert sum(total.looked_up_tokens for total in totals) == sum(tokens for *_, tokens in rows[:row])
        assert len({(total.service, total.model, total.point) for total in totals}) == len(totals)
        news += subject.deltas()
    for service in ("chat", "other"):
        by_point: dict[str, int] = {}
        for total in subject.totals():
            if total.service == service:
                by_point[total.point] = by_point.get(total.point, 0) + total.looked_up_tokens
        told = sum(each.queries for each in news if each.service == service)
        assert told in by_point.values() or not by_point


def test_a_service_that_is_named_later_is_told_then() -> None:
    services = ["chat", ""]
    subject = PointsView(Table(slot(1, 0, b"bass", 1, 3, 7), slot(2, 0, b"alto", 1, 3, 7)), [FUNCTION], services)
    assert subject.totals() == []
    assert subject.deltas() == []
    services.append("late")
    assert subject.totals() == [PointTotal("late", "alto", "function", 1, 3, 7)]
    assert subject.deltas() == [PointDelta("late", "alto", 7, 3)]


def test_families_tell_the_totals_of_a_scrape() -> None:
    totals = view(Table(slot(0, 0, b"alto", 7, 11, 101), slot(1, 1, b"bass", 1, 0, 13))).totals()
    scrape = Scrape(0, 0.0, (), None, ReaderStatus(0), points=totals)
    assert [list(family.points(scrape)) for family in probe_point_families()] == [
        [(("chat", "alto", "function"), 7), (("other", "bass", "twin"), 1)],
        [(("chat", "alto", "function"), 101), (("other", "bass", "twin"), 13)],
        [(("chat", "alto", "function"), 11), (("other", "bass", "twin"), 0)],
    ]


def test_families_are_counters_by_service_model_and_point() -> None:
    families = probe_point_families()
    assert [family.spec.text_name() for family in families] == [
        "llm_probe_point_calls_total",
        "llm_probe_point_looked_up_tokens_total",
        "llm_probe_point_hit_tokens_total",
    ]
    assert {family.spec.kind for family in families} == {Kind.COUNTER}
    assert {family.spec.labels for family in families} == {("service_name", "model_name", "probe_point")}
