"""What the figures share: style, the three-clock position axis, marks, colours and smoothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from scipy.ndimage import median_filter

from moshi_ttt.clock import Clock
from moshi_ttt.jumps import Jump
from moshi_ttt.trace import Trace

SMOOTH_STEPS = 13  # rolling median of about one second; far shorter than a jump finder's window
MAX_CURVES = 8  # more runs than this cannot be told apart in one panel
JUMP_COLOR = "#c2185b"
MARK_COLOR = "#4a4a4a"
COLORS = ("#1f6fb4", "#e07b00", "#2e8b57", "#8e44ad", "#c0392b", "#7f6000", "#17899b", "#555555")
STYLE: dict[Any, Any] = {
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

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw inside the style, and leave matplotlib's global settings as they were."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def middle(values: np.ndarray) -> np.ndarray:
    """Median over streams, then rolling median over `SMOOTH_STEPS`: [S, T] to [T]; NaN stays."""
    return _smooth(_quantile(values, 0.5))


def band(axes: Axes, values: np.ndarray, color: str) -> None:
    """Shade the interquartile range over streams; values [S, T]."""
    if len(values) > 1:
        low, high = (_smooth(_quantile(values, q)) for q in (0.25, 0.75))
        axes.fill_between(np.arange(len(low)), low, high, color=color, alpha=0.15, linewidth=0)


def _quantile(values: np.ndarray, q: float) -> np.ndarray:
    """Over the streams that are finite at every step; NaN without any."""
    finite = values[np.isfinite(values).all(axis=-1)]
    return np.quantile(finite, q, axis=0) if len(finite) else np.full(values.shape[-1], np.nan)


def _smooth(series: np.ndarray) -> np.ndarray:
    return median_filter(series, size=SMOOTH_STEPS)


def fit_height(axes: Axes, values: np.ndarray, *, room: float, foot: float = 0.08) -> None:
    """Fit the y axis to the finite values, with `room` above and `foot` below for labels.

    Both are fractions of the range.

    A logarithmic scale where the values span more than a factor of 12.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > 12 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** foot, high * (high / low) ** room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        extent = (high - low) or abs(high) or 1.0
        axes.set_ylim(low - foot * extent, high + room * extent)


def position_axis(
    axes: Axes, clock: Clock, steps: int, *, above: bool = True, below: bool = True
) -> None:
    """Label the x axis in steps below, and in seconds and legacy tokens above."""
    axes.set_xlim(0, steps)
    if below:
        axes.set_xlabel(f"position (steps of {1000 * clock.step_sec:g} ms)")
    if above:

        def both(seconds: float, _: object) -> str:
            return f"{seconds:g} s\n{clock.legacy_tokens(seconds / clock.step_sec)}"

        time = axes.secondary_xaxis(
            "top",
            functions=(lambda x: x * clock.step_sec, lambda sec: sec / clock.step_sec),  # type: ignore[operator]
        )
        time.xaxis.set_major_formatter(FuncFormatter(both))
        time.set_xlabel("seconds, and legacy tokens below them", fontsize=8.5)


def mark(
    axes: Axes,
    positions: Mapping[str, float],
    end: float,
    *,
    labels: bool = True,
    color: Any = MARK_COLOR,
    paper: str = "white",
) -> None:
    """Dashed lines at structural positions before `end`; names at one position share a label."""
    names: dict[float, list[str]] = {}
    for name, step in positions.items():
        if 0 < step < end:
            names.setdefault(step, []).append(name)
    previous = 0.0  # the left edge crowds like a line
    for step in sorted(names):
        axes.axvline(step, color=color, linestyle=(0, (4, 3)), linewidth=1)
        if labels:
            # a label that would touch its left neighbour goes to the other side of its line
            crowded = step - previous < 0.03 * end * len(names[step])
            axes.annotate(
                "\n".join(names[step]),
                (step, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3 if crowded else -3, -4),
                textcoords="offset points",
                rotation=90,
                ha="left" if crowded else "right",
                va="top",
                fontsize=8,
                color=color,
                bbox={"facecolor": paper, "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
            )
        previous = step


def mark_all(
    axes: Axes,
    traces: Sequence[Trace],
    colors: Sequence[Any],
    end: int,
    *,
    labels: bool,
    without: Collection[str] = (),
) -> None:
    """Structural positions of several runs: grey where all share them, else in the run's colour."""
    own = [
        {(name, step) for name, step in trace.critical_steps().items() if name not in without}
        for trace in traces
    ]
    shared = set.intersection(*own)
    mark(axes, dict(sorted(shared, key=lambda item: item[1])), end, labels=labels)
    for positions, color in zip(own, colors, strict=True):
        mark(axes, dict(positions - shared), end, labels=labels, color=color)


def mark_jumps(axes: Axes, jumps: Sequence[Jump], clock: Clock) -> None:
    """A line and a label (size, position) at the foot of the axes for every jump found."""
    for jump in jumps:
        axes.axvline(jump.step, color=JUMP_COLOR, linewidth=1.2, alpha=0.8)
        late = jump.step > 0.6 * axes.get_xlim()[1]
        axes.annotate(
            f"jump x{jump.ratio:.2f}\nstep {jump.step} = {clock.seconds(jump.step):.1f} s",
            (jump.step, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, 5),
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom",
            fontsize=8,
            color=JUMP_COLOR,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )


def layer_colors(layers: Collection[int]) -> dict[int, Any]:
    """Dark to light with depth."""
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, max(1, len(layers))))
    return dict(zip(layers, shades, strict=True))


def depth_bar(figure: Figure, axes: Axes, layers: int) -> None:
    """Colour scale of `layer_colors`, where a legend would be too long."""
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, 256))
    scale = ScalarMappable(
        Normalize(0, layers - 1), mpl.colors.LinearSegmentedColormap.from_list("depth", shades)
    )
    figure.colorbar(scale, ax=axes, pad=0.01, label="layer")


def run_colors(count: int) -> Sequence[Any]:
    """Distinct colours for a few runs; for more, one scale from the first to the last."""
    if count <= 4:
        return COLORS[:count]
    return list(mpl.colormaps["plasma"](np.linspace(0.0, 0.88, count)))


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 8 if max(map(len, labels)) < 14 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def title(axes: Axes, text: str, trace: Trace, *, note_axes: Axes | None = None) -> None:
    """What is shown on the left; who was measured and how, in a lighter hand, on the right."""
    axes.set_title(text)
    count = trace.input_norm.shape[0]
    of = f"median of {count} streams, " if count > 1 else ""
    (note_axes or axes).set_title(
        f"{trace.label}, {of}rolling median of {SMOOTH_STEPS} steps",
        loc="right",
        fontsize=8.5,
        fontweight="normal",
        color="#666666",
    )
