"""Where a level changes and by how much, with intervals from resampled streams.

A curve is the logarithm of a norm, so that a difference is a ratio. At every position the mean of
a window after it is compared with the mean of a window before it, less what the curve typically
gains over that distance; a constant growth rate is therefore no change. The contrast is linear in
the curve: a resampled set of streams has the weighted mean of the streams' contrasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t

WINDOW_STEPS = 40  # 3.2 s before and after; the shortest ring of the tiny matrix holds it twice
GAP_STEPS = 15  # left out on both sides of a *predicted* place: a change this near counts in full
RESAMPLES = 1000
MIN_LOG_RATIO = float(np.log(1.1))  # a smaller change of the norm is not called one

Presence = Literal["present", "absent", "unclear"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval; NaN where it could not be had."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: np.ndarray, streams: int) -> Interval:
        """From the values that resampled streams give.

        Args:
            value: the estimate.
            replicates: the same of each resample, [B]; those that are NaN are left out.
            streams: how many were resampled. Quantiles over few of them are too narrow; they are
                widened about the estimate as Student's t widens the normal distribution.
        """
        known = replicates[np.isfinite(replicates)]
        # a statistic that half of the resamples do not have, the data do not have either
        if not np.isfinite(value) or 2 * len(known) < len(replicates):
            return UNKNOWN
        low, high = np.quantile(known, (0.025, 0.975))
        wider = t.ppf(0.975, streams - 1) / norm.ppf(0.975) * np.sqrt(streams / (streams - 1))
        return cls(
            float(value),
            float(value - wider * (value - low)),
            float(value + wider * (high - value)),
        )

    @property
    def known(self) -> bool:
        """Whether there is an estimate."""
        return bool(np.isfinite(self.value))

    def exp(self) -> Interval:
        """A log ratio as a ratio."""
        return Interval(*(float(np.exp(one)) for one in (self.value, self.low, self.high)))

    def text(self, form: str = ".2f", scale: float = 1.0) -> str:
        """`1.98 [1.90, 2.10]`."""
        parts = (format(scale * one, form) for one in (self.value, self.low, self.high))
        value, low, high = parts
        return f"{value} [{low}, {high}]"


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


def presence(log_ratio: Interval) -> Presence:
    """Whether a rise of the norm is there, is not, or cannot be told."""
    if not log_ratio.known:
        return "unclear"
    # searched for in several layers and at several capacities: 95 % would be too easily passed
    certain = log_ratio.value - 1.5 * (log_ratio.value - log_ratio.low) > 0
    if certain and log_ratio.low > MIN_LOG_RATIO / 2 and log_ratio.value >= MIN_LOG_RATIO:
        return "present"
    return "absent" if log_ratio.high < MIN_LOG_RATIO else "unclear"


def resampled_weights(
    prompts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Weights of the streams in resamples of prompts, and of streams within a prompt.

    Streams of one prompt share what is said, so whole prompts are drawn first.

    Args:
        prompts: [S] prompt of each stream.
        resamples: B.
        seed: of the draws.

    Returns:
        [B, S], rows add up to 1.
    """
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(prompts == one) for one in np.unique(prompts)]
    counts = np.zeros((resamples, len(prompts)))
    for row in counts:
        for chosen in generator.integers(len(groups), size=len(groups)):
            members = groups[chosen]
            np.add.at(row, generator.choice(members, size=len(members)), 1.0)
    return counts / counts.sum(axis=1, keepdims=True)


def contrasts(
    level: np.ndarray, *, window_steps: int = WINDOW_STEPS, gap_steps: int = 0
) -> np.ndarray:
    """Level after each position over the level before it, beyond the curve's steady growth.

    Args:
        level: [..., T] log norm.
        window_steps: length of both windows.
        gap_steps: steps left out on both sides of the position.

    Returns:
        [..., T]; NaN where a window does not fit.
    """
    steps = level.shape[-1]
    reach = window_steps + gap_steps
    result = np.full(level.shape, np.nan)
    if steps < 2 * reach + 1:
        return result
    sums = np.concatenate([np.zeros((*level.shape[:-1], 1)), np.cumsum(level, axis=-1)], axis=-1)
    means = (sums[..., window_steps:] - sums[..., :-window_steps]) / window_steps
    # means[p] is the window that begins at p
    distance = window_steps + 2 * gap_steps
    inside = means[..., distance:] - means[..., : means.shape[-1] - distance]
    typical = np.median(inside, axis=-1, keepdims=True)
    result[..., reach : reach + inside.shape[-1]] = inside - typical
    return result


def peaks(weighted: np.ndarray) -> np.ndarray:
    """Position of the largest contrast of each row, [..., T] to [...]; NaN entries never win."""
    return np.argmax(np.where(np.isfinite(weighted), weighted, -np.inf), axis=-1)


def held_out(contrast: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Each stream's contrast at the place where the streams of the *other* prompts change.

    What is largest somewhere in noise is not large there in other streams, so the mean over
    streams is unbiased although the place was searched for. A single prompt is split by streams.

    Args:
        contrast: [S, T].
        prompts: [S].

    Returns:
        [S]
    """
    streams = np.arange(len(prompts))
    folds = prompts if len(np.unique(prompts)) > 1 else streams
    result = np.full(len(prompts), np.nan)
    for fold in np.unique(folds):
        inside = folds == fold
        if not inside.all():
            place = int(peaks(contrast[~inside].mean(axis=0)))
            result[inside] = contrast[inside, place]
    return result


def onset(level: np.ndarray, *, block_steps: int = 10) -> np.ndarray:
    """Step at which a curve leaves its first level and begins to grow, in least squares.

    Without a trend of its own before the onset: one that grows throughout begins at the start.

    Args:
        level: [B, T] curves.
        block_steps: curves are averaged over blocks of this length first.

    Returns:
        [B] steps; NaN where nothing grows.
    """
    blocks = level.shape[-1] // block_steps
    if blocks < 12:
        return np.full(len(level), np.nan)
    curve = level[:, : blocks * block_steps].reshape(len(level), blocks, block_steps).mean(axis=-1)
    time = np.arange(blocks, dtype=float)
    places = np.arange(blocks - 5)
    hinges = np.maximum(0.0, time - places[:, None])
    hinges -= hinges.mean(axis=1, keepdims=True)
    gains = curve @ (hinges / np.linalg.norm(hinges, axis=1, keepdims=True)).T
    best = np.argmax(gains, axis=1)
    steps = places[best] * float(block_steps)
    return np.where(gains[np.arange(len(gains)), best] > 0, steps, np.nan)


def growth(level: np.ndarray, *, window_steps: int = 100) -> np.ndarray:
    """Mean of the last window less that of the first, [..., T] to [...]."""
    window = min(window_steps, level.shape[-1] // 3)
    if window < 1:
        return np.full(level.shape[:-1], np.nan)
    return np.asarray(level[..., -window:].mean(axis=-1) - level[..., :window].mean(axis=-1))


def linear_slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of y [N, B] on x [N], [B]."""
    centred = x - x.mean()
    return np.asarray(centred @ (y - y.mean(axis=0)) / (centred @ centred))
