"""Negative log-likelihood against position, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torchmetrics import Metric

from moshi_ttt.teacher_forcing.losses import token_nll

STREAMS = ("text", "first_codebook", "other_codebooks")


class PositionNLL(Metric):
    """Mean NLL of each stream in windows of position, in nats a token.

    Sums and counts are kept apart and added up over processes, so that the result under several
    processes is that of one process that saw all batches, whatever their sizes.

    Args:
        window_steps: length of a window.
        windows: number of windows; later positions are an error.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, window_steps: int, windows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window_steps = window_steps
        zeros = torch.zeros(len(STREAMS), windows, dtype=torch.float64)
        self.add_state("totals", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    def update(
        self,
        lm: LMModel,
        output: LMOutput,
        codes: Tensor,
        heard: Sequence[bool] | None = None,
    ) -> None:
        """Add the predictions for `codes` [B, K, T], whose first step is position 0.

        Args:
            lm: tells where audio starts.
            output: of `lm(codes)`.
            codes: [B, K, T].
            heard: whether any audio is known in each row; None: it may be.
        """
        first = lm.audio_offset
        audio = codes[:, first : first + lm.dep_q]
        text_nll = token_nll(output.text_logits, codes[:, :1], output.text_mask)
        audio_nll = token_nll(output.logits, audio, output.mask, heard)
        windows = torch.arange(codes.shape[-1], device=codes.device) // self.window_steps
        parts = (
            (text_nll, output.text_mask),
            (audio_nll[:, :1], output.mask[:, :1]),
            (audio_nll[:, 1:], output.mask[:, 1:]),
        )
        for row, (nll, mask) in enumerate(parts):
            self.totals[row].index_add_(0, windows, nll.double().sum(dim=(0, 1)))
            self.counts[row].index_add_(0, windows, mask.double().sum(dim=(0, 1)))

    def compute(self) -> dict[str, Tensor]:
        """Stream name -> [windows] nats; NaN for a window without a token."""
        return dict(zip(STREAMS, self.totals / self.counts, strict=True))

    def record(self) -> dict[str, Any]:
        """Content of `nll.json`: `window_steps`, `start_step` of each window, nats of each stream.

        Windows without a token are NaN.
        """
        # torchmetrics turns a single window into a scalar
        values = {stream: nll.reshape(-1).tolist() for stream, nll in self.compute().items()}
        starts = [window * self.window_steps for window in range(self.totals.shape[1])]
        return {"window_steps": self.window_steps, "start_step": starts, **values}
