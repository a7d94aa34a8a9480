"""Differences with their 95 % intervals, as text."""

from __future__ import annotations

import numpy as np
from scipy.stats import t

from moshi_ttt.teacher_forcing.controls import Share


def loss_difference(loss: np.ndarray, reference: np.ndarray) -> str:
    """Mean difference of two losses of the same windows or stretches, [n] each, in nats.

    The interval is Student's, as if those were independent; where one of the two is NaN they are
    left out.
    """
    differences = loss - reference
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return f"{differences.mean():+.3f}" if len(differences) else "-"
    mean = differences.mean()
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def share_difference(share: Share, reference: Share) -> str:
    """Difference of two shares: Newcombe's interval, made of the Wilson intervals of both.

    It is as if both were of different words, which makes it wide where they are of the same.
    """
    mean = share.share - reference.share
    (low, high), (least, most) = share.interval, reference.interval
    below = np.hypot(share.share - low, most - reference.share)
    above = np.hypot(high - share.share, reference.share - least)
    return f"{mean:+.0%} [{mean - below:+.0%}, {mean + above:+.0%}]"
