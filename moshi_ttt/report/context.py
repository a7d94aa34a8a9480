"""Loss against how far back a model has read, as a figure and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moshi_ttt.diagnosis.jumps import finite_mean
from moshi_ttt.report import html
from moshi_ttt.report.intervals import loss_difference
from moshi_ttt.report.style import legend_below, run_colors, styled
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.contexts import ContextSweep

LOSSES = {"text": "words", "first_codebook": "the first codebook"}
"""Rows whose loss is told in words."""


def context_line(contexts: Mapping[str, Any] | None) -> str:
    """What the same seconds cost behind the shortest and the longest context; "" if not known."""
    if contexts is None or len(contexts["context_sec"]) < 2:
        return ""
    near, far = (pick(contexts["context_sec"]) for pick in (min, max))
    columns = [contexts["context_sec"].index(one) for one in (near, far)]
    told = []
    for group, name in LOSSES.items():
        losses = np.array(contexts[group], dtype=float)[:, columns].T  # None becomes NaN
        known = losses[:, np.isfinite(losses).all(axis=0)]
        if known.size:
            values = " and ".join(f"{one.mean():.2f}" for one in known)
            told.append(f"{values} for {name} ({loss_difference(known[1], known[0])})")
    if not told:
        return ""
    return (
        f"Behind {near:g} s and behind {far:g} s of what was said before them, the same seconds of "
        f"recordings cost {', and '.join(told)} (nats a token; negative: more helps)."
    )


def context_table(contexts: Mapping[str, Any] | None) -> list[str]:
    """Loss behind each context, and what the longest adds to the shortest, as HTML."""
    if contexts is None:
        return []
    lengths = contexts["context_sec"]
    near, far = (lengths.index(pick(lengths)) for pick in (min, max))
    header = ["nats a token", *(f"behind {seconds:g} s" for seconds in lengths), "difference"]
    rows = []
    for group in GROUPS:
        losses = np.array(contexts[group], dtype=float).T  # [contexts, stretches]
        known = [finite_mean(one) for one in losses]
        means = [None if mean != mean else f"{mean:.3f}" for mean in known]
        rows.append([group.replace("_", " "), *means, loss_difference(losses[far], losses[near])])
    note = (
        f"The same {contexts['target_sec']:g} s of {len(contexts['stretches'])} stretches of "
        "held-out recordings; the difference with its 95 % interval over the stretches."
    )
    return [html.table(header, rows), html.paragraph(note, kind="note")]


@styled
def context_figure(
    sweep: ContextSweep,
    curves: dict[str, dict[str, list[float]]],
    marks_sec: dict[str, float],
    stretches: int,
) -> Figure:
    """Loss against context, a panel a group of rows and a curve a model.

    Args:
        sweep: what was measured.
        curves: label to what `ContextSweep.nll` gave.
        marks_sec: names of context lengths to point at.
        stretches: how many were read.
    """
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(len(GROUPS), 1, sharex=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        for color, (label, values) in zip(run_colors(len(curves)), curves.items(), strict=True):
            axes.plot(
                sweep.context_sec, values[group], "o-", markersize=4, color=color, label=label
            )
        axes.set_ylabel(f"{group.replace('_', ' ')}\n(nats a token)")
        for name, seconds in marks_sec.items():
            axes.axvline(seconds, color="0.3", linestyle="--", linewidth=1)
            if axes is panels[0]:
                axes.annotate(
                    name,
                    (seconds, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
    panels[-1].set_xlabel(
        f"seconds read before the {sweep.target_sec:g} s that are measured ({stretches} stretches)"
    )
    panels[0].set_title("The same held-out seconds behind contexts of different lengths", pad=18)
    if len(curves) > 1:
        legend_below(figure, panels[0])
    return figure
