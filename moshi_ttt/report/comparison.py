"""Several evaluations in one table: only what they have in common, and warnings of what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.recall import CLASSES
from moshi_ttt.report.recall_words import percent
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import beyond_window

NOTE = (
    "Loss in nats a token, over the windows that all of them have; differences from the first, "
    "with the 95 % interval of their mean over these windows, as if windows were independent. "
    "Recall: answer words right beyond the longest attention window, with the memory as it was, "
    "and the 95 % interval."
)


def comparison_section(
    evaluations: Mapping[str, Evaluation], traces: Mapping[str, Trace]
) -> list[str]:
    """Warnings, and a table with a row for each evaluation.

    Args:
        evaluations: by label.
        traces: of the same labels.
    """
    common, losses = common_losses([one.nll for one in evaluations.values()])
    window_sec = max(trace.clock.seconds(trace.context_steps) for trace in traces.values())
    names = [group.replace("_", " ") for group in GROUPS]
    header = ["evaluation"]
    kinds = ("", ", difference")[: len(evaluations)]  # one alone differs from nothing
    if len(common):
        header += [f"NLL {name}{kind}" for name in names for kind in kinds]
    pools = [beyond_window(one.recall or {}, window_sec) for one in evaluations.values()]
    classes = [one for one in CLASSES if any(one in pool for pool in pools)]
    header += [f"recall, {one}" for one in classes]
    rows = []
    for number, (label, pool) in enumerate(zip(evaluations, pools, strict=True)):
        row: list[str | float | None] = [label]
        if len(common):
            for loss in losses.values():
                row += [float(loss[number].mean()), difference(loss[number], loss[0])][: len(kinds)]
        rows.append(
            [*row, *(percent(pool[one]["kept"]) if one in pool else None for one in classes)]
        )
    warned = [html.paragraph(text, kind="warning") for text in warnings(evaluations, traces)]
    if len(header) == 1:
        return warned
    return [*warned, html.table(header, rows), html.paragraph(NOTE, kind="note")]


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


def difference(loss: np.ndarray, reference: np.ndarray) -> str | None:
    """Mean difference over windows with its interval; None of a thing from itself."""
    if np.array_equal(loss, reference):
        return None
    differences = loss - reference
    mean = differences.mean()
    if len(differences) == 1:
        return f"{mean:+.3f}"
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


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
    asked = [
        {group: list(one["words"]) for group, one in recall["kept"].items()}
        for evaluation in evaluations.values()
        if (recall := evaluation.recall)
    ]
    if any(one != asked[0] for one in asked):
        found.append("They were asked different questions.")
    return found
