"""Who says what, and when: small talk with memory probes in it, placed on a time line.

What is said next depends on how long the last sentence took, so the voices speak while the plan is
made; a plan works with anyone who can `say` a sentence, and only `mix` turns it into sound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import probes
from conversation import USER, Contribution, backchannel, conversation
from splits import Split
from utterance import SAMPLE_RATE, Utterance
from voices import Speaker

SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_USER")  # left channel, right channel
_FLOOR_DB = (-80.0, -55.0)
"""Noise of a side's room against full scale, from the quietest to the loudest."""
_DIGITAL_SILENCE_SHARE = 0.1
"""How often a side has no noise at all, as where a codec has taken it away."""

_WAIT_SEC = 1.6
"""A question that is due this soon is waited for."""
_PLANT_SEC = 5.0
"""About how long planting a fact takes; nothing is planted when a question is due sooner."""
_PAIR_SHARE = 0.2
"""How often the next fact follows at once."""
_ASK_MARGIN_SEC = 25.0
"""Kept free before the end for planting a fact, for questions that queue, and for the answer."""
_MOST_ALIVE = 12

Word = tuple[str, tuple[float, float]]  # word, start and end in seconds


@dataclass(frozen=True, slots=True)
class Placed:
    """An utterance and when it is heard."""

    speaker: int  # 0 = left, 1 = right
    start_sec: float
    utterance: Utterance

    @property
    def end_sec(self) -> float:
        """Where its last sample lies."""
        return self.start_sec + self.utterance.duration_sec

    @property
    def words(self) -> tuple[Word, ...]:
        """Its words on the time line, to the millisecond."""
        return tuple(
            (word, (round(self.start_sec + start, 3), round(self.start_sec + end, 3)))
            for word, start, end in self.utterance.words
        )


@dataclass(slots=True)
class Probe:
    """A fact on the time line; its value is the last words of what is said."""

    fact: probes.Fact
    owner: int  # who plants and asks
    drawn_gap_sec: float
    planted: Placed
    echo: Placed | None
    asked: Placed | None = None
    answered: Placed | None = None

    @property
    def due_sec(self) -> float:
        """From when on it may be asked for."""
        return self._last_mention_sec + self.drawn_gap_sec

    @property
    def _last_mention_sec(self) -> float:
        return (self.echo or self.planted).words[-1][1][1]

    def record(self) -> dict[str, object]:
        """As the JSON beside a recording has it."""
        assert self.asked is not None
        asked_sec = self.asked.words[0][1][0]
        return {
            "kind": self.fact.kind,
            "key": self.fact.key,
            "class": self.fact.recall_class,
            "unseen": list(self.fact.unseen),
            "asked_by": SPEAKERS[self.owner],
            "answered_by": SPEAKERS[1 - self.owner],
            "fact": self._value(self.planted),
            "echo": self._value(self.echo),
            "asked_at": asked_sec,
            "asked_until": self.asked.words[-1][1][1],
            "answer": self._value(self.answered),
            "gap_sec": round(asked_sec - self._last_mention_sec, 3),
            "chance": self.fact.chance,
        }

    def _value(self, placed: Placed | None) -> list[Word]:
        return list(placed.words[-self.fact.words :]) if placed else []


@dataclass(frozen=True, slots=True)
class Plan:
    """One whole conversation."""

    placed: list[Placed]
    probes: list[Probe]  # in the order of planting

    @property
    def duration_sec(self) -> float:
        """With a moment of silence after the last word."""
        return max(item.end_sec for item in self.placed) + 0.5

    def alignments(self) -> list[tuple[str, tuple[float, float], str]]:
        """Word, (start, end) in seconds, speaker; both sides, sorted by start."""
        words = [
            (word, span, SPEAKERS[item.speaker])
            for item in self.placed
            for word, span in item.words
        ]
        return sorted(words, key=lambda word: word[1])

    def mix(self, rng: np.random.Generator) -> np.ndarray:
        """Both sides, each on its own noise floor, [samples, 2] float32; left is speaker 0."""
        samples = round(self.duration_sec * SAMPLE_RATE)
        floor_rms = 10 ** (rng.uniform(*_FLOOR_DB, 2) / 20)
        floor_rms[rng.random(2) < _DIGITAL_SILENCE_SHARE] = 0
        stereo = rng.standard_normal((samples, 2), dtype=np.float32) * floor_rms.astype(np.float32)
        for item in self.placed:
            first = round(item.start_sec * SAMPLE_RATE)
            stereo[first : first + len(item.utterance.audio), item.speaker] += item.utterance.audio
        return stereo


def plan(
    voices: tuple[Speaker, Speaker], rng: np.random.Generator, least_sec: float, split: Split
) -> Plan:
    """A conversation of `least_sec` seconds and a few more, until the last question is answered.

    Args:
        voices: left and right side.
        rng: text, roles, pauses and gaps.
        least_sec: length to reach.
        split: whose topics, paces and probes these are.
    """
    return _Planner(voices, rng, least_sec, split).run()


class _Planner:
    def __init__(
        self,
        voices: tuple[Speaker, Speaker],
        rng: np.random.Generator,
        least_sec: float,
        split: Split,
    ) -> None:
        self._voices = voices
        self._rng = rng
        self._least_sec = least_sec
        self._split = split
        self._pace = split.paces[rng.integers(len(split.paces))]
        self._placed: list[Placed] = []
        self._probes: list[Probe] = []
        self._last_speaker = USER
        self._free_sec = [0.0, 0.0]  # from when on each side may speak again
        self._end_sec = 0.3  # of the last contribution
        self._may_overlap = False
        self._next_plant_sec = rng.uniform(*self._pace.plant_every_sec)
        self._pair = False

    def run(self) -> Plan:
        for said in conversation(self._rng, held_out=self._split.held_out_topics):
            self._small_talk(said)
            if self._end_sec >= self._least_sec and not self._alive():
                break
        return Plan(self._placed, self._probes)

    def _alive(self) -> list[Probe]:
        return [probe for probe in self._probes if probe.answered is None]

    def _small_talk(self, said: Contribution) -> None:
        """One contribution; probes may come before it or between its sentences."""
        rng = self._rng
        start_sec: float | None = None
        for sentence in said.sentences:
            if self._run_probes():
                start_sec = None
            pause_sec = rng.uniform(0.2, 0.6) if start_sec else self._pause_sec(said.speaker)
            placed = self._place(said.speaker, self._end_sec + pause_sec, sentence)
            start_sec = start_sec or placed.start_sec
            self._last_speaker, self._end_sec = said.speaker, placed.end_sec
            self._may_overlap = True
        if start_sec and self._end_sec - start_sec > 2.5 and rng.random() < 0.4:
            listener_sec = rng.uniform(start_sec + 0.8, self._end_sec - 0.8)
            self._place(1 - said.speaker, listener_sec, backchannel(rng))

    def _run_probes(self) -> bool:
        """Ask and plant what is due now; whether anything was said."""
        said = False
        while True:
            alive = self._alive()
            due = [probe for probe in alive if probe.due_sec <= self._end_sec + _WAIT_SEC]
            if due:
                # a short gap suffers most from waiting for the others
                self._ask(min(due, key=lambda probe: probe.drawn_gap_sec))
            elif not self._plant(alive):
                return said
            said = True

    def _plant(self, alive: list[Probe]) -> bool:
        """Plant a fact if it is time to and there is time for it; whether it was."""
        rng, now_sec = self._rng, self._end_sec
        soonest_sec = min((probe.due_sec for probe in alive), default=np.inf)
        blocked = not self._pair and soonest_sec < now_sec + _PLANT_SEC
        if now_sec < self._next_plant_sec or blocked or len(alive) >= _MOST_ALIVE:
            return False
        # where each gap's facts can be planted ends before the end; they are spread over that, so
        # that the shares hold although the long gaps no longer fit later
        gaps_sec, shares = np.array(list(self._pace.gap_shares.items())).T
        room_sec = self._least_sec - _ASK_MARGIN_SEC - gaps_sec
        fits = room_sec > now_sec
        if not fits.any():
            return False
        weights = np.where(fits, shares, 0) / np.where(fits, room_sec, 1)
        gap_sec = float(rng.choice(gaps_sec, p=weights / weights.sum()))

        fact = probes.draw(
            rng,
            [probe.fact for probe in alive],
            own_share=self._split.own_share,
            unseen_share=self._split.unseen_share,
            same_kind_share=self._split.same_kind_share,
        )
        owner = USER if rng.random() < probes.USER_ASKS_SHARE else 1 - USER
        planted = self._say(owner, fact.plant(rng))
        reply = self._say(1 - owner, fact.acknowledge(rng))
        echo = reply if fact.recall_class == "own" else None
        self._probes.append(Probe(fact, owner, gap_sec, planted, echo))
        self._pair = rng.random() < _PAIR_SHARE
        self._next_plant_sec = now_sec
        if not self._pair:
            self._next_plant_sec += rng.uniform(*self._pace.plant_every_sec)
        return True

    def _ask(self, probe: Probe) -> None:
        fact, rng = probe.fact, self._rng
        probe.asked = self._say(probe.owner, fact.ask(rng), probe.due_sec)
        probe.answered = self._say(1 - probe.owner, fact.answer(rng))

    def _say(self, speaker: int, text: str, earliest_sec: float = 0.0) -> Placed:
        """Say `text` alone, its first word not before `earliest_sec`; the last sentence said."""
        at_sec = max(self._end_sec + self._rng.uniform(0.2, 0.5), earliest_sec)
        for sentence in probes.split(text):
            placed = self._place(speaker, at_sec, sentence)
            at_sec = placed.end_sec + self._rng.uniform(0.2, 0.4)
        self._last_speaker, self._end_sec = speaker, placed.end_sec
        self._may_overlap = False
        return placed

    def _pause_sec(self, speaker: int) -> float:
        kind = self._rng.random()
        if kind < 0.35 and self._may_overlap and speaker != self._last_speaker:
            return -self._rng.uniform(0.1, 0.5)  # answers before the other has finished
        if kind > 0.94:
            return self._rng.uniform(1.5, 3.0)  # nobody speaks
        return self._rng.uniform(0.2, 0.9)

    def _place(self, speaker: int, at_sec: float, sentence: str) -> Placed:
        utterance = self._voices[speaker].say(sentence)
        item = Placed(speaker, max(at_sec, self._free_sec[speaker]), utterance)
        self._placed.append(item)
        self._free_sec[speaker] = item.end_sec + 0.1
        return item
