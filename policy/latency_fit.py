"""A latency that is linear in what the work holds, learned from each piece of work as it ends.

    seconds = (θ · x) * (1 + beside * (interference - 1)),   θ >= 0

Least squares of the relative error, kept as normal equations A θ = b, and the past is forgotten in
the direction of what is new alone (Cao and Schwartz 2000, "A directional forgetting algorithm based
on the decomposition of the information matrix"): a thousand decodes in a row teach what decodes
cost and leave what is known of prefill as it was. θ follows by coordinate descent from where it
was, clipped at zero, so no cost is ever negative.

    what may come             what keeps the fit sound
    ───────────────────────   ──────────────────────────────────────────────────────────────────
    one slow iteration        an error is clipped at three times the usual one, unless it is the
    (a page fault)            fourth in a row on the same side
    the device gets slower    the median of the recent ratios to the reference (the profile, later
    (throttled, shared)       θ of a while ago) says by how much: the fit starts anew from the
                              reference times that, for all work, also of kinds not seen since
    another kind of work      it is learned, and not compared: the reference says nothing of the
    (prompts after decodes)   device where it rests on no work like it
    training beside it        a factor of its own, learned from overlapped work; that work teaches θ
                              little, and nothing until the factor is known

Pure and deterministic: the same observations give the same fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MEMORY = 200
"""Observations that count, in each direction: older ones fade by one part in this many."""
WINDOW = 256
"""Errors that quantiles are taken over."""
SEED_WEIGHT = 3.0
"""Observations that each point of what is believed at the start counts as."""

_FORGET = 1.0 / MEMORY
_TYPICAL_ERROR = (0.02, 0.1)  # least, and at the start; of log(seconds / predicted)
_CLIP = 3.0
_STREAK = 4
_RECENT = 24  # observations that decide whether the reference still holds
_NEWEST = _RECENT // 3  # of these, the ones that say how fast the device is now
_REFERENCE_AFTER = 64  # observations without a shift after which θ is the reference
_SHIFT_LOG = math.log(1.5)
_LEVERAGE = 1.0  # of work that is compared at most: the reference rests on one like it at least
_STRETCH = 0.25  # how far features may part that always came together, as a share of them
_UNSEEN = 1e-9  # in the place of 0, to be inverted
# A profile is measured with warm caches and nothing beside it: live, the event loop's own work
# makes short iterations take up to 1.7 times as long, which is no news.
_STALE_LOG = math.log(1.9)
_FRESH_LOG = math.log(1.6)
_OVERLAP = 0.05  # a smaller share beside other work is none
_LEVEL_OVERLAP = 0.3  # a larger one says too little about the work itself
_INTERFERENCE_KNOWN = 20  # observations
_INTERFERENCE_MEMORY = 40
_OVERLAPPED_TRUST = 0.1
_FEW = 20
_EARLY_SWEEPS = 4  # of the coordinate descent, while much is still to be learned
_SWEEPS = 5000
_CONVERGED = 1e-7


class Window:
    """The last so many numbers, and their quantiles."""

    __slots__ = ("_arrivals", "_ordered", "_size")

    def __init__(self, size: int = WINDOW) -> None:
        self._size = size
        self._arrivals: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def add(self, value: float) -> None:
        """Take the newest, drop the oldest where there are too many."""
        if len(self._arrivals) == self._size:
            oldest = self._arrivals.popleft()
            del self._ordered[bisect_left(self._ordered, oldest)]
        self._arrivals.append(value)
        insort(self._ordered, value)

    def quantile(self, share: float) -> float:
        """The value that `share` of them do not exceed; 0 where there are none."""
        if not self._ordered:
            return 0.0
        return self._ordered[min(int(share * len(self._ordered)), len(self._ordered) - 1)]

    def last(self, count: int) -> list[float]:
        """The newest `count`, oldest first."""
        return list(self._arrivals)[-count:]

    def clear(self) -> None:
        """Forget them all."""
        self._arrivals.clear()
        self._ordered.clear()


class _Reference:
    """θ as it was when the device last had a known speed, and the work that θ rests on.

    Work of a kind that it does not rest on may take any multiple of what it says, whatever the
    device does. Other work has a small leverage x C⁻¹ x, where x = z / seconds and C is the sum of
    x xᵀ over the work that it rests on.

    Args:
        theta: seconds per scaled feature.
        support: C; None for a profile, which is taken to hold for all work.
        count: pieces of work in C.

    Attributes:
        theta: as given.
        rests_on: of each feature, whether any of that work had it.
    """

    __slots__ = ("_spread", "rests_on", "theta")

    def __init__(
        self, theta: list[float], support: list[list[float]] | None = None, count: int = 0
    ) -> None:
        self.theta = theta
        self.rests_on = [True] * len(theta)
        self._spread: list[list[float]] | None = None
        if support is not None:
            self.rests_on = [row[index] > 0.0 for index, row in enumerate(support)]
            # C alone cannot be inverted where features always came together (8 decodes of 256
            # tokens each, and nothing else).
            ridge = 1.0 + _STRETCH * _STRETCH / max(count, 1)
            padded = [list(row) for row in support]
            for index, row in enumerate(padded):
                row[index] = ridge * row[index] or _UNSEEN
            self._spread = _inverse(padded)

    def log_ratio(self, z: list[float], seconds: float) -> float | None:
        """log(seconds / expected); None where that says nothing of the device."""
        expected = sum(map(mul, z, self.theta))
        if expected <= 0.0:
            return None
        if self._spread is not None:
            image = [sum(map(mul, row, z)) for row in self._spread]
            if sum(map(mul, image, z)) > _LEVERAGE * expected * expected:
                return None
        return math.log(seconds / expected)


class LatencyFit:
    """Owns θ, the interference and the record of errors of one kind of work.

    Args:
        scales: what each feature is divided by, so that usual values are about 1.
        believed: θ as a profile has it, in seconds per feature; None: nothing is known.
        seeds: features at which `believed` holds, a spread of usual work. Those that are far from
            it are what a new observation changes least.
        interference: as the profile has it; 1 where it was not measured.
        margin: 95th percentile of seconds over prediction, until enough was observed.

    Attributes:
        observations: so far.
        typical_error: of log(seconds / predicted), now.
        interference: the factor while other work runs beside it all the time.
        shifts: how often the device was found to have changed its speed.
        is_stale: whether recent work takes 1.9 times the profile's seconds or more, or 1 / 1.9
            or less. Always False without a profile.
    """

    __slots__ = (
        "_a",
        "_b",
        "_coefficients",
        "_errors",
        "_history",
        "_inverse",
        "_knows_all",
        "_last_side",
        "_margin",
        "_overlapped",
        "_profile",
        "_profile_ratios",
        "_reference",
        "_reference_age",
        "_reference_ratios",
        "_seeds",
        "_signed",
        "_streak",
        "_support",
        "_supporting",
        "_theta",
        "interference",
        "is_stale",
        "observations",
        "shifts",
        "typical_error",
    )

    def __init__(
        self,
        scales: Sequence[float],
        *,
        believed: Sequence[float] | None = None,
        seeds: Iterable[Sequence[float]] = (),
        interference: float = 1.0,
        margin: float = 1.0,
    ) -> None:
        count = len(scales)
        self._inverse = [1.0 / scale for scale in scales]
        self._seeds = [list(map(mul, seed, self._inverse)) for seed in seeds]
        self._profile: _Reference | None = None
        self._reference: _Reference | None = None
        self._a = [[0.0] * count for _ in range(count)]
        self._b = [0.0] * count
        self._theta = [0.0] * count
        self._coefficients: tuple[float, ...] | None = None
        if believed is not None:
            self._profile = self._reference = _Reference(list(map(mul, believed, scales)))
            self._start_from(self._profile.theta, [True] * count)
        self._knows_all = False
        self.observations = 0
        self.typical_error = _TYPICAL_ERROR[1]
        self.interference = max(1.0, interference)
        self._overlapped = _INTERFERENCE_KNOWN if interference > 1.0 else 0
        self._margin = margin
        self._errors: deque[float] = deque(maxlen=WINDOW)  # log(seconds / predicted)
        self._signed = Window()  # the same since the last shift
        self._profile_ratios = _ratios()  # to the profile, of all work
        self._reference_ratios = _ratios()  # to the reference, of the work that it rests on
        self._reference_age = 0  # observations
        self._history: deque[tuple[list[float], float]] = deque(maxlen=_RECENT)
        self._support = [[0.0] * count for _ in range(count)]  # see `_Reference`; of θ as it is
        self._supporting = 0
        self._streak = 0
        self._last_side = False
        self.shifts = 0
        self.is_stale = False

    # -- what is known -----------------------------------------------------------------------------

    @property
    def coefficients(self) -> tuple[float, ...]:
        """θ in seconds per unit of each feature; none is negative."""
        if self._coefficients is None:
            self._coefficients = tuple(map(mul, self._theta, self._inverse))
        return self._coefficients

    @property
    def margin(self) -> float:
        """What a prediction is multiplied with to hold in 95 of 100 cases, 1 or more."""
        if len(self._signed) < _FEW:
            return max(1.0, self._margin)
        return max(1.0, math.exp(self._signed.quantile(0.95)))

    @property
    def bias(self) -> float:
        """Median of seconds over prediction, less 1: above 0, work takes longer than predicted."""
        return math.expm1(self._signed.quantile(0.5))

    @property
    def slowdown(self) -> float:
        """Median of recent seconds over the profile's.

        1.0 until the profile was found not to hold, and without one.
        """
        if not (self.shifts or self.is_stale):
            return 1.0
        return math.exp(self._profile_ratios.quantile(0.5))

    def error(self, share: float) -> float:
        """Relative error that `share` of the recent predictions did not exceed.

        Each was made before its work was observed.
        """
        if not self._errors:
            return 0.0
        sizes = sorted(abs(math.expm1(-error)) for error in self._errors)
        return sizes[min(int(share * len(sizes)), len(sizes) - 1)]

    # -- learning ----------------------------------------------------------------------------------

    def observe(self, features: Sequence[float], seconds: float, beside: float = 0.0) -> None:
        """Learn from a piece of work that took `seconds`, `beside` of it (0 to 1) overlapped.

        What cannot be true (not finite, not above zero) teaches nothing.
        """
        if not (seconds > 0.0 and math.isfinite(seconds) and math.isfinite(beside)):
            return
        z = list(map(mul, features, self._inverse))
        beside = min(max(beside, 0.0), 1.0)
        if beside < _OVERLAP:
            beside = 0.0
        self.observations += 1
        alone = sum(map(mul, z, self._theta))
        factor = 1.0 + beside * (self.interference - 1.0)
        if alone <= 0.0 or (not self._knows_all and self._is_new(z)):
            self._learn(z, seconds / factor, seconds / factor, 1.0)
            return
        predicted = alone * factor
        error = math.log(seconds / predicted)
        self._errors.append(error)
        self._signed.add(error)
        # Work beside other work is never faster: where it seems so, the work itself is.
        is_plain = beside == 0.0 or (self.interference <= 1.0 and error < 0.0)
        if is_plain:
            self._teach(z, seconds, alone, error, 1.0)
        elif self._overlapped >= _INTERFERENCE_KNOWN:
            self._teach(z, seconds / factor, alone, error, _OVERLAPPED_TRUST)
        if beside > 0.0:
            self._learn_interference(seconds / alone, beside)
        if is_plain or beside < _LEVEL_OVERLAP:
            self._compare(z, seconds / factor, error)

    def _is_new(self, z: list[float]) -> bool:
        """Whether it holds something of which nothing is known."""
        known = [row[index] > 0.0 for index, row in enumerate(self._a)]
        self._knows_all = all(known)
        return any(value and not is_known for value, is_known in zip(z, known, strict=True))

    def _teach(
        self, z: list[float], seconds: float, predicted: float, error: float, trust: float
    ) -> None:
        """Take in one observation, unless it looks like an accident: then little of it."""
        limit = _CLIP * self.typical_error
        size = abs(error)
        side = error > 0.0
        if size > limit:
            self._streak = self._streak + 1 if side is self._last_side else 1
            self._last_side = side
        else:
            self._streak = 0
        self.typical_error += 0.05 * (min(size, 4.0 * self.typical_error) - self.typical_error)
        self.typical_error = max(self.typical_error, _TYPICAL_ERROR[0])
        if size <= limit:
            self._learn(z, seconds, predicted, trust)
        elif self._streak >= _STREAK or (self._profile is None and self.observations <= _FEW):
            self._learn(z, seconds, seconds, trust)
        else:
            clipped = predicted * math.exp(limit if side else -limit)
            self._learn(z, clipped, predicted, trust)

    def _learn(self, z: list[float], seconds: float, typical: float, trust: float) -> None:
        """The normal equations, with this observation in the place of the oldest like it."""
        a, b, theta = self._a, self._b, self._theta
        weight = trust / (typical * typical)
        image = [sum(map(mul, row, z)) for row in a]
        square = sum(map(mul, image, z))
        old = _FORGET * trust / square if square > 0.0 else 0.0
        fading = old * sum(map(mul, b, z))
        for index, (row, u, v) in enumerate(zip(a, image, z, strict=True)):
            fade, fresh = old * u, weight * v
            if fade or fresh:
                a[index] = [x - fade * y + fresh * w for x, y, w in zip(row, image, z, strict=True)]
                b[index] += fresh * seconds - fading * u
        for _ in range(_EARLY_SWEEPS if self.observations < MEMORY else 1):
            for index, row in enumerate(a):
                pivot = row[index]
                if pivot > 0.0:
                    value = theta[index] + (b[index] - sum(map(mul, row, theta))) / pivot
                    theta[index] = value if value > 0.0 else 0.0
        self._coefficients = None

    def _learn_interference(self, ratio: float, beside: float) -> None:
        """From work that took `ratio` times its prediction alone while `beside` was overlapped."""
        sample = 1.0 + (ratio - 1.0) / beside
        self._overlapped += 1
        if self._overlapped > _STREAK:  # an accident moves it little
            low, high = 0.5 * self.interference, 2.0 * self.interference
            sample = min(max(sample, low), high)
        gain = beside * max(1.0 / self._overlapped, 1.0 / _INTERFERENCE_MEMORY)
        self.interference = max(1.0, self.interference + gain * (sample - self.interference))

    # -- the device changes ------------------------------------------------------------------------

    def _compare(self, z: list[float], seconds: float, error: float) -> None:
        """Hold what was expected against what was observed; begin anew where it is far off.

        Args:
            z: what the work held, scaled.
            seconds: what it took, or would have with nothing beside it.
            error: log(seconds / predicted).
        """
        self._history.append((z, seconds))
        if self._profile is not None:
            self._compare_profile(self._profile, z, seconds)
        if abs(error) <= _SHIFT_LOG:
            self._rest_on(z, seconds)
        self._reference_age += 1
        reference = self._reference
        ratio = None if reference is None else reference.log_ratio(z, seconds)
        if ratio is not None:
            self._reference_ratios.add(ratio)
        is_off = abs(self._reference_ratios.quantile(0.5)) > _SHIFT_LOG
        if not is_off and self._reference_age < _REFERENCE_AFTER:
            return
        newest = _median(self._reference_ratios.last(_NEWEST))
        if abs(newest) <= _SHIFT_LOG:
            # Only now: in the midst of a change θ is neither what it was nor what it will be.
            if self._reference_age >= _REFERENCE_AFTER:
                self._refer_to(self._theta)
        elif is_off and reference is not None:
            self._shift(reference, newest)

    def _compare_profile(self, profile: _Reference, z: list[float], seconds: float) -> None:
        """Find out whether the profile holds here."""
        ratio = profile.log_ratio(z, seconds)
        if ratio is not None:
            self._profile_ratios.add(ratio)
            off = abs(self._profile_ratios.quantile(0.5))
            self.is_stale = off > (_FRESH_LOG if self.is_stale else _STALE_LOG)

    def _rest_on(self, z: list[float], seconds: float) -> None:
        """θ foretold what this took, about: it may be held against more of the same."""
        x = [value / seconds for value in z]
        for index, value in enumerate(x):
            if value:
                row = self._support[index]
                self._support[index] = [
                    entry + value * other for entry, other in zip(row, x, strict=True)
                ]
        self._supporting += 1

    def _refer_to(self, theta: list[float]) -> None:
        """From now on, what says how fast the device is; for recent work as well."""
        self._reference = _Reference(list(theta), self._support, self._supporting)
        self._reference_age = 0
        self._reference_ratios = _ratios()
        for z, seconds in self._history:
            ratio = self._reference.log_ratio(z, seconds)
            if ratio is not None:
                self._reference_ratios.add(ratio)

    def _shift(self, reference: _Reference, log_factor: float) -> None:
        """The device has become slower than the reference, or faster: all that is known follows."""
        self.shifts += 1
        self._signed.clear()
        self._margin = max(self._margin, math.exp(2.0 * self.typical_error))
        self._overlapped = min(self._overlapped, _STREAK)  # it may have taken the blame: again
        factor = math.exp(log_factor)
        theta = [
            factor * (then if is_known else now)
            for then, now, is_known in zip(
                reference.theta, self._theta, reference.rests_on, strict=True
            )
        ]
        self._start_from(theta, [row[index] > 0.0 for index, row in enumerate(self._a)])
        # Only the work that shows this speed is compared to find the next shift. If it was one kind
        # of work that changed and not the device, the other kinds are learned anew in peace.
        self._support = [[0.0] * len(theta) for _ in theta]
        self._supporting = 0
        for z, seconds in self._history:
            expected = sum(map(mul, z, theta))
            if expected > 0.0 and abs(math.log(seconds / expected)) <= _SHIFT_LOG:
                self._rest_on(z, seconds)
        self._refer_to(theta)
        limit = _CLIP * _TYPICAL_ERROR[1]
        for z, seconds in list(self._history)[-_NEWEST:]:
            expected = sum(map(mul, z, self._theta))
            if expected > 0.0:
                error = min(max(math.log(seconds / expected), -limit), limit)
                self._learn(z, expected * math.exp(error), expected, 1.0)

    def _start_from(self, theta: list[float], is_known: list[bool]) -> None:
        """Believe `theta` at the seeds that hold nothing unknown, and nothing else."""
        count = len(theta)
        self._theta = list(theta)
        self._coefficients = None
        self._a = [[0.0] * count for _ in range(count)]
        self._b = [0.0] * count
        for z in self._seeds:
            seconds = sum(map(mul, z, theta))
            if seconds <= 0.0 or any(v and not known for v, known in zip(z, is_known, strict=True)):
                continue
            weight = SEED_WEIGHT / (seconds * seconds)
            for index, value in enumerate(z):
                if value:
                    row = self._a[index]
                    for other, entry in enumerate(z):
                        row[other] += weight * value * entry
                    self._b[index] += weight * seconds * value


def _ratios() -> Window:
    """Logarithms of ratios: until there are enough, as if work had taken what was expected."""
    window = Window(_RECENT)
    for _ in range(_RECENT):
        window.add(0.0)
    return window


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Of a symmetric, positive definite matrix, by Gauss-Jordan elimination without pivoting."""
    a = [list(row) for row in matrix]
    for k in range(len(a)):
        pivot, a[k][k] = a[k][k], 1.0
        a[k] = [value / pivot for value in a[k]]
        for index, row in enumerate(a):
            if index != k:
                share, row[k] = row[k], 0.0
                a[index] = [x - share * y for x, y in zip(row, a[k], strict=True)]
    return a


def solve_least_squares(
    features: Sequence[Sequence[float]], seconds: Sequence[float], scales: Sequence[float]
) -> tuple[float, ...]:
    """θ >= 0 with the least sum of squared relative errors; for when all is known at once.

    Args:
        features: a row per observation.
        seconds: what each took, above 0.
        scales: what each feature is divided by, so that usual values are about 1.
    """
    inverse = [1.0 / scale for scale in scales]
    rows = [
        [value * factor / taken for value, factor in zip(row, inverse, strict=True)]
        for row, taken in zip(features, seconds, strict=True)
    ]
    columns = list(zip(*rows, strict=True))
    a = [[sum(map(mul, one, other)) for other in columns] for one in columns]
    b = [sum(column) for column in columns]
    theta = [0.0] * len(scales)
    for _ in range(_SWEEPS):
        largest = 0.0
        for index, row in enumerate(a):
            if row[index] > 0.0:
                step = (b[index] - sum(map(mul, row, theta))) / row[index]
                value = max(0.0, theta[index] + step)
                largest = max(largest, abs(value - theta[index]))
                theta[index] = value
        if largest <= _CONVERGED * max(theta):
            break
    return tuple(map(mul, theta, inverse))
