"""Held-out recordings, read teacher-forced: loss against position, and recall of planted facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from tqdm import tqdm

from moshi_ttt.data import EncodedRecording
from moshi_ttt.model.hybrid import memory_swapped
from moshi_ttt.teacher_forcing.controls import (
    Recalls,
    State,
    controls_of,
    memory_after,
    probed_steps,
    read_recall,
)
from moshi_ttt.teacher_forcing.nll import PositionNLL
from moshi_ttt.teacher_forcing.recall import ProbeRecall, recall_record

MAX_READ_STEPS = 4500
"""6 min: how far a recording is read for its probes, as the attention of a parallel forward needs
memory in the square of it."""


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """What reading the held-out recordings gave."""

    nll: dict[str, Any]
    """Content of `nll.json`, as `PositionNLL.record` gives it."""
    recall: Recalls | None
    """Content of `probes.json`, by memory and group; None without probes."""


@torch.no_grad()
def read_teacher_forced(
    lm: LMModel, recordings: Sequence[EncodedRecording], steps: int, window_steps: int
) -> TeacherForced:
    """Read every recording in one parallel forward: the streaming form is the same function.

    A recording is read from its start to `steps`, or further for its probes, but for them not
    beyond `MAX_READ_STEPS`; those that are answered after what was read are not counted. If the
    model has a memory and something was asked, the recordings are read again with the memory taken
    away before each question and, where there are two of them, with another one's.

    Args:
        lm: model under test, in eval mode.
        recordings: whole recordings.
        steps: positions that the NLL is wanted for.
        window_steps: length of a window of the NLL.
    """
    # one process evaluates while the others wait: adding up over all of them would wait for ever
    nll = PositionNLL(window_steps, -(-steps // window_steps), sync_on_compute=False)
    recall = ProbeRecall(sync_on_compute=False)
    nll.to(lm.device)
    recall.to(lm.device)
    ends: list[State] = []
    for recording in tqdm(recordings, desc="teacher-forced", unit="recording", leave=False):
        wanted = max(steps, probed_steps(recording, MAX_READ_STEPS))
        codes = recording.codes[None, :, :wanted].to(lm.device)
        with memory_swapped(lm) as swaps:
            output = lm(codes)
        ends.append(memory_after(swaps))
        recall.update(lm, output, codes, recording.probes)
        nll.update(lm, cut(output, slice(steps)), codes[..., :steps])
    kept = recall_record(recall)
    if kept is None:
        return TeacherForced(nll.record(), None)
    # as far as for `kept`, so that the same questions are counted
    recalls = {"kept": kept}
    for memory in controls_of(lm, recordings):
        found = read_recall(lm, recordings, memory, max(steps, MAX_READ_STEPS), ends)
        assert found is not None, "what was counted once is counted again"
        recalls[memory] = found
    return TeacherForced(nll.record(), recalls)


def cut(output: LMOutput, steps: slice) -> LMOutput:
    """Some positions of what a forward gave."""
    return LMOutput(
        output.logits[:, :, steps],
        output.mask[:, :, steps],
        output.text_logits[:, :, steps],
        output.text_mask[:, :, steps],
    )
