"""Recall by when it was asked for: whether a memory still answers late in a long conversation."""

from __future__ import annotations

from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moshi_ttt.clock import Clock
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.recall import DASHES, GROUP_NAMES, KEPT_STYLE, WITHOUT, shown_groups
from moshi_ttt.report.recall_words import percent
from moshi_ttt.report.style import COLORS, legend_below, styled
from moshi_ttt.teacher_forcing.controls import Recalls, Share, by_when_asked

FEW_MINUTES = 8
"""Conversations of up to so many are shown minute by minute, longer ones in fives."""

Spans = dict[int, Share]
"""Answer words by the minute, counted from 0, in which a stretch of the conversation begins."""


def asked_spans(
    recalls: Recalls, window_sec: float, group: str, clock: Clock
) -> tuple[int, dict[str, Spans]]:
    """Answers beyond attention's window by minutes of the conversation.

    Args:
        recalls: content of `probes.json`.
        window_sec: attention's context.
        group: class of facts.
        clock: of the codec.

    Returns:
        How many minutes a span has, and by memory what was answered in each; no memory if nothing
        says when it was asked.
    """
    found = by_when_asked(recalls, window_sec, group)
    last = max((step for of in found.values() for step in of), default=0)
    length = 1 if clock.seconds(last) < 60 * FEW_MINUTES else 5
    pooled: dict[str, Spans] = {}
    for memory, of in found.items():
        spans = pooled.setdefault(memory, {})
        for step, one in of.items():
            first = int(clock.seconds(step) / 60 // length) * length
            spans[first] = spans.get(first, Share()) + one
    return length, pooled


def asked_at_times(recalls: Recalls, trace: Trace) -> bool:
    """Whether there is anything to compare: questions beyond the window in two spans or more."""
    window_sec = trace.clock.seconds(trace.context_steps)
    return any(
        len(spans) > 1
        for group in shown_groups(recalls["kept"])
        for spans in asked_spans(recalls, window_sec, group, trace.clock)[1].values()
    )


@styled
def asked_figure(recalls: Recalls, trace: Trace) -> Figure:
    """Answer words right beyond the window against the minutes in which they were asked for."""
    window_sec = trace.clock.seconds(trace.context_steps)
    figure = Figure(figsize=(10, 3.6))
    axes = figure.add_subplot()
    groups = shown_groups(recalls["kept"])
    for group, color in zip(groups, COLORS, strict=False):
        length, of = asked_spans(recalls, window_sec, group, trace.clock)
        for memory, spans in of.items():
            at = [minute + length / 2 for minute in spans]
            shares = [one.share for one in spans.values()]
            if memory == "kept":
                low, high = zip(*(one.interval for one in spans.values()), strict=True)
                axes.plot(at, shares, color=color, label=GROUP_NAMES[group], **KEPT_STYLE)
                axes.fill_between(at, low, high, color=color, alpha=0.13, linewidth=0)
            else:
                label = f"{GROUP_NAMES[group]}, {WITHOUT[memory]}"
                axes.plot(at, shares, DASHES[memory], color=color, linewidth=0.9, label=label)
    asked_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Recall beyond {window_sec:g} s by when it was asked for, teacher-forced")
    legend_below(figure, axes)
    return figure


def asked_axes(axes: Axes) -> None:
    """Shares of answer words against minutes of the conversation."""
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("answer words right")
    axes.set_xlabel("minutes of the conversation before the question")


def asked_finding(recalls: Recalls, trace: Trace) -> list[str]:
    """A sentence on the earlier and the later half of the answers to own facts, if it is known."""
    window_sec = trace.clock.seconds(trace.context_steps)
    kept = by_when_asked(recalls, window_sec, "own").get("kept", {})
    shares = [*kept.values()]
    so_far = [*accumulate(one.words for one in shares)]
    parted = sum(words <= so_far[-1] / 2 for words in so_far)
    if not parted:
        return []
    early, late = sum(shares[:parted], Share()), sum(shares[parted:], Share())
    minutes = trace.clock.seconds([*kept][parted]) / 60
    return [
        f"By when it was asked, own facts beyond the window: {percent(early)} before minute "
        f"{minutes:.1f} of the conversation, {percent(late)} from then on."
    ]
