"""Figures of a long generation: every position axis shows steps, seconds and legacy tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS, Jump
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.asked import asked_at_times, asked_figure
from moshi_ttt.report.flagged import flagged_figure
from moshi_ttt.report.inside import inside_figures
from moshi_ttt.report.recall import gap_positions, recall_figure
from moshi_ttt.report.sound import audio_figure
from moshi_ttt.report.style import (
    COLORS,
    JUMP_COLOR,
    STYLE,
    band,
    depth_bar,
    fit_height,
    layer_colors,
    legend_below,
    mark,
    mark_jumps,
    mark_runs,
    middle,
    position_axis,
    run_colors,
    styled,
    title,
)
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import Recalls

Nll = Mapping[str, Any]
"""Content of `nll.json`: `window_steps`, and the lists `start_step`, `text`, `first_codebook`,
`other_codebooks` in nats, where None is undefined."""


def pixels(figure: Figure) -> np.ndarray:
    """The figure as an image, [height, width, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    with mpl.rc_context(STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return png_of(pixels(figure))


def png_of(picture: np.ndarray) -> bytes:
    """What `pixels` gave as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return buffer.getvalue()


def evaluation_pictures(evaluation: Evaluation, trace: Trace) -> dict[str, np.ndarray]:
    """Every figure of one evaluation by name, as `pixels` gives it."""
    figures = evaluation_figures(trace, evaluation.jumps, evaluation.nll, evaluation.recall)
    if evaluation.segments is not None:
        figures["flagged"] = flagged_figure(evaluation.segments, trace)
    if evaluation.audio:
        words = next(iter(evaluation.transcripts), [])
        figures["audio"] = audio_figure(evaluation.audio[0], trace, words)
    return {name: pixels(figure) for name, figure in figures.items()}


def evaluation_figures(
    trace: Trace,
    jumps: Sequence[Jump],
    nll: Nll | None,
    recall: Recalls | None,
) -> dict[str, Figure]:
    """Every figure of a trace by name; those without data are left out."""
    figures = {"input_norm": norm_figure(trace, jumps), "heat_map": heat_map_figure(trace, jumps)}
    if trace.hybrid_layers:
        figures["memory"] = memory_figure(trace)
    figures |= inside_figures(trace)
    figures["entropy"] = entropy_figure(trace)
    if nll is not None:
        figures["nll"] = nll_figure({trace.label: nll}, [trace])
    if recall is not None:
        figures["recall"] = recall_figure(recall, gap_positions(trace))
        if asked_at_times(recall, trace):
            figures["asked"] = asked_figure(recall, trace)
    return figures


@styled
def norm_figure(trace: Trace, jumps: Sequence[Jump]) -> Figure:
    """Input norm of every layer against position, with structural positions and jumps."""
    figure = Figure(figsize=(10, 5.2))
    axes = figure.add_subplot()
    layers = trace.input_norm.shape[1]
    curves = [middle(trace.input_norm[:, layer]) for layer in range(layers)]
    colors = layer_colors(range(layers))
    banded = set(range(layers)) if layers <= 4 else {0, layers // 2, layers - 1}
    for layer, curve in enumerate(curves):
        hybrid = layer in trace.hybrid_layers
        label = f"layer {layer}" + (" (memory)" if hybrid else "")
        axes.plot(curve, color=colors[layer], linewidth=2 if hybrid else 1.2, label=label)
        if layer in banded:
            band(axes, trace.input_norm[:, layer], colors[layer])
    settled = np.concatenate([curve[SETTLE_STEPS:] for curve in curves])
    fit_height(axes, settled, room=0.42, foot=0.2 if jumps else 0.08)
    if layers <= 8:
        axes.legend(*_deepest_first(axes), loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        depth_bar(figure, axes, layers)
    title(axes, "Input norm of each layer", trace)
    axes.set_ylabel("L2 norm of the layer's input")
    position_axis(axes, trace.clock, trace.steps)
    mark(axes, trace.critical_steps(), trace.steps)
    mark_jumps(axes, jumps, trace.clock)
    return figure


def _deepest_first(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


@styled
def heat_map_figure(trace: Trace, jumps: Sequence[Jump]) -> Figure:
    """Layer x position: input norm relative to the same layer's norm after the prompt."""
    layers, steps = trace.input_norm.shape[1:]
    figure = Figure(figsize=(10, 3.2 + min(3.0, 0.12 * layers)))
    axes = figure.add_subplot()
    first = min(max(trace.free_from, SETTLE_STEPS), steps - 1)
    curves = np.stack([middle(trace.input_norm[:, layer]) for layer in range(layers)])
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(curves / np.median(curves[:, first : first + 50], axis=-1, keepdims=True))
    octaves[:, :SETTLE_STEPS] = np.nan
    finite = np.abs(octaves[np.isfinite(octaves)])
    limit = max(np.log2(1.1), float(np.quantile(finite, 0.99)) if finite.size else 0.0)
    image = axes.imshow(
        octaves,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, steps, -0.5, layers - 0.5),
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0.0, -limit, limit),
    )
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=np.linspace(-limit, limit, 5))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"x{2**value:.2f}"))
    bar.set_label("norm / norm after the prompt")
    title(axes, "Change of the input norm", trace)
    position_axis(axes, trace.clock, steps)
    mark(axes, trace.critical_steps(), steps)
    for jump in jumps:
        at = [jump.step] * len(jump.layers)
        axes.plot(at, jump.layers, "d", color=JUMP_COLOR, markeredgecolor="white", markersize=6)
    return figure


@styled
def memory_figure(trace: Trace) -> Figure:
    """Branch ratio, and raw branch norm, of the hybrid layers."""
    figure = Figure(figsize=(10, 5.2))
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    colors = layer_colors(trace.hybrid_layers)
    for axes, (name, array) in zip(
        panels,
        (
            ("branch norm\n/ residual norm", trace.branch_ratio),
            ("branch norm\nbefore the gate", trace.branch_raw_norm),
        ),
        strict=True,
    ):
        curves = [middle(array[:, index]) for index in range(len(trace.hybrid_layers))]
        for layer, curve in zip(trace.hybrid_layers, curves, strict=True):
            axes.plot(curve, color=colors[layer], label=f"layer {layer}")
        axes.set_ylabel(name)
        top = axes is panels[0]
        fit_height(axes, np.concatenate(curves), room=0.7 if top else 0.08)
        mark(axes, trace.critical_steps(), trace.steps, labels=top)
        position_axis(axes, trace.clock, trace.steps, above=top, below=not top)
    title(panels[0], "What the memory adds", trace)
    legend_below(figure, panels[0])
    return figure


@styled
def entropy_figure(trace: Trace) -> Figure:
    """Entropy of the text and first-codebook predictions against position."""
    figure = Figure(figsize=(10, 5.6))
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    for axes, color, name, entropy in zip(
        panels,
        COLORS[:2],
        ("text (nats)", "first codebook (nats)"),
        (trace.text_entropy, trace.audio_entropy),
        strict=True,
    ):
        curve = middle(entropy)
        axes.plot(curve, color=color)
        band(axes, entropy, color)
        axes.set_ylabel(name)
        top = axes is panels[0]
        fit_height(axes, np.append(curve, 0.0), room=0.8 if top else 0.15)
        mark(axes, trace.critical_steps(), trace.steps, labels=top)
        position_axis(axes, trace.clock, trace.steps, above=top, below=not top)
    title(panels[0], "Entropy of the predictions", trace)
    return figure


@styled
def nll_figure(curves: Mapping[str, Nll], traces: Sequence[Trace]) -> Figure:
    """Teacher-forced loss against position on held-out recordings, one curve a label.

    Args:
        curves: label to content of `nll.json`.
        traces: the runs they belong to, in the same order, for clock and structural positions.
    """
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.7, 1, 1))
    steps = max(max(nll["start_step"], default=0) + nll["window_steps"] for nll in curves.values())
    colors = run_colors(len(curves))
    for axes, group in zip(panels, GROUPS, strict=True):
        losses = []
        for color, (label, nll) in zip(colors, curves.items(), strict=True):
            centre = np.array(nll["start_step"], dtype=float) + nll["window_steps"] / 2
            losses.append(np.array(nll[group], dtype=float))  # None becomes NaN
            axes.plot(centre, losses[-1], "o-", markersize=3, color=color, label=label)
        axes.set_ylabel(f"{group.replace('_', ' ')}\n(nats a token)")
        top = axes is panels[0]
        fit_height(axes, np.concatenate(losses), room=0.9 if top else 0.15)
        mark_runs(axes, traces, colors, steps, labels=top, without=("prompt end",))
        position_axis(axes, traces[0].clock, steps, above=top, below=axes is panels[-1])
    panels[0].set_title("Teacher-forced loss on held-out recordings")
    if len(curves) > 1:
        legend_below(figure, panels[0])
    return figure
