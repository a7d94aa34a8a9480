"""Figures of what happens inside the layers: contributions, fast weights, attention, pace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS
from moshi_ttt.diagnosis.quality import running_text
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.style import (
    COLORS,
    depth_bar,
    fit_height,
    layer_colors,
    legend_below,
    mark,
    middle,
    position_axis,
    styled,
    title,
)

PACE_SEC = 10.0  # window of the running text measures
FROM_ZERO = ("from where they began\n(L2 norm)", "inner updates\nso far")


def inside_figures(trace: Trace) -> dict[str, Figure]:
    """The figures of this file by name; those without data are left out."""
    figures = {}
    if np.isfinite(trace.attention_norm).any():
        figures["contributions"] = contributions_figure(trace)
    if np.isfinite(trace.fast_weight_norm).any():
        figures["fast_weights"] = fast_weights_figure(trace)
    if trace.attention_mass.size:
        figures["attention_mass"] = attention_mass_figure(trace)
    if np.isfinite(trace.step_ms).any():
        figures["pace"] = pace_figure(trace)
    return figures


@styled
def contributions_figure(trace: Trace) -> Figure:
    """Norms of attention's and the feed-forward block's contributions; the largest channel."""
    layers = list(range(trace.input_norm.shape[1]))
    panels = (
        ("attention adds\n(L2 norm)", trace.attention_norm),
        ("feed-forward adds\n(L2 norm)", trace.ffn_norm),
        ("largest channel\nof the input", trace.input_max),
    )
    return _stacked(trace, "What each layer adds", panels, layers)


@styled
def fast_weights_figure(trace: Trace) -> Figure:
    """How far the fast weights have come, their norm, and what writes and forgets them."""
    panels = (
        (FROM_ZERO[0], trace.fast_weight_distance),
        ("fast weights\n(L2 norm)", trace.fast_weight_norm),
        ("write gate", trace.write_gate),
        ("forgetting\n(share a step)", trace.forgetting),
        (FROM_ZERO[1], trace.inner_updates),
    )
    # what the data does not change is said in numbers
    moving = [one for one in panels[1:] if (np.ptp(one[1], axis=-1) > 0).any()]
    return _stacked(trace, "The memory's fast weights", [panels[0], *moving], trace.hybrid_layers)


def _stacked(
    trace: Trace, name: str, panels: Sequence[tuple[str, np.ndarray]], layers: Sequence[int]
) -> Figure:
    """Panels [S, rows, T] under each other, one curve for each of `layers`."""
    smaller = [1] * (len(panels) - 1)
    figure = Figure(figsize=(10, 3.1 + 1.3 * len(panels)))
    colors = layer_colors(layers)
    axes_of = np.atleast_1d(
        figure.subplots(len(panels), 1, sharex=True, height_ratios=(1.6, *smaller))
    )
    for axes, (label, values) in zip(axes_of, panels, strict=True):
        curves = [middle(values[:, row]) for row in range(len(layers))]
        for layer, curve in zip(layers, curves, strict=True):
            axes.plot(curve, color=colors[layer], linewidth=1.2, label=f"layer {layer}")
        axes.set_ylabel(label)
        top = axes is axes_of[0]
        foot = [0.0] if label in FROM_ZERO else []
        fit_height(axes, np.concatenate([*curves, foot]), room=0.8 if top else 0.12)
        mark(axes, trace.critical_steps(), trace.steps, labels=top)
        position_axis(axes, trace.clock, trace.steps, above=top, below=axes is axes_of[-1])
    title(axes_of[0], name, trace)
    if len(layers) > 8:
        depth_bar(figure, axes_of[0], max(layers) + 1)
    else:
        legend_below(figure, axes_of[0])
    return figure


@styled
def attention_mass_figure(trace: Trace) -> Figure:
    """Attention on the first key, on the sinks and on the oldest quarter of the ring."""
    figure = Figure(figsize=(10, 7))
    layers = trace.attention_mass_layers.tolist()
    colors = layer_colors(layers)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    names = ("on the first key", "on the first positions", "on the oldest quarter")
    for part, (axes, name) in enumerate(zip(panels, names, strict=True)):
        curves = np.nanmedian(trace.attention_mass[..., part], axis=0)  # [A, N]
        for layer, curve in zip(layers, curves, strict=True):
            axes.plot(
                trace.attention_mass_steps, curve, color=colors[layer], label=f"layer {layer}"
            )
        axes.set_ylabel(f"attention\n{name}")
        top = axes is panels[0]
        # everything is on the first key while it is the only one
        settled = curves[:, trace.attention_mass_steps >= SETTLE_STEPS]
        fit_height(axes, np.append(settled, 0.0), room=0.8 if top else 0.12)
        mark(axes, trace.critical_steps(), trace.steps, labels=top)
        position_axis(axes, trace.clock, trace.steps, above=top, below=axes is panels[-1])
    panels[0].set_title("Where attention goes")
    legend_below(figure, panels[0])
    return figure


@styled
def pace_figure(trace: Trace) -> Figure:
    """Padding and repetition of the text, and the latency of each step."""
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    window_steps = trace.clock.steps(PACE_SEC)
    texts = running_text(trace.text_tokens, trace.text_padding_ids, window_steps)
    curves = [*map(_mean_over_streams, texts), middle(trace.step_ms[None])]
    labels = ("text padding\n(share)", "text repetition\n(share)", "time a step\n(ms)")
    for axes, curve, label, color in zip(panels, curves, labels, COLORS, strict=False):
        top = axes is panels[0]
        axes.plot(curve, color=color)
        fit_height(axes, np.append(curve, 0.0), room=0.8 if top else 0.12)
        axes.set_ylabel(label)
        mark(axes, trace.critical_steps(), trace.steps, labels=top)
        position_axis(axes, trace.clock, trace.steps, above=top, below=axes is panels[-1])
    panels[0].set_title("Text and speed")
    return figure


def _mean_over_streams(values: np.ndarray) -> np.ndarray:
    """Mean of the streams that have a value at a step, [S, n] to [n]; NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    return mean
