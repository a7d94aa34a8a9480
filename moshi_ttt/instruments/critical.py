"""Positions of a run that are looked at whatever happens: name, step and why, in one table.

The *structural* ones are what a change could be explained by: figures mark them, reports explain
them, and jumps are measured against them. The others are only logged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moshi_ttt.clock import LEGACY_TOKENS_PER_STEP


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the positions of a run follow from, in steps."""

    context_steps: int
    """Capacity C of the temporal rings."""
    steps: int
    """Length of the run."""
    prompt_steps: int = 0
    """Forced steps at its start; 0 for none."""
    trained_steps: int | None = None
    """Clip length of the training; None if unknown."""


@dataclass(frozen=True, slots=True)
class Position:
    """A row of the table."""

    name: str
    step: Callable[[Lengths], int | None]
    """Where it is; None or 0 if the run has no such position."""
    why: str
    structural: bool = False


def _ring(turns: int, offset: int, why: str, *, structural: bool = False) -> Position:
    """A position `offset` steps from where the ring has turned `turns` times."""
    name = ("C" if turns == 1 else f"{turns}C") + (f"{offset:+d}" if offset else "")
    return Position(name, lambda run: turns * run.context_steps + offset, why, structural)


def _noted(name: str, step: int, why: str, *, structural: bool = False) -> Position:
    """A position that the research notes name."""
    return Position(name, lambda _: step, why, structural)


def _legacy(token: int, why: str, *, structural: bool = False) -> Position:
    step = token // LEGACY_TOKENS_PER_STEP
    return _noted(f"legacy token {token}", step, why, structural=structural)


_BEFORE, _AFTER = "one step before, to compare with", "one step after, to compare with"
_NOTES = "named by the research notes, if they counted steps"
_NOTES_TOKEN = "named by the research notes, by their own clock"
POSITIONS: tuple[Position, ...] = (
    _ring(1, -1, _BEFORE),
    _ring(
        1,
        0,
        "the attention ring is full: from here on each new step overwrites the oldest one, unless "
        "older keys are thinned out or attention begins afresh in between",
        structural=True,
    ),
    _ring(1, 1, _AFTER),
    _ring(2, -1, _BEFORE),
    _ring(
        2, 0, "the last step that had attended to step 0 directly leaves the ring", structural=True
    ),
    _ring(2, 1, _AFTER),
    *(_ring(2, offset, "what becomes of a change at 2C") for offset in range(10, 101, 10)),
    Position(
        "prompt end",
        lambda run: run.prompt_steps,
        "the recording stops and the model goes on by itself",
        structural=True,
    ),
    Position(
        "trained length",
        lambda run: run.trained_steps,
        "no training clip was longer than this",
        structural=True,
    ),
    _noted("step 6000", 6000, _NOTES),
    _noted("step 6001", 6001, _NOTES),
    _noted("step 6100", 6100, _NOTES),
    _legacy(6000, "60 s, where the research notes saw their jump", structural=True),
    _legacy(6001, _NOTES_TOKEN),
    _legacy(6100, _NOTES_TOKEN),
)
WHY = {position.name: position.why for position in POSITIONS}


def critical_steps(run: Lengths, *, structural: bool = False) -> dict[str, int]:
    """Step of each position inside a run by name, in the order of the table.

    Args:
        run: its lengths.
        structural: leave out the positions that are only logged.
    """
    named = {one.name: one.step(run) for one in POSITIONS if one.structural or not structural}
    return {name: step for name, step in named.items() if step and 0 < step < run.steps}


def by_step(positions: Mapping[str, int]) -> dict[int, list[str]]:
    """The names at each step, in order; at one step in the order given."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, step in sorted(positions.items(), key=lambda item: item[1]):
        names[step].append(name)
    return dict(names)
