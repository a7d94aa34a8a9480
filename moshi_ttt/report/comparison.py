"""Several evaluations in one table: only what they have in common, and warnings of what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.intervals import loss_difference, share_difference
from moshi_ttt.report.recall import CLASSES
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import MEMORIES, Share, beyond_window

NOTE = (
    "In brackets: differences from the first, with their 95 % intervals. Recall: answer words "
    "right beyond the longest attention window, with the memory as it was (kept), emptied before "
    "each question (reset) and exchanged for another conversation's (other); its intervals are as "
    "if each had been asked other questions. Loss in nats a token: of the same seconds behind more "
    "and less of what was said before them, and over the windows of position that all of them have."
)
Row = list[str | float | None]


def comparison_section(
    evaluations: Mapping[str, Evaluation], traces: Mapping[str, Trace]
) -> list[str]:
    """Warnings, and a table with a row for each measure and a column for each evaluation.

    Args:
        evaluations: by label.
        traces: of the same labels.
    """
    rows = comparison_rows(evaluations, traces)
    warned = [html.paragraph(text, kind="warning") for text in warnings(evaluations, traces)]
    if not rows:
        return warned
    table = html.table(["", *evaluations], rows)
    return [*warned, table, html.paragraph(NOTE, kind="note")]


def comparison_rows(
    evaluations: Mapping[str, Evaluation], traces: Mapping[str, Trace]
) -> list[Row]:
    """Name of each measure, and what it is in each evaluation; nothing that was not measured."""
    window_sec = max(trace.clock.seconds(trace.context_steps) for trace in traces.values())
    shown = list(evaluations.values())
    return [*_recall_rows(shown, window_sec), *_context_rows(shown), *_loss_rows(shown)]


def comparison_lines(
    evaluations: Mapping[str, Evaluation], traces: Mapping[str, Trace]
) -> list[str]:
    """The rows that matter most, and the warnings, for a console."""
    rows = comparison_rows(evaluations, traces)
    told = [row for row in rows if str(row[0]).endswith((", kept", ", text"))]
    labels = list(evaluations)
    return [
        *warnings(evaluations, traces),
        *(
            f"{name}: "
            + "; ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))
            for name, *values in told
        ),
    ]


def _recall_rows(evaluations: Sequence[Evaluation], window_sec: float) -> Iterator[Row]:
    pools = [beyond_window(one.recall or {}, window_sec) for one in evaluations]
    for group in CLASSES:
        for memory in MEMORIES:
            shares = [pool.get(group, {}).get(memory) for pool in pools]
            if any(shares):
                yield [f"recall, {group}, {memory}", *(_share(one, shares[0]) for one in shares)]


def _share(share: Share | None, first: Share | None) -> str | None:
    if share is None:
        return None
    low, high = share.interval
    text = f"{share.share:.0%} [{low:.0%}, {high:.0%}]"
    if first is None or first is share:
        return text
    return f"{text} ({share_difference(share, first)})"


def _context_rows(evaluations: Sequence[Evaluation]) -> Iterator[Row]:
    for name, losses in common_contexts([one.contexts for one in evaluations]).items():
        yield [name, *_losses(losses)]


def _loss_rows(evaluations: Sequence[Evaluation]) -> Iterator[Row]:
    _, losses = common_losses([one.nll for one in evaluations])
    for group, loss in losses.items():
        yield [f"loss by position, {group.replace('_', ' ')}", *_losses(loss)]


def _losses(losses: np.ndarray) -> Iterator[str]:
    """Means of [evaluations, n], with what they differ by from the first."""
    for number, loss in enumerate(losses):
        mean = f"{np.nanmean(loss):.3f}" if np.isfinite(loss).any() else "-"
        yield f"{mean} ({loss_difference(loss, losses[0])})" if number else mean


def common_contexts(contexts: Sequence[Mapping[str, Any] | None]) -> dict[str, np.ndarray]:
    """Losses of the stretches that all of several `contexts.json` have.

    Returns:
        By name of a row, [evaluations, stretches]; nothing if they have none in common.
    """
    known = [one for one in contexts if one is not None]
    if not known or len(known) < len(contexts):
        return {}
    stretches = set.intersection(*(set(one["stretches"]) for one in known))
    shared = [
        seconds
        for seconds in known[0]["context_sec"]
        if all(seconds in one["context_sec"] for one in known)
    ]
    if not stretches or len({one["target_sec"] for one in known}) != 1:
        return {}

    def losses(one: Mapping[str, Any], group: str, seconds: float) -> list[float | None]:
        at = one["context_sec"].index(seconds)
        table = dict(zip(one["stretches"], one[group], strict=True))
        return [table[stretch][at] for stretch in sorted(stretches)]

    return {
        f"loss behind {seconds:g} s, {group.replace('_', ' ')}": np.array(
            [losses(one, group, seconds) for one in known], dtype=float
        )
        for group in GROUPS
        for seconds in shared
    }


def common_losses(
    nlls: Sequence[Mapping[str, Sequence[float | None]] | None],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The windows that all of several `nll.json` have, and their losses.

    Returns:
        First steps of these windows, and by group the losses [evaluations, windows]; no window if
        one has none, or windows of another length.
    """
    known = [nll for nll in nlls if nll is not None]
    if len(known) < len(nlls) or len({nll["window_steps"] for nll in known}) != 1:
        return np.array([], dtype=int), {}
    tables = []
    for nll in known:
        values = np.array([nll[group] for group in GROUPS], dtype=float)  # None becomes NaN
        whole = np.isfinite(values).all(axis=0)
        tables.append(
            dict(zip(np.array(nll["start_step"])[whole], values[:, whole].T, strict=True))
        )
    common = sorted(set.intersection(*(set(table) for table in tables)))
    losses = np.array([[table[start] for start in common] for table in tables])
    if not common:
        return np.array([], dtype=int), {}
    return np.array(common), {group: losses[:, :, row] for row, group in enumerate(GROUPS)}


def warnings(evaluations: Mapping[str, Evaluation], traces: Mapping[str, Trace]) -> list[str]:
    """What makes these evaluations hard to compare, in words."""
    found = []
    lengths = {trace.steps for trace in traces.values()}
    if len(lengths) > 1:
        spans = ", ".join(
            f"{label}: {trace.clock.seconds(trace.steps):.0f} s" for label, trace in traces.items()
        )
        found.append(f"They generated for different lengths ({spans}).")
    if len({tuple(trace.streams) for trace in traces.values()}) > 1:
        found.append("They began from different prompts or seeds.")
    nlls = [nll for one in evaluations.values() if (nll := one.nll)]
    if len({nll["window_steps"] for nll in nlls}) > 1:
        found.append("Their losses are means over windows of different lengths: not compared.")
    elif len({tuple(nll.get("recordings", ()))[:1] for nll in nlls}) > 1:
        found.append("Their losses are means over different numbers of recordings.")
    stretches = [set(one["stretches"]) for each in evaluations.values() if (one := each.contexts)]
    if any(one != stretches[0] for one in stretches):
        found.append("Their losses behind contexts are of different recordings: what all have.")
    asked = [
        {group: list(one["words"]) for group, one in recall["kept"].items()}
        for evaluation in evaluations.values()
        if (recall := evaluation.recall)
    ]
    if any(one != asked[0] for one in asked):
        found.append("They were asked different questions.")
    return found
