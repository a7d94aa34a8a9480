"""moshi's gated feed-forward in training, where moshi itself compiles nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from moshi.modules.gating import ActivationGating
from torch import Tensor, nn

from moshi_ttt.compiling import fused


class FusedGating(ActivationGating):
    """The same numbers as moshi's; out of training it is moshi's own code."""

    @classmethod
    def adopt(cls, gating: ActivationGating) -> Self:
        """The same gating, sharing all modules of `gating`."""
        adopted = cls(1, 3, gating.activation, device="meta")
        adopted.linear_in, adopted.linear_out = gating.linear_in, gating.linear_out
        return adopted.train(gating.training)

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward's update, [B, T, D]."""
        if not self.training:
            update: Tensor = super().forward(x)
            return update
        out: Tensor = self.linear_out(_gated(self.linear_in(x), self.activation))
        return out


@fused
def _gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return activation(gate) * value


def fuse_gating(model: nn.Module) -> None:
    """Make a `FusedGating` of every gating, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is ActivationGating:
                setattr(parent, name, FusedGating.adopt(child))
