"""Random lives of sequences against a plain-dict model of the cache.

The machine plays engine and device. As a device it writes, for each token it computes, what that
token's KV depends on (the weights and every token up to it) into a dict keyed by page and offset.
As an engine it keeps the tokens of each sequence. After every step, what a sequence would read
through its block table must be exactly what it computed or would have computed.

The model of the trie is a dict from (namespace, tokens of the path) to the time of the last use,
searched by brute force: it foretells every match, every refusal and every count of pages, and
through later matches which page was evicted. A second dict counts how many sequences came to each
path, which foretells the hot prefixes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cotune.cache.manager import CachedPrefix, KVCacheManager, SequencePages

Path: TypeAlias = tuple[Hashable, tuple[int, ...]]

# Which of the namespaces, counted from the newest; retired ones stay in the list.
NAMESPACE = st.integers(0, 2)
# Two tokens and short prompts: nearly everything shares something with something else.
TOKENS = st.lists(st.integers(0, 1), max_size=12)
WHICH = st.integers(0, 5)  # of the open sequences, modulo their number


@dataclass(eq=False)
class Running:
    """What the engine knows of one sequence."""

    pages: SequencePages
    namespace: Hashable
    token_ids: list[int]
    computed: int
    path: list[Path] = field(default_factory=list)  # the shared pages it stands on, or a copy
    is_cut_off: bool = False  # its namespace was dropped while it was open


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.sampled_from([1, 4, 8, 12, 16, 24]), page_size=st.integers(1, 3))
    def start(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.cache = KVCacheManager(num_pages, page_size)
        self.kv: dict[tuple[int, int], Path] = {}
        self.open: list[Running] = []
        self.last_use: dict[Path, int] = {}
        self.uses: dict[Path, int] = {}
        self.namespaces: list[Hashable] = [("base", 0), ("tutor", 1)]
        self.retired: set[Hashable] = set()
        self.now = 0
        self.evicted = 0
        self.used: set[int] = set()  # pages that were ever handed out
        self.kept_back = 0  # of the others, those that may not be
        self.looked_up: dict[tuple[Hashable, tuple[int, ...]], tuple[int, CachedPrefix]] = {}

    # --- the model -------------------------------------------------------------------------

    def namespace(self, nth: int) -> Hashable:
        return self.namespaces[-1 - nth % len(self.namespaces)]

    def sequence(self, which: int) -> Running:
        return self.open[which % len(self.open)]

    def paths(self, namespace: Hashable, token_ids: list[int], pages: int) -> list[Path]:
        ends = range(self.page_size, pages * self.page_size + 1, self.page_size)
        return [(namespace, tuple(token_ids[:end])) for end in ends]

    def cached_prefix(self, namespace: Hashable, token_ids: list[int]) -> list[Path]:
        found = []
        for path in self.paths(namespace, token_ids, max(len(token_ids) - 1, 0) // self.page_size):
            if path not in self.last_use:
                break
            found.append(path)
        return found

    def unread(self) -> list[Path]:
        """Cached paths on which no sequence stands, in the order of eviction."""
        read = {path for seq in self.open for path in seq.path}
        left = [path for path in self.last_use if path not in read]
        return sorted(left, key=lambda path: (self.last_use[path], -len(path[1])))

    def owned(self) -> set[int]:
        return {page for seq in self.open for page in seq.pages.block_table}

    def reserve(self, seq: Running, num_tokens: int) -> bool:
        """Reserve in the cache and in the model; both must agree."""
        missing = -(-num_tokens // self.page_size) - len(seq.pages.block_table)
        unread = self.unread()
        free = self.num_pages - len(self.owned()) - len(unread)
        table = list(seq.pages.block_table)
        free -= self.kept_back
        expected = missing <= 0 or missing <= free + len(unread)
        assert self.cache.reserve(seq.pages, num_tokens) == expected
        if not expected or missing <= 0:
            assert seq.pages.block_table == table
            return expected
        for path in unread[: max(missing - free, 0)]:
            del self.last_use[path]
            del self.uses[path]
            self.evicted += 1
        assert seq.pages.block_table[: len(table)] == table
        assert len(seq.pages.block_table) == len(table) + missing
        self.used |= set(seq.pages.block_table)
        return True

    def compute_one(self, seq: Running, num_tokens: int) -> bool:
        """Room, then the KV of the next tokens as far as they are known. False: no room."""
        end = min(seq.computed + num_tokens, len(seq.token_ids))
        if not self.reserve(seq, end):
            return False
        for position in range(seq.computed, end):
            page = seq.pages.block_table[position // self.page_size]
            readers = [other for other in self.open if page in other.pages.block_table]
            assert readers == [seq], "a page is written that another sequence reads"
            depends_on = (seq.namespace, tuple(seq.token_ids[: position + 1]))
            self.kv[page, position % self.page_size] = depends_on
        seq.computed = end
        return True

    def record_one(self, seq: Running) -> None:
        self.cache.record(seq.pages, seq.token_ids, seq.computed)
        if seq.is_cut_off:
            return
        before = len(seq.path)
        seq.path = self.paths(seq.namespace, seq.token_ids, seq.computed // self.page_size)
        for path in seq.path:
            self.last_use.setdefault(path, self.now)
        self.count_uses(seq.path[before:])

    def look_up(self, namespace: Hashable, token_ids: list[int]) -> None:
        """Tokens and idle pages are the model's; without turnover only recorded pages are new."""
        path = self.cached_prefix(namespace, token_ids)
        unread = set(self.unread())
        found = self.cache.look_up(namespace, token_ids)
        assert found.tokens == len(path) * self.page_size
        assert found.idle_pages == sum(step in unread for step in path)
        key = (namespace, tuple(token_ids))
        turnover, before = self.looked_up.get(key, (-1, None))
        if before is not None and turnover == self.cache.turnover:
            assert found.tokens >= before.tokens
            assert found.idle_pages == before.idle_pages
        self.looked_up[key] = self.cache.turnover, found

    def count_uses(self, paths: list[Path]) -> None:
        for path in paths:
            self.uses[path] = self.uses.get(path, 0) + 1

    def close_one(self, seq: Running) -> None:
        before = self.cache.available_pages
        private = self.cache.private_pages(seq.pages)
        self.cache.close(seq.pages)
        assert self.cache.available_pages == before + private
        self.open.remove(seq)
        self.now += 1
        for path in seq.path:
            self.last_use[path] = self.now

    def open_one(self, namespace: Hashable, token_ids: list[int], use_cache: bool) -> Running:
        expected = self.cached_prefix(namespace, token_ids)
        self.look_up(namespace, token_ids)
        if not use_cache:
            expected = []
        pages = self.cache.open(namespace, token_ids if use_cache else token_ids[:1])
        assert pages.cached_tokens == len(expected) * self.page_size
        assert len(pages.block_table) == len(expected)
        assert pages.namespace == namespace
        seq = Running(pages, namespace, token_ids, pages.cached_tokens, expected)
        seq.is_cut_off = namespace in self.retired
        self.count_uses(expected)
        self.open.append(seq)
        return seq

    def assert_reads_right(self, seq: Running) -> None:
        for position in range(seq.computed):
            page = seq.pages.block_table[position // self.page_size]
            written = self.kv[page, position % self.page_size]
            assert written == (seq.namespace, tuple(seq.token_ids[: position + 1]))

    # --- what may happen -------------------------------------------------------------------

    @rule(nth=NAMESPACE, token_ids=TOKENS, use_cache=st.booleans())
    def open_sequence(self, nth: int, token_ids: list[int], use_cache: bool) -> None:
        self.open_one(self.namespace(nth), list(token_ids), use_cache)

    @rule(nth=NAMESPACE, token_ids=TOKENS, use_cache=st.booleans())
    def open_and_compute(self, nth: int, token_ids: list[int], use_cache: bool) -> None:
        seq = self.open_one(self.namespace(nth), list(token_ids), use_cache)
        self.compute_one(seq, len(token_ids))
        self.record_one(seq)

    @rule(nth=NAMESPACE, token_ids=TOKENS)
    def open_twins_and_compute(self, nth: int, token_ids: list[int]) -> None:
        """Both compute what is not cached, so each has a page of its own for the same tokens."""
        twins = [self.open_one(self.namespace(nth), list(token_ids), True) for _ in range(2)]
        for seq in twins:
            self.compute_one(seq, len(token_ids))
        for seq in twins:
            self.record_one(seq)

    @rule(nth=NAMESPACE, token_ids=TOKENS)
    def look_something_up(self, nth: int, token_ids: list[int]) -> None:
        before = self.cache.statistics()
        self.look_up(self.namespace(nth), token_ids)
        assert self.cache.statistics() == before

    @rule()
    def look_up_the_same_again(self) -> None:
        for namespace, token_ids in list(self.looked_up):
            self.look_up(namespace, list(token_ids))

    @precondition(lambda self: self.open)
    @rule(which=WHICH, more=TOKENS)
    def open_one_that_goes_on_from_another(self, which: int, more: list[int]) -> None:
        """A sibling (the same tokens again) or a later turn."""
        seq = self.sequence(which)
        self.open_one(seq.namespace, seq.token_ids + more, use_cache=True)

    @precondition(lambda self: self.open)
    @rule(which=WHICH, new_tokens=TOKENS)
    def learn_tokens(self, which: int, new_tokens: list[int]) -> None:
        self.sequence(which).token_ids.extend(new_tokens)

    @precondition(lambda self: self.open)
    @rule(which=WHICH, num_tokens=st.integers(1, 6))
    def fail_a_step(self, which: int, num_tokens: int) -> None:
        """Room was made, nothing useful was written."""
        seq = self.sequence(which)
        if self.reserve(seq, seq.computed + num_tokens):
            for position in range(seq.computed, seq.computed + num_tokens):
                page = seq.pages.block_table[position // self.page_size]
                self.kv[page, position % self.page_size] = ("garbage", ())

    @precondition(lambda self: self.open)
    @rule(which=WHICH, num_tokens=st.integers(1, 12), record=st.booleans())
    def compute(self, which: int, num_tokens: int, record: bool) -> None:
        """A step of one sequence, sometimes recorded only later."""
        seq = self.sequence(which)
        self.compute_one(seq, num_tokens)
        if record:
            self.record_one(seq)

    @precondition(lambda self: self.open)
    @rule(num_tokens=st.integers(1, 12))
    def compute_all(self, num_tokens: int) -> None:
        """A step of the whole batch: all compute before any records.

        As an engine does, it gives up the sequences opened last until the others have room.
        """
        for seq in list(self.open):
            while seq in self.open and not self.compute_one(seq, num_tokens):
                self.close_one(self.open[-1])
        for seq in self.open:
            self.record_one(seq)

    @precondition(lambda self: self.open)
    @rule(which=WHICH)
    def close(self, which: int) -> None:
        seq = self.sequence(which)
        self.close_one(seq)
        self.cache.close(seq.pages)  # once more changes nothing, as the invariants see

    @precondition(lambda self: self.open)
    @rule(which=WHICH, use_cache=st.booleans())
    def preempt(self, which: int, use_cache: bool) -> None:
        """Give the pages up and start again, with what is still there or all anew."""
        seq = self.sequence(which)
        self.close_one(seq)
        again = self.open_one(seq.namespace, seq.token_ids, use_cache)
        self.compute_one(again, len(seq.token_ids))
        self.record_one(again)

    @rule(nth=NAMESPACE)
    def replace_namespace(self, nth: int) -> None:
        """Publish a version and retire another, perhaps once more."""
        namespace = self.namespace(nth)
        self.namespaces.append(("tutor", len(self.namespaces)))
        self.cache.drop_namespace(namespace)
        self.retired.add(namespace)
        self.last_use = {p: t for p, t in self.last_use.items() if p[0] != namespace}
        self.uses = {p: n for p, n in self.uses.items() if p[0] != namespace}
        for seq in self.open:
            if seq.namespace == namespace:
                seq.path, seq.is_cut_off = [], True
        assert self.cache.reachable_pages(namespace) == frozenset()

    @rule(nth=NAMESPACE)
    def revive_namespace(self, nth: int) -> None:
        """The same weights return, while sequences of their first life may still be open."""
        namespace = self.namespace(nth)
        self.cache.revive_namespace(namespace)
        self.retired.discard(namespace)

    @rule(pages=st.none() | st.integers(-1, 8))
    def limit_growth(self, pages: int | None) -> None:
        """Memory is short, or there again."""
        self.cache.limit_growth(pages)
        unused = self.num_pages - len(self.used)
        self.kept_back = 0 if pages is None else max(0, unused - max(0, pages))

    @rule(nth=NAMESPACE, max_tokens=st.integers(0, 30))
    def ask_for_hot_prefixes(self, nth: int, max_tokens: int) -> None:
        namespace = self.namespace(nth)
        prefixes = self.cache.hot_prefixes(namespace, max_tokens)
        chosen = {
            path
            for prefix in prefixes
            for path in self.paths(namespace, list(prefix), len(prefix) // self.page_size)
        }
        hot = {p for p, n in self.uses.items() if p[0] == namespace and n >= 2}
        assert chosen <= hot
        assert len(chosen) == min(len(hot), max_tokens // self.page_size)
        if chosen:
            left_out = [self.uses[path] for path in hot - chosen]
            assert min(self.uses[path] for path in chosen) >= max(left_out, default=0)
        for prefix in prefixes:
            others = [other for other in prefixes if other is not prefix]
            assert prefix not in [other[: len(prefix)] for other in others]
        worth = [
            sum(
                self.uses[path]
                for path in self.paths(namespace, list(prefix), len(prefix) // self.page_size)
            )
            for prefix in prefixes
        ]
        assert worth == sorted(worth, reverse=True)

    # --- what must always be true ----------------------------------------------------------

    @invariant()
    def owners_agree(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def free_cached_and_owned_pages_are_all_pages(self) -> None:
        now = self.cache.statistics()
        assert now.total_pages == self.num_pages
        assert now.owned_pages == len(self.owned())
        assert now.cached_pages == len(self.unread())
        assert now.free_pages == self.num_pages - now.owned_pages - now.cached_pages
        assert self.cache.available_pages == now.free_pages + now.cached_pages - self.kept_back
        assert self.cache.unused_pages == self.num_pages - len(self.used) - self.kept_back
        assert self.cache.kept_back_pages == self.kept_back
        assert now.evicted_pages == self.evicted

    @invariant()
    def no_page_is_reachable_from_two_versions(self) -> None:
        owner: dict[int, Hashable] = {}
        for namespace in self.namespaces:
            reachable = set(self.cache.reachable_pages(namespace))
            for seq in self.open:
                if seq.namespace == namespace:
                    reachable.update(seq.pages.block_table)
            for page in reachable:
                assert owner.setdefault(page, namespace) == namespace

    @invariant()
    def every_sequence_reads_what_it_believes_is_there(self) -> None:
        for seq in self.open:
            self.assert_reads_right(seq)

    @invariant()
    def every_cached_page_holds_what_its_path_says(self) -> None:
        last_offset = self.page_size - 1
        for namespace in self.namespaces:
            pages = self.cache.reachable_pages(namespace)
            held = {self.kv[page, last_offset] for page in pages}
            assert held == {path for path in self.last_use if path[0] == namespace}

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for seq in list(self.open):
            self.close_one(seq)
        for namespace, prefix in list(self.last_use):
            seq = self.open_one(namespace, [*prefix, 0], use_cache=True)
            assert seq.computed == len(prefix)
            self.assert_reads_right(seq)
            self.close_one(seq)
        # Alone, a sequence may have every page there is.
        self.limit_growth(None)
        last = self.open_one(("base", 0), [], use_cache=True)
        assert self.reserve(last, self.num_pages * self.page_size)
        assert not self.reserve(last, self.num_pages * self.page_size + 1)
        self.owners_agree()
        self.close_one(last)
        assert self.cache.statistics().free_pages == self.num_pages


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestCacheMachine = pytest.mark.timeout(300)(CacheMachine.TestCase)
