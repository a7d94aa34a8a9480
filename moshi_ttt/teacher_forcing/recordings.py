"""Held-out recordings, read teacher-forced: loss against position, recall of planted facts, and how
loud the memories are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel, LMOutput

from moshi_ttt.data import EncodedRecording
from moshi_ttt.model.branch import BranchStats
from moshi_ttt.model.forward import forward
from moshi_ttt.model.hybrid import memory_swapped, observe_branches
from moshi_ttt.progress import progress
from moshi_ttt.rows import GROUPS
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
"""6 min: how far a recording is read for its probes; where attention sees all of that, it needs
memory in the square of it."""
RATIO_SHARES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
"""Names of quantiles of the branch ratio."""


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """What reading the held-out recordings gave."""

    nll: dict[str, Any]
    """Content of `nll.json`: what `PositionNLL.record` gives, and `recordings`, how many each
    window is the mean of."""
    recall: Recalls | None
    """Content of `probes.json`, by memory and group; None without probes."""
    branch_ratios: dict[int, dict[str, float]]
    """By layer that has a memory, what `ratio_record` gives of all positions, memories kept."""
    contexts: dict[str, Any] | None = None
    """Content of `contexts.json`: what `ContextSweep.record` gives; None if not asked for."""


def nothing_read(window_steps: int) -> TeacherForced:
    """What there is of a model that is not read."""
    nll: dict[str, Any] = {"window_steps": window_steps, "start_step": [], "recordings": []}
    return TeacherForced(nll | {group: [] for group in GROUPS}, None, {})


@torch.no_grad()
def read_teacher_forced(
    lm: LMModel, recordings: Sequence[EncodedRecording], steps: int, window_steps: int
) -> TeacherForced:
    """Read every recording in one parallel forward: the streaming form is the same function.

    The NLL is that of the recordings that reach `steps`, so that all of its windows are means over
    the same ones; only if none is that long do all of them count, each as far as it goes.

    A recording is read from its start to `steps`, or further, text alone, for its probes, but not
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
    furthest = max(steps, MAX_READ_STEPS)
    recall = ProbeRecall(window_steps, -(-furthest // window_steps), sync_on_compute=False)
    nll.to(lm.device)
    recall.to(lm.device)
    least = steps if any(one.steps >= steps for one in recordings) else 0
    ends: list[State] = []
    with observe_branches(lm) as stats:
        for recording in progress(recordings, desc="teacher-forced", unit="recording", leave=False):
            wanted = max(steps, probed_steps(recording, furthest))
            codes = recording.codes[None, :, :wanted].to(lm.device)
            with memory_swapped(lm) as swaps:
                output = forward(lm, codes, audio=slice(steps))
            ends.append(memory_after(swaps))
            recall.update(lm, output, codes, recording.probes)
            if recording.steps >= least:
                nll.update(lm, cut(output, slice(steps)), codes[..., :steps])
    losses, ratios = nll.record(), ratio_record(stats)
    counted = [one.steps for one in recordings if one.steps >= least]
    losses["recordings"] = [sum(read > start for read in counted) for start in losses["start_step"]]
    kept = recall_record(recall)
    if kept is None:
        return TeacherForced(losses, None, ratios)
    # as far as for `kept`, so that the same questions are counted
    recalls = {"kept": kept}
    for memory in controls_of(lm, recordings):
        found = read_recall(lm, recordings, memory, furthest, window_steps, ends)
        assert found is not None, "what was counted once is counted again"
        recalls[memory] = found
    return TeacherForced(losses, recalls, ratios)


def ratio_record(stats: Mapping[int, Sequence[BranchStats]]) -> dict[int, dict[str, float]]:
    """Quantiles of the branch ratio over all positions, by layer and name of `RATIO_SHARES`.

    Args:
        stats: of every hybrid layer, from `observe_branches`.
    """
    record = {}
    for layer, seen in stats.items():
        ratios = torch.cat([one.ratio.flatten() for one in seen]).cpu().numpy()
        # without a residual there is no ratio
        values = np.nanquantile(ratios, [*RATIO_SHARES.values()])
        record[layer] = dict(zip(RATIO_SHARES, values.tolist(), strict=True))
    return record


def cut(output: LMOutput, steps: slice) -> LMOutput:
    """Some positions of what a forward gave."""
    return LMOutput(
        output.logits[:, :, steps],
        output.mask[:, :, steps],
        output.text_logits[:, :, steps],
        output.text_mask[:, :, steps],
    )
