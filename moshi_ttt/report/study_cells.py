"""Cells of a study's tables: means over seeds, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moshi_ttt.teacher_forcing.controls import Share


def percent(seeds: Sequence[Share]) -> str:
    """Mean of the seeds and their range, or the interval of a single one; `-` without any."""
    if not seeds:
        return "-"
    shares = [one.share for one in seeds]
    mean = f"{sum(shares) / len(shares):.0%}"
    if len(seeds) > 1:
        return f"{mean} ({min(shares):.0%} to {max(shares):.0%})".replace("%", "")
    low, high = seeds[0].interval
    return f"{mean} [{low:.0%} to {high:.0%}]".replace("%", "")


def spread(values: Iterable[float | None], form: str) -> str:
    """Mean, and the lowest and highest of several; `-` if none is defined."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    if not known:
        return "-"
    mean = f"{sum(known) / len(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    ruled = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
