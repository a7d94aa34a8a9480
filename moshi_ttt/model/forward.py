"""Moshi's training forward, without the work for audio that nobody knows.

Conversations may be text alone (scripts/bundle/make_text.py): then every audio row is -1, which is
neither input nor target, and the depformer, most of a training step, would compute nothing.

Nothing here waits for the device when the caller says which rows are heard: a GPU that is asked
what it holds must first finish what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.model.depformer import depformer_logits
from moshi_ttt.rows import Rows


def rows_heard(lm: LMModel, codes: Tensor) -> list[bool]:
    """Whether any audio is known in each row of `codes` [B, 17, T]; waits for the device."""
    return (codes[:, lm.audio_offset :] != lm.zero_token_id).flatten(1).any(dim=1).tolist()


def indices(heard: Sequence[bool], device: torch.device) -> Tensor:
    """Where `heard` is true, int64, on `device` without waiting for it."""
    rows = torch.tensor([row for row, one in enumerate(heard) if one], dtype=torch.int64)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def forward(
    lm: LMModel,
    codes: Tensor,
    heard: Sequence[bool] | None = None,
    audio: slice = slice(None),
    predicted: Sequence[bool] | None = None,
) -> LMOutput:
    """What `lm(codes)` gives wherever its mask is set, NaN elsewhere.

    Args:
        lm: in training or in eval mode, not streaming.
        codes: [B, 17, T]; -1 where nothing is known.
        heard: whether any audio is known in each row; None looks, and waits for the device.
        audio: steps in a row whose audio is predicted, and so the length of its logits and their
            mask.
        predicted: rows whose audio is predicted, none of which may be unheard; None: all that are
            heard.
    """
    heard = rows_heard(lm, codes) if heard is None else heard
    predicted = heard if predicted is None else predicted
    if not any(predicted) and not _others_wait_for_the_depformer(lm):
        if any(heard):
            text_logits = lm.forward_text(_delayed(lm, codes)[:, :, :-1])[1]
        else:
            text_logits = _read_silent(lm, _delayed(lm, codes)[:, :, :-1])
        return _with_text_alone(lm, codes, text_logits, audio)
    own, delayed, known = Rows.of(lm).own, _delayed(lm, codes), codes != lm.zero_token_id
    out, text_logits = lm.forward_text(delayed[:, :, :-1])
    mask, delays = known[:, own, audio].clone(), lm.delays[own]
    first, stop, _ = audio.indices(codes.shape[-1])
    ahead = stop + max(delays)
    out, sequence = out[:, first:ahead], delayed[:, :, first + 1 : ahead + 1]
    some = any(predicted) and not all(predicted)
    rows = indices(predicted, codes.device) if some else None
    if rows is not None:
        out, sequence = out[rows], sequence[rows]
    lines = []
    for row, (line, delay) in enumerate(
        zip(depformer_logits(lm, sequence, out), delays, strict=True)
    ):
        line = line[:, delay : delay + mask.shape[-1]]
        missing = mask.shape[-1] - line.shape[1]
        lines.append(F.pad(line, (0, 0, 0, missing), value=float("nan")))
        mask[:, row, mask.shape[-1] - missing :] = False
    logits = torch.stack(lines, dim=1)
    if rows is not None:
        nothing = logits.new_full((len(codes), *logits.shape[1:]), float("nan"))
        logits = nothing.index_copy(0, rows, logits)
        mask = torch.zeros_like(mask).index_copy(0, rows, mask[rows])
    return LMOutput(logits, mask, text_logits, known[:, Rows.of(lm).text])


def text_forward(lm: LMModel, codes: Tensor) -> LMOutput:
    """What `lm(codes)` gives for the text; audio logits are NaN and masked, and cost nothing."""
    text_logits = lm.forward_text(_delayed(lm, codes)[:, :, :-1])[1]
    return _with_text_alone(lm, codes, text_logits, slice(None))


def _with_text_alone(lm: LMModel, codes: Tensor, text_logits: Tensor, audio: slice) -> LMOutput:
    first, stop, _ = audio.indices(codes.shape[-1])
    shape = len(codes), lm.dep_q, stop - first
    logits = text_logits.new_full((1, 1, 1, 1), float("nan")).expand(*shape, lm.card)
    mask = torch.zeros(shape, dtype=torch.bool, device=codes.device)
    return LMOutput(logits, mask, text_logits, codes[:, Rows.of(lm).text] != lm.zero_token_id)


def _delayed(lm: LMModel, codes: Tensor) -> Tensor:
    """Each row behind its delay, [B, 17, T + 1]: what is read, and what comes next."""
    steps = codes.shape[-1]
    delayed = torch.full_like(codes[:, :, :1], lm.initial_token_id).repeat(1, 1, steps + 1)
    delayed[:, 0] = lm.text_initial_token_id
    for row, delay in enumerate(lm.delays):
        delayed[:, row, 1 + delay :] = codes[:, row, : steps - delay]
    return delayed


def _read_silent(lm: LMModel, delayed: Tensor) -> Tensor:
    """Text logits of `lm.forward_text` for [B, 17, T] whose audio is -1 behind its first steps.

    The embedding of -1 is 0, so 16 of 17 embeddings are only looked up where audio begins.
    """
    begin = 1 + max(lm.delays[lm.audio_offset :])
    first = delayed[:, lm.audio_offset :, :begin].unbind(1)
    start = sum(embed(row) for embed, row in zip(lm.emb, first, strict=True))
    text = lm.text_emb(delayed[:, 0])
    x = torch.cat([start + text[:, :begin], text[:, begin:]], dim=1)
    out = lm.transformer(x)
    if lm.out_norm:
        out = lm.out_norm(out)
    return lm.text_linear(out)[:, None]


def _others_wait_for_the_depformer(lm: LMModel) -> bool:
    """Whether other processes wait for this one's gradient of a depformer, in every step."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return lm.depformer is not None and any(p.requires_grad for p in lm.depformer.parameters())
