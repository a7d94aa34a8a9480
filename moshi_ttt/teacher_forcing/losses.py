"""Training losses: weighted cross-entropies as in moshi-finetune, and the magnitude regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.compiling import fused
from moshi_ttt.errors import check_fields, check_setting
from moshi_ttt.model.branch import BranchStats
from moshi_ttt.model.forward import forward, indices
from moshi_ttt.rows import Rows

WALL_START = 0.75  # part of the target ratio that is free of charge
_IGNORED = -100  # no code


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms."""

    text_padding_weight: float = 0.5
    """Weight of padding tokens in the text cross-entropy; words weigh 1."""
    first_codebook_weight: float = 100.0
    """Weight of the first (semantic) codebook in the audio cross-entropy; the others weigh 1."""
    audio_weight: float = 1.0
    """Weight of the audio cross-entropy; that of the text weighs 1. In clips most of which are
    text alone, sound is few words that are as loud in the gradient as all others. With 0, training
    predicts no audio, unless a teacher does."""
    audio_every: int = 1
    """Training predicts the audio of one in so many spoken clips, in turn: the depformer is most of
    a step's time. All are read. Where a batch has fewer of them, some steps have no audio loss."""
    beyond_window: bool = False
    """Count the cross-entropies only from the step on that no longer sees the first one, i.e. at
    positions of a clip from the attention window of the batch on, in training and in validation:
    what is said before is as well learned without a memory."""
    magnitude_reg: float = 1.0
    """Weight of the magnitude regulariser, nats at the target; 0 switches it off (the branch
    ratio is logged all the same)."""
    magnitude_target: float = 0.2
    """Branch ratio (branch norm over residual norm) to stay under; the regulariser rises from
    three quarters of it on."""
    magnitude_over: Literal["positions", "mean"] = "mean"
    """What the target holds for: each layer's mean over the batch, so that a memory may speak up
    where it knows something and be silent elsewhere, or the ratio at every position."""

    def __post_init__(self) -> None:
        check_fields(self, "text_padding_weight", "first_codebook_weight", least=0)
        check_fields(self, "audio_weight", "magnitude_reg", least=0)
        check_fields(self, "audio_every", least=1)
        check_fields(
            self,
            "magnitude_target",
            above=0,
            remedy="to switch the regulariser off set magnitude_reg=0",
        )

    def check_fits(self, window_steps: int | None, clip_steps: int) -> None:
        """Refuse clips of which nothing would be counted.

        Args:
            window_steps: longest attention window; None sees all.
            clip_steps: length of the clips.
        """
        check_setting(
            self.first_counted(window_steps, clip_steps) < clip_steps,
            "beyond_window",
            self.beyond_window,
            f"would count nothing: clips have {clip_steps} steps and the window {window_steps}; "
            "use longer clips (data.duration_sec) or a shorter window (model.context_steps, "
            "windows.longest_steps)",
        )

    def first_counted(self, window_steps: int | None, clip_steps: int) -> int:
        """The first position that the cross-entropies are of, with such a window."""
        return (window_steps or clip_steps) if self.beyond_window else 0

    def predicted(self, heard: Sequence[bool], step: int, taught: bool = False) -> list[bool]:
        """Rows of a batch whose audio is predicted in an optimizer step, of those `heard`.

        Args:
            heard: whether any audio is known in each row.
            step: of the optimizer.
            taught: whether a teacher predicts audio, whatever its weight in the loss.
        """
        before = accumulate(heard, initial=step)  # so that each clip has its turn
        return [
            one and (taught or self.audio_weight > 0) and turn % self.audio_every == 0
            for one, turn in zip(heard, before, strict=False)
        ]

    def likelihood(self, text_loss: Tensor, audio_loss: Tensor) -> Tensor:
        """What is to fall, of the two cross-entropies: nats."""
        return text_loss + self.audio_weight * audio_loss


def token_nll(
    logits: Tensor, targets: Tensor, mask: Tensor, heard: Sequence[bool] | None = None
) -> Tensor:
    """Cross-entropy of the valid positions, 0 elsewhere.

    moshi fills logits without a valid context with NaN; they are overwritten first, because NaN
    times 0 is NaN. Nothing waits for the device, as indexing by a mask would.

    Args:
        logits: [B, K, T, card].
        targets: [B, K, T] codes; -1 where there is none.
        mask: [B, K, T], True where the logits may be used.
        heard: rows in which the mask is set anywhere; the others cost nothing. None: any may be.

    Returns:
        [B, K, T] fp32, nats.
    """
    if heard is not None and not all(heard):
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
        if any(heard):
            rows = indices(heard, logits.device)
            nll = nll.index_copy(0, rows, token_nll(logits[rows], targets[rows], mask[rows]))
        return nll
    return _cross_entropy(logits, targets, mask)


@fused  # logits in fp32, the largest of all tensors, are never written
def _cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    valid = logits.masked_fill(~mask[..., None], 0).float().flatten(0, -2)
    known = torch.where(mask, targets, _IGNORED).flatten()
    nll = F.cross_entropy(valid, known, ignore_index=_IGNORED, reduction="none")
    return nll.view(targets.shape)


def lm_losses(
    lm: LMModel,
    output: LMOutput,
    codes: Tensor,
    config: LossConfig,
    heard: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Text and audio loss, each a mean weighted and normalised by its own weights.

    Args:
        lm: tells which tokens are padding, which rows are Moshi's and how far attention sees.
        output: of `lm(codes)`.
        codes: [B, K, T].
        config: the weights.
        heard: whether any audio is known in each row; None: it may be.

    Returns:
        Two scalars in nats; 0 for rows without a single valid target in the batch.
    """
    rows = Rows.of(lm)
    text_targets = codes[:, rows.text]
    padding = (text_targets == lm.text_padding_token_id) | (
        text_targets == lm.end_of_text_padding_id
    )
    steps = codes.shape[-1]
    counted = torch.arange(steps, device=codes.device) >= config.first_counted(lm.context, steps)
    counted_text = output.text_mask & counted
    text_weight = torch.where(padding, config.text_padding_weight, 1.0) * counted_text
    audio_targets = codes[:, rows.own]
    audio_weight = (output.mask & counted).float()
    audio_weight[:, 0] *= config.first_codebook_weight
    text_nll = token_nll(output.text_logits, text_targets, output.text_mask)
    audio_nll = token_nll(output.logits, audio_targets, output.mask, heard)
    return _weighted_mean(text_nll, text_weight), _weighted_mean(audio_nll, audio_weight)


def read_clips(
    lm: LMModel,
    codes: Tensor,
    config: LossConfig,
    heard: Sequence[bool] | None = None,
    predicted: Sequence[bool] | None = None,
) -> tuple[LMOutput, Tensor, Tensor]:
    """What the model gives for clips [B, K, T], and `lm_losses` of it.

    Args:
        lm: the model.
        codes: the clips.
        config: the weights.
        heard: whether any audio is known in each row; None: it may be.
        predicted: rows whose audio is predicted and is in the loss; None: all.
    """
    output = forward(lm, codes, heard, predicted=predicted)
    heard = heard if predicted is None else predicted
    return output, *lm_losses(lm, output, codes, config, heard)


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
    seen = [one for stats_of_layer in stats.values() for one in stats_of_layer]
    # of all layers at once: each operation on one of them is a launch that a GPU waits for
    norms = torch.stack([one.norm for one in seen])
    residuals = torch.stack([one.residual_norm for one in seen])
    # in layer 0, padding after a recording has no residual: there the ratio counts as 0, and it
    # divides by 1, because the gradient of 0/0 is NaN even where it is masked
    defined = residuals > 0
    ratios = torch.where(defined, norms / torch.where(defined, residuals, 1.0), 0.0)
    if config.magnitude_over == "mean":
        return _wall(ratios.sum((1, 2)) / defined.sum((1, 2)), config).mean()
    # the wall is 0 where the ratio is
    return _wall(ratios, config).sum() / defined.sum()


def _wall(ratio: Tensor, config: LossConfig) -> Tensor:
    free = WALL_START * config.magnitude_target
    return F.relu((ratio - free) / (config.magnitude_target - free)).square()
