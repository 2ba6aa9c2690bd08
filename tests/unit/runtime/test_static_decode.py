"""Decoding from static slots equals the packed forward; only who replays it needs CUDA.

`Tape` stands in for a CUDA graph: it keeps the operators of one run with the tensors they were
given, and runs those operators on those tensors again. Python that is not run again, a tensor that
was replaced instead of written, a value asked of the device: all that a graph cannot do fails here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cotune.runtime.config import CacheConfig
from cotune.runtime.decoder import LeanDecoder, layer_attentions
from cotune.runtime.executor import Executor
from cotune.runtime.kernels.plain import HeadShape, LayerAttention, PlainKernels
from cotune.runtime.loading import LoadedModel, load_model
from cotune.runtime.lora import LoraWeights, read_lora
from cotune.runtime.packing import pack_steps
from cotune.runtime.sampling import SamplingState
from cotune.runtime.static_decode import RECORD_EVERY, StaticDecode, relative_difference
from cotune.runtime.step import SequenceStep
from cotune.runtime.types import SamplingParams
from cotune.streams.graphs import CallAgain
from tiny_models import ALL_LINEARS, save_lora, save_model_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cotune.runtime.kernels.batch import PackedBatch, Rows
    from cotune.streams.graphs import Recorder

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # relative; float32, other shapes of the same products
SIZES = (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tape:
    """A `Recorder`: operators and their tensors, run again in order.

    Args:
        fails: raised instead of recording, and taken off the list.
        lies: replays do nothing.
    """

    name = "tape"

    def __init__(self, fails: Sequence[Exception] = (), *, lies: bool = False) -> None:
        self.recordings = 0
        self._fails = list(fails)
        self._lies = lies

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._fails:
            raise self._fails.pop(0)
        self.recordings += 1
        operators = _Operators()
        with operators:
            work()
        if self._lies:
            return lambda: None
        return operators.replay


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        assert "_local_scalar_dense" not in str(func), "a value was asked of the device"
        self._calls.append((func, args, kwargs, _tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, before in self._calls:
            for old, new in zip(before, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


class StaticAttention(PlainKernels):
    """Plain kernels whose decodes ask the device for nothing: every page of the table is read."""

    def can_record(self, layer: LayerAttention) -> bool:
        return True

    def attend(
        self, layer: LayerAttention, query: torch.Tensor, rows: Rows, batch: PackedBatch
    ) -> torch.Tensor:
        if rows is not batch.rows or rows.count != len(batch.block_tables):
            return super().attend(layer, query, rows, batch)
        pages = batch.block_tables.long()
        key = self.keys[layer.index][pages].flatten(1, 2).float()  # (B, M S, K, D)
        value = self.values[layer.index][pages].flatten(1, 2).float()
        shape = self.shape
        group = shape.heads // shape.kv_heads
        q = query.unflatten(1, (shape.kv_heads, group, shape.head_dim)).float()
        scores = torch.einsum("bkgd,bckd->bkgc", q, key) * layer.scaling
        at = torch.arange(key.shape[1])
        hidden = at[None] >= batch.context_lens[:, None]
        if layer.window:
            hidden = hidden | (at[None] <= rows.positions[:, None] - layer.window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        value = value.masked_fill(hidden[:, :, None, None], 0.0)  # 0 times NaN would be NaN
        return torch.einsum("bkgc,bckd->bkgd", scores.softmax(-1), value).flatten(1)


class Bench:
    """A tiny model on static kernels, some prompts in its pages, and both ways to decode them."""

    PAGES = 40

    def __init__(self, path: Path, recorder: Recorder, *, family: str = "llama") -> None:
        directory = save_model_directory(path / "model", family, torch.float32, 3)
        self.path = path
        self.loaded: LoadedModel = load_model(directory, device=CPU)
        first = self.loaded.attention_layers[0]
        shape = HeadShape(heads=first.query_heads, kv_heads=first.kv_heads, head_dim=first.head_dim)
        layers = layer_attentions(self.loaded)
        self.kernels = StaticAttention(shape, layers=len(layers), dtype=torch.float32, device=CPU)
        self.kernels.allocate(self.PAGES + 1)
        self.forward = LeanDecoder.build(self.loaded, self.kernels, prepack=False)
        self.static = StaticDecode(
            self.forward,
            recorder,
            sizes=SIZES,
            vocab_size=self.loaded.vocab_size,
            dtype=torch.float32,
            page_size=16,
            longest_table=6,
            scratch_page=self.PAGES,
            tolerance=TOLERANCE,
            device=CPU,
        )
        self._generator = torch.Generator().manual_seed(5)

    def adapter(self, name: str, rank: int, seed: int) -> LoraWeights:
        directory = self.path / name
        targets = [*ALL_LINEARS, "lm_head"]
        save_lora(directory, self.loaded.model, rank=rank, targets=targets, seed=seed)
        return read_lora(directory, self.loaded.model, max_rank=64)

    @torch.inference_mode()
    def decodes(self, lengths: Sequence[int], slots: Sequence[int] = ()) -> list[SequenceStep]:
        """Prefill prompts of these lengths on pages of their own; their next step."""
        order = torch.randperm(self.PAGES, generator=self._generator).tolist()
        prefills, decodes = [], []
        for row, length in enumerate(lengths):
            tokens = torch.randint(
                2, self.loaded.vocab_size, (length + 1,), generator=self._generator
            ).tolist()
            table = [order.pop() for _ in range(length // 16 + 1)]
            slot = slots[row] if slots else 0
            state = SamplingState(
                SamplingParams(
                    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
                ),
                tokens[:-1],
                tokens[-1:],
                frozenset(),
                seed=1,
            )
            prefills.append(SequenceStep(tokens[:-1], 0, table, slot))
            decodes.append(SequenceStep(tokens[-1:], length, table, slot, state))
        self.eager(prefills)
        return decodes

    @torch.inference_mode()
    def eager(self, steps: Sequence[SequenceStep]) -> torch.Tensor:
        return self.forward(pack_steps(steps, page_size=16, device=CPU))

    def check(self, steps: Sequence[SequenceStep]) -> None:
        assert self.static.takes(steps)
        actual = self.static(steps).clone()
        expected = self.eager(steps)
        assert actual.shape == expected.shape
        assert relative_difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "olmo2", "granite"])
def test_replays_give_the_logits_of_the_packed_forward(tmp_path: Path, family: str) -> None:
    bench = Bench(tmp_path, Tape(), family=family)
    proof = bench.decodes([15, 3, 18, 7, 16])
    assert bench.static.record_all(proof, bench.eager(proof)) == ""
    before = bench.static.statistics()
    assert before.ready == before.recorded == len(SIZES)
    for lengths in ([5], [16, 31], [1, 15, 40], [2, 17, 33, 48, 64, 5, 9]):
        bench.check(bench.decodes(lengths))
    after = bench.static.statistics()
    assert after.replays == 4
    assert after.eager == before.eager
    assert after.rows - before.rows == 1 + 2 + 4 + 8
    assert after.padding - before.padding == 0 + 0 + 1 + 1


def test_a_sequence_decodes_on_over_page_ends_as_it_would_eagerly(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Tape())
    steps = bench.decodes([13, 30, 7])
    for _ in range(2 * RECORD_EVERY + 20):
        bench.check(steps)
        steps = [
            SequenceStep(
                [(step.token_ids[0] * 7 + 3) % bench.loaded.vocab_size],
                step.start + 1,
                step.block_table
                if (step.start + 1) % 16
                else [*step.block_table, 30 + 3 * row + len(step.block_table)],
                0,
                step.sampling,
            )
            for row, step in enumerate(steps)
        ]
    assert bench.static.statistics().replays > 20


def test_rows_beyond_the_batch_touch_the_scratch_page_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Tape())
    steps = bench.decodes([20, 5, 9, 33, 2])
    bench.check(steps)  # records
    written = {step.block_table[step.start // 16] * 16 + step.start % 16 for step in steps}
    for tensors in (bench.kernels.keys, bench.kernels.values):
        for tensor in tensors:
            tensor[-1] = float("nan")  # what a row reads without having written it would show
    before = [k.flatten(0, 1).clone() for k in bench.kernels.keys + bench.kernels.values]
    logits = bench.static(steps)
    assert logits.isfinite().all()
    for old, new in zip(before, bench.kernels.keys + bench.kernels.values, strict=True):
        same = (old == new.flatten(0, 1)).all(dim=(1, 2))
        same |= (old.isnan() & new.flatten(0, 1).isnan()).all(dim=(1, 2))
        changed = set((~same).nonzero().flatten().tolist())
        assert changed <= written | {Bench.PAGES * 16}
        assert Bench.PAGES * 16 in changed


def test_adapters_of_several_slots_are_replayed_and_an_installed_one_is_seen(
    tmp_path: Path,
) -> None:
    tape = Tape()
    bench = Bench(tmp_path, tape)
    bench.forward.install_adapter(1, bench.adapter("a", 4, 1))
    bench.forward.install_adapter(2, bench.adapter("b", 8, 2))
    steps = bench.decodes([20, 5, 9], [1, 0, 2])
    for _ in range(RECORD_EVERY + 2):
        bench.check(steps)
    replays = bench.static.statistics().replays
    assert replays
    recordings = tape.recordings
    # In place: the same recording now gives what the new weights give.
    bench.forward.install_adapter(2, bench.adapter("c", 8, 3))
    bench.check(steps)
    bench.forward.clear_adapter(1)
    bench.check([SequenceStep(s.token_ids, s.start, s.block_table, 2, s.sampling) for s in steps])
    assert tape.recordings == recordings
    assert bench.static.statistics().replays == replays + 2


def test_a_recording_whose_adapters_have_moved_is_made_again(tmp_path: Path) -> None:
    tape = Tape()
    bench = Bench(tmp_path, tape)
    bench.forward.install_adapter(1, bench.adapter("a", 4, 1))
    steps = bench.decodes([20, 5], [1, 1])
    bench.check(steps)
    assert tape.recordings == 1
    bench.forward.install_adapter(2, bench.adapter("b", 16, 2))  # does not fit beside the first
    for _ in range(RECORD_EVERY):
        bench.check(steps)  # never from the stale recording
    assert tape.recordings == 2
    replays = bench.static.statistics().replays
    bench.check(steps)
    assert bench.static.statistics().replays == replays + 1


def test_recordings_are_spread_over_batches(tmp_path: Path) -> None:
    tape = Tape()
    bench = Bench(tmp_path, tape)
    one, two = bench.decodes([4]), bench.decodes([4, 5])
    bench.check(one)
    assert tape.recordings == 1
    for _ in range(RECORD_EVERY - 1):
        bench.check(two)
        assert tape.recordings == 1
    bench.check(two)
    assert tape.recordings == 2


def test_a_size_that_memory_is_short_for_runs_eagerly_and_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tape = Tape([torch.OutOfMemoryError("no room")])
    bench = Bench(tmp_path, tape)
    proof = bench.decodes([15, 3, 18, 7, 16])
    assert bench.static.record_all(proof, bench.eager(proof)) == ""
    found = bench.static.statistics()
    assert (found.failed, found.ready) == (1, len(SIZES) - 1)
    assert "no room" in caplog.text
    many = bench.decodes([4, 5, 6, 7, 8])
    for _ in range(RECORD_EVERY + 2):
        bench.check(many)
    assert bench.static.statistics().failed == 1
    assert bench.static.statistics().replays == 0
    bench.check(many[:3])
    assert bench.static.statistics().replays == 1


def test_what_cannot_be_recorded_and_what_replays_wrongly_is_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Tape([RuntimeError("operation not permitted")]))
    proof = bench.decodes([15, 3])
    reason = bench.static.record_all(proof, bench.eager(proof))
    assert "8 rows cannot be recorded: operation not permitted" in reason
    bench = Bench(tmp_path / "other", Tape(lies=True))
    proof = bench.decodes([15, 3])
    expected = bench.eager(proof)
    assert "a replay for 8 rows differs" in bench.static.record_all(proof, expected)
    assert "differ from the packed forward" in bench.static.record_all(proof, expected + 1.0)


def test_a_replay_that_differs_while_serving_gives_the_eager_logits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Tape(lies=True))
    steps = bench.decodes([20, 5])
    for _ in range(3):
        bench.check(steps)
    assert bench.static.statistics().failed == 1


def test_only_pure_decodes_that_fit_are_taken(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CallAgain())
    steps = bench.decodes([4, 5])
    assert bench.static.takes(steps)
    assert not bench.static.takes(steps * 5)
    state = steps[0].sampling
    assert not bench.static.takes([*steps, SequenceStep([1, 2], 0, [9], 0, state)])
    assert not bench.static.takes([*steps, SequenceStep([1], 0, [9])])
    assert not bench.static.takes([*steps, SequenceStep([1], 0, [9], 0, state, 0)])


# -- in the executor -------------------------------------------------------------------------------


def make_executor(path: Path, recorder: Recorder | None, **overrides: Any) -> Executor:
    directory = save_model_directory(path, "qwen3", torch.float32, 3, **overrides)
    loaded = load_model(directory, device=CPU)
    return Executor.create(
        loaded,
        device=CPU,
        cache=CacheConfig(num_pages=64),
        max_num_batched_tokens=64,
        max_num_seqs=6,
        recorder=recorder,
    )


def test_an_executor_samples_the_same_tokens_with_and_without_recordings(tmp_path: Path) -> None:
    plain = make_executor(tmp_path / "a", None, head_dim=32)
    recorded = make_executor(tmp_path / "b", CallAgain(), head_dim=32)
    assert plain.recorded_decodes() is None
    assert plain.num_pages == recorded.num_pages == 64
    assert "kernel by kernel" in plain.describe()["decode"]
    assert recorded.describe()["decode"] == "called again for up to 8 sequences"
    answers = [_answers(executor) for executor in (plain, recorded)]
    assert answers[0] == answers[1]
    assert len({token for answer in answers[0] for token in answer}) > 10
    found = recorded.recorded_decodes()
    assert found is not None
    assert found.replays == 30
    assert found.sizes == (1, 2, 4, 8)


def test_kernels_that_ask_the_device_are_not_recorded(tmp_path: Path) -> None:
    executor = make_executor(tmp_path / "a", CallAgain())  # head_dim 24: plain kernels
    assert executor.recorded_decodes() is None
    assert executor.describe()["decode"] == (
        "kernel by kernel (attention by plain torch asks the device for values)"
    )


def _answers(executor: Executor) -> list[list[int]]:
    """Greedy answers of three sequences, the prompts in one step and 30 decodes."""
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    prompts = [[5, 6, 7], [9] * 20, list(range(10, 40))]
    outputs: list[list[int]] = [[], [], []]
    states = [
        SamplingState(params, prompt, output, frozenset(), seed=1)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    tables = [list(range(8 * row, 8 * row + 8)) for row in range(3)]
    steps = [
        SequenceStep(prompt, 0, table, 0, state)
        for prompt, table, state in zip(prompts, tables, states, strict=True)
    ]
    for turn in range(31):
        for row, result in enumerate(executor.execute(steps).results):
            assert result.token_id is not None
            outputs[row].append(result.token_id)
        steps = [
            SequenceStep([output[-1]], len(prompt) + turn, table, 0, state)
            for prompt, output, table, state in zip(prompts, outputs, tables, states, strict=True)
        ]
    return outputs
