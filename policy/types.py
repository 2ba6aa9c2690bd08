"""What a policy sees and what it answers: frozen values between the engine and its decisions.

    engine ── Observation ──► policy.plan ── IterationPlan ──► engine

A sequence has no phase, only a lag: tokens known minus tokens computed. A prompt that has just come
has a lag of its length, one that prefills in chunks less each time, and a decoding sequence a lag
of one: the token sampled last. Keys are the engine's own numbers for sequences.

Training is offered in quanta: each learner that has a batch under way, or could begin one, offers
its next quantum. A plan starts at most one, and says whether the one on the lane gives way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable  # noqa: TC003 - NamedTuple fields are inspected at run time
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

from .costs import Costs  # noqa: TC001 - as above

RequestClass: TypeAlias = Literal["interactive", "batch"]
"""Whether somebody waits for each token, or for the whole answer some time."""

PRIORITY_STEP_S = 60.0
"""Seconds of waiting that one level of priority is worth.

A request is overtaken by one of the next better level only if that comes within this time, so no
stream of urgent requests, however long, can keep an ordinary one out for ever.
"""

BATCH_STEP_S = 30.0
"""Seconds of waiting by which a request of class "batch" stands behind an interactive one."""


def rank_s(priority: int, arrival_s: float, request_class: RequestClass = "interactive") -> float:
    """The place of a request among the others; smaller goes first.

    Both that have waited equally long: the lower `priority` first (as in vLLM), and the interactive
    one before the batch one. Equal priorities: first come, first served. The order of two requests
    never changes while they wait.
    """
    later_s = BATCH_STEP_S if request_class == "batch" else 0.0
    return arrival_s + priority * PRIORITY_STEP_S + later_s


class RunningView(NamedTuple):
    """A sequence that holds pages."""

    key: int
    computed: int
    """Tokens whose KV is in its pages."""
    known: int
    """Tokens of prompt and answer so far; more than `computed`."""
    pages: int
    """Pages in its block table; they may cover fewer than `known` tokens."""
    private_pages: int
    """Pages that would become available if it gave way, as far as the engine knows."""
    is_background: bool = False
    """Nobody waits for it: work of the runtime's own, such as scoring feedback."""
    due_s: float = math.inf
    """When its next token is due: the last one plus the TBT target, or, before the first, arrival
    plus the TTFT target. Infinite where there is no target: class "batch", background."""
    rank_s: float = 0.0
    """See `rank_s`."""


class WaitingView(NamedTuple):
    """A sequence that holds nothing yet, or no longer (preempted)."""

    key: int
    rank_s: float
    known: int
    """Tokens of its prompt, and of its answer if it ran before."""
    cached: int
    """Tokens that are likely to be found in the prefix trie."""
    adapter: Hashable | None
    """The adapter version that it needs a slot for; None for the base model."""
    is_background: bool = False
    """See `RunningView`."""
    due_s: float = math.inf
    """See `RunningView`."""
    coming: int = 0
    """Tokens of its prompt, from the first on, that a running prefill is about to compute: more
    than `cached` where waiting for it would save work; else 0."""
    arrival_s: float = 0.0
    """When it came."""
    idle_pages: int = 0
    """Of the pages of `cached`, those that nobody reads. They are among the available ones until
    this sequence starts."""


class Budgets(NamedTuple):
    """What no iteration may exceed. Set at start."""

    tokens: int
    """Tokens computed in one iteration."""
    sequences: int
    """Sequences that run at once."""
    page_size: int
    """Token slots per page."""
    background_tokens: int = 64
    """Of `tokens`, most that background prompts may have while anybody waits for an answer."""
    ttft_s: float = math.inf
    """Target for the time to first token of interactive requests, in seconds."""
    tbt_s: float = math.inf
    """Target for the time between tokens of interactive requests, in seconds."""


class MemoryView(NamedTuple):
    """Live memory, in bytes. What is new in an iteration must stay under `threshold`."""

    threshold: int
    """τ_mem: what may be taken beyond what is held now. Zero or less: nothing more."""
    total: int
    """Of the device."""
    page: int
    """What the KV page of a sequence takes from the device when it is used for the first time;
    0 where all pages were paid for at start."""
    unused_pages: int = 0
    """Of the available pages, those that were never used: to use them takes memory."""
    training_token: float = 0.0
    """What each row of a training quantum takes while its graph lives, as measured."""
    prefill_token: float = 0.0
    """What each token of an iteration takes while it runs, as measured."""
    returned_pages: int = 0
    """Of the available pages, those that were used and are free again: taken first, for nothing.
    Those of prefixes that are kept are taken last."""
    kept_back_pages: int = 0
    """Free pages that are not among the available ones, for want of memory."""


QuantumKind: TypeAlias = Literal["kl", "forward", "backward", "step"]


class TrainingOffer(NamedTuple):
    """The next quantum of one learner. It runs when a plan starts it."""

    key: int
    """The learner's number."""
    kind: QuantumKind
    tokens: int
    """Rows that it computes unless it is cut; 0 for a step."""
    samples: int
    """Samples that those rows belong to."""
    since_s: float
    """Since when the learner waits for this quantum."""
    loss: float
    """L_DPO of the batch: mean loss of its samples when they were last trained on, in nats; ln 2
    (beta times no margin) for a sample that never was."""
    signal: float
    """Learnability of the batch in [0, 1]; see `cotune.policy.learnability`."""
    is_begun: bool
    """Whether the batch has begun: memory is held for it, and its step is still to come."""


class RunningQuantum(NamedTuple):
    """The quantum that is on the training lane."""

    key: int
    kind: QuantumKind
    tokens: int
    started_s: float
    is_held: bool
    """Whether it is told to wait at its next safepoint."""
    held_s: float = 0.0
    """For how long it has waited so far, in seconds."""
    is_begun: bool = True
    """Whether its step is still to come after it; False for the step itself."""


class TrainingView(NamedTuple):
    """What the training lane does and what it could do."""

    offers: tuple[TrainingOffer, ...] = ()
    """In order of `since_s`."""
    running: RunningQuantum | None = None
    """None: the lane is free."""
    share: float = 0.0
    """Share of the recent past in which the lane worked and was not held, in [0, 1]."""
    idle_since_s: float = 0.0
    """When the lane last finished or was told to wait: since then, training starves."""


class Observation(NamedTuple):
    """The state of the engine between two iterations."""

    now_s: float
    budgets: Budgets
    available_pages: int
    """Pages that are free, or hold prefixes that nobody uses."""
    running: tuple[RunningView, ...]
    """In order of rank."""
    waiting: tuple[WaitingView, ...]
    """In order of rank."""
    adapters_in_use: frozenset[Hashable] = frozenset()
    """Adapter versions whose slots running sequences use."""
    free_adapter_slots: int = 0
    """Adapter slots without a user."""
    training: TrainingView | None = None
    """None: nothing learns here."""
    costs: Costs | None = None
    """What work costs here, as measured; None: not known yet."""
    memory: MemoryView | None = None
    """None: it is not watched."""


class Chunk(NamedTuple):
    """So many of a sequence's next tokens."""

    key: int
    tokens: int


class TrainingPlan(NamedTuple):
    """What the training lane does while the iteration runs."""

    start: int | None = None
    """The offer whose quantum starts now, beside the iteration. Only where the lane is free."""
    max_tokens: int = 0
    """Most rows that the quantum may compute (it holds one sample at least); 0: as offered."""
    hold: bool = False
    """Whether the quantum that is on the lane, or starts now, waits at its safepoints until a later
    plan lets it go on."""
    again_s: float | None = None
    """Plan again after this many seconds although nothing has happened: an offer waits for a time.
    None: only when something happens. Matters where no iteration runs."""


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration. The engine carries out the fields in this order.

    Attributes:
        preemptions: running sequences that give up their pages and wait again.
        decodes: running sequences with a lag of one, which get their next token.
        prefills: running sequences whose prompt goes on.
        admissions: waiting sequences that start, with their first chunk.
        training: what runs beside them.
        is_pause: nothing of the above runs although there are sequences: they wait until the
            quantum that is on the lane, or starts now, has finished. Only where there is one.
    """

    preemptions: tuple[int, ...] = ()
    decodes: tuple[int, ...] = ()
    prefills: tuple[Chunk, ...] = ()
    admissions: tuple[Chunk, ...] = ()
    training: TrainingPlan = TrainingPlan()  # noqa: RUF009 - it is immutable
    is_pause: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that the iteration computes."""
        return (
            len(self.decodes)
            + sum(chunk.tokens for chunk in self.prefills)
            + sum(chunk.tokens for chunk in self.admissions)
        )


class Policy(Protocol):
    """Decides what the next iteration holds."""

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration. Pure: the same observation gives the same plan."""
