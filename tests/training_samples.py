"""Samples for tests of training: random tokens, references that look like a base model's."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cotune.runtime.learning.samples import PreferencePair, RatedCompletion, Sample, TokenIds
from cotune.runtime.training.batches import Group, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCAB_SIZE = 384


def random_pair(key: int, seed: int | None = None) -> PreferencePair:
    """A pair with a prompt of 3 to 12 tokens and completions of 1 to 9; no references."""
    draw = random.Random(f"pair {key if seed is None else seed}")
    return PreferencePair(
        key=key,
        adapter="tiny",
        source="local",
        prompt_ids=_ids(draw, draw.randint(3, 12)),
        chosen_ids=_ids(draw, draw.randint(1, 9)),
        rejected_ids=_ids(draw, draw.randint(1, 9)),
    )


def random_rated(key: int, *, is_desirable: bool) -> RatedCompletion:
    """A rated completion of 1 to 9 tokens; no reference."""
    draw = random.Random(f"rated {key}")
    return RatedCompletion(
        key=key,
        adapter="tiny",
        source="local",
        prompt_ids=_ids(draw, draw.randint(3, 12)),
        completion_ids=_ids(draw, draw.randint(1, 9)),
        is_desirable=is_desirable,
    )


def with_references(samples: Sequence[Sample], model: Any) -> list[Sample]:
    """The samples with the log-probabilities that `model` itself, one by one, gives them."""

    def logp(prompt_ids: TokenIds, completion_ids: TokenIds) -> float:
        return float(completion_logps(model, prompt_ids, completion_ids).sum())

    done: list[Sample] = []
    for s in samples:
        if isinstance(s, PreferencePair):
            chosen, rejected = (logp(s.prompt_ids, ids) for ids in (s.chosen_ids, s.rejected_ids))
            done.append(replace(s, ref_chosen_logp=chosen, ref_rejected_logp=rejected))
        else:
            done.append(replace(s, ref_logp=logp(s.prompt_ids, s.completion_ids)))
    return done


def completion_logps(model: Any, prompt_ids: TokenIds, completion_ids: TokenIds) -> torch.Tensor:
    """Log-probability of each completion token: a plain forward of one sequence.

    In the model's own dtype, so that a float64 model makes it an oracle.
    """
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    rows: torch.Tensor = logits.log_softmax(-1)
    return rows.gather(-1, torch.tensor(completion_ids).unsqueeze(-1)).squeeze(-1)


def randomize_lora(trainer: Any, seed: int = 7) -> None:
    """Give A and B of a trainer's adapter values that matter: a fresh B is zero."""
    state = trainer.snapshot()
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(state.tensors)
    for name, value in tensors.items():
        if name.startswith("lora/"):
            scale = 0.3 / value.shape[1] ** 0.5
            tensors[name] = torch.randn(value.shape, generator=generator) * scale
    trainer.restore(type(state)(tensors, state.values))


def packed_pair(pair: PreferencePair) -> Any:
    """A pair alone, as a packed batch."""
    return pack(
        [Group(prompt_ids=pair.prompt_ids, completions=(pair.chosen_ids, pair.rejected_ids))]
    )


def _ids(draw: random.Random, n: int) -> TokenIds:
    return tuple(draw.randrange(5, VOCAB_SIZE) for _ in range(n))
