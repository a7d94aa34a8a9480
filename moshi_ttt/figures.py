"""Figures of long generations: every position axis shows steps, seconds and legacy tokens.

Plain matplotlib objects without global state, so that they can be drawn from a training process;
the style lives in a scoped context.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from scipy.ndimage import median_filter
from scipy.signal import spectrogram

from moshi_ttt.clock import Clock
from moshi_ttt.jumps import SETTLE_STEPS, Jump
from moshi_ttt.trace import Trace

Nll = Mapping[str, Any]
"""Content of `nll.json`: `window_steps`, and the lists `start_step`, `text`, `first_codebook`,
`other_codebooks` in nats, where None is undefined."""

DPI = 100
SMOOTH_STEPS = 13  # rolling median of about one second; wide enough to read, far below a window
MAX_CURVES = 8  # more epochs than this cannot be told apart in one panel
JUMP_COLOR = "#c2185b"
MARK_COLOR = "#555555"
AUDIO_FLOOR_DB = -80.0
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}
COLORS = ("#1f6fb4", "#e07b00", "#2e8b57", "#8e44ad", "#c0392b", "#7f6000", "#17899b", "#555555")

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw inside the style, without leaving a trace in matplotlib's settings."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


@_styled
def norm_figure(trace: Trace, jumps: Sequence[Jump]) -> Figure:
    """Input norm of every layer against position, with structural positions and jumps."""
    figure = Figure(figsize=(10, 5.2))
    axes = figure.add_subplot()
    layers = trace.input_norm.shape[1]
    series = [_middle(trace.input_norm[:, layer]) for layer in range(layers)]
    colors = _layer_colors(range(layers))
    banded = set(range(layers)) if layers <= 4 else {0, layers // 2, layers - 1}
    for layer, middle in enumerate(series):
        hybrid = layer in trace.hybrid_layers
        label = f"layer {layer}" + (" (memory)" if hybrid else "")
        axes.plot(middle, color=colors[layer], linewidth=2.0 if hybrid else 1.2, label=label)
        if layer in banded and trace.input_norm.shape[0] > 1:
            _band(axes, trace.input_norm[:, layer], colors[layer])
    settled = np.concatenate([middle[SETTLE_STEPS:] for middle in series])
    _fit_height(axes, settled, room=0.42)
    if layers <= 6:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _depth_bar(figure, [axes], layers)
    _title(axes, "Input norm of each layer", trace)
    axes.set_ylabel("L2 norm of the layer's input")
    _position_axis(axes, trace.clock, trace.steps)
    _mark(axes, trace.critical_steps(), trace.steps)
    _mark_jumps(axes, jumps, trace.clock)
    return figure


@_styled
def heat_map_figure(trace: Trace, jumps: Sequence[Jump]) -> Figure:
    """Layer x position: input norm relative to the same layer's norm after the prompt."""
    layers, steps = trace.input_norm.shape[1:]
    figure = Figure(figsize=(10, 2.8 + min(3.2, 0.22 * layers)))
    axes = figure.add_subplot()
    first = min(max(trace.prompt_steps, SETTLE_STEPS), steps - 1)
    middle = np.stack([_middle(trace.input_norm[:, layer]) for layer in range(layers)])
    early = np.nanmedian(middle[:, first : first + 50], axis=-1, keepdims=True)
    octaves = np.log2(middle / early)
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
    _title(axes, "Change of the input norm by depth and position", trace)
    _position_axis(axes, trace.clock, steps)
    _mark(axes, trace.critical_steps(), steps)
    for jump in jumps:
        axes.plot(
            [jump.step] * len(jump.layers), jump.layers, "d", color=JUMP_COLOR, mec="white", ms=5
        )
    return figure


@_styled
def memory_figure(trace: Trace) -> Figure:
    """Branch ratio, gate, raw branch norm and inner updates of the hybrid layers."""
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(2, 2, sharex=True)
    colors = _layer_colors(trace.hybrid_layers)
    for axes, (name, array) in zip(
        panels.flat,
        (
            ("branch norm / residual norm", trace.branch_ratio),
            ("gate (RMS over channels)", trace.gate),
            ("branch norm before the gate", trace.branch_raw_norm),
            ("inner updates so far", trace.inner_updates),
        ),
        strict=True,
    ):
        for index, layer in enumerate(trace.hybrid_layers):
            middle = _middle(array[:, index])
            axes.plot(middle, color=colors[layer], label=f"layer {layer}")
        axes.set_ylabel(name)
        axes.margins(y=0.1)
        _mark(axes, trace.critical_steps(), trace.steps, labels=axes is panels[0, 0], room=0.4)
    for axes in panels[0]:
        _position_axis(axes, trace.clock, trace.steps, below=False)
    for axes in panels[1]:
        _position_axis(axes, trace.clock, trace.steps, above=False)
    _title(panels[0, 0], "The memory", trace)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(8, len(trace.hybrid_layers)),
    )
    return figure


@_styled
def entropy_figure(trace: Trace) -> Figure:
    """Entropy of the text and first-codebook predictions against position."""
    figure = Figure(figsize=(10, 5.2))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, color, name, entropy in zip(
        panels,
        COLORS,
        ("text (nats)", "first codebook (nats)"),
        (trace.text_entropy, trace.audio_entropy),
        strict=False,
    ):
        axes.plot(_middle(entropy), color=color)
        if entropy.shape[0] > 1:
            _band(axes, entropy, color)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        _mark(axes, trace.critical_steps(), trace.steps, labels=axes is panels[0], room=0.5)
    _position_axis(panels[0], trace.clock, trace.steps, below=False)
    _position_axis(panels[1], trace.clock, trace.steps, above=False)
    _title(panels[0], "Entropy of the predictions", trace)
    return figure


@_styled
def nll_figure(curves: Mapping[str, Nll], marks: Mapping[str, int], clock: Clock) -> Figure:
    """Teacher-forced loss against position on a held-out recording, one curve a label.

    Args:
        curves: label to content of `nll.json`.
        marks: structural positions, in steps.
        clock: for the position axis.
    """
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(3, 1, sharex=True)
    steps = max(max(nll["start_step"], default=0) + nll["window_steps"] for nll in curves.values())
    colors = _curve_colors(len(curves))
    for axes, key in zip(panels, ("text", "first_codebook", "other_codebooks"), strict=True):
        for color, (label, nll) in zip(colors, curves.items(), strict=True):
            edges = np.array(nll["start_step"], dtype=float)
            loss = np.array(nll[key], dtype=float)  # None becomes NaN
            width = nll["window_steps"]
            axes.plot(edges + width / 2, loss, "o-", markersize=3, color=color, label=label)
        axes.set_ylabel(f"{key.replace('_', ' ')}\n(nats a token)")
        axes.margins(y=0.15)
        _mark(axes, marks, steps, labels=axes is panels[0], room=0.5)
    _position_axis(panels[0], clock, steps, below=False)
    _position_axis(panels[-1], clock, steps, above=False)
    panels[0].set_title("Teacher-forced loss on a held-out recording")
    if len(curves) > 1:
        _legend_below(figure, panels[0])
    return figure


@_styled
def audio_figure(path: Path) -> Figure:
    """Waveform and spectrogram of a sound file; the channels of a stereo file are averaged."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    figure = Figure(figsize=(10, 4.4))
    wave, picture = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.2))
    seconds = len(mono) / rate
    # outline only: a line through a million samples is slow and shows the same
    pieces = np.array_split(mono, min(2000, max(1, len(mono))))
    at = np.linspace(0, seconds, len(pieces))
    low, high = ([pick(piece, initial=0.0) for piece in pieces] for pick in (np.min, np.max))
    wave.fill_between(at, low, high, color=COLORS[0], linewidth=0)
    peak = max(0.05, float(np.abs(mono).max(initial=0.0)))
    wave.set_ylim(-1.05 * peak, 1.05 * peak)
    wave.set_ylabel("amplitude")
    wave.set_title(f"Generated audio: {path.name}")
    if len(mono) >= 512:
        hertz, times, power = spectrogram(mono, rate, nperseg=512, noverlap=256, mode="magnitude")
        decibels = 20 * np.log10(np.maximum(power, 1e-12))
        top = float(decibels.max())
        image = picture.imshow(
            np.maximum(decibels - top, AUDIO_FLOOR_DB),
            aspect="auto",
            origin="lower",
            extent=(float(times[0]), float(times[-1]), 0, float(hertz[-1]) / 1000),
            cmap="magma",
        )
        figure.colorbar(image, ax=picture, pad=0.01, label="dB below the peak")
    picture.grid(False)
    picture.set_ylabel("frequency (kHz)")
    picture.set_xlabel("time (s)")
    picture.set_xlim(0, max(seconds, 1e-3))
    return figure


@_styled
def norm_overlay_figure(traces: Sequence[Trace]) -> Figure:
    """Input norm of up to four layers spread over the depth, one curve a trace."""
    figure = Figure(figsize=(10, 6.4))
    shallowest = min(trace.input_norm.shape[1] for trace in traces)
    chosen = sorted({round(share * (shallowest - 1)) for share in (0, 1 / 3, 2 / 3, 1)})
    panels = np.atleast_1d(figure.subplots(2 if len(chosen) > 2 else 1, 2, sharex=True).ravel())
    for axes, layer in zip(panels, chosen, strict=False):
        series = [(trace, trace.input_norm[:, layer]) for trace in traces]
        _overlay(axes, series, labels=axes is panels[0])
        axes.set_ylabel(f"input norm, layer {layer}")
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    _overlay_axes(figure, panels[:2], panels[len(chosen) - 2 : len(chosen)], traces)
    panels[0].set_title("Input norm, compared")
    return figure


@_styled
def signal_overlay_figure(traces: Sequence[Trace]) -> Figure:
    """Branch ratio (mean of the hybrid layers) and entropies, one curve a trace."""
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(3, 1, sharex=True)
    rows: tuple[tuple[str, Callable[[Trace], np.ndarray]], ...] = (
        ("branch ratio", lambda trace: trace.branch_ratio.mean(axis=1)),
        ("text entropy\n(nats)", lambda trace: trace.text_entropy),
        ("first codebook\nentropy (nats)", lambda trace: trace.audio_entropy),
    )
    for axes, (name, pick) in zip(panels, rows, strict=True):
        # vanilla Moshi has no branch, and a ratio of 0 is exactly what it adds
        series = [
            (
                trace,
                pick(trace)
                if trace.hybrid_layers or name != "branch ratio"
                else np.zeros_like(trace.text_entropy),
            )
            for trace in traces
        ]
        _overlay(axes, series, labels=axes is panels[0])
        axes.set_ylabel(name)
    _overlay_axes(figure, panels[:1], panels[-1:], traces)
    panels[0].set_title("Memory and entropies, compared")
    return figure


def spread(items: Sequence[Any]) -> list[Any]:
    """At most `MAX_CURVES` of the items, evenly spaced, with the first and the last."""
    count = min(MAX_CURVES, len(items))
    chosen = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[index] for index in chosen]
