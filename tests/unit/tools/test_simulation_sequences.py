"""Pages in virtual time: who has what in common."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cotune.policy.types import Budgets
from cotune.tools.simulation_sequences import PageKeys, SequenceTable
from cotune.tools.traces import Segment, TraceRequest

SIZE = 4
LENGTHS = {1: 3, 2: 4, 3: 9}
"""Tokens of a segment, by its key."""


def request(keys: list[int], own: int) -> TraceRequest:
    """A prompt of these segments, then some tokens that nobody else has."""
    ends = [sum(LENGTHS[key] for key in keys[: place + 1]) for place in range(len(keys))]
    segments = tuple(Segment(key, end) for key, end in zip(keys, ends, strict=True))
    total = (ends[-1] if ends else 0) + own
    return TraceRequest(arrival_s=0.0, prompt_tokens=total, output_tokens=0, segments=segments)


def tokens_of(keys: list[int], own: int, name: int) -> list[object]:
    """The same, token by token: each named by where it stands."""
    found: list[object] = []
    for place, key in enumerate(keys):
        found += [(tuple(keys[: place + 1]), offset) for offset in range(LENGTHS[key])]
    return found + [(name, offset) for offset in range(own)]


prompts = st.tuples(st.lists(st.sampled_from(sorted(LENGTHS)), max_size=3), st.integers(1, 9))


@given(st.lists(prompts, min_size=2, max_size=6))
def test_full_pages_have_one_key_exactly_where_all_tokens_so_far_agree(
    given_prompts: list[tuple[list[int], int]],
) -> None:
    made = PageKeys(SIZE)
    keys = []
    tokens = []
    for name, (path, own) in enumerate(given_prompts):
        asked = request(path, own)
        keys.append(made.of(asked, asked.prompt_tokens))
        tokens.append(tokens_of(path, own, name))
        assert len(keys[-1]) == -(-asked.prompt_tokens // SIZE)
    for one in range(len(keys)):
        for other in range(one):
            full = min(len(tokens[one]), len(tokens[other])) // SIZE
            for page in range(full):
                end = (page + 1) * SIZE
                agree = tokens[one][:end] == tokens[other][:end]
                assert (keys[one][page] == keys[other][page]) is agree


def test_a_sequence_that_finds_no_pages_waits_until_there_are_some() -> None:
    table = SequenceTable(Budgets(tokens=64, sequences=8, page_size=SIZE), 4, is_sharing=True)
    first = table.add(request([3], 1), 0.0, None)  # ten tokens: three of the four pages
    assert table.start(first)
    second = table.add(request([3], 3), 0.0, None)
    table.refresh_hints()
    assert table.views[0].coming == 8
    table.compute(first, 10)  # its two full pages can be found from here on
    assert not table.start(table.add(request([2, 2], 1), 0.0, None))
    assert table.start(second)
    assert second.computed == 8
    assert table.waiting[0].number == 2
    table.remove(first)
    table.remove(second)
    assert table.start(table.waiting[0])
    table.remove(table.running[0])
    table.check_pages()
