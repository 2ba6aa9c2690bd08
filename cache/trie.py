"""The prefix trie: which full pages of KV may be shared, and in which order they may go.

A node is one full page: the tokens it stands for and the page that holds their KV. The path from
the root spells every token before it, so two sequences that reach a node agree on everything that
page's KV depends on. The root is the namespace, the weights that computed the KV; a page is in one
tree only, so no page can ever be read under other weights. With pages of 2 tokens:

    ("base", 0)                               ("tutor", 3)
    ├── [5 9] page 4, readers 3               └── [5 9] page 1, readers 0
    │   ├── [7 7] page 0, readers 1               └── [7 7] page 8, readers 0
    │   └── [7 2] page 6, readers 1, spare 3
    └── [8 8] page 2, readers 0               unread, oldest first: 8  1  2

*Readers* are the open sequences with the node's page in their block table. A node with a reader
has readers in all nodes above it. So whatever nobody reads can be evicted, leaves first.

*Order of eviction.* A sequence that ends leaves its path from the deepest node up, and each node
that loses its last reader then goes to the end of one list. Whatever touches a node later touches
those above it too and moves them further back. So in that list a node always stands behind all
nodes below it; its head is the least recently used page and a leaf. Eviction pops the head. No
clock, no scan.

*Spares.* Two sequences may compute the same prefix at the same time. The second finds the page in
the trie when it wants to record its own. Its block table stays as it is (a step may be using it):
it goes on below the node, and its page is noted there as a spare. When the last reader of the
node's page leaves, a spare takes its place, and the old page is given back at once. So the trie
never keeps a page from being used that no sequence reads.

*Uses.* A node counts the sequences that came to it, by finding it or by computing the same. Whoever
comes to a node came to all nodes above it. So counts never grow on the way down, and the most used
pages of a namespace are found from the root without looking at the rest.

The trie returns pages and never frees them. It counts as one holder of each page that it names,
spares included, from the call that hands the page in to the call that returns it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

Tokens: TypeAlias = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Root:
    """A namespace. It stays while it has pages or cursors."""

    namespace: Hashable
    children: dict[Tokens, _Node] = field(default_factory=dict)
    cursors: int = 0
    is_retired: bool = False


@dataclass(slots=True, eq=False)
class _Node:
    """One full page. `spares` are copies of its KV that other sequences computed for themselves."""

    parent: _Node | _Root
    tokens: Tokens
    page: int
    readers: int = 1
    uses: int = 1
    children: dict[Tokens, _Node] = field(default_factory=dict)
    spares: tuple[int, ...] = ()


class PrefixCursor:
    """How far one sequence has come in the trie. Opaque: only `PrefixTrie` moves it.

    Every node from the root down to the cursor is kept by it: the sequence reads the node's page
    or has a spare there.
    """

    __slots__ = ("_node", "_root", "depth")

    def __init__(self, root: _Root) -> None:
        self._root = root
        self._node: _Node | _Root = root
        self.depth = 0

    @property
    def is_retired(self) -> bool:
        """Whether the namespace was retired under the cursor: nothing more can be shared."""
        return self._root.is_retired


class PrefixTrie:
    """The only writer of shared prefixes. Pages go in, and come back as return values.

    Costs follow the pages named in a call; `retire` and the diagnostics walk a whole tree. Not
    thread safe: it belongs to the thread of its `KVCacheManager`.

    Args:
        page_size: tokens per page, at least 1.
    """

    __slots__ = ("_page_size", "_retired", "_roots", "_unread", "turnover")

    def __init__(self, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; a page holds at least 1 token")
        self._page_size = page_size
        self._roots: dict[Hashable, _Root] = {}
        # One small key per version that is retired: what keeps a late sequence from reviving it.
        self._retired: set[Hashable] = set()
        # Nodes without readers, least recently used first, children before parents.
        self._unread: OrderedDict[_Node, None] = OrderedDict()
        self.turnover = 0
        """Times that pages got their first reader, lost their last one or were taken out."""

    @property
    def evictable_pages(self) -> int:
        """Pages that no sequence reads; `evict` can return all of them."""
        return len(self._unread)

    def match(
        self, namespace: Hashable, token_ids: Sequence[int], max_pages: int
    ) -> tuple[int, int]:
        """How many of the first `max_pages` pages of `token_ids` are there, and how many unread.

        No side effects.
        """
        root = self._roots.get(namespace)
        pages = unread = 0
        if root is not None:
            for node in self._descend(root, token_ids, max_pages):
                pages += 1
                unread += node.readers == 0
        return pages, unread

    def attach(self, namespace: Hashable) -> PrefixCursor | None:
        """A cursor at the root of `namespace`, or None if it is retired.

        The cursor must be handed to `detach` in the end.
        """
        if namespace in self._retired:
            return None
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = _Root(namespace)
        root.cursors += 1
        return PrefixCursor(root)

    def follow(self, cursor: PrefixCursor, token_ids: Sequence[int], max_pages: int) -> list[int]:
        """Move a fresh cursor down the longest path that spells `token_ids`, as a reader.

        Returns the pages passed, in order, at most `max_pages`. They stay until `detach`.
        """
        assert cursor.depth == 0
        pages = []
        for node in self._descend(cursor._root, token_ids, max_pages):
            if node.readers == 0:
                del self._unread[node]
                self.turnover += 1
            node.readers += 1
            node.uses += 1
            pages.append(node.page)
            cursor._node = node
        cursor.depth = len(pages)
        return pages

    def insert(self, cursor: PrefixCursor, tokens: Tokens, page: int) -> int | None:
        """Put one full page below the cursor and move the cursor onto it.

        The caller's sequence has `page` in its block table. If the trie has no page for these
        tokens, this one becomes it. If it has one that nobody reads, this one takes its place and
        the old one is returned. If it has one with readers, this one becomes a spare.

        Returns:
            A page that the trie no longer holds, or None. It holds `page` from now on.

        Raises:
            ValueError: the page is not full, or the namespace is retired.
        """
        if cursor.is_retired:
            raise ValueError(
                f"namespace {cursor._root.namespace!r} is retired; nothing can be recorded in it"
            )
        if len(tokens) != self._page_size:
            raise ValueError(
                f"{len(tokens)} tokens do not fill a page of {self._page_size}; only full pages "
                "can be recorded"
            )
        displaced = None
        parent = cursor._node
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = _Node(parent, tokens, page)
        elif node.readers == 0:
            del self._unread[node]
            self.turnover += 1
            displaced, node.page, node.readers = node.page, page, 1
            node.uses += 1
        else:
            node.spares = (*node.spares, page)
            node.uses += 1
        cursor._node = node
        cursor.depth += 1
        return displaced

    def detach(self, cursor: PrefixCursor, block_table: Sequence[int]) -> list[int]:
        """Take the cursor's sequence off its path; the cursor is of no use afterwards.

        Args:
            cursor: from `attach`.
            block_table: the sequence's pages in order; the first `cursor.depth` are looked at.

        Returns:
            The pages that the trie no longer holds: the sequence's spares, and pages whose place a
            spare took. Nothing for a retired namespace, whose pages were returned by `retire`.
        """
        root = cursor._root
        if root.is_retired:
            return []
        given_up = []
        node = cursor._node
        for depth in range(cursor.depth - 1, -1, -1):
            assert isinstance(node, _Node)
            page = block_table[depth]
            if page != node.page:
                node.spares = tuple(spare for spare in node.spares if spare != page)
                given_up.append(page)
            elif node.readers > 1:
                node.readers -= 1
            elif node.spares:
                given_up.append(page)
                node.page, *spares = node.spares  # the oldest; its sequence reads it
                node.spares = tuple(spares)
            else:
                node.readers = 0
                self._unread[node] = None
                self.turnover += 1
            node = node.parent
        root.cursors -= 1
        self._forget_if_empty(root)
        return given_up

    def private_pages(self, cursor: PrefixCursor, block_table: Sequence[int]) -> int:
        """Of the first `cursor.depth` pages, those that nobody reads once it is detached."""
        count = 0
        node = cursor._node
        for depth in range(cursor.depth - 1, -1, -1):
            assert isinstance(node, _Node)
            count += block_table[depth] != node.page or node.readers == 1
            node = node.parent
        return count

    def evict(self, count: int) -> list[int]:
        """Take out up to `count` pages that nobody reads, least recently used first."""
        pages = []
        for _ in range(min(count, len(self._unread))):
            self.turnover += 1
            node, _none = self._unread.popitem(last=False)
            assert not node.children
            parent = node.parent
            del parent.children[node.tokens]
            if isinstance(parent, _Root):
                self._forget_if_empty(parent)
            pages.append(node.page)
        return pages

    def hot_paths(self, namespace: Hashable, max_pages: int, min_uses: int) -> list[list[Tokens]]:
        """The most used pages of a namespace, as paths from the root, most used first.

        Args:
            namespace: whose tree is read.
            max_pages: most pages in all; a page that several paths share counts once.
            min_uses: pages with fewer uses are left out.

        Returns:
            For each page that none of the chosen ones follows, the tokens of the pages from the
            root down to it. Costs follow `max_pages` and the children of the pages chosen.
        """
        root = self._roots.get(namespace)
        if root is None:
            return []
        # No page is used more often than the one above it. So taking the most used of all that
        # are within reach takes the most used of all there are. The number breaks ties: the page
        # that was reached first.
        reach: list[tuple[int, int, _Node]] = []
        numbers = itertools.count()

        def reach_below(parent: _Node | _Root) -> None:
            for node in parent.children.values():
                if node.uses >= min_uses:
                    heapq.heappush(reach, (-node.uses, next(numbers), node))

        reach_below(root)
        chosen: dict[_Node, None] = {}
        while reach and len(chosen) < max_pages:
            _uses, _number, node = heapq.heappop(reach)
            chosen[node] = None
            reach_below(node)
        inner = {node.parent for node in chosen}
        paths = [_path(node) for node in chosen if node not in inner]
        # What a path saves: all its pages, each as often as it is used.
        paths.sort(key=lambda path: sum(node.uses for node in path), reverse=True)
        return [[node.tokens for node in path] for path in paths]

    def revive(self, namespace: Hashable) -> None:
        """Take `retire` back: the namespace may be used again, and begins empty.

        Right only where it names the same weights as before. Cursors from before stay retired.
        """
        self._retired.discard(namespace)

    def retire(self, namespace: Hashable) -> list[int]:
        """Take a namespace out: nothing is found in it or recorded under it until `revive`.

        Returns every page that the trie held for it. Those that sequences still read are theirs
        alone from now on. Retiring twice returns nothing the second time.
        """
        self._retired.add(namespace)
        root = self._roots.pop(namespace, None)
        if root is None:
            return []
        root.is_retired = True
        self.turnover += 1
        pages = []
        for node in list(_walk(root)):
            if node.readers == 0:
                del self._unread[node]
            pages.append(node.page)
            pages.extend(node.spares)
            node.children.clear()  # parents and children hold one another: help the collector
        root.children.clear()
        return pages

    def pages(self, namespace: Hashable) -> frozenset[int]:
        """Every page that a new sequence of `namespace` could be given. Walks its whole tree."""
        root = self._roots.get(namespace)
        return frozenset() if root is None else frozenset(node.page for node in _walk(root))

    def holdings(self) -> dict[int, int]:
        """Each page that the trie holds and how many open sequences it knows to read it.

        Walks everything; for integrity checks.
        """
        readers: dict[int, int] = {}
        for root in self._roots.values():
            for node in _walk(root):
                readers[node.page] = node.readers
                readers.update(dict.fromkeys(node.spares, 1))
        return readers

    def check_integrity(self) -> None:
        """Raise `AssertionError` where a statement of the module's docstring does not hold.

        Walks everything; for tests and idle moments.
        """
        order = {node: index for index, node in enumerate(self._unread)}
        owner: dict[int, Hashable] = {}
        unread = 0
        for namespace, root in self._roots.items():
            _check(namespace not in self._retired and not root.is_retired, f"{namespace} lives on")
            _check(bool(root.children) or root.cursors > 0, f"{namespace} is empty but not gone")
            for node in _walk(root):
                name = f"the node of page {node.page} in {namespace}"
                most = node.uses if isinstance(node.parent, _Root) else node.parent.uses
                _check(1 <= node.uses <= most, f"{name} is used more than the one above")
                for page in (node.page, *node.spares):
                    _check(
                        page not in owner, f"page {page} is in {owner.get(page)} and {namespace}"
                    )
                    owner[page] = namespace
                _check(len(node.tokens) == self._page_size, f"{name} is not full")
                _check(node.parent.children.get(node.tokens) is node, f"{name} has a wrong parent")
                _check(node.readers > 0 or not node.spares, f"{name} has spares but no reader")
                _check((node.readers == 0) == (node in order), f"{name} is in the wrong list")
                unread += node.readers == 0
                # Spares take part: their sequences keep the node as readers do.
                keepers = node.readers + len(node.spares)
                below = sum(c.readers + len(c.spares) for c in node.children.values())
                _check(keepers >= below, f"{name} has {keepers} keepers, fewer than {below} below")
                if node.readers == 0:
                    late = [c.page for c in node.children.values() if order[c] > order[node]]
                    _check(not late, f"{name} would be evicted before its children {late}")
            below = sum(c.readers + len(c.spares) for c in root.children.values())
            _check(root.cursors >= below, f"{namespace}: {root.cursors} cursors, {below} keepers")
        _check(unread == len(order), f"{len(order)} nodes await eviction, {unread} are in trees")

    def _descend(self, root: _Root, token_ids: Sequence[int], max_pages: int) -> Iterator[_Node]:
        """The nodes that spell the first pages of `token_ids`, top down."""
        size = self._page_size
        children = root.children
        for start in range(0, max_pages * size, size):
            node = children.get(tuple(token_ids[start : start + size]))
            if node is None:
                return
            yield node
            children = node.children

    def _forget_if_empty(self, root: _Root) -> None:
        if root.cursors == 0 and not root.children:
            del self._roots[root.namespace]


def _path(node: _Node) -> list[_Node]:
    """From the root's child down to `node`."""
    path = [node]
    while isinstance(node.parent, _Node):
        node = node.parent
        path.append(node)
    path.reverse()
    return path


def _walk(root: _Root) -> Iterator[_Node]:
    """Every node below `root`, parents first."""
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
