"""What the memory probes say: recall against gap, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.style import (
    COLORS,
    MARK_COLOR,
    fit_height,
    legend_below,
    run_colors,
    styled,
)
from moshi_ttt.teacher_forcing.controls import Recalls

Bins = Mapping[str, Sequence[float]]
"""One group of one memory: `moshi_ttt.teacher_forcing.recall.recall_record` says what is in it."""

CLASSES = ("own", "heard")
LABELLED_TOP = 1.32  # room for the labels of the positions above 100 %
BANDED_CURVES = 4  # intervals of more runs than this hide each other
WITHOUT = {"reset": "memory reset", "other": "memory exchanged"}
DASHES: dict[str, Any] = {"reset": "--", "other": "-."}
GROUP_NAMES = {
    "own": "own",
    "heard": "heard",
    "own_unseen": "own, unseen in training",
    "heard_unseen": "heard, unseen in training",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel."""

    label: str
    bins: Bins
    color: str
    style: dict[str, Any]
    banded: bool = False


KEPT_STYLE: dict[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 4}


@styled
def recall_figure(recalls: Recalls, positions_sec: Mapping[str, float]) -> Figure:
    """Accuracy and NLL of the answers of memory probes against gap, of one model.

    A thick curve for each class with the memory kept; thin ones for the controls.

    Args:
        recalls: content of `probes.json`.
        positions_sec: names and lengths that gaps may be compared with, such as `gap_positions` or
            `{"C": 30.0, "trained length": 15.04}`; may be empty.
    """
    groups = shown_groups(recalls["kept"])
    colors = dict(zip(groups, COLORS, strict=False))
    curves = [
        Curve(GROUP_NAMES[group], recalls["kept"][group], color, KEPT_STYLE, banded=True)
        for group, color in colors.items()
    ] + [
        Curve(
            f"{GROUP_NAMES[group]}, {WITHOUT[memory]}",
            recalls[memory][group],
            color,
            {"linestyle": DASHES[memory], "marker": ".", "linewidth": 0.9, "alpha": 0.85},
        )
        for group, color in colors.items()
        for memory in WITHOUT
        if group in recalls.get(memory, {})
    ]
    figure = Figure(figsize=(10, 6.6))
    accuracy, nll = figure.subplots(2, 1, sharex=True, height_ratios=(1.8, 1))
    accuracy_panel(accuracy, curves)
    _nll_panel(nll, curves)
    gap_axis(nll, curves, {GROUP_NAMES[group]: recalls["kept"][group] for group in groups})
    for axes in (accuracy, nll):
        mark_gaps(axes, [positions_sec], [MARK_COLOR], labels=axes is accuracy)
    accuracy.set_title("Recall of planted facts on held-out recordings, teacher-forced")
    if len(curves) > 1:
        legend_below(figure, accuracy)
    return figure


@styled
def recall_overlay_figure(
    runs: Mapping[str, Recalls], positions_sec: Sequence[Mapping[str, float]]
) -> Figure:
    """Recall of several models with their memories kept: accuracy of each class, and NLL.

    Args:
        runs: label to content of `probes.json`.
        positions_sec: of each run, in the same order, as `recall_figure` takes them.
    """
    colors = run_colors(len(runs))
    present = {group: None for one in runs.values() for group in one["kept"]}
    groups = shown_groups(present)
    figure = Figure(figsize=(10, 3.4 + 3.2 * len(groups)))
    panels = figure.subplots(
        len(groups) + 1, 1, sharex=True, height_ratios=[1.6] * len(groups) + [1]
    )
    everything: dict[str, list[Curve]] = {}
    for axes, group in zip(panels, groups, strict=False):
        curves = [
            Curve(label, one["kept"][group], color, KEPT_STYLE, len(runs) <= BANDED_CURVES)
            for color, (label, one) in zip(colors, runs.items(), strict=True)
            if group in one["kept"]
        ]
        everything[group] = curves
        accuracy_panel(axes, curves)
        axes.set_ylabel(f"{GROUP_NAMES[group]}: answer words right")
    _nll_panel(panels[-1], everything[groups[0]])
    panels[-1].set_ylabel(f"{GROUP_NAMES[groups[0]]}: NLL\n(nats a token)")
    gap_axis(panels[-1], [*chain(*everything.values())], shared_words(everything))
    for axes in panels:
        mark_gaps(axes, positions_sec, colors, labels=axes is panels[0])
    panels[0].set_title("Recall of planted facts, memories kept, compared")
    if len(runs) > 1:
        # not every run has every class
        handles = {one.label: one for one in chain(*everything.values())}
        for label in handles.keys() - {one.label for one in everything[groups[0]]}:
            panels[0].plot([], [], color=handles[label].color, label=label, **KEPT_STYLE)
        legend_below(figure, panels[0])
    return figure


def shown_groups(groups: Mapping[str, Any]) -> list[str]:
    """The two classes; what is unseen in training only where there is nothing else."""
    return [group for group in CLASSES if group in groups] or list(groups)


def shared_words(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Bins]:
    """Bins by name of the group, of the groups whose curves were all asked for the same words."""
    return {
        GROUP_NAMES[group]: of_group[0].bins
        for group, of_group in curves.items()
        if all(_words(one.bins) == _words(of_group[0].bins) for one in of_group)
    }


def _words(bins: Bins) -> dict[float, float]:
    return dict(zip(bins["gap_sec"], bins["words"], strict=True))


def accuracy_panel(axes: Axes, curves: Sequence[Curve]) -> None:
    """Shares of answer words that are right, their intervals where asked for, and chance."""
    for one in curves:
        gaps = one.bins["gap_sec"]
        axes.plot(gaps, one.bins["accuracy"], color=one.color, label=one.label, **one.style)
        if one.banded:
            axes.fill_between(
                gaps, one.bins["low"], one.bins["high"], color=one.color, alpha=0.13, linewidth=0
            )
    seen = {(tuple(one.bins["gap_sec"]), tuple(one.bins["chance"])) for one in curves}
    for gaps, chance in seen:
        # a single bin would be a line of no length
        axes.plot(gaps, chance, "_:", color=MARK_COLOR, markersize=10)
    gaps, chance = max(seen)
    axes.annotate(
        "chance", (gaps[-1], chance[-1]), xytext=(8, -3), textcoords="offset points", fontsize=8
    )
    axes.set_ylim(0, LABELLED_TOP)
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("answer words right")


def _nll_panel(axes: Axes, curves: Sequence[Curve]) -> None:
    for one in curves:
        axes.plot(one.bins["gap_sec"], one.bins["nll"], color=one.color, **one.style)
    axes.set_ylabel("NLL of the answers\n(nats a token)")
    fit_height(axes, np.concatenate([one.bins["nll"] for one in curves]), room=0.15)


def gap_axis(axes: Axes, curves: Sequence[Curve], counts: Mapping[str, Bins]) -> None:
    """Logarithmic, a tick a bin, and below it the number of words of each of `counts`."""
    gaps = sorted({gap for one in curves for gap in one.bins["gap_sec"]})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    words = [_words(bins) for bins in counts.values()]
    labels = [
        "\n".join([f"{gap:g} s", *(f"{one[gap]:g}" if gap in one else "-" for one in words)])
        for gap in gaps
    ]
    note = "seconds from the last mention of the fact to the question (middle of the bin)"
    if counts:
        note += f"; below them, answer words ({'; '.join(counts)})"
    axes.set_xticks(gaps, labels)
    axes.set_xlim(gaps[0] / 1.4, gaps[-1] * 1.4)
    axes.set_xlabel(note)


def mark_gaps(
    axes: Axes,
    positions_sec: Sequence[Mapping[str, float]],
    colors: Sequence[str],
    *,
    labels: bool,
) -> None:
    """A line at each position, in the colour of its run if it is one run's among several."""
    names: dict[tuple[float, str], list[str]] = {}
    for own, color in zip(positions_sec, colors, strict=True):
        for name, seconds in own.items():
            runs = sum(other.get(name) == seconds for other in positions_sec)
            single = runs == 1 < len(positions_sec)
            group = names.setdefault((seconds, color if single else MARK_COLOR), [])
            group += [name] if name not in group else []
    low, high = axes.get_xlim()
    for (seconds, color), group in names.items():
        if low < seconds < high:
            axes.axvline(seconds, color=color, linestyle=(0, (4, 3)), linewidth=1)
            if labels:
                axes.annotate(
                    f"{', '.join(group)}\n{seconds:g} s",
                    (seconds, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -4),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color=color,
                )


def gap_positions(trace: Trace) -> dict[str, float]:
    """Lengths of a run that gaps may be compared with, in seconds: C and the trained length."""
    positions = {"C": trace.clock.seconds(trace.context_steps)}
    if trace.trained_steps is not None:
        positions["trained length"] = trace.clock.seconds(trace.trained_steps)
    return positions
