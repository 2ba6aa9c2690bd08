"""The gate: may a candidate take the place of the live version?

Two questions. *Is it better* on held-out feedback, which was never trained on? And *has it
collapsed*: does it still write ordinary text as the base model does? Standard library alone; the
log-probabilities come in, a verdict goes out, and the same input gives the same verdict.

Better
------
A version's implicit reward of a completion is r = beta (logp - ref_logp) (Rafailov et al. 2023,
Eq. 5), a pair's margin m = r_chosen - r_rejected; it gets the pair right, it *wins*, if m > 0.
Counting wins alone wastes what little there is: with 30 pairs, 60 % against 75 % is within the
noise. Comparing margins is sensitive and fragile: one pair of a huge margin decides. So a sample's
score lies between the two,

    s = sigmoid(m / t)        t: median of the larger |m| of the two versions, at most 1;
                              of pairs and of rated answers apart

a count of wins where margins are large (above 1, where the Bradley-Terry probability of the stated
preference, sigmoid(m), is near its ends), and proportional to the margin where all are small, as
they are after the first steps. Two properties make it the right one:

- It is bounded: no sample weighs more than another, whatever its margin.
- It is symmetric: s(m) + s(-m) = 1. If a share e of labels is flipped at random, the expected
  difference of two versions shrinks by 1 - 2e and keeps its sign. For a log-likelihood, which is
  neither, that is not so (Ghosh, Manwani & Sastry 2015, "Making risk minimization tolerant to label
  noise", Thm 1: the sigmoid loss is one of those for which it holds).

A rated completion has no partner, so its score is that of m = r if it was liked and -r if not.
A version could raise the probability of everything and win on likes alone, so likes and dislikes
together weigh as if there were equally many, as far as there are enough of both.

Candidate and live version are compared on the same samples, by the differences d of their scores:
what makes a sample hard or its label wrong is in both and drops out. The candidate is better if

    mean(d) - z SE > 0        z: `confidence_z`, widened as Student's t is for few samples

With z = 1 this is the parameter-free Ladder of Blum & Hardt 2015 (Fig. 2), made for exactly this
use: many candidates, each made after seeing how its predecessors fared on the same held-out set. It
keeps that adaptive use from overfitting the set. A candidate that is exactly as good passes one
time in six, which changes nothing; one that is noticeably worse hardly ever does
(tests/unit/runtime/learning/test_gate.py measures it).

To be refused it must be worse beyond chance in its turn, by standard errors of their own number:

    mean(d) + z' SE < 0        z': `refusal_z`, widened likewise

Whatever lies between is *undecided*: not published, but no reason either to throw training away.
What passes does not depend on z'. With z = 0, which publishes whatever looks better, z' is what
keeps half of all equally good candidates from being refused.

Progressive
-----------
Held-out feedback is a fifth of all, and a live version that was the luckiest of several on it looks
better there than it is. So new feedback is used twice, first to test and then to train: before a
sample is trained on for the first time, the weights in training are asked about it (their forward
computes that anyway). Neither they nor the live version have seen anything of its prompt by then,
so the comparison is as fair as on held-out feedback, and each sample serves for one live version
only (progressive validation: Blum, Kalai & Langford 1999, "Beating the hold-out"; Dawid 1984). What
it measures is the mean of the weights on their way to the candidate. The way can lead up and then
down, as when wrong labels are learned by heart in later epochs. So the held-out samples, of which
the candidate itself is asked, must not find it worse beyond chance; no new ones crowd them out.

Whose samples count how much
----------------------------
- *Everyone is asked*: the samples that a version is evaluated on, which cost a forward each, are
  chosen evenly over sources (`choose_evidence`). Of the most recent alone, a flood would leave none
  but its own.
- *The recent count more*: half as much every `half_life` samples back. Wishes change, and a new
  subject begins with few samples: weighed like all others, it would be outvoted by what was wanted
  before until it is nearly over. (A source that fills more than its share, see below, ages others
  only by its share.)
- *Who contradicts himself is believed on his latest word*. Where the live version agreed with a
  source's earlier samples and is turned down by its later ones, beyond chance, the earlier ones no
  longer count. Otherwise a reversal of wishes would be outvoted for long by what they were. Only
  the source's own samples go: nobody can make those of others go. (A search for the cut at which
  means differ most, as ADWIN makes: Bifet & Gavaldà 2007.)
- *No source outvotes the others*: none has more than a fifth of all weight, or than its even share
  of fewer than five. Only where the others are too few to fill the rest is a source given as much
  as `min_held_out` samples, so that a stray rating does not stop the learning of a device's only
  user.
- *No source decides alone*: without any single one of them, the rest must not find the candidate
  worse; where two or more others speak, they must find it better, by half the margin asked of all.
  A flood of inverted labels makes a worse candidate look better in its own samples only.
- *The first to speak*: a flood that comes before anybody else cannot be told from a device's only
  user. Where there are many users, `min_sources` keeps everything back until so many have spoken.
- Samples of one source are alike. The standard error is the larger of that of independent samples
  and the cluster-robust one (Liang & Zeger 1986), so that sources that disagree widen it.

Collapsed
---------
Preference optimisation can raise margins while the probability of chosen completions falls with
that of the rejected (Pal et al. 2024; Razin et al. 2025), and a version that repeats itself can
still win its pairs. So, against the base model: loss on ordinary text, entropy of next tokens,
repeated 4-grams in what it writes, and log-probability of chosen completions per token must stay
within limits, each a setting. They are absolute: small losses do not add up from version to
version.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass, field, replace
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .config import GateConfig

Reason: TypeAlias = Literal[
    "too_few_held_out",
    "too_few_sources",
    "not_better",
    "probe_loss",
    "entropy",
    "repetition",
    "chosen_drop",
    "not_finite",
]


class _Sourced(Protocol):
    @property
    def source(self) -> str: ...


S = TypeVar("S", bound=_Sourced)

LARGEST_SHARE = 1 / 5
"""Most of all weight that one of five or more sources has."""
REVERSAL_Z = 3.0
"""Standard errors beyond which a source has changed its mind. With the other conditions of
`_last_reversal`, a source that is right in 70 % and never changes is taken to have done so once in
a hundred sets of 96 samples (simulated)."""
REVERSAL_SAMPLES = 4
"""Fewest samples on either side of such a change."""
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScore:
    """A version's log-probabilities of a held-out pair, summed over completion tokens."""

    key: int
    source: str
    chosen_logp: float
    rejected_logp: float
    chosen_tokens: int
    rejected_tokens: int
    ref_chosen_logp: float
    ref_rejected_logp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedScore:
    """A version's log-probability of a held-out rated completion, summed over its tokens."""

    key: int
    source: str
    logp: float
    tokens: int
    ref_logp: float
    is_desirable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeScore:
    """A version on ordinary text.

    Attributes:
        nll: mean negative log-likelihood per token, in nats.
        entropy: mean entropy of next tokens, in nats.
        repetition: share of repeated 4-grams in what it writes; [0, 1].
    """

    nll: float
    entropy: float
    repetition: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that is asked of a version."""

    pairs: tuple[PairScore, ...] = ()
    rated: tuple[RatedScore, ...] = ()
    probe: ProbeScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says.

    Attributes:
        passed: whether the candidate may go live.
        reasons: stable words for why not; empty if it passed.
        explanation: the same in words, with numbers.
        metrics: by name. `held_out_pairs` counts the `new_pairs` as well. Win rates, margins and
            `gain` are weighted as the module docstring says; `_low` and `_high` are ends of 95 %
            intervals, except those of `gain`, which the verdict is made by. Names that begin with
            `live_` and `base_` are the other versions'. `raw_win_rate` asks which completion is
            likelier per token, whatever the base model thinks of it.
        is_undecided: nothing speaks against the candidate but that it is not better *enough*: it
            is not worse beyond chance either, and more training or more feedback may tell.
    """

    passed: bool
    reasons: tuple[Reason, ...]
    explanation: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_undecided: bool = False


@dataclass(frozen=True, slots=True)
class _Compared:
    """One held-out sample under both versions; margins are of the side that was preferred."""

    key: int
    source: str
    margin: float
    live_margin: float
    is_pair: bool
    is_desirable: bool = True


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A weighted mean, its standard error, and how many equal samples are worth as much."""

    mean: float
    error: float
    samples: float


def judge(
    candidate: Evaluation,
    live: Evaluation,
    base_probe: ProbeScore,
    config: GateConfig,
    beta: float,
    *,
    progressive: Collection[int] = (),
) -> Verdict:
    """Whether `candidate` may take the place of `live`.

    Args:
        candidate: the version in question.
        live: the version that requests get now, on the same samples. For the base model, its
            log-probabilities are the references.
        base_probe: the base model on the same ordinary text.
        config: limits.
        beta: of the implicit reward.
        progressive: keys of the samples that are not held out, see the module docstring.

    Raises:
        ValueError: the two were not asked about the same samples.
    """
    _require_same_samples(candidate, live)
    if wrong := _not_finite(candidate, live, base_probe):
        return Verdict(
            passed=False, reasons=("not_finite",), explanation=f"{wrong} is not a finite number"
        )
    samples = _current(
        [*_compare_pairs(candidate, live, beta), *_compare_rated(candidate, live, beta)]
    )
    weights = _weights(samples, config)
    metrics = _describe(candidate, live, base_probe, samples, weights)
    objections: list[tuple[Reason, str]] = []
    words: list[str] = []
    is_worse = False

    if len(samples) < config.min_held_out:
        objections.append(
            (
                "too_few_held_out",
                f"{len(samples)} held-out samples count, fewer than {config.min_held_out}",
            )
        )
    sources = len({sample.source for sample in samples})
    if sources < config.min_sources:
        objections.append(
            (
                "too_few_sources",
                f"held-out samples of {sources} sources count, fewer than {config.min_sources}",
            )
        )
    if samples:
        differences = _differences(samples)
        gain = _estimate(samples, differences, weights)
        low = gain.mean - _widened(config.confidence_z, gain.samples) * gain.error
        high = gain.mean + _widened(config.refusal_z, gain.samples) * gain.error
        metrics["gain"] = gain.mean
        metrics["gain_low"], metrics["gain_high"] = low, high
        metrics["held_out_effective"] = gain.samples
        is_worse = high < 0.0
        words.append(
            f"held-out score {gain.mean:+.3f} against the live version, {low:+.3f} to {high:+.3f}"
        )
        if not low > 0.0:
            objections.append(("not_better", "it is not better beyond chance"))
        elif (lost := _lost_since(samples, differences, progressive, config)) is not None:
            is_worse = True
            metrics["gain_held_out"] = lost
            objections.append(
                ("not_better", f"worse on held-out samples alone: {lost:+.3f}, beyond chance")
            )
        elif (rest := _rest_that_disagrees(samples, differences, weights, config)) is not None:
            is_worse = rest < 0.0
            metrics["gain_without_one_source"] = rest
            # Unnamed: verdicts are kept when what a source has said is deleted.
            objections.append(
                ("not_better", f"the others do not agree with one source: {rest:+.3f} without it")
            )
    objections += _collapse(candidate, base_probe, samples, weights, config, metrics)

    reasons = tuple(dict.fromkeys(reason for reason, _ in objections))
    words += [text for _, text in objections]
    if "win_rate" in metrics:
        new = sum(sample.is_pair and sample.key in progressive for sample in samples)
        metrics["new_pairs"] = float(new)
        held_out = f"{metrics['held_out_pairs'] - new:.0f} held-out"
        words.insert(
            0,
            f"wins {metrics['win_rate']:.0%} of {held_out}{f' and {new} new' if new else ''} "
            f"pairs, live {metrics['live_win_rate']:.0%}",
        )
    inconclusive: set[Reason] = {"too_few_held_out", "too_few_sources", "not_better"}
    is_undecided = bool(reasons) and inconclusive.issuperset(reasons) and not is_worse
    outcome = "undecided" if is_undecided else "refused" if reasons else "passed"
    return Verdict(
        passed=not reasons,
        reasons=reasons,
        explanation="; ".join([outcome, *words]),
        metrics=metrics,
        is_undecided=is_undecided,
    )


def choose_evidence(samples: Sequence[S], limit: int) -> tuple[S, ...]:
    """At most `limit` of the samples, in their order: the most recent of each source.

    Sources that have few are taken whole, and all others give equally many.

    Args:
        samples: with a source each, oldest first; more than `limit`, or there is no choice.
        limit: most that are evaluated.
    """
    left = Counter(sample.source for sample in samples)
    room = limit
    quota: dict[str, int] = {}
    for i, (source, count) in enumerate(sorted(left.items(), key=lambda item: item[1])):
        quota[source] = min(count, room // (len(left) - i))
        room -= quota[source]
    chosen = []
    for sample in reversed(samples):
        if quota[sample.source]:
            quota[sample.source] -= 1
            chosen.append(sample)
    return tuple(reversed(chosen))


# --- samples --------------------------------------------------------------------------------------


def _require_same_samples(candidate: Evaluation, live: Evaluation) -> None:
    for ours, theirs in ((candidate.pairs, live.pairs), (candidate.rated, live.rated)):
        if [score.key for score in ours] != [score.key for score in theirs]:
            raise ValueError(
                "candidate and live version were evaluated on different samples; evaluate both on "
                "the same, in the same order"
            )


def _not_finite(candidate: Evaluation, live: Evaluation, base_probe: ProbeScore) -> str | None:
    """What is not finite, in words."""
    if not _is_finite(base_probe):
        return "the base model's probe"
    for name, version in (("the candidate", candidate), ("the live version", live)):
        if not _is_finite(version.probe):
            return f"{name}'s probe"
        scores: tuple[PairScore | RatedScore, ...] = (*version.pairs, *version.rated)
        for score in scores:
            if not _is_finite(score):
                return f"{name}'s log-probability of sample {score.key}"
    return None


def _is_finite(scores: ProbeScore | PairScore | RatedScore) -> bool:
    values: tuple[float, ...]
    if isinstance(scores, PairScore):
        values = (scores.chosen_logp, scores.rejected_logp)
        values += (scores.ref_chosen_logp, scores.ref_rejected_logp)
    elif isinstance(scores, RatedScore):
        values = (scores.logp, scores.ref_logp)
    else:
        values = (scores.nll, scores.entropy, scores.repetition)
    return all(map(math.isfinite, values))


def _margin(score: PairScore, beta: float) -> float:
    chosen = score.chosen_logp - score.ref_chosen_logp
    return beta * (chosen - (score.rejected_logp - score.ref_rejected_logp))


def _reward(score: RatedScore, beta: float) -> float:
    """With the sign that was wished for."""
    return beta * (score.logp - score.ref_logp) * (1.0 if score.is_desirable else -1.0)


def _compare_pairs(candidate: Evaluation, live: Evaluation, beta: float) -> list[_Compared]:
    return [
        _Compared(ours.key, ours.source, _margin(ours, beta), _margin(theirs, beta), is_pair=True)
        for ours, theirs in zip(candidate.pairs, live.pairs, strict=True)
    ]


def _compare_rated(candidate: Evaluation, live: Evaluation, beta: float) -> list[_Compared]:
    return [
        _Compared(
            ours.key,
            ours.source,
            _reward(ours, beta),
            _reward(theirs, beta),
            is_pair=False,
            is_desirable=ours.is_desirable,
        )
        for ours, theirs in zip(candidate.rated, live.rated, strict=True)
    ]


def _scales(samples: Sequence[_Compared]) -> dict[bool, float]:
    """The t of the module docstring, for rated samples (False) and for pairs (True)."""
    scales = {}
    for is_pair in (False, True):
        sizes = [
            max(abs(sample.margin), abs(sample.live_margin))
            for sample in samples
            if sample.is_pair == is_pair
        ]
        scales[is_pair] = max(min(median(sizes), 1.0), 1e-9) if sizes else 1.0
    return scales


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _differences(samples: Sequence[_Compared]) -> list[float]:
    """Candidate's score minus the live version's, by sample; [-1, 1]."""
    scales = _scales(samples)
    return [
        _sigmoid(sample.margin / scales[sample.is_pair])
        - _sigmoid(sample.live_margin / scales[sample.is_pair])
        for sample in samples
    ]


def _current(samples: list[_Compared]) -> list[_Compared]:
    """By age, oldest first, without what their sources have contradicted since."""
    samples.sort(key=lambda sample: sample.key)
    scales = _scales(samples)
    by_source: dict[str, list[_Compared]] = defaultdict(list)
    for sample in samples:
        by_source[sample.source].append(sample)
    first_key = {
        source: theirs[
            _last_reversal([_sigmoid(s.live_margin / scales[s.is_pair]) - 0.5 for s in theirs])
        ].key
        for source, theirs in by_source.items()
    }
    return [sample for sample in samples if sample.key >= first_key[sample.source]]


def _last_reversal(scores: Sequence[float]) -> int:
    """Where the latest word begins: from there on scores are below 0, before they were above.

    Args:
        scores: a version's, oldest first, minus one half.

    Returns:
        The index that separates the two best, if by more than `REVERSAL_Z` standard errors, each
        being on its side of 0 by two of its own, and the later one by half as much as the earlier,
        so that a subject which the version merely knows nothing of is none; 0 if there is none.
    """
    count = len(scores)
    best, begin = REVERSAL_Z, 0
    total, squares = math.fsum(scores), math.fsum(s * s for s in scores)
    early = early_squares = 0.0
    for cut in range(1, count):
        early += scores[cut - 1]
        early_squares += scores[cut - 1] ** 2
        late_count = count - cut
        if cut < REVERSAL_SAMPLES or late_count < REVERSAL_SAMPLES:
            continue
        means = early / cut, (total - early) / late_count
        squared = early_squares / cut, (squares - early_squares) / late_count
        errors = [
            math.sqrt(max(square - mean * mean, 1e-12) / (size - 1))
            for mean, square, size in zip(means, squared, (cut, late_count), strict=True)
        ]
        if means[0] < 2 * errors[0] or means[1] > -max(2 * errors[1], means[0] / 2):
            continue
        z = (means[0] - means[1]) / math.hypot(*errors)
        if z > best:
            best, begin = z, cut
    return begin


# --- weights --------------------------------------------------------------------------------------


def _weights(samples: Sequence[_Compared], config: GateConfig) -> list[float]:
    """What each sample counts; the newest of a small source about 1. See the module docstring."""
    kinds = ["pair" if s.is_pair else "liked" if s.is_desirable else "disliked" for s in samples]
    rated = {"liked", "disliked"}.intersection(kinds)
    sources = [sample.source for sample in samples]
    among = set(sources)
    share = max(LARGEST_SHARE, 1 / max(len(among), 1))

    def cap(weights: list[float], least: float) -> list[float]:
        if len(rated) == 2:
            weights = _capped(weights, kinds, 1 / 2, least, among=rated)
        return _capped(weights, sources, share, least, among=among)

    # Age is counted in weight, not in samples: a flood must not make the others' samples old.
    weights = cap([1.0] * len(samples), config.min_held_out)
    before = math.fsum(weights)
    age = 0.0
    for i in reversed(range(len(weights))):
        age += weights[i]
        weights[i] *= 0.5 ** (age / config.half_life)
    # What a source is left with in any case has aged as much as all the others.
    return cap(weights, config.min_held_out * math.fsum(weights) / max(before, 1e-9))


def _capped(
    weights: Sequence[float], groups: Sequence[str], share: float, least: float, among: set[str]
) -> list[float]:
    """Scale groups down so that none has more than `share` of the weight of all of them.

    Groups of a total up to `least` are left alone; so are those that are not `among` the capped.
    """
    totals: dict[str, float] = defaultdict(float)
    for weight, group in zip(weights, groups, strict=True):
        if group in among:
            totals[group] += weight
    limit = max(_level(list(totals.values()), share), least)
    factors = {group: min(1.0, limit / total) for group, total in totals.items() if total > 0.0}
    return [weight * factors.get(group, 1.0) for weight, group in zip(weights, groups, strict=True)]


def _level(totals: list[float], share: float) -> float:
    """The largest c for which c <= share * sum(min(total, c)), by filling up from below."""
    totals = sorted(totals, reverse=True)
    rest = math.fsum(totals)
    for capped, total in enumerate(totals):
        left = 1.0 - capped * share
        if left <= 1e-9:  # as many groups as shares: all equal to the smallest of them
            return totals[capped - 1]
        level = share * rest / left
        if total <= level:
            return level
        rest -= total
    return totals[-1] if totals else 0.0


# --- statistics -----------------------------------------------------------------------------------


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def _effective(weights: Sequence[float]) -> float:
    """Kish's effective sample size."""
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)


def _estimate(
    samples: Sequence[_Compared], values: Sequence[float], weights: Sequence[float]
) -> _Estimate:
    """The weighted mean; its error as the module docstring says. At least one sample."""
    mean = _mean(values, weights)
    count = _effective(weights)
    if len(values) < 2:
        return _Estimate(mean, math.inf, count)
    total = math.fsum(weights)
    parts = [w * (v - mean) / total for v, w in zip(values, weights, strict=True)]
    variance = math.fsum(part * part for part in parts) * count / max(count - 1.0, 0.5)
    by_source: dict[str, float] = defaultdict(float)
    for sample, part in zip(samples, parts, strict=True):
        by_source[sample.source] += part
    sources = len(by_source)
    if sources > 1:
        clustered = math.fsum(p * p for p in by_source.values()) * sources / (sources - 1)
        variance = max(variance, clustered)
    return _Estimate(mean, math.sqrt(variance), count)


def _widened(z: float, count: float) -> float:
    """The quantile of Student's t where the normal one is z (Fisher's expansion, two terms)."""
    freedom = max(count - 1.0, 1.0)
    first = (z**3 + z) / (4.0 * freedom)
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * freedom**2)
    return z + first + second


def _rest_that_disagrees(
    samples: Sequence[_Compared],
    differences: Sequence[float],
    weights: Sequence[float],
    config: GateConfig,
) -> float | None:
    """The mean of the rest without one source, where that does not agree that it is better.

    A rest of less than half of `min_held_out` samples is heard only where it speaks beyond chance;
    one of two sources or more, with enough samples, must speak for the candidate.
    """
    by_source: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        by_source[sample.source].append(i)
    total = math.fsum(weights)
    score = math.fsum(d * w for d, w in zip(differences, weights, strict=True))
    worst: float | None = None
    for source, own in by_source.items():
        if len(own) == len(samples):
            continue
        others = total - math.fsum(weights[i] for i in own)
        mean = (score - math.fsum(differences[i] * weights[i] for i in own)) / others
        rest = [i for i in range(len(samples)) if samples[i].source != source]
        is_heard = 2 * len(rest) >= config.min_held_out
        is_many = len(by_source) > 2 and len(rest) >= config.min_held_out
        doubt = 0.0
        if is_many or not is_heard:
            found = _estimate(
                [samples[i] for i in rest],
                [differences[i] for i in rest],
                [weights[i] for i in rest],
            )
            doubt = _widened(config.confidence_z, found.samples) * found.error
        if is_many:
            doubt *= -0.5
        if mean + doubt < 0.0 and (worst is None or mean < worst):
            worst = mean
    return worst


def _lost_since(
    samples: Sequence[_Compared],
    differences: Sequence[float],
    progressive: Collection[int],
    config: GateConfig,
) -> float | None:
    """The mean on held-out samples alone where they find the candidate worse beyond chance.

    Their age is counted among themselves, so that they reach as far back as without new ones.
    """
    held_out = [i for i, sample in enumerate(samples) if sample.key not in progressive]
    if not held_out or len(held_out) == len(samples):
        return None
    alone = [samples[i] for i in held_out]
    found = _estimate(alone, [differences[i] for i in held_out], _weights(alone, config))
    reach = _widened(config.refusal_z, found.samples) * found.error
    return found.mean if found.mean + reach < 0.0 else None


def _wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson 1927)."""
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


# --- what is reported -----------------------------------------------------------------------------


def _describe(
    candidate: Evaluation,
    live: Evaluation,
    base_probe: ProbeScore,
    samples: Sequence[_Compared],
    weights: Sequence[float],
) -> dict[str, float]:
    metrics: dict[str, float] = {
        "held_out_pairs": float(sum(sample.is_pair for sample in samples)),
        "held_out_rated": float(sum(not sample.is_pair for sample in samples)),
        "held_out_outdated": float(len(candidate.pairs) + len(candidate.rated) - len(samples)),
        "held_out_sources": float(len({sample.source for sample in samples})),
    }
    for prefix, probe in (("", candidate.probe), ("live_", live.probe), ("base_", base_probe)):
        metrics[f"{prefix}probe_nll"] = probe.nll
        metrics[f"{prefix}probe_entropy"] = probe.entropy
        metrics[f"{prefix}probe_repetition"] = probe.repetition
    counted = {s.key: w for s, w in zip(samples, weights, strict=True)}
    pairs = [(s, w) for s, w in zip(samples, weights, strict=True) if s.is_pair]
    if pairs:
        own = [weight for _, weight in pairs]
        count = _effective(own)
        for prefix, margins in (
            ("", [sample.margin for sample, _ in pairs]),
            ("live_", [sample.live_margin for sample, _ in pairs]),
        ):
            _add_interval(
                metrics, f"{prefix}win_rate", _mean([_win(m) for m in margins], own), count
            )
            metrics[f"{prefix}margin"] = _mean(margins, own)
        estimate = _estimate([s for s, _ in pairs], [s.margin for s, _ in pairs], own)
        reach = Z_95 * estimate.error if math.isfinite(estimate.error) else 0.0
        metrics["margin_low"] = estimate.mean - reach
        metrics["margin_high"] = estimate.mean + reach
        metrics["raw_win_rate"] = _raw_win_rate(candidate, counted)
        metrics["live_raw_win_rate"] = _raw_win_rate(live, counted)
        references = [
            replace(s, chosen_logp=s.ref_chosen_logp, rejected_logp=s.ref_rejected_logp)
            for s in live.pairs
        ]
        metrics["base_raw_win_rate"] = _raw_win_rate(
            replace(live, pairs=tuple(references)), counted
        )
    rated = [(s, w) for s, w in zip(samples, weights, strict=True) if not s.is_pair]
    if rated:
        own = [weight for _, weight in rated]
        metrics["rated_accuracy"] = _mean([_win(s.margin) for s, _ in rated], own)
        metrics["live_rated_accuracy"] = _mean([_win(s.live_margin) for s, _ in rated], own)
    return metrics


def _raw_win_rate(version: Evaluation, counted: Mapping[int, float]) -> float:
    pairs = [s for s in version.pairs if s.key in counted]
    wins = [
        _win(s.chosen_logp / s.chosen_tokens - s.rejected_logp / s.rejected_tokens) for s in pairs
    ]
    return _mean(wins, [counted[s.key] for s in pairs])


def _win(margin: float) -> float:
    """1, or 0, or one half where there is nothing between the two."""
    return 0.5 if margin == 0.0 else float(margin > 0.0)


def _add_interval(metrics: dict[str, float], name: str, share: float, count: float) -> None:
    metrics[name] = share
    metrics[f"{name}_low"], metrics[f"{name}_high"] = _wilson(share, count)


def _collapse(
    candidate: Evaluation,
    base_probe: ProbeScore,
    samples: Sequence[_Compared],
    weights: Sequence[float],
    config: GateConfig,
    metrics: dict[str, float],
) -> list[tuple[Reason, str]]:
    """Every limit that the candidate oversteps; adds `chosen_drop` to `metrics`."""
    probe = candidate.probe
    found: list[tuple[Reason, str]] = []
    if probe.nll > base_probe.nll + config.max_probe_increase:
        found.append(
            (
                "probe_loss",
                f"loss on ordinary text is {probe.nll:.3f} nats per token, the base model's "
                f"{base_probe.nll:.3f}; at most {config.max_probe_increase:g} more is allowed",
            )
        )
    if probe.entropy < config.min_entropy_ratio * base_probe.entropy:
        found.append(
            (
                "entropy",
                f"entropy of next tokens is {probe.entropy:.3f} nats, the base model's "
                f"{base_probe.entropy:.3f}; at least {config.min_entropy_ratio:g} of that is asked",
            )
        )
    if probe.repetition > base_probe.repetition + config.max_repetition:
        found.append(
            (
                "repetition",
                f"{probe.repetition:.0%} of the 4-grams it writes are repeated, "
                f"{base_probe.repetition:.0%} of the base model's; at most "
                f"{config.max_repetition:.0%} more is allowed",
            )
        )
    counted = {s.key: w for s, w in zip(samples, weights, strict=True)}
    drops = [
        ((s.ref_chosen_logp - s.chosen_logp) / s.chosen_tokens, counted[s.key])
        for s in candidate.pairs
        if s.key in counted
    ] + [
        ((s.ref_logp - s.logp) / s.tokens, counted[s.key])
        for s in candidate.rated
        if s.is_desirable and s.key in counted
    ]
    if drops:
        drop = _mean([value for value, _ in drops], [weight for _, weight in drops])
        metrics["chosen_drop"] = drop
        if drop > config.max_chosen_drop:
            found.append(
                (
                    "chosen_drop",
                    f"chosen completions have lost {drop:.2f} nats per token against the base "
                    f"model; at most {config.max_chosen_drop:g} is allowed",
                )
            )
    return found
