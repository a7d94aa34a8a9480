"""Negative log-likelihood by step, and against position as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torchmetrics import Metric

from moshi_ttt.model.forward import forward
from moshi_ttt.rows import GROUPS, Rows
from moshi_ttt.teacher_forcing.losses import token_nll


@torch.no_grad()
def step_nll(lm: LMModel, codes: Tensor) -> tuple[Tensor, Tensor]:
    """How surprising each step is, read in one parallel forward.

    Args:
        lm: model in eval mode.
        codes: [K, T] of one conversation.

    Returns:
        NLL of the text, and mean NLL of Moshi's codebooks that can be predicted, in nats a token;
        [T] each on the CPU, NaN where nothing can.
    """
    rows, codes = Rows.of(lm), codes[None].to(lm.device)
    output = forward(lm, codes)
    text = token_nll(output.text_logits, codes[:, rows.text], output.text_mask)
    sound = token_nll(output.logits, codes[:, rows.own], output.mask)
    # both are 0 where they are not known
    pairs = ((text, output.text_mask), (sound, output.mask))
    text_nll, sound_nll = ((nll.sum(dim=1) / mask.sum(dim=1))[0].cpu() for nll, mask in pairs)
    return text_nll, sound_nll


class PositionNLL(Metric):
    """Mean NLL of each of the `GROUPS` of rows in windows of position, in nats a token.

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
        zeros = torch.zeros(len(GROUPS), windows, dtype=torch.float64)
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
            lm: tells which rows are Moshi's.
            output: of `lm(codes)`.
            codes: [B, K, T].
            heard: whether any audio is known in each row; None: it may be.
        """
        rows = Rows.of(lm)
        text_nll = token_nll(output.text_logits, codes[:, rows.text], output.text_mask)
        audio_nll = token_nll(output.logits, codes[:, rows.own], output.mask, heard)
        windows = torch.arange(codes.shape[-1], device=codes.device) // self.window_steps
        nll = torch.cat([text_nll, audio_nll], dim=1)  # [B, spoken rows, T]
        mask = torch.cat([output.text_mask, output.mask], dim=1)
        for number, group in enumerate(rows.groups.values()):
            total, count = (x[:, group].double().sum(dim=(0, 1)) for x in (nll, mask))
            self.totals[number].index_add_(0, windows, total)
            self.counts[number].index_add_(0, windows, count)

    def compute(self) -> dict[str, Tensor]:
        """Group name -> [windows] nats; NaN for a window without a token."""
        return dict(zip(GROUPS, self.totals / self.counts, strict=True))

    def record(self) -> dict[str, Any]:
        """Content of `nll.json`: `window_steps`, `start_step` of each window, nats of each group.

        Windows without a token are NaN.
        """
        # torchmetrics turns a single window into a scalar
        values = {group: nll.reshape(-1).tolist() for group, nll in self.compute().items()}
        starts = [window * self.window_steps for window in range(self.totals.shape[1])]
        return {"window_steps": self.window_steps, "start_step": starts, **values}
