"""What a memory learns where it borrows the projections of its layer's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Correction(nn.Module):
    """A low-rank correction, `up(down(x))`, to what a frozen linear map gives; starts at 0.

    The map is no submodule: its owner keeps its weights, and whoever uses both adds what it gave,
    so that no weight is read twice.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=inputs**-0.5)
        nn.init.zeros_(self.up.weight)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of `down` and `up` in another type."""
        return self.down.weight.to(dtype), self.up.weight.to(dtype)
