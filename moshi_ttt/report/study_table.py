"""A study as tables in Markdown: all of it at a glance, and then what it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np

from moshi_ttt.report.asked_study import OWN_SEC
from moshi_ttt.report.drift import LOSSES, TALK, against, by_minute, lasting
from moshi_ttt.report.study import Record, Variant
from moshi_ttt.report.study_cells import markdown, percent, spread
from moshi_ttt.report.study_recall import own_share, recall_tables
from moshi_ttt.teacher_forcing.recordings import RATIO_SHARES

NOTE = (
    "Means over seeds, with the lowest and the highest of several (in round brackets), or with the "
    "95 % interval of one (in square brackets)."
)
GLANCE_NOTE = (
    "Own facts: answer words right, in %, with the memory kept and reset, of facts that Moshi "
    "itself said 20 to 120 s before; longer ago: those from further back. Losses: the last "
    "minute over the first, and in brackets that over {first}'s, because what is talked about is "
    "the same for all. Norms: of the layer whose input grew most, end over start. Branch: what "
    "the loudest memory adds, over the residual. Words a minute, silence, different text tokens "
    "and codes in use (%), how far the voice is from the first minute's (dB; in that, its halves "
    "from each other) and how much of its text a recogniser hears (%): the first and the last "
    "minute of free talk. Means over seeds and streams; `-`: not measured."
)
UNITS = {"words_per_minute": (".0f", 1), "voice_distance_db": (".1f", 1)}
"""How measures of free talk are written that are no shares."""
LAST = "last / first"
SPANS_SEC = (OWN_SEC, (OWN_SEC[1] + 1, math.inf))
LOUD_NOTE = (
    "Gates: the quietest and the loudest layer's root mean square. Branch ratio: of the layer in "
    "which it is largest, over all positions that were read."
)


def study_table(variants: Sequence[Variant]) -> str:
    """All tables of a study: the whole, training and loudness, recall of each class, minutes."""
    tables = [_glance(variants), NOTE, _training(variants), LOUD_NOTE]
    tables += [*recall_tables(variants), *_talk(variants), *_loss(variants)]
    return "\n\n".join(tables) + "\n"


def _glance(variants: Sequence[Variant]) -> str:
    """A row a variant, with everything that it is judged by."""
    header = (
        *(
            "variant",
            "own facts",
            "reset",
            "longer ago",
            "reset",
            *(f"loss of {_words(name)}" for name in LOSSES),
        ),
        *("jump", "norms", "branch", *(_words(label) for label in TALK.values())),
        *("ms a step", "KiB a stream"),
    )
    rows = []
    for one in variants:
        talks = [record["talk"] for record in one.records if "talk" in record]
        rows.append(
            (
                one.name,
                *(
                    percent(own_share(one, *asked))
                    for asked in product(SPANS_SEC, ("kept", "reset"))
                ),
                *(_lasting(one, variants[0], name) for name in LOSSES),
                _jump([jump for talk in talks for jump in talk["jumps"]], talks),
                *(_mean(talks, name, ".2f") for name in ("norm_growth", "branch_ratio")),
                *(_first_and_last(one, name) for name in TALK),
                _mean(talks, "step_ms", ".1f"),
                _mean(talks, "state_bytes", ".0f", 1024),
            )
        )
    return f"{markdown(header, rows)}\n\n{GLANCE_NOTE.format(first=variants[0].name)}"


def _words(label: str) -> str:
    return label.replace("\n", " ").replace("_", " ")


def _lasting(variant: Variant, first: Variant, name: str) -> str:
    ratio, beside = (
        spread([value], ".2f")
        for value in (float(np.mean(lasting(variant, name))), against(variant, first, name))
    )
    return "-" if ratio == "-" else f"{ratio} ({beside})"


def _jump(jumps: Sequence[Mapping[str, Any]], talks: Sequence[Mapping[str, Any]]) -> str:
    """The largest of all seeds, and where it is."""
    sudden = [jump for jump in jumps if not jump["gradual"]]
    if not any(talk["searched"] for talk in talks):
        return "-"
    if not sudden:
        return "none"
    largest = max(sudden, key=lambda jump: float(jump["ratio"]))
    return f"x{largest['ratio']:.2f} at {largest['seconds']:.0f} s"


def _mean(talks: Sequence[Mapping[str, Any]], name: str, form: str, unit: float = 1) -> str:
    known = [talk[name] / unit for talk in talks if talk[name] is not None]
    return f"{sum(known) / len(known):{form}}" if known else "-"


def _first_and_last(variant: Variant, name: str) -> str:
    seeds = [values for record in variant.records if (values := by_minute(record, name))]
    if not seeds:
        return "-"
    form, unit = UNITS.get(name, (".0f", 100))
    ends = (0, -1) if len(seeds[0]) > 1 else (0,)
    means = [float(np.mean([values[at] for values in seeds])) * unit for at in ends]
    return ", ".join(f"{mean:{form}}" if np.isfinite(mean) else "-" for mean in means)


def _training(variants: Sequence[Variant]) -> str:
    header = ("variant", "seeds", "parameters trained", "updates", "training (s)", "gates")
    rows = []
    for variant in variants:
        records = variant.records
        row = records[0]["variant"]
        updates = row.get("steps", 0)
        gates = [*chain(*(record["gates"].values() for record in records))]
        rows.append(
            (
                variant.name,
                str(len(records)),
                f"{records[0]['parameters']:,}" if updates else "0",
                f"as {row['weights']}" if row.get("weights") else str(updates),
                spread([record["trained_sec"] for record in records], ".0f") if updates else "-",
                f"{min(gates):.2f} to {max(gates):.2f}" if gates else "-",
                *(
                    spread([_loudest(record, name) for record in records], ".3f")
                    for name in RATIO_SHARES
                ),
            )
        )
    return markdown((*header, *(f"branch ratio: {name}" for name in RATIO_SHARES)), rows)


def _loudest(record: Record, quantile: str) -> float | None:
    """A quantile of the branch ratio, of the layer in which it is largest."""
    return max((ratios[quantile] for ratios in record["branch_ratios"].values()), default=None)


def _loss(variants: Sequence[Variant]) -> list[str]:
    """Teacher-forced loss minute by minute, a row a variant and group of rows; none without any."""
    rows = []
    for variant in variants:
        for group in LOSSES:
            if minutes := _minutes(variant, group, ".3f"):
                count = str(variant.records[0]["nll"]["recordings"][-1])
                ratios = spread(lasting(variant, group), ".3f"), _beside(variant, variants, group)
                rows.append((variant.name, _words(group), count, *minutes, *ratios))
    ratios = LAST, f"over {variants[0].name}'s"
    header = _minutes_header(("variant", "rows", "recordings"), rows, ratios)
    return (
        ["**Loss by minute**: nats a token, teacher-forced", markdown(header, rows)] if rows else []
    )


def _talk(variants: Sequence[Variant]) -> list[str]:
    """Free talk minute by minute, a row a variant and measure; none without any."""
    rows = []
    for variant in variants:
        for name, label in TALK.items():
            if minutes := _minutes(variant, name, ".3g"):
                ratio = spread(lasting(variant, name), ".2f")
                rows.append((variant.name, _words(label), *minutes, ratio))
    header = _minutes_header(("variant", "measure"), rows, (LAST,))
    title = "**Free talk by minute** since the prompt: means over streams"
    return [title, markdown(header, rows)] if rows else []


def _minutes(variant: Variant, name: str, form: str) -> list[str]:
    """A cell a minute; none if it was not measured."""
    seeds = [by_minute(record, name) for record in variant.records]
    return [spread(values, form) for values in zip(*seeds, strict=True)]


def _minutes_header(
    before: Sequence[str], rows: Sequence[Sequence[str]], after: Sequence[str]
) -> list[str]:
    count = max((len(row) for row in rows), default=0) - len(before) - len(after)
    return [*before, *(f"minute {minute}" for minute in range(1, count + 1)), *after]


def _beside(variant: Variant, variants: Sequence[Variant], group: str) -> str:
    return spread([against(variant, variants[0], group)], ".3f")
