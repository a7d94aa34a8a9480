"""Lasting rises of one layer's level: candidates, the tests they must pass, and their place.

At every position the median of the window after it is compared with the median of the window
before it, stream by stream. A candidate must stand out from the layer's steady growth and from
how much the layer varies elsewhere in the run, in most streams, and it must last: blocks of ten
steps lie below the middle of the rise before it and above it after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.ndimage import maximum_filter1d, median_filter

MIN_AGREEMENT = 0.75  # fraction of streams that must show at least half of the typical rise
HELD_WINDOWS = 3  # windows after the rise that must keep half of it; 3 x 50 steps = 12 s
FALLING_SHARE = 0.7  # of all positions lies below the one a window before where a layer falls
LASTING_SHARE = 0.75  # of the blocks around a rise must lie on their side of its middle
SINGLE_STREAM = 1.1  # score asked of a stream that no other confirms, over the usual one
BLOCK_STEPS = 10  # shorter than a pause, longer than the memory of the noise
GROWTH_WINDOWS = 4  # looked at before and after a rise, to tell growth from a step
GROWTH_GAIN = 0.1  # by how much less a ramp must err than a step does
MAD_TO_SD = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
MEDIAN_SD = 1.2533  # sd of a median of n over sd / sqrt(n)
STRIDE_STEPS = 5  # contrasts of neighbouring positions are nearly equal; the null takes every 5th


@dataclass(frozen=True, slots=True)
class LayerRise:
    """A rise of one layer."""

    layer: int
    step: int
    log_ratio: float
    score: float
    """In units of the layer's usual window-to-window variation."""
    agreement: float
    """Fraction of streams that rise."""


def layer_rises(
    layer: int, level: np.ndarray, *, window: int, least: float, min_score: float
) -> list[LayerRise]:
    """Rises of one layer.

    Args:
        layer: its index, handed on.
        level: log norm, [S, T].
        window: steps of the windows compared.
        least: smallest log ratio beyond the steady growth.
        min_score: smallest score.
    """
    streams, steps = level.shape
    count = steps - 2 * window + 1  # positions with a full window on both sides
    if count <= 2 * window:  # what is left away from a candidate would say nothing of the usual
        return []
    medians = _rolling_median(level, window)
    rise = medians[:, window:] - medians[:, :-window]  # [S, count]; index i is position i + window
    typical = np.median(rise, axis=0)
    trend = _steady_growth(typical, window)
    excess = typical - trend

    held = np.full(count, -np.inf)  # a position without a following window cannot be judged
    held[: count - window] = np.inf
    for later in range(2, 2 + HELD_WINDOWS):
        kept = np.median(medians[:, later * window :] - medians[:, : -later * window], axis=0)
        held[: len(kept)] = np.minimum(held[: len(kept)], kept - later * trend[: len(kept)])
    # held against the whole rise, not against the part of it that a position on its flank shows
    whole = maximum_filter1d(excess, size=window | 1)
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
        if score < min_score * (SINGLE_STREAM if streams == 1 else 1.0):
            continue
        position = split(level, medians[:, peak], medians[:, peak + window], peak, window)
        at = int(np.clip(position - window, 0, count - 1))
        agreement = float((rise[:, at] - trend[at] >= excess[at] / 2).mean())
        if agreement >= MIN_AGREEMENT and _lasts(
            level, position, window, float(trend[at]) / window
        ):
            found.append(LayerRise(layer, position, float(typical[at]), score, agreement))
    return found


def _steady_growth(typical: np.ndarray, window: int) -> np.ndarray:
    """What the layer gains over one window where nothing happens, at every position.

    A line through the medians of the first and the last third, so that growth may slow down or
    speed up; a constant where a single rise would fill most of a third. A loss only where the layer
    falls nearly throughout: elsewhere the end of a fall would look like a rise.
    """
    count = len(typical)
    usual = np.full(count, float(np.median(typical)))
    if count >= 12 * window:
        third = count // 3
        first, last = np.median(typical[:third]), np.median(typical[-third:])
        line = (last - first) / (count - third) * np.arange(count)
        usual = line + np.median(typical - line)
    falls = (typical < 0).mean() >= FALLING_SHARE
    return usual if falls else np.maximum(0.0, usual)


def _lasts(level: np.ndarray, position: int, window: int, slope: float) -> bool:
    """Whether blocks before lie below the middle of the rise, and all later ones above it."""
    reach = (1 + HELD_WINDOWS) * window
    curve = np.median(level - slope * np.arange(level.shape[1]), axis=0)
    before, after = curve[max(0, position - reach) : position], curve[position : position + reach]
    # what is nearest decides where the middle is: further away a trend may bend
    middle = (np.median(before[-window:]) + np.median(after[:window])) / 2
    low, high = _blocks(before[::-1]) < middle, _blocks(after) > middle
    if not len(low) or not len(high):
        return False
    return bool(min(low.mean(), high.mean()) >= LASTING_SHARE)


def _blocks(curve: np.ndarray) -> np.ndarray:
    """Medians of whole blocks, counted from the first entry."""
    whole = len(curve) // BLOCK_STEPS * BLOCK_STEPS
    return np.asarray(np.median(curve[:whole].reshape(-1, BLOCK_STEPS), axis=1))


def _rolling_median(level: np.ndarray, window: int) -> np.ndarray:
    """Median of `level[:, t : t + window]` at index t: [S, T] to [S, T - window + 1]."""
    # row by row: the one-dimensional filter is the fast one
    centred = np.stack([median_filter(row, size=window) for row in level])
    start = window // 2
    return centred[:, start : start + level.shape[1] - window + 1]


def _spread(values: np.ndarray) -> float:
    """Robust standard deviation about the median."""
    return float(MAD_TO_SD * np.median(np.abs(values - np.median(values, axis=-1, keepdims=True))))


def split(level: np.ndarray, before: np.ndarray, after: np.ndarray, start: int, window: int) -> int:
    """Position in `[start, start + 2 window]` that best parts the two levels, in absolute error.

    The difference of medians is flat for half a window around a clean step, so its peak is no
    position; the split is.
    """
    piece = level[:, start : start + 2 * window]
    return start + int(_splits(_split_costs(piece, before, after).sum(axis=0)))


def _split_costs(piece: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Absolute error less that of the other level, per step, [S, n]."""
    return np.asarray(np.abs(piece - before[:, None]) - np.abs(piece - after[:, None]))


def _splits(costs: np.ndarray) -> np.ndarray:
    """Where the sum of costs so far is least, [..., n] to [...]."""
    sums = np.cumsum(costs, axis=-1)
    return np.argmin(np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1), axis=-1)


def place_interval(
    level: np.ndarray, position: int, window: int, generator: np.random.Generator
) -> tuple[int, int]:
    """95 % interval of a rise's place, from resampled residuals.

    Residuals about the two levels are put together anew in blocks, alike in all streams because
    streams may share what disturbs them, and the rise is placed again.

    Args:
        level: log norm, [S, T].
        position: where the rise is.
        window: steps looked at on both sides.
        generator: of the resampling.

    Returns:
        First and last step of the interval; both near `position`, and it lies between them.
    """
    start, stop = max(0, position - window), min(level.shape[1], position + window)
    piece, at = level[:, start:stop], position - start
    if at == 0 or at == piece.shape[1]:
        return position, position
    before, after = np.median(piece[:, :at], axis=1), np.median(piece[:, at:], axis=1)
    fitted = np.where(np.arange(piece.shape[1]) < at, before[:, None], after[:, None])
    residuals = piece - fitted
    steps = piece.shape[1]
    blocks = -(-steps // BLOCK_STEPS)
    firsts = generator.integers(0, max(1, steps - BLOCK_STEPS + 1), size=(400, blocks))
    order = (firsts[..., None] + np.arange(BLOCK_STEPS)).reshape(400, -1)[:, :steps] % steps
    costs = np.zeros((400, steps))
    for fit, residual, low, high in zip(fitted, residuals, before, after, strict=True):
        curve = fit + residual[order]
        costs += np.abs(curve - low) - np.abs(curve - high)
    low_step, high_step = np.quantile(_splits(costs), (0.025, 0.975))
    return min(position, start + int(low_step)), max(position, start + int(np.ceil(high_step)))


def growth_span(level: np.ndarray, position: int, window: int) -> tuple[int, int] | None:
    """Where growth begins and ends that a search for steps has found; None if it is a step.

    A ramp between two levels must fit the streams' median, from four windows before to four
    windows after, at least a tenth better than the best step does. (Over 30 runs each, steps of
    1.25 to 1.5 times gave at most 0.03 and growth over 50 steps and more at least 0.19.)

    Args:
        level: log norm, [S, T].
        position: where the rise is.
        window: steps of the windows compared.
    """
    start = max(0, position - GROWTH_WINDOWS * window)
    curve = np.median(level[:, start : position + GROWTH_WINDOWS * window], axis=0)
    steps, edges = np.arange(len(curve)), np.arange(0, len(curve) + 1, BLOCK_STEPS)
    lows = [np.median(curve[: max(edge, BLOCK_STEPS)]) for edge in edges]
    highs = [np.median(curve[min(edge, len(curve) - BLOCK_STEPS) :]) for edge in edges]
    best: dict[bool, tuple[float, int, int]] = {}
    for (begin, low), (end, high) in product(
        zip(edges, lows, strict=True), zip(edges, highs, strict=True)
    ):
        if begin <= end:
            width, is_step = max(1, end - begin), bool(begin == end)
            ramp = np.clip((steps - begin + is_step) / width, 0, 1)
            found = float(np.abs(curve - low - (high - low) * ramp).sum()), int(begin), int(end)
            best[is_step] = min(best.get(is_step, found), found)
    error, first, last = best[False]
    return (start + first, start + last) if error < (1 - GROWTH_GAIN) * best[True][0] else None


def p_value(
    level: np.ndarray,
    position: int,
    window: int,
    generator: np.random.Generator,
    permutations: int = 300,
    others: Sequence[int] = (),
) -> float:
    """How often streams that are shifted against each other rise together this much somewhere.

    Each stream keeps its own course, bursts and slow waves included, but is turned by a lag of
    its own; what is left of agreement between the streams is chance. The neighbourhoods of this
    rise and of the others are left out of the null: two real rises would be each other's chance.

    Args:
        level: log norm, [S, T].
        position: where the rise is.
        window: steps of the windows compared.
        generator: of the permutations.
        permutations: how many.
        others: where else the layer rises.

    Returns:
        At least 1 / (permutations + 1); NaN for a single stream, which has nothing to agree with.
    """
    if len(level) < 2:
        return float("nan")
    medians = _rolling_median(level, window)
    rise = medians[:, window:] - medians[:, :-window]
    at = int(np.clip(position - window, 0, rise.shape[1] - 1))
    observed = float(np.median(rise[:, at]))
    away = np.ones(rise.shape[1], dtype=bool)
    for step in (position, *others):
        away &= np.abs(np.arange(rise.shape[1]) + window - step) > 2 * window
    usual = rise[:, away][:, ::STRIDE_STEPS]
    if usual.shape[1] < 10:
        return float("nan")
    count = usual.shape[1]
    higher = 0
    for lags in generator.integers(count, size=(permutations, len(level))):
        turned = np.stack([np.roll(row, lag) for row, lag in zip(usual, lags, strict=True)])
        higher += bool(np.median(turned, axis=0).max() >= observed)
    return (1 + higher) / (1 + permutations)
