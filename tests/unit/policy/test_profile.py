"""A profile survives its file, and what is wrong with a file is named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from cotune.policy.costs import Costs, IterationShape
from cotune.policy.profile import (
    IterationPoint,
    MemoryCosts,
    Profile,
    ProfileError,
    ProfileKey,
    QuantumPoint,
    fit_costs,
)

VAST = 10**400
"""An integer that JSON takes and no float holds."""
KEY = ProfileKey(
    model="org/Some Model",
    fingerprint="f00",
    device="some card",
    dtype="bfloat16",
    threads=2,
    versions=(("cotune", "0.1.0"), ("torch", "2.13.0")),
)
TRUE = Costs(2e-3, 5e-5, 2e-8, 4e-5, 3e-9, 1e-4)
SHAPES = (
    IterationShape(1, 50),
    IterationShape(8, 400),
    IterationShape(8, 4000),
    IterationShape(32, 9000),
    IterationShape().with_chunk(32, 0),
    IterationShape().with_chunk(300, 0),
    IterationShape().with_chunk(64, 800),
    IterationShape().with_chunk(16, 0).with_chunk(16, 0).with_chunk(16, 0),
)
PROFILE = Profile(
    key=KEY,
    costs=TRUE._replace(per_row_s=(1e-5, 2e-5, 3e-5), margin=1.2, interference=1.3),
    memory=MemoryCosts(training_row_bytes=1000.5, prefill_token_bytes=200.0, page_bytes=4096),
    points=tuple(IterationPoint(shape=s, seconds=TRUE.iteration_s(s)) for s in SHAPES),
    quanta=(QuantumPoint(kind="forward", tokens=100, seconds=0.01),),
    created="2026-01-01T00:00:00+00:00",
    note="a note",
)


def with_field(path: str, value: object) -> dict[str, Any]:
    """The profile as JSON, with something else in one place."""
    data = copy.deepcopy(PROFILE.to_dict())
    place: Any = data
    *way, last = path.split(".")
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value
    return data


def test_what_is_written_is_read_back_the_same() -> None:
    assert Profile.from_dict(json.loads(json.dumps(PROFILE.to_dict()))) == PROFILE


def test_the_name_of_its_file_says_what_it_is_of_and_differs_with_every_field_of_the_key() -> None:
    assert KEY.file_name.startswith("org-some-model-bfloat16-")
    assert KEY.file_name.endswith(".json")
    others = [
        ProfileKey(**{**KEY.__class__.from_dict(KEY.to_dict()).to_dict(), **change})
        for change in (
            {"versions": (("torch", "3"),)},
            {"threads": 1, "versions": KEY.versions},
            {"device": "other", "versions": KEY.versions},
            {"fingerprint": "f01", "versions": KEY.versions},
        )
    ]
    assert len({KEY.file_name, *(other.file_name for other in others)}) == 5
    assert KEY.differences(others[1]) == ("threads",)
    assert KEY.differences(KEY) == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, r"format is 2, and 1 is read here; measure again with `cotune profile`"),
        ("format", None, r"format is None"),
        ("key", [], r"key is \[\], not an object"),
        ("key.device", 3, r"key.device is 3, not a text"),
        ("key.threads", -1, r"key.threads is -1, not a count"),
        ("key.versions.torch", 2.0, r"key.versions.torch is 2.0, not a text"),
        ("costs", None, r"costs is missing, not an object"),
        ("costs.base_s", None, r"costs.base_s is missing, not a number"),
        ("costs.base_s", -1e-3, r"costs.base_s is -0.001, not a number from 0 up"),
        ("costs.per_token_s", float("nan"), r"costs.per_token_s is nan, not a number from 0"),
        ("costs.per_token_s", True, r"costs.per_token_s is True, not a number"),
        ("costs.interference", 0.5, r"costs.interference is 0.5, and is 1 or more"),
        ("costs.per_row_s.backward", "x", r"costs.per_row_s.backward is 'x', not a number"),
        ("memory.page_bytes", 1.5, r"memory.page_bytes is 1.5, not a count"),
        ("points", {}, r"points is \{\}, not a list"),
        ("points.1.shape", [1, 2], r"points.1.shape is \[1, 2\], not 5 counts"),
        ("points.0.seconds", 0.0, r"points.0.seconds is 0; work takes time"),
        ("quanta.0.kind", "sideways", r"quanta.0.kind is 'sideways', no kind of quantum"),
        ("is_estimated", "no", r"is_estimated is 'no', not true or false"),
        ("created", None, r"created is missing, not a text"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(
    path: str, value: object, message: str
) -> None:
    data = with_field(path, value)
    with pytest.raises(ProfileError, match=message) as caught:
        Profile.from_dict(data)
    assert caught.value.field == path
    assert "cotune profile" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("costs.base_s", VAST),
        ("costs.per_token_s", -VAST),
        ("costs.per_row_s.forward", VAST),
        ("memory.training_row_bytes", VAST),
        ("memory.page_bytes", VAST),
        ("key.threads", 2**63),
        ("points.1.shape", [VAST, 0, 0, 0, 0]),
        ("points.0.seconds", 10**309),
        ("quanta.0.tokens", VAST),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_integer_beyond_all_numbers_is_refused_like_any_other_wrong_value(
    path: str, value: object
) -> None:
    data = with_field(path, value)
    data = json.loads(json.dumps(data))  # a file may hold it
    with pytest.raises(ProfileError, match=r"measure again with `cotune profile`") as caught:
        Profile.from_dict(data)
    assert caught.value.field == path
    assert len(str(caught.value)) < 200


def test_it_knows_prefill_if_any_was_measured_or_if_it_was_derived() -> None:
    assert PROFILE.knows_prefill
    decodes = replace(PROFILE, points=PROFILE.points[:4])
    assert not decodes.knows_prefill
    assert not replace(PROFILE, points=()).knows_prefill
    assert replace(decodes, is_estimated=True).knows_prefill


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_what_is_no_object_is_no_profile(value: object) -> None:
    with pytest.raises(ProfileError, match="profile is"):
        Profile.from_dict(value)


def test_costs_of_nothing_at_all_are_refused() -> None:
    data = PROFILE.to_dict()
    for name in ("base_s", "per_decode_s", "per_token_s"):
        data["costs"][name] = 0.0
    with pytest.raises(ProfileError, match="costs says that iterations take no time"):
        Profile.from_dict(data)


def test_the_fit_finds_the_costs_behind_its_points() -> None:
    costs = fit_costs(PROFILE.points)
    assert costs[:6] == pytest.approx(TRUE[:6], rel=0.02)
    assert max(Profile(key=KEY, costs=costs, points=PROFILE.points).errors()) < 1e-3
    assert costs.margin == 1.1


def test_the_margin_of_a_fit_covers_the_point_that_exceeds_it_most() -> None:
    slow = IterationPoint(shape=SHAPES[1], seconds=2 * TRUE.iteration_s(SHAPES[1]))
    points = (*PROFILE.points, slow)
    costs = fit_costs(points)
    assert costs.margin == pytest.approx(slow.seconds / costs.iteration_s(slow.shape))
    assert costs.margin > 1.3


def test_a_fit_of_one_point_predicts_that_point() -> None:
    costs = fit_costs(PROFILE.points[:1])
    assert costs.iteration_s(SHAPES[0]) == pytest.approx(PROFILE.points[0].seconds)
    with pytest.raises(ValueError, match="points is empty"):
        fit_costs(())


def test_measured_quanta_give_their_own_rows_and_the_others_are_derived() -> None:
    quanta = [
        QuantumPoint(kind=kind, tokens=tokens, seconds=1e-3 + tokens * row_s)
        for kind, row_s in (("forward", 6e-5), ("backward", 9e-5))
        for tokens in (64, 256)
    ]
    quanta.append(QuantumPoint(kind="step", tokens=0, seconds=4e-3))
    costs = fit_costs(PROFILE.points, quanta)
    assert costs.per_row_s[1:] == pytest.approx((6e-5, 9e-5), rel=0.02)
    assert costs.per_row_s[0] == costs.per_row_s[1]
    assert (costs.quantum_base_s, costs.step_s) == pytest.approx((1e-3, 4e-3), rel=0.02)
    without = fit_costs(PROFILE.points)
    assert without.per_row_s[1] == pytest.approx(2.5 * without.per_token_s)
    assert without.step_s > 0.0
