"""Variants of a study beside one another, by when in a conversation they were asked."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moshi_ttt.clock import Clock
from moshi_ttt.report.asked import Spans, asked_axes, asked_spans
from moshi_ttt.report.recall import BANDED_CURVES, DASHES, KEPT_STYLE
from moshi_ttt.report.study import Record, Variant
from moshi_ttt.report.style import COLORS, legend_below, run_colors, side_note, styled
from moshi_ttt.teacher_forcing.recall import wilson_interval

OWN_SEC = (20, 120)
"""Gaps of the facts that all variants are compared by, whatever they see."""
JUST_BEFORE_SEC = 15
"""Longer ago are the gaps from the first of `OWN_SEC` on."""


def own_asked(record: Record) -> tuple[int, dict[str, Spans]]:
    """Own facts from `OWN_SEC[0]` seconds on by when they were asked, as `asked_spans` has it."""
    return asked_spans(record["recall"], JUST_BEFORE_SEC, "own", Clock())


@styled
def asked_study_figure(variants: Sequence[Variant]) -> Figure:
    """Share of answer words to own facts that are right against the minute of the conversation.

    A curve a variant with its memory kept, and a dashed one with the memory reset before each
    question: means over seeds, with the 95 % interval for the words of one, and bars from the
    lowest to the highest of several.

    Args:
        variants: at least one of which something was asked.
    """
    colors = COLORS if len(variants) <= len(COLORS) else run_colors(len(variants))
    figure = Figure(figsize=(10, 4.4))
    axes = figure.add_subplot()
    for color, variant in zip(colors, variants, strict=False):
        found = [own_asked(record) for record in variant.records]
        length = found[0][0]
        for memory in ("kept", "reset"):
            seeds = [of[memory] for _, of in found if memory in of]
            if seeds:
                label = variant.name if memory == "kept" else f"{variant.name}, reset"
                _curve(axes, seeds, length, memory, color, label, len(variants) <= BANDED_CURVES)
    asked_axes(axes)
    axes.set_title(f"Recall of own facts, {OWN_SEC[0]} s and more before the question")
    side_note(axes, "dashed: memory reset; shaded: 95 % intervals; bars: seeds")
    legend_below(figure, axes)
    return figure


def _curve(
    axes: Axes,
    seeds: Sequence[Spans],
    length: int,
    memory: str,
    color: str,
    label: str,
    banded: bool,
) -> None:
    at = [minute + length / 2 for minute in seeds[0]]
    shares = [[one[minute].share for one in seeds] for minute in seeds[0]]
    means = [sum(one) / len(one) for one in shares]
    if memory == "kept":
        axes.plot(at, means, color=color, label=label, **KEPT_STYLE)
        axes.vlines(at, [min(one) for one in shares], [max(one) for one in shares], color)
    else:
        axes.plot(at, means, DASHES[memory], color=color, label=label, linewidth=0.9)
    if banded and memory == "kept":
        words = [one.words for one in seeds[0].values()]
        pairs = map(wilson_interval, means, words)
        low, high = zip(*pairs, strict=True)
        axes.fill_between(at, low, high, color=color, alpha=0.13, linewidth=0)
