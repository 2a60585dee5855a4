"""Objectives in the configuration: what each kind needs, and that what cannot hold is refused with its place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from exporter.config import parse
from exporter.request import Failure
from exporter.slis import Sli
from exporter.slo.catalogue import LIST, known, made
from exporter.slo.declared import SLO_REASONS, SLO_SLIS, Slo
from exporter.slo.words import period, sentence
from probes.errors import ConfigError

BASE = "services:\n  - {name: roleplay, match: {port: 80}}\n  - {name: b, match: {port: 81}}\nslos:\n"


def one(text: str) -> Slo:
    (slo,) = parse(f"{BASE}  - {{name: x, {text}}}\n", "agent.yaml").slos
    return slo


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        (
            "sli: errors, target: 99.5%",
            Slo("x", "errors", None, 0.995, reasons=("rate_limited", "server_error", "cut_off")),
            "99.5% of requests without rate_limited or server_error or cut_off",
        ),
        (
            "sli: errors, target: 99%, reasons: server_error",
            Slo("x", "errors", None, 0.99, reasons=("server_error",)),
            "99% of requests without server_error",
        ),
        (
            "sli: aborts, target: 97%, service: b",
            Slo("x", "aborts", None, 0.97, service="b"),
            "97% of requests not left by their client",
        ),
        (
            "sli: kv_cache_hit_ratio, at_least: 60%, window: 7d",
            Slo("x", "kv_cache_hit_ratio", None, 0.6, 7 * 86400),
            "60% of prompt tokens found in the KV cache",
        ),
        (
            "sli: decode_tokens_per_second, at_least: 30, target: 95%, model_name: bard/7b",
            Slo("x", "decode_tokens_per_second", None, 0.95, model_name="bard/7b", at_least=30.0),
            "95% of responses at 30 tokens/s or more",
        ),
        (
            "sli: kernel_run_queue_wait_seconds, below: 8.192ms, target: 99.9%, window: 100h",
            Slo("x", "kernel_run_queue_wait_seconds", 0.008192, 0.999, 360_000),
            "99.9% of observations of kernel_run_queue_wait_seconds at 0.008192 s or less",
        ),
        (
            "sli: kernel_resident_memory_bytes, below: 8GiB, target: 99%, service: b",
            Slo("x", "kernel_resident_memory_bytes", 8.0 * 2**30, 0.99, service="b"),
            "99% of minutes of kernel_resident_memory_bytes at 8.58993e+09 bytes or less",
        ),
        (
            "sli: gpu_temperature_celsius, below: 85, target: 99%",
            Slo("x", "gpu_temperature_celsius", 85.0, 0.99),
            "99% of minutes of gpu_temperature_celsius at 85 or less",
        ),
        (
            "sli: gpu_utilization_ratio, at_least: 5%, target: 50%",
            Slo("x", "gpu_utilization_ratio", None, 0.5, at_least=0.05),
            "50% of minutes of gpu_utilization_ratio at 0.05 or more",
        ),
        (
            "sli: kernel_threads, at_least: 4, target: 99%",
            Slo("x", "kernel_threads", None, 0.99, at_least=4.0),
            "99% of minutes of kernel_threads at 4 or more",
        ),
        (
            "sli: ttft, below: 300ms, target: 99%",
            Slo("x", "ttft", 0.3, 0.99),
            "99% of times to first token within 0.3 s",
        ),
    ],
)
def test_each_kind_of_objective(text: str, expected: Slo, said: str) -> None:
    assert one(text) == expected
    assert sentence(one(text)) == said


def test_a_speed_is_a_bound_of_the_time_per_token() -> None:
    assert one("sli: decode_tokens_per_second, at_least: 20, target: 95%").below_s == 0.05
    assert one("sli: decode_tokens_per_second, at_least: 30, target: 95%").below_s == 0.033333333
    assert one("sli: kernel_threads, below: 4, target: 95%").below_s is None


@pytest.mark.parametrize(
    ("text", "what", "next_step"),
    [
        ("sli: errrors, target: 99%", "slos[0].sli: unknown sli 'errrors'", "did you mean 'errors'?"),
        ("sli: llm_requests_total, target: 99%", "unknown sli 'llm_requests_total'", "or a kernel_ or gpu_ metric"),
        ("sli: errors", "slos[0]: the key 'target' is missing", "add `target:`"),
        ("sli: errors, target: 100%", "100% leaves no room for a single bad event", "99.9%"),
        ("sli: errors, target: 0%", "slos[0].target: must be above 0%", "percentage"),
        ("sli: errors, target: 99%, below: 1s", "slos[0].below: has no meaning for errors", "remove"),
        ("sli: errors, target: 99%, at_least: 1", "slos[0].at_least: has no meaning for errors", "remove"),
        ("sli: errors, target: 99%, reasons: []", "slos[0].reasons: the list is empty", "at least one"),
        ("sli: errors, target: 99%, reasons: cutoff", "unknown reason 'cutoff'", "did you mean 'cut_off'?"),
        ("sli: aborts, target: 99%, reasons: cut_off", "reasons: is for objectives about errors", "remove"),
        ("sli: aborts, target: 99%, phase: waiting", "unknown key 'phase'", "allowed here: name, sli, below"),
        ("sli: ttft, below: 1s, at_least: 2, target: 99%", "at_least: has no meaning for ttft", "remove"),
        ("sli: kv_cache_hit_ratio, target: 60%", "target: has no meaning for kv_cache_hit_ratio", "remove"),
        ("sli: kv_cache_hit_ratio", "the key 'at_least' is missing", "add `at_least:`"),
        ("sli: kv_cache_hit_ratio, at_least: 0.6", "at_least: must be above 0%", "2%"),
        ("sli: kv_cache_hit_ratio, at_least: 100%", "100% leaves no room for a token that is not found", "99.9%"),
        ("sli: decode_tokens_per_second, target: 95%", "the key 'at_least' is missing", "add"),
        ("sli: decode_tokens_per_second, at_least: 30/s, target: 95%", "must be a number from 0.1 to 10000", "unit"),
        ("sli: decode_tokens_per_second, at_least: 0, target: 95%", "must be a number from 0.1", "unit"),
        ("sli: decode_tokens_per_second, below: 1s, target: 95%", "below: has no meaning", "remove"),
        ("sli: kernel_run_queue_wait, below: 1s, target: 9%", "no metric 'kernel_run_queue_wait'", "did you mean"),
        ("sli: kernel_oom_kills_total, below: 1, target: 9%", "kernel_oom_kills_total is a counter", "a gauge"),
        ("sli: kernel_threads, target: 9%", "give one of `below` and `at_least`", "add `below:`"),
        ("sli: kernel_threads, below: 9, at_least: 1, target: 9%", "give one of `below` and `at_least`", "below"),
        ("sli: kernel_threads, below: 9s, target: 9%", "below: must be a number from 0", "without a unit"),
        ("sli: kernel_resident_memory_bytes, below: 9, target: 9%", "below: must be a size", "120MiB"),
        (
            "sli: kernel_run_queue_wait_seconds, below: 10ms, target: 99%",
            "slos[0].below: '10ms' is no bucket bound",
            "write 8.192ms or 16.384ms",
        ),
        ("sli: kernel_run_queue_wait_seconds, below: 68s, target: 99%", "below: must be a time from 1us to 1.1", "ms"),
        ("sli: kernel_run_queue_wait_seconds, at_least: 1s, target: 99%", "is a histogram", "bucket bounds"),
        ("sli: kernel_threads, below: 9, target: 9%, model_name: bard", "does not tell model_names apart", "remove"),
        (
            "sli: gpu_temperature_celsius, below: 85, target: 99%, service: b",
            "slos[0].service: gpu_temperature_celsius does not tell services apart",
            "remove",
        ),
        ("sli: errors, target: 99%, window: 2d", "'2d' is shorter than the longest window of the burn rate", "3d to"),
        ("sli: errors, target: 99%, window: 91d", "window: must be a time from 1h to 90d", "unit"),
        ("sli: errors, target: 99%, window: 4321m", "'4321m' is no whole number of hours", "whole days or hours"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(text: str, what: str, next_step: str) -> None:
    with pytest.raises(ConfigError) as caught:
        one(text)
    assert (caught.value.path, caught.value.line) == ("agent.yaml", 5)
    assert what in caught.value.what
    assert next_step in caught.value.next_step


@pytest.mark.parametrize(
    ("services", "first", "second", "joined"),
    [
        (
            ("team", "team-a"),
            "{name: a-b, sli: aborts, target: 9%, service: team}",
            "{name: b, sli: aborts, target: 9%, service: team-a}",
            "team-a-b",
        ),
        (
            ("team", "team-a"),
            "{name: b, sli: aborts, target: 9%}",
            "{name: a-b, sli: aborts, target: 9%}",
            "team-a-b",
        ),
        (
            ("team", "host-gpu"),
            "{name: gpu-cool, sli: gpu_temperature_celsius, below: 85, target: 99%}",
            "{name: cool, sli: aborts, target: 9%, service: host-gpu}",
            "host-gpu-cool",
        ),
    ],
)
def test_ids_are_not_the_same_once_they_are_joined(
    services: tuple[str, str], first: str, second: str, joined: str
) -> None:
    one, other = services
    base = f"services:\n  - {{name: {one}, match: {{port: 80}}}}\n  - {{name: {other}, match: {{port: 81}}}}\nslos:\n"
    with pytest.raises(ConfigError) as caught:
        parse(f"{base}  - {first}\n  - {second}\n", "agent.yaml")
    assert (caught.value.path, caught.value.line) == ("agent.yaml", 6)
    assert f"slos[1]: service and name joined are {joined!r}, as for " in caught.value.what
    assert caught.value.next_step
    assert len(parse(f"{base}  - {first}\n  - {second.replace('name: ', 'name: other-')}\n").slos) == 2


def test_every_bound_of_a_kernel_histogram_can_be_written() -> None:
    for bound in known()["kernel_run_queue_wait_seconds"].bounds:
        text = f"{bound * 1e6:.12g}us"
        slo = one(f"sli: kernel_run_queue_wait_seconds, below: {text}, target: 99%")
        assert slo.below == bound


def test_the_list_of_metrics_is_what_the_families_are() -> None:
    assert LIST.read_bytes() == made(), "run python -m exporter.slo.catalogue"


def test_the_names_of_the_configuration_are_those_of_the_agent() -> None:
    assert tuple(reason.value for reason in Failure) == SLO_REASONS
    assert set(SLO_SLIS) <= {sli.value for sli in Sli}


def test_the_privileged_process_checks_objectives_without_numpy() -> None:
    text = f"{BASE}  - {{name: x, sli: kernel_threads, below: 9, target: 99%}}\n"
    code = f"import sys; from exporter.config import parse; parse({text!r}); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(300, "5m"), (3600, "1h"), (86400, "1d"), (360_000, "100h"), (2_592_000, "30d"), (61, "61s")]
)
def test_periods_are_written_as_prometheus_does(seconds: int, text: str) -> None:
    assert period(seconds) == text
