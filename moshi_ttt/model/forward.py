"""Moshi's training forward, without the work for audio that nobody knows.

Conversations may be text alone (scripts/bundle/make_text.py): then every audio row is -1, which is
neither input nor target, and the depformer, most of a training step, would compute nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor


def forward(lm: LMModel, codes: Tensor) -> LMOutput:
    """What `lm(codes)` gives wherever its mask is set, NaN elsewhere.

    Args:
        lm: in training or in eval mode, not streaming.
        codes: [B, 17, T]; -1 where nothing is known.
    """
    own = slice(lm.audio_offset, lm.audio_offset + lm.dep_q)
    heard = (codes[:, own] != lm.zero_token_id).flatten(1).any(dim=1)
    # processes that train a depformer wait for each other's gradient of it in every step
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if heard.all() or (shared and not heard.any()):
        return lm(codes)
    if not heard.any():
        return text_forward(lm, codes)
    steps = codes.shape[-1]
    delayed = _delayed(lm, codes)
    transformer_out, text_logits = lm.forward_text(delayed[:, :, :-1])
    ahead = lm.forward_depformer_training(delayed[heard, :, 1:], transformer_out[heard])
    logits = ahead.new_full((len(codes), lm.dep_q, steps, lm.card), float("nan"))
    mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=codes.device)
    for row, delay in enumerate(lm.delays[own]):
        logits[heard, row, : steps - delay] = ahead[:, row, delay:]
        mask[heard, row, : steps - delay] = True
    mask &= codes[:, own] != lm.zero_token_id
    return LMOutput(logits, mask, text_logits, codes[:, :1] != lm.zero_token_id)


def text_forward(lm: LMModel, codes: Tensor) -> LMOutput:
    """What `lm(codes)` gives for the text; audio logits are NaN and masked, and cost nothing."""
    _, text_logits = lm.forward_text(_delayed(lm, codes)[:, :, :-1])
    shape = len(codes), lm.dep_q, codes.shape[-1]
    logits = text_logits.new_full((1, 1, 1, 1), float("nan")).expand(*shape, lm.card)
    mask = torch.zeros(shape, dtype=torch.bool, device=codes.device)
    return LMOutput(logits, mask, text_logits, codes[:, :1] != lm.zero_token_id)


def _delayed(lm: LMModel, codes: Tensor) -> Tensor:
    """Each row behind its delay, [B, 17, T + 1]: what is read, and what comes next."""
    steps = codes.shape[-1]
    delayed = torch.full_like(codes[:, :, :1], lm.initial_token_id).repeat(1, 1, steps + 1)
    delayed[:, 0] = lm.text_initial_token_id
    for row, delay in enumerate(lm.delays):
        delayed[:, row, 1 + delay :] = codes[:, row, : steps - delay]
    return delayed
