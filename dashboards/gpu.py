"""The dashboard of GPUs, of what services do with them, and of the KV cache."""

from __future__ import annotations

from typing import Final

from dashboards.board import GREEN, MODEL, NODE, RED, SERVICE, YELLOW, Board, quantile, rate
from dashboards.overview import BY, HITS, IDLE, LOOKED_UP, ratio

NO_GPU: Final = "No NVIDIA GPU, no driver, or this GPU does not tell it"
NO_CUDA: Final = "Only with probes: {cuda: on}, and a service that calls libcuda"
NO_CACHE: Final = "Nothing told of look-ups in a KV cache: no usage, engine metrics or probe point"
NO_ENGINE: Final = "No engine with metrics of its own: see engine_metrics in the configuration"
ON_GPU: Final = "{{instance}} GPU {{index}}"


def named(expr: str) -> str:
    """The index of the GPU beside its uuid."""
    return f"{expr} * on (instance, uuid) group_left (index) gpu_info{{{NODE}}}"


def gauge(name: str) -> str:
    """A metric of each GPU, with its index."""
    return named(f"{name}{{{NODE}}}")


def gpu() -> str:
    """GPUs by the driver, services by the driver and the CUDA probe, and the cache by its sources."""
    board = Board(
        "footlight-gpu",
        "Footlight / GPU and cache",
        "What GPUs did, what services did with them, and what was found in KV caches.",
    )
    _cache(board)
    _engines(board)
    _gpus(board)
    _health(board)
    _services(board)
    return board.text()


def _cache(board: Board) -> None:
    board.row("KV cache")
    board.series(
        "Hit ratio by model",
        "Prompt tokens found in the KV cache, of those looked up, by the one source that counts for the model.",
        {"{{service_name}} {{model_name}}": ratio(HITS, LOOKED_UP, BY)},
        "percentunit",
        empty=NO_CACHE,
        width=6,
        top=1,
    )
    turns = ("hits", "queries")
    hits, queries = (rate(f"llm_prefix_cache_turn_{each}_total", MODEL) for each in turns)
    board.series(
        "Hit ratio by turn",
        "The same by how many messages of the user the conversation has, by the responses' usage. A cache that works "
        "finds little at turn 1 and much later; one that a changing prompt breaks finds little at each.",
        {"turn {{turn}}": ratio(hits, queries, "turn")},
        "percentunit",
        empty="No response's usage told of the cache in this time",
        width=6,
        top=1,
    )
    board.series(
        "Look-ups by source",
        "Prompt tokens looked up a second by what each source says, whether it counts or not: they should agree.",
        {"{{source}}": f"sum by (source) ({rate('llm_kv_cache_source_lookup_tokens_total', MODEL)})"},
        "tokens/s",
        empty=NO_CACHE,
        width=6,
    )
    board.series(
        "Prefill and decode",
        "Uncached prompt tokens by the time to first token, and generated tokens by the time from first to last token, "
        "over the last 5 minutes: what one request gets.",
        {
            "{{model_name}} prefill": f"avg by (model_name) (llm_prefill_tokens_per_second{{{MODEL}}})",
            "{{model_name}} decode": f"avg by (model_name) (llm_decode_tokens_per_second{{{MODEL}}})",
        },
        "tokens/s",
        empty=IDLE,
        width=6,
    )


def _engines(board: Board) -> None:
    board.row("Engines, by their own metrics")
    board.series(
        "Running and waiting",
        "Requests that engines work on, and that wait for them.",
        {
            "{{model_name}} running": f"sum by (model_name) (llm_engine_requests_running{{{MODEL}}})",
            "{{model_name}} waiting": f"sum by (model_name) (llm_engine_requests_waiting{{{MODEL}}})",
        },
        "none",
        empty=NO_ENGINE,
        width=6,
    )
    board.series(
        "KV cache in use",
        "Part of the engine's KV cache that is held. Near 1, requests are preempted.",
        {"{{model_name}} {{engine}}": f"max by (model_name, engine) (llm_engine_kv_cache_usage_ratio{{{MODEL}}})"},
        "percentunit",
        empty=NO_ENGINE,
        width=6,
        top=1,
        steps=((None, GREEN), (0.9, YELLOW), (0.98, RED)),
    )
    board.series(
        "Preemptions",
        "Times a second that a request lost its place in the KV cache to another one.",
        {"{{model_name}}": f"sum by (model_name) ({rate('llm_engine_preemptions_total', MODEL)})"},
        "ops",
        empty=NO_ENGINE,
        width=6,
    )
    board.series(
        "TTFT, engine less agent",
        "The engine's mean time to first token less the agent's, last five minutes. Below zero, as the engine begins "
        "to count later; far below, requests wait before the engine has them.",
        {
            "{{model_name}}": "avg by (model_name) "
            f"(llm_engine_time_to_first_token_difference_seconds{{{MODEL}}})"
        },
        "s",
        empty="Known after a minute with requests that both saw",
        width=6,
    )


def _gpus(board: Board) -> None:
    board.row("GPUs")
    board.series(
        "Utilization",
        "Part of the time in which anything ran on the GPU, and part of it that multiprocessors had work, averaged "
        "over them. The first may be 100 % where the second is small.",
        {
            f"{ON_GPU} any kernel": gauge("gpu_utilization_ratio"),
            f"{ON_GPU} SMs": gauge("gpu_sm_active_ratio"),
        },
        "percentunit",
        empty=NO_GPU,
        top=1,
    )
    board.series(
        "Memory",
        "Memory in use, and what there is of it.",
        {f"{ON_GPU} used": gauge("gpu_memory_used_bytes"), f"{ON_GPU} total": gauge("gpu_memory_total_bytes")},
        "bytes",
        empty=NO_GPU,
    )
    board.series(
        "Tensor cores and memory bandwidth",
        "Part of the time that tensor cores worked, and part of the memory's bandwidth in use. Decoding is bound by "
        "the second, prefill by the first.",
        {
            f"{ON_GPU} tensor": gauge("gpu_tensor_active_ratio"),
            f"{ON_GPU} memory": gauge("gpu_dram_active_ratio"),
        },
        "percentunit",
        empty="Only GPUs from Hopper on tell it",
        top=1,
    )
    board.series(
        "Power",
        "Power drawn, and what the driver allows.",
        {f"{ON_GPU}": gauge("gpu_power_watts"), f"{ON_GPU} limit": gauge("gpu_power_limit_watts")},
        "watt",
        empty=NO_GPU,
        width=6,
    )
    board.series(
        "Temperature",
        "Temperature of each GPU, by sensor.",
        {f"{ON_GPU} {{{{sensor}}}}": gauge("gpu_temperature_celsius")},
        "celsius",
        empty=NO_GPU,
        width=6,
    )
    board.series(
        "Clocks",
        "Clock of the multiprocessors and of the memory.",
        {f"{ON_GPU} {{{{domain}}}}": named(f'gpu_clock_hertz{{{NODE}, domain=~"sm|memory"}}')},
        "hertz",
        empty=NO_GPU,
        width=6,
    )
    board.series(
        "Held back",
        "Part of the time in which the clocks were held back, by the driver's own count: power, thermal and others.",
        {f"{ON_GPU} {{{{reason}}}}": named(rate("gpu_throttled_seconds_total", NODE))},
        "percentunit",
        empty=NO_GPU,
        width=6,
    )


def _health(board: Board) -> None:
    board.row("Health of GPUs")
    board.stat(
        "GPUs up",
        "GPUs that could be read.",
        f"sum(gpu_up{{{NODE}}})",
        "none",
        empty=NO_GPU,
        width=4,
    )
    board.stat(
        "GPUs lost",
        "GPUs that were there and are lost, or answer too slowly.",
        f"count(gpu_up{{{NODE}}}) - sum(gpu_up{{{NODE}}})",
        "none",
        empty=NO_GPU,
        width=4,
        steps=((None, GREEN), (1, RED)),
    )
    board.bars(
        "XID errors",
        "XID errors over the whole time range, by code: NVIDIA's list of them says what each means.",
        f"sort_desc(sum by (instance, uuid, xid) (increase(gpu_xid_errors_total{{{NODE}}}[$__range])))",
        "{{instance}} {{uuid}} XID {{xid}}",
        "none",
        empty="No XID error since the agent listens",
        width=8,
        height=4,
    )
    board.bars(
        "Memory errors",
        "Memory errors by what became of them; aggregate counts begin with the GPU's life.",
        f'sort_desc(sum by (instance, severity) (gpu_ecc_errors_total{{{NODE}, counter="aggregate"}}))',
        "{{instance}} {{severity}}",
        "none",
        empty="No GPU with ECC",
        width=8,
        height=4,
    )
    board.series(
        "PCIe",
        "Bytes over PCIe, by the GPU's direction.",
        {f"{ON_GPU} {{{{direction}}}}": named(rate("gpu_pcie_bytes_total", NODE))},
        "Bps",
        empty=NO_GPU,
        width=12,
    )
    board.series(
        "NVLink",
        "Bytes of data over all NVLinks, by the GPU's direction.",
        {f"{ON_GPU} {{{{direction}}}}": named(rate("gpu_nvlink_bytes_total", NODE))},
        "Bps",
        empty="No GPU with NVLink",
        width=12,
    )


def _services(board: Board) -> None:
    board.row("Services on GPUs")
    board.series(
        "Memory by service",
        "GPU memory of the service's processes.",
        {"{{service_name}}": f"sum by (service_name) (gpu_service_memory_used_bytes{{{SERVICE}}})"},
        "bytes",
        empty="No service has a process on a GPU, or the driver does not tell memory by process",
    )
    board.series(
        "Utilization by service",
        "Part of the time in which the service's processes ran on the GPU.",
        {"{{service_name}} {{uuid}}": f"gpu_service_sm_utilization_ratio{{{SERVICE}}}"},
        "percentunit",
        empty="No service has a process on a GPU, or MIG is on",
    )
    board.series(
        "Waits for the GPU",
        "Sleeps in ioctl, read or poll on a GPU's device files: median and 99 %. A thread that asks in a loop runs, "
        "and is not seen here.",
        {
            f"{{{{service_name}}}} p{100 * q:g}": quantile(q, "kernel_gpu_wait_seconds", SERVICE, "service_name")
            for q in (0.5, 0.99)
        },
        "s",
        empty="The host has no GPU, or nobody slept on it in this time",
    )
    board.series(
        "CUDA launches",
        "Kernels and graphs that threads gave to the driver, a second.",
        {"{{service_name}} {{kind}}": f"sum by (service_name, kind) ({rate('gpu_cuda_launches_total', SERVICE)})"},
        "ops",
        empty=NO_CUDA,
        width=6,
    )
    board.series(
        "CUDA waits",
        "99 % of the calls of the driver that wait for the GPU, by call.",
        {
            "{{service_name}} {{call}}": quantile(
                0.99, "gpu_cuda_synchronize_seconds", SERVICE, "service_name, call"
            )
        },
        "s",
        empty=NO_CUDA,
        width=6,
    )
    copied = rate("gpu_cuda_copy_bytes_total", SERVICE)
    board.series(
        "CUDA copies",
        "Bytes copied between host and device, by direction.",
        {"{{service_name}} {{direction}}": f"sum by (service_name, direction) ({copied})"},
        "Bps",
        empty=NO_CUDA,
        width=6,
    )
    board.series(
        "CUDA memory",
        "Bytes that processes have allocated while they were watched, and have not freed.",
        {"{{service_name}}": f"sum by (service_name) (gpu_cuda_outstanding_bytes{{{SERVICE}}})"},
        "bytes",
        empty=NO_CUDA,
        width=6,
    )
