"""What the memory probes say: recall against gap, as a figure and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.style import MARK_COLOR, fit_height, legend_below, run_colors, styled

Recall = Mapping[str, Sequence[float]]
"""Content of `probes.json`: `moshi_ttt.teacher_forcing.recall.recall_record` says what is in it."""

BANDED_CURVES = 4  # intervals of more runs than this hide each other


@styled
def recall_figure(
    curves: Mapping[str, Recall], positions_sec: Sequence[Mapping[str, float]]
) -> Figure:
    """Accuracy and NLL of the answers of memory probes against gap, one curve a label.

    Args:
        curves: label to content of `probes.json`.
        positions_sec: of each label, in the same order, names and lengths that gaps may be compared
            with, such as `gap_positions` or `{"C": 30.0, "trained length": 15.04}`; may be empty.
    """
    figure = Figure(figsize=(10, 6.4))
    accuracy, nll = figure.subplots(2, 1, sharex=True, height_ratios=(1.8, 1))
    colors = run_colors(len(curves))
    for color, (label, recall) in zip(colors, curves.items(), strict=True):
        gaps = recall["gap_sec"]
        accuracy.plot(gaps, recall["accuracy"], "o-", markersize=4, color=color, label=label)
        nll.plot(gaps, recall["nll"], "o-", markersize=4, color=color)
        if len(curves) <= BANDED_CURVES:
            accuracy.fill_between(
                gaps, recall["low"], recall["high"], color=color, alpha=0.13, linewidth=0
            )
    seen = {(tuple(one["gap_sec"]), tuple(one["chance"])) for one in curves.values()}
    for gaps, chance in seen:
        # a single bin would be a line of no length
        accuracy.plot(gaps, chance, "_:", color=MARK_COLOR, markersize=10)
    accuracy.annotate(
        "chance", (gaps[-1], chance[-1]), xytext=(8, -3), textcoords="offset points", fontsize=8
    )
    accuracy.set_ylim(0, 1.32)  # room for the labels of the positions
    accuracy.set_yticks(np.linspace(0, 1, 5))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.set_ylabel("answer words right")
    nll.set_ylabel("NLL of the answers\n(nats a token)")
    fit_height(nll, np.concatenate([one["nll"] for one in curves.values()]), room=0.15)
    nll.yaxis.set_minor_formatter(NullFormatter())
    _gap_axis(nll, curves)
    for axes in (accuracy, nll):
        _mark(axes, positions_sec, colors, labels=axes is accuracy)
    accuracy.set_title("Recall of planted facts on held-out recordings, teacher-forced")
    if len(curves) > 1:
        legend_below(figure, accuracy)
    return figure


def _gap_axis(axes: Axes, curves: Mapping[str, Recall]) -> None:
    """Logarithmic, a tick a bin, and the number of words where all curves have the same."""
    words = {
        gap: {one["words"][list(one["gap_sec"]).index(gap)] for one in curves.values()}
        for gap in sorted(set.intersection(*(set(one["gap_sec"]) for one in curves.values())))
    }
    gaps = sorted({gap for one in curves.values() for gap in one["gap_sec"]})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    labels = [f"{gap:g}" for gap in gaps]
    note = "seconds from the last mention of the fact to the question (middle of the bin)"
    if all(len(words.get(gap, ())) == 1 for gap in gaps):
        labels = [f"{gap:g} s\n{min(words[gap]):g}" for gap in gaps]
        note += "; below them, answer words"
    axes.set_xticks(gaps, labels)
    axes.set_xlim(gaps[0] / 1.4, gaps[-1] * 1.4)
    axes.set_xlabel(note)


def _mark(
    axes: Axes,
    positions_sec: Sequence[Mapping[str, float]],
    colors: Sequence[str],
    *,
    labels: bool,
) -> None:
    """A line at each position, grey where all runs share it, else in the run's colour."""
    names: dict[tuple[float, str], list[str]] = {}
    for own, color in zip(positions_sec, colors, strict=True):
        for name, seconds in own.items():
            shared = all(other.get(name) == seconds for other in positions_sec)
            group = names.setdefault((seconds, MARK_COLOR if shared else color), [])
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


def recall_finding(trace: Trace, recall: Recall) -> str:
    """Recall within the attention window and beyond it, as a sentence."""
    gaps, words = np.array(recall["gap_sec"]), np.array(recall["words"])
    window_sec = trace.clock.seconds(trace.context_steps)

    def part(inside: np.ndarray) -> str:
        if not inside.any():
            return "no probe was asked"
        share = np.average(np.array(recall["accuracy"])[inside], weights=words[inside])
        span = f"about {gaps[inside].min():g} to {gaps[inside].max():g} s"
        return f"{share:.0%} of {words[inside].sum():.0f} words are right ({span})"

    within = gaps <= window_sec
    chance = np.average(recall["chance"], weights=words)
    return (
        f"Asked for a fact that was last mentioned within the attention window of "
        f"{window_sec:g} s, {part(within)}; beyond it, {part(~within)}. "
        f"Guessing among the values of the kind would give {chance:.0%}."
    )
