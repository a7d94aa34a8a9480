"""What happened, in the two sentences that a report begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump, can_be_searched
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.recall import shown_groups
from moshi_ttt.report.text import loudest_memory, only_reads
from moshi_ttt.teacher_forcing.controls import EVERYONE, Recalls, beyond_window, memory_verdict

ASKED_SEC = 60.0  # of the gaps beyond the window, the one nearest to this is told
READ_WITH = {
    "kept": " with its memory",
    "reset": " with the memory emptied",
    "other": " with another conversation's",
}
VERDICTS = {
    "used": ": the memory is used",
    "not shown": ": that the memory is used is not shown",
    "no memory": "",
}
LOSSES = {"text": "words", "first_codebook": "the first codebook"}


def headline(evaluation: Evaluation, trace: Trace) -> str:
    """What one evaluation showed: recall; loss by minutes, norms, and what the memory adds."""
    loss = _loss(evaluation.nll, trace.clock)
    rest = "; ".join(filter(None, (loss, _norms(evaluation.jumps, trace), _memory(trace))))
    return f"{_recall(evaluation.recall, trace)}. {rest[0].upper()}{rest[1:]}."


def _recall(recalls: Recalls | None, trace: Trace) -> str:
    """Answers about a minute after the fact with each memory, and whether the memory is used."""
    if recalls is None:
        return "No planted fact was asked for"
    window_sec = trace.clock.seconds(trace.context_steps)
    kept = recalls["kept"]
    groups = shown_groups(kept)
    gaps = {gap for group in groups for gap in kept[group]["gap_sec"] if gap > window_sec}
    if not gaps:
        return f"Nothing was asked for that attention, which sees {window_sec:.0f} s, had lost"
    gap_sec = min(gaps, key=lambda gap: abs(gap - ASKED_SEC))
    parts = [
        f"for a fact that {'Moshi had said' if 'own' in group else 'only the user had said'}, "
        + _answers(recalls, group, gap_sec)
        for group in groups
        if gap_sec in kept[group]["gap_sec"]
    ]
    verdict = memory_verdict(beyond_window(recalls, window_sec).get(EVERYONE, {}))
    return (
        f"Asked about {gap_sec:g} s later, when attention (the last {window_sec:.0f} s) no longer "
        f"holds it, {'; '.join(parts)}{VERDICTS[verdict]}"
    )


def _answers(recalls: Recalls, group: str, gap_sec: float) -> str:
    """Share of the answer words that are right with each memory, and by guessing."""
    kept = recalls["kept"][group]
    at = list(kept["gap_sec"]).index(gap_sec)
    shares = [
        f"{one[group]['accuracy'][at]:.0%}{' are right' * (memory == 'kept')}"
        f"{READ_WITH[memory] * (len(recalls) > 1)}"
        for memory, one in recalls.items()
    ]
    return (
        f"of {kept['words'][at]:g} answer words {_and(shares)} (guessing: {kept['chance'][at]:.0%})"
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
    return f"the loss on recordings is, {over}, {', and '.join(values)} (nats a token)"


def _norms(jumps: Sequence[Jump], trace: Trace) -> str:
    """Whether and where the norm of a layer jumped."""
    span = f"in {trace.clock.seconds(trace.steps):.0f} s of "
    span += "reading" if only_reads(trace) else "talking"
    if jumps:
        largest = max(jumps, key=lambda jump: jump.ratio).describe(trace.clock)
        count = "is growth, no jump" if jumps[0].gradual else "is a jump"
        if len(jumps) > 1:
            kind = "lasting rises" if any(jump.gradual for jump in jumps) else "jumps"
            count = f"are {len(jumps)} {kind}, the largest"
        return f"{span} there {count}: {largest}"
    if not can_be_searched(trace):
        return f"{span} no jump of the norms could be seen"
    return f"{span} no norm jumps"


def _memory(trace: Trace) -> str:
    """How much the memory adds."""
    if not trace.hybrid_layers:
        return "there is no memory"
    layer, ratio = loudest_memory(trace)
    if not np.isfinite(ratio):
        return ""
    share = f"{ratio:.1%} of the residual's norm in layer {layer}"
    return f"the memory adds {share}, where it adds most"


def _and(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
