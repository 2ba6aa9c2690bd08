"""The page pool: which KV pages are free and how many hold on to each of the others.

A page is room for the KV of `page_size` tokens in every layer. The pool knows pages by number
alone, 0 to P-1; the tensors live with the executor.

    references   [ 0 | 2 | 1 | 0 | 1 | 0 ]     one counter per page; 0 is free
    free stack   [ 5  3  0 ]                   the next page handed out is the last one, 0

A page is free, or referenced by one or more holders: each sequence whose block table names it, and
the prefix trie. Page 0 is a page like any other.
"""

from __future__ import annotations


class PagePool:
    """The only writer of free pages and reference counts.

    Every operation costs as much as the pages it names, whatever the size of the pool. Not thread
    safe: it belongs to the thread of its `KVCacheManager`.

    Args:
        num_pages: how many pages exist, at least 1.
    """

    __slots__ = ("_free", "_hidden", "_references", "_touched", "num_pages")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least 1 page")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        # Last in, first out: a page just given back is the one whose lines are still in a cache.
        # So those that were never used lie at the bottom, the highest number first.
        self._free = list(range(num_pages - 1, -1, -1))
        self._touched = 0
        self._hidden = 0

    @property
    def free_pages(self) -> int:
        """Pages that nobody references."""
        return len(self._free)

    @property
    def available_pages(self) -> int:
        """Of the free pages, those that may be handed out now; see `limit_growth`."""
        return len(self._free) - self._hidden

    @property
    def unused_pages(self) -> int:
        """Of the available pages, those that were never handed out."""
        return self.num_pages - self._touched - self._hidden

    @property
    def kept_back_pages(self) -> int:
        """Free pages that may not be handed out now."""
        return self._hidden

    def limit_growth(self, pages: int | None) -> None:
        """From now on hand out at most so many pages that never were before; None: all.

        On devices that give memory when it is first written to, those are the ones that cost.
        """
        unused = self.num_pages - self._touched
        self._hidden = 0 if pages is None else min(max(0, unused - pages), unused)

    def references(self, page: int) -> int:
        """How many hold on to `page`; 0 if it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages, each with one reference, or None (and none taken) if too few.

        What the pages hold is left over from their last owner.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages; ask for 0 or more")
        left = len(self._free) - count
        if left < self._hidden:
            return None
        pages = self._free[left:]
        del self._free[left:]
        pages.reverse()
        for page in pages:
            self._references[page] = 1
        self._touched = max(self._touched, max(pages, default=-1) + 1)
        return pages

    def retain(self, page: int) -> None:
        """Add a reference to a page that somebody already holds."""
        if not 0 <= page < self.num_pages or self._references[page] == 0:
            raise ValueError(f"cannot retain page {page}: it is not allocated")
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Give one reference back; with the last one the page is free."""
        if not 0 <= page < self.num_pages or self._references[page] == 0:
            raise ValueError(f"cannot release page {page}: it is not allocated")
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless exactly the unreferenced pages are free, each once.

        Looks at every page; for tests and idle moments.
        """
        unreferenced = [page for page, count in enumerate(self._references) if count == 0]
        if sorted(self._free) != unreferenced:
            raise AssertionError(
                f"free pages {sorted(self._free)} are not the unreferenced pages {unreferenced}"
            )
        negative = [page for page, count in enumerate(self._references) if count < 0]
        if negative:
            raise AssertionError(f"pages {negative} have a negative number of references")
