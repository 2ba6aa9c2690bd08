"""What /metrics says: one server's numbers in Prometheus text.

Names that begin with ``cotune_`` are ours. The ``vllm:`` names carry the same measurements for
dashboards that already parse them. Counters and gauges are read from the runtime when Prometheus
asks; only latencies are gathered on the way, at the cost of one bisection each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from .. import __version__
from ..runtime.scheduling.statistics import DECISION_BUCKETS_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client import Metric

    from ..runtime.types import Response
    from .backend import Backend

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. From what a small model on one machine reaches to what a long queue costs.
_TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0, 40.0,
)  # fmt: skip
_FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_REQUEST_BUCKETS: Final = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip
_COUNT_BUCKETS: Final = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))


class Histogram:
    """Counts per bucket. For one thread: the event loop's."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that is not below it."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Report cumulative counts, as Prometheus wants them."""
        names = [*map(str, self._buckets), "+Inf"]
        family.add_metric(
            labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum
        )


class Metrics:
    """Listens to a runtime and to the server's own requests; `render` tells what they did.

    Each server has one, with a registry of its own, so that several live in one process.

    Attributes:
        paused_streams: streams that wait for a slow reader now.
        feedback_connections: WebSockets at /v1/feedback now.
    """

    def __init__(self, runtime: Backend) -> None:
        self._runtime = runtime
        self._first_token = Histogram(_FIRST_TOKEN_BUCKETS)
        self._token_gap = Histogram(_TOKEN_BUCKETS)
        self._mean_gap = Histogram(_TOKEN_BUCKETS)
        self._e2e = Histogram(_REQUEST_BUCKETS)
        self._queue = Histogram(_REQUEST_BUCKETS)
        self._prompt_tokens = Histogram(_COUNT_BUCKETS)
        self._answer_tokens = Histogram(_COUNT_BUCKETS)
        self._finished: Counter[tuple[str, str]] = Counter()
        self._rejected: Counter[str] = Counter()
        self._http: Counter[tuple[str, str, int]] = Counter()
        self.paused_streams = 0
        self.feedback_connections = 0
        self._unreadable: Counter[str] = Counter()
        self._http_seconds: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # What the runtime tells (a `Listener`).

    def on_finished(self, response: Response, /) -> None:
        """A completion has ended."""
        timings = response.timings
        self._finished[response.model, response.finish_reason] += 1
        self._e2e.observe(timings.e2e_s)
        self._queue.observe(timings.queue_s)
        self._prompt_tokens.observe(response.usage.prompt_tokens)
        self._answer_tokens.observe(len(response.token_ids))
        if timings.tbt_s:
            self._mean_gap.observe(sum(timings.tbt_s) / len(timings.tbt_s))

    def on_first_token(self, ttft_s: float, /) -> None:
        """A completion has its first token."""
        self._first_token.observe(ttft_s)

    def on_token_gap(self, gap_s: float, /) -> None:
        """A completion has another token."""
        self._token_gap.observe(gap_s)

    def on_rejected(self, reason: str, /) -> None:
        """A request was not admitted."""
        self._rejected[reason] += 1

    # What the server tells.

    def on_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered, or its client left (status 499)."""
        self._http[method, route, status] += 1
        histogram = self._http_seconds.get(route)
        if histogram is None:
            histogram = self._http_seconds[route] = Histogram(_REQUEST_BUCKETS)
        histogram.observe(seconds)

    def on_unreadable_feedback(self, code: str) -> None:
        """A frame held no JSON object, so that the runtime was not shown it."""
        self._unreadable[code] += 1

    def render(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All families, ours first."""
        yield from self._ours()
        yield from self._schedule()
        yield from self._feedback()
        yield from self._learning()
        yield from self._as_vllm()

    def _ours(self) -> Iterator[Metric]:
        statistics = self._runtime.statistics()
        cache = statistics.cache
        model = {"model": self._runtime.served_name}
        yield _gauge("cotune_build_info", "The version that runs.", {"version": __version__}, 1)
        yield _gauge(
            "cotune_ready", "1 while requests are taken.", model, int(self._runtime.is_ready)
        )
        yield _gauge("cotune_running", "Sequences that hold pages.", model, statistics.running)
        yield _gauge("cotune_waiting", "Sequences in the queue.", model, statistics.waiting)
        pages = GaugeMetricFamily("cotune_kv_pages", "KV pages by state.", labels=["state"])
        for state, count in (
            ("free", cache.free_pages),
            ("cached", cache.cached_pages),
            ("owned", cache.owned_pages),
        ):
            pages.add_metric([state], count)
        yield pages
        for name, text, count in (
            ("cotune_prompt_tokens", "Prompt tokens of admitted requests.",
             statistics.prompt_tokens),
            ("cotune_generated_tokens", "Tokens generated.", statistics.generated_tokens),
            ("cotune_preemptions", "Times a running sequence lost its pages.",
             statistics.preemptions),
            ("cotune_iterations", "Iterations of the engine.", statistics.iterations),
            ("cotune_failed_iterations", "Iterations that raised.", statistics.failed_iterations),
            ("cotune_kv_evicted_pages", "Cached pages given to others.", cache.evicted_pages),
            ("cotune_prefix_queried_tokens", "Prompt tokens looked up in the prefix cache.",
             cache.queried_tokens),
            ("cotune_prefix_hit_tokens", "Prompt tokens found in the prefix cache.",
             cache.hit_tokens),
        ):  # fmt: skip
            yield _counter(name, text, model, count)
        parts = CounterMetricFamily(
            "cotune_engine_seconds", "Where the engine's time went.", labels=["part"]
        )
        for part in ("forward", "sample", "plan", "commit", "deliver"):
            parts.add_metric([part], getattr(statistics, f"{part}_s"))
        yield parts
        finished = CounterMetricFamily(
            "cotune_finished", "Completions that ended.", labels=["model", "finish_reason"]
        )
        for (name, reason), count in self._finished.items():
            finished.add_metric([name, reason], count)
        yield finished
        rejected = CounterMetricFamily(
            "cotune_rejected", "Requests that were not admitted.", labels=["reason"]
        )
        for reason, count in self._rejected.items():
            rejected.add_metric([reason], count)
        yield rejected
        for name, text, histogram in (
            ("cotune_ttft_seconds", "Arrival to first token.", self._first_token),
            ("cotune_tbt_seconds", "Gap between successive tokens.", self._token_gap),
            ("cotune_e2e_seconds", "Arrival to finish.", self._e2e),
            ("cotune_queue_seconds", "Arrival to first scheduled.", self._queue),
        ):
            yield _histogram(name, text, model, histogram)
        requests = CounterMetricFamily(
            "cotune_http_requests",
            "HTTP requests; status 499 where the client left.",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in self._http.items():
            requests.add_metric([method, route, str(status)], count)
        yield requests
        yield _gauge(
            "cotune_http_paused_streams",
            "Streams that wait for a slow reader.",
            {},
            self.paused_streams,
        )
        seconds = HistogramMetricFamily(
            "cotune_http_seconds", "HTTP request to end of answer.", labels=["route"]
        )
        for route, histogram in self._http_seconds.items():
            histogram.add_to(seconds, [route])
        yield seconds

    def _schedule(self) -> Iterator[Metric]:
        """How iterations are planned, and what became of the plans."""
        known = self._runtime.statistics().schedule
        model = {"model": self._runtime.served_name}
        yield _gauge(
            "cotune_policy_info", "The policy that decides.", {**model, "policy": known.policy}, 1
        )
        decisions = HistogramMetricFamily(
            "cotune_decision_seconds", "Observing and deciding.", labels=list(model)
        )
        names = [*map(str, DECISION_BUCKETS_S), "+Inf"]
        counts = zip(names, accumulate(known.decision_counts), strict=True)
        decisions.add_metric(list(model.values()), list(counts), known.decision_s)
        yield decisions
        for name, text, value in (
            ("cotune_batch_fill", "Share of the token budget that recent iterations used.",
             known.fill),
            ("cotune_prediction_bias", "Predicted over measured time of recent iterations, less 1.",
             known.prediction_bias),
            ("cotune_training_share", "Share of the recent past in which the training lane worked.",
             known.training_share),
            ("cotune_memory_threshold_bytes", "What may be taken beyond what is held now.",
             known.memory_threshold),
            ("cotune_interference", "Factor on an iteration while a quantum runs beside it.",
             known.interference),
            ("cotune_profile_stale", "1 while the profile is far from what is measured.",
             int(known.is_profile_stale)),
        ):  # fmt: skip
            if value is not None:
                yield _gauge(name, text, model, value)
        error = GaugeMetricFamily(
            "cotune_prediction_error",
            "How far predictions of recent iterations were off, as a share of the time measured.",
            labels=["model", "quantile"],
        )
        slack = GaugeMetricFamily(
            "cotune_slack_seconds",
            "Time until the next token was due when recent iterations began.",
            labels=["model", "quantile"],
        )
        for family, quantile, value in (
            (error, "0.5", known.prediction_error_p50),
            (error, "0.95", known.prediction_error_p95),
            (slack, "0.05", known.slack_p5_s),
        ):
            if value is not None:
                family.add_metric([model["model"], quantile], value)
        yield error
        yield slack
        for name, text, count in (
            ("cotune_iteration_seconds", "Iterations on the device.", known.iteration_s),
            ("cotune_iteration_tokens", "Tokens that iterations held.", known.tokens),
            ("cotune_iteration_budget_tokens", "Tokens that they could have held.",
             known.budget_tokens),
            ("cotune_late_iterations", "Iterations that began after a token was due.",
             known.late_iterations),
            ("cotune_pauses", "Iterations given up for training.", known.pauses),
            ("cotune_near_misses", "Times that memory was nearly used up.", known.near_misses),
            ("cotune_out_of_memories", "Times that it was.", known.out_of_memories),
            ("cotune_quantum_rows", "Rows that training quanta computed.", known.rows),
            ("cotune_failed_quanta", "Training quanta that raised.", known.failed_quanta),
            ("cotune_quantum_halvings", "Quanta cut in two for lack of memory.", known.halvings),
            ("cotune_held_seconds", "Training quanta waiting at safepoints.", known.held_s),
            ("cotune_holds", "Iterations during which training was told to wait.", known.holds),
        ):  # fmt: skip
            yield _counter(name, text, model, count)
        for name, text, kinds in (
            ("cotune_quanta", "Training quanta that ended.", known.quanta),
            ("cotune_quantum_seconds", "What they took without the time held.", known.quantum_s),
        ):
            by_kind = CounterMetricFamily(name, text, labels=["model", "kind"])
            for kind, amount in kinds.items():
                by_kind.add_metric([model["model"], kind], amount)
            yield by_kind

    def _feedback(self) -> Iterator[Metric]:
        """What came in. Events are those that are stored, so that deletion lowers their number."""
        status = self._runtime.learning()
        model = {"model": self._runtime.served_name}
        events = CounterMetricFamily(
            "cotune_feedback_events", "Feedback events that are stored.", labels=["model", "type"]
        )
        for kind, count in status.events.items():
            events.add_metric([model["model"], kind], count)
        yield events
        refused = CounterMetricFamily(
            "cotune_feedback_refused", "Feedback that was not taken.", labels=["model", "code"]
        )
        for code, count in (Counter(status.refused_events) + self._unreadable).items():
            refused.add_metric([model["model"], code], count)
        yield refused
        yield _counter("cotune_feedback_duplicates", "Events sent again.", model, status.duplicates)
        yield _gauge(
            "cotune_feedback_responses", "Responses that can be rated.", model,
            status.recorded_responses,
        )  # fmt: skip
        yield _gauge(
            "cotune_feedback_connections", "Feedback WebSockets.", {}, self.feedback_connections
        )

    def _learning(self) -> Iterator[Metric]:
        """Did it learn, and is it better? What is not known yet has no sample."""
        adapters = self._runtime.learning().adapters
        pairs = GaugeMetricFamily(
            "cotune_pairs", "Preference pairs and rated answers.", labels=["adapter", "state"]
        )
        candidates = CounterMetricFamily(
            "cotune_candidates",
            "Candidates that passed the gate, or were refused for a reason.",
            labels=["adapter", "outcome", "reason"],
        )
        win_rate = GaugeMetricFamily(
            "cotune_win_rate",
            "Share of held-out pairs that the live version, or the base model, gets right.",
            labels=["adapter", "weights"],
        )
        for adapter in adapters:
            name = adapter.adapter
            for state, count in adapter.pairs.items():
                pairs.add_metric([name, state], count)
            candidates.add_metric([name, "passed", ""], adapter.candidates_passed)
            for reason, count in adapter.candidates_refused.items():
                candidates.add_metric([name, "refused", reason], count)
            for weights, share in (("live", adapter.win_rate), ("base", adapter.base_win_rate)):
                if share is not None:
                    win_rate.add_metric([name, weights], share)
        yield pairs
        yield candidates
        yield win_rate
        for name, text, field in (
            ("cotune_training_tokens", "Tokens trained on.", "tokens_trained"),
            ("cotune_training_steps", "Optimizer steps.", "steps"),
        ):
            counter = CounterMetricFamily(name, text, labels=["adapter"])
            for adapter in adapters:
                counter.add_metric([adapter.adapter], getattr(adapter, field))
            yield counter
        for name, text, field in (
            ("cotune_training_loss", "Loss of the last step.", "loss"),
            ("cotune_training_margin", "Chosen minus rejected implicit reward.", "margin"),
            ("cotune_training_reward_accuracy", "Share of pairs with a margin above 0.",
             "reward_accuracy"),
            ("cotune_training_gradient_norm", "Before clipping.", "gradient_norm"),
            ("cotune_training_learning_rate", "Of the last step.", "learning_rate"),
            ("cotune_live_version", "What requests get; 0 is the base model.", "live_version"),
            ("cotune_live_version_age_seconds", "For how long they have.", "live_age_s"),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(name, text, labels=["adapter"])
            for adapter in adapters:
                if (value := getattr(adapter, field)) is not None:
                    gauge.add_metric([adapter.adapter], value)
            yield gauge

    def _as_vllm(self) -> Iterator[Metric]:
        """The same under the names (and with the label) that vLLM has."""
        statistics = self._runtime.statistics()
        cache = statistics.cache
        model = {"model_name": self._runtime.served_name}
        usage = cache.owned_pages / cache.total_pages if cache.total_pages else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences that hold pages.", statistics.running),
            ("num_requests_waiting", "Sequences in the queue.", statistics.waiting),
            ("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", usage),
            ("gpu_cache_usage_perc", "The same under its older name.", usage),
        ):
            yield _gauge(f"vllm:{name}", text, model, value)
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", statistics.prompt_tokens),
            ("generation_tokens", "Tokens generated.", statistics.generated_tokens),
            ("num_preemptions", "Times a running sequence lost its pages.",
             statistics.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.",
             cache.queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", cache.hit_tokens),
        ):  # fmt: skip
            yield _counter(f"vllm:{name}", text, model, count)
        success = CounterMetricFamily(
            "vllm:request_success", "Completions that ended.",
            labels=["model_name", "finished_reason"],
        )  # fmt: skip
        by_reason: Counter[str] = Counter()
        for (_, reason), count in self._finished.items():
            by_reason[reason] += count
        # All reasons from the start on, so that rates begin at zero.
        for reason in ("stop", "length", "abort", "error"):
            success.add_metric([self._runtime.served_name, reason], by_reason[reason])
        yield success
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self._first_token),
            ("inter_token_latency_seconds", "Gap between successive tokens.", self._token_gap),
            ("time_per_output_token_seconds", "The same under its older name.", self._token_gap),
            ("request_time_per_output_token_seconds", "Mean gap of a completion.", self._mean_gap),
            ("e2e_request_latency_seconds", "Arrival to finish.", self._e2e),
            ("request_queue_time_seconds", "Arrival to first scheduled.", self._queue),
            ("request_prompt_tokens", "Prompt tokens of a completion.", self._prompt_tokens),
            ("request_generation_tokens", "Tokens of a completion.", self._answer_tokens),
        ):
            yield _histogram(f"vllm:{name}", text, model, histogram)


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _histogram(name: str, text: str, labels: Mapping[str, str], histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=list(labels))
    histogram.add_to(family, list(labels.values()))
    return family
