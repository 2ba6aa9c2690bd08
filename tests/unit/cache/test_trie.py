"""The trie alone: pages are numbers that go in and come back, nothing is freed here."""

from __future__ import annotations

import pytest

from cotune.cache.trie import PrefixCursor, PrefixTrie


def cursor_in(trie: PrefixTrie, namespace: str = "base") -> PrefixCursor:
    cursor = trie.attach(namespace)
    assert cursor is not None
    return cursor


def add_path(
    trie: PrefixTrie, tokens: list[int], pages: list[int], namespace: str = "base"
) -> None:
    """Record a path of two-token pages that nobody reads afterwards."""
    cursor = cursor_in(trie, namespace)
    known = trie.follow(cursor, tokens, len(pages))
    assert known == pages[: len(known)]
    for depth in range(len(known), len(pages)):
        assert trie.insert(cursor, (tokens[2 * depth], tokens[2 * depth + 1]), pages[depth]) is None
    assert trie.detach(cursor, pages) == []
    trie.check_integrity()


def test_a_prefix_is_found_page_by_page() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4], [10, 11])
    assert trie.match("base", [1, 2, 3, 4, 5, 6], 3) == (2, 2)
    assert trie.match("base", [1, 2, 3, 4], 1) == (1, 1)
    assert trie.match("base", [1, 2, 9, 4], 2) == (1, 1)
    assert trie.match("base", [9, 2, 3, 4], 2) == (0, 0)
    assert trie.match("base", [1, 2, 3], 2) == (1, 1)  # half a page is no page


def test_namespaces_never_meet() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2], [10], "a")
    add_path(trie, [1, 2], [20], "b")
    assert trie.pages("a") == {10}
    assert trie.pages("b") == {20}
    assert trie.match("c", [1, 2], 1) == (0, 0)


def test_eviction_takes_leaves_first_and_the_least_recently_used_path_first() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    add_path(trie, [7, 8], [20])
    add_path(trie, [1, 2, 9, 9], [10, 13])  # uses page 10 again: it now goes after 20
    assert trie.evictable_pages == 5
    assert trie.evict(2) == [12, 11]
    assert trie.evict(99) == [20, 13, 10]
    assert trie.evict(1) == []
    trie.check_integrity()


def test_evicting_never_touches_a_page_that_is_read() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4], [10, 11])
    reader = cursor_in(trie)
    assert trie.follow(reader, [1, 2, 9, 9], 2) == [10]
    assert trie.evict(99) == [11]
    trie.check_integrity()
    assert trie.detach(reader, [10]) == []
    assert trie.evict(99) == [10]


def test_an_evicted_namespace_leaves_nothing_behind() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2], [10], "a")
    assert trie.evict(1) == [10]
    assert trie.detach(cursor_in(trie, "b"), []) == []
    assert trie._roots == {}


def test_an_evicted_namespace_stays_for_a_sequence_that_is_open_in_it() -> None:
    trie = PrefixTrie(2)
    idle = cursor_in(trie)
    add_path(trie, [1, 2], [10])
    assert trie.evict(1) == [10]
    assert trie.insert(idle, (3, 4), 11) is None
    assert trie.match("base", [3, 4], 1) == (1, 0)  # it is read
    trie.check_integrity()
    assert trie.detach(idle, [11]) == []
    assert trie.evict(1) == [11]
    assert trie._roots == {}


def test_a_second_page_for_the_same_tokens_is_kept_as_a_spare() -> None:
    trie = PrefixTrie(2)
    first, second = cursor_in(trie), cursor_in(trie)
    assert trie.insert(first, (1, 2), 10) is None
    assert trie.insert(second, (1, 2), 20) is None
    assert trie.insert(second, (3, 4), 21) is None
    assert trie.pages("base") == {10, 21}
    assert trie.holdings() == {10: 1, 20: 1, 21: 1}
    trie.check_integrity()
    assert trie.detach(second, [20, 21]) == [20]
    assert trie.evictable_pages == 1
    assert trie.detach(first, [10]) == []
    assert trie.evict(2) == [21, 10]


def test_a_spare_takes_the_place_of_a_page_whose_last_reader_leaves() -> None:
    trie = PrefixTrie(2)
    first, second, third = cursor_in(trie), cursor_in(trie), cursor_in(trie)
    for cursor, page in ((first, 10), (second, 20), (third, 30)):
        assert trie.insert(cursor, (1, 2), page) is None
    assert trie.detach(first, [10]) == [10]
    assert trie.pages("base") == {20}
    trie.check_integrity()
    assert trie.detach(second, [20]) == [20]
    assert trie.detach(third, [30]) == []
    assert trie.evict(9) == [30]


def test_a_page_replaces_one_that_nobody_reads() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4], [10, 11])
    late = cursor_in(trie)
    assert trie.insert(late, (1, 2), 20) == 10
    assert trie.pages("base") == {20, 11}
    assert trie.evictable_pages == 1
    trie.check_integrity()
    assert trie.detach(late, [20]) == []
    assert trie.evict(2) == [11, 20]


def test_retiring_returns_every_page_at_once_and_for_good() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4], [10, 11], "old")
    add_path(trie, [1, 2], [30], "new")
    reader, other = cursor_in(trie, "old"), cursor_in(trie, "old")
    assert trie.follow(reader, [1, 2], 1) == [10]
    assert trie.follow(other, [1, 2], 1) == [10]
    assert trie.insert(reader, (7, 7), 12) is None
    assert trie.insert(other, (7, 7), 13) is None
    assert sorted(trie.retire("old")) == [10, 11, 12, 13]
    assert trie.match("old", [1, 2], 1) == (0, 0)
    assert trie.retire("old") == []
    assert reader.is_retired
    with pytest.raises(ValueError, match="'old' is retired"):
        trie.insert(reader, (8, 8), 14)
    assert trie.detach(reader, [10, 12]) == []
    assert trie.attach("old") is None
    assert trie.pages("old") == frozenset()
    assert trie.pages("new") == {30}
    assert trie.evict(9) == [30]
    trie.check_integrity()


def test_only_full_pages_go_in() -> None:
    trie = PrefixTrie(2)
    with pytest.raises(ValueError, match="1 tokens do not fill a page of 2"):
        trie.insert(cursor_in(trie), (1,), 10)
    with pytest.raises(ValueError, match="page_size is 0"):
        PrefixTrie(0)


def test_a_page_in_two_namespaces_is_found() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2], [10], "a")
    with pytest.raises(AssertionError, match="page 10 is in a and b"):
        add_path(trie, [1, 2], [10], "b")


def test_a_wrong_order_of_eviction_is_found() -> None:
    trie = PrefixTrie(2)
    add_path(trie, [1, 2, 3, 4], [10, 11])
    trie._unread.move_to_end(next(iter(trie._unread)))
    with pytest.raises(AssertionError, match="would be evicted before its children"):
        trie.check_integrity()
