"""The waiting line: sequences that hold nothing, in order of rank, and what a policy sees of them.

What the prefix trie has of a sequence's tokens changes all the time. It is looked up again only for
those next in line, and only when pages were recorded, evicted, locked or left since.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from ..policy import WaitingView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..cache.manager import KVCacheManager
    from ..policy import Budgets
    from .sequence import SequenceState


MAX_PLANS = 3
"""A policy is asked again where those that it lets in have other prefixes cached than it saw; so
often in all."""


class WaitingLine:
    """Sequences by rank, then by key. Owned by the engine.

    Args:
        cache: where prefixes are looked up.
        budgets: how far down the line it is worth looking.
    """

    __slots__ = ("_budgets", "_cache", "_prompts", "_sequences", "_views")

    def __init__(self, cache: KVCacheManager, budgets: Budgets) -> None:
        self._cache = cache
        self._budgets = budgets
        self._sequences: list[SequenceState] = []
        self._views: list[WaitingView] = []  # of the same
        self._prompts = 0  # that were recorded

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._sequences)

    @property
    def first(self) -> SequenceState:
        """Who is next. There must be somebody."""
        return self._sequences[0]

    @property
    def views(self) -> tuple[WaitingView, ...]:
        """What a policy sees; see `refresh`."""
        return tuple(self._views)

    def add(self, seq: SequenceState) -> None:
        """Put a sequence where it belongs."""
        view = self._view(seq, 0, 0, 0)
        seq.looked_up_at = -1
        seq.shared_with.clear()
        place = bisect_left(self._views, _order(view), key=_order)
        self._sequences.insert(place, seq)
        self._views.insert(place, view)

    def remove(self, seq: SequenceState) -> None:
        """Take a sequence out."""
        place = self._place(seq)
        del self._sequences[place], self._views[place]

    def note_recorded_prompt(self) -> None:
        """A whole prompt can be found from now on."""
        self._prompts += 1

    def refresh(self, running: Sequence[SequenceState]) -> None:
        """Look up what those next in line would find cached, where it may have changed.

        And what of their prompts one of `running` is about to put there. A policy that goes by
        another order than rank may choose others: `check` those.
        """
        budgets = self._budgets
        seats = min(budgets.sequences, budgets.tokens) - len(running)
        tokens = budgets.tokens - len(running)
        if not self._sequences or seats <= 0 or tokens <= 0:
            return
        prefilling = _prefilling(running)
        for place in range(len(self._sequences)):
            if seats <= 0 or tokens <= 0:
                break
            self._look_up(place, prefilling)
            view = self._views[place]
            if not view.coming:  # it is likely to wait, and another to take its place
                tokens -= view.known - view.cached
                seats -= 1

    def check(self, chosen: Iterable[SequenceState], running: Sequence[SequenceState]) -> bool:
        """Look up what these would find, who are to start. Whether it is not what was believed.

        Then more of the line may fit, so those that stand behind them are looked up as well.
        """
        prefilling = _prefilling(running)
        is_other = False
        last = -1
        for seq in chosen:
            place = self._place(seq)
            last = max(last, place)
            before = self._views[place]
            self._look_up(place, prefilling)
            is_other |= self._views[place] != before
        if is_other:
            for place in range(last + 1, min(last + 1 + self._budgets.sequences, len(self))):
                self._look_up(place, prefilling)
        return is_other

    def correct(self, seq: SequenceState) -> bool:
        """It could not start: look up anew what it would find. Whether that is something else."""
        place = self._place(seq)
        before = self._views[place]
        seq.looked_up_at = -1
        self._look_up(place, [])
        view = self._views[place]
        return (view.cached, view.idle_pages) != (before.cached, before.idle_pages)

    def check_integrity(self) -> None:
        """Raise `AssertionError` where the two lists disagree, or the order is wrong."""
        assert [view.key for view in self._views] == [seq.key for seq in self._sequences]
        assert self._views == sorted(self._views, key=_order)

    def _place(self, seq: SequenceState) -> int:
        place = bisect_left(self._views, (seq.request.rank_s, seq.key), key=_order)
        assert self._sequences[place] is seq
        return place

    def _look_up(self, place: int, prefilling: Sequence[SequenceState]) -> None:
        """Bring one view up to date."""
        seq, view = self._sequences[place], self._views[place]
        cached, idle_pages = view.cached, view.idle_pages
        recorded, coming = self._shared(seq, prefilling) if prefilling else (0, 0)
        now = self._prompts + self._cache.turnover
        # Who waits for a prefix need not know what it would find now: a queue of them stays cheap.
        is_old = seq.looked_up_at != now and coming <= cached
        if seq.looked_up_at < 0 or is_old or recorded > cached:
            seq.looked_up_at = now
            cached, idle_pages = self._cache.look_up(seq.request.version, seq.cacheable)
        coming = coming if coming > cached else 0
        if (cached, idle_pages, coming) != (view.cached, view.idle_pages, view.coming):
            self._views[place] = self._view(seq, cached, idle_pages, coming)

    def _shared(self, seq: SequenceState, prefilling: Sequence[SequenceState]) -> tuple[int, int]:
        """Tokens of `seq` that one of these has put into the cache, and that one is about to.

        Whole pages, and fewer than all of its tokens: the last one is computed for its logits.
        Nobody who is waited for waits for a background prompt: it gets little of each iteration.
        """
        recorded = coming = 0
        if self._cache.enable_prefix_sharing:
            for other in prefilling:
                if other.request.version == seq.request.version:
                    shared = seq.shared_with.get(other.key)
                    if shared is None:
                        shared = _common_pages(
                            seq.cacheable, other.request.prompt, self._budgets.page_size
                        )
                        seq.shared_with[other.key] = shared
                    if other.computed >= shared:
                        recorded = max(recorded, shared)
                    elif seq.request.is_background or not other.request.is_background:
                        coming = max(coming, shared)
        return recorded, coming

    def _view(self, seq: SequenceState, cached: int, idle_pages: int, coming: int) -> WaitingView:
        """What the policy sees of a sequence that waits."""
        request = seq.request
        version = request.version
        return WaitingView(
            seq.key,
            request.rank_s,
            len(seq.tokens),
            cached,
            version if version.name else None,
            request.is_background,
            seq.due_s(self._budgets),
            coming,
            request.arrival_s,
            idle_pages,
        )


def _prefilling(running: Sequence[SequenceState]) -> list[SequenceState]:
    """Those whose prompt goes on."""
    return [seq for seq in running if seq.computed < len(seq.request.prompt)]


def _order(view: WaitingView) -> tuple[float, int]:
    return (view.rank_s, view.key)


def _common_pages(wanted: list[int], prompt: tuple[int, ...], page_size: int) -> int:
    """Tokens that both begin with, in whole pages, and fewer than `wanted` has."""
    low, high = 0, min(len(wanted) - 1, len(prompt)) // page_size
    while low < high:  # the first `low` pages agree, those from `high` on are out
        middle = (low + high + 1) // 2
        span = slice(low * page_size, middle * page_size)
        if tuple(wanted[span]) == prompt[span]:
            low = middle
        else:
            high = middle - 1
    return low * page_size
