"""The course of a codec's training: its phases, its length and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum


class Phase(IntEnum):
    """What a training does at the time."""

    PLAIN = 0
    """Encoder and decoder learn, nothing is quantised."""
    QUANTISED = 1
    """All of it learns."""
    DECODER = 2
    """The encoder stays as it is: the decoder learns codes that mean the same from now on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one training goes; shares are of the whole training, 0..1."""

    minutes: float = math.inf
    """Length of the training."""
    updates: float = math.inf
    """The same in optimizer steps of the codec; what is reached first ends it."""
    rows: int = 24
    """Pieces of an update; every fourth update has a quarter of them, four times as long."""
    piece_steps: int = 32
    """Length of a short piece; 32 steps = 2.56 s."""
    peak_lr: float = 1.5e-3
    """Learning rate after the warm-up; without a readout, 2e-3 collapsed to one codeword."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is written."""
    plain_share: float = 0.1
    """`Phase.PLAIN`."""
    decoder_share: float = 0.4
    """`Phase.DECODER`, at the end."""
    bypass_rate: float = 0.2
    """Pieces that pass unquantised in `Phase.QUANTISED`."""
    codebook_batches: int = 160
    """Updates' worth of latents that codebooks are fitted to, ahead of each later phase."""
    detune: float = 0.15
    """Half of the pieces are played up to so much faster or slower, as a natural logarithm: other
    voices than the few there are."""
    updates_per_epoch: int = 500
    """Between validations and checkpoints."""
    seed: int = 0
    """Of weights and pieces."""


def learning_rate(progress: float) -> float:
    """Learning rate over its peak: a short warm-up, then half a cosine down to a hundredth."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))
