"""Each explanation of the change, decided from the evidence.

`supported`: every prediction that was tested came true. `refuted`: one of them was contradicted.
`undecided`: not tested, or the intervals hold both answers. Several may be supported; a change may
have several causes. docs/finding_the_jump.md says what each of them predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moshi_ttt.attribution.changepoint import MIN_LOG_RATIO, UNKNOWN, Interval, presence
from moshi_ttt.attribution.conditions import Condition
from moshi_ttt.attribution.evidence import Evidence

Decision = Literal["supported", "refuted", "undecided"]
SLOPE_ROOM = 0.25  # steps per step; the slopes that the hypotheses predict are 0, 1 and 2
HALF = 0.5  # a cause is *the* cause if more than half of the change goes with it


@dataclass(frozen=True, slots=True)
class Finding:
    """One hypothesis, decided."""

    hypothesis: str
    decision: Decision
    reasons: tuple[str, ...]
    """What was measured, in words, with intervals; the deciding one first."""
    effects: dict[str, Interval] = field(default_factory=dict)
    """The same as numbers."""

    def text(self) -> str:
        """One line."""
        return f"{self.hypothesis}: {self.decision}; {'; '.join(self.reasons)}"


def decide(evidence: Evidence) -> tuple[Finding, ...]:
    """Every hypothesis, in the order in which the pages show them."""
    return (
        _eviction(evidence, 1, "eviction of the first key"),
        _eviction(evidence, 2, "2C lineage"),
        _absolute_position(evidence),
        _training_length(evidence),
        _self_conditioning(evidence),
        _memory(evidence),
    )


def no_change(evidence: Evidence) -> str:
    """What was measured where the norm does not rise."""
    return (
        f"late over early x{evidence.growth.exp().text()}, and no place where the norm rises by "
        "10 % or more"
    )


def _eviction(evidence: Evidence, turns: int, name: str) -> Finding:
    """A change at `turns` x C for every capacity, gone with sinks."""
    place = "C" if turns == 1 else f"{turns}C"
    effects: dict[str, Interval] = {}
    # absent is what could not be half of the change that is there elsewhere
    least = MIN_LOG_RATIO
    if evidence.change == "step":
        least = max(least, min(one.log_ratio.value for one in evidence.located) / 2)
    rises = {c: evidence.rise_at(one, turns * c) for c, one in evidence.references.items()}
    found = {c: evidence.interval(rise) for c, rise in rises.items()}
    effects |= {f"log_ratio_at_{place}/C={capacity}": rise for capacity, rise in found.items()}
    missing = [
        f"no rise at {place} with C = {capacity}: x{rise.exp().text()}"
        for capacity, rise in found.items()
        if rise.known and rise.high < least
    ]
    # it is predicted for every capacity, and all of them together say more than each
    together = effects[f"log_ratio_at_{place}"] = evidence.interval(
        np.mean(list(rises.values()), axis=0)
    )
    if not missing and together.known and together.high < least:
        missing.append(f"no rise at {place} over all capacities: x{together.exp().text()}")
    seen = all(presence(rise) == "present" for rise in found.values())
    slope = effects["slope"] = evidence.slope
    sunk = _changed(evidence, sinks=True)
    left = evidence.remaining(sunk) if evidence.change == "step" else UNKNOWN
    removed = effects["removed_by_sinks"] = Interval(1 - left.value, 1 - left.high, 1 - left.low)
    follows = f"location follows {slope.text()} steps per step of C, predicted {turns}"
    gone = f"sinks remove {removed.text('.0f', 100)} % of it"
    reasons = [text for text, known in ((follows, slope.known), (gone, left.known)) if known]
    if missing:
        return Finding(name, "refuted", (*missing, *reasons), effects)
    if slope.known and not _near(slope, turns):
        if _apart(slope, turns):
            return Finding(name, "refuted", (follows, *reasons[1:]), effects)
        return Finding(name, "undecided", (*reasons, "the slope holds other answers"), effects)
    if left.known and left.low > HALF:
        return Finding(name, "refuted", (gone, *reasons[:-1]), effects)
    if seen and slope.known and left.known and left.high < HALF:
        return Finding(name, "supported", tuple(reasons), effects)
    if not seen:
        reasons.append(f"the rise at {place} could not be told for every capacity")
    if not slope.known:
        reasons.append("no rise was located at three capacities")
    if not left.known:
        reasons.append("the effect of sinks is not known")
    return Finding(name, "undecided", tuple(reasons), effects)


def _changed(
    evidence: Evidence, *, sinks: bool = False, start: bool = False, gates: bool = False
) -> list[Condition]:
    """Runs in the regime of the change that differ from the references in this alone."""
    return evidence.where(
        lambda one: (
            (one.sinks > 0) == sinks
            and (one.start_position > 0) == start
            and one.gates_shut == gates
            and one.regime == evidence.regime
        )
    )


def _absolute_position(evidence: Evidence) -> Finding:
    """The change stays at one step whatever C, and leaves it when the stream starts elsewhere."""
    name = "absolute position"
    moved = _changed(evidence, start=True)
    starts = sorted({one.start_position for one in moved})
    slope = evidence.slope
    effects = {"slope": slope}
    if evidence.change in ("none", "unclear"):
        return _without_change(evidence, name, effects)
    follows = f"location moves {slope.text()} steps per step of C, predicted 0"
    if slope.known and _apart(slope, 0):
        return Finding(name, "refuted", (follows,), effects)
    if not moved:
        return Finding(name, "undecided", ("no run started at another position",), effects)
    effects["left_at_other_starts"] = left = evidence.remaining(moved)
    if not left.known:
        return Finding(name, "undecided", ("the effect of the start is not known",), effects)
    stays = (
        f"starting at position {', '.join(map(str, starts))} leaves {left.text('.0f', 100)} % of "
        "the change where it was"
    )
    if left.low > HALF:
        return Finding(name, "refuted", (stays,), effects)
    if left.high < HALF and (evidence.change == "growth" or _near(slope, 0)):
        reasons = (stays, follows) if slope.known else (stays,)
        return Finding(name, "supported", reasons, effects)
    return Finding(name, "undecided", (stays,), effects)


def _training_length(evidence: Evidence) -> Finding:
    """The change begins at the length that the model was trained on."""
    name = "training length"
    effects = {"slope_on_capacity": evidence.slope}
    slope, lengths = evidence.trained_slope()
    effects["slope_on_trained_length"] = slope
    if evidence.change == "none" and not evidence.passes_trained_length:
        reason = "there is no change, and no run is known to have passed a training length"
        return Finding(name, "undecided", (reason,), effects)
    if evidence.change in ("none", "unclear"):
        return _without_change(evidence, name, effects)
    if slope.known:
        text = (
            f"location moves {slope.text()} steps per step of training length "
            f"({', '.join(map(str, lengths))}), predicted 1"
        )
        if _near(slope, 1):
            return Finding(name, "supported", (text,), effects)
        if _apart(slope, 1):
            return Finding(name, "refuted", (text,), effects)
        return Finding(name, "undecided", (text,), effects)
    if evidence.slope.known and _apart(evidence.slope, 0):
        text = f"location moves {evidence.slope.text()} steps per step of C at one training length"
        return Finding(name, "refuted", (text,), effects)
    if len(lengths) == 1 and evidence.change == "step":
        away = [
            one
            for one in evidence.located
            if one.step.low > lengths[0] + 50 or one.step.high < lengths[0] - 50
        ]
        if away:
            one = away[0]
            text = f"trained on {lengths[0]} steps, and with C = {one.context_steps} the norm "
            text += f"rises at step {one.step.text('.0f')}"
            return Finding(name, "refuted", (text,), effects)
    known = f"{len(lengths)} training length{'s' if len(lengths) != 1 else ''}"
    reason = f"{known} in these runs; two or more are needed"
    if len(lengths) > 1:
        reason = "the change could not be located at every training length"
    return Finding(name, "undecided", (reason,), effects)


def _self_conditioning(evidence: Evidence) -> Finding:
    """The change is there only when the model reads its own output."""
    name = "self-conditioning drift"

    def runs(regime: str) -> list[Condition]:
        return evidence.where(
            lambda one: (
                one.regime == regime
                and one.sinks == 0
                and one.start_position == 0
                and not one.gates_shut
            )
        )

    if evidence.change in ("none", "unclear"):
        return _without_change(evidence, name, {})
    if evidence.regime == "silent":
        talking = evidence.remaining(runs("free"))
        effects = {"left_with_talking_user": talking}
        reasons = [f"{talking.text('.0f', 100)} % of the change is left when the user talks"]
        reasons = reasons if talking.known else []
        why = "a forced run has a talking user, and differs from these in two things"
        return Finding(name, "undecided", (*reasons, why), effects)
    forced, silent = (evidence.remaining(runs(regime)) for regime in ("forced", "silent"))
    effects = {"left_when_forced": forced, "left_with_silent_user": silent}
    reasons = [
        f"{left.text('.0f', 100)} % of the change is left {how}"
        for left, how in ((forced, "when a recording is forced"), (silent, "with a silent user"))
        if left.known
    ]
    if not forced.known:
        why = _not_known(runs("forced"), "under teacher forcing")
        return Finding(name, "undecided", (*reasons, why), effects)
    return Finding(name, _cause(forced), tuple(reasons), effects)


def _memory(evidence: Evidence) -> Finding:
    """The change is there only with the memory."""
    name = "the memory (TTT) itself"
    reference = next(iter(evidence.references.values()))
    if evidence.change == "none" and not reference.has_memory:
        reason = "there is no change, and the model has no memory"
        return Finding(name, "undecided", (reason,), {})
    if evidence.change in ("none", "unclear"):
        return _without_change(evidence, name, {})
    if not reference.has_memory:
        return Finding(name, "refuted", ("the change is there, and the model has no memory",), {})
    shut = _changed(evidence, gates=True)
    left = evidence.remaining(shut)
    effects = {"left_with_gates_shut": left}
    if not left.known:
        return Finding(name, "undecided", (_not_known(shut, "with the gates shut"),), effects)
    text = f"{left.text('.0f', 100)} % of the change is left with the gates forced to 0"
    return Finding(name, _cause(left), (text,), effects)


def _not_known(runs: Sequence[Condition], how: str) -> str:
    """Why it is not known what is left of the change in runs of a kind."""
    if not runs:
        return f"no run {how} to compare"
    return f"how much of the change is left {how} cannot be told"


def _without_change(evidence: Evidence, name: str, effects: dict[str, Interval]) -> Finding:
    if evidence.change == "none":
        return Finding(name, "refuted", (f"there is no change: {no_change(evidence)}",), effects)
    return Finding(name, "undecided", ("whether the norm changes is not clear",), effects)


def _cause(left: Interval) -> Decision:
    """Whether what was taken away is the cause, from the share of the change that is left."""
    if left.high < HALF:
        return "supported"
    return "refuted" if left.low > HALF else "undecided"


def _near(slope: Interval, predicted: float) -> bool:
    return slope.known and slope.low > predicted - HALF and slope.high < predicted + HALF


def _apart(slope: Interval, predicted: float) -> bool:
    return slope.low > predicted + SLOPE_ROOM or slope.high < predicted - SLOPE_ROOM
