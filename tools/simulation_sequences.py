"""Requests on their way in virtual time: who waits, who runs, and which pages they hold.

    add ─► waiting, by rank ── start ─► running, by rank ── remove ─►
                 ▲                         │
                 └───────── preempt ───────┘

It keeps what `runtime.engine` keeps: the order of both, what those next in line would find in the
cache and when that is looked up again, pages for every known token. The page manager is the real
one.

A page's content is one number here: the path of segments that its last token ends, and its place.
The page manager, told that pages hold one token each, then shares exactly the pages that the
engine's would.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Final

from ..cache.manager import KVCacheManager
from ..policy.types import RunningView, WaitingView, rank_s
from .simulation_types import Outcome, SimulationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..cache.manager import CacheStatistics, SequencePages
    from ..policy.types import Budgets
    from .coserve_log import LoggedSample
    from .traces import TraceRequest

BACKGROUND_PRIORITY: Final = 10
"""As the runtime's own work has."""


class SimulatedSequence:
    """A request on its way.

    Args:
        number: names it to the policy.
        request: as it came.
        keys: of its pages, those of tokens to come included; empty: nothing is shared.
        due_s: when its next token is.
        sample: that can be trained on once this has ended; None: it is nobody's reference.
    """

    __slots__ = (
        "cached_pages",
        "computed",
        "due_s",
        "generated",
        "hint_epoch",
        "is_started",
        "keys",
        "known",
        "last_s",
        "number",
        "outcome",
        "output",
        "pages",
        "prompt",
        "rank_s",
        "recorded",
        "request",
        "sample",
    )

    def __init__(
        self,
        number: int,
        request: TraceRequest,
        keys: list[int],
        due_s: float,
        sample: LoggedSample | None,
    ) -> None:
        self.number = number
        self.request = request
        self.outcome = Outcome(request)
        self.prompt = request.prompt_tokens
        self.output = request.output_tokens
        self.known = request.prompt_tokens
        self.computed = 0
        self.generated = 0
        self.keys = keys
        priority = BACKGROUND_PRIORITY if request.is_background else 0
        self.rank_s = rank_s(priority, request.arrival_s, request.request_class)
        self.due_s = due_s
        self.last_s = request.arrival_s
        self.pages: SequencePages | None = None
        self.cached_pages = 0
        self.recorded = 0  # full pages that the trie was told of
        self.hint_epoch = -1
        self.is_started = False
        self.sample = sample

    def take_token(self, now_s: float) -> None:
        """A token was sampled."""
        if self.generated:
            self.outcome.gaps_s.append(now_s - self.last_s)
        else:
            self.outcome.ttft_s = now_s - self.request.arrival_s
        self.generated += 1
        self.known += 1
        self.last_s = now_s


class PageKeys:
    """A number for the content of each page: equal where two sequences agree so far."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._paths: dict[tuple[int, int], int] = {}
        self._next_path = 1

    def of(self, request: TraceRequest, tokens: int) -> list[int]:
        """The keys of all pages of a request, of so many tokens in the end."""
        size = self._page_size
        keys: list[int] = []
        path = 0
        for segment in request.segments:
            step = (path, segment.key)
            found = self._paths.get(step)
            if found is None:
                found = self._paths[step] = self._next_path
                self._next_path += 1
            path = found
            keys.extend(
                path << 24 | page for page in range(len(keys), min(segment.end, tokens) // size)
            )
        own = self._next_path
        self._next_path += 1
        keys.extend(own << 24 | page for page in range(len(keys), -(-tokens // size)))
        return keys


class SequenceTable:
    """The sequences that wait and run, and the cache that their pages are of.

    Args:
        budgets: of an iteration.
        pages: KV pages.
        is_sharing: whether prompts begin alike.

    Attributes:
        waiting, running: in order of rank; read only.
        views: of the waiting, as the policy sees them; read only.
        longest: most tokens of a sequence.
        unstarted: requests that wait for their first iteration, the runtime's own left out.
        preemptions: how many there were.
        corrections: how often a sequence that was to start found that its view was not true.
    """

    def __init__(self, budgets: Budgets, pages: int, *, is_sharing: bool) -> None:
        self._budgets = budgets
        self._page_size = budgets.page_size
        self._is_sharing = is_sharing
        # A page holds one "token" here: the number that stands for its content.
        self._cache = KVCacheManager(pages, 1, is_sharing)
        self._page_keys = PageKeys(budgets.page_size)
        self._sequences: dict[int, SimulatedSequence] = {}
        self._next_number = 0
        self._recorded = 0  # times that pages of prompts were
        self.waiting: list[SimulatedSequence] = []
        self.views: list[WaitingView] = []
        self.running: list[SimulatedSequence] = []
        self.longest = pages * budgets.page_size
        self.unstarted = 0
        self.preemptions = 0
        self.corrections = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def known(self, key: int) -> SimulatedSequence:
        """The sequence that a plan names.

        Raises:
            SimulationError: there is none.
        """
        try:
            return self._sequences[key]
        except KeyError:
            raise SimulationError(
                f"the policy planned for sequence {key}, which is not there; this is a fault of it"
            ) from None

    # -- coming and going ------------------------------------------------------------------------

    def add(
        self, request: TraceRequest, due_s: float, sample: LoggedSample | None
    ) -> SimulatedSequence:
        """Queue a request that fits; its first token is due at `due_s`."""
        total = request.prompt_tokens + request.output_tokens
        keys = self._page_keys.of(request, total) if self._is_sharing else []
        seq = SimulatedSequence(self._next_number, request, keys, due_s, sample)
        self._next_number += 1
        if not request.is_background:
            self.unstarted += 1
        self._sequences[seq.number] = seq
        self._enqueue(seq)
        return seq

    def start(self, seq: SimulatedSequence) -> bool:
        """Give a waiting sequence pages for all tokens it knows; False: there are none."""
        size = self._page_size
        needed = -(-seq.known // size)
        place = bisect_left(self.views, (seq.rank_s, seq.number), key=_order)
        assert self.waiting[place] is seq
        pages = self._cache.open(0, seq.keys[:needed])
        if not self._cache.reserve(pages, needed):
            self._cache.close(pages)
            before = self.views[place]
            seq.hint_epoch = -1
            self._look_up(place, seq, ())
            self.corrections += self.views[place] != before
            return False
        del self.waiting[place], self.views[place]
        insort(self.running, seq, key=_running_order)
        seq.pages = pages
        given = seq.request.cached_tokens
        if given is None:
            seq.cached_pages = pages.cached_tokens
            seq.computed = pages.cached_tokens * size
        else:  # its pages are its own here, though their content was found
            seq.cached_pages = 0
            seq.computed = min(given, seq.known - 1)
        seq.recorded = seq.cached_pages
        if not seq.is_started:
            seq.is_started = True
            seq.outcome.cached_tokens = seq.computed
            self.unstarted -= not seq.request.is_background
        return True

    def preempt(self, seq: SimulatedSequence) -> None:
        """Take a running sequence's pages back; it waits again."""
        self.preemptions += 1
        self._release(seq)
        seq.computed = 0
        if seq.generated and seq.due_s != math.inf:  # to be back as if it were its first token
            seq.due_s += self._budgets.ttft_s - self._budgets.tbt_s
        self._enqueue(seq)

    def remove(self, seq: SimulatedSequence) -> None:
        """A running sequence has ended."""
        self._release(seq)
        del self._sequences[seq.number]

    def _enqueue(self, seq: SimulatedSequence) -> None:
        cached = 0
        if seq.request.cached_tokens is not None:
            cached = min(seq.request.cached_tokens, seq.known - 1)
        view = WaitingView(
            seq.number,
            seq.rank_s,
            seq.known,
            cached,
            None,
            seq.request.is_background,
            seq.due_s,
            0,
            seq.request.arrival_s,
            cached // self._page_size,  # not read by anybody, for here it gets pages of its own
        )
        seq.hint_epoch = -1
        place = bisect_left(self.views, _order(view), key=_order)
        self.waiting.insert(place, seq)
        self.views.insert(place, view)

    def _release(self, seq: SimulatedSequence) -> None:
        assert seq.pages is not None
        self.running.remove(seq)
        self._cache.close(seq.pages)
        seq.pages = None

    # -- what the policy sees --------------------------------------------------------------------

    @property
    def available_pages(self) -> int:
        """Pages that can be given out, cached ones included."""
        return self._cache.available_pages

    def running_views(self) -> tuple[RunningView, ...]:
        """Of the running, as the policy sees them."""
        return tuple(
            [
                RunningView(
                    seq.number,
                    seq.computed,
                    seq.known,
                    len(seq.pages.block_table),  # type: ignore[union-attr]
                    len(seq.pages.block_table) - seq.cached_pages,  # type: ignore[union-attr]
                    seq.request.is_background,
                    seq.due_s,
                    seq.rank_s,
                )
                for seq in self.running
            ]
        )

    def refresh_hints(self) -> None:
        """Look up what those next in line would find cached, or would if they waited a little."""
        if not self._is_sharing or not self.waiting:
            return
        budgets = self._budgets
        seats = min(budgets.sequences, budgets.tokens) - len(self.running)
        tokens = budgets.tokens - len(self.running)
        prefilling = [seq for seq in self.running if seq.computed < seq.prompt and seq.keys]
        for index, seq in enumerate(self.waiting):
            if seats <= 0 or tokens <= 0:
                break
            self._look_up(index, seq, prefilling)
            view = self.views[index]
            if not view.coming:
                tokens -= view.known - view.cached
                seats -= 1

    def check(self, chosen: Iterable[SimulatedSequence]) -> bool:
        """Look up what these would find, who are to start, and those behind them.

        Whether it is not what was believed: then more may fit.
        """
        if not self._is_sharing:
            return False
        prefilling = [seq for seq in self.running if seq.computed < seq.prompt and seq.keys]
        is_other = False
        last = -1
        for seq in chosen:
            place = bisect_left(self.views, (seq.rank_s, seq.number), key=_order)
            last = max(last, place)
            before = self.views[place]
            self._look_up(place, seq, prefilling)
            is_other |= self.views[place] != before
        if is_other:
            for place in range(last + 1, min(last + 1 + self._budgets.sequences, len(self.views))):
                self._look_up(place, self.waiting[place], prefilling)
        return is_other

    def _look_up(
        self, index: int, seq: SimulatedSequence, prefilling: Iterable[SimulatedSequence]
    ) -> None:
        """Bring the view of one that waits up to date."""
        if not seq.keys:
            return
        view, size = self.views[index], self._page_size
        cached, idle_pages = view.cached, view.idle_pages
        now = self._recorded + self._cache.turnover
        if seq.hint_epoch != now:
            seq.hint_epoch = now
            found = self._cache.look_up(0, seq.keys[: -(-seq.known // size)])
            cached, idle_pages = size * found.tokens, found.idle_pages
        coming = 0
        for other in prefilling:
            shared = self._common_tokens(seq, other)
            is_heeded = seq.request.is_background or not other.request.is_background
            if is_heeded and other.computed < shared and shared > cached:
                coming = max(coming, shared)
        if (cached, idle_pages, coming) != (view.cached, view.idle_pages, view.coming):
            self.views[index] = view._replace(cached=cached, idle_pages=idle_pages, coming=coming)

    def _common_tokens(self, seq: SimulatedSequence, other: SimulatedSequence) -> int:
        """Tokens in full pages that `seq` could find once `other` has computed its prompt."""
        pages = min((seq.known - 1) // self._page_size, other.prompt // self._page_size)
        mine, theirs = seq.keys, other.keys
        if not pages or mine[0] != theirs[0]:
            return 0
        # Keys stand for whole prefixes: equal ones come first, so the border can be bisected.
        low, high = 1, pages
        while low < high:
            middle = (low + high + 1) // 2
            if mine[middle - 1] == theirs[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low * self._page_size

    # -- pages -----------------------------------------------------------------------------------

    def reserve(self, seq: SimulatedSequence, tokens: int) -> bool:
        """Have pages for so many tokens of a running sequence; False: there are none."""
        assert seq.pages is not None
        return self._cache.reserve(seq.pages, -(-tokens // self._page_size))

    def compute(self, seq: SimulatedSequence, tokens: int) -> None:
        """So many tokens more were computed: pages that are full by it can be shared."""
        before = seq.computed
        computed = seq.computed = before + tokens
        if self._is_sharing and computed // self._page_size > seq.recorded:
            seq.recorded = computed // self._page_size
            assert seq.pages is not None
            self._cache.record(seq.pages, seq.keys, seq.recorded)
            if before < seq.prompt:
                self._recorded += 1

    def can_grow(self, iterations: int) -> bool:
        """Whether there are pages for that many more iterations of everyone that runs.

        Where prefixes are shared, pages that are free: which cached ones would be evicted depends
        on what is recorded meanwhile.
        """
        size = self._page_size
        pages = 0
        for seq in self.running:
            assert seq.pages is not None
            needed = -(-(seq.known + iterations - 1) // size) - len(seq.pages.block_table)
            pages += max(0, needed)
        if self._is_sharing:
            return pages <= self._cache.statistics().free_pages
        return pages <= self._cache.available_pages

    def statistics(self) -> CacheStatistics:
        """Of the cache; its tokens are pages."""
        return self._cache.statistics()

    def check_pages(self) -> None:
        """Every page must have come back.

        Raises:
            SimulationError: some have not.
        """
        owned = self._cache.statistics().owned_pages
        if owned:
            raise SimulationError(
                f"{owned} KV pages are still owned after the last request; please report this"
            )


def _order(view: WaitingView) -> tuple[float, int]:
    return (view.rank_s, view.key)


def _running_order(seq: SimulatedSequence) -> tuple[float, int]:
    return (seq.rank_s, seq.number)
