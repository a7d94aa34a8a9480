"""Figures that lay several long generations over each other: epochs of a run, or runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.figures import Nll, nll_figure
from moshi_ttt.report.recall import gap_positions, recall_overlay_figure
from moshi_ttt.report.style import (
    fit_height,
    legend_below,
    mark_runs,
    middle,
    position_axis,
    run_colors,
    styled,
)
from moshi_ttt.teacher_forcing.controls import Recalls


def comparison_figures(
    traces: Mapping[str, Trace],
    nlls: Mapping[str, Nll | None],
    recalls: Mapping[str, Recalls | None],
) -> dict[str, Figure]:
    """Overlays by name; more than `MAX_CURVES` runs cannot be told apart.

    Args:
        traces: label to trace, at least one.
        nlls: the same labels to content of `nll.json`, None where there is none.
        recalls: the same labels to content of `probes.json`, None where there is none.
    """
    figures = {
        "input_norm": norm_overlay_figure(traces),
        "signals": signal_overlay_figure(traces),
    }
    curves = {label: nll for label in traces if (nll := nlls[label]) is not None}
    if curves:
        figures["nll"] = nll_figure(curves, [traces[label] for label in curves])
    remembered = {label: recall for label in traces if (recall := recalls[label]) is not None}
    if remembered:
        figures["recall"] = recall_overlay_figure(
            remembered, [gap_positions(traces[label]) for label in remembered]
        )
    return figures


@styled
def norm_overlay_figure(traces: Mapping[str, Trace]) -> Figure:
    """Input norm of four layers spread over the depth, one curve a run."""
    shallowest = min(trace.input_norm.shape[1] for trace in traces.values())
    figure = Figure(figsize=(10, 6.6))
    panels = figure.subplots(2, 2, sharex=True)
    for axes, share in zip(panels.flat, (0, 1 / 3, 2 / 3, 1), strict=True):
        layer = round(share * (shallowest - 1))
        curves = {label: trace.input_norm[:, layer] for label, trace in traces.items()}
        first, top = axes is panels[0, 0], axes in panels[0]
        _overlay(axes, curves, traces, room=0.7 if first else 0.08, above=top, below=not top)
        axes.set_ylabel(f"input norm, layer {layer}")
    panels[0, 0].set_title("Input norm, compared")
    legend_below(figure, panels[0, 0])
    return figure


@styled
def signal_overlay_figure(traces: Mapping[str, Trace]) -> Figure:
    """Branch ratio (mean of the hybrid layers) and entropies, one curve a run."""
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.7, 1, 1))
    rows: tuple[tuple[str, Callable[[Trace], np.ndarray]], ...] = (
        ("branch ratio", _branch_ratio),
        ("text entropy\n(nats)", lambda trace: trace.text_entropy),
        ("first codebook\nentropy (nats)", lambda trace: trace.audio_entropy),
    )
    for axes, (name, pick) in zip(panels, rows, strict=True):
        curves = {label: pick(trace) for label, trace in traces.items()}
        first = axes is panels[0]
        _overlay(
            axes, curves, traces, room=0.9 if first else 0.1, above=first, below=axes is panels[-1]
        )
        axes.set_ylabel(name)
    panels[0].set_title("Memory and entropies, compared")
    legend_below(figure, panels[0])
    return figure


def _branch_ratio(trace: Trace) -> np.ndarray:
    """Mean over hybrid layers, [S, T]; vanilla Moshi has no branch, so it adds exactly 0."""
    if not trace.hybrid_layers:
        return np.zeros_like(trace.text_entropy)
    return trace.branch_ratio.mean(axis=1)


def _overlay(
    axes: Axes,
    curves: Mapping[str, np.ndarray],
    traces: Mapping[str, Trace],
    *,
    room: float,
    above: bool,
    below: bool,
) -> None:
    """One panel, one curve a run; labels for structural positions where the panel has `room`."""
    colors = run_colors(len(curves))
    lines = {label: middle(values) for label, values in curves.items()}
    for color, (label, line) in zip(colors, lines.items(), strict=True):
        axes.plot(line, color=color, label=label)
    fit_height(axes, np.concatenate([line[SETTLE_STEPS:] for line in lines.values()]), room=room)
    end = max(map(len, lines.values()))
    mark_runs(axes, list(traces.values()), colors, end, labels=room >= 0.5)
    position_axis(axes, next(iter(traces.values())).clock, end, above=above, below=below)
