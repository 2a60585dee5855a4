"""Label values: whatever a stranger sends can be encoded, printed and bounded."""

from hypothesis import given
from hypothesis import strategies as st

from exporter.labels import MAX_LABEL_CHARS, UNKNOWN, safe


@given(st.text(st.characters(exclude_categories=()), max_size=700))
def test_any_text_becomes_a_value_that_encodes_and_prints(text: str) -> None:
    value = safe(text)
    assert value.encode()
    assert value.isprintable()
    assert len(value) <= MAX_LABEL_CHARS
    assert safe(value) == value


def test_names_that_are_fine_stay_as_they_are() -> None:
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "модель 7", "a" * MAX_LABEL_CHARS, '\\quoted"'):
        assert safe(name) == name


def test_what_cannot_be_printed_is_replaced_one_for_one() -> None:
    assert safe("a\ud800b\nc\x1b[31m\u202e") == "a\ufffdb\ufffdc\ufffd[31m\ufffd"


def test_a_long_name_is_cut_and_shows_it() -> None:
    assert safe("a" * 257) == "a" * 255 + "…"


def test_an_empty_name_is_unknown() -> None:
    assert safe("") == UNKNOWN
