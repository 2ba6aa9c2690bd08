"""Pages of 4 tokens, a handful of pages: exact ids, references and order of eviction."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex, overload

import pytest

from cotune import BASE, AdapterVersion
from cotune.cache.manager import CacheStatistics, KVCacheManager, SequencePages

if TYPE_CHECKING:
    from collections.abc import Hashable

PAGE = 4


def tokens(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


def compute(
    cache: KVCacheManager, token_ids: list[int], namespace: Hashable = BASE
) -> SequencePages:
    """A sequence with the KV of all its tokens computed and recorded, still open."""
    seq = cache.open(namespace, token_ids)
    assert cache.reserve(seq, len(token_ids))
    cache.record(seq, token_ids, len(token_ids))
    cache.check_integrity()
    return seq


def counts(cache: KVCacheManager) -> tuple[int, int, int]:
    """Free, cached and owned pages."""
    now = cache.statistics()
    assert now.free_pages + now.cached_pages + now.owned_pages == now.total_pages
    assert cache.available_pages == now.free_pages + now.cached_pages
    return now.free_pages, now.cached_pages, now.owned_pages


def test_opening_allocates_nothing_and_reserving_makes_the_block_table_cover() -> None:
    cache = KVCacheManager(8, PAGE)
    seq = cache.open(BASE, tokens(0, 10))
    assert (seq.block_table, seq.cached_tokens, seq.namespace) == ([], 0, BASE)
    assert counts(cache) == (8, 0, 0)
    assert cache.reserve(seq, 10)
    assert seq.block_table == [0, 1, 2]
    assert cache.reserve(seq, 12)
    assert seq.block_table == [0, 1, 2]
    assert cache.reserve(seq, 13)
    assert seq.block_table == [0, 1, 2, 3]
    assert counts(cache) == (4, 0, 4)


def test_full_computed_pages_are_shared_and_the_last_partial_one_is_not() -> None:
    cache = KVCacheManager(8, PAGE)
    first = compute(cache, tokens(0, 10))
    assert first.block_table == [0, 1, 2]
    second = cache.open(BASE, [*tokens(0, 10), 77])
    assert second.block_table == [0, 1]
    assert second.cached_tokens == 8
    assert cache.reserve(second, 11)
    assert second.block_table == [0, 1, 3]
    assert cache._pool.references(0) == 3  # two sequences and the trie
    assert cache._pool.references(2) == 1
    assert counts(cache) == (4, 0, 4)
    cache.check_integrity()


def test_at_least_the_last_token_is_left_to_compute() -> None:
    cache = KVCacheManager(8, PAGE)
    cache.close(compute(cache, tokens(0, 8)))
    assert cache.look_up(BASE, tokens(0, 8)).tokens == 4
    assert cache.look_up(BASE, tokens(0, 9)).tokens == 8
    assert cache.open(BASE, tokens(0, 8)).cached_tokens == 4
    assert cache.open(BASE, tokens(0, 9)).cached_tokens == 8
    assert cache.open(BASE, []).cached_tokens == 0


def test_only_what_was_computed_is_recorded() -> None:
    cache = KVCacheManager(8, PAGE)
    prompt = tokens(0, 20)
    seq = cache.open(BASE, prompt)
    assert cache.reserve(seq, 20)
    assert cache.look_up(BASE, prompt).tokens == 0
    cache.record(seq, prompt, 7)
    assert cache.look_up(BASE, prompt).tokens == 4
    cache.record(seq, prompt, 16)
    assert cache.look_up(BASE, prompt).tokens == 16
    cache.check_integrity()


class WatchedTokens(list[int]):
    """Tokens that remember which of them were looked at."""

    def __init__(self, values: list[int]) -> None:
        super().__init__(values)
        self.read: list[slice | SupportsIndex] = []

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> list[int]: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | list[int]:
        self.read.append(key)
        return super().__getitem__(key)


def test_recording_looks_at_the_tokens_of_newly_filled_pages_only() -> None:
    cache = KVCacheManager(8, PAGE)
    known = WatchedTokens(tokens(0, 14))
    seq = cache.open(BASE, [])
    assert cache.reserve(seq, 14)
    cache.record(seq, known, 9)
    assert known.read == [slice(0, 4), slice(4, 8)]
    known.read.clear()
    for num_computed in (9, 10, 11):
        cache.record(seq, known, num_computed)
    assert known.read == []
    cache.record(seq, known, 12)
    assert known.read == [slice(8, 12)]


def test_closing_keeps_recorded_pages_for_others_and_frees_the_rest() -> None:
    cache = KVCacheManager(8, PAGE)
    seq = compute(cache, tokens(0, 10))
    assert cache.reserve(seq, 17)
    assert counts(cache) == (3, 0, 5)
    cache.close(seq)
    assert counts(cache) == (6, 2, 0)
    assert seq.block_table == []
    assert cache.reachable_pages(BASE) == {0, 1}
    cache.check_integrity()


def test_pages_given_back_are_handed_out_again_in_the_same_order() -> None:
    cache = KVCacheManager(8, PAGE, enable_prefix_sharing=False)
    first, second = compute(cache, tokens(0, 12)), compute(cache, tokens(0, 12))
    cache.close(first)
    third = cache.open(BASE, tokens(0, 16))
    assert cache.reserve(third, 16)
    assert (second.block_table, third.block_table) == ([3, 4, 5], [0, 1, 2, 6])


def test_closing_leaves_the_list_of_a_step_under_way_alone() -> None:
    cache = KVCacheManager(4, PAGE)
    seq = compute(cache, tokens(0, 10))
    held_by_a_step = seq.block_table
    cache.close(seq)
    assert held_by_a_step == [0, 1, 2]


def test_closing_twice_is_closing_once() -> None:
    cache = KVCacheManager(4, PAGE)
    seq = compute(cache, tokens(0, 10))
    other = compute(cache, [*tokens(0, 8), 99])
    cache.close(seq)
    before = counts(cache)
    cache.close(seq)
    assert counts(cache) == before == (1, 0, 3)
    cache.check_integrity()
    cache.close(other)
    assert counts(cache) == (2, 2, 0)


def test_a_closed_or_foreign_sequence_is_refused() -> None:
    cache = KVCacheManager(4, PAGE)
    seq = cache.open(BASE, tokens(0, 9))
    cache.close(seq)
    with pytest.raises(ValueError, match="is closed or belongs to another manager"):
        cache.reserve(seq, 1)
    with pytest.raises(ValueError, match="is closed or belongs to another manager"):
        cache.record(seq, tokens(0, 9), 9)
    foreign = KVCacheManager(4, PAGE).open(BASE, tokens(0, 9))
    with pytest.raises(ValueError, match="is closed or belongs to another manager"):
        cache.reserve(foreign, 1)
    assert counts(cache) == (4, 0, 0)


def test_recording_more_than_there_is_is_refused() -> None:
    cache = KVCacheManager(4, PAGE)
    seq = cache.open(BASE, tokens(0, 9))
    assert cache.reserve(seq, 4)
    with pytest.raises(
        ValueError, match="num_computed is 8, but there are 9 tokens and room for 4"
    ):
        cache.record(seq, tokens(0, 9), 8)
    with pytest.raises(ValueError, match="num_computed is 4, but there are 3 tokens"):
        cache.record(seq, tokens(0, 3), 4)
    cache.check_integrity()


def test_reserving_evicts_the_least_recently_used_pages_deepest_first() -> None:
    cache = KVCacheManager(6, PAGE)
    old, new = tokens(0, 12), tokens(100, 12)
    cache.close(compute(cache, old))  # pages 0 1 2
    cache.close(compute(cache, new))  # pages 3 4 5
    cache.close(cache.open(BASE, old[:9]))  # uses 0 and 1 again
    assert counts(cache) == (0, 6, 0)
    seq = cache.open(BASE, [7])
    for expected in ([2], [5], [4], [3], [1], [0]):
        assert cache.reserve(seq, (len(seq.block_table) + 1) * PAGE)
        assert seq.block_table[-1:] == expected
        cache.check_integrity()
    assert cache.statistics().evicted_pages == 6
    assert cache.reachable_pages(BASE) == frozenset()


def test_free_pages_are_used_before_any_is_evicted() -> None:
    cache = KVCacheManager(6, PAGE)
    cache.close(compute(cache, tokens(0, 12)))
    seq = cache.open(BASE, [7])
    assert cache.reserve(seq, 3 * PAGE)
    assert cache.statistics().evicted_pages == 0
    assert cache.reserve(seq, 4 * PAGE)
    assert cache.statistics().evicted_pages == 1
    assert counts(cache) == (0, 2, 4)


def test_where_growth_is_limited_kept_prefixes_go_before_new_pages() -> None:
    cache = KVCacheManager(8, PAGE)
    cache.close(compute(cache, tokens(0, 13)))  # three full pages are kept, the fourth is free
    cache.limit_growth(1)
    assert cache.kept_back_pages > 0
    assert (cache.available_pages, cache.unused_pages) == (5, 1)
    seq = cache.open(BASE, tokens(50, 4))
    assert cache.reserve(seq, 2 * PAGE)
    assert seq.block_table == [3, 4]
    assert cache.look_up(BASE, tokens(0, 13)).tokens == 12
    assert cache.reserve(seq, 4 * PAGE)
    assert seq.block_table == [3, 4, 1, 2]
    assert cache.look_up(BASE, tokens(0, 13)).tokens == 4
    assert not cache.reserve(seq, 6 * PAGE)
    cache.limit_growth(None)
    assert cache.kept_back_pages == 0
    assert cache.reserve(seq, 6 * PAGE)
    assert cache.statistics().evicted_pages == 2
    cache.check_integrity()


def test_reserving_is_all_or_nothing() -> None:
    cache = KVCacheManager(4, PAGE)
    running = compute(cache, tokens(0, 8))
    cache.close(compute(cache, tokens(100, 4)))
    seq = cache.open(BASE, [7])
    before = counts(cache)
    assert before == (1, 1, 2)
    assert not cache.reserve(seq, 3 * PAGE)
    assert counts(cache) == before
    assert (seq.block_table, cache.statistics().evicted_pages) == ([], 0)
    assert cache.reserve(seq, 2 * PAGE)
    assert seq.block_table == [2, 3]  # the evicted page lies on top of the free stack
    assert running.block_table == [0, 1]
    cache.check_integrity()


def test_a_sequence_that_is_alone_gets_every_page() -> None:
    cache = KVCacheManager(5, PAGE)
    cache.close(compute(cache, tokens(0, 12)))
    cache.close(compute(cache, tokens(50, 8)))
    seq = cache.open(BASE, tokens(0, 9))
    assert seq.block_table == [0, 1]
    assert cache.reserve(seq, 5 * PAGE)
    assert seq.block_table[:2] == [0, 1]
    assert sorted(seq.block_table) == [0, 1, 2, 3, 4]
    assert not cache.reserve(seq, 5 * PAGE + 1)


def test_a_prefix_computed_twice_at_once_wastes_no_page_once_one_of_them_ends() -> None:
    cache = KVCacheManager(6, PAGE)
    prompt = tokens(0, 9)
    first, second = cache.open(BASE, prompt), cache.open(BASE, prompt)
    for seq in (first, second):
        assert cache.reserve(seq, 9)
    for seq in (first, second):
        cache.record(seq, prompt, 9)
    assert (first.block_table, second.block_table) == ([0, 1, 2], [3, 4, 5])
    assert cache.reachable_pages(BASE) == {0, 1}
    cache.check_integrity()
    cache.close(first)
    # The second's own pages took their place: it can still have all six.
    assert cache.reachable_pages(BASE) == {3, 4}
    assert counts(cache) == (3, 0, 3)
    assert cache.reserve(second, 6 * PAGE)
    assert second.block_table[:3] == [3, 4, 5]
    cache.check_integrity()
    cache.close(second)
    assert counts(cache) == (4, 2, 0)


def test_what_follows_a_prefix_computed_twice_is_recorded_below_it() -> None:
    cache = KVCacheManager(8, PAGE)
    prompt = tokens(0, 8)
    first, second = cache.open(BASE, prompt), cache.open(BASE, prompt)
    longer = [*prompt, *tokens(50, 5)]
    for seq in (first, second):
        assert cache.reserve(seq, 13 if seq is second else 8)
    cache.record(first, prompt, 8)
    cache.record(second, longer, 13)
    assert cache.look_up(BASE, longer).tokens == 12
    third = cache.open(BASE, longer)
    assert third.block_table == [0, 1, 4]  # the shared pages of both
    cache.check_integrity()
    for seq in (second, first, third):
        cache.close(seq)
        cache.check_integrity()
    assert counts(cache) == (5, 3, 0)


def test_a_recomputed_page_replaces_the_unread_one() -> None:
    cache = KVCacheManager(8, PAGE)
    prompt = tokens(0, 9)
    cache.close(compute(cache, prompt))
    seq = cache.open(BASE, prompt[:1])
    assert (seq.cached_tokens, seq.block_table) == (0, [])
    assert cache.reserve(seq, 9)
    assert seq.block_table == [2, 3, 4]
    cache.record(seq, prompt, 9)
    assert cache.reachable_pages(BASE) == {2, 3}
    assert counts(cache) == (5, 0, 3)
    cache.check_integrity()
    assert cache.statistics().queried_tokens == 10  # the first sequence's 9; this one asked for 1


def test_matching_has_no_side_effects() -> None:
    cache = KVCacheManager(4, PAGE)
    cache.close(compute(cache, tokens(0, 8)))
    cache.close(compute(cache, tokens(100, 8)))
    before = cache.statistics()
    for _ in range(3):
        assert cache.look_up(BASE, tokens(0, 9)).tokens == 8
        assert cache.look_up("unheard of", tokens(0, 9)).tokens == 0
    assert cache.statistics() == before
    seq = cache.open(BASE, [7])
    assert cache.reserve(seq, PAGE)
    assert seq.block_table == [1]  # still the least recently used
    assert list(cache._trie._roots) == [BASE]


def test_two_versions_of_an_adapter_share_nothing() -> None:
    cache = KVCacheManager(8, PAGE)
    prompt = tokens(0, 9)
    one, two = AdapterVersion("tutor", 1), AdapterVersion("tutor", 2)
    first = compute(cache, prompt, one)
    assert cache.look_up(two, prompt).tokens == 0
    second = compute(cache, prompt, two)
    assert second.cached_tokens == 0
    assert set(first.block_table).isdisjoint(second.block_table)
    assert cache.reachable_pages(one) == {0, 1}
    assert cache.reachable_pages(two) == {3, 4}
    assert cache.reachable_pages(BASE) == frozenset()


def test_dropping_a_namespace_frees_what_nobody_reads_now_and_the_rest_when_released() -> None:
    cache = KVCacheManager(10, PAGE)
    old, new = AdapterVersion("tutor", 1), AdapterVersion("tutor", 2)
    cache.close(compute(cache, tokens(0, 12), old))  # 0 1 2
    cache.close(compute(cache, tokens(50, 4), new))  # 3
    reader = cache.open(old, tokens(0, 6))  # reads 0
    assert cache.reserve(reader, 9)  # and owns 4 5
    assert counts(cache) == (4, 3, 3)
    cache.drop_namespace(old)
    cache.check_integrity()
    assert counts(cache) == (6, 1, 3)
    assert cache.reachable_pages(old) == frozenset()
    assert cache.look_up(old, tokens(0, 12)).tokens == 0
    assert reader.block_table == [0, 4, 5]

    cache.record(reader, tokens(0, 9), 9)
    assert cache.reachable_pages(old) == frozenset()
    assert cache.reserve(reader, 13)  # it goes on to its end
    cache.close(reader)
    cache.check_integrity()
    assert counts(cache) == (9, 1, 0)
    assert cache.reachable_pages(new) == {3}


def test_a_page_read_by_two_sequences_of_a_dropped_namespace_is_free_after_both() -> None:
    cache = KVCacheManager(4, PAGE)
    first = compute(cache, tokens(0, 9))
    second = cache.open(BASE, tokens(0, 9))
    cache.drop_namespace(BASE)
    cache.close(first)
    assert counts(cache) == (2, 0, 2)
    assert second.block_table == [0, 1]
    cache.check_integrity()
    cache.close(second)
    assert counts(cache) == (4, 0, 0)


def test_a_dropped_namespace_does_not_come_back() -> None:
    cache = KVCacheManager(4, PAGE)
    cache.drop_namespace(BASE)  # before it was ever used
    late = compute(cache, tokens(0, 9))
    assert cache.reachable_pages(BASE) == frozenset()
    assert cache.open(BASE, tokens(0, 9)).cached_tokens == 0
    cache.close(late)
    assert counts(cache) == (4, 0, 0)
    cache.drop_namespace(BASE)
    cache.check_integrity()


def test_a_preempted_sequence_finds_its_pages_again() -> None:
    cache = KVCacheManager(8, PAGE)
    known = tokens(0, 11)
    seq = compute(cache, known)
    assert seq.block_table == [0, 1, 2]
    cache.close(seq)
    again = cache.open(BASE, [*known, 50])
    assert again.block_table == [0, 1]
    assert again.cached_tokens == 8


def test_without_sharing_every_page_is_private() -> None:
    cache = KVCacheManager(8, PAGE, enable_prefix_sharing=False)
    first = compute(cache, tokens(0, 9))
    second = compute(cache, tokens(0, 9))
    assert (first.block_table, second.block_table) == ([0, 1, 2], [3, 4, 5])
    assert cache.look_up(BASE, tokens(0, 9)).tokens == 0
    cache.close(first)
    assert counts(cache) == (5, 0, 3)
    cache.drop_namespace(BASE)
    cache.close(second)
    assert cache.statistics() == CacheStatistics(
        total_pages=8,
        free_pages=8,
        cached_pages=0,
        owned_pages=0,
        hit_tokens=0,
        queried_tokens=0,
        evicted_pages=0,
    )


def test_statistics_count_hits_queries_and_evictions() -> None:
    cache = KVCacheManager(4, PAGE)
    cache.close(compute(cache, tokens(0, 10)))
    cache.close(compute(cache, tokens(0, 10)))
    seq = cache.open(BASE, tokens(100, 16))
    assert cache.reserve(seq, 16)
    assert cache.statistics() == CacheStatistics(
        total_pages=4,
        free_pages=0,
        cached_pages=0,
        owned_pages=4,
        hit_tokens=8,
        queried_tokens=36,
        evicted_pages=2,
    )


def test_pages_of_one_token_work() -> None:
    cache = KVCacheManager(4, 1)
    cache.close(compute(cache, [5, 6, 7]))
    seq = cache.open(BASE, [5, 6, 7])
    assert seq.block_table == [0, 1]
    assert cache.reserve(seq, 4)


def test_what_was_forgotten_about_a_page_is_found() -> None:
    cache = KVCacheManager(4, PAGE)
    seq = compute(cache, tokens(0, 9))
    seq.block_table.pop()
    with pytest.raises(AssertionError, match="page 2 has 1 references; 0 block tables name it"):
        cache.check_integrity()


# --- the next version -------------------------------------------------------------------------


def test_a_revived_namespace_is_empty_and_usable_beside_the_sequences_of_its_first_life() -> None:
    cache = KVCacheManager(8, PAGE)
    old = compute(cache, tokens(0, 9))
    cache.drop_namespace(BASE)
    cache.revive_namespace(BASE)
    assert cache.look_up(BASE, tokens(0, 9)).tokens == 0
    new = compute(cache, tokens(0, 9))
    assert cache.look_up(BASE, tokens(0, 9)).tokens == 8
    assert not cache.reachable_pages(BASE) & set(old.block_table)
    cache.record(old, tokens(0, 12), 8)  # is not heard any more
    cache.check_integrity()
    cache.close(old)
    cache.close(new)
    cache.check_integrity()
    assert cache.open(BASE, tokens(0, 9)).cached_tokens == 8


def test_hot_prefixes_are_those_of_more_than_one_sequence_the_most_used_first() -> None:
    cache = KVCacheManager(64, PAGE)
    often, twice, once = tokens(0, 8), tokens(100, 12), tokens(200, 8)
    for prompt, count in ((often, 5), (twice, 2), (once, 1)):
        for i in range(count):
            cache.close(compute(cache, [*prompt, *tokens(1000 + 50 * i, 6)]))
    assert cache.hot_prefixes(BASE, 1000) == [tuple(often), tuple(twice)]
    assert cache.hot_prefixes(BASE, 8) == [tuple(often)]
    assert cache.hot_prefixes(BASE, 13) == [tuple(often), tuple(twice[:4])]
    assert cache.hot_prefixes(BASE, 3) == []
    assert cache.hot_prefixes(("tutor", 1), 1000) == []


def test_prefixes_that_fork_are_both_hot_and_their_beginning_is_paid_for_once() -> None:
    cache = KVCacheManager(64, PAGE)
    stem, left, right = tokens(0, 4), tokens(100, 4), tokens(200, 4)
    for tail in (left, left, left, right, right):
        cache.close(compute(cache, [*stem, *tail, 1]))
    assert cache.hot_prefixes(BASE, 12) == [(*stem, *left), (*stem, *right)]


def test_asking_for_hot_prefixes_changes_nothing() -> None:
    cache = KVCacheManager(4, PAGE)
    for _ in range(2):
        cache.close(compute(cache, tokens(0, 9)))
    before = counts(cache), cache.statistics()
    for _ in range(3):
        assert cache.hot_prefixes(BASE, 100) == [tuple(tokens(0, 8))]
    assert (counts(cache), cache.statistics()) == before
