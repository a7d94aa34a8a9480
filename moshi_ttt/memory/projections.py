"""Projections that borrow a frozen linear of the layer and learn a low-rank correction to it."""

from __future__ import annotations

from torch import Tensor, nn


class Corrected(nn.Module):
    """Somebody else's linear map plus `up(down(x))`, which starts at 0.

    The borrowed map is no submodule: its owner keeps its weights, and what it gave is handed in,
    so that no weight is read twice.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=inputs**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, borrowed: Tensor) -> Tensor:
        """The corrected projection [..., outputs].

        Args:
            x: what was projected, [..., inputs].
            borrowed: what the other map made of it, [..., outputs].
        """
        return borrowed + self.up(self.down(x))
