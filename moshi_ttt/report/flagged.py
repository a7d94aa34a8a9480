"""The part of a report that says what of the talk went bad, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from moshi_ttt.clock import Clock
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.style import COLORS, mark, position_axis, styled

REASONS = {
    "silence": ("nobody speaks", "s"),
    "text_loop": ("words said again", "of the steps"),
    "sound_loop": ("sounds made again", "of the steps"),
    "noise": ("noise", "spectral flatness"),
    "clipping": ("clipping", "of the samples"),
    "code_collapse": ("few codes", "of the codes not new"),
    "text_surprise": ("surprising words", "nats above its first minute"),
    "sound_surprise": ("surprising sound", "nats above its first minute"),
}
"""Words for the reasons of `monitor.THRESHOLDS`, and units of their measures."""


@styled
def flagged_figure(segments: Mapping[str, Any], trace: Trace) -> Figure:
    """A strip over time for each stream, with a line and a colour for each reason."""
    streams = len(trace.streams)
    figure = Figure(figsize=(10, 2.2 + 0.55 * streams))
    axes = figure.add_subplot()
    height = 0.8 / len(REASONS)
    for number in range(streams):
        looked_at = segments["stop_step"] - segments["first_step"]
        axes.broken_barh(
            [(segments["first_step"], looked_at)], (number - 0.4, 0.8), color="#eef0f2"
        )
    for (reason, (words, _)), line, color in zip(REASONS.items(), range(8), COLORS, strict=True):
        axes.plot([], color=color, linewidth=5, label=words)
        for one in segments["segments"]:
            if one["reason"] == reason:
                span = (one["step"], one["stop_step"] - one["step"])
                axes.broken_barh([span], (one["stream"] - 0.4 + line * height, height), color=color)
    axes.set_ylim(streams - 0.5, -0.5)
    axes.set_yticks(range(streams), [f"stream {number}" for number in range(streams)])
    axes.grid(False)
    axes.set_title("Talk that was flagged")
    figure.legend(loc="outside lower center", ncols=4)
    position_axis(axes, trace.clock, trace.steps)
    mark(axes, trace.critical_steps(), trace.steps, labels=False)
    return figure


def flagged_section(segments: Mapping[str, Any], clock: Clock) -> list[str]:
    """What was flagged, in a sentence and a table, as HTML."""
    if segments["shares"]["any"] is None:
        return ["<h3>What went bad?</h3>", html.paragraph("The talk is shorter than a window.")]
    rows = [
        [
            one["stream"],
            f"{one['seconds']:.1f}",
            f"{one['end_sec']:.1f}",
            one["step"],
            one["legacy_token"],
            REASONS[one["reason"]][0],
            f"{one['worst']:.3g} {REASONS[one['reason']][1]}",
            f"{segments['thresholds'][one['reason']]:.3g}",
        ]
        for one in segments["segments"]
    ]
    header = ("stream", "from s", "to s", "step", "legacy token", "why", "worst", "threshold")
    seconds = clock.seconds(segments["stop_step"] - segments["first_step"])
    sentence = f"Of {seconds:.0f} s of each stream {flagged_shares(segments)}"
    note = (
        f"Windows of {segments['window_sec']:g} s after the prompt. The thresholds are what "
        "held-out real speech seldom passes; docs/quality.md says how seldom."
    )
    return [
        "<h3>What went bad?</h3>",
        html.points([sentence]),
        *([html.table(header, rows)] if rows else []),
        html.paragraph(note, kind="note"),
    ]


def flagged_shares(segments: Mapping[str, Any]) -> str:
    """`7 % is flagged: nobody speaks 5 %, noise 2 %.`"""
    shares = segments["shares"]
    reasons = [
        f"{words} {shares[name]:.0%}" for name, (words, _) in REASONS.items() if shares[name]
    ]
    return f"{shares['any']:.0%} is flagged" + ": " * bool(reasons) + ", ".join(reasons) + "."


def cues(segments: Mapping[str, Any] | None, stream: int) -> str:
    """When to listen to what in the sound of one stream, as HTML; nothing if all of it is fine."""
    found = [one for one in (segments or {}).get("segments", []) if one["stream"] == stream]
    found.sort(key=lambda one: one["step"])
    spans = [
        f"{one['seconds']:.0f}-{one['end_sec']:.0f} s {REASONS[one['reason']][0]}" for one in found
    ]
    return html.paragraph(f"Flagged: {'; '.join(spans)}.", kind="warning") if spans else ""
