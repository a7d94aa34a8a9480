"""A study: its records, and recall as a figure, the seeds of each variant together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moshi_ttt.errors import UserError
from moshi_ttt.report.recall import (
    BANDED_CURVES,
    DASHES,
    GROUP_NAMES,
    KEPT_STYLE,
    LABELLED_TOP,
    Bins,
    Curve,
    accuracy_panel,
    gap_axis,
    mark_gaps,
    shared_words,
    shown_groups,
)
from moshi_ttt.report.style import COLORS, legend_below, run_colors, side_note, styled
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.recall import wilson_interval

Record = Mapping[str, Any]
"""Content of `OUT/NAME.json`, as scripts/study.py writes it."""
FIELDS = frozenset(
    {
        *("variant", "trained_sec", "parameters", "context_steps", "context_sec"),
        *("recall", "nll", "gates", "branch_ratios"),
    }
)
"""What every record holds; `talk` and `free_answers` if they were asked for."""
WINDOW = "attention window"
PLAIN_TOP = 1.05  # of a panel without labels
SEED = re.compile(r"_seed\d+$")


def read_record(path: Path) -> Record:
    """One variant's results.

    Raises:
        UserError: they are those of an earlier version.
    """
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    missing = FIELDS - record.keys()
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(sorted(missing))}, as an earlier version wrote it; move it "
            "away and start the study again, which runs what is missing"
        )
    return record


def record_lines(name: str, found: Record) -> str:
    """What came of one variant, on a few lines."""
    lines = [f"{name}: {found['trained_sec']:.0f} s, {found['parameters']:,} trainable"]
    for memory, recall in found["recall"].items():
        for group, bins in recall.items():
            lines.append(f"  {memory:6} {group:13} {_shares(bins, 'accuracy', 'words')}")
    for memory, recall in found.get("free_answers", {}).items():
        for group, bins in recall.items():
            lines.append(f"  said, {memory:6} {group:13} {_shares(bins, 'right', 'questions')}")
    for group in GROUPS:
        values = " ".join(f"{value:.3f}" for value in found["nll"][group])
        lines.append(f"  nll {group:16} {values}")
    if talk := found.get("talk"):
        for jump in talk["jumps"]:
            kind = "growth" if jump["gradual"] else "jump"
            lines.append(f"  {kind} x{jump['ratio']:.2f} at {jump['seconds']:.0f} s")
        for measure, values in talk["by_minute"].items():
            lines.append(f"  talk {measure:21} {' '.join(f'{value:.3g}' for value in values)}")
    lines.append("  gates " + " ".join(f"{gate:.2f}" for gate in found["gates"].values()))
    ratios = [f"{one['median']:.2f}/{one['p99']:.2f}" for one in found["branch_ratios"].values()]
    lines.append("  branch ratios (median/p99) " + " ".join(ratios))
    return "\n".join(lines)


def _shares(bins: Mapping[str, Sequence[float]], share: str, count: str) -> str:
    columns = zip(bins["gap_sec"], bins[share], bins[count], strict=True)
    return "  ".join(f"{gap:g}s {right:.0%}/{of:.0f}" for gap, right, of in columns)


@dataclass(frozen=True, slots=True)
class Variant:
    """Records that differ in their seed alone."""

    name: str
    records: tuple[Record, ...]

    def seeds(self, memory: str, group: str) -> list[Bins]:
        """Recall of each seed, as `recall_record` has it; empty if nothing was asked."""
        recalls = [record["recall"].get(memory, {}) for record in self.records]
        return [recall[group] for recall in recalls if group in recall]

    def mean(self, memory: str, group: str) -> Bins | None:
        """Mean accuracy over seeds, and what was asked; None if nothing was.

        The interval is that of the mean for the words of one seed, because all seeds are asked for
        the same ones; `least` and `most` are the seeds' own.
        """
        seeds = self.seeds(memory, group)
        if not seeds:
            return None
        shares = np.array([one["accuracy"] for one in seeds])
        means = shares.mean(axis=0).tolist()
        pairs = zip(means, seeds[0]["words"], strict=True)
        low, high = zip(*(wilson_interval(mean, words) for mean, words in pairs), strict=True)
        found = {"accuracy": means, "low": low, "high": high}
        found |= {"least": shares.min(axis=0).tolist(), "most": shares.max(axis=0).tolist()}
        return found | {name: seeds[0][name] for name in ("gap_sec", "words", "chance")}


def variants_of(records: Sequence[Record]) -> list[Variant]:
    """Records in their order; those of `NAME`, `NAME_seed1`, ... are one variant.

    Raises:
        UserError: seeds of a variant differ in something else, or one name has two records.
    """
    names = Counter(record["variant"]["name"] for record in records)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{', '.join(twice)}: in more than one of these folders; give one of them")
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(SEED.sub("", record["variant"]["name"]), []).append(record)
    for first, *others in groups.values():
        for other in others:
            if _but_for_the_seed(other) != _but_for_the_seed(first):
                raise UserError(
                    f"{other['variant']['name']} differs from {first['variant']['name']} in more "
                    "than its seed, or was asked other questions; give it another name"
                )
    return [Variant(name, tuple(alike)) for name, alike in groups.items()]


def _but_for_the_seed(record: Record) -> list[Any]:
    """What is the same for all seeds of a variant: settings, window, and the words asked for."""
    variant = {**record["variant"], "name": None, "seed": None}
    # which are those of the same seed of another variant
    variant["weights"] = SEED.sub("", variant.get("weights") or "")
    asked = {
        group: (bins["gap_sec"], bins["words"])
        for group, bins in record["recall"].get("kept", {}).items()
    }
    return [variant, record["context_steps"], asked]


@styled
def study_figure(variants: Sequence[Variant]) -> Figure:
    """Share of answer words that are right against gap, a panel a class of facts.

    A curve a variant with its memory kept, and a dashed one with the memory reset before each
    question. Shaded: 95 % intervals; bars: from the lowest to the highest of several seeds.

    Args:
        variants: at least one of which something was asked.
    """
    colors = COLORS if len(variants) <= len(COLORS) else run_colors(len(variants))
    kept = [variant.records[0]["recall"].get("kept", {}) for variant in variants]
    groups = shown_groups(dict.fromkeys(chain(*kept)))
    figure = Figure(figsize=(10, 1.4 + 3 * len(groups)))
    heights = [LABELLED_TOP] + [PLAIN_TOP] * (len(groups) - 1)
    grid = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    panels = grid[:, 0]
    curves = {group: _curves(variants, group, colors) for group in groups}
    for axes, group in zip(panels, groups, strict=True):
        accuracy_panel(axes, curves[group])
        for one in curves[group]:
            axes.vlines(one.bins["gap_sec"], one.bins["least"], one.bins["most"], one.color)
        axes.set_ylabel(f"{GROUP_NAMES[group]}: answer words right")
    for axes in panels[1:]:
        axes.set_ylim(0, PLAIN_TOP)
    gap_axis(panels[-1], [*chain(*curves.values())], shared_words(curves))
    windows = [
        {} if (seconds := variant.records[0]["context_sec"]) is None else {WINDOW: seconds}
        for variant in variants
    ]
    for axes in panels:
        mark_gaps(axes, windows, colors[: len(variants)], labels=axes is panels[0])
    panels[0].set_title("Recall of planted facts on held-out recordings")
    shown = {
        "dashed: memory reset before each question": any(
            "reset" in variant.records[0]["recall"] for variant in variants
        ),
        "shaded: 95 % intervals": len(variants) <= BANDED_CURVES,
        "bars: seeds": any(len(variant.records) > 1 for variant in variants),
    }
    side_note(panels[0], "; ".join(what for what, is_there in shown.items() if is_there))
    legend_below(figure, panels[0])
    return figure


def _curves(variants: Sequence[Variant], group: str, colors: Sequence[str]) -> list[Curve]:
    banded = len(variants) <= BANDED_CURVES
    curves = []
    for color, variant in zip(colors, variants, strict=False):
        bins = variant.mean("kept", group)
        if bins is not None:
            curves.append(Curve(variant.name, bins, color, KEPT_STYLE, banded))
        bins = variant.mean("reset", group)
        if bins is not None:
            style = {"linestyle": DASHES["reset"], "marker": ".", "linewidth": 0.9}
            curves.append(Curve(f"{variant.name}, reset", bins, color, style, banded))
    return curves
