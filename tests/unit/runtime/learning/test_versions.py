"""Versions on disk: numbers, what is live, and what a crash at any moment leaves."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from cotune.runtime.errors import (
    AdapterLoadError,
    ConfigError,
    ConflictError,
    NotFoundError,
    StorageError,
)
from cotune.runtime.learning.versions import Lineage, Manifest, VersionStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
MANIFEST = Manifest(
    parent=0,
    lineage=Lineage(
        steps=40,
        samples=100,
        tokens=5000,
        last_sample_key=123,
        base_model="tiny",
        base_fingerprint="f00",
    ),
    metrics={"win_rate": 0.75, "gain": 0.1},
    explanation="passed; wins 75%",
    created=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
)


def saver(
    fill: float = 1.0, rank: int = 2, alpha: float = 4.0, swap: bool = False
) -> Callable[[Path], None]:
    """Writes a PEFT directory of one linear; every weight of A is `fill`."""

    def save(directory: Path) -> None:
        a, b = torch.full((rank, 3), fill), torch.ones(5, rank)
        if swap:  # the same product from other factors
            a, b = a * 2, b / 2
        save_file(
            {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b},
            directory / "adapter_model.safetensors",
        )
        (directory / "adapter_config.json").write_text(
            json.dumps({"r": rank, "lora_alpha": alpha, "peft_type": "LORA"})
        )

    return save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def store(root: Path) -> Iterator[VersionStore]:
    store = VersionStore(root)
    yield store
    store.close()


def publish(store: VersionStore, adapter: str = "tutor", *, refused: bool = False) -> int:
    number = store.next_number(adapter)
    store.write(adapter, number, saver(), MANIFEST, refused=refused)
    if not refused:
        store.set_live(adapter, number, "published")
    return number


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# --- numbers and versions -------------------------------------------------------------------------


def test_a_version_is_read_back_as_it_was_written(store: VersionStore) -> None:
    number = publish(store)
    (record,) = store.records()
    assert (record.adapter, record.number, record.state, record.is_live) == (
        "tutor",
        number,
        "published",
        True,
    )
    assert record.lineage == MANIFEST.lineage
    assert record.metrics == MANIFEST.metrics
    assert record.created == MANIFEST.created
    assert record.explanation == MANIFEST.explanation
    assert record.path == store.path("tutor", number)
    assert record.nbytes == sum(f.stat().st_size for f in record.path.iterdir())
    assert store.record("tutor", number) == record


def test_numbers_count_up_per_adapter_also_past_what_was_never_written(store: VersionStore) -> None:
    assert [store.next_number("tutor") for _ in range(3)] == [1, 2, 3]
    assert store.next_number("other") == 1


def test_numbers_are_not_used_again_after_a_restart_a_refusal_or_pruning(root: Path) -> None:
    store = VersionStore(root)
    publish(store)
    refused = publish(store, refused=True)
    store.next_number("tutor")  # the process ends before it is written
    store.close()
    store = VersionStore(root)
    assert store.next_number("tutor") == refused + 2
    store.prune("tutor", 0, ())
    store.close()
    store = VersionStore(root)
    assert store.next_number("tutor") == refused + 3
    store.close()


def test_a_version_never_changes(store: VersionStore) -> None:
    number = publish(store)
    for refused in (False, True):
        with pytest.raises(ConflictError, match="versions never change"):
            store.write("tutor", number, saver(2.0), MANIFEST, refused=refused)
    assert next(iter(store.diff("tutor", 0, number).modules.values())).norm_b == pytest.approx(
        2 * 2 * 15**0.5
    )


def test_a_refused_version_is_kept_with_its_reasons_and_is_not_live(store: VersionStore) -> None:
    number = store.next_number("tutor")
    manifest = Manifest(
        parent=0,
        lineage=Lineage(),
        metrics={"gain": -0.5, "probe_nll": float("inf")},
        reasons=("not_better", "probe_loss"),
    )
    path = store.write("tutor", number, saver(float("nan")), manifest, refused=True)
    (record,) = store.records("tutor")
    assert record.state == "refused"
    assert record.reasons == ("not_better", "probe_loss")
    assert record.metrics == {"gain": -0.5, "probe_nll": float("inf")}
    assert path == store.path("tutor", number)
    assert store.live("tutor") == 0


def test_weights_that_are_not_finite_are_never_published(store: VersionStore, root: Path) -> None:
    number = store.next_number("tutor")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            store.write("tutor", number, saver(bad), MANIFEST, refused=False)
    assert store.records() == ()
    assert files(root) == {".lock", "tutor/live.json"}


def test_an_adapter_may_have_any_name_that_a_file_could_not(store: VersionStore) -> None:
    names = ["org/model", "..", "Tutor", "tutor", "é" * 200, "lock", ".lock", ".tmp-x", "a b"]
    for name in names:
        publish(store, name)
    assert {record.adapter for record in store.records()} == set(names)
    assert store.adapters() == tuple(sorted(names))
    assert len({store.path(name, 1) for name in names}) == len(names)


def test_what_is_not_there_is_not_found_and_what_is_there_is_named(store: VersionStore) -> None:
    publish(store)
    with pytest.raises(NotFoundError, match="tutor has no version 7; versions: 1"):
        store.path("tutor", 7)
    with pytest.raises(NotFoundError, match="versions: none yet"):
        store.set_live("nobody", 1, "promoted")
    assert store.live("nobody") == 0
    assert store.previous("nobody") == 0


# --- what is live ---------------------------------------------------------------------------------


def test_what_is_live_survives_a_restart(root: Path) -> None:
    store = VersionStore(root)
    publish(store)
    second = publish(store)
    store.close()
    store = VersionStore(root, read_only=True)
    assert store.live("tutor") == second
    assert [record.is_live for record in store.records()] == [False, True]


def test_going_back_again_and_again_leads_to_the_base_model_and_not_to_and_fro(
    store: VersionStore,
) -> None:
    for _ in range(3):
        publish(store)
    seen = []
    for _ in range(4):
        before = store.previous("tutor")
        store.set_live("tutor", before, "rolled back")
        seen.append(store.live("tutor"))
    assert seen == [2, 1, 0, 0]


def test_after_going_back_a_new_version_has_the_one_gone_back_to_before_it(
    store: VersionStore,
) -> None:
    for _ in range(3):
        publish(store)
    store.set_live("tutor", 2, "rolled back")
    new = publish(store)
    assert (store.live("tutor"), store.previous("tutor")) == (new, 2)


def test_promoting_an_older_version_can_be_taken_back(store: VersionStore) -> None:
    for _ in range(4):
        publish(store)
    store.set_live("tutor", 1, "promoted")
    assert store.previous("tutor") == 4
    store.set_live("tutor", 4, "rolled back")
    assert store.previous("tutor") == 3


def test_going_back_skips_what_was_pruned(store: VersionStore) -> None:
    for _ in range(4):
        publish(store)
    store.set_live("tutor", 1, "promoted")
    store.prune("tutor", 0, ())  # keeps 1, live, and 4, before it
    assert [record.number for record in store.records()] == [1, 4]
    store.set_live("tutor", 4, "rolled back")
    assert store.previous("tutor") == 1
    store.set_live("tutor", 1, "rolled back")
    assert store.previous("tutor") == 0


def test_the_history_tells_when_and_why(store: VersionStore) -> None:
    publish(store)
    store.set_live("tutor", 0, "rolled back from 1")
    assert [(change.number, change.why) for change in store.history("tutor")] == [
        (1, "published"),
        (0, "rolled back from 1"),
    ]


def test_pruning_keeps_the_last_of_each_kind_the_live_one_the_one_before_and_what_is_pinned(
    store: VersionStore,
) -> None:
    published = [publish(store) for _ in range(6)]
    refused = [publish(store, refused=True) for _ in range(4)]
    store.set_live("tutor", published[0], "promoted")
    gone = store.prune("tutor", 2, {published[1]})
    kept = {record.number for record in store.records()}
    # live 1, before it 6, pinned 2, and the last two of the others of each kind.
    assert kept == {1, 6, 2, 4, 5, *refused[-2:]}
    assert set(gone) == {3, *refused[:2]}


# --- weights compared -----------------------------------------------------------------------------


def test_weights_are_compared_by_what_they_add_and_not_by_their_factors(
    store: VersionStore,
) -> None:
    for save in (saver(1.0), saver(1.0, swap=True), saver(3.0), saver(1.0, rank=4)):
        store.write("tutor", store.next_number("tutor"), save, MANIFEST, refused=False)

    def compare(a: int, b: int) -> tuple[float, float, float]:
        diff = store.diff("tutor", a, b)
        (item,) = diff.modules.values()
        return item.norm_a, item.norm_b, item.distance

    # B A is 5 x 3, each entry R * fill, and the scaling 4 / R.
    one = 4 * 15**0.5
    assert compare(1, 2) == pytest.approx((one, one, 0.0), abs=1e-5)
    assert compare(1, 3) == pytest.approx((one, 3 * one, 2 * one))
    assert compare(1, 4) == pytest.approx((one, one, 0.0), abs=1e-5)
    assert compare(0, 1) == pytest.approx((0.0, one, one))
    assert store.diff("tutor", 0, 1).metrics["win_rate"] == (None, 0.75)
    assert next(iter(store.diff("tutor", 1, 3).modules.values())).relative == pytest.approx(2 / 3)


def test_a_module_with_a_rank_and_an_alpha_of_its_own_is_compared_by_those(
    store: VersionStore,
) -> None:
    def save(directory: Path) -> None:
        saver(rank=2)(directory)
        file = directory / "adapter_config.json"
        of_its_own = {"r": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}
        file.write_text(json.dumps(json.loads(file.read_text()) | of_its_own))

    store.write("tutor", store.next_number("tutor"), save, MANIFEST, refused=False)
    (item,) = store.diff("tutor", 0, 1).modules.values()
    assert item.distance == pytest.approx(6 * 15**0.5)  # B A is 5 x 3, each entry R; times 6 / R


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", b"no"),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": 0, "lora_alpha": 4}'),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": 3}',
        ),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"(": 4}}',
        ),
    ],
)
def test_a_damaged_adapter_is_named(store: VersionStore, file: str, content: bytes) -> None:
    number = publish(store)
    (store.path("tutor", number) / file).write_bytes(content)
    with pytest.raises(AdapterLoadError, match=file):
        store.diff("tutor", 0, number)


# --- damage and locks -----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff"])
def test_a_damaged_pointer_to_the_live_version_is_an_error_with_a_remedy(
    store: VersionStore, root: Path, content: bytes
) -> None:
    publish(store)
    (root / "tutor" / "live.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .* remove it"):
        store.live("tutor")
    with pytest.raises(ConfigError):
        store.next_number("tutor")


def test_removing_the_damaged_pointer_is_a_remedy(store: VersionStore, root: Path) -> None:
    publish(store)
    number = publish(store)
    (root / "tutor" / "live.json").unlink()
    assert store.live("tutor") == 0
    store.set_live("tutor", number, "promoted")
    assert store.next_number("tutor") == number + 1


def test_a_later_format_is_left_alone(store: VersionStore, root: Path) -> None:
    publish(store)
    file = root / "tutor" / "live.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match="use the version of cotune that wrote it"):
        store.live("tutor")


def test_a_version_whose_description_is_damaged_is_left_out_of_lists(
    store: VersionStore, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = publish(store), publish(store)
    (store.path("tutor", broken) / "version.json").write_text("{}")
    assert [record.number for record in store.records()] == [whole]
    assert "tutor@1 cannot be described" in caplog.text
    with pytest.raises(ConfigError, match="is damaged"):
        store.record("tutor", broken)


def test_two_processes_cannot_write_and_the_lock_ends_with_its_holder(root: Path) -> None:
    first = VersionStore(root)
    with pytest.raises(ConfigError, match="used by another process"):
        VersionStore(root)
    VersionStore(root, read_only=True).records()
    first.close()
    first.close()
    second = VersionStore(root)
    del second
    VersionStore(root).close()


def test_a_reader_cannot_write_and_leaves_leftovers_of_a_writer_alone(
    store: VersionStore, root: Path
) -> None:
    publish(store)
    leftover = root / "tutor" / "versions" / ".tmp-under-way"
    leftover.mkdir()
    reader = VersionStore(root, read_only=True)
    assert leftover.exists()
    for write in (
        lambda: reader.next_number("tutor"),
        lambda: reader.set_live("tutor", 0, "no"),
        lambda: reader.prune("tutor", 0, ()),
        lambda: reader.write("tutor", 9, saver(), MANIFEST, refused=False),
    ):
        with pytest.raises(ConfigError, match="for reading only"):
            write()


# --- crashes --------------------------------------------------------------------------------------

CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "close")


class Killed(BaseException):
    """The process is gone: from here on no call reaches the system."""


class Kernel:
    """Counts calls to the system, and refuses them from the `limit`-th one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
        self.log: list[str] = []
        self.limit: int | None = None
        self.last: int | None = None  # None: everything after the limit fails too
        self._error = error
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            index = len(self.log)
            if self.limit is not None and index >= self.limit:
                if name == "close":  # so that no descriptor of the test run leaks
                    return real(*args, **kwargs)
                if self.last is None or index <= self.last:
                    self.log.append(name)
                    raise self._error()
            self.log.append(f"{name} {args[0]}")
            return real(*args, **kwargs)

        return call


def life(store: VersionStore) -> Iterator[tuple[int, int, set[int]]]:
    """What a learner does; after each call that returned, (live, last number, versions)."""
    yield 0, 0, set()
    number = store.next_number("tutor")
    yield 0, 1, set()
    store.write("tutor", number, saver(), MANIFEST, refused=False)
    yield 0, 1, {1}
    store.set_live("tutor", number, "published")
    yield 1, 1, {1}
    number = store.next_number("tutor")
    yield 1, 2, {1}
    store.write("tutor", number, saver(2.0), MANIFEST, refused=True)
    yield 1, 2, {1, 2}
    store.prune("tutor", 0, ())
    yield 1, 2, {1}


def test_killed_at_any_call_to_the_system_it_restarts_with_all_or_nothing_of_the_step(
    tmp_path: Path,
) -> None:
    limit = 0
    while True:
        root = tmp_path / str(limit)
        known: list[tuple[int, int, set[int]]] = []
        with pytest.MonkeyPatch.context() as patch:
            kernel = Kernel(patch, Killed)
            kernel.limit = limit
            try:
                known.extend(life(VersionStore(root)))
                is_done = True
            except Killed:
                is_done = False
        before = known[-1] if known else (0, 0, set())
        store = VersionStore(root)
        live, versions = store.live("tutor"), {r.number for r in store.records()}
        after = _next_state(before)
        assert (live, versions) in ((before[0], before[2]), (after[0], after[2])), f"call {limit}"
        assert not list(root.rglob(".tmp-*")), f"call {limit}"
        for record in store.records():
            assert {file.name for file in record.path.iterdir()} == {
                "adapter_config.json",
                "adapter_model.safetensors",
                "version.json",
            }
            store.diff("tutor", 0, record.number)  # its weights can be read
        assert store.next_number("tutor") > before[1], "a number came back"
        store.close()
        if is_done:
            break
        limit += 1
    assert limit > 40, "the calls were not seen"


STATES: list[tuple[int, int, set[int]]] = [
    (0, 0, set()),
    (0, 1, set()),
    (0, 1, {1}),
    (1, 1, {1}),
    (1, 2, {1}),
    (1, 2, {1, 2}),
    (1, 2, {1}),
]


def _next_state(state: tuple[int, int, set[int]]) -> tuple[int, int, set[int]]:
    index = STATES.index(state)
    return STATES[min(index + 1, len(STATES) - 1)]


def test_when_any_single_call_fails_the_caller_is_told_and_nothing_is_half_done(
    tmp_path: Path,
) -> None:
    """A full disk: one call fails, the process lives on and cleans up."""
    told: list[str] = []
    limit = 0
    while True:
        root = tmp_path / str(limit)
        store = VersionStore(root)
        number = store.next_number("tutor")
        with pytest.MonkeyPatch.context() as patch:
            kernel = Kernel(patch, lambda: OSError(28, "No space left on device"))
            kernel.limit = kernel.last = limit
            try:
                store.write("tutor", number, saver(), MANIFEST, refused=False)
                store.set_live("tutor", number, "published")
            except StorageError as error:
                told.append(error.message)
            reached = len(kernel.log) > limit
        assert not list(root.rglob(".tmp-*")), f"call {limit}"
        if store.live("tutor"):
            assert store.records()[0].is_live
        again = store.next_number("tutor")
        assert again == number + 1
        store.write("tutor", again, saver(), MANIFEST, refused=False)  # it goes on
        store.close()
        if not reached:
            break
        limit += 1
    assert len(told) >= 12
    assert all("No space left on device" in message for message in told)


def test_everything_is_on_disk_before_it_gets_its_name_and_the_name_before_it_is_said(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = store.next_number("tutor")
    (store.directory("tutor", number).parent).mkdir()
    synced: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def spy_open(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = Path(str(path)).name
        return descriptor

    def spy_fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        synced.append(names[descriptor])

    def spy_rename(source: Any, target: Any) -> None:
        real_rename(source, target)
        synced.append("rename")

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    store.write("tutor", number, saver(), MANIFEST, refused=False)
    before, after = synced[: synced.index("rename")], synced[synced.index("rename") + 1 :]
    assert {"adapter_config.json", "adapter_model.safetensors", "version.json"} <= set(before)
    assert before[-1].startswith(".tmp-")
    assert after == ["versions"]


def test_a_save_that_fails_leaves_nothing_and_its_error_is_told(
    store: VersionStore, root: Path
) -> None:
    def save(directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")
        raise RuntimeError("the device is gone")

    number = store.next_number("tutor")
    with pytest.raises(RuntimeError, match="the device is gone"):
        store.write("tutor", number, save, MANIFEST, refused=False)
    assert files(root) == {".lock", "tutor/live.json"}
    with pytest.raises(NotFoundError):
        store.path("tutor", number)
