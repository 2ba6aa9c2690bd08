"""One replay of a drift stream against a running server: what is sent, seen and evaluated when.

    feed       users send what is due, while the learner is not far behind
    watch      which version is live, and how training goes, every `OBSERVE_S`
    examine    every version that was seen live, on held-out rows, one version after the other
    chat       other people's conversations, all the while

It sees the learner from outside only, through `Runtime.learning`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..runtime.errors import ConfigError
from .drift_report import (
    WINS,
    Evaluated,
    PairLogps,
    PhaseSpan,
    compare,
    summarize,
    table,
)
from .drift_stream import FLOODER, due_times_s, share_out
from .drift_traffic import ChatTraffic, DriftError, User

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import aiohttp

    from ..runtime.learning.status import AdapterLearning, LearningStatus
    from ..runtime.learning.versions import VersionRecord
    from ..runtime.types import Message
    from .drift_report import PhaseResult, Win
    from .drift_stream import DriftStream

OBSERVE_S: Final = 0.25
"""Between looks at the learner, which tells nobody when a version goes live."""
TAKES_UP_S: Final = 1.0
"""A learner that is idle for so long, and knows all that was sent, has done what it can with it."""
CURVE_S: Final = 2.0
"""Between points of the training curve in the report."""
PROGRESS_S: Final = 10.0
"""Between progress lines."""
MAX_CHAT_CHARS: Final = 2000
"""Prompts of the stream that are longer are not used for chat."""


class DriftRuntime(Protocol):
    """What a run asks of its runtime; `Runtime` is one."""

    @property
    def served_name(self) -> str:
        """The adapter that learns."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus answer."""

    def learning(self) -> LearningStatus:
        """How learning stands; no I/O."""

    async def adapters(self) -> tuple[VersionRecord, ...]:
        """Every version that was made."""

    async def score(
        self, prompt: Sequence[int], completion: Sequence[int], *, model: str | None = None
    ) -> tuple[float, ...]:
        """Log-probability of each completion token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSettings:
    """How a stream is replayed.

    Attributes:
        speed: how many times faster than the times in the file.
        events_per_s: a steady pace in place of that.
        users: people among whom the feedback is shared out.
        flip: share of labels that are turned round.
        flood: how many times one more user sends each phase turned round, as it begins.
        max_ahead: most events since the learner last had nothing to do; the stream waits for it
            then, and at the end of each phase until it has nothing left to do. 0: it never waits.
        chat_per_s: chat requests per second (Poisson); 0: none.
        chat_tokens: length of their answers.
        settle_s: longest wait, at such an end, for the learner to have nothing left to do.
        quiet_s: it has nothing left when it has been idle for so long.
        evaluate: "all" phases under every version, or the "current" one only.
        seed: of the chat traffic.
    """

    speed: float | None = 4.0
    events_per_s: float | None = None
    users: int = 1
    flip: float = 0.0
    flood: int = 0
    max_ahead: int = 32
    chat_per_s: float = 1.0
    chat_tokens: int = 32
    settle_s: float = 120.0
    quiet_s: float = 6.0
    evaluate: str = "all"
    seed: int = 0

    def validate(self) -> None:
        """Raise `ConfigError` naming the flag, its value and the remedy."""
        for flag, value in (("--speed", self.speed), ("--events-per-s", self.events_per_s)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} is {value:g}; use a number above 0")
        if self.users < 1:
            raise ConfigError(f"--users is {self.users}; use 1 or more")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"--flip is {self.flip:g}; use a share, 0 to 1")
        for flag, count in (
            ("--flood", self.flood),
            ("--max-ahead", self.max_ahead),
            ("--chat-per-s", self.chat_per_s),
            ("--settle-s", self.settle_s),
        ):
            if not 0 <= count < math.inf:
                raise ConfigError(f"{flag} is {count:g}; use 0 or more")
        if self.chat_tokens < 1:
            raise ConfigError(f"--chat-tokens is {self.chat_tokens}; use 1 or more")


@dataclass(frozen=True, slots=True)
class TurnCodec:
    """How a prompt's messages, and the assistant's next turn with its end, become token ids."""

    prompt: Callable[[Sequence[Message]], Sequence[int]]
    answer: Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """A row as token ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment of the run: seconds since its start, events sent, phase, and the live version."""

    at_s: float
    sent: int
    phase: int
    version: int


class DriftRun:
    """One replay: users, chat traffic, and an examiner of its own beside a running server.

    Args:
        runtime: learning, and served at `url`; its live version is the base model.
        url: of its server.
        stream: what to send and what to evaluate.
        settings: how.
        turns: texts to token ids, as the runtime does it.
        win: what progress lines show.
        say: takes progress lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runtime: DriftRuntime,
        url: str,
        stream: DriftStream,
        settings: DriftSettings,
        turns: TurnCodec,
        *,
        win: Win = "sum",
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._url = url
        self._stream = stream
        self._settings = settings
        self._win = win
        self._say = say
        self._clock = clock
        self._began_s = clock()
        self._held_out, self._too_long = _tokenize(stream, turns, runtime.max_model_len)
        self._prompts = [
            [
                row.prompt
                for row in stream.sent
                if row.phase == phase
                and sum(len(message["content"]) for message in row.prompt) <= MAX_CHAT_CHARS
            ]
            for phase in range(len(stream.phases))
        ]

        # the stream
        self._phase = 0
        self._sent = 0
        self._starts: list[_Mark] = []  # of each phase
        self._late_s = 0.0
        self._acknowledged = 0
        self._refused: Counter[str] = Counter()
        self._flood_refused: Counter[str] = Counter()

        # the learner, as seen from outside
        self._observed = asyncio.Condition()
        self._live = 0
        self._idle_since_s: float | None = None
        self._sent_when_seen = 0  # at the last look
        self._sent_when_done = 0  # when the learner last had done everything
        self._curve: list[dict[str, Any]] = []

        # evaluation
        self._base: list[list[PairLogps]] = []
        self._results: dict[int, dict[int, PhaseResult]] = defaultdict(dict)  # version, phase
        self._first_live: dict[int, _Mark] = {}
        self._to_examine: asyncio.Queue[tuple[int, Sequence[int]] | None] = asyncio.Queue()

    async def run(self) -> dict[str, Any]:
        """Do it all; the report.

        Raises:
            DriftError: learning has stopped, the server broke off, or it has learned before.
        """
        import aiohttp

        everything = range(len(self._stream.phases))
        self._say(
            f"{len(self._stream.sent)} rows to send, "
            f"{sum(len(part) for part in self._held_out)} held out"
            + (f", {self._too_long} held-out rows too long" if self._too_long else "")
        )
        if live := self._status().live_version:
            raise DriftError(
                f"the state directory's live version is {live}; give an empty --state-dir, or "
                "none, so that the stream begins with the base model"
            )
        self._base = [await self._logps(0, phase) for phase in everything]
        self._began_s = self._clock()
        self._see(0, everything)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(self._url, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            chat = ChatTraffic(
                session,
                rate=self._settings.chat_per_s,
                max_tokens=self._settings.chat_tokens,
                prompts=lambda: self._prompts[self._phase],
                is_learning=lambda: self._status().phase != "idle",
                seed=self._settings.seed,
                clock=self._clock,
            )
            chatting = group.create_task(chat.run())
            watching = group.create_task(self._watch())
            examining = group.create_task(self._examine())
            await self._feed(session)
            self._say("all is sent; waiting for the learner")
            is_settled = await self._settle()
            watching.cancel()
            chatting.cancel()
            self._see(self._status().live_version, everything)
            end = _Mark(self._now(), self._sent, self._phase, self._live)
            self._say("evaluating what is left")
            self._to_examine.put_nowait(None)
            await examining
        report = await self._report(end)
        return report | {"is_settled": is_settled, "chat": chat.report()}

    def _now(self) -> float:
        """Seconds since the stream began."""
        return self._clock() - self._began_s

    def _status(self) -> AdapterLearning:
        name = self._runtime.served_name
        return next(a for a in self._runtime.learning().adapters if a.adapter == name)

    # -- feedback --------------------------------------------------------------------------------

    async def _feed(self, session: aiohttp.ClientSession) -> None:
        """Send the stream, each user over a connection of their own."""
        settings = self._settings
        sent = share_out(
            self._stream.sent, users=settings.users, flip=settings.flip, flood=settings.flood
        )
        due_s = due_times_s(sent, speed=settings.speed, events_per_s=settings.events_per_s)
        async with contextlib.AsyncExitStack() as stack:
            users = {
                source: await stack.enter_async_context(User(session, source, self._answered))
                for source in sorted({event.source for event in sent})
            }
            self._begin(sent[0].row.phase)
            for event, time_s in zip(sent, due_s, strict=True):
                await asyncio.sleep(max(0.0, time_s + self._late_s - self._now()))
                if event.source != FLOODER:  # who floods does not wait
                    # What waiting for the learner costs moves the rest of the stream.
                    self._late_s += await self._wait_for_learner()
                if event.row.phase != self._phase:
                    self._late_s += await self._end_phase()
                    self._begin(event.row.phase)
                await users[event.source].send(event)
                self._sent += 1
            for user in users.values():
                await user.wait_answers()

    async def _end_phase(self) -> float:
        """Until the learner has learned what the phase has to teach; for how many seconds.

        What is sent faster than in the file would otherwise be judged by events that a learner
        beside the real stream had long known.
        """
        if not self._settings.max_ahead:
            return 0.0
        began_s = self._clock()
        if not await self._settle():
            self._say(f"the learner is not done after {self._settings.settle_s:g} s; going on")
        return self._clock() - began_s

    def _begin(self, phase: int) -> None:
        self._phase = phase
        self._see(self._status().live_version, (phase,))
        self._starts.append(_Mark(self._now(), self._sent, phase, self._live))
        self._say(f"phase {phase}: {self._stream.phases[phase]}")

    def _answered(self, source: str, frame: Mapping[str, Any]) -> None:
        """An acknowledgement or an error has come."""
        if frame["type"] == "ack":
            self._acknowledged += 1
        else:
            refused = self._flood_refused if source == FLOODER else self._refused
            refused[str(frame["error"]["code"])] += 1

    async def _wait_for_learner(self) -> float:
        """Until it has done enough of what was sent; for how many seconds that was."""
        if not self._settings.max_ahead or self._is_learner_near():
            return 0.0
        began_s = self._clock()
        async with self._observed:
            await self._observed.wait_for(self._is_learner_near)
        return self._clock() - began_s

    def _is_learner_near(self) -> bool:
        return self._sent - self._sent_when_done < self._settings.max_ahead

    async def _settle(self) -> bool:
        """Until the learner has been idle for `quiet_s`; False if that took too long."""
        try:
            async with asyncio.timeout(self._settings.settle_s), self._observed:
                await self._observed.wait_for(self._is_learner_done)
        except TimeoutError:
            return False
        return True

    def _is_learner_done(self) -> bool:
        return (
            self._sent == self._sent_when_seen
            and self._idle_since_s is not None
            and self._now() - self._idle_since_s >= self._settings.quiet_s
        )

    # -- the learner, as seen from outside -------------------------------------------------------

    async def _watch(self) -> None:
        """Look at it now and then, note what went live, and wake who waits. Until cancelled."""
        everything = range(len(self._stream.phases))
        next_point_s, next_words_s = 0.0, PROGRESS_S
        while True:
            status, now_s = self._status(), self._now()
            if status.phase == "stopped":
                raise DriftError("learning has stopped after an error; the log has it")
            if not self._is_idle(status) or self._sent != self._sent_when_seen:
                self._idle_since_s = None
            elif self._idle_since_s is None:
                self._idle_since_s = now_s
            elif now_s - self._idle_since_s >= TAKES_UP_S:
                self._sent_when_done = self._sent
            self._sent_when_seen = self._sent
            if status.live_version != self._live:
                is_all = self._settings.evaluate == "all"
                self._see(status.live_version, everything if is_all else (self._phase,))
            if now_s >= next_point_s:
                next_point_s = now_s + CURVE_S
                self._curve.append(self._point(status))
            if now_s >= next_words_s:
                next_words_s = now_s + PROGRESS_S
                self._say(self._progress(status))
            async with self._observed:
                self._observed.notify_all()
            await asyncio.sleep(OBSERVE_S)

    def _is_idle(self, status: AdapterLearning) -> bool:
        """Whether it has nothing to do, knowing of every event that was sent.

        On a busy machine an event is long on its way, and what the status counts is older still:
        a learner that has not heard of what was sent looks like one that has done it all.
        """
        answered = self._acknowledged + self._refused.total() + self._flood_refused.total()
        knows_all = answered == self._sent and sum(status.pairs.values()) >= self._acknowledged
        return knows_all and status.phase == "idle" and not status.pairs.get("pending", 0)

    def _see(self, version: int, phases: Sequence[int]) -> None:
        """`version` is live now, and is to be evaluated on `phases`."""
        self._live = version
        self._first_live.setdefault(version, _Mark(self._now(), self._sent, self._phase, version))
        self._to_examine.put_nowait((version, phases))

    def _point(self, status: AdapterLearning) -> dict[str, Any]:
        return {
            "time_s": round(self._now(), 2),
            "sent": self._sent,
            "phase": self._phase,
            "live_version": status.live_version,
            "activity": status.phase,
            "steps": status.steps,
            "loss": status.loss,
            "margin": status.margin,
            "reward_accuracy": status.reward_accuracy,
            "gradient_norm": status.gradient_norm,
            "pairs": dict(status.pairs),
        }

    def _progress(self, status: AdapterLearning) -> str:
        phase = self._phase
        known = [version for version, results in self._results.items() if phase in results]
        win_rate = ""
        if known:
            rate = self._results[max(known)][phase].interval(self._win).rate
            win_rate = f", win rate {rate:.2f} (version {max(known)})"
        return (
            f"{self._now():5.0f} s, {self._sent} sent, {self._stream.phases[phase]}: "
            f"{status.phase}, {status.steps} steps, {status.candidates_passed} published, "
            f"refused {dict(status.candidates_refused) or 'none'}, undecided "
            f"{dict(status.candidates_undecided) or 'none'}{win_rate}"
        )

    # -- evaluation ------------------------------------------------------------------------------

    async def _examine(self) -> None:
        """Evaluate what was seen live, until None comes."""
        while (task := await self._to_examine.get()) is not None:
            version, phases = task
            for phase in phases:
                await self._evaluate(version, phase)

    async def _evaluate(self, version: int, phase: int) -> None:
        """Score the held-out rows of a phase, unless that has been done."""
        if phase in self._results[version]:
            return
        base = self._base[phase]
        logps = await self._logps(version, phase) if version else base
        self._results[version][phase] = compare(logps, base)

    async def _logps(self, version: int, phase: int) -> list[PairLogps]:
        model = f"{self._runtime.served_name}@{version}"

        async def score(row: _HeldOut) -> PairLogps:
            # One after the other: the second finds the prompt in the cache.
            chosen = await self._runtime.score(row.prompt, row.chosen, model=model)
            rejected = await self._runtime.score(row.prompt, row.rejected, model=model)
            return PairLogps(sum(chosen), sum(rejected), len(chosen), len(rejected))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(score(row)) for row in self._held_out[phase]]
        return [task.result() for task in tasks]

    # -- the report ------------------------------------------------------------------------------

    async def _report(self, end: _Mark) -> dict[str, Any]:
        spans = [
            PhaseSpan(
                name=name,
                start_s=start.at_s,
                end_s=stop.at_s,
                start_sent=start.sent,
                end_sent=stop.sent,
                live_at_start=start.version,
                live_at_end=stop.version,
            )
            for name, start, stop in zip(
                self._stream.phases, self._starts, [*self._starts[1:], end], strict=True
            )
        ]
        for phase, span in enumerate(spans):
            # One that went live as the phase changed may have been asked about the next one only.
            await self._evaluate(span.live_at_start, phase)
            await self._evaluate(span.live_at_end, phase)
        evaluated = [
            Evaluated(
                version=version,
                live_at_s=mark.at_s,
                sent=mark.sent,
                phase=mark.phase,
                results=self._results[version],
            )
            for version, mark in sorted(self._first_live.items())
        ]
        summaries = {win: summarize(spans, evaluated, win) for win in WINS}
        name = self._runtime.served_name
        records = [r for r in await self._runtime.adapters() if r.adapter == name]
        return {
            "settings": asdict(self._settings),
            "phases": [asdict(span) for span in spans],
            "evaluated": [plain(asdict(entry)) for entry in evaluated],
            "summary": {win: [asdict(line) for line in lines] for win, lines in summaries.items()},
            "tables": {win: table(lines, win) for win, lines in summaries.items()},
            "versions": [_version(record) for record in records],
            "feedback": {
                "sent": self._sent,
                "acknowledged": self._acknowledged,
                "refused": dict(self._refused),
                "refused_of_flood": dict(self._flood_refused),
                "held_out": [len(part) for part in self._held_out],
                "held_out_too_long": self._too_long,
            },
            "seconds": end.at_s,
            "waited_for_learner_s": self._late_s,
            "learning": plain(asdict(self._runtime.learning())),
            "curve": self._curve,
        }


def _tokenize(
    stream: DriftStream, turns: TurnCodec, max_model_len: int
) -> tuple[tuple[tuple[_HeldOut, ...], ...], int]:
    """The held-out rows as token ids, without those that are too long, and how many those are."""
    too_long = 0
    phases: list[tuple[_HeldOut, ...]] = []
    for part in stream.held_out:
        rows = []
        for row in part:
            prompt = tuple(turns.prompt(row.prompt))
            chosen, rejected = tuple(turns.answer(row.chosen)), tuple(turns.answer(row.rejected))
            if len(prompt) + max(len(chosen), len(rejected)) > max_model_len:
                too_long += 1
            else:
                rows.append(_HeldOut(prompt, chosen, rejected))
        if not rows:
            raise ConfigError(
                f"phase {len(phases)}: every held-out row is longer than the context of "
                f"{max_model_len} tokens; raise --max-model-len or --evaluation-share"
            )
        phases.append(tuple(rows))
    return tuple(phases), too_long


def _version(record: VersionRecord) -> dict[str, Any]:
    """What the report says of a version; its folder is gone by then."""
    fields = ("number", "state", "is_live", "parent", "explanation")
    return {name: getattr(record, name) for name in fields} | {
        "created": record.created.isoformat(),
        "reasons": list(record.reasons),
        "metrics": plain(dict(record.metrics)),
        "steps": record.lineage.steps,
    }


def plain(value: Any) -> Any:
    """As JSON has it: paths and times as text, numbers that JSON has not as null."""
    match value:
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case bool() | int() | str() | None:
            return value
        case _:
            return str(value)
