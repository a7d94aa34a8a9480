"""Find lasting rises of the layers' input norm in a long generation, and say where they lie.

`rises` searches layer by layer; rises of several layers at one place are one jump, which must
be larger than streams that are shifted against each other show by chance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.rises import (
    BLOCK_STEPS,
    LayerRise,
    growth_span,
    layer_rises,
    p_value,
    place_interval,
)
from moshi_ttt.errors import UserError, check_bounds
from moshi_ttt.instruments.events import Event
from moshi_ttt.instruments.trace import Trace

SETTLE_STEPS = 8
"""Attention parks on position 0: a run's first steps, and those after a prompt, differ in kind."""
MAX_P_VALUE = 0.01  # of a rise that the streams share; a single stream has no such test


@dataclass(frozen=True, slots=True)
class Jump:
    """A lasting rise of the input norm, at one position of one or more layers."""

    step: int
    """Position, the median over the layers that rise."""
    ratio: float
    """Norm after over norm before, the median over the layers that rise."""
    score: float
    """Rise in units of the layer's usual window-to-window variation, largest over layers."""
    agreement: float
    """Fraction of streams that rise, mean over the layers that rise."""
    layers: tuple[int, ...]
    """Layers that rise within one window of each other, in order of depth."""
    layer_ratios: tuple[float, ...]
    """Norm after over norm before, for each of `layers`."""
    nearest: str | None
    """Nearest structural position; several names where they coincide; None if there is none."""
    distance_steps: int | None
    """Steps from `nearest` to the jump; positive: the jump comes later."""
    p_value: float
    """Share of runs with shifted streams that rise as much somewhere; NaN for a single stream."""
    first_step: int
    """Start of the 95 % interval of `step`."""
    last_step: int
    """End of that interval."""
    gradual: bool
    """Whether it is no step but growth, from `first_step` to `last_step`."""

    @property
    def first_layer(self) -> int:
        """Shallowest layer that rises; a layer passes a rise of its input on to those above."""
        return self.layers[0]

    def event(self) -> Event:
        """This jump as a line for `events.jsonl`."""
        detail = dataclasses.asdict(self) | {"first_layer": self.first_layer}
        if math.isnan(self.p_value):
            detail["p_value"] = None  # JSON has no NaN
        return Event("jump", detail.pop("step"), detail)

    def record(self, clock: Clock) -> dict[str, Any]:
        """The event's record, with the position in all three clocks; `from_record` reads it."""
        return self.event().record(clock)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Jump:
        """The jump of a record in `summary.json` or `events.jsonl`; extra keys are ignored.

        Raises:
            UserError: the record lacks a key, so that another version wrote it.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in record]
        if missing:
            raise UserError(
                f"the record of a jump lacks {', '.join(missing)}: another version wrote it; "
                "evaluate again to write it anew"
            )
        values = {name: record[name] for name in names}
        if values["p_value"] is None:
            values["p_value"] = math.nan
        for name in ("layers", "layer_ratios"):
            values[name] = tuple(values[name])
        return cls(**values)

    def describe(self, clock: Clock) -> str:
        """One sentence, e.g. for a log: position, size, layers and what lies nearest."""
        depth = f"layer{'s' if len(self.layers) > 1 else ''} {spans(self.layers)}"
        if self.gradual:
            first, last = clock.describe(self.first_step), clock.describe(self.last_step)
            return f"input norm grows x{self.ratio:.2f} from {first} to {last}; {depth}"
        place = ""
        if self.nearest is not None and self.distance_steps is not None:
            side = "after" if self.distance_steps >= 0 else "before"
            place = f", {abs(self.distance_steps)} steps {side} {self.nearest}"
        return f"input norm x{self.ratio:.2f} at {clock.describe(self.step)}{place}; {depth}"


class Searched(Protocol):
    """What is searched for jumps: a `Trace`, or norms alone."""

    @property
    def input_norm(self) -> np.ndarray:
        """L2 norm of each layer's input, [S, L, T]."""
        ...

    def critical_steps(self) -> dict[str, int]:
        """Structural positions by name."""
        ...


def can_be_searched(trace: Searched, *, window_steps: int = 50) -> bool:
    """Whether a run is long enough, and a norm finite throughout, for `find_jumps` to find any."""
    norm = trace.input_norm[..., SETTLE_STEPS:]
    usable = (np.isfinite(norm) & (norm > 0)).all(axis=-1)
    return norm.shape[-1] >= 4 * window_steps and bool(usable.any())


def find_jumps(
    trace: Searched, *, window_steps: int = 50, min_ratio: float = 1.15, min_score: float = 3.5
) -> list[Jump]:
    """Lasting rises of the input norm, in order of position.

    A position can be judged only with one window before it and two after it, so nothing is
    found in the last `2 * window_steps`, nor in a run shorter than four windows; a burst that
    outlives the recording looks lasting.

    Args:
        trace: what to search; streams whose norms are not all finite and positive are left out.
        window_steps: length of the windows compared; 50 steps = 4 s.
        min_ratio: smallest rise reported, beyond the layer's steady growth.
        min_score: smallest rise in units of the layer's usual window-to-window variation.

    Raises:
        UserError: a window too short for a median, or a ratio or score that would accept falls.
    """
    for name, value, least in (
        ("window_steps", window_steps, 5),
        ("min_ratio", min_ratio, 1.01),
        ("min_score", min_score, 0.0),
    ):
        check_bounds(name, value, least=least)
    rises, levels = [], {}
    for layer in range(trace.input_norm.shape[1]):
        norm = trace.input_norm[:, layer, SETTLE_STEPS:].astype(np.float64)
        usable = norm[(np.isfinite(norm) & (norm > 0)).all(axis=-1)]
        if len(usable):
            levels[layer] = np.log(usable)
            rises += layer_rises(
                layer,
                levels[layer],
                window=window_steps,
                least=math.log(min_ratio),
                min_score=min_score,
            )
    jumps = []
    for group in _groups(rises, window_steps):
        jump = _jump(group, rises, levels, window_steps, trace.critical_steps())
        if not jump.p_value > MAX_P_VALUE:  # NaN passes
            jumps.append(jump)
    return sorted(_apart(jumps), key=lambda jump: jump.step)


def _apart(jumps: Sequence[Jump]) -> list[Jump]:
    """Without those that lie in the growth of a clearer one."""
    kept: list[Jump] = []
    for jump in sorted(jumps, key=lambda jump: -jump.score):
        if not any(one.gradual and one.first_step <= jump.step <= one.last_step for one in kept):
            kept.append(jump)
    return kept


def _groups(rises: Sequence[LayerRise], window: int) -> list[list[LayerRise]]:
    """Rises of different layers within one window of the clearest of them, in order of depth."""
    groups = []
    left = sorted(rises, key=lambda rise: -rise.score)
    while left:
        clearest = left[0].step
        near = [rise for rise in left if abs(rise.step - clearest) <= window]
        left = [rise for rise in left if abs(rise.step - clearest) > window]
        by_layer = {rise.layer: rise for rise in reversed(near)}  # a layer's clearest rise wins
        groups.append([by_layer[layer] for layer in sorted(by_layer)])
    return groups


def _jump(
    group: Sequence[LayerRise],
    rises: Sequence[LayerRise],
    levels: dict[int, np.ndarray],
    window: int,
    critical: dict[str, int],
) -> Jump:
    """One jump of the layers in `group`, of all `rises`.

    `levels` are the layers' log norms without the first steps.
    """
    generator = np.random.default_rng(0)
    clearest = max(group, key=lambda rise: rise.score)
    level = levels[clearest.layer]
    others = [one.step for one in rises if one.layer == clearest.layer and one is not clearest]
    inside = int(np.median([rise.step for rise in group]))
    # the clearest layer places the jump as well as any; it tells how well
    first, last = place_interval(level, clearest.step, window, generator)
    ratios = tuple(float(np.exp(rise.log_ratio)) for rise in group)
    span = growth_span(level, clearest.step, window)
    if span is not None:
        first, last = span
        inside = int(np.clip(inside, first, last))
        ratios = tuple(_ratio_over(levels[rise.layer], first, last, window) for rise in group)
    step = inside + SETTLE_STEPS
    nearest = min(critical.values(), key=lambda at: abs(at - step), default=None)
    return Jump(
        step=step,
        ratio=float(np.median(ratios)),
        score=max(rise.score for rise in group),
        agreement=float(np.mean([rise.agreement for rise in group])),
        layers=tuple(rise.layer for rise in group),
        layer_ratios=ratios,
        nearest=" = ".join(name for name, at in critical.items() if at == nearest) or None,
        distance_steps=None if nearest is None else step - nearest,
        p_value=p_value(level, clearest.step, window, generator, others=others),
        first_step=min(inside, first) + SETTLE_STEPS,
        last_step=max(inside, last) + SETTLE_STEPS,
        gradual=span is not None,
    )


def _ratio_over(level: np.ndarray, first: int, last: int, window: int) -> float:
    """Norm in the window after `last` over that in the window before `first`."""
    before = level[:, max(0, first - window) : max(first, BLOCK_STEPS)]
    after = level[:, min(last, level.shape[1] - BLOCK_STEPS) : last + window]
    rise = np.median(after, axis=1) - np.median(before, axis=1)
    return float(np.exp(np.median(rise)))


def spans(layers: Sequence[int]) -> str:
    """`0-3, 7` for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def ratios_at(trace: Trace, step: int, *, window_steps: int = 50) -> np.ndarray:
    """Norm after `step` over norm before it for every layer, [L]; medians over streams.

    NaN where the run does not hold a whole window on both sides.
    """
    start, stop = step - window_steps, step + window_steps
    if start < SETTLE_STEPS or stop > trace.steps:
        return np.full(trace.input_norm.shape[1], math.nan)
    before = np.median(trace.input_norm[..., start:step], axis=-1)  # [S, L]
    after = np.median(trace.input_norm[..., step:stop], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = after / before
    return np.array([finite_median(layer) for layer in ratios.T])


def finite_median(values: np.ndarray) -> float:
    """Median of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
