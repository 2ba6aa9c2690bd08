from __future__ import annotations

import pytest

from cotune.cache.pages import PagePool


def test_pages_come_in_order_and_page_zero_is_one_of_them() -> None:
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.free_pages == 1
    assert pool.allocate(1) == [3]
    assert pool.free_pages == 0
    pool.check_integrity()


def test_allocating_is_all_or_nothing() -> None:
    pool = PagePool(3)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) is None
    assert pool.free_pages == 1
    assert pool.allocate(1) == [2]


def test_allocating_nothing_takes_nothing() -> None:
    pool = PagePool(2)
    assert pool.allocate(0) == []
    assert pool.free_pages == 2


def test_a_page_is_free_when_its_last_holder_leaves() -> None:
    pool = PagePool(2)
    assert pool.allocate(1) == [0]
    pool.retain(0)
    assert pool.references(0) == 2
    pool.release(0)
    assert (pool.references(0), pool.free_pages) == (1, 1)
    pool.release(0)
    assert (pool.references(0), pool.free_pages) == (0, 2)
    pool.check_integrity()


def test_the_page_released_last_is_handed_out_first() -> None:
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release(1)
    pool.release(0)
    assert pool.allocate(3) == [0, 1, 3]


@pytest.mark.parametrize("page", [-1, 0, 2])
def test_a_page_that_is_not_allocated_can_be_neither_retained_nor_released(page: int) -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match=f"cannot retain page {page}"):
        pool.retain(page)
    with pytest.raises(ValueError, match=f"cannot release page {page}"):
        pool.release(page)
    pool.check_integrity()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)
    with pytest.raises(ValueError, match="cannot allocate -1 pages"):
        PagePool(1).allocate(-1)


# -- growth --------------------------------------------------------------------------------------


def test_pages_that_were_given_back_go_before_those_that_were_never_used() -> None:
    pool = PagePool(6)
    assert pool.unused_pages == 6
    assert pool.allocate(3) == [0, 1, 2]
    for page in (0, 1, 2):
        pool.release(page)
    assert pool.unused_pages == 3
    assert pool.allocate(3) == [2, 1, 0]
    assert pool.unused_pages == 3


def test_growth_is_limited_to_so_many_pages_more() -> None:
    pool = PagePool(6)
    assert pool.allocate(2) == [0, 1]
    pool.limit_growth(1)
    assert (pool.free_pages, pool.available_pages, pool.unused_pages) == (4, 1, 1)
    assert pool.kept_back_pages > 0
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [2]
    assert (pool.available_pages, pool.unused_pages) == (0, 0)
    assert pool.allocate(1) is None
    pool.check_integrity()


def test_a_limit_keeps_no_page_back_that_was_used_before() -> None:
    pool = PagePool(6)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.limit_growth(0)
    assert pool.allocate(1) is None
    pool.release(3)
    pool.release(1)
    assert (pool.available_pages, pool.unused_pages) == (2, 0)
    assert pool.allocate(2) == [1, 3]


@pytest.mark.parametrize("pages", [None, 6, 100])
def test_a_limit_beyond_what_there_is_is_none(pages: int | None) -> None:
    pool = PagePool(6)
    pool.limit_growth(2)
    pool.limit_growth(pages)
    assert pool.kept_back_pages == 0
    assert pool.unused_pages == pool.available_pages == 6
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]


def test_a_limit_below_nothing_is_nothing() -> None:
    pool = PagePool(6)
    assert pool.allocate(1) == [0]
    pool.limit_growth(-3)
    assert (pool.available_pages, pool.unused_pages) == (0, 0)


def test_a_leaked_page_is_found() -> None:
    pool = PagePool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="are not the unreferenced pages"):
        pool.check_integrity()
