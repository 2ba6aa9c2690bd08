"""What /metrics says: one server's numbers in Prometheus text.

Names that begin with ``cotune_`` are ours. The ``vllm:`` names carry the same measurements for
dashboards that already parse them. Counters and gauges are read from the runtime when Prometheus
asks; only latencies are gathered on the way, at the cost of one bisection each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from .. import __version__
from ..runtime.scheduling.statistics import DECISION_BUCKETS_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client import Metric

    from ..runtime.types import Response
    from .backend import Backend

T = TypeVar("T")
Sample: TypeAlias = tuple[Sequence[str], T]
"""Values of a family's labels, and what is measured of that."""
Maker: TypeAlias = Callable[[str, str, Sequence[str], Iterable[Sample[T]]], "Metric"]
"""Makes a family of its name, text, labels and samples."""

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

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Report a sample."""
        family.add_metric(labels, _cumulative(self._buckets, self._counts), self._sum)


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
        version = {"version": __version__}
        yield _one(_gauge, "cotune_build_info", "The version that runs.", version, 1)
        yield from _each(
            _gauge,
            model,
            ("cotune_ready", "1 while requests are taken.", int(self._runtime.is_ready)),
            ("cotune_running", "Sequences that hold pages.", statistics.running),
            ("cotune_waiting", "Sequences in the queue.", statistics.waiting),
        )
        pages = {"free": cache.free_pages, "cached": cache.cached_pages, "owned": cache.owned_pages}
        yield _gauge("cotune_kv_pages", "KV pages by state.", ["state"], _by_one(pages))
        yield from _each(
            _counter, model,
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
        )  # fmt: skip
        seconds = {
            part: getattr(statistics, f"{part}_s")
            for part in ("forward", "sample", "plan", "commit", "deliver")
        }
        yield _counter(
            "cotune_engine_seconds", "Where the engine's time went.", ["part"], _by_one(seconds)
        )
        yield _counter(
            "cotune_finished", "Completions that ended.", ["model", "finish_reason"],
            self._finished.items(),
        )  # fmt: skip
        yield _counter(
            "cotune_rejected", "Requests that were not admitted.", ["reason"],
            _by_one(self._rejected),
        )  # fmt: skip
        yield from _each(
            _histogram,
            model,
            ("cotune_ttft_seconds", "Arrival to first token.", self._first_token),
            ("cotune_tbt_seconds", "Gap between successive tokens.", self._token_gap),
            ("cotune_e2e_seconds", "Arrival to finish.", self._e2e),
            ("cotune_queue_seconds", "Arrival to first scheduled.", self._queue),
        )
        yield _counter(
            "cotune_http_requests", "HTTP requests; status 499 where the client left.",
            ["method", "route", "status"],
            (((*place, str(status)), count) for (*place, status), count in self._http.items()),
        )  # fmt: skip
        yield _one(
            _gauge, "cotune_http_paused_streams", "Streams that wait for a slow reader.", {},
            self.paused_streams,
        )  # fmt: skip
        yield _histogram(
            "cotune_http_seconds", "HTTP request to end of answer.", ["route"],
            _by_one(self._http_seconds),
        )  # fmt: skip

    def _schedule(self) -> Iterator[Metric]:
        """How iterations are planned, and what became of the plans."""
        known = self._runtime.statistics().schedule
        name = self._runtime.served_name
        model = {"model": name}
        policy = {**model, "policy": known.policy}
        yield _one(_gauge, "cotune_policy_info", "The policy that decides.", policy, 1)
        decisions = HistogramMetricFamily(
            "cotune_decision_seconds", "Observing and deciding.", labels=list(model)
        )
        counts = _cumulative(DECISION_BUCKETS_S, known.decision_counts)
        decisions.add_metric([name], counts, known.decision_s)
        yield decisions
        yield from _each(
            _gauge, model,
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
        )  # fmt: skip
        errors = {"0.5": known.prediction_error_p50, "0.95": known.prediction_error_p95}
        yield _gauge(
            "cotune_prediction_error",
            "How far predictions of recent iterations were off, as a share of the time measured.",
            ["model", "quantile"], _by_one(errors, name),
        )  # fmt: skip
        yield _gauge(
            "cotune_slack_seconds",
            "Time until the next token was due when recent iterations began.",
            ["model", "quantile"], _by_one({"0.05": known.slack_p5_s}, name),
        )  # fmt: skip
        yield from _each(
            _counter, model,
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
        )  # fmt: skip
        yield _counter(
            "cotune_quanta", "Training quanta that ended.", ["model", "kind"],
            _by_one(known.quanta, name),
        )  # fmt: skip
        yield _counter(
            "cotune_quantum_seconds", "What they took without the time held.", ["model", "kind"],
            _by_one(known.quantum_s, name),
        )  # fmt: skip
        yield _counter(
            "cotune_training_job_seconds", "Other work on the training lane.", ["model", "kind"],
            _by_one(known.job_s, name),
        )  # fmt: skip

    def _feedback(self) -> Iterator[Metric]:
        """What came in. Events are those that are stored, so that deletion lowers their number."""
        status = self._runtime.learning()
        name = self._runtime.served_name
        model = {"model": name}
        refused = Counter(status.refused_events) + self._unreadable
        yield _counter(
            "cotune_feedback_events", "Feedback events that are stored.", ["model", "type"],
            _by_one(status.events, name),
        )  # fmt: skip
        yield _counter(
            "cotune_feedback_refused", "Feedback that was not taken.", ["model", "code"],
            _by_one(refused, name),
        )  # fmt: skip
        yield _one(
            _counter, "cotune_feedback_duplicates", "Events sent again.", model, status.duplicates
        )
        yield _one(
            _gauge, "cotune_feedback_responses", "Responses that can be rated.", model,
            status.recorded_responses,
        )  # fmt: skip
        yield _one(
            _gauge, "cotune_feedback_connections", "Feedback WebSockets.", {},
            self.feedback_connections,
        )  # fmt: skip

    def _learning(self) -> Iterator[Metric]:
        """Did it learn, and is it better? What is not known yet has no sample."""
        adapters = self._runtime.learning().adapters
        pairs: list[Sample[float]] = []
        candidates: list[Sample[float]] = []
        win_rates: list[Sample[float | None]] = []
        for adapter in adapters:
            name = adapter.adapter
            pairs += _by_one(adapter.pairs, name)
            candidates.append(((name, "passed", ""), adapter.candidates_passed))
            candidates += _by_one(adapter.candidates_refused, name, "refused")
            candidates += _by_one(adapter.candidates_undecided, name, "undecided")
            win_rates.append(((name, "live"), adapter.win_rate))
            win_rates.append(((name, "base"), adapter.base_win_rate))
        yield _gauge(
            "cotune_pairs", "Preference pairs and rated answers.", ["adapter", "state"], pairs
        )
        yield _counter(
            "cotune_candidates",
            "Candidates that passed the gate, were refused or left undecided; reasons joined by +.",
            ["adapter", "outcome", "reason"], candidates,
        )  # fmt: skip
        yield _gauge(
            "cotune_win_rate",
            "Share of held-out pairs that the live version, or the base model, gets right.",
            ["adapter", "weights"], win_rates,
        )  # fmt: skip
        for make, name, text, field in (
            (_counter, "cotune_training_tokens", "Tokens trained on.", "tokens_trained"),
            (_counter, "cotune_training_steps", "Optimizer steps.", "steps"),
            (_counter, "cotune_training_set_downs", "Times that training gave its memory up.",
             "set_downs"),
            (_gauge, "cotune_training_loss", "Loss of the last step.", "loss"),
            (_gauge, "cotune_training_margin", "Chosen minus rejected implicit reward.", "margin"),
            (_gauge, "cotune_training_reward_accuracy", "Share of pairs with a margin above 0.",
             "reward_accuracy"),
            (_gauge, "cotune_training_gradient_norm", "Before clipping.", "gradient_norm"),
            (_gauge, "cotune_training_learning_rate", "Of the last step.", "learning_rate"),
            (_gauge, "cotune_live_version", "What requests get; 0 is the base model.",
             "live_version"),
            (_gauge, "cotune_live_version_age_seconds", "For how long they have.", "live_age_s"),
        ):  # fmt: skip
            by_adapter = {adapter.adapter: getattr(adapter, field) for adapter in adapters}
            yield make(name, text, ["adapter"], _by_one(by_adapter))

    def _as_vllm(self) -> Iterator[Metric]:
        """The same under the names (and with the label) that vLLM has."""
        statistics = self._runtime.statistics()
        cache = statistics.cache
        name = self._runtime.served_name
        model = {"model_name": name}
        usage = cache.owned_pages / cache.total_pages if cache.total_pages else 0.0
        yield from _each(
            _gauge,
            model,
            ("vllm:num_requests_running", "Sequences that hold pages.", statistics.running),
            ("vllm:num_requests_waiting", "Sequences in the queue.", statistics.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", usage),
            ("vllm:gpu_cache_usage_perc", "The same under its older name.", usage),
        )
        yield from _each(
            _counter, model,
            ("vllm:prompt_tokens", "Prompt tokens of admitted requests.",
             statistics.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", statistics.generated_tokens),
            ("vllm:num_preemptions", "Times a running sequence lost its pages.",
             statistics.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.",
             cache.queried_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.",
             cache.hit_tokens),
        )  # fmt: skip
        by_reason: Counter[str] = Counter()
        for (_, reason), count in self._finished.items():
            by_reason[reason] += count
        # All reasons from the start on, so that rates begin at zero.
        shown = {reason: by_reason[reason] for reason in ("stop", "length", "abort", "error")}
        yield _counter(
            "vllm:request_success", "Completions that ended.", ["model_name", "finished_reason"],
            _by_one(shown, name),
        )  # fmt: skip
        yield from _each(
            _histogram, model,
            ("vllm:time_to_first_token_seconds", "Arrival to first token.", self._first_token),
            ("vllm:inter_token_latency_seconds", "Gap between successive tokens.",
             self._token_gap),
            ("vllm:time_per_output_token_seconds", "The same under its older name.",
             self._token_gap),
            ("vllm:request_time_per_output_token_seconds", "Mean gap of a completion.",
             self._mean_gap),
            ("vllm:e2e_request_latency_seconds", "Arrival to finish.", self._e2e),
            ("vllm:request_queue_time_seconds", "Arrival to first scheduled.", self._queue),
            ("vllm:request_prompt_tokens", "Prompt tokens of a completion.", self._prompt_tokens),
            ("vllm:request_generation_tokens", "Tokens of a completion.", self._answer_tokens),
        )  # fmt: skip


# -- families --------------------------------------------------------------------------------------


def _numbers(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    samples: Iterable[Sample[float | None]],
) -> Metric:
    """A family of counters or gauges; what is None has no sample."""
    family = kind(name, text, labels=labels)
    for values, number in samples:
        if number is not None:
            family.add_metric(values, number)
    return family


_counter = partial(_numbers, CounterMetricFamily)
_gauge = partial(_numbers, GaugeMetricFamily)


def _histogram(
    name: str, text: str, labels: Sequence[str], samples: Iterable[Sample[Histogram]]
) -> Metric:
    """A family of histograms."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in samples:
        histogram.add_to(family, values)
    return family


def _one(make: Maker[T], name: str, text: str, labels: Mapping[str, str], value: T) -> Metric:
    """A family of one sample."""
    return make(name, text, list(labels), [(list(labels.values()), value)])


def _each(
    make: Maker[T], labels: Mapping[str, str], *rows: tuple[str, str, T | None]
) -> Iterator[Metric]:
    """A family of one sample for each row: name, text, value. What is None has no family."""
    for name, text, value in rows:
        if value is not None:
            yield _one(make, name, text, labels, value)


def _by_one(found: Mapping[str, T], *before: str) -> Iterator[Sample[T]]:
    """A sample for each item; its key is the last label, behind those that are given."""
    for key, value in found.items():
        yield (*before, key), value


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Counts per bucket as Prometheus wants them: of all that is not above each bound."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))
