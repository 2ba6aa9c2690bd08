"""What the gate lets pass, and how often it errs.

Error rates are measured on simulated versions: each sample has a difficulty that both versions
share and a part of its own, so margins are normal and correlated, as those of two versions are.
A mean of 0.67 standard deviations makes 75 % wins.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.learning.config import GateConfig
from cotune.runtime.learning.gate import (
    Evaluation,
    PairScore,
    ProbeScore,
    RatedScore,
    Verdict,
    choose_evidence,
    judge,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BETA = 0.1
PROBE = ProbeScore(nll=3.0, entropy=3.0, repetition=0.1)
CONFIG = GateConfig()

WINS_60, WINS_75, WINS_80 = 0.253, 0.674, 0.842
ONE_USER = ["user"] * 30


def pair(key: int, margin: float, source: str = "user") -> PairScore:
    """A pair with that margin; half of it is the chosen completion's."""
    half = margin / BETA / 2
    return PairScore(
        key=key,
        source=source,
        chosen_logp=-40.0 + half,
        rejected_logp=-44.0 - half,
        chosen_tokens=20,
        rejected_tokens=20,
        ref_chosen_logp=-40.0,
        ref_rejected_logp=-44.0,
    )


def rated(key: int, reward: float, is_desirable: bool, source: str = "user") -> RatedScore:
    return RatedScore(
        key=key,
        source=source,
        logp=-40.0 + reward / BETA,
        tokens=20,
        ref_logp=-40.0,
        is_desirable=is_desirable,
    )


def version(margins: Sequence[float], sources: Sequence[str] | None = None) -> Evaluation:
    names = sources or ["user"] * len(margins)
    scores = [
        pair(key, margin, name)
        for key, (margin, name) in enumerate(zip(margins, names, strict=True))
    ]
    return Evaluation(pairs=tuple(scores), probe=PROBE)


def verdict_on(candidate: Evaluation, live: Evaluation, config: GateConfig = CONFIG) -> Verdict:
    return judge(candidate, live, PROBE, config, BETA)


@dataclass(frozen=True)
class Scenario:
    """Means are of margins in standard deviations; None is the base model, whose margins are 0."""

    live: float | None
    candidate: float
    flipped: float = 0.0
    scale: float = 0.5
    inverted: str = ""  # this source states the opposite of what it wishes


def simulate(scenario: Scenario, sources: Sequence[str], rng: random.Random) -> Verdict:
    live, candidate = [], []
    for source in sources:
        shared = rng.gauss(0.0, 0.7)
        theirs = (
            0.0 if scenario.live is None else scenario.live + shared + rng.gauss(0.0, 0.51**0.5)
        )
        ours = scenario.candidate + shared + rng.gauss(0.0, 0.51**0.5)
        sign = -1 if rng.random() < scenario.flipped or source == scenario.inverted else 1
        live.append(sign * scenario.scale * theirs)
        candidate.append(sign * scenario.scale * ours)
    return verdict_on(version(candidate, sources), version(live, sources))


def pass_rate(scenario: Scenario, sources: Sequence[str], trials: int = 300) -> float:
    rng = random.Random(7)
    return sum(simulate(scenario, sources, rng).passed for _ in range(trials)) / trials


# --- how often it errs, with 30 held-out pairs ----------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 0.5, 10.0])
@pytest.mark.parametrize(("live", "candidate"), [(WINS_75, WINS_60), (None, -WINS_60)])
def test_a_worse_candidate_hardly_ever_passes_whatever_the_size_of_margins(
    live: float | None, candidate: float, scale: float
) -> None:
    assert pass_rate(Scenario(live, candidate, scale=scale), ONE_USER) <= 0.05


@pytest.mark.parametrize("scale", [0.01, 0.5, 10.0])
@pytest.mark.parametrize(("live", "candidate"), [(None, WINS_75), (WINS_60, WINS_80)])
def test_a_clearly_better_candidate_mostly_passes_whatever_the_size_of_margins(
    live: float | None, candidate: float, scale: float
) -> None:
    assert pass_rate(Scenario(live, candidate, scale=scale), ONE_USER) >= 0.85


def test_an_equally_good_candidate_passes_about_as_often_as_one_standard_error_says() -> None:
    assert 0.10 <= pass_rate(Scenario(0.5, 0.5), ONE_USER, trials=600) <= 0.22


def test_asking_for_more_standard_errors_lets_fewer_pass() -> None:
    rng = random.Random(1)
    strict = replace(CONFIG, confidence_z=1.64)
    passed = {1.0: 0, 1.64: 0}
    for _ in range(400):
        margins = [rng.gauss(0.0, 1.0) for _ in range(30)]
        live = version([rng.gauss(0.0, 1.0) for _ in range(30)])
        passed[1.0] += verdict_on(version(margins), live).passed
        passed[1.64] += verdict_on(version(margins), live, strict).passed
    assert passed[1.64] / 400 <= 0.08 < passed[1.0] / 400


def test_with_three_of_ten_labels_flipped_a_worse_candidate_hardly_ever_passes() -> None:
    assert pass_rate(Scenario(WINS_80, 0.0, flipped=0.3), ONE_USER) <= 0.05
    assert pass_rate(Scenario(WINS_75, WINS_60, flipped=0.3), ["user"] * 60) <= 0.05


def test_with_three_of_ten_labels_flipped_a_better_candidate_still_passes() -> None:
    assert pass_rate(Scenario(None, WINS_75, flipped=0.3), ONE_USER) >= 0.4
    assert pass_rate(Scenario(None, WINS_75, flipped=0.3), ["user"] * 120) >= 0.75


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [1, 3, 6])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_flood_of_inverted_labels_gets_no_worse_candidate_through(
    others: int, is_interleaved: bool
) -> None:
    sources = [f"user {i % others}" for i in range(24)] + ["flood"] * 120
    if is_interleaved:
        random.Random(3).shuffle(sources)
    for live, candidate in ((WINS_80, 0.0), (None, -WINS_75)):
        scenario = Scenario(live, candidate, inverted="flood")
        assert pass_rate(scenario, sources, trials=40) <= 0.05


def test_a_flood_is_heard_no_more_when_it_is_longer() -> None:
    rng = random.Random(5)
    honest = [f"user {i % 6}" for i in range(30)]
    gains = []
    for flood in (50, 200):
        sources = honest + ["flood"] * flood
        margins = [-1.0 if s == "flood" else 1.0 + rng.gauss(0.0, 0.1) for s in sources]
        gains.append(
            verdict_on(version(margins, sources), version([0.0] * len(sources), sources)).metrics[
                "gain"
            ]
        )
    assert gains[0] > 0.0
    assert gains[1] == pytest.approx(gains[0], abs=0.01)


def test_among_many_sources_a_flood_cannot_keep_a_better_candidate_back() -> None:
    sources = [f"user {i % 9}" for i in range(45)] + ["flood"] * 100
    scenario = Scenario(None, WINS_80, inverted="flood")
    assert pass_rate(scenario, sources, trials=40) >= 0.6


@pytest.mark.parametrize("strays", [1, 3, 12])
def test_a_few_ratings_by_others_do_not_stop_the_learning_of_the_main_user(strays: int) -> None:
    sources = ["user"] * 100 + ["stray"] * strays
    assert pass_rate(Scenario(None, WINS_75), sources, trials=60) >= 0.8


def test_a_source_that_alone_finds_the_candidate_better_does_not_decide() -> None:
    sources = ["a"] * 10 + ["b"] * 10
    candidate = version([4.0] * 10 + [-0.05] * 10, sources)
    verdict = verdict_on(candidate, version([0.0] * 20, sources), replace(CONFIG, confidence_z=0.1))
    assert verdict.reasons == ("not_better",)
    assert "do not agree with one source" in verdict.explanation
    assert verdict.metrics["gain"] > 0.0 > verdict.metrics["gain_without_one_source"]
    assert not verdict.is_undecided


def test_a_flood_does_not_crowd_others_out_of_what_is_evaluated() -> None:
    old = [pair(key, 1.0, f"user {key % 3}") for key in range(30)]
    flood = [pair(key, 1.0, "flood") for key in range(30, 530)]
    chosen = choose_evidence([*old, *flood], 96)
    assert chosen[:30] == tuple(old)
    assert chosen[30:] == tuple(flood[-66:])


def test_of_each_source_the_most_recent_samples_are_evaluated() -> None:
    samples = [pair(key, 1.0, "ab"[key % 2]) for key in range(100)]
    assert choose_evidence(samples, 10) == tuple(samples[-10:])
    assert choose_evidence(samples[:10], 96) == tuple(samples[:10])
    assert choose_evidence([], 96) == ()
    assert len(choose_evidence([pair(key, 1.0, f"{key}") for key in range(50)], 20)) == 20


# --- change ---------------------------------------------------------------------------------------


def drifting(new: int, old: int = 100) -> tuple[Evaluation, Evaluation]:
    """Wishes were reversed `new` samples ago; the candidate has followed, the live has not."""
    rng = random.Random(11)
    signs = [1] * old + [-1] * new
    live = [sign * (0.9 + rng.gauss(0.0, 0.6)) for sign in signs]
    candidate = [sign * (-0.9 + rng.gauss(0.0, 0.6)) for sign in signs]
    return version(candidate), version(live)


def test_after_a_reversal_of_wishes_the_candidate_that_follows_soon_passes() -> None:
    candidate, live = drifting(new=12)
    verdict = verdict_on(candidate, live)
    assert verdict.passed
    assert verdict.metrics["held_out_outdated"] >= 95
    assert verdict.metrics["win_rate"] > 0.8 > 0.2 > verdict.metrics["live_win_rate"]


def test_just_after_a_reversal_there_is_too_little_to_judge_by() -> None:
    candidate, live = drifting(new=6)
    verdict = verdict_on(candidate, live)
    assert verdict.reasons == ("too_few_held_out",)
    assert verdict.is_undecided


def test_a_source_cannot_make_what_others_said_outdated() -> None:
    candidate, live = drifting(new=12)
    sources = ["user"] * 100 + ["newcomer"] * 12

    def given_by(scores: Evaluation) -> Evaluation:
        named = [replace(s, source=name) for s, name in zip(scores.pairs, sources, strict=True)]
        return replace(scores, pairs=tuple(named))

    verdict = verdict_on(given_by(candidate), given_by(live))
    assert verdict.metrics["held_out_outdated"] == 0
    assert not verdict.passed


def test_a_new_subject_that_the_live_version_knows_nothing_of_outdates_nothing() -> None:
    rng = random.Random(2)
    live = [1.0 + rng.gauss(0.0, 0.5) for _ in range(60)] + [rng.gauss(0, 0.5) for _ in range(30)]
    assert verdict_on(version(live), version(live)).metrics["held_out_outdated"] == 0


def test_recent_samples_count_more() -> None:
    count = 256
    better_lately = version([-0.2] * (count // 2) + [0.2] * (count // 2))
    worse_lately = version([0.2] * (count // 2) + [-0.2] * (count // 2))
    base = version([0.0] * count)
    assert verdict_on(better_lately, base).metrics["gain"] > 0.05
    assert verdict_on(worse_lately, base).metrics["gain"] < -0.05


# --- rated samples --------------------------------------------------------------------------------


def test_rated_samples_alone_are_judged_by_the_signs_of_their_rewards() -> None:
    rng = random.Random(4)
    likes = [i % 2 == 0 for i in range(30)]
    follows = [
        rated(i, (0.5 if liked else -0.5) + rng.gauss(0, 0.5), liked)
        for i, liked in enumerate(likes)
    ]
    base = Evaluation(
        rated=tuple(rated(i, 0.0, liked) for i, liked in enumerate(likes)), probe=PROBE
    )
    good = verdict_on(Evaluation(rated=tuple(follows), probe=PROBE), base)
    assert good.passed
    assert good.metrics["rated_accuracy"] > 0.7
    assert good.metrics["live_rated_accuracy"] == pytest.approx(0.5)
    inverse = [replace(score, logp=-80.0 - score.logp) for score in follows]
    assert not verdict_on(Evaluation(rated=tuple(inverse), probe=PROBE), base).passed


def test_raising_the_probability_of_everything_is_no_improvement_though_most_was_liked() -> None:
    likes = [i % 4 != 0 for i in range(64)]
    base = [rated(i, 0.0, liked) for i, liked in enumerate(likes)]
    raised = [rated(i, 0.5, liked) for i, liked in enumerate(likes)]
    verdict = verdict_on(
        Evaluation(rated=tuple(raised), probe=PROBE), Evaluation(rated=tuple(base), probe=PROBE)
    )
    assert verdict.reasons == ("not_better",)
    assert abs(verdict.metrics["gain"]) < 0.05


# --- collapse -------------------------------------------------------------------------------------

GOOD = version([1.0 + 0.1 * (i % 3) for i in range(20)])
BASE = version([0.0] * 20)


def with_probe(**changes: float) -> Evaluation:
    return replace(GOOD, probe=replace(PROBE, **changes))


def chosen_fallen(nats_per_token: float) -> Evaluation:
    """Margins as before, with both completions less likely."""
    down = nats_per_token * 20
    fallen = [
        replace(s, chosen_logp=-40.0 - down, rejected_logp=-44.0 - down - 10.0 - s.key % 3)
        for s in GOOD.pairs
    ]
    return replace(GOOD, pairs=tuple(fallen))


def test_a_better_candidate_that_writes_as_before_passes() -> None:
    verdict = verdict_on(GOOD, BASE)
    assert verdict.passed
    assert verdict.reasons == ()
    assert not verdict.is_undecided
    assert verdict.explanation.startswith("passed; wins 100% of 20 held-out pairs, live 50%")


@pytest.mark.parametrize(
    ("candidate", "reason", "words"),
    [
        (with_probe(nll=3.31), "probe_loss", "loss on ordinary text is 3.310"),
        (with_probe(entropy=1.4), "entropy", "entropy of next tokens is 1.400"),
        (with_probe(repetition=0.45), "repetition", "45% of the 4-grams"),
        (chosen_fallen(3.1), "chosen_drop", "lost 3.10 nats per token"),
    ],
)
def test_a_collapsed_candidate_is_refused_however_many_pairs_it_wins(
    candidate: Evaluation, reason: str, words: str
) -> None:
    verdict = verdict_on(candidate, BASE)
    assert verdict.reasons == (reason,)
    assert words in verdict.explanation
    assert not verdict.is_undecided


@pytest.mark.parametrize(
    "candidate",
    [
        with_probe(nll=3.29),
        with_probe(entropy=1.6),
        with_probe(repetition=0.39),
        chosen_fallen(2.9),
    ],
)
def test_what_stays_within_the_limits_passes(candidate: Evaluation) -> None:
    assert verdict_on(candidate, BASE).passed


def test_every_objection_is_reported_at_once() -> None:
    candidate = replace(BASE, probe=ProbeScore(nll=9.0, entropy=0.1, repetition=1.0))
    assert verdict_on(candidate, BASE).reasons == (
        "not_better",
        "probe_loss",
        "entropy",
        "repetition",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: with_probe(nll=value),
        lambda value: with_probe(entropy=value),
        lambda value: replace(
            GOOD, pairs=(*GOOD.pairs[:-1], replace(GOOD.pairs[-1], chosen_logp=value))
        ),
        lambda value: replace(
            GOOD, pairs=(*GOOD.pairs[:-1], replace(GOOD.pairs[-1], rejected_logp=value))
        ),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    spoil: Callable[[float], Evaluation], value: float
) -> None:
    verdict = verdict_on(spoil(value), BASE)
    assert verdict.reasons == ("not_finite",)
    assert not verdict.passed
    assert not verdict.is_undecided


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_held_out_samples_publish_nothing_and_decide_nothing(count: int) -> None:
    verdict = verdict_on(version([1.0] * count), version([0.0] * count))
    assert "too_few_held_out" in verdict.reasons
    assert verdict.is_undecided


def test_an_unchanged_candidate_is_not_better_and_not_decided() -> None:
    verdict = verdict_on(GOOD, GOOD)
    assert verdict.reasons == ("not_better",)
    assert verdict.is_undecided


def test_a_candidate_that_is_worse_beyond_chance_is_decided() -> None:
    verdict = verdict_on(BASE, GOOD)
    assert verdict.reasons == ("not_better",)
    assert not verdict.is_undecided
    assert verdict.metrics["gain_high"] < 0.0


def versions(shift: float) -> tuple[Evaluation, Evaluation]:
    """A live version, and a candidate whose margins are that much greater, give or take noise."""
    rng = random.Random(5)
    live = [rng.gauss(0.5, 1.0) for _ in range(60)]
    return version([m + shift + rng.gauss(0.0, 0.8) for m in live]), version(live)


@pytest.mark.parametrize("z", [0.0, 0.5, 1.0, 1.64])
@pytest.mark.parametrize("refusal_z", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("shift", [-1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0])
def test_between_its_two_bounds_a_verdict_is_undecided_and_passing_depends_on_one_alone(
    z: float, refusal_z: float, shift: float
) -> None:
    config = replace(CONFIG, confidence_z=z, refusal_z=refusal_z)
    verdict = verdict_on(*versions(shift), config)
    low, high = verdict.metrics["gain_low"], verdict.metrics["gain_high"]
    assert verdict.passed == (low > 0.0)
    assert verdict.is_undecided == (low <= 0.0 <= high)
    word = "passed" if verdict.passed else "undecided" if verdict.is_undecided else "refused"
    assert verdict.explanation.startswith(f"{word}; ")
    usual = verdict_on(*versions(shift), replace(config, refusal_z=CONFIG.refusal_z))
    assert verdict.passed == usual.passed
    assert low == usual.metrics["gain_low"]


def test_without_a_margin_asked_for_equally_good_candidates_are_not_half_refused() -> None:
    """A z of 0 publishes whatever looks better; what looks worse is not therefore refused."""

    def refused(refusal_z: float) -> int:
        rng = random.Random(3)
        config = replace(CONFIG, confidence_z=0.0, refusal_z=refusal_z)
        verdicts = []
        for _ in range(200):
            live = [rng.gauss(0.5, 1.0) for _ in range(40)]
            candidate = [m + rng.gauss(0.0, 0.5) for m in live]
            verdicts.append(verdict_on(version(candidate), version(live), config))
        return sum(not verdict.passed and not verdict.is_undecided for verdict in verdicts)

    assert 70 <= refused(0.0) <= 130
    assert refused(2.0) <= 12


@pytest.mark.parametrize(
    "probe",
    [
        replace(PROBE, nll=PROBE.nll + 0.5),
        replace(PROBE, entropy=0.1),
        replace(PROBE, repetition=0.9),
    ],
)
def test_signs_of_collapse_are_refused_however_patient_the_gate(probe: ProbeScore) -> None:
    candidate, live = versions(0.0)
    config = replace(CONFIG, refusal_z=50.0, patience=100)
    assert verdict_on(candidate, live, config).is_undecided
    verdict = verdict_on(replace(candidate, probe=probe), live, config)
    assert not verdict.passed
    assert not verdict.is_undecided


def test_one_huge_margin_does_not_outweigh_many_small_losses() -> None:
    assert not verdict_on(version([1e6] + [-0.01] * 19), version([0.0] * 20)).passed


def test_samples_must_be_the_same_for_both() -> None:
    with pytest.raises(ValueError, match="different samples"):
        verdict_on(GOOD, version([0.0] * 19))


def test_what_is_reported_has_win_rates_margins_and_intervals() -> None:
    metrics = verdict_on(version([1.0] * 15 + [-1.0] * 5), version([0.5, -0.5] * 10)).metrics
    assert metrics["held_out_pairs"] == 20
    assert metrics["win_rate_low"] < metrics["win_rate"] < metrics["win_rate_high"]
    assert metrics["margin_low"] < metrics["margin"] < metrics["margin_high"]
    assert metrics["live_win_rate"] == pytest.approx(0.5, abs=0.02)
    assert metrics["base_raw_win_rate"] == pytest.approx(1.0)  # -40 against -44, equally long
    assert metrics["raw_win_rate"] < 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_verdict_does_not_depend_on_the_order_in_which_samples_are_handed_in() -> None:
    rng = random.Random(9)
    names = [f"user {i % 4}" for i in range(40)]
    candidate = version([rng.gauss(0.3, 1.0) for _ in names], names)
    live = version([rng.gauss(0.0, 1.0) for _ in names], names)
    order = list(range(40))
    rng.shuffle(order)

    def shuffled(scores: Evaluation) -> Evaluation:
        return replace(scores, pairs=tuple(scores.pairs[i] for i in order))

    ours, theirs = verdict_on(candidate, live), verdict_on(shuffled(candidate), shuffled(live))
    assert ours.metrics == pytest.approx(dict(theirs.metrics))
    assert ours.reasons == theirs.reasons


def test_new_feedback_counts_as_held_out_feedback_does() -> None:
    candidate, live = versions(0.6)
    held_out = verdict_on(candidate, live)
    verdict = judge(candidate, live, PROBE, CONFIG, BETA, progressive=range(10, 60))
    assert held_out.passed
    assert verdict.passed
    assert verdict.metrics["gain"] == held_out.metrics["gain"]
    assert verdict.metrics["new_pairs"] == 50
    assert "of 10 held-out and 50 new pairs" in verdict.explanation
    assert "of 60 held-out pairs" in held_out.explanation


def test_one_that_was_better_on_its_way_and_is_worse_now_does_not_pass() -> None:
    """New samples speak of the weights of before; held-out ones of the candidate itself."""
    margins = [1.5 if key % 4 else -1.5 for key in range(60)]
    candidate, live = version(margins), version([0.0] * 60)
    new = [key for key in range(60) if key % 4]
    assert verdict_on(candidate, live).passed
    verdict = judge(candidate, live, PROBE, CONFIG, BETA, progressive=new)
    assert verdict.reasons == ("not_better",)
    assert not verdict.is_undecided
    assert verdict.metrics["gain_held_out"] < 0.0
    assert "worse on held-out samples alone" in verdict.explanation
    # Where they merely do not find it better, the new ones decide.
    level = version([1.5 if key % 4 else 0.2 * (-1) ** key for key in range(60)])
    assert judge(level, live, PROBE, CONFIG, BETA, progressive=new).passed


def test_many_new_samples_do_not_silence_the_held_out_ones() -> None:
    """Wrong labels learned by heart: well on the way, worse in the end."""
    rng = random.Random(4)
    live = [rng.gauss(0.6, 1.0) for _ in range(480)]
    new = [key for key in range(480) if key % 5]
    candidate = [m + rng.gauss(0.7 if key % 5 else -0.5, 0.8) for key, m in enumerate(live)]
    recent = [
        Evaluation(pairs=tuple(p for p in v.pairs if p.key % 5 == 0 or p.key >= 360), probe=PROBE)
        for v in (version(candidate), version(live))
    ]
    verdict = judge(recent[0], recent[1], PROBE, CONFIG, BETA, progressive=new)
    assert verdict.metrics["gain_low"] > 0.0
    assert verdict.reasons == ("not_better",)
    assert not verdict.is_undecided


def test_new_feedback_tells_small_gains_from_none_where_a_fifth_is_held_out() -> None:
    """15 held-out pairs or 60 new ones beside them: what it is for."""

    def rate(pairs: int, config: GateConfig) -> float:
        rng = random.Random(9)
        passed = 0
        for _ in range(300):
            live = [rng.gauss(0.0, 1.0) for _ in range(pairs)]
            candidate = [m + rng.gauss(0.25, 0.8) for m in live]
            passed += judge(
                version(candidate), version(live), PROBE, config, BETA, progressive=range(15, 75)
            ).passed
        return passed / 300

    config = replace(CONFIG, half_life=1000)
    assert rate(75, config) >= rate(15, config) + 0.2


def test_judging_needs_no_torch() -> None:
    code = "import cotune.runtime.learning.gate, sys; print('torch' in sys.modules)"
    done: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_with_too_few_sources_a_candidate_waits_for_more_to_speak() -> None:
    config = replace(CONFIG, min_sources=3)
    pairs = [pair(key, 1.0, source=f"user {key % 2}") for key in range(24)]
    verdict = judge(
        Evaluation(pairs=tuple(pairs), probe=PROBE),
        Evaluation(pairs=tuple(pair(p.key, 0.0, source=p.source) for p in pairs), probe=PROBE),
        PROBE,
        config,
        BETA,
    )
    assert verdict.reasons == ("too_few_sources",)
    assert verdict.is_undecided
    assert "2 sources" in verdict.explanation


def test_what_one_of_many_sources_wants_alone_is_not_published() -> None:
    """The others' samples are as they were: neither better nor worse."""
    pairs = [pair(key, 0.02 * (-1) ** key, source=f"user {key % 3}") for key in range(24)]
    pairs += [pair(key, 2.0, source="flood") for key in range(24, 48)]
    before = tuple(pair(p.key, 0.0, source=p.source) for p in pairs)
    candidate = Evaluation(pairs=tuple(pairs), probe=PROBE)
    live = Evaluation(pairs=before, probe=PROBE)
    # Where the flood's later samples weigh more, so that all together look better.
    verdict = judge(candidate, live, PROBE, replace(CONFIG, half_life=20), BETA)
    assert verdict.reasons == ("not_better",)
    assert "the others do not agree" in verdict.explanation
    assert judge(candidate, live, PROBE, CONFIG, BETA).reasons == ("not_better",)
