"""What the figures share: style, the three-clock position axis, marks, colours and smoothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.ndimage import median_filter

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump
from moshi_ttt.instruments.trace import Trace

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
    "figure.dpi": 160,
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
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
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

        time = axes.secondary_xaxis("top", functions=_scale(clock.step_sec))
        time.xaxis.set_major_formatter(FuncFormatter(both))
        time.set_xlabel("seconds, and legacy tokens below them", fontsize=8.5)


def _scale(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Conversion of an axis, and its inverse."""
    return (lambda value: value * factor, lambda scaled: scaled / factor)


def mark(
    axes: Axes,
    positions: Mapping[str, float],
    end: float,
    *,
    labels: bool = True,
    color: str = MARK_COLOR,
    paper: str = "white",
) -> None:
    """Dashed lines at structural positions before `end`; close neighbours share a label."""
    marks = [(at, name, color) for name, at in positions.items()]
    _draw_marks(axes, marks, end, labels=labels, paper=paper)


def mark_runs(
    axes: Axes,
    traces: Sequence[Trace],
    colors: Sequence[str],
    end: float,
    *,
    labels: bool,
    without: Collection[str] = (),
) -> None:
    """Structural positions of several runs: grey where all share them, else in the run's colour."""
    own = [trace.critical_steps() for trace in traces]
    marks: dict[tuple[int, str], str] = {}
    for positions, color in zip(own, colors, strict=True):
        for name, at in positions.items():
            shared = all(other.get(name) == at for other in own)
            if name not in without:
                marks.setdefault((at, name), MARK_COLOR if shared else color)
    _draw_marks(axes, [(*place, color) for place, color in marks.items()], end, labels=labels)


def _draw_marks(
    axes: Axes,
    marks: Sequence[tuple[float, str, str]],
    end: float,
    *,
    labels: bool,
    paper: str = "white",
) -> None:
    """Lines of (position, name, colour), and labels for groups that are too close for their own."""
    grid = axes.get_subplotspec()
    slot = 0.021 * end * (grid.get_gridspec().ncols if grid else 1)  # width of a line of a label
    groups: list[list[tuple[float, str, str]]] = []
    for one in sorted((one for one in marks if 0 < one[0] < end), key=lambda one: one[0]):
        axes.axvline(one[0], color=one[2], linestyle=(0, (4, 3)), linewidth=1)
        if groups and one[0] - groups[-1][-1][0] < slot:
            groups[-1].append(one)
        else:
            groups.append([one])
    taken = 0.0
    for group in groups if labels else ():
        names = list(dict.fromkeys(name for _, name, _ in group))
        colors = {color for _, _, color in group if color != MARK_COLOR}
        right = group[0][0] - taken < slot * len(names)
        taken = group[-1][0] + (slot * len(names) if right else 0.0)
        axes.annotate(
            "\n".join(names),
            (group[-1 if right else 0][0], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3 if right else -3, -4),
            textcoords="offset points",
            rotation=90,
            ha="left" if right else "right",
            va="top",
            fontsize=7.5,
            color=colors.pop() if len(colors) == 1 else group[0][2],
            bbox={"facecolor": paper, "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
        )


def mark_jumps(axes: Axes, jumps: Sequence[Jump], clock: Clock) -> None:
    """A line and a label (size, position) at the foot of the axes for every jump found."""
    for jump in jumps:
        if jump.gradual:
            axes.axvspan(jump.first_step, jump.last_step, color=JUMP_COLOR, alpha=0.15)
        else:
            axes.axvline(jump.step, color=JUMP_COLOR, linewidth=1.2, alpha=0.8)
        kind = "growth" if jump.gradual else "jump"
        late = jump.step > 0.6 * axes.get_xlim()[1]
        axes.annotate(
            f"{kind} x{jump.ratio:.2f}\nstep {jump.step} = {clock.seconds(jump.step):.1f} s",
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


def layer_colors(layers: Collection[int]) -> dict[int, str]:
    """Dark to light with depth."""
    return dict(zip(layers, _shades("viridis", len(layers)), strict=True))


def depth_bar(figure: Figure, axes: Axes, layers: int) -> None:
    """Colour scale of `layer_colors`, where a legend would be too long."""
    scale = ScalarMappable(Normalize(0, layers - 1), ListedColormap(_shades("viridis", 256)))
    figure.colorbar(scale, ax=axes, pad=0.01, label="layer")


def run_colors(count: int) -> Sequence[str]:
    """Distinct colours for a few runs; for more, one scale from the first to the last."""
    if count <= 4:
        return COLORS[:count]
    return _shades("plasma", count)


def _shades(name: str, count: int) -> list[str]:
    """Evenly spaced colours of a map, without its palest end."""
    return [to_hex(color) for color in mpl.colormaps[name](np.linspace(0.0, 0.88, count))]


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 8 if max(map(len, labels)) < 14 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def title(axes: Axes, text: str, trace: Trace) -> None:
    """What is shown on the left; who was measured and how, in a lighter hand, on the right."""
    axes.set_title(text)
    count = trace.input_norm.shape[0]
    of = f"median of {count} streams, " if count > 1 else ""
    note = f"{trace.label}, {of}rolling median of {SMOOTH_STEPS} steps"
    side_note(axes, note)


def side_note(axes: Axes, text: str) -> None:
    """Beside the title, on the right, in a lighter hand."""
    axes.set_title(text, loc="right", fontsize=8.5, fontweight="normal", color="#666666")
