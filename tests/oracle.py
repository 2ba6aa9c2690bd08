"""The outside judge of answers: transformers (and peft, for adapters) on the same weights.

    oracle = Oracle(tiny_model("llama"), TOLERANCES[torch.float32])
    oracle.check_greedy(await rt.complete(ids, SamplingParams(temperature=0, logprobs=2)), 20)

What is asked of an answer, however it was batched, paged, chunked, shared or preempted:

- transformers reads prompt and answer in one plain forward (teacher forcing). At every step the
  reported log-probabilities (of the token, and of the alternatives) agree within the tolerance, and
  so do the ranks.
- A greedy token is the most likely one there, or less than `Tolerance.gap` behind it: two correct
  orders of the same sums may then choose differently.
- Up to the first step that is so close, the tokens are those of ``model.generate``.
- A drawn token is the one in whose stretch of transformers' cumulative distribution the step's
  random number lies, or lies but for the tolerance.

A judge that never decides proves nothing: `check_decisive` asserts that nearly all steps were
decided by more than the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cotune.runtime.randomness import stream_key, uniforms
from tiny_models import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cotune import Response, SamplingParams
    from cotune.runtime.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two correct computations may be apart.

    Attributes:
        logprob: largest absolute difference of one log-probability.
        rms: largest root mean square of such differences, over all that an oracle compares.
        gap: lead of the best token below which another may be chosen.
        decided: smallest share of greedy steps that must have a larger lead.
    """

    logprob: float
    rms: float
    gap: float
    decided: float


TOLERANCES = {
    # Sums in another order. Measured over all families: at most 1e-5, root mean square 2e-6.
    torch.float32: Tolerance(logprob=1e-4, rms=1e-5, gap=2e-4, decided=0.95),
    # Every activation is rounded to 11 and 8 bits, in ours and in theirs, at different places; both
    # are equally far from the exact values. Measured, adapters of noise included: at most 0.033 and
    # 0.36, root mean square 0.007 and 0.06. Logits have a standard deviation of 2, so that a wrong
    # page or weight costs a root mean square of 0.5 and more.
    torch.float16: Tolerance(logprob=0.08, rms=0.012, gap=0.08, decided=0.6),
    torch.bfloat16: Tolerance(logprob=0.6, rms=0.09, gap=0.4, decided=0.15),
}
"""What each dtype allows, for the models of `tiny_models`."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A greedy answer, and each token's lead over the second best."""

    tokens: list[int]
    leads: list[float]


def _before_close_call(leads: Sequence[float], gap: float) -> int:
    return next((i for i, lead in enumerate(leads) if lead <= gap), len(leads))


class Oracle:
    """Judges answers by what transformers computes.

    Args:
        model: a causal LM of transformers or peft, in eval mode.
        tolerance: what its dtype allows.
    """

    def __init__(self, model: Any, tolerance: Tolerance) -> None:
        self.model = model
        self.tolerance = tolerance
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = {eos} if isinstance(eos, int) else set(eos or ())
        self._steps = 0
        self._decided = 0
        self._squares = 0.0
        self._compared = 0
        self._read: dict[tuple[int, ...], torch.Tensor] = {}
        self._generated: dict[tuple[Any, ...], tuple[int, Generated]] = {}

    # -- what transformers says ------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities (len(ids), V) of what follows each token, from one plain forward."""
        key = tuple(ids)
        if key not in self._read:
            logits = self.model(input_ids=torch.tensor([key]), use_cache=False).logits
            self._read[key] = logits[0].float().log_softmax(-1)
        return self._read[key]

    def generate(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> Generated:
        """The greedy answer of ``model.generate``, an end-of-sequence token included.

        It is remembered: asking for fewer tokens later costs nothing.
        """
        key = (tuple(prompt), *sorted(options.items()))
        asked, known = self._generated.get(key, (0, Generated([], [])))
        if asked < max_tokens and (asked == 0 or len(known.tokens) == asked):
            known = self._generate(prompt, max_tokens, options)
            self._generated[key] = max_tokens, known
        return Generated(known.tokens[:max_tokens], known.leads[:max_tokens])

    @torch.no_grad()
    def _generate(
        self, prompt: Sequence[int], max_tokens: int, options: dict[str, Any]
    ) -> Generated:
        ids = torch.tensor([list(prompt)])
        with quiet_transformers():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                output_scores=True,
                return_dict_in_generate=True,
                **{"do_sample": False, "repetition_penalty": 1.0, **options},
            )
        best, second = torch.cat(out.scores).float().topk(2).values.unbind(-1)
        return Generated(out.sequences[0, len(prompt) :].tolist(), (best - second).tolist())

    # -- the judgement ---------------------------------------------------------------------------

    def check(self, response: Response) -> torch.Tensor:
        """Every log-probability of an answer, however its tokens were chosen.

        Returns:
            transformers' log-probabilities (answer tokens, V).
        """
        prompt, tokens = response.prompt_token_ids, response.token_ids
        assert tokens, "an answer without tokens shows nothing"
        assert response.usage.completion_tokens == len(tokens)
        expected = self.logprobs((*prompt, *tokens[:-1]))[len(prompt) - 1 :]
        assert response.logprobs is not None, "ask for logprobs"
        self._check_entries(response.logprobs, tokens, expected)
        return expected

    def check_greedy(
        self, response: Response, max_tokens: int, *, ignore_eos: bool = False
    ) -> None:
        """An answer that was asked for with temperature 0 and these parameters."""
        sure = self._check_best(response)
        options = {"eos_token_id": None} if ignore_eos else {}
        # Like this forward, `generate` decides clearly up to the first close call.
        if sure == len(response.token_ids):
            self._check_generated(response, max_tokens, options)
        elif sure:
            wanted = self.generate(response.prompt_token_ids, sure, **options)
            assert list(response.token_ids[:sure]) == wanted.tokens

    def check_choices(self, response: Response, params: SamplingParams) -> int:
        """An answer that is greedy, or drawn with a temperature and a seed and nothing else.

        Returns:
            how many of its tokens come before the first close call: every correct computation
            chooses those.
        """
        if params.temperature == 0.0:
            return self._check_best(response)
        return self._check_drawn(response, params)

    def _check_best(self, response: Response) -> int:
        """Every token is the most likely one, or close; how many before the first close call."""
        expected = self.check(response)
        best, second = expected.topk(2).values.unbind(-1)
        chosen = expected.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        behind = best - chosen
        assert bool((behind <= self.tolerance.gap).all()), (
            f"token {int(behind.argmax())} of the answer is {float(behind.max()):.4g} behind the "
            f"best; {self.tolerance.gap:.4g} is allowed"
        )
        leads = best - second
        self._steps += len(leads)
        self._decided += int((leads > self.tolerance.gap).sum())
        return _before_close_call(leads.tolist(), self.tolerance.gap)

    def _check_drawn(self, response: Response, params: SamplingParams) -> int:
        """The same of draws."""
        assert params.temperature is not None
        assert params.seed is not None
        weights = (self.check(response).double() / params.temperature).softmax(-1)
        ends = weights.cumsum(-1)
        keys = np.full(len(ends), stream_key(params.seed, response.index), np.uint64)
        numbers = torch.from_numpy(uniforms(keys, np.arange(len(ends)), 0))[:, None]
        # If no log-probability is off by more than e, a sum p of probabilities is off by no more
        # than 2 e p (1 - p), which is e / 2 at most.
        slack = self.tolerance.logprob / params.temperature / 2
        chosen = torch.tensor(response.token_ids)[:, None]
        after = numbers - (ends - weights).gather(1, chosen)
        before = ends.gather(1, chosen) - numbers
        assert bool((after >= -slack).all()), "a token was drawn that comes later"
        assert bool((before >= -slack).all()), "a token was drawn that had passed"
        return _before_close_call(torch.minimum(after, before)[:, 0].tolist(), slack)

    def check_edited(self, response: Response, max_tokens: int, **options: Any) -> int:
        """A greedy answer whose logits were edited, as ``generate(**options)`` edits them.

        Returns:
            how many of its tokens were compared: those before the first close call.
        """
        self.check(response)
        return self._check_generated(response, max_tokens, options)

    def _check_generated(self, response: Response, max_tokens: int, options: dict[str, Any]) -> int:
        """The tokens before the first close call of ``generate``; with none, the end as well."""
        wanted = self.generate(response.prompt_token_ids, max_tokens, **options)
        sure = _before_close_call(wanted.leads, self.tolerance.gap)
        assert list(response.token_ids[:sure]) == wanted.tokens[:sure]
        if sure == len(wanted.tokens):
            assert len(response.token_ids) == sure
            ends = set() if "eos_token_id" in options else self.eos_token_ids
            is_stopped = wanted.tokens[-1] in ends
            assert response.finish_reason == ("stop" if is_stopped else "length")
        return sure

    def check_prompt(self, response: Response, alternatives: int) -> None:
        """The log-probabilities of a prompt's own tokens."""
        prompt = response.prompt_token_ids
        assert response.prompt_logprobs is not None
        first, *others = response.prompt_logprobs
        assert first is None, "nothing predicts the first token"
        entries = [entry for entry in others if entry is not None]
        assert len(entries) == len(prompt) - 1
        assert all(len(entry.top) == alternatives for entry in entries)
        if entries:
            self._check_entries(entries, prompt[1:], self.logprobs(prompt)[:-1])

    def _check_entries(
        self, entries: Sequence[TokenLogprob], tokens: Sequence[int], expected: torch.Tensor
    ) -> None:
        """Reported log-probabilities against `expected` (len(tokens), V)."""
        assert [entry.token_id for entry in entries] == list(tokens)
        assert len(entries) == len(expected)
        wanted = expected.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        reported = torch.tensor([entry.logprob for entry in entries])
        self._note(reported - wanted)
        # The rank lies between those that the tolerance leaves possible.
        slack = self.tolerance.gap
        ranks = torch.tensor([entry.rank for entry in entries])
        assert bool((ranks > (expected > wanted[:, None] + slack).sum(-1)).all())
        assert bool((ranks <= (expected > wanted[:, None] - slack).sum(-1)).all())
        (count,) = {len(entry.top) for entry in entries}
        if count:
            top_ids = torch.tensor([[token for token, _ in entry.top] for entry in entries])
            top = torch.tensor([[value for _, value in entry.top] for entry in entries])
            assert all(len(set(row)) == count for row in top_ids.tolist())
            assert bool((top[:, 1:] <= top[:, :-1]).all()), "alternatives come best first"
            self._note(top - expected.gather(1, top_ids))
            self._note(top - expected.topk(count).values)

    def _note(self, differences: torch.Tensor) -> None:
        worst = float(differences.abs().max())
        assert worst < self.tolerance.logprob, (
            f"a log-probability is off by {worst:.3g}; {self.tolerance.logprob:.3g} is allowed"
        )
        self._squares += float(differences.double().square().sum())
        self._compared += differences.numel()

    # -- whether it meant anything ---------------------------------------------------------------

    def check_decisive(self) -> None:
        """What was judged since the last call had clear winners, and no small steady error."""
        steps, decided = self._steps, self._decided
        squares, compared = self._squares, self._compared
        self._steps = self._decided = self._compared = 0
        self._squares = 0.0
        assert steps, "nothing greedy was judged"
        assert decided >= self.tolerance.decided * steps, f"only {decided} of {steps} were decided"
        rms = (squares / compared) ** 0.5
        assert rms < self.tolerance.rms, f"root mean square error {rms:.3g}"
