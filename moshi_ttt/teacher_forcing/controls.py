"""Whether a memory is used: the same questions with it, without it, and with another one.

A question may be answered well for reasons that have nothing to do with what was remembered. So the
recordings are read again with the memory taken away just before each question (`reset`), and with
that of another conversation in its place (`other`). Only what is lost then was the memory's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from moshi.models.lm import LMModel

from moshi_ttt.data import EncodedRecording
from moshi_ttt.memory import MemoryState
from moshi_ttt.model.branch import MemorySwaps
from moshi_ttt.model.forward import text_forward
from moshi_ttt.model.hybrid import hybrid_layers, memory_swapped
from moshi_ttt.progress import progress
from moshi_ttt.teacher_forcing.recall import (
    GROUPS,
    ProbeRecall,
    Recall,
    recall_record,
    wilson_interval,
)

Memory = Literal["kept", "reset", "other"]
"""What a question is read with: what was remembered, nothing, or another conversation's memory."""
MEMORIES: tuple[Memory, ...] = get_args(Memory)
Recalls = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Content of `probes.json`: by memory, then by group, what `recall_record` gives."""
Verdict = Literal["used", "not shown", "no memory"]
EVERYONE = "own and heard"
"""The pool of both classes, without what is in no training recording."""
POOLS = (EVERYONE, *GROUPS)

State = Mapping[int, MemoryState]
"""What the memories of a model hold, by layer index."""


def controls_of(lm: LMModel, recordings: Sequence[EncodedRecording]) -> tuple[Memory, ...]:
    """What else questions are read with, beside `kept`.

    Nothing without a memory; a single recording has no other conversation.
    """
    if not hybrid_layers(lm):
        return ()
    return MEMORIES[1:] if len(recordings) > 1 else ("reset",)


@torch.no_grad()
def read_recall(
    lm: LMModel,
    recordings: Sequence[EncodedRecording],
    memory: Memory,
    max_steps: int,
    window_steps: int,
    ends: Sequence[State] = (),
) -> Recall | None:
    """Read recordings for their probes alone.

    Args:
        lm: model under test, in eval mode; with a memory, unless it is kept.
        recordings: whole recordings.
        memory: what each question is read with.
        max_steps: how far a recording is read at most.
        window_steps: length of a window of the conversation, as `ProbeRecall` has it.
        ends: what `memory_after` gave of each recording, at least two; for another one's memory,
            which is that of the recording before.

    Returns:
        None if no probe was measured.
    """
    assert memory != "other" or len(ends) == len(recordings) > 1
    # one process evaluates while the others wait: adding up over all of them would wait for ever
    metric = ProbeRecall(window_steps, -(-max_steps // window_steps), sync_on_compute=False)
    metric.to(lm.device)
    for number, recording in enumerate(progress(recordings, desc=f"recall, {memory}", leave=False)):
        steps = probed_steps(recording, max_steps)
        if not steps:
            continue
        scope: AbstractContextManager[Any] = nullcontext()
        if memory != "kept":
            other = ends[number - 1] if memory == "other" else None
            questions = sorted(probe.question_step for probe in recording.probes)
            scope = memory_swapped(lm, questions, other)
        codes = recording.codes[None, :, :steps].to(lm.device)
        with scope:
            metric.update(lm, text_forward(lm, codes), codes, recording.probes)
    return recall_record(metric)


def probed_steps(recording: EncodedRecording, max_steps: int) -> int:
    """How far a recording is to be read for its probes; 0 without any."""
    ends = (word.stop for probe in recording.probes for word in probe.answer_steps)
    return min(max(ends, default=0), max_steps)


def memory_after(swaps: Mapping[int, MemorySwaps]) -> State:
    """What the memories hold after the last forward in a scope of `memory_swapped`."""
    return {index: swap.last for index, swap in swaps.items() if swap.last is not None}


@dataclass(frozen=True, slots=True)
class Share:
    """Answer words that were right, of how many."""

    right: float = 0
    words: float = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.words + other.words)

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.right / self.words

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval, as if words were independent."""
        return wilson_interval(self.share, self.words)


def beyond_window(recalls: Recalls, window_sec: float) -> dict[str, dict[str, Share]]:
    """Answer words that attention cannot reach directly, pooled over gaps.

    Args:
        recalls: content of `probes.json`.
        window_sec: attention's context; bins whose middle lies beyond it count.

    Returns:
        By pool of `POOLS`, then by memory; pools and memories without a word are left out.
    """
    pools: dict[str, dict[str, Share]] = {}
    for pool in POOLS:
        groups = ("own", "heard") if pool == EVERYONE else (pool,)
        for memory, recall in recalls.items():
            bins = [
                (accuracy * words, words)
                for one in (recall[group] for group in groups if group in recall)
                for gap, accuracy, words in zip(
                    one["gap_sec"], one["accuracy"], one["words"], strict=True
                )
                if gap > window_sec
            ]
            if bins:
                right, words = map(sum, zip(*bins, strict=True))
                pools.setdefault(pool, {})[memory] = Share(right, words)
    return pools


def by_when_asked(recalls: Recalls, window_sec: float, group: str) -> dict[str, dict[int, Share]]:
    """Answer words that attention cannot reach directly, by when they were asked for.

    Args:
        recalls: content of `probes.json`.
        window_sec: attention's context; bins whose middle lies beyond it count.
        group: of `GROUPS`.

    Returns:
        By memory, then by the step where a window of the conversation begins, in order of time;
        windows without a word are left out.
    """
    return _beyond_by("asked", "step", recalls, window_sec, group)


def by_rivals(recalls: Recalls, window_sec: float, group: str) -> dict[str, dict[int, Share]]:
    """The same by how many rivals a fact had: others of its kind that were said since.

    Returns:
        By memory, then by number of rivals, of which the last stands for as many or more.
    """
    return _beyond_by("rival", "count", recalls, window_sec, group)


def _beyond_by(
    name: str, value: str, recalls: Recalls, window_sec: float, group: str
) -> dict[str, dict[int, Share]]:
    found: dict[str, dict[int, Share]] = {}
    for memory, recall in recalls.items():
        of = recall.get(group, {})
        names = (f"{name}_{one}" for one in (value, "gap_sec", "right", "words"))
        for at, gap, right, words in zip(*(of.get(one, ()) for one in names), strict=True):
            if gap > window_sec:
                shares = found.setdefault(memory, {})
                shares[int(at)] = shares.get(int(at), Share()) + Share(right, words)
    return found


def memory_verdict(shares: Mapping[str, Share]) -> Verdict:
    """Whether the memory is used: only if kept beats both controls, their intervals apart.

    Args:
        shares: by memory, one pool of `beyond_window`. Without controls there is no memory; with
            one of the two alone nothing is shown.
    """
    controls = [shares[memory] for memory in MEMORIES[1:] if memory in shares]
    if not controls:
        return "no memory"
    low, _ = shares["kept"].interval
    beaten = all(low > control.interval[1] for control in controls)
    return "used" if beaten and len(controls) == len(MEMORIES) - 1 else "not shown"
