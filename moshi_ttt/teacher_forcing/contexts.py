"""The same seconds behind contexts of any length."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.model.forward import forward
from moshi_ttt.progress import progress
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.nll import PositionNLL

BATCH = 4


def clips(
    recordings: Sequence[EncodedRecording], steps: int, every_steps: int, first_step: int = 0
) -> list[Tensor]:
    """Full stretches of `steps` of all recordings, one every `every_steps`, [17, steps] each."""
    return [
        one.codes[:, start : start + steps]
        for one in recordings
        for start in range(first_step, one.steps - steps + 1, every_steps)
    ]


@torch.no_grad()
def nll_by_position(
    lm: LMModel, pieces: Sequence[Tensor], window_steps: int, skip_steps: int = 0
) -> dict[str, Any]:
    """Teacher-forced NLL of pieces [17, T] behind `skip_steps`, as `PositionNLL.record` has it."""
    steps = pieces[0].shape[-1]
    metric = PositionNLL(window_steps, -(-(steps - skip_steps) // window_steps)).to(lm.device)
    batches = progress(
        range(0, len(pieces), BATCH),
        desc=f"{steps} steps",
        unit="batch",
        disable=len(pieces) <= BATCH,
    )
    for first in batches:
        codes = torch.stack(list(pieces[first : first + BATCH])).to(lm.device)
        counted = slice(skip_steps, None)
        output = forward(lm, codes, audio=counted)
        text = output.text_logits[:, :, counted], output.text_mask[:, :, counted]
        metric.update(lm, LMOutput(output.logits, output.mask, *text), codes[..., counted])
    return metric.record()


@dataclass(frozen=True, slots=True)
class ContextSweep:
    """Which seconds are measured, and behind how much of what was said before them."""

    context_sec: tuple[float, ...] = (1, 5, 10, 15, 20, 25, 30, 60, 100)
    """Seconds read before; behind none, every model is surprised."""
    target_sec: float = 5.0
    """Seconds that are measured."""
    spacing_sec: float = 40.0
    """Between two stretches of a recording."""

    @property
    def longest_sec(self) -> float:
        """What a recording must last to give a stretch."""
        return max(self.context_sec) + self.target_sec

    def stretches(self, recordings: Sequence[EncodedRecording], clock: Clock) -> list[Tensor]:
        """What is measured, each behind the longest context, [17, steps]."""
        steps = clock.steps(max(self.context_sec)) + clock.steps(self.target_sec)
        return clips(recordings, steps, clock.steps(self.spacing_sec))

    def nll(self, lm: LMModel, pieces: Sequence[Tensor], clock: Clock) -> dict[str, list[float]]:
        """Loss of the ends of `stretches` behind each context.

        Returns:
            Nats a token by group of rows, one value a context.
        """
        found: dict[str, list[float]] = {group: [] for group in GROUPS}
        counted = clock.steps(self.target_sec)
        for context_sec in self.context_sec:
            read = clock.steps(context_sec) + counted
            record = nll_by_position(
                lm, [piece[:, -read:] for piece in pieces], counted, read - counted
            )
            for group, values in found.items():
                values += record[group]
        return found

    def record(
        self, lm: LMModel, recordings: Sequence[EncodedRecording], clock: Clock
    ) -> dict[str, Any] | None:
        """Content of `contexts.json`; None if no recording is long enough.

        Returns:
            `context_sec`, `target_sec`; `stretches`, a checksum of each, so that equal ones are
            found again; and by group of rows, the losses [stretches, contexts] in nats a token.
        """
        pieces = self.stretches(recordings, clock)
        if not pieces:
            return None
        found: dict[str, Any] = {
            "context_sec": list(self.context_sec),
            "target_sec": self.target_sec,
            "stretches": [zlib.crc32(piece.cpu().numpy().tobytes()) for piece in pieces],
            **{group: [] for group in GROUPS},
        }
        for piece in progress(pieces, desc="behind contexts", unit="stretch", leave=False):
            losses = self.nll(lm, [piece], clock)
            for group in GROUPS:
                found[group].append(losses[group])
        return found
