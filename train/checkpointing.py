"""Activation checkpointing only where a step does not fit without it: tried once, beforehand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moshi_ttt.model.build import recompute_layers
from moshi_ttt.model.hybrid import observe_branches
from moshi_ttt.model.weights import trainable_weights
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.losses import read_clips

Checkpointing = bool | Literal["auto"]
USABLE = 0.92  # of a GPU's memory; the rest is for what a trial cannot know, such as fragments
GIB = 2**30


def choose_checkpointing(module: Any, trainer: Trainer) -> None:
    """Switch activation checkpointing off, unless a batch does not fit without it; and say so.

    Without a GPU nothing is to choose, and it is off.

    Args:
        module: a `MoshiTTT` on its device, before its first step.
        trainer: of several processes all choose the same.
    """
    if module.device.type != "cuda":
        return
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    shape = data.batch_size, Rows.of(module.lm).count, data.clip_steps
    codes = torch.zeros(shape, dtype=torch.long, device=module.device)
    recompute_layers(module.lm, False)
    needed = _peak_bytes(module, trainer, codes)
    fits = trainer.strategy.reduce_boolean_decision(needed is not None)
    recompute_layers(module.lm, not fits)
    room = torch.cuda.get_device_properties(module.device).total_memory / GIB
    why = f"on, a step does not fit into {USABLE:.0%} of {room:.0f} GiB without it"
    if fits and needed is not None:
        why = f"off, a step takes {needed / GIB:.1f} of {room:.0f} GiB without it"
    module.print(f"activation checkpointing: {why}")


def _peak_bytes(module: Any, trainer: Trainer, codes: Tensor) -> int | None:
    """What a step on clips [B, K, T] takes, forward and backward; None if that is too much."""
    parameters = [*trainable_weights(module.lm).values()]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(codes.device)
    torch.cuda.set_per_process_memory_fraction(USABLE, codes.device)
    try:
        # AdamW's two moments come with its first step
        moments = [torch.empty(2, *one.shape, device=codes.device) for one in parameters]
        with trainer.precision_plugin.train_step_context(), observe_branches(module.lm):
            _, text_loss, audio_loss = read_clips(module.lm, codes, module.loss_config)
        torch.autograd.grad(text_loss + audio_loss, parameters, allow_unused=True)
        del moments
        return torch.cuda.max_memory_allocated(codes.device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, codes.device)
        torch.cuda.empty_cache()
