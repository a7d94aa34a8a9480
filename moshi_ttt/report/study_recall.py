"""What a study recalls, as tables: by gap and class, by when it was asked, by rivals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moshi_ttt.report.asked_study import JUST_BEFORE_SEC, OWN_SEC, own_asked
from moshi_ttt.report.recall import GROUP_NAMES
from moshi_ttt.report.recall_words import RIVALS_SAID
from moshi_ttt.report.study import Record, Variant
from moshi_ttt.report.study_cells import markdown, percent
from moshi_ttt.teacher_forcing.controls import MEMORIES, Share, beyond_window, by_rivals


def recall_tables(variants: Sequence[Variant]) -> list[str]:
    """Answer words right of each class of facts; of own facts, by when they were asked and by how
    many others of their kind were said since."""
    groups = [group for group in GROUP_NAMES if any(one.seeds("kept", group) for one in variants)]
    return [
        *(_recall(variants, group) for group in groups),
        *_asked(variants),
        *_rivals(variants),
    ]


def own_share(variant: Variant, span_sec: tuple[float, float], memory: str) -> list[Share]:
    """Own facts with gaps in a span answered, a share a seed."""
    shares = []
    for bins in variant.seeds(memory, "own"):
        columns = zip(bins["gap_sec"], bins["accuracy"], bins["words"], strict=True)
        cells = [
            (right * of, of) for gap, right, of in columns if span_sec[0] <= gap <= span_sec[1]
        ]
        if cells:
            shares.append(Share(*map(sum, zip(*cells, strict=True))))
    return shares


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
        cells = dict(zip(seeds[0]["gap_sec"], map(percent, shares), strict=True))
        beyond = [_beyond(record, memory, group) for record in variant.records]
        rows.append(
            (
                *(variant.name, memory, f"{sum(words):.0f}"),
                *(cells.get(gap, "-") for gap in gaps),
                percent([share for share in beyond if share is not None]),
            )
        )
    header = ("variant", "memory", "words", *(f"{gap:g} s" for gap in gaps), "beyond the window")
    asked = found[0][-1][0]
    guessed = np.average(asked["chance"], weights=asked["words"])
    title = (
        f"**Recall, {GROUP_NAMES[group]}**: answer words right, in %, by seconds since the fact; "
        f"guessing among the values of the kind gives {100 * guessed:.0f}"
    )
    return f"{title}\n\n{markdown(header, rows)}"


def _asked(variants: Sequence[Variant]) -> list[str]:
    """Own facts by when they were asked for, a row a variant and memory; none if nobody knows."""
    found = [[own_asked(record) for record in variant.records] for variant in variants]
    length, first = found[0][0]  # all were asked the same
    starts = sorted(first.get("kept", {}))
    if len(starts) < 2:
        return []
    rows = [
        (variant.name, memory, *(percent([one[at] for one in seeds]) for at in starts))
        for variant, records in zip(variants, found, strict=True)
        for memory in ("kept", "reset")
        if (seeds := [of[memory] for _, of in records if memory in of])
    ]
    minutes = [str(at + 1) if length == 1 else f"{at + 1} to {at + length}" for at in starts]
    title = (
        f"**Recall by when it was asked**: own facts, {OWN_SEC[0]} s or more before the question, "
        "answer words right, in %, by minutes of the conversation"
    )
    return [title, markdown(("variant", "memory", *(f"minute {one}" for one in minutes)), rows)]


def _rivals(variants: Sequence[Variant]) -> list[str]:
    """Own facts by their rivals, a row a variant and memory; none if nobody knows them."""
    rows = []
    for variant in variants:
        found = [by_rivals(one["recall"], JUST_BEFORE_SEC, "own") for one in variant.records]
        for memory in ("kept", "reset"):
            if seeds := [of[memory] for of in found if memory in of]:
                cells = ([one[at] for one in seeds if at in one] for at in RIVALS_SAID)
                rows.append((variant.name, memory, *map(percent, cells)))
    title = (
        f"**Recall by rivals**: own facts, {OWN_SEC[0]} s or more before the question, answer "
        "words right, in %, by how many others of their kind were said since"
    )
    return [title, markdown(("variant", "memory", *RIVALS_SAID.values()), rows)] if rows else []


def _share(accuracy: float, words: float) -> Share:
    return Share(accuracy * words, words)


def _beyond(record: Record, memory: str, group: str) -> Share | None:
    """Of all gaps that attention's window does not reach over; None if there are none."""
    if record["context_sec"] is None:
        return None
    return beyond_window(record["recall"], record["context_sec"]).get(group, {}).get(memory)
