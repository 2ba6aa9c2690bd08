from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cotune.runtime.errors import RequestError
from cotune.runtime.learning.status import AdapterLearning
from cotune.runtime.scheduling.statistics import ScheduleStatistics
from cotune.runtime.scheduling.timeline import IterationRecord, QuantumRecord
from cotune.runtime.types import SamplingParams
from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import TOTAL_PAGES, NullRuntime
from cotune.web.metrics import Histogram, Metrics

if TYPE_CHECKING:
    from prometheus_client import Metric


def families(metrics: Metrics) -> dict[str, Metric]:
    return {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}


def value(metrics: Metrics, sample: str, **labels: str) -> float:
    for family in families(metrics).values():
        for found in family.samples:
            if found.name == sample and labels.items() <= found.labels.items():
                return found.value
    raise AssertionError(f"no sample {sample} with {labels}")


def test_a_value_falls_in_the_first_bucket_that_is_not_below_it() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for observed in (0.5, 1.0, 1.5, 2.0, 7.0):
        histogram.observe(observed)
    assert histogram._counts == [2, 2, 0, 1]
    assert histogram._sum == 12.0


VLLM_NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
]


@pytest.mark.parametrize("name", VLLM_NAMES)
async def test_the_names_that_dashboards_parse_are_there_from_the_start(name: str) -> None:
    async with NullRuntime(served_name="tiny") as runtime:
        value(Metrics(runtime), name, model_name="tiny")


async def test_the_numbers_are_those_of_the_requests() -> None:
    async with NullRuntime(manual=True) as runtime:
        metrics = Metrics(runtime)
        runtime.add_listener(metrics)
        params = SamplingParams(n=2, max_tokens=3)
        async with runtime.complete("x" * 40, params) as stream:
            runtime.step()
            assert value(metrics, "vllm:num_requests_running") == 2
            assert value(metrics, "vllm:kv_cache_usage_perc") == 3 / TOTAL_PAGES
            assert value(metrics, "vllm:time_to_first_token_seconds_count") == 2
            runtime.step(2)
            await stream
        assert value(metrics, "vllm:num_requests_running") == 0
        assert value(metrics, "vllm:kv_cache_usage_perc") == 0
        assert value(metrics, "vllm:prompt_tokens_total") == 40
        assert value(metrics, "vllm:generation_tokens_total") == 6
        assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
        assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 2
        assert value(metrics, "vllm:request_generation_tokens_sum") == 6
        assert value(metrics, "vllm:request_success_total", finished_reason="length") == 2
        assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
        assert value(metrics, "cotune_finished_total", model="null", finish_reason="length") == 2
        async with runtime.complete("x" * 40, params):
            assert value(metrics, "vllm:prefix_cache_hits_total") == 32
            assert value(metrics, "vllm:prefix_cache_queries_total") == 80


async def test_two_servers_in_one_process_count_apart() -> None:
    async with NullRuntime(served_name="one") as one, NullRuntime(served_name="two") as two:
        first, second = Metrics(one), Metrics(two)
        first.on_http("GET", "/health", 200, 0.001)
        labels = {"method": "GET", "route": "/health", "status": "200"}
        assert value(first, "cotune_http_requests_total", **labels) == 1
        with pytest.raises(AssertionError):
            value(second, "cotune_http_requests_total", **labels)


async def test_a_refused_request_is_counted_by_reason() -> None:
    async with NullRuntime(max_requests=0) as runtime:
        metrics = Metrics(runtime)
        runtime.add_listener(metrics)
        with pytest.raises(Exception, match="try again"):
            await runtime.complete("x", SamplingParams())
        assert value(metrics, "cotune_rejected_total", reason="OverloadedError") == 1


async def test_feedback_and_what_was_learned_are_told_by_adapter() -> None:
    learning = NullLearning("tiny")
    async with NullRuntime(served_name="tiny", learning=learning) as runtime:
        metrics = Metrics(runtime)
        edit = {"id": "a", "type": "edit", "response_id": "r", "text": "better"}
        rating = {"id": "b", "type": "rating", "response_id": "r", "rating": 1}
        await runtime.complete("x", SamplingParams(max_tokens=1), request_id="r")
        await runtime.feedback(edit)
        await runtime.feedback(rating)
        await runtime.feedback(rating)
        with pytest.raises(RequestError):
            await runtime.feedback({**rating, "id": "c", "rating": 0})
        metrics.on_unreadable_feedback("invalid_json")
        learning.publish()
        learning.refuse("entropy", "repetition")
        learning.leave_undecided("too_few_held_out")
        events = "cotune_feedback_events_total"
        assert value(metrics, events, model="tiny", type="rating") == 1
        assert value(metrics, events, model="tiny", type="edit") == 1
        refused = "cotune_feedback_refused_total"
        assert value(metrics, refused, code="invalid_feedback") == 1
        assert value(metrics, refused, code="invalid_json") == 1
        assert value(metrics, "cotune_feedback_duplicates_total") == 1
        assert value(metrics, "cotune_feedback_responses") == 1
        assert value(metrics, "cotune_pairs", adapter="tiny", state="queued") == 1
        candidates = "cotune_candidates_total"
        assert value(metrics, candidates, adapter="tiny", outcome="passed") == 1
        assert value(metrics, candidates, outcome="refused", reason="entropy+repetition") == 1
        assert value(metrics, candidates, outcome="undecided", reason="too_few_held_out") == 1
        assert value(metrics, "cotune_live_version", adapter="tiny") == 1
        # Each has a sample of its own in what the runtime tells.
        status = AdapterLearning(
            adapter="tiny",
            live_age_s=1.5,
            steps=2,
            tokens_trained=3,
            loss=0.4,
            margin=0.5,
            reward_accuracy=0.6,
            gradient_norm=0.7,
            learning_rate=0.8,
            win_rate=0.9,
            base_win_rate=0.5,
        )
        learning.fixed = status
        for name, expected in (
            ("live_version_age_seconds", 1.5),
            ("training_steps_total", 2),
            ("training_tokens_total", 3),
            ("training_loss", 0.4),
            ("training_margin", 0.5),
            ("training_reward_accuracy", 0.6),
            ("training_gradient_norm", 0.7),
            ("training_learning_rate", 0.8),
        ):
            assert value(metrics, f"cotune_{name}", adapter="tiny") == expected, name
        assert value(metrics, "cotune_win_rate", adapter="tiny", weights="live") == 0.9
        assert value(metrics, "cotune_win_rate", adapter="tiny", weights="base") == 0.5


async def test_what_the_scheduler_did_is_told() -> None:
    async with NullRuntime(served_name="tiny", manual=True) as runtime:
        metrics = Metrics(runtime)
        runtime.schedule = ScheduleStatistics(
            policy="cotune",
            training_share=0.25,
            memory_threshold=1 << 30,
            near_misses=3,
            out_of_memories=1,
            interference=1.5,
            is_profile_stale=True,
        )
        for plan_s, slack_s, expected_s in ((0.0003, 0.5, 0.5), (9.0, -0.5, None)):
            runtime.records.add_iteration(
                IterationRecord(
                    index=1, started_s=0.0, ended_s=1.0, plan_s=plan_s, decodes=3,
                    prefill_tokens=1, admissions=0, preemptions=0, context_tokens=0,
                    predicted_s=expected_s, margin=1.0, slack_s=slack_s, budget_tokens=8,
                    started_quantum=None, is_holding=True, beside_training=0.0,
                    memory_threshold=None,
                )
            )  # fmt: skip
        for kind, error in (("forward", None), ("forward", "it failed"), ("step", None)):
            runtime.records.add_quantum(
                QuantumRecord("tiny", kind, 8, 1, 0.0, 3.0, 1.0, None, 2, error)
            )
        runtime.records.pause()
        assert value(metrics, "cotune_policy_info", model="tiny", policy="cotune") == 1
        for name, expected in (
            ("decision_seconds_count", 2),
            ("decision_seconds_sum", 9.0003),
            ("batch_fill", 0.5),
            ("prediction_bias", -0.5),
            ("training_share", 0.25),
            ("memory_threshold_bytes", 1 << 30),
            ("interference", 1.5),
            ("profile_stale", 1),
            ("iteration_seconds_total", 2),
            ("iteration_tokens_total", 8),
            ("iteration_budget_tokens_total", 16),
            ("late_iterations_total", 1),
            ("pauses_total", 1),
            ("near_misses_total", 3),
            ("out_of_memories_total", 1),
            ("quantum_rows_total", 24),
            ("failed_quanta_total", 1),
            ("quantum_halvings_total", 6),
            ("held_seconds_total", 3),
            ("holds_total", 2),
        ):
            assert value(metrics, f"cotune_{name}", model="tiny") == pytest.approx(expected), name
        buckets = "cotune_decision_seconds_bucket"
        assert value(metrics, buckets, le="0.0002") == 0
        assert value(metrics, buckets, le="0.0005") == 1
        assert value(metrics, buckets, le="+Inf") == 2
        assert value(metrics, "cotune_prediction_error", quantile="0.95") == 0.5
        assert value(metrics, "cotune_slack_seconds", quantile="0.05") == -0.5
        assert value(metrics, "cotune_quanta_total", kind="forward") == 2
        assert value(metrics, "cotune_quantum_seconds_total", kind="step") == 2


async def test_what_is_not_known_yet_has_no_sample() -> None:
    async with NullRuntime(learning=NullLearning("null")) as runtime:
        text = Metrics(runtime).render().decode()
        assert "cotune_live_version{" in text
        assert "cotune_training_loss{" not in text
        assert "cotune_win_rate{" not in text
        assert "cotune_training_share{" in text
        for name in ("batch_fill", "memory_threshold_bytes", "prediction_error", "slack_seconds"):
            assert f"cotune_{name}{{" not in text, name


async def test_every_family_is_valid_prometheus_text_with_a_help_line() -> None:
    async with NullRuntime(learning=NullLearning("null")) as runtime:
        metrics = Metrics(runtime)
        for name, family in families(metrics).items():
            assert family.documentation, name
            assert family.type in ("gauge", "counter", "histogram"), name
