"""Training losses: weighted cross-entropies as in moshi-finetune, and the magnitude regulariser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.errors import check_fields
from moshi_ttt.model.branch import BranchStats
from moshi_ttt.rows import Rows

WALL_START = 0.75  # part of the target ratio that is free of charge


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms."""

    text_padding_weight: float = 0.5
    """Weight of padding tokens in the text cross-entropy; words weigh 1."""
    first_codebook_weight: float = 100.0
    """Weight of the first (semantic) codebook in the audio cross-entropy; the others weigh 1."""
    magnitude_reg: float = 1.0
    """Weight of the magnitude regulariser, nats at the target; 0 switches it off (the branch
    ratio is logged all the same)."""
    magnitude_target: float = 0.1
    """Branch ratio (branch norm over residual norm) to stay under; the regulariser rises from
    three quarters of it on."""
    magnitude_over: Literal["positions", "mean"] = "positions"
    """What the target holds for: the ratio at every position, or each layer's mean over the batch,
    so that a memory may speak up where it knows something and be silent elsewhere."""

    def __post_init__(self) -> None:
        check_fields(self, "text_padding_weight", "first_codebook_weight", least=0)
        check_fields(self, "magnitude_reg", least=0)
        check_fields(
            self,
            "magnitude_target",
            above=0,
            remedy="to switch the regulariser off set magnitude_reg=0",
        )


def token_nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the valid positions, 0 elsewhere.

    moshi fills logits without a valid context with NaN; they are left out by indexing, because
    NaN times 0 is NaN.

    Args:
        logits: [B, K, T, card].
        targets: [B, K, T] codes; -1 where there is none.
        mask: [B, K, T], True where the logits may be used.

    Returns:
        [B, K, T] fp32, nats.
    """
    nll = torch.zeros(targets.shape, device=logits.device)
    nll[mask] = F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
    return nll


def lm_losses(
    lm: LMModel, output: LMOutput, codes: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Text and audio loss, each a mean weighted and normalised by its own weights.

    Args:
        lm: tells which tokens are padding and which rows are Moshi's.
        output: of `lm(codes)`.
        codes: [B, K, T].
        config: the weights.

    Returns:
        Two scalars in nats; 0 for rows without a single valid target in the batch.
    """
    rows = Rows.of(lm)
    text_targets = codes[:, rows.text]
    padding = (text_targets == lm.text_padding_token_id) | (
        text_targets == lm.end_of_text_padding_id
    )
    text_weight = torch.where(padding, config.text_padding_weight, 1.0) * output.text_mask
    audio_targets = codes[:, rows.own]
    audio_weight = output.mask.float()
    audio_weight[:, 0] *= config.first_codebook_weight
    text_nll = token_nll(output.text_logits, text_targets, output.text_mask)
    audio_nll = token_nll(output.logits, audio_targets, output.mask)
    return _weighted_mean(text_nll, text_weight), _weighted_mean(audio_nll, audio_weight)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def magnitude_penalty(stats: Mapping[int, list[BranchStats]], config: LossConfig) -> Tensor:
    """A soft wall in front of the target ratio, mean over layers and positions.

    `relu((ratio - s target) / (target - s target))^2` with s = 0.75: nothing up to s x target, 1
    at the target, quadratic between and beyond. A penalty that began at the target would settle
    above it, wherever its slope meets that of the likelihood. A quiet memory is not pushed down.

    Args:
        stats: of every hybrid layer, from `observe_branches`.
        config: target, and what it holds for.
    """
    seen = [_defined_ratios(one) for stats_of_layer in stats.values() for one in stats_of_layer]
    if config.magnitude_over == "mean":
        ratios = torch.stack([one.mean() for one in seen])
    else:
        ratios = torch.cat(seen)
    target = config.magnitude_target
    free = WALL_START * target
    return F.relu((ratios - free) / (target - free)).square().mean()


def _defined_ratios(stats: BranchStats) -> Tensor:
    """Ratios of the positions that have a residual: in layer 0, padding after a recording has none.

    By indexing, because the gradient of 0/0 is NaN even where it is masked.
    """
    defined = stats.residual_norm > 0
    return stats.norm[defined] / stats.residual_norm[defined]
