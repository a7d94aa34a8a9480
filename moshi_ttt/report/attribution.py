"""Figures and the page of an attribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moshi_ttt.attribution.conditions import Cell, Condition
from moshi_ttt.attribution.evidence import Evidence
from moshi_ttt.attribution.verdict import Verdict
from moshi_ttt.clock import Clock
from moshi_ttt.files import write_bytes
from moshi_ttt.report import html
from moshi_ttt.report.figures import png
from moshi_ttt.report.style import COLORS, JUMP_COLOR, mark, middle, position_axis, styled

CAPTIONS = (
    "Norm of the examined layer over its level after the prompt, for every condition of one "
    "capacity (median of the streams, rolling median of 13 steps). Red: where the plain run rises "
    "most, and its 95 % interval; only drawn where a rise is present.",
    "Left: place of the rise against capacity, with the lines that the hypotheses predict. Right: "
    "share of the change that each intervention leaves, paired with the plain run of the same "
    "streams; below 50 % it takes the cause away. Bars: 95 % intervals from resampled streams.",
    "NLL of the recording that is forced, rolling mean of 100 steps: is the change paid for in "
    "prediction?",
)


def write_page(
    path: Path, evidence: Evidence, verdict: Verdict, cells: Sequence[Cell], clock: Clock
) -> None:
    """Write the verdict, its figures and its numbers as one self-contained page."""
    figures = [curves_figure(evidence, clock), effects_figure(evidence, verdict)]
    forced = [cell for cell in cells if cell.nll is not None]
    if forced:
        figures.append(nll_figure(forced, clock))
    streams = len(evidence.prompts)
    body = [
        html.bullets([verdict.headline]),
        html.table(
            ("hypothesis", "decision", "what was measured"),
            [(one.hypothesis, one.decision, "; ".join(one.reasons)) for one in verdict.findings],
        ),
        "<h2>What happens</h2>",
        *(html.paragraph(line) for line in verdict.observations),
    ]
    for figure, caption in zip(figures, CAPTIONS, strict=False):
        body.append(html.figure(png(figure), caption, caption.split(":")[0]))
    body += [
        "<h2>Method</h2>",
        html.paragraph(
            "All cells share prompts and random seeds and differ from the plain run in one thing. "
            "What the norm does with who speaks (Moshi's words within a second, the user's sound) "
            "is estimated within blocks of 8 s of the plain runs and taken out of all cells. "
            "A rise is the mean log norm of 40 steps after a place less that of 40 steps before "
            "it, less the curve's steady growth; whether there is one is tested at the place that "
            "the streams of the other prompts point to. Intervals are percentiles over 1000 "
            "resamples of prompts, then of streams within a prompt. Supported means that every "
            "prediction that was tested came true, refuted that one was contradicted. The jumps in "
            "an evaluation's report are found otherwise, by medians of 50 steps and from 15 % on: "
            "one run by itself must not mistake a burst for a rise. Here means are compared, as "
            "only they add up over resampled streams, in windows that the smallest ring holds "
            "twice, and runs are compared in pairs, so that 10 % can be told."
        ),
        html.table(
            ("cell", "C", "sinks", "start", "regime", "gates", "steps"),
            [
                (
                    cell.condition.name,
                    cell.condition.context_steps,
                    cell.condition.sinks,
                    cell.condition.start_position,
                    cell.condition.regime,
                    _gates(cell.condition),
                    cell.log_norm.shape[-1],
                )
                for cell in cells
            ],
        ),
    ]
    lead = f"{evidence.model}: {len(cells)} cells of {streams} streams"
    text = html.page("Why does the norm change?", [html.paragraph(lead, kind="lead"), *body])
    write_bytes(path, text.encode())


def _gates(one: Condition) -> str:
    if not one.has_memory:
        return "no memory"
    return "forced to 0" if one.gates_shut else "as trained"


def _label(one: Condition) -> str:
    parts: list[str] = [one.regime if one.regime != "silent" else "silent user"]
    if one.sinks:
        parts.append(f"{one.sinks} sinks")
    if one.start_position:
        parts.append(f"start at {one.start_position}")
    if one.gates_shut:
        parts.append("gates 0")
    return ", ".join(parts)


@styled
def curves_figure(evidence: Evidence, clock: Clock) -> Figure:
    """Norm against position, one panel a capacity, one curve a condition."""
    capacities = list(evidence.references)
    figure = Figure(figsize=(10.5, 2.9 * len(capacities) + 0.6))
    axes_of = np.atleast_1d(figure.subplots(len(capacities), 1, sharex=True, sharey=True))
    labels = sorted({_label(one) for one in evidence.where(lambda _: True)})
    plain = _label(next(iter(evidence.references.values())))  # drawn in black
    labels.remove(plain)
    colors = {plain: "#111111"} | {
        label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)
    }
    axes: Axes
    for row, (axes, capacity) in enumerate(zip(axes_of, capacities, strict=True)):
        for one in evidence.where(lambda one, c=capacity: one.context_steps == c):  # type: ignore[misc]
            curve = evidence.curve(one)
            first = evidence.first_step(one)
            steps = first + curve.shape[-1]
            relative = np.exp(curve - np.median(curve[:, :40], axis=1, keepdims=True))
            label = _label(one)
            axes.plot(
                np.arange(first, steps),
                middle(relative),
                color=colors[label],
                label=label,
                linewidth=1.9 if label == plain else 1.0,
                zorder=3 if label == plain else 2,
            )
        for found in evidence.located:
            if found.context_steps == capacity:
                axes.axvspan(found.step.low, found.step.high, color=JUMP_COLOR, alpha=0.18)
                axes.axvline(found.step.value, color=JUMP_COLOR, linewidth=1.2)
        position_axis(axes, clock, steps, above=row == 0, below=row == len(capacities) - 1)
        mark(axes, {"C": capacity, "2C": 2 * capacity}, steps)
        axes.set_ylabel(f"C = {capacity}\nnorm / early norm")
    handles = {
        label: line
        for axes in axes_of
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles))
    )
    title = f"input norm of layer {evidence.layer}"
    if evidence.followed > 0:
        title += ", without what follows who speaks"
    axes_of[0].set_title(title)
    return figure


@styled
def effects_figure(evidence: Evidence, verdict: Verdict) -> Figure:
    """Place against capacity, and what the interventions leave."""
    figure = Figure(figsize=(10.5, 4.2))
    place, left = figure.subplots(1, 2, width_ratios=(1, 1.15))
    capacities = np.array(list(evidence.references), dtype=float)
    for slope, name in ((1, "C"), (2, "2C")):
        ends = np.array([0.9 * capacities.min(), 1.1 * capacities.max()])
        place.plot(ends, slope * ends, color="#999999", linestyle=(0, (4, 3)), linewidth=1)
        place.annotate(name, (ends[1], slope * ends[1]), color="#666666", ha="right", va="bottom")
    for one in evidence.located:
        step = one.step
        place.errorbar(
            one.context_steps,
            step.value,
            yerr=[[max(0.0, step.value - step.low)], [max(0.0, step.high - step.value)]],
            fmt="o",
            color=JUMP_COLOR,
            capsize=4,
        )
    if not evidence.located:
        place.annotate("no rise at one place", (0.5, 0.9), xycoords="axes fraction", ha="center")
    place.set_xlabel("capacity C (steps)")
    place.set_ylabel("place of the rise (step)")
    place.set_title("Where it rises")

    shares = {}
    for finding in verdict.findings:
        for name, effect in finding.effects.items():
            if effect.known and name.startswith("left_"):
                shares[name.removeprefix("left_").replace("_", " ")] = effect
            if effect.known and name == "removed_by_sinks":
                shares["with sinks"] = type(effect)(
                    1 - effect.value, 1 - effect.high, 1 - effect.low
                )
    for row, effect in enumerate(shares.values()):
        left.errorbar(
            100 * effect.value,
            row,
            xerr=[[100 * (effect.value - effect.low)], [100 * (effect.high - effect.value)]],
            fmt="o",
            color=COLORS[0],
            capsize=4,
        )
    left.axvline(50, color="#999999", linestyle=(0, (4, 3)), linewidth=1)
    left.axvline(100, color="#cccccc", linewidth=1)
    left.axvline(0, color="#cccccc", linewidth=1)
    left.set_yticks(range(len(shares)), list(shares))
    left.set_ylim(-0.7, max(len(shares), 1) - 0.3)
    left.invert_yaxis()
    if not shares:
        left.annotate("no change to take away", (0.5, 0.5), xycoords="axes fraction", ha="center")
    left.set_xlabel("share of the change that is left (%)")
    left.set_title("What takes it away")
    return figure


@styled
def nll_figure(cells: Sequence[Cell], clock: Clock) -> Figure:
    """Teacher-forced NLL against position, with and without sinks."""
    figure = Figure(figsize=(10.5, 3.6))
    panels = figure.subplots(1, 2)
    window = 100
    for row, (axes, name) in enumerate(zip(panels, ("text", "first codebook"), strict=True)):
        for number, cell in enumerate(cells):
            assert cell.nll is not None
            series = cell.nll[:, row, cell.first_step :]
            known = np.isfinite(series)
            kernel = np.ones(window)
            sums = np.convolve(np.where(known, series, 0).sum(axis=0), kernel, "valid")
            counts = np.convolve(known.sum(axis=0), kernel, "valid")
            with np.errstate(invalid="ignore"):
                curve = sums / counts
            start = cell.first_step + window // 2
            axes.plot(
                np.arange(start, start + len(curve)),
                curve,
                color=COLORS[number % len(COLORS)],
                label=f"C = {cell.condition.context_steps}"
                + (f", {cell.condition.sinks} sinks" if cell.condition.sinks else ""),
            )
        position_axis(axes, clock, cells[0].log_norm.shape[-1], above=False)
        axes.set_title(f"NLL of the {name}")
        axes.set_ylabel("nats a token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return figure
