"""A study of recall as tables in Markdown: what its figure shows, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from moshi_ttt.report.recall import GROUP_NAMES
from moshi_ttt.report.study import Record, Variant
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import MEMORIES, Share, beyond_window
from moshi_ttt.teacher_forcing.recordings import RATIO_SHARES

NOTE = (
    "Means over seeds, with the lowest and the highest of several (in round brackets), or with the "
    "95 % interval of one (in square brackets)."
)
LOUD_NOTE = (
    "Gates: the quietest and the loudest layer's root mean square. Branch ratio: of the layer in "
    "which it is largest, over all positions that were read."
)


def study_table(variants: Sequence[Variant]) -> str:
    """All tables of a study: training and loudness, recall of each class, loss by minute."""
    tables = [NOTE, _training(variants), LOUD_NOTE]
    for group in GROUP_NAMES:
        if any(variant.seeds("kept", group) for variant in variants):
            tables.append(_recall(variants, group))
    return "\n\n".join([*tables, _loss(variants)]) + "\n"


def _training(variants: Sequence[Variant]) -> str:
    header = ("variant", "seeds", "parameters trained", "updates", "training (s)", "gates")
    rows = []
    for variant in variants:
        records = variant.records
        updates = records[0]["variant"].get("steps", 0)
        gates = [*chain(*(record["gates"].values() for record in records))]
        rows.append(
            (
                variant.name,
                str(len(records)),
                f"{records[0]['parameters']:,}" if updates else "0",
                str(updates),
                _spread([record["trained_sec"] for record in records], ".0f") if updates else "-",
                f"{min(gates):.2f} to {max(gates):.2f}" if gates else "-",
                *(
                    _spread([_loudest(record, name) for record in records], ".3f")
                    for name in RATIO_SHARES
                ),
            )
        )
    return _table((*header, *(f"branch ratio: {name}" for name in RATIO_SHARES)), rows)


def _loudest(record: Record, quantile: str) -> float | None:
    """A quantile of the branch ratio, of the layer in which it is largest."""
    return max((ratios[quantile] for ratios in record["branch_ratios"].values()), default=None)


def _recall(variants: Sequence[Variant], group: str) -> str:
    """Answer words right of one class of facts, a row a variant and memory."""
    found = [
        (variant, memory, seeds)
        for variant in variants
        for memory in MEMORIES
        if (seeds := variant.seeds(memory, group))
    ]
    gaps = sorted({gap for *_, seeds in found for gap in seeds[0]["gap_sec"]})
    rows = []
    for variant, memory, seeds in found:
        words = seeds[0]["words"]
        shares = zip(*(map(_share, one["accuracy"], words) for one in seeds), strict=True)
        cells = dict(zip(seeds[0]["gap_sec"], map(_percent, shares), strict=True))
        beyond = [_beyond(record, memory, group) for record in variant.records]
        rows.append(
            (
                *(variant.name, memory, f"{sum(words):.0f}"),
                *(cells.get(gap, "-") for gap in gaps),
                _percent([share for share in beyond if share is not None]),
            )
        )
    header = ("variant", "memory", "words", *(f"{gap:g} s" for gap in gaps), "beyond the window")
    asked = found[0][-1][0]
    guessed = np.average(asked["chance"], weights=asked["words"])
    title = (
        f"**Recall, {GROUP_NAMES[group]}**: answer words right, in %, by seconds since the fact; "
        f"guessing among the values of the kind gives {100 * guessed:.0f}"
    )
    return f"{title}\n\n{_table(header, rows)}"


def _share(accuracy: float, words: float) -> Share:
    return Share(accuracy * words, words)


def _beyond(record: Record, memory: str, group: str) -> Share | None:
    """Of all gaps that attention's window does not reach over; None if there are none."""
    if record["context_sec"] is None:
        return None
    return beyond_window(record["recall"], record["context_sec"]).get(group, {}).get(memory)


def _percent(seeds: Sequence[Share]) -> str:
    """Mean of the seeds and their range, or the interval of a single one; `-` without any."""
    if not seeds:
        return "-"
    shares = [one.share for one in seeds]
    mean = f"{sum(shares) / len(shares):.0%}"
    if len(seeds) > 1:
        return f"{mean} ({min(shares):.0%} to {max(shares):.0%})".replace("%", "")
    low, high = seeds[0].interval
    return f"{mean} [{low:.0%} to {high:.0%}]".replace("%", "")


def _loss(variants: Sequence[Variant]) -> str:
    """Teacher-forced loss minute by minute, a row a variant and group of rows."""
    rows = []
    for variant in variants:
        losses = [record["nll"] for record in variant.records]
        for group in GROUPS:
            minutes = zip(*(nll[group] for nll in losses), strict=True)
            spreads = (_spread(values, ".3f") for values in minutes)
            count = losses[0]["recordings"][-1]
            rows.append((variant.name, group.replace("_", " "), str(count), *spreads))
    minutes_shown = range(1, max(map(len, rows)) - 2)
    header = ("variant", "rows", "recordings", *(f"minute {minute}" for minute in minutes_shown))
    return f"**Loss by minute**: nats a token, teacher-forced\n\n{_table(header, rows)}"


def _spread(values: Iterable[float | None], form: str) -> str:
    """Mean, and the lowest and highest of several; `-` if none is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{sum(known) / len(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
