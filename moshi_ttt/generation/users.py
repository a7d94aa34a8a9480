"""What the user does while Moshi talks."""

from __future__ import annotations

import torch
from moshi.models.compression import MimiModel
from torch import Tensor

from moshi_ttt.clock import Clock


def silence_codes(codec: MimiModel, clock: Clock, codebooks: int) -> Tensor:
    """[codebooks, 1] codes that the codec settles on when nothing is said."""
    silence = torch.zeros(1, 1, clock.steps(4.0) * clock.samples_per_step)
    with torch.no_grad():
        codes = codec.encode(silence.to(next(codec.parameters()).device))
    return codes[0, :codebooks, -1:]
