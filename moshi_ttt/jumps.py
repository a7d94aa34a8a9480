"""Find lasting rises of the layers' input norm in a long generation, and say where they lie.

At every position the median of the window after it is compared with the median of the window
before it, stream by stream, on a log scale. Medians ignore bursts shorter than half a window;
later windows must hold the level, the streams must agree, and the rise must stand out from how
much the same layer varies elsewhere in the same run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter1d, median_filter

from moshi_ttt.clock import Clock
from moshi_ttt.errors import UserError
from moshi_ttt.trace import CacheSnapshot, Event, Trace

SETTLE_STEPS = 8  # attention parks on position 0; norms of the first steps are of another kind
MIN_AGREEMENT = 0.75  # fraction of streams that must show at least half of the typical rise
HELD_WINDOWS = 3  # windows after the rise that must keep half of it; 3 x 50 steps = 12 s
MAD_TO_SD = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
MEDIAN_SD = 1.2533  # sd of a median of n over sd / sqrt(n)


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

    @property
    def first_layer(self) -> int:
        """Shallowest layer that rises; a layer passes a rise of its input on to those above."""
        return self.layers[0]

    def event(self) -> Event:
        """This jump as a line for `events.jsonl`."""
        detail = dataclasses.asdict(self) | {"first_layer": self.first_layer}
        return Event("jump", detail.pop("step"), detail)

    def record(self, clock: Clock) -> dict[str, Any]:
        """The event's record, with the position in all three clocks; `from_record` reads it."""
        return self.event().record(clock)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Jump:
        """The jump of a record in `summary.json` or `events.jsonl`; extra keys are ignored."""
        values = {field.name: record[field.name] for field in dataclasses.fields(cls)}
        for name in ("layers", "layer_ratios"):
            values[name] = tuple(values[name])
        return cls(**values)

    def describe(self, clock: Clock) -> str:
        """One sentence, e.g. for a log: position, size, layers and what lies nearest."""
        depth = spans(self.layers)
        place = ""
        if self.nearest is not None and self.distance_steps is not None:
            side = "after" if self.distance_steps >= 0 else "before"
            place = f", {abs(self.distance_steps)} steps {side} {self.nearest}"
        return (
            f"input norm x{self.ratio:.2f} at {clock.describe(self.step)}{place}; "
            f"layer{'s' if len(self.layers) > 1 else ''} {depth}"
        )


@dataclass(frozen=True, slots=True)
class _LayerRise:
    layer: int
    step: int
    log_ratio: float
    score: float
    agreement: float


def find_jumps(
    trace: Trace, *, window_steps: int = 50, min_ratio: float = 1.15, min_score: float = 4.5
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
        if value < least:
            raise UserError(f"{name}={value} is below {least}; give {least} or more")
    rises = []
    for layer in range(trace.input_norm.shape[1]):
        norm = trace.input_norm[:, layer, SETTLE_STEPS:].astype(np.float64)
        usable = norm[(np.isfinite(norm) & (norm > 0)).all(axis=-1)]
        if len(usable):
            level = np.log(usable)
            rises += _layer_rises(layer, level, window_steps, np.log(min_ratio), min_score)
    return _merged(rises, window_steps, trace.critical_steps())


def _layer_rises(
    layer: int, level: np.ndarray, window: int, least: float, min_score: float
) -> list[_LayerRise]:
    """Rises of one layer; `level` is the log norm, [S, T]."""
    streams, steps = level.shape
    count = steps - 2 * window + 1  # positions with a full window on both sides
    if count <= 2 * window:  # what is left away from a candidate would say nothing of the usual
        return []
    medians = _rolling_median(level, window)
    rise = medians[:, window:] - medians[:, :-window]  # [S, count]; index i is position i + window
    typical = np.median(rise, axis=0)
    trend = max(0.0, float(np.median(typical)))
    excess = typical - trend

    held = np.full(count, -np.inf)  # a position without a following window cannot be judged
    held[: count - window] = np.inf
    for later in range(2, 2 + HELD_WINDOWS):
        kept = np.median(medians[:, later * window :] - medians[:, : -later * window], axis=0)
        held[: len(kept)] = np.minimum(held[: len(kept)], kept)
    # held against the whole rise, not against the part of it that a position on its flank shows
    whole = maximum_filter1d(typical, size=window | 1)
    eligible = (excess >= least) & (held >= whole / 2)

    found = []
    while eligible.any():
        peak = int(np.argmax(np.where(eligible, excess, -np.inf)))
        near = slice(max(0, peak - window), peak + window + 1)
        eligible[near] = False
        away = np.ones(count, dtype=bool)
        away[near] = False
        spread = max(
            _spread(typical[away]), _spread(rise[:, away]) * MEDIAN_SD / np.sqrt(streams), 1e-3
        )
        score = float(excess[peak] / spread)
        position = _split(level, medians[:, peak], medians[:, peak + window], peak, window)
        at = int(np.clip(position - window, 0, count - 1))
        agreement = float((rise[:, at] - trend >= excess[at] / 2).mean())
        if score >= min_score and agreement >= MIN_AGREEMENT:
            log_ratio = float(typical[at])
            found.append(_LayerRise(layer, position + SETTLE_STEPS, log_ratio, score, agreement))
    return found


def _rolling_median(level: np.ndarray, window: int) -> np.ndarray:
    """Median of `level[:, t : t + window]` at index t: [S, T] to [S, T - window + 1]."""
    # row by row: the one-dimensional filter is the fast one
    centred = np.stack([median_filter(row, size=window) for row in level])
    start = window // 2
    return centred[:, start : start + level.shape[1] - window + 1]


def _spread(values: np.ndarray) -> float:
    """Robust standard deviation about the median."""
    return float(MAD_TO_SD * np.median(np.abs(values - np.median(values, axis=-1, keepdims=True))))


def _split(
    level: np.ndarray, before: np.ndarray, after: np.ndarray, start: int, window: int
) -> int:
    """Position in `[start, start + 2 window]` that best parts the two levels, in absolute error.

    The difference of medians is flat for half a window around a clean step, so its peak is no
    position; the split is.
    """
    piece = level[:, start : start + 2 * window]
    cost = (np.abs(piece - before[:, None]) - np.abs(piece - after[:, None])).sum(axis=0)
    return start + int(np.argmin(np.concatenate([[0.0], np.cumsum(cost)])))


def _merged(rises: Sequence[_LayerRise], window: int, critical: dict[str, int]) -> list[Jump]:
    """Rises of different layers within one window of the clearest of them are one jump."""
    jumps = []
    left = sorted(rises, key=lambda rise: -rise.score)
    while left:
        clearest = left[0].step
        near = [rise for rise in left if abs(rise.step - clearest) <= window]
        left = [rise for rise in left if abs(rise.step - clearest) > window]
        by_layer = {rise.layer: rise for rise in reversed(near)}  # a layer's clearest rise wins
        group = [by_layer[layer] for layer in sorted(by_layer)]
        step = int(np.median([rise.step for rise in group]))
        ratios = tuple(float(np.exp(rise.log_ratio)) for rise in group)
        nearest = min(critical.values(), key=lambda at: abs(at - step), default=None)
        jumps.append(
            Jump(
                step=step,
                ratio=float(np.median(ratios)),
                score=max(rise.score for rise in group),
                agreement=float(np.mean([rise.agreement for rise in group])),
                layers=tuple(rise.layer for rise in group),
                layer_ratios=ratios,
                nearest=" = ".join(name for name, at in critical.items() if at == nearest) or None,
                distance_steps=None if nearest is None else step - nearest,
            )
        )
    return sorted(jumps, key=lambda jump: jump.step)


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
    return np.array([_median(layer) for layer in ratios.T])


def position_summary(
    trace: Trace, jumps: Sequence[Jump], *, window_steps: int = 50
) -> dict[str, float]:
    """Flat TensorBoard scalars of one generation; medians over streams, NaN where undefined."""
    nan = math.nan
    scalars: dict[str, float] = {}
    first = max(trace.prompt_steps, SETTLE_STEPS)

    def level(series: np.ndarray, start: int) -> float:
        """Median over streams of the median of one window; series [S, T]."""
        if start < 0 or start + window_steps > series.shape[-1]:
            return nan
        return _median(np.median(series[:, start : start + window_steps], axis=-1))

    end = trace.steps - window_steps
    for layer in range(trace.input_norm.shape[1]):
        norm = trace.input_norm[:, layer]
        tag = f"longgen/input_norm/layer_{layer:02d}"
        scalars[f"{tag}/start"] = level(norm, first)
        scalars[f"{tag}/end"] = level(norm, end)
        scalars[f"{tag}/growth"] = scalars[f"{tag}/end"] / scalars[f"{tag}/start"]
    for name, turns in (("C", 1), ("2C", 2)):
        ratios = ratios_at(trace, turns * trace.context_steps, window_steps=window_steps)
        for layer, ratio in enumerate(ratios):
            scalars[f"longgen/ratio_at_{name}/layer_{layer:02d}"] = float(ratio)

    scalars["longgen/jump/count"] = float(len(jumps))
    largest = max(jumps, key=lambda jump: jump.ratio, default=None)
    step = nan if largest is None else float(largest.step)
    scalars["longgen/jump/step"] = step
    scalars["longgen/jump/seconds"] = trace.clock.seconds(step)
    scalars["longgen/jump/legacy_token"] = (
        step if largest is None else float(trace.clock.legacy_tokens(step))
    )
    scalars["longgen/jump/ratio"] = step if largest is None else largest.ratio
    if largest is not None:
        for layer, ratio in zip(largest.layers, largest.layer_ratios, strict=True):
            scalars[f"longgen/jump/ratio/layer_{layer:02d}"] = ratio

    for index, layer in enumerate(trace.hybrid_layers):
        for name, array in (
            ("branch_ratio", trace.branch_ratio),
            ("raw_norm", trace.branch_raw_norm),
            ("gate", trace.gate),
        ):
            # the part that the model generates by itself
            scalars[f"memory/{name}/layer_{layer:02d}"] = _median(array[:, index, first:])
        scalars[f"memory/inner_updates/layer_{layer:02d}"] = _median(
            trace.inner_updates[:, index, -1]
        )
    for name, entropy in (("text", trace.text_entropy), ("audio", trace.audio_entropy)):
        scalars[f"longgen/entropy/{name}/start"] = level(entropy, first)
        scalars[f"longgen/entropy/{name}/end"] = level(entropy, end)

    written = trace.ring_end_offset[..., -1]
    written = written[np.isfinite(written)]
    ring = (
        CacheSnapshot("temporal", int(written.max()), trace.context_steps) if written.size else None
    )
    scalars["cache/evicted_steps"] = nan if ring is None else float(ring.evicted_steps)
    scalars["cache/wraps"] = nan if ring is None else float(ring.wraps)
    return scalars


def _median(values: np.ndarray) -> float:
    """Median of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
