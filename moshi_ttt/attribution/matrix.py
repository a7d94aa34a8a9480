"""The matrix of controlled generations behind the verdict: what to run, and running one cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moshi_ttt.attribution.conditions import Condition, Regime
from moshi_ttt.attribution.evidence import FIRST_PLACE_STEPS
from moshi_ttt.errors import check_fields, check_setting
from moshi_ttt.evaluation.config import STEPS_PAST_2C


@dataclass(frozen=True, kw_only=True)
class MatrixConfig:
    """What is varied, and how much is generated under each condition."""

    capacities: tuple[int, ...]
    """Ring capacities C in steps, at least three to tell a slope."""
    sinks: int = 4
    """First positions that are kept, in the cells with sinks."""
    starts: tuple[int, ...] = (100, 5000)
    """Start positions, at the middle capacity; one shorter than the run tells a shift apart."""
    prompts: int = 9
    """Starting points in the held-out recordings."""
    seeds: int = 1
    """Random continuations of each."""
    prompt_sec: float = 4.0
    """Seconds forced before the model runs free."""
    steps_past_2c: int = STEPS_PAST_2C
    """Steps after the second turn of the largest ring."""
    user: Literal["recording", "silence"] = "recording"
    """What the user does in the plain runs and the interventions: goes on as recorded, or not."""
    quick: bool = False
    """Leave out what only refines the answer: the other user and forced sinks at every capacity."""
    seed: int = 0
    """Of the sampling; every condition draws the same random numbers."""

    def __post_init__(self) -> None:
        check_fields(self, "sinks", "prompts", "seeds", least=1)
        sizes = list(self.capacities)
        allowed = min(sizes, default=0) >= 2
        check_setting(allowed, "capacities", sizes, "must be steps of 2 or more")
        check_setting(len(set(sizes)) == len(sizes), "capacities", sizes, "names one twice")
        check_setting(
            self.prompts * self.seeds >= 4,
            "prompts",
            self.prompts,
            f"x seeds={self.seeds} are fewer than 4 streams, too few for an interval; raise one "
            "of them",
        )
        starts = list(self.starts)
        check_setting(min(starts, default=1) >= 1, "starts", starts, "must be 1 or more")

    @property
    def steps(self) -> int:
        """Length of every run."""
        return 2 * max(self.capacities) + self.steps_past_2c

    def check_prompt(self, prompt_steps: int) -> None:
        """Refuse a prompt that hides the first eviction.

        Raises:
            SettingError: the smallest ring turns before its surroundings can be compared.
        """
        least = least_capacity(prompt_steps)
        check_setting(
            min(self.capacities) >= least,
            "capacities",
            list(self.capacities),
            f"turns too early: with a prompt of {prompt_steps} steps a change can be seen from "
            f"step {least} on; raise the smallest capacity to that, or lower prompt_sec",
        )


def least_capacity(prompt_steps: int) -> int:
    """Steps a ring needs so that its first eviction has enough before it to be compared with."""
    return prompt_steps + FIRST_PLACE_STEPS


def usual_capacities(context: int, least: int, quick: bool = False) -> tuple[int, int, int]:
    """The ring capacities of a matrix that names none.

    Args:
        context: the model's own capacity, which is the largest: with a longer ring it would attend
            further than it ever did.
        least: what `least_capacity` says; half of a short window is less.
        quick: half as large ones.
    """
    smallest = context / (4 if quick else 2)
    if smallest < least < context:
        smallest = least
    largest = min(2 * smallest, context)
    return round(smallest), round((smallest + largest) / 2), round(largest)


def conditions(
    matrix: MatrixConfig,
    *,
    model: str,
    trained_steps: int | None,
    has_memory: bool,
    forced: bool = True,
) -> list[Condition]:
    """The cells of one model, references first.

    Args:
        matrix: what is varied.
        model: short name, as it stands in file names.
        trained_steps: clip length of its training; None if unknown.
        has_memory: whether there are gates to shut.
        forced: whether a recording is long enough to be forced throughout.
    """
    regime: Regime = "free" if matrix.user == "recording" else "silent"
    other: Regime = "silent" if matrix.user == "recording" else "free"
    plain = [
        Condition(
            context_steps=capacity,
            regime=regime,
            model=model,
            trained_steps=trained_steps,
            has_memory=has_memory,
        )
        for capacity in sorted(matrix.capacities)
    ]
    middle = plain[len(plain) // 2]
    sunk = [replace(one, sinks=matrix.sinks) for one in plain]
    cells = [*plain, *sunk, *(replace(middle, start_position=start) for start in matrix.starts)]
    if has_memory:
        cells += [replace(one, gates_shut=True) for one in plain]
    if forced:
        cells += [replace(one, regime="forced") for one in plain]
        cells += [replace(one, regime="forced") for one in (sunk[-1:] if matrix.quick else sunk)]
    cells += [replace(one, regime=other) for one in ([middle] if matrix.quick else plain)]
    return cells
