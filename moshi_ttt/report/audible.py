"""The part of a report that says whether a position can be heard or read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moshi_ttt.report import html

MEASURES = {
    "rms": "level (RMS)",
    "silence_share": "silence (share)",
    "spectral_flatness": "spectral flatness (1 noise, 0 tone)",
    "spectral_centroid_hz": "spectral centroid (Hz)",
    "clipping_share": "clipping (share)",
    "padding_share": "text padding (share)",
    "words_per_minute": "words a minute",
    "distinct_1": "distinct words' pieces",
    "distinct_2": "distinct pairs",
    "distinct_3": "distinct triples",
    "repetition": "repeated triples (share)",
    "longest_repeat": "longest repeat (tokens)",
    "codes_used": "codes used (share)",
    "code_perplexity_first": "code perplexity, first codebook",
    "code_perplexity_others": "code perplexity, others",
    "nll_text": "loss, text (nats)",
    "nll_first_codebook": "loss, first codebook (nats)",
    "nll_other_codebooks": "loss, other codebooks (nats)",
}

SEAM_MEASURES = {
    "level_step_db": "step of the level (dB)",
    "spectral_flux_db": "spectral flux (dB)",
    "norm_step": "step of the layers' input norm (|ln|)",
    "repeated_tokens": "longest passage said again (tokens)",
    "words_per_minute": "words a minute after it",
    "broken_words": "ends of words without their beginning",
}
SEAM_COLUMNS = ("elsewhere", "at_seams", "change", "low", "high")


def audible_section(quality: Mapping[str, Any], cuts: Sequence[Path]) -> list[str]:
    """Table of the measures around each position, and the sound there, as HTML.

    Args:
        quality: content of `quality.json`.
        cuts: short sound files around the positions.
    """
    positions = quality["positions"]
    if not positions:
        return []
    header = ["measure", *(", ".join(position["names"]) for position in positions)]
    rows = [
        [label, *(_cell(position["measures"].get(name)) for position in positions)]
        for name, label in MEASURES.items()
        if any(name in position["measures"] for position in positions)
    ]
    streams = "streams" if quality["audible"] else "streams; these codes have no sound"
    note = (
        f"Mean of {quality['window_sec']:g} s before and after, over the {streams}. "
        "*: the 95 % interval of the change, stream by stream, leaves out 0; by chance about one "
        "in twenty does. The loss is teacher-forced on recordings, one value without an interval."
    )
    details = [html.table(header, rows), html.paragraph(note, kind="note")]
    details += [html.player(path, path.stem.replace("_", " ")) for path in cuts]
    return [
        "<h3>Can a position be heard?</h3>",
        html.points(map(audible_finding, positions)),
        html.folded("Measures and sound around each position", "".join(details)),
    ]


def seam_section(quality: Mapping[str, Any]) -> list[str]:
    """Table of what is measured at the seams of a chunked generation, as HTML; or nothing."""
    seams = quality.get("seams")
    if seams is None:
        return []
    parts = ["<h2>Do the seams show?</h2>"]
    if not seams["steps"]:
        return [*parts, html.paragraph("No seam lies after the prompt with room on either side.")]
    rows = []
    for name, label in SEAM_MEASURES.items():
        if (one := seams["measures"].get(name)) is not None:
            star = " *" if _changes(one) else ""
            cells = (f"{one[key]:.3g}" if _known(one[key]) else None for key in SEAM_COLUMNS)
            rows.append([label + star, *cells])
    count = len(seams["steps"])
    note = (
        f"{count} seam{'s'[: count > 1]} in each stream, against other places of the same stream; "
        f"words in {seams['window_steps']} steps. *: the 95 % interval of the change leaves out 0."
    )
    header = ["measure", "elsewhere", "at seams", "change", "from", "to"]
    return [*parts, html.table(header, rows), html.paragraph(note, kind="note")]


def audible_finding(position: Mapping[str, Any]) -> str:
    """One sentence about one position."""
    tested = {name: one for name, one in position["measures"].items() if _known(one["low"])}
    moved = [name for name, one in tested.items() if _changes(one)]
    names = ", ".join(position["names"])
    if not tested:
        return f"{names}: too few streams to tell a change from chance."
    if not moved:
        return f"{names}: none of {len(tested)} measures of sound, text and codes changes."
    what = "; ".join(f"{MEASURES.get(name, name)} {_from_to(tested[name])}" for name in moved)
    return f"{names}: {len(moved)} of {len(tested)} measures change: {what}."


def _changes(measure: Mapping[str, Any]) -> bool:
    low, high = measure["low"], measure["high"]
    return _known(low) and _known(high) and (low > 0 or high < 0)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _from_to(measure: Mapping[str, Any]) -> str:
    return f"{measure['before']:.3g} to {measure['after']:.3g}"


def _cell(measure: Mapping[str, Any] | None) -> str | None:
    if measure is None or not _known(measure["change"]):
        return None
    return _from_to(measure) + (" *" if _changes(measure) else "")
