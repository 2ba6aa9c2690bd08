"""Serving and training in virtual time: the engine's own policies, a cost model as the device.

    requests ─► queue ─► plan ─► iteration: costs.iteration_s ─┬─ tokens at its end ─► plan ...
                          │                                    │
    samples ─► batches ───┴────► quantum: costs.quantum_s ─────┘  beside it, each slowing the other

What decides about times is the real thing: the policy object, the page manager with its prefix trie
and the busy clock of the training lane. It does what `runtime.engine` does: the order of the
waiting and the running, what is looked up in the cache and when, pages for every known token, who
gives way, one iteration at a time.

    simulation_sequences   who waits and who runs, and their pages
    simulation_device      how long things take, and the clock
    simulation_training    the learner and its lane
    simulation_types       settings and results

Where nothing waits and nothing can be trained, every policy plans the same iteration again until a
request ends, comes or needs a page that is not there: decodes are never displaced. Such a stretch
is run in one go, with the same sums in the same order; the results are bit for bit those of the
slow way.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Final

from ..policy.costs import IterationShape, chunk_attention
from ..policy.types import Observation
from ..runtime.waiting import MAX_PLANS
from .simulation_device import SimulatedDevice
from .simulation_sequences import SequenceTable
from .simulation_training import TrainingLane, reference_request
from .simulation_types import Outcome, SimulationError, SimulationResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..policy.costs import Costs
    from ..policy.types import IterationPlan, Policy
    from .coserve_log import LoggedSample
    from .simulation_device import LearningCosts
    from .simulation_sequences import SimulatedSequence
    from .simulation_types import SimulationSettings
    from .traces import TraceRequest

PROGRESS_ITERATIONS: Final = 500


class Simulation:
    """One run of one policy. Make it, `run` it once.

    Args:
        requests: in order of arrival.
        policy: decides.
        costs: of the device.
        settings: everything else.
        samples: that become ready to train on, in order of arrival.
        beliefs: what the policy is told of costs, learned on the way; None: the truth.
        progress: is told the virtual time now and then.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        policy: Policy,
        costs: Costs,
        settings: SimulationSettings,
        *,
        samples: Sequence[LoggedSample] = (),
        beliefs: LearningCosts | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._requests = requests
        self._policy = policy
        self._settings = settings
        self._budgets = settings.budgets
        self._samples = samples
        self._progress = progress
        self._table = SequenceTable(
            settings.budgets,
            settings.pages,
            is_sharing=any(request.segments for request in requests),
        )
        self._lane = (
            None
            if settings.training is None
            else TrainingLane(settings.training, settings.loss, settings.signal)
        )
        self._device = SimulatedDevice(costs, settings, self._lane, beliefs)
        self._learns_costs = beliefs is not None

        self._next_request = 0
        self._next_sample = 0
        self._unfinished = sum(not request.is_background for request in requests)
        self._outcomes: list[Outcome] = []
        self._iterations = 0
        self._plans = 0
        self._batch_tokens = 0
        self._decode_tokens = 0
        self._pauses = 0
        self._last_end_s = 0.0

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return self._device.now_s

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> SimulationResult:
        """Run until every request has ended.

        Raises:
            SimulationError: the policy leaves somebody waiting for ever, or names unknown keys.
        """
        lane, table = self._lane, self._table
        while self._unfinished:
            self._take_arrivals()
            if not table and (lane is None or not lane.has_work):
                self._wait(None)
                continue
            if self._forward():
                continue
            self._plans += 1
            plan = self._plan()
            corrections = table.corrections
            steps, shape = self._prepare(plan)
            self._device.train(plan.training, beside_iteration=bool(steps))
            if steps:
                self._iterate(steps, shape)
            elif not table:
                self._wait(plan.training.again_s)
            elif plan.is_pause and lane is not None and lane.is_active:
                self._pauses += 1
                self._wait(plan.training.again_s)
            elif not plan.preemptions and table.corrections == corrections:
                raise SimulationError(
                    f"at {self.now_s:.3f} s the policy plans nothing for {len(table.running)} "
                    f"running and {len(table.waiting)} waiting sequences; this is a fault of it"
                )
        return self._result()

    def _plan(self) -> IterationPlan:
        """What the policy wants, once it knows what those that it lets in would find cached."""
        plans = 0
        while True:
            plan = self._policy.plan(self._observe())
            plans += 1
            chosen = [self._table.known(chunk.key) for chunk in plan.admissions]
            if not self._table.check(chosen) or plans == MAX_PLANS:
                return plan

    def _take_arrivals(self) -> None:
        """Queue what has come by now."""
        now_s = self.now_s
        requests = self._requests
        while (
            self._next_request < len(requests) and requests[self._next_request].arrival_s <= now_s
        ):
            self._submit(requests[self._next_request], None)
            self._next_request += 1
        lane = self._lane
        if lane is None:
            return
        samples = self._samples
        while self._next_sample < len(samples) and samples[self._next_sample].arrival_s <= now_s:
            sample = samples[self._next_sample]
            self._next_sample += 1
            if self._settings.references and sample.tokens <= self._table.longest:
                self._submit(reference_request(sample), sample)
            else:
                lane.add_sample(sample.tokens, max(sample.arrival_s, 0.0))
        lane.refresh(now_s)

    def _submit(self, request: TraceRequest, sample: LoggedSample | None) -> None:
        """Take a request, or refuse it."""
        table = self._table
        refusal = None
        if request.prompt_tokens + request.output_tokens > table.longest:
            refusal = "too_long"
        elif table.unstarted >= self._settings.max_queue and not request.is_background:
            refusal = "queue_full"
        if refusal is not None:
            outcome = Outcome(request, refusal=refusal)
            if not request.is_background:
                self._outcomes.append(outcome)
                self._unfinished -= 1
            return
        is_awaited = not request.is_background and request.request_class == "interactive"
        due_s = request.arrival_s + self._budgets.ttft_s if is_awaited else math.inf
        seq = table.add(request, due_s, sample)
        if not request.is_background:
            self._outcomes.append(seq.outcome)

    def _observe(self) -> Observation:
        """What the engine would show the policy."""
        table, lane, now_s = self._table, self._lane, self.now_s
        table.refresh_hints()
        return Observation(
            now_s,
            self._budgets,
            table.available_pages,
            table.running_views(),
            tuple(table.views),
            training=None if lane is None else lane.view(now_s),
            costs=self._device.believed_costs,
        )

    # -- carrying out ----------------------------------------------------------------------------

    def _prepare(
        self, plan: IterationPlan
    ) -> tuple[list[tuple[SimulatedSequence, int]], IterationShape]:
        """Pages and places for what was planned; who takes part with how many tokens."""
        table = self._table
        for key in plan.preemptions:
            table.preempt(table.known(key))
        steps: list[tuple[SimulatedSequence, int]] = []
        context = 0
        for key in plan.decodes:
            seq = table.known(key)
            if table.reserve(seq, seq.known):
                context += seq.known
                steps.append((seq, 1))
        decodes = len(steps)
        for chunk in plan.prefills:
            seq = table.known(chunk.key)
            if table.reserve(seq, seq.known):
                steps.append((seq, min(chunk.tokens, seq.known - seq.computed)))
        for chunk in plan.admissions:
            seq = table.known(chunk.key)
            if table.start(seq):
                steps.append((seq, min(chunk.tokens, seq.known - seq.computed)))
        chunks = prefill = attention = 0
        for seq, tokens in steps[decodes:]:
            if tokens == 1:  # to the device it is as a decode is
                decodes += 1
                context += seq.computed + 1
            else:
                chunks += 1
                prefill += tokens
                attention += chunk_attention(tokens, seq.computed)
        return steps, IterationShape(decodes, context, prefill, attention, chunks)

    def _iterate(self, steps: list[tuple[SimulatedSequence, int]], shape: IterationShape) -> None:
        """Run an iteration, with what is on the training lane beside it."""
        device = self._device
        device.iterate(shape)
        self._iterations += 1
        self._batch_tokens += shape.decodes + shape.prefill_tokens
        self._decode_tokens += shape.decodes
        self._commit(steps, device.now_s)
        device.pass_overhead()
        if self._progress is not None and not self._iterations % PROGRESS_ITERATIONS:
            self._progress(device.now_s)

    def _commit(self, steps: list[tuple[SimulatedSequence, int]], now_s: float) -> None:
        """The iteration has ended: tokens are known, full pages can be shared, some have ended."""
        table = self._table
        tbt_s = self._budgets.tbt_s
        for seq, tokens in steps:
            table.compute(seq, tokens)
            if seq.computed < seq.known:
                continue
            if seq.output:
                seq.take_token(now_s)
                if seq.due_s != math.inf:
                    seq.due_s = now_s + tbt_s
            if seq.generated >= seq.output:
                self._finish(seq, now_s)

    def _finish(self, seq: SimulatedSequence, now_s: float) -> None:
        self._table.remove(seq)
        seq.outcome.ended_s = now_s
        if seq.sample is not None:
            assert self._lane is not None
            self._lane.add_sample(seq.sample.tokens, now_s)
        if not seq.request.is_background:
            self._unfinished -= 1
            self._last_end_s = now_s

    # -- time in which nothing is decided --------------------------------------------------------

    def _wait(self, again_s: float | None) -> None:
        """Until there is something to plan for, or so many seconds have passed."""
        device = self._device
        until_s = min(self._next_event_s(), device.quantum_ends_s)
        if again_s is not None:
            until_s = min(until_s, device.now_s + again_s)
        assert until_s < math.inf, "requests are missing, so one will come"
        device.wait_until(max(until_s, device.now_s))

    def _next_event_s(self) -> float:
        """When the next request or sample comes, or a batch has waited long enough."""
        event_s = math.inf
        if self._next_request < len(self._requests):
            event_s = self._requests[self._next_request].arrival_s
        lane = self._lane
        if lane is not None:
            if self._next_sample < len(self._samples):
                event_s = min(event_s, self._samples[self._next_sample].arrival_s)
            event_s = min(event_s, lane.ready_s)
        return event_s

    def _forward(self) -> bool:
        """Run a stretch of equal iterations in one go. False: there is none, or a short one."""
        table = self._table
        running = table.running
        if (
            not self._settings.fast_forward
            or table.waiting
            or not running
            or self._learns_costs
            or (self._lane is not None and self._lane.has_work)
        ):
            return False
        count = 1 << 30
        context = 0
        for seq in running:
            if seq.known - seq.computed != 1 or seq.output == 0:
                return False
            context += seq.known
            count = min(count, seq.output - seq.generated)
        while count > 1 and not table.can_grow(count):
            count //= 2
        if count < 2:
            return False
        decodes = len(running)
        ends_s = self._device.decode(decodes, context, count, self._next_event_s())
        count = len(ends_s)
        self._iterations += count
        self._batch_tokens += count * decodes
        self._decode_tokens += count * decodes
        gaps = array("d", [after - before for before, after in zip(ends_s, ends_s[1:])])  # noqa: B905, RUF007 - hot
        for seq in running:
            has_room = table.reserve(seq, seq.known + count - 1)
            assert has_room
            if count > 1:
                seq.take_token(ends_s[0])
                seq.outcome.gaps_s.extend(gaps[:-1])
                seq.generated += count - 2
                seq.known += count - 2
                seq.computed += count - 1
                seq.last_s = ends_s[-2]
        self._commit([(seq, 1) for seq in running], ends_s[-1])
        if self._progress is not None:
            self._progress(self.now_s)
        return True

    # -- afterwards ------------------------------------------------------------------------------

    def _result(self) -> SimulationResult:
        table, lane, device = self._table, self._lane, self._device
        if not table:
            table.check_pages()
        cache = table.statistics()
        end_s = max(self._last_end_s, device.now_s)
        return SimulationResult(
            outcomes=tuple(self._outcomes),
            duration_s=self._last_end_s,
            iterations=self._iterations,
            plans=self._plans,
            batch_tokens=self._batch_tokens,
            decode_tokens=self._decode_tokens,
            busy_s=device.busy_s,
            preemptions=table.preemptions,
            evicted_pages=cache.evicted_pages,
            hit_tokens=cache.hit_tokens * self._budgets.page_size,
            steps=lane.steps if lane else 0,
            trained_tokens=lane.trained_tokens if lane else 0,
            trained_samples=lane.trained_samples if lane else 0,
            quanta=lane.quanta if lane else 0,
            training_s=lane.active.total_s(end_s) if lane else 0.0,
            training_alone_s=lane.alone_s if lane else 0.0,
            held_s=lane.held_s(end_s) if lane else 0.0,
            arrived_samples=len(self._samples) if lane else 0,
            arrived_tokens=sum(sample.tokens for sample in self._samples) if lane else 0,
            pauses=self._pauses,
        )
