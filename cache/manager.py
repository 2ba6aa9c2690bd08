"""Who gets which KV page: the one that joins the page pool and the prefix trie.

A sequence's block table names the pages that hold the KV of its tokens. Position p is at offset
p mod S of page ``block_table[p // S]``. With S = 4, and two sequences that begin with the same ten
tokens:

    tokens       t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9 u0 u1 | u2               first sequence
    block table       3      |      7      |      0      |  5
                   shared         shared       recorded     private: not full

    tokens       t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9 v0                       second sequence
    block table       3      |      7      |  2
                   cached_tokens = 8          computed by itself: only full pages are shared

A page is always in one of three states:

      ┌──── reserve ────►  owned: in the block table of one or more open sequences
    free                     │        ▲
      ▲ ◄─ close, not ───────┤        │ open: the prefix is found again
      │    recorded          ▼        │
      └──── evicted ─────  cached: in the trie and in no block table

    free_pages + cached_pages + owned_pages = total_pages

Life of a sequence: `open` takes the longest prefix that is cached; before each step `reserve` makes
room for the tokens to compute; after it `record` offers the pages that have become full to others;
`close` gives all back. A step that failed is undone by not recording it.

The namespace names the weights: the engine passes an ``AdapterVersion``. KV is never shared across
namespaces. One that was dropped stays empty, unless it is revived because the same weights return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .pages import PagePool
from .trie import PrefixTrie

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from .trie import PrefixCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """A snapshot of the cache. The first four count pages now, the others since the start.

    Attributes:
        total_pages: all pages there are.
        free_pages: pages that hold nothing of use.
        cached_pages: pages kept for later sequences alone; evicted when pages are needed.
        owned_pages: pages in the block tables of open sequences, shared ones counted once.
        hit_tokens: tokens that sequences found cached when they were opened.
        queried_tokens: tokens that those sequences had when they were opened.
        evicted_pages: cached pages that were given up for others.
    """

    total_pages: int
    free_pages: int
    cached_pages: int
    owned_pages: int
    hit_tokens: int
    queried_tokens: int
    evicted_pages: int


class CachedPrefix(NamedTuple):
    """What a sequence would find."""

    tokens: int
    """Tokens whose KV is there: a multiple of the page size."""
    idle_pages: int
    """Of their pages, those that nobody reads. They count as available until they are opened."""


class SequencePages:
    """The pages of one open sequence. Made and changed by `KVCacheManager` alone.

    Attributes:
        namespace: the weights that compute this sequence.
        cached_tokens: tokens whose KV was there when it was opened, a multiple of the page size.
        block_table: page ids in order, read-only for others. It grows in place, and its entries
            never change; closing puts an empty list in its place and leaves the old one alone.
    """

    __slots__ = ("_cursor", "block_table", "cached_tokens", "namespace")

    def __init__(
        self, namespace: Hashable, block_table: list[int], cursor: PrefixCursor | None
    ) -> None:
        self.namespace = namespace
        self.block_table = block_table
        self.cached_tokens = 0
        self._cursor = cursor  # None: this sequence neither finds nor offers shared pages


class KVCacheManager:
    """Hands out KV pages, shares those of common prefixes and evicts the least recently used.

    Synchronous, and cheap enough for every iteration: a call costs as much as the pages it takes,
    fills or gives back, however many there are in all. Not thread safe: it belongs to the engine's
    thread. Out of pages is an answer; exceptions mean that the caller broke a promise.

    Args:
        num_pages: pages that the executor has room for.
        page_size: tokens per page (S).
        enable_prefix_sharing: False keeps every page private to its sequence.
    """

    __slots__ = (
        "_evicted_pages",
        "_hit_tokens",
        "_open",
        "_pool",
        "_queried_tokens",
        "_trie",
        "enable_prefix_sharing",
        "page_size",
    )

    def __init__(self, num_pages: int, page_size: int, enable_prefix_sharing: bool = True) -> None:
        self._pool = PagePool(num_pages)
        self._trie = PrefixTrie(page_size)
        self._open: set[SequencePages] = set()
        self.page_size = page_size
        self.enable_prefix_sharing = enable_prefix_sharing
        self._hit_tokens = 0
        self._queried_tokens = 0
        self._evicted_pages = 0

    @property
    def num_pages(self) -> int:
        """All pages there are."""
        return self._pool.num_pages

    @property
    def unused_pages(self) -> int:
        """Of the available pages, those that were never used so far."""
        return self._pool.unused_pages

    @property
    def returned_pages(self) -> int:
        """Of the available pages, those that were used before and are free."""
        return self._pool.available_pages - self._pool.unused_pages

    @property
    def kept_back_pages(self) -> int:
        """Free pages that `limit_growth` keeps back now."""
        return self._pool.kept_back_pages

    def limit_growth(self, pages: int | None) -> None:
        """Take at most so many pages into use that never were (None: all).

        What is kept of prefixes goes instead.
        """
        self._pool.limit_growth(pages)

    @property
    def available_pages(self) -> int:
        """Pages that `reserve` can hand out now: free ones and those it may evict.

        Opening a sequence on cached pages lowers this by as many of them as were evictable.
        """
        return self._pool.available_pages + self._trie.evictable_pages

    @property
    def turnover(self) -> int:
        """Goes up whenever what `look_up` says may have changed, but for pages newly recorded."""
        return self._trie.turnover

    def look_up(self, namespace: Hashable, token_ids: Sequence[int]) -> CachedPrefix:
        """What a sequence opened now would find cached.

        Always less than all its tokens, since the last one must be computed for its logits. No side
        effects: it does not count as a use.
        """
        pages, idle_pages = self._trie.match(namespace, token_ids, self._shareable_pages(token_ids))
        return CachedPrefix(pages * self.page_size, idle_pages)

    def open(self, namespace: Hashable, token_ids: Sequence[int]) -> SequencePages:
        """Begin a sequence with the longest cached prefix of `token_ids`. Allocates nothing.

        Its pages stay until `close`. At least the last token is left to compute.

        Args:
            namespace: the weights that will compute the sequence. In one that was dropped the
                sequence works but shares nothing.
            token_ids: every token known so far, or fewer of them where the rest is to be computed
                anew (for the log-probabilities of a prompt, say).
        """
        cursor = self._trie.attach(namespace) if self.enable_prefix_sharing else None
        pages: list[int] = []
        if cursor is not None:
            pages = self._trie.follow(cursor, token_ids, self._shareable_pages(token_ids))
            for page in pages:
                self._pool.retain(page)
            self._queried_tokens += len(token_ids)
            self._hit_tokens += len(pages) * self.page_size
        seq = SequencePages(namespace, pages, cursor)
        seq.cached_tokens = len(pages) * self.page_size
        self._open.add(seq)
        return seq

    def reserve(self, seq: SequencePages, num_tokens: int) -> bool:
        """Make the block table long enough for `num_tokens` tokens, evicting as needed.

        All or nothing. False, and nothing changed, if even eviction cannot yield enough pages:
        some other sequence has to be closed first. A sequence that is alone gets every page.
        """
        missing = -(-num_tokens // self.page_size) - len(seq.block_table)
        if missing <= 0:
            return True
        self._require_open(seq)
        if missing > self.available_pages:
            return False
        for page in self._trie.evict(missing - self._pool.available_pages):
            self._pool.release(page)
            self._evicted_pages += 1
        pages = self._pool.allocate(missing)
        assert pages is not None
        seq.block_table.extend(pages)
        return True

    def private_pages(self, seq: SequencePages) -> int:
        """Pages that become available when `seq` is closed. Looks at each of its pages."""
        self._require_open(seq)
        table, cursor = seq.block_table, seq._cursor
        start = count = 0
        if cursor is not None and not cursor.is_retired:
            start = cursor.depth
            count = self._trie.private_pages(cursor, table)
        return count + sum(self._pool.references(page) == 1 for page in table[start:])

    def record(self, seq: SequencePages, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer the pages of `seq` that have become full to later sequences.

        Call it after a step was committed. It looks at the tokens of newly filled pages only, so
        that it costs next to nothing where there are none. Where another sequence has recorded the
        same tokens meanwhile, each keeps its own page. Does nothing in a dropped namespace.

        Args:
            seq: an open sequence.
            token_ids: its tokens from the first one on, which may go on past `num_computed`.
            num_computed: how many of them have their KV in pages.
        """
        cursor = seq._cursor
        if cursor is None:
            self._require_open(seq)
            return
        size = self.page_size
        full = num_computed // size
        if full <= cursor.depth or cursor.is_retired:
            return
        if num_computed > len(token_ids) or full > len(seq.block_table):
            raise ValueError(
                f"num_computed is {num_computed}, but there are {len(token_ids)} tokens and room "
                f"for {len(seq.block_table) * size}; reserve room and pass every computed token"
            )
        for index in range(cursor.depth, full):
            page = seq.block_table[index]
            self._pool.retain(page)
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            displaced = self._trie.insert(cursor, tokens, page)
            if displaced is not None:
                self._pool.release(displaced)

    def close(self, seq: SequencePages) -> None:
        """Give every page back: recorded ones stay cached, the others are free. Idempotent.

        No step that writes or reads them may be under way.
        """
        if seq not in self._open:
            return
        self._open.remove(seq)
        pages, seq.block_table = seq.block_table, []
        cursor, seq._cursor = seq._cursor, None
        if cursor is not None:
            for page in self._trie.detach(cursor, pages):
                self._pool.release(page)
        # Backwards, so that the free stack hands them out again in this order.
        for page in reversed(pages):
            self._pool.release(page)

    def drop_namespace(self, namespace: Hashable) -> None:
        """Retire the weights that `namespace` names. Idempotent.

        Its cached pages are free at once; pages that open sequences read, when those are closed.
        Nothing is found in it or recorded under it any more, unless `revive_namespace` is called.
        """
        for page in self._trie.retire(namespace):
            self._pool.release(page)

    def revive_namespace(self, namespace: Hashable) -> None:
        """The weights that a dropped `namespace` named are back: it is usable again, and empty.

        Only for weights that are bit for bit the same. Sequences that were open when it was dropped
        keep their pages to themselves until they are closed. Idempotent.
        """
        self._trie.revive(namespace)

    def hot_prefixes(self, namespace: Hashable, max_tokens: int) -> list[tuple[int, ...]]:
        """Prefixes that more than one sequence had, whose KV is still there; most valuable first.

        For prefilling them under the next version. A prefix is worth as much as it has spared or
        would have: its tokens, each as often as it was used. They are full pages. No prefix is the
        beginning of another, and computing all of them costs at most `max_tokens`, since what they
        share is computed once.
        """
        pages = max_tokens // self.page_size
        return [
            tuple(token for tokens in path for token in tokens)
            for path in self._trie.hot_paths(namespace, pages, min_uses=2)
        ]

    def statistics(self) -> CacheStatistics:
        """Counts of now and since the start."""
        free_pages = self._pool.free_pages
        cached_pages = self._trie.evictable_pages
        return CacheStatistics(
            total_pages=self.num_pages,
            free_pages=free_pages,
            cached_pages=cached_pages,
            owned_pages=self.num_pages - free_pages - cached_pages,
            hit_tokens=self._hit_tokens,
            queried_tokens=self._queried_tokens,
            evicted_pages=self._evicted_pages,
        )

    def reachable_pages(self, namespace: Hashable) -> frozenset[int]:
        """Every page that a new sequence of `namespace` could be given.

        Walks the namespace's tree; for tests and diagnosis.
        """
        return self._trie.pages(namespace)

    def check_integrity(self) -> None:
        """Raise `AssertionError` where pool, trie and open sequences disagree.

        Each page must have exactly as many references as open sequences name it in their block
        tables, and one more if the trie holds it. Looks at everything; for tests and idle moments.
        """
        self._pool.check_integrity()
        self._trie.check_integrity()
        readers = [0] * self.num_pages
        for seq in self._open:
            if len(set(seq.block_table)) != len(seq.block_table):
                raise AssertionError(f"block table {seq.block_table} names a page twice")
            for page in seq.block_table:
                readers[page] += 1
        held = self._trie.holdings()
        for page, count in enumerate(readers):
            references = self._pool.references(page)
            if references != count + (page in held):
                raise AssertionError(
                    f"page {page} has {references} references; {count} block tables name it and "
                    f"the trie {'holds' if page in held else 'does not hold'} it"
                )
            if held.get(page, count) != count:
                raise AssertionError(
                    f"the trie counts {held[page]} readers of page {page}; {count} block tables "
                    "name it"
                )
        owned = sum(count > 0 for count in readers)
        if owned != self.statistics().owned_pages:
            raise AssertionError(
                f"{owned} pages are in block tables, but free + cached leave "
                f"{self.statistics().owned_pages} of {self.num_pages}"
            )

    def _shareable_pages(self, token_ids: Sequence[int]) -> int:
        # All but the last token: its logits are needed, so it must be computed.
        return max(len(token_ids) - 1, 0) // self.page_size

    def _require_open(self, seq: SequencePages) -> None:
        if seq not in self._open:
            raise ValueError(
                f"the sequence of namespace {seq.namespace!r} is closed or belongs to another "
                "manager; open a new one"
            )
