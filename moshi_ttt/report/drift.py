"""Whether a model stays what it was: its last minute against its first, variant by variant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from moshi_ttt.report.study import Record, Variant
from moshi_ttt.report.style import side_note, styled
from moshi_ttt.rows import GROUPS

LOSSES = {group: f"{group.replace('_', ' ')}:\nloss" for group in GROUPS}
TALK = {
    "words_per_minute": "words\na minute",
    "silence_share": "silence",
    "distinct_1": "different\ntext tokens",
    "codes_used": "codes\nused",
    "voice_distance_db": "voice off\nminute 1 (dB)",
    "recogniser_agreement": "heard\nas written",
}
"""What free talk is judged by, of the measures that a record has by minute."""
WORST = 1.5
"""Colours end at this ratio, and at its inverse."""


def by_minute(record: Record, name: str) -> list[float]:
    """A loss or a measure of free talk, a value a minute, NaN where undefined; empty without it."""
    if name in LOSSES:
        values = record["nll"][name]
    else:
        values = record.get("talk", {"by_minute": {}})["by_minute"].get(name, [])
    return [np.nan if value is None else value for value in values]


def lasting(variant: Variant, name: str) -> list[float]:
    """Last minute over the first of each seed; NaN where there are no two."""
    found = []
    for record in variant.records:
        values = by_minute(record, name)
        found.append(values[-1] / values[0] if len(values) > 1 and values[0] else np.nan)
    return found


def against(variant: Variant, first: Variant, name: str) -> float:
    """Mean over seeds of `lasting`, over that of the first variant where it is a loss.

    What a loss does from minute to minute is mostly what the recordings talk about; that is the
    same for all.
    """
    ratio = float(np.mean(lasting(variant, name)))
    return ratio / float(np.mean(lasting(first, name))) if name in LOSSES else ratio


@styled
def drift_figure(variants: Sequence[Variant]) -> Figure:
    """A row a variant, a column a measure: 1 where the last minute is like the first.

    Args:
        variants: the first of which the losses of the others are held against.
    """
    names = {
        name: label
        for name, label in (LOSSES | TALK).items()
        if any(by_minute(record, name) for one in variants for record in one.records)
    }
    ratios = np.array([[against(one, variants[0], name) for name in names] for one in variants])
    figure = Figure(figsize=(2.2 + 1.1 * len(names), 1.3 + 0.33 * len(variants)))
    axes = figure.subplots()
    with np.errstate(invalid="ignore", divide="ignore"):
        shades = np.log(ratios) / np.log(WORST)
    axes.imshow(shades, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        color = "white" if abs(shades[row, column]) > 0.7 else "black"
        text = f"{ratio:.2f}" if np.isfinite(ratio) else "-"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)
    axes.set_xticks(range(len(names)), [*names.values()])
    axes.set_yticks(range(len(variants)), [one.name for one in variants])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_title("Last minute over the first")
    side_note(axes, f"losses: against {variants[0].name}'s")
    return figure
