"""Which samples the next batch holds: new feedback first, some earlier feedback beside it.

    new        trained on fewer than `epochs` times      the rest of the batch, least trained first
    earlier    trained on as often as that               `replay_share` of the batch at least,
                                                         against forgetting (Rolnick et al. 2019)

Earlier samples are drawn with a weight that halves with every `replay_half_life` samples that came
after them: users' needs drift, and what they wanted long ago may be the opposite of what they want
now.
No source fills more than its share of a batch while others have something to say. Where several
sources must have spoken before anything is published, none is trained on more than that share of
all either: what a flood says first, and again and again, waits until others have said as much.

What training on a sample has done so far can say when it is its turn (`sample_priority`): one from
which little is to be learned, or whose loss is low, waits as if it had been trained on up to
`SINK_VISITS` times more. It still has all its turns, only later, when there are more of others.

Deterministic: the order follows from the seed, the samples and the calls. Owned by one learner.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ...policy.learnability import UNSEEN, SampleHistory
from ..scheduling.desk import Outlook
from .samples import PreferencePair

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .config import TrainingConfig
    from .samples import Sample


SINK_VISITS = 2.0
"""By so many visits the least promising sample stands behind the most promising one."""
_NO_MARGIN = math.log(2.0)
_NO_RATIO = 0.5


class _Drawn(NamedTuple):
    """A batch that is not taken yet, and the random state once it is."""

    keys: list[int]
    random: tuple[Any, ...]


def within_share(samples: Sequence[Sample], share: float) -> list[Sample]:
    """Of each source the oldest, at most share / (1 - share) times as many as all others have.

    So a source alone has none, and one that has been let in stays so, whatever it says later.
    """
    if share >= 1.0:
        return list(samples)
    counts = Counter(sample.source for sample in samples)
    left = {
        source: int((len(samples) - count) * share / (1.0 - share) + 1e-9)
        for source, count in counts.items()
    }
    admitted = []
    for sample in samples:
        if left[sample.source] > 0:
            left[sample.source] -= 1
            admitted.append(sample)
    return admitted


class ReplayBuffer:
    """The samples that a learner may train on, how often it has, and what came of it.

    Args:
        config: epochs, batches, replay and shares.
        is_shared: several sources are to be heard, so that none may have more than its share of
            all samples; see `within_share`.
    """

    def __init__(self, config: TrainingConfig, *, is_shared: bool = False) -> None:
        self._config = config
        self._is_shared = is_shared
        self._samples: dict[int, Sample] = {}  # in order of their keys, oldest first
        self._visits: dict[int, int] = {}
        self._histories: dict[int, SampleHistory] = {}
        self._random = random.Random(config.seed)
        self._drawn: _Drawn | None = None
        self._prompts: dict[int, int] = {}  # hash of each sample's prompt
        self._last_new: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def owed_samples(self) -> int:
        """How many samples are still to be trained on as new."""
        return sum(self._visits.get(key, 0) < self._config.epochs for key in self._samples)

    @property
    def last_new(self) -> frozenset[int]:
        """Those of the last batch of whose prompt nothing had ever been trained on before."""
        return self._last_new

    def __getitem__(self, key: int) -> Sample:
        return self._samples[key]

    def __contains__(self, key: int) -> bool:
        return key in self._samples

    @property
    def untouched(self) -> int:
        """Samples that were never trained on."""
        return sum(not self._visits.get(key, 0) for key in self._samples)

    def newer_than(self, key: int) -> int:
        """How many samples came after the one with this key."""
        return sum(known > key for known in self._samples)

    @property
    def last_key(self) -> int:
        """The newest sample's key; 0 when there is none."""
        return next(reversed(self._samples), 0)

    def update(self, samples: Sequence[Sample]) -> None:
        """Take the store's current samples, oldest first; those that are gone are dropped."""
        if self._is_shared:
            samples = within_share(samples, self._config.max_source_share)
        self._samples = {sample.key: sample for sample in samples}
        self._visits = {key: n for key, n in self._visits.items() if key in self._samples}
        self._histories = {k: seen for k, seen in self._histories.items() if k in self._samples}
        self._prompts = {
            key: self._prompts[key] if key in self._prompts else hash(sample.prompt_ids)
            for key, sample in self._samples.items()
        }
        self._drawn = None

    def outlook(self) -> Outlook:
        """What `next_batch` would give now is worth, both 0 for nothing. No side effects."""
        keys = self._draw().keys
        if not keys:
            return Outlook(0.0, 0.0)
        losses, signals = 0.0, 0.0
        for key in keys:
            history = self._histories.get(key, UNSEEN)
            losses += history.left * self._untrained_loss(self._samples[key])
            signals += history.signal
        return Outlook(losses / len(keys), signals / len(keys))

    def next_batch(self) -> list[Sample]:
        """The samples of the next optimizer step; empty when no new feedback is left.

        They count as trained on from now on.
        """
        keys, random_state = self._draw()
        self._random.setstate(random_state)
        self._drawn = None
        known = {self._prompts[key] for key, visits in self._visits.items() if visits}
        self._last_new = frozenset(key for key in keys if self._prompts[key] not in known)
        for key in keys:
            self._visits[key] = self._visits.get(key, 0) + 1
        return [self._samples[key] for key in keys]

    def note_losses(self, losses: Iterable[tuple[int, float]]) -> None:
        """Take in the (key, loss) that a step reported; of samples that are gone: nothing."""
        for key, loss in losses:
            sample = self._samples.get(key)
            if sample is not None:
                history = self._histories.get(key, UNSEEN)
                self._histories[key] = history.after(loss, self._untrained_loss(sample))
        self._drawn = None

    def _draw(self) -> _Drawn:
        """The next batch, chosen once, however often it is asked for; nothing else changes."""
        if self._drawn is None:
            before = self._random.getstate()
            keys = self._choose()
            self._drawn = _Drawn(keys, self._random.getstate())
            self._random.setstate(before)
        return self._drawn

    def _choose(self) -> list[int]:
        config = self._config
        visits, epochs = self._visits, config.epochs
        fresh = [key for key in self._samples if visits.get(key, 0) < epochs]
        if not fresh:
            return []
        earlier = [key for key in self._samples if visits.get(key, 0) >= epochs]
        replayed = round(config.batch_size * config.replay_share) if earlier else 0
        # Fewest visits first, so that every sample has its turn before any has a second one;
        # among equals at random, so that neighbours in time are not always in one batch.
        self._random.shuffle(fresh)
        fresh.sort(key=lambda key: visits.get(key, 0) + self._sink(key))
        chosen = self._capped(fresh, config.batch_size - replayed)
        return chosen + self._capped(
            self._shuffled_by_age(earlier), config.batch_size - len(chosen)
        )

    def _sink(self, key: int) -> float:
        """By how many visits a new sample stands behind the most promising one."""
        history = self._histories.get(key, UNSEEN)
        match self._config.sample_priority:
            case "learnability":
                return SINK_VISITS * (1.0 - history.signal)
            case "loss":
                return SINK_VISITS * (1.0 - min(1.0, history.left))
            case _:
                return 0.0

    def _untrained_loss(self, sample: Sample) -> float:
        """Its loss before any training: no margin, no ratio."""
        config = self._config
        if not isinstance(sample, PreferencePair):
            return _NO_RATIO
        return 1 / (4 * config.beta**2) if config.loss == "ipo" else _NO_MARGIN

    def _capped(self, keys: list[int], size: int) -> list[int]:
        """The first `size` of `keys`, no source above its share unless places would stay empty."""
        limit = max(1, round(size * self._config.max_source_share))
        taken: dict[str, int] = {}
        chosen: list[int] = []
        spare: list[int] = []
        for key in keys:
            if len(chosen) == size:
                break
            source = self._samples[key].source
            if taken.get(source, 0) < limit:
                taken[source] = taken.get(source, 0) + 1
                chosen.append(key)
            else:
                spare.append(key)
        return chosen + spare[: size - len(chosen)]

    def _shuffled_by_age(self, keys: list[int]) -> list[int]:
        """All of `keys` in a random order in which newer ones tend to come first.

        Weighted sampling without replacement (Efraimidis & Spirakis 2006): sort by u ** (1 / w).
        """
        newest, half_life = len(keys) - 1, self._config.replay_half_life
        rank = {
            key: self._random.random() ** (2.0 ** min((newest - age) / half_life, 60.0))
            for age, key in enumerate(keys)
        }
        return sorted(keys, key=lambda key: rank[key], reverse=True)

    def state(self) -> dict[str, Any]:
        """Everything that decides what comes next, but the samples: JSON-able."""
        version, internal, gauss = self._random.getstate()
        return {
            "visits": {str(key): count for key, count in self._visits.items()},
            "histories": {str(key): list(seen) for key, seen in self._histories.items()},
            "random": [version, list(internal), gauss],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a `state` back. Samples that have come or gone since are as `update` says.

        One of before there were histories begins without them.
        """
        visits = {int(key): int(count) for key, count in state["visits"].items()}
        self._visits = {key: count for key, count in visits.items() if key in self._samples}
        histories = {int(key): seen for key, seen in state.get("histories", {}).items()}
        self._histories = {
            key: SampleHistory(int(seen[0]), *map(float, seen[1:]))
            for key, seen in histories.items()
            if key in self._samples
        }
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._drawn = None
