"""A linear map that learns while it is used: Sun et al. 2024, arXiv:2407.04620, TTT-Linear."""

from __future__ import annotations

from torch import Tensor

from moshi_ttt.memory.ttt.mini_batch import FastWeights, MiniBatchRule, Norm, causal


class TTTLinear(MiniBatchRule):
    """f(x) = x + LayerNorm(x W + b)."""

    def _fast_weight_shapes(self) -> dict[str, tuple[tuple[int, int, int], bool]]:
        return {
            "weight": ((self.heads, self.head_dim, self.head_dim), True),
            "bias": ((self.heads, 1, self.head_dim), False),
        }

    @staticmethod
    def dual(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        anchor: FastWeights,
        step: FastWeights,
        norm: Norm,
    ) -> tuple[Tensor, FastWeights]:
        """See `MiniBatchRule.dual`."""
        weight, bias = anchor["weight"], anchor["bias"]
        error = rate * norm.error(k, v, k @ weight + bias)
        z = q @ (weight - step["weight"]) + (bias - step["bias"]) - causal(q, k) @ error
        return norm.read(q, z), {
            "weight": step["weight"] + k.mT @ error,
            "bias": step["bias"] + error.sum(2, keepdim=True),
        }
