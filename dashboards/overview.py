"""The dashboard that is looked at first: what the users of each model feel."""

from __future__ import annotations

from typing import Final

from dashboards.board import GREEN, MODEL, RANGE, RED, YELLOW, Board, Column, quantile, rate

TTFT: Final = "llm_time_to_first_token_seconds"
ITL: Final = "llm_inter_token_latency_seconds"
BY: Final = "service_name, model_name"
IDLE: Final = "No request in this time"
ELSEWHERE: Final = "${__url_time_range}&var-datasource=${datasource}&${instance:queryparam}"
OF_ROW: Final = "&var-service_name=${__data.fields.Service}&var-model_name=${__data.fields.Model}"


def ratio(part: str, whole: str, by: str = "") -> str:
    """One sum of rates by another; nothing where nothing happened."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({part}) / (sum{grouping} ({whole}) > 0)"


FAILED: Final = rate("llm_request_failures_total", f'{MODEL}, reason!="client_error"')
ABORTED: Final = rate("llm_requests_aborted_total", MODEL)
ENDED: Final = rate("llm_requests_total", MODEL)
HITS: Final = rate("llm_prefix_cache_hits_total", MODEL)
LOOKED_UP: Final = rate("llm_prefix_cache_queries_total", MODEL)


def overview() -> str:
    """Stats, a table with a line for each model, and a row for each model."""
    board = Board(
        "footlight-overview",
        "Footlight / Overview",
        "What users of streaming language-model services feel, by model: requests, first tokens, gaps, failures.",
    )
    _stats(board)
    board.row("Models")

    def over(name: str, more: str = "") -> str:
        return rate(name, f"{MODEL}{more}", RANGE)

    ended, failed = over("llm_requests_total"), over("llm_request_failures_total", ', reason!="client_error"')
    hits, queries = (over(f"llm_prefix_cache_{each}_total") for each in ("hits", "queries"))
    board.table(
        "By model",
        "One line for each service and model, over the whole time range but for requests in flight. A click on a name "
        "leads to the reasons (Why), the GPU and the SLOs of that model. Quantiles are interpolated between the "
        "histogram's bounds.",
        {"service_name": "Service", "model_name": "Model"},
        [
            Column("Requests/s", f"sum by ({BY}) ({over('llm_requests_total')})", "reqps"),
            Column("In flight", f"sum by ({BY}) (llm_requests_in_flight{{{MODEL}}})", "short"),
            Column("TTFT p50", quantile(0.5, TTFT, MODEL, BY, RANGE), "s"),
            Column("TTFT p99", quantile(0.99, TTFT, MODEL, BY, RANGE), "s"),
            Column("ITL p50", quantile(0.5, ITL, MODEL, BY, RANGE), "s"),
            Column("ITL p99", quantile(0.99, ITL, MODEL, BY, RANGE), "s"),
            Column("Tokens/s", f"sum by ({BY}) ({over('llm_generation_tokens_total')})", "tokens/s"),
            Column("Failed", ratio(failed, ended, BY), "percentunit", ((None, GREEN), (0.01, YELLOW), (0.05, RED))),
            Column("Left by client", ratio(over("llm_requests_aborted_total"), ended, BY), "percentunit"),
            Column("KV cache hits", ratio(hits, queries, BY), "percentunit"),
        ],
        empty=IDLE,
        links={
            "Why": f"/d/footlight-why?{ELSEWHERE}{OF_ROW}",
            "GPU and cache": f"/d/footlight-gpu?{ELSEWHERE}{OF_ROW}",
            "SLOs": f"/d/footlight-slos?{ELSEWHERE}{OF_ROW}",
        },
    )
    board.row("$model_name", repeat="model_name")
    _model(board)
    return board.text()


def _stats(board: Board) -> None:
    board.row("Now")
    bad_share = ((None, GREEN), (0.01, YELLOW), (0.05, RED))
    board.stat(
        "Requests",
        "Requests whose end was seen, whatever the outcome.",
        f"sum({ENDED})",
        "reqps",
        empty=IDLE,
    )
    board.stat(
        "In flight",
        "Requests that were read and are not finished.",
        f"sum(llm_requests_in_flight{{{MODEL}}})",
        "short",
        empty=IDLE,
    )
    board.stat(
        "TTFT p99",
        "Time to first token: from the request's first byte to the first frame with content, of streamed responses.",
        quantile(0.99, TTFT, MODEL),
        "s",
        empty="No streamed response in this time",
    )
    board.stat(
        "ITL p99",
        "Inter-token latency: between two successive frames with content of one response.",
        quantile(0.99, ITL, MODEL),
        "s",
        empty="No response of more than one frame in this time",
    )
    board.stat(
        "Tokens",
        "Generated tokens by the responses' own usage; frames with content where it has none.",
        f"sum({rate('llm_generation_tokens_total', MODEL)})",
        "tokens/s",
        empty=IDLE,
    )
    board.stat(
        "Failed",
        "Requests that failed, of all: 429, 5xx, an error in the stream, or cut off by the server. Without the other "
        "4xx, which are the client's.",
        ratio(FAILED, ENDED),
        "percentunit",
        empty=IDLE,
        steps=bad_share,
    )
    board.stat(
        "Left by client",
        "Requests whose client left before the end, of all.",
        ratio(ABORTED, ENDED),
        "percentunit",
        empty=IDLE,
        steps=((None, GREEN), (0.1, YELLOW), (0.25, RED)),
    )
    board.stat(
        "Lowest budget",
        "Error budget that is left of the objective that stands worst, by what the agents have seen in its window.",
        f"min(llm_slo_error_budget_remaining_ratio{{{MODEL}}})",
        "percentunit",
        empty="No objective is configured (slos:), or none had an event",
        steps=((None, RED), (0, YELLOW), (0.25, GREEN)),
    )


def _model(board: Board) -> None:
    why = {"Why": "/d/footlight-why?${__url_time_range}&${datasource:queryparam}&${service_name:queryparam}"}
    why = {name: f"{url}&var-model_name=${{model_name}}" for name, url in why.items()}

    def quantiles(histogram: str) -> dict[str, str]:
        return {f"p{100 * share:g}": quantile(share, histogram, MODEL) for share in (0.5, 0.9, 0.99)}

    board.series(
        "Time to first token",
        "Median, 90 % and 99 % of streamed responses, interpolated between the histogram's bounds.",
        quantiles(TTFT),
        "s",
        empty="No streamed response in this time",
        width=6,
    )
    board.link_last(why)
    board.series(
        "Inter-token latency",
        "Median, 90 % and 99 % of the gaps between two successive frames with content.",
        quantiles(ITL),
        "s",
        empty="No response of more than one frame in this time",
        width=6,
    )
    board.link_last(why)
    board.series(
        "Requests by end",
        "Requests a second that ended well, that failed, by reason, and those whose client left, by when.",
        {
            "answered": f"sum({ENDED}) - sum({rate('llm_request_failures_total', MODEL)}) - sum({ABORTED})",
            "{{reason}}": f"sum by (reason) ({rate('llm_request_failures_total', MODEL)})",
            "left {{phase}}": f"sum by (phase) ({ABORTED})",
        },
        "reqps",
        empty=IDLE,
        width=6,
        stacked=True,
    )
    board.link_last(why)
    board.series(
        "Tokens and frames",
        "Tokens of prompts and replies by the responses' usage, frames with content, and tokens that were generated "
        "for clients who had left.",
        {
            "prompt": f"sum({rate('llm_prompt_tokens_total', MODEL)})",
            "generated": f"sum({rate('llm_generation_tokens_total', MODEL)})",
            "frames": f"sum({rate('llm_frames_total', MODEL)})",
            "wasted": f"sum({rate('llm_wasted_generation_tokens_total', MODEL)})",
        },
        "tokens/s",
        empty=IDLE,
        width=6,
    )
    board.link_last(why)
