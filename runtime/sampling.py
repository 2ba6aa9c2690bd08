"""How a sequence chooses its tokens, and the sampler that chooses for a whole batch.

A row of logits passes these stages; a stage that no row asks for is skipped for the whole batch:

    logits (N, V)
      + logit_bias; -inf on end tokens until min_tokens
      repetition, then presence and frequency penalties
      argmax                                  rows with temperature 0
      temperature, min_p, top_k, top_p        the other rows, drawn by their own random numbers

Order and meaning are those of vLLM and of transformers' logits processors. Log-probabilities are
those of the model itself: of the logits as they came in. What is done to the tensors is in
`choosing`, its compiled form for CPUs in `choosing_cpu`, the random numbers in `randomness`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from .choosing import Chooser, DrawTable, TorchChooser
from .randomness import stream_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from .types import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken as 0: dividing by them could overflow."""

_NO_TOKEN = -1
_OFF = 2.0  # as top_p: above any share, so that no rounding can reject
_PROMPT_LOGPROB_ELEMENTS = 1 << 22  # prompt log-probabilities: 16 MiB of float32 at a time


class LogitEdits:
    """The tokens of one sequence whose logits are changed before anything is chosen.

    One entry per token, with three numbers: ``logit = penalize(logit + bias, repetition) -
    subtract``. Entries are made once and updated as output tokens arrive, so that a step costs what
    is new, not the length of the text.

        ids          17    4    9   ...      distinct token ids below the vocabulary size
        bias          0   -5  -inf           logit_bias; -inf while min_tokens masks an end token
        repetition  1.2    1    1            repetition_penalty if in the prompt or the output
        subtract    0.4    0    0            presence + frequency * occurrences in the output
    """

    __slots__ = (
        "_counts",
        "_ids",
        "_masked",
        "_params",
        "_repetition",
        "_seen",
        "_size",
        "_slot_of",
        "_values",
        "_vocab_size",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        end_tokens: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._params = params
        self._repetition = params.repetition_penalty or 1.0
        self._vocab_size = vocab_size
        self._ids: npt.NDArray[np.int64] = np.empty(64, dtype=np.int64)
        self._values: npt.NDArray[np.float32] = np.empty((3, 64), dtype=np.float32)
        self._size = 0
        self._slot_of: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._seen = 0
        self._masked: list[int] = []
        for token, bias in params.logit_bias.items():
            self._set(0, token, bias)
        if params.min_tokens > 0:
            self._masked = [token for token in end_tokens if 0 <= token < vocab_size]
            for token in self._masked:
                self._set(0, token, -np.inf)
        if self._repetition != 1.0:
            for token in dict.fromkeys(prompt_ids):
                self._set(1, token, self._repetition)

    def update(
        self, output_ids: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Take in the output tokens that are new; the entries as ids (n,) and values (3, n).

        The arrays are views that hold until the next call.
        """
        params = self._params
        if self._masked and len(output_ids) >= params.min_tokens:
            for token in self._masked:
                self._set(0, token, params.logit_bias.get(token, 0.0))
            self._masked = []
            if not params.logit_bias and not _has_penalties(params):
                self._size = 0
        if self._seen < len(output_ids):
            if _has_penalties(params):
                for token in output_ids[self._seen :]:
                    self._count(token)
            self._seen = len(output_ids)
        return self._ids[: self._size], self._values[:, : self._size]

    def _count(self, token: int) -> None:
        params = self._params
        if self._repetition != 1.0:
            self._set(1, token, self._repetition)
        if params.presence_penalty or params.frequency_penalty:
            count = self._counts.get(token, 0) + 1
            self._counts[token] = count
            self._set(2, token, params.presence_penalty + params.frequency_penalty * count)

    def _set(self, row: int, token: int, value: float) -> None:
        if not 0 <= token < self._vocab_size:
            return
        slot = self._slot_of.get(token)
        if slot is None:
            slot = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._values = np.concatenate((self._values, np.empty_like(self._values)), axis=1)
            self._ids[slot] = token
            self._values[:, slot] = (0.0, 1.0, 0.0)
            self._slot_of[token] = slot
            self._size = slot + 1
        self._values[row, slot] = value


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


class SamplingState:
    """How one sequence chooses its tokens, with all that can be computed once.

    Args:
        params: resolved (`SamplingParams.resolve`).
        prompt_ids: the prompt; read once, at the first token.
        output_ids: the tokens generated so far: a list that the engine appends to and this class
            only reads.
        eos_token_ids: the model's end-of-sequence tokens.
        stream: index among the n siblings of a request; each draws its own random numbers.
        seed: the request's resolved seed (`SeedSource.resolve`).

    Raises:
        ValueError: `params` has unresolved fields.
    """

    __slots__ = (
        "_edits",
        "_end_tokens",
        "eos_token_ids",
        "inverse_temperature",
        "is_greedy",
        "key",
        "min_p",
        "output_ids",
        "params",
        "prompt_ids",
        "top_k",
        "top_p",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        stream: int = 0,
        *,
        seed: int,
    ) -> None:
        temperature, top_p, top_k = params.temperature, params.top_p, params.top_k
        min_p, repetition = params.min_p, params.repetition_penalty
        if (
            temperature is None
            or top_p is None
            or top_k is None
            or min_p is None
            or repetition is None
        ):
            raise ValueError("SamplingState takes resolved params; call params.resolve(defaults)")
        self.params = params
        self.prompt_ids = prompt_ids
        self.output_ids = output_ids
        self.eos_token_ids = eos_token_ids
        self.key = stream_key(seed, stream)
        # top_k = 1 leaves only the most likely token; greedy also settles which one of equals.
        self.is_greedy = temperature < GREEDY_BELOW or top_k == 1
        self.inverse_temperature = 1.0 if self.is_greedy else 1.0 / temperature
        self.top_k = max(top_k, 0)
        self.top_p = top_p
        self.min_p = min_p
        self._end_tokens = eos_token_ids.union(params.stop_token_ids)
        self._edits: LogitEdits | None = None

    @property
    def has_edits(self) -> bool:
        """Whether some logits are changed at some position."""
        params = self.params
        return bool(params.logit_bias or params.min_tokens or _has_penalties(params))

    def edits(self, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The logits to change now (`LogitEdits.update`); empty where there are none."""
        if self._edits is None:
            self._edits = LogitEdits(self.params, self.prompt_ids, self._end_tokens, vocab_size)
        return self._edits.update(self.output_ids)

    def stop_kind(self, token_id: int) -> Literal["eos"] | int | None:
        """What ends the answer at this token: 'eos', the stop token's id, or None if it goes on.

        The same before and after the token is appended to `output_ids`: before min_tokens the
        sampler never chooses one of these.
        """
        if token_id not in self._end_tokens or len(self.output_ids) < self.params.min_tokens:
            return None
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            return "eos"
        return token_id if token_id in self.params.stop_token_ids else None


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """The choices for a batch, in the order of its states.

    Where `errors` has a text, that row alone failed: its token is -1 and its logprob None.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    errors: list[str | None]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Which row needs what. It depends on the states alone, so it lasts as long as the batch."""

    states: list[SamplingState]
    table: DrawTable | None
    drawn: list[SamplingState]
    edited: list[int]
    with_logprobs: list[int]


class Sampler:
    """Chooses tokens for whole batches. Used by one thread: the inference lane's.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._chooser = _chooser_for(vocab_size, device)
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> SampleOutput:
        """Choose one token per row.

        Args:
            logits: (N, V), any floating dtype; not modified.
            states: one per row.

        Returns:
            N choices. A row whose logits hold NaN or +inf, or nothing above -inf, has an error.
        """
        if logits.shape != (len(states), self._vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(states)} states "
                f"and a vocabulary of {self._vocab_size}"
            )
        count = len(states)
        logprobs: list[TokenLogprob | None] = [None] * count
        errors: list[str | None] = [None] * count
        if not count:
            return SampleOutput([], logprobs, errors)
        batch = self._batch_of(states)
        raw = logits.detach().float()
        edited = self._edit(raw, batch) if batch.edited else raw
        positions = None
        if batch.table is not None:
            positions = np.array([len(state.output_ids) for state in batch.drawn])
        token_ids, tops = self._chooser.choose(edited, batch.table, positions)
        for row, top in enumerate(tops):
            if top - top != 0.0:  # NaN or infinite
                token_ids[row] = _NO_TOKEN
                errors[row] = _explain(raw[row])
        if batch.with_logprobs:
            rows = [row for row in batch.with_logprobs if errors[row] is None]
            if rows:
                found = self._chooser.token_logprobs(
                    raw if len(rows) == count else raw[rows],
                    [token_ids[row] for row in rows],
                    [states[row].params.logprobs or 0 for row in rows],
                )
                for row, logprob in zip(rows, found, strict=True):
                    logprobs[row] = logprob
        return SampleOutput(token_ids, logprobs, errors)

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, targets: Sequence[int], k: int
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each target under its row, with the k best alternatives.

        Args:
            logits: (M, V), any floating dtype; not modified. Taken a few rows at a time, so that
                memory stays bounded however long the prompt is.
            targets: M token ids.
            k: alternatives per token; 0 for none.

        Returns:
            M entries; those of a row that holds NaN or +inf are NaN.
        """
        if logits.shape != (len(targets), self._vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(targets)} targets "
                f"and a vocabulary of {self._vocab_size}"
            )
        step = max(1, _PROMPT_LOGPROB_ELEMENTS // self._vocab_size)
        found: list[TokenLogprob] = []
        for start in range(0, len(targets), step):
            rows = logits[start : start + step].detach().float()
            part = targets[start : start + step]
            found += self._chooser.token_logprobs(rows, part, [k] * len(part))
        return tuple(found)

    def _edit(self, raw: Tensor, batch: _Batch) -> Tensor:
        """A copy of the logits with bias, masks and penalties; `raw` itself if none applies now."""
        index: list[npt.NDArray[np.int64]] = []
        values: list[npt.NDArray[np.float32]] = []
        for row in batch.edited:
            ids, changes = batch.states[row].edits(self._vocab_size)
            if len(ids):
                index.append(ids + row * self._vocab_size)
                values.append(changes)
        if not index:
            return raw
        return self._chooser.edit(raw, np.concatenate(index), np.concatenate(values, axis=1))

    def _batch_of(self, states: Sequence[SamplingState]) -> _Batch:
        batch = self._batch
        # States compare by identity. In steady decoding the batch is that of the step before.
        if batch is None or batch.states != (states if isinstance(states, list) else list(states)):
            batch = self._batch = self._group(list(states))
        return batch

    def _group(self, states: list[SamplingState]) -> _Batch:
        rows = [row for row, state in enumerate(states) if not state.is_greedy]
        drawn = [states[row] for row in rows]
        table = None
        if drawn:
            size = self._vocab_size
            table = DrawTable(
                rows=np.array(rows, np.int64),
                keys=np.array([s.key for s in drawn], np.uint64),
                inverse_temperature=np.array([s.inverse_temperature for s in drawn], np.float32),
                top_k=np.array([s.top_k if s.top_k < size else 0 for s in drawn], np.int64),
                top_p=np.array([s.top_p if s.top_p < 1.0 else _OFF for s in drawn], np.float64),
                min_p=np.array([s.min_p for s in drawn], np.float32),
            )
        return _Batch(
            states=states,
            table=table,
            drawn=drawn,
            edited=[row for row, state in enumerate(states) if state.has_edits],
            with_logprobs=[
                row for row, state in enumerate(states) if state.params.logprobs is not None
            ],
        )


def _chooser_for(vocab_size: int, device: torch.device) -> Chooser:
    if device.type != "cpu":
        return TorchChooser(device)
    from .choosing_cpu import CpuChooser  # numba takes half a second to import

    return CpuChooser(vocab_size)


def _explain(row: Tensor) -> str:
    """Why no token can be chosen, given the unedited logits (V,)."""
    nans = int(row.isnan().sum())
    infinite = int((row == torch.inf).sum())
    if nans or infinite:
        return (
            f"the model's logits are not finite ({nans} NaN and {infinite} infinite of "
            f"{row.numel()}); if it persists, serve with a wider dtype or check the adapter"
        )
    return (
        f"no token can be chosen: all {row.numel()} logits are -inf once logit_bias and "
        "min_tokens are applied; relax them"
    )
