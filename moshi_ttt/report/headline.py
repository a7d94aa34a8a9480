"""What happened, in the few sentences that a report begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump, can_be_searched, finite_median
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.context import LOSSES, context_line
from moshi_ttt.report.recall import shown_groups
from moshi_ttt.report.text import loudest_memory, only_reads
from moshi_ttt.teacher_forcing.controls import (
    EVERYONE,
    Recalls,
    Share,
    beyond_window,
    memory_verdict,
)

ASKED_SEC = 60.0  # of the gaps beyond the window, the one nearest to this is told by itself
READ_WITH = {
    "kept": " with its memory",
    "reset": " with the memory emptied",
    "other": " with another conversation's",
}
USED = "The memory is used{}: with it more is right than without."
NOT_SHOWN = "That the memory is used is not shown: not clearly more is right with it than without."


def headline(evaluation: Evaluation, trace: Trace) -> list[str]:
    """What one evaluation showed, a sentence each: whether the memory is used, recall by who had
    said it; loss by minutes; norms; what the memory adds; speed. What was not measured is left out.
    """
    return [
        *_recall(evaluation.recall, trace),
        *filter(None, (context_line(evaluation.contexts), _loss(evaluation.nll, trace.clock))),
        _norms(evaluation.jumps, trace),
        *filter(None, (_memory(trace), _speed(evaluation.summary, trace))),
    ]


def _recall(recalls: Recalls | None, trace: Trace) -> list[str]:
    """Whether the memory is used, and what is answered beyond the window with each memory."""
    if recalls is None:
        return ["No planted fact was asked for."]
    window_sec = trace.clock.seconds(trace.context_steps)
    pools = beyond_window(recalls, window_sec)
    groups = [group for group in shown_groups(recalls["kept"]) if group in pools]
    if not groups:
        return [f"Nothing was asked for that attention, which sees {window_sec:.0f} s, had lost."]
    lines = [_answers(recalls, group, pools[group], window_sec) for group in groups]
    together = memory_verdict(pools.get(EVERYONE, {}))
    if together == "no memory":
        return lines
    used = [group for group in groups if memory_verdict(pools[group]) == "used"]
    if 0 < len(used) < len(groups):
        return [USED.format(f" for what {_and([_who(group) for group in used])}"), *lines]
    return [USED.format("") if used or together == "used" else NOT_SHOWN, *lines]


def _who(group: str) -> str:
    """Who had said the facts of a group."""
    return "Moshi had said" if "own" in group else "only the user had said"


def _answers(recalls: Recalls, group: str, pool: Mapping[str, Share], window_sec: float) -> str:
    """Share of the answer words that are right with each memory, in all and a minute later."""
    shares = [
        f"{one.share:.0%} [{one.interval[0]:.0%}, {one.interval[1]:.0%}]"
        f"{' are right' * (memory == 'kept')}{READ_WITH[memory] * (len(pool) > 1)}"
        for memory, one in pool.items()
    ]
    kept = recalls["kept"][group]
    lost = [at for at, gap in enumerate(kept["gap_sec"]) if gap > window_sec]
    at = min(lost, key=lambda bin: abs(kept["gap_sec"][bin] - ASKED_SEC))
    then = _and([f"{recalls[memory][group]['accuracy'][at]:.0%}" for memory in pool])
    return (
        f"Recall of what {_who(group)}, once attention (the last {window_sec:.0f} s) no longer "
        f"holds it: of {pool['kept'].words:g} answer words {_and(shares)} "
        f"(guessing: {kept['chance'][at]:.0%}); "
        f"about {kept['gap_sec'][at]:g} s later {then} of {kept['words'][at]:g}."
    )


def _loss(nll: Mapping[str, Any] | None, clock: Clock) -> str:
    """Loss on recordings that are read, minute by minute."""
    if nll is None:
        return ""
    losses = {group: np.array(nll[group], dtype=float) for group in LOSSES}  # None becomes NaN
    starts = np.array(nll["start_step"])
    read = np.isfinite([*losses.values()]).all(axis=0)
    if not read.any():
        return ""
    minutes = int(clock.seconds(starts[read][-1] + nll["window_steps"]) // 60)
    middles_sec = (starts + nll["window_steps"] / 2) * clock.step_sec
    spans = [middles_sec // 60 == minute for minute in range(minutes)] if minutes > 1 else [read]
    values = [
        f"{_and([f'{loss[span & read].mean():.2f}' for span in spans])} for {LOSSES[group]}"
        for group, loss in losses.items()
    ]
    over = "minute by minute" if minutes > 1 else "over less than two minutes"
    return f"The loss on recordings is, {over}, {', and '.join(values)} (nats a token)."


def _norms(jumps: Sequence[Jump], trace: Trace) -> str:
    """Whether and where the norm of a layer jumped."""
    span = f"In {trace.clock.seconds(trace.steps):.0f} s of "
    span += "reading" if only_reads(trace) else "talking"
    if jumps:
        largest = max(jumps, key=lambda jump: jump.ratio).describe(trace.clock)
        count = "is growth, no jump" if jumps[0].gradual else "is a jump"
        if len(jumps) > 1:
            kind = "lasting rises" if any(jump.gradual for jump in jumps) else "jumps"
            count = f"are {len(jumps)} {kind}, the largest"
        return f"{span} there {count}: {largest}."
    if not can_be_searched(trace):
        return f"{span} no jump of the norms could be seen."
    return f"{span} no norm jumps."


def _memory(trace: Trace) -> str:
    """How much the memory adds, and whether its fast weights move."""
    if not trace.hybrid_layers:
        return "There is no memory."
    layer, ratio = loudest_memory(trace)
    if not np.isfinite(ratio):
        return ""
    share = f"{ratio:.1%} of the residual's norm in layer {layer}"
    change = trace.fast_weight_change[..., -1]
    moved = change[np.isfinite(change)]
    if not moved.size:
        return f"The memory adds {share}, where it adds most."
    middles = [finite_median(change[:, row]) for row in range(len(trace.hybrid_layers))]
    far = f"end {np.nanmin(middles):.0%} to {np.nanmax(middles):.0%} of their norm away from"
    if not moved.any():
        far = "stay"
    return f"The memory adds {share}, where it adds most; its fast weights {far} where they began."


def _speed(summary: Mapping[str, Any], trace: Trace) -> str:
    """How fast it talked."""
    times = summary["steps_per_sec"] * trace.clock.step_sec
    return (
        f"{summary['steps_per_sec']:.3g} steps a second of {len(trace.streams)} streams at once: "
        f"{times:.2g} times real time."
    )


def _and(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
