"""What pages of engines are decoded to: those of their documentation, and those that are broken or hostile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.roleplay.metrics import ServiceMetrics
from examples.roleplay.protocol import Finished, Gauges, Step
from examples.roleplay.shapes import SHAPES
from probes.engine_page import (
    ADAPTERS,
    LINE_LIMIT,
    MODELS_LIMIT,
    SERIES_LIMIT,
    WANTED_LIMIT,
    EngineModel,
    Failure,
    Figure,
    PageReader,
    Source,
)

PAGES = Path(__file__).parents[1] / "fixtures" / "engines"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"

EXPECTED = {
    "vllm": (
        EngineModel("vllm", "Qwen/Qwen3-0.6B", *(0.0,) * 11),
        EngineModel(
            "vllm",
            LLAMA,
            running=18,
            waiting=5,
            kv_usage_ratio=0.5,
            prefix_queries=300_006,
            prefix_hits=200_022,
            preemptions=13,
            requests=498,
            ttft_sum_seconds=62.25,
            ttft_count=498,
            prompt_tokens=300_036,
            generation_tokens=100_022,
        ),
    ),
    "vllm_v0": (
        EngineModel(
            "vllm",
            "facebook/opt-125m",
            running=3,
            waiting=1,
            kv_usage_ratio=0.125,
            preemptions=2,
            requests=23,
            ttft_sum_seconds=1.5,
            ttft_count=23,
            prompt_tokens=4003,
            generation_tokens=997,
        ),
    ),
    "sglang": (
        EngineModel(
            "sglang",
            LLAMA,
            running=12,
            waiting=13,
            kv_usage_ratio=0.375,
            prefix_queries=8_128_903,
            prefix_hits=103_012,
            preemptions=3,
            requests=11_009,
            ttft_sum_seconds=2351.5,
            ttft_count=11_008,
            prompt_tokens=8_128_903,
            generation_tokens=7_557_573,
        ),
    ),
    "tensorrt_llm": (
        EngineModel(
            "tensorrt_llm",
            "nemotron-nano-3",
            running=5,
            waiting=0,
            kv_usage_ratio=0.625,
            prefix_queries=30_011,
            prefix_hits=12_007,
            requests=227,
            ttft_sum_seconds=27.25,
            ttft_count=223,
            prompt_tokens=30_011,
            generation_tokens=20_011,
        ),
    ),
    "triton": (
        EngineModel("triton", "preprocessing", requests=503),
        EngineModel(
            "triton",
            "tensorrt_llm",
            running=7,
            waiting=2,
            kv_usage_ratio=0.4875,
            requests=509,
            ttft_sum_seconds=62.375,
            ttft_count=499,
        ),
    ),
    "tgi": (
        EngineModel("tgi", None, running=5, waiting=3, requests=302, prompt_tokens=71_993, generation_tokens=27_011),
    ),
    "llama_cpp": (
        EngineModel("llama_cpp", None, running=2, waiting=1, prompt_tokens=1_234_570, generation_tokens=86_243),
    ),
}


def read(page: bytes, piece: int = 1 << 16) -> tuple[EngineModel, ...] | Failure:
    reader = PageReader()
    for start in range(0, len(page), piece):
        failure = reader.feed(page[start : start + piece])
        if failure is not None:
            return failure
    return reader.finish()


def told(page: str) -> EngineModel:
    models = read(page.encode())
    assert isinstance(models, tuple)
    (model,) = models
    return model


def bad_samples(page: bytes) -> int:
    reader = PageReader()
    assert reader.feed(page) is None
    return reader.bad_samples


def test_every_page_is_expected_and_says_where_it_is_from() -> None:
    assert {page.stem for page in PAGES.iterdir()} == set(EXPECTED)
    assert all(page.read_text().startswith("# Written from ") for page in PAGES.iterdir())
    assert {model.engine for models in EXPECTED.values() for model in models} == {each.engine for each in ADAPTERS}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("piece", [1 << 16, 997, 1])
def test_page_decodes_to_what_it_says(name: str, piece: int) -> None:
    page = (PAGES / f"{name}.txt").read_bytes()
    assert read(page, piece) == EXPECTED[name]
    assert bad_samples(page) == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_underscores_and_windows_line_ends_are_the_same(name: str) -> None:
    page = (PAGES / f"{name}.txt").read_bytes()
    for colon in (b"vllm", b"sglang", b"llamacpp"):
        page = page.replace(colon + b":", colon + b"_")
    assert read(page) == EXPECTED[name]
    assert read(page.replace(b"\n", b"\r\n")) == EXPECTED[name]


def test_counters_without_total_are_the_same() -> None:
    page = (PAGES / "vllm.txt").read_bytes()
    for name in (b"request_success", b"num_preemptions", b"prompt_tokens", b"generation_tokens"):
        page = page.replace(name + b"_total", name)
    assert read(page) == EXPECTED["vllm"]


def test_both_spellings_on_one_page_count_once() -> None:
    page = (PAGES / "vllm.txt").read_text()
    assert read((page + page.replace("vllm:", "vllm_")).encode()) == EXPECTED["vllm"]


def test_openmetrics_is_read_past_its_exemplars() -> None:
    page = 'vllm:request_success_total{model_name="m"} 7.0 # {trace_id="} # {"} 11.0 1.7e9\n# EOF\n'
    assert told(page).requests == 7
    assert told('vllm:num_requests_running{model_name="m"} 5 1763500000000\n').running == 5


def test_two_engines_of_one_page_are_both_told() -> None:
    page = b'nv_inference_request_success{model="m",version="1"} 3\nvllm:num_requests_running{model="m"} 2\n'
    assert read(page) == (EngineModel("vllm", "m", running=2), EngineModel("triton", "m", requests=3))


def test_pending_requests_wait_where_the_backend_tells_nothing_else() -> None:
    assert told('nv_inference_pending_request_count{model="m",version="1"} 5\n').waiting == 5


@pytest.mark.parametrize(
    "value", ["NaN", "+Inf", "-Inf", "-3", "1e400", "9007199254740994", "9" * 3999, "x", "", "1_0"]
)
def test_impossible_value_makes_its_figure_absent(value: str) -> None:
    page = (
        'vllm:prompt_tokens_total{model_name="m",engine="0"} 3\n'
        f'vllm:prompt_tokens_total{{model_name="m",engine="1"}} {value}\n'
        'vllm:generation_tokens_total{model_name="m"} 5\n'
    )
    assert told(page) == EngineModel("vllm", "m", generation_tokens=5)
    assert bad_samples(page.encode()) == 1


@pytest.mark.parametrize("value", ["1.0001", "97", "-0.5", "NaN"])
def test_ratio_is_between_zero_and_one(value: str) -> None:
    page = f'vllm:kv_cache_usage_perc{{model_name="m"}} {value}\nvllm:num_requests_running{{model_name="m"}} 1\n'
    assert told(page) == EngineModel("vllm", "m", running=1)


def test_ratio_of_another_kind_of_sample_is_no_matter() -> None:
    page = (PAGES / "triton.txt").read_bytes()
    assert bad_samples(page) == 0
    assert told(
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="m"} 1.5\n'
        'nv_inference_request_success{model="m"} 3\n'
    ) == EngineModel("triton", "m", requests=3)


def test_series_that_comes_twice_is_not_added() -> None:
    page = 'vllm:prompt_tokens_total{model_name="m"} 3\n' * 2 + 'vllm:num_requests_running{model_name="m"} 1\n'
    assert told(page) == EngineModel("vllm", "m", running=1)
    assert bad_samples(page.encode()) == 1


def test_value_of_one_model_does_not_hide_the_other() -> None:
    page = b'vllm:prompt_tokens_total{model_name="a"} NaN\nvllm:prompt_tokens_total{model_name="b"} 3\n'
    assert read(page) == (EngineModel("vllm", "a"), EngineModel("vllm", "b", prompt_tokens=3))


def test_long_label_is_a_bad_sample_and_the_rest_is_read() -> None:
    page = (
        b'vllm:prompt_tokens_total{model_name="' + b"m" * 200_000 + b'"} 3\n'
        b'vllm:num_requests_running{model_name="m"} 1\n'
    )
    assert read(page) == (EngineModel("vllm", "m", running=1),)
    assert bad_samples(page) == 1
    assert len(page) > 2 * LINE_LIMIT


def test_label_keeps_its_escapes_and_foreign_letters() -> None:
    assert told('vllm:num_requests_running{model_name="a\\"b\\\\ünï\\n}"} 1\n').model == 'a"b\\ünï\n}'
    page = b'vllm:num_requests_running{model_name="\xff\xfe"} 1\nvllm:num_requests_waiting{model_name="m"} 1\n'
    assert read(page) == (EngineModel("vllm", "m", waiting=1),)


def test_half_a_line_at_the_end_spoils_the_page() -> None:
    page = (PAGES / "vllm.txt").read_bytes()
    assert read(page[:-1]) is Failure.TRUNCATED
    assert read(page[: len(page) // 2]) is Failure.TRUNCATED


@pytest.mark.parametrize(
    "page",
    [
        b'{"object": "list"}',
        b'{"object":\n"list"}\n',
        b"<!doctype html>\n<p>vllm:num_requests_running 1\n",
        b"[]\n",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\n\x00\x01",
        b"not found\n",
        b"\x00" * 100_000,
        b"   \n\n  404 page not found\n",
    ],
)
def test_something_else_is_not_metrics(page: bytes) -> None:
    assert read(page) is Failure.NOT_METRICS
    assert read(page, 1) is Failure.NOT_METRICS


@pytest.mark.parametrize("page", [b"", b"\n", b"# nothing yet\n", b"go_goroutines 7\n", b"vllm:other 1\n"])
def test_metrics_of_nobody_known(page: bytes) -> None:
    assert read(page) is Failure.UNKNOWN_ENGINE


def test_too_many_series_and_models_are_refused() -> None:
    line = 'vllm:prompt_tokens_total{{model_name="m",engine="{}"}} 1\n'
    assert told("".join(map(line.format, range(SERIES_LIMIT)))).prompt_tokens == SERIES_LIMIT
    assert read("".join(map(line.format, range(SERIES_LIMIT + 1))).encode()) is Failure.TOO_MANY_SERIES
    line = 'vllm:prompt_tokens_total{{model_name="{}"}} 1\n'
    models = read("".join(map(line.format, range(MODELS_LIMIT))).encode())
    assert isinstance(models, tuple)
    assert len(models) == MODELS_LIMIT
    assert read("".join(map(line.format, range(MODELS_LIMIT + 1))).encode()) is Failure.TOO_MANY_SERIES


def test_wanted_lines_are_read_up_to_a_size_in_all() -> None:
    labels = ",".join(f'{chr(97 + number % 26)}{number // 26}=""' for number in range(500))
    lines = [f'vllm:prompt_tokens_total{{model_name="m",engine="{number:03}",{labels}}} 1' for number in range(100)]
    lines = [line + " " * (LINE_LIMIT - len(line) - 1) for line in lines]
    most = WANTED_LIMIT // LINE_LIMIT
    assert told("\n".join([*lines[:most], ""])).prompt_tokens == most
    assert read("\n".join([*lines[: most + 1], ""]).encode()) is Failure.TOO_MANY_SERIES
    unread = "".join(f'vllm:num_requests_running{{engine="{"x" * LINE_LIMIT}"}} {number}\n' for number in range(100))
    assert told("\n".join([*lines[:most], unread])).prompt_tokens == most


def test_page_of_many_models_with_long_names_fits() -> None:
    names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"]
    names += ["prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total"]
    names += ["time_to_first_token_seconds_sum", "time_to_first_token_seconds_count"]
    reasons = ["stop", "length", "abort", "error", "repetition", "timeout"]
    labels = [("engine", "0")]
    samples = [(name, labels) for name in names]
    samples += [("request_success_total", [*labels, ("finished_reason", reason)]) for reason in reasons]
    page = "# HELP vllm\n"
    for number in range(MODELS_LIMIT):
        for name, others in samples:
            pairs = [*others, ("model_name", f"{number:080}")]
            written = ",".join(f'{key}="{value}"' for key, value in pairs)
            page += f"vllm:{name}{{{written}}} 0.123456789012\n"
    models = read(page.encode())
    assert isinstance(models, tuple)
    assert len(models) == MODELS_LIMIT


def test_line_without_end_is_refused() -> None:
    reader = PageReader()
    assert reader.feed(b"# metrics\n") is None
    said = [reader.feed(b"x" * 65_536) for _ in range(20)]
    assert said[:15] == [None] * 15
    assert Failure.TOO_LARGE in said


PARTS = st.sampled_from(
    [
        *(
            "vllm:prompt_tokens_total",
            "vllm_kv_cache_usage_perc",
            "nv_trt_llm_request_metrics",
            "tgi_queue_size",
            "go_x",
        ),
        *('{model_name="', '"}', "{", "}", '"', "\\", ",", "=", 'request_type="waiting"', " ", "\t", "\n", "\r", "# "),
        *(
            "1",
            "-",
            "NaN",
            "Inf",
            "1e400",
            "0x10",
            "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
            "\u0661",
            "_",
        ),
    ]
)


@given(st.lists(PARTS, max_size=40), st.binary(max_size=20), st.integers(1, 64))
def test_nothing_raises(parts: list[str], more: bytes, piece: int) -> None:
    page = "".join(parts).encode() + more
    for whole in (page, b"# x\n" + page + b"\n", b'vllm:prompt_tokens_total{model_name="' + page + b'"} 1\n'):
        found = read(whole, piece)
        assert isinstance(found, Failure) or all(model.engine for model in found)


@given(st.binary(max_size=300), st.integers(1, 64))
def test_no_bytes_raise(page: bytes, piece: int) -> None:
    read(page, piece)
    read(b"\nvllm:num_requests_running" + page + b"\n", piece)


def test_documented_table_is_the_adapters() -> None:
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (Path(__file__).parents[2] / "docs" / "engines.md").read_text().splitlines()
        if line.startswith(("| figure", "| `")) and line.count("|") == len(ADAPTERS) + 2
    ]
    head, *figures = rows
    assert head == ["figure", *(adapter.engine for adapter in ADAPTERS)]
    assert figures == [
        [f"`{figure.value}`", *(documented(adapter.sources.get(figure, ())) for adapter in ADAPTERS)]
        for figure in Figure
    ]


def documented(sources: Sequence[Source]) -> str:
    return ", ".join("+".join(f"`{name}{_condition(source)}`" for name in source.names) for source in sources)


def _condition(source: Source) -> str:
    return "" if source.where is None else f'{{{source.where[0]}="{source.where[1]}"}}'


def test_the_role_play_services_own_page() -> None:
    shapes = [SHAPES["understudy"], SHAPES["headliner"]]
    metrics = ServiceMetrics(shapes, prefix_cache=True)
    for number in range(7):
        finished = Finished(number, "stop", 101, 13, 64, 0.001, 0.011, 0.1)
        metrics.step("understudy", Step(37, 101, 64, 1, [(number, 5)] * 13, [finished], Gauges(3, 2, 0.25)))
        metrics.first_token("understudy", 0.125)
    assert read(metrics.render()) == (
        EngineModel("vllm", "headliner", *(0.0,) * 11),
        EngineModel("vllm", "understudy", 3, 2, 0.25, 707, 448, 7, 7, 0.875, 7, 707, 91),
    )
