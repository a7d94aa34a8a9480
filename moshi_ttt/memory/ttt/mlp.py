"""Two layers that learn while they are used: Sun et al. 2024, arXiv:2407.04620, TTT-MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.memory.ttt.mini_batch import FastWeights, MiniBatchRule, Norm, causal


class TTTMLP(MiniBatchRule):
    """f(x) = x + LayerNorm(c gelu(x W1 + b1) W2 + b2), hidden width 4 dh.

    The constant c brings the hidden vector to about unit length, like the keys, so that one
    inner rate suits both layers and means the same as in `TTTLinear`; the paper divides its
    rate by the width instead.
    """

    def _fast_weight_shapes(self) -> dict[str, tuple[tuple[int, int, int], bool]]:
        hidden = 4 * self.head_dim
        return {
            "weight1": ((self.heads, self.head_dim, hidden), True),
            "bias1": ((self.heads, 1, hidden), False),
            "weight2": ((self.heads, hidden, self.head_dim), True),
            "bias2": ((self.heads, 1, self.head_dim), False),
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
        scale = (0.425 * 4 * q.shape[-1]) ** -0.5  # the mean of gelu(n)^2, n standard normal
        before = k @ anchor["weight1"] + anchor["bias1"]
        hidden = scale * F.gelu(before)
        error2 = norm.error(k, v, hidden @ anchor["weight2"] + anchor["bias2"])
        slope = scale * _gelu_slope(before)
        error1 = rate * slope * (error2 @ anchor["weight2"].mT)
        error2 = rate * error2

        now = {name: anchor[name] - step[name] for name in anchor}
        read = q @ now["weight1"] + now["bias1"] - causal(q, k) @ error1
        read = scale * F.gelu(read)
        z = read @ now["weight2"] + now["bias2"] - causal(read, hidden) @ error2
        return norm.read(q, z), {
            "weight1": step["weight1"] + k.mT @ error1,
            "bias1": step["bias1"] + error1.sum(2, keepdim=True),
            "weight2": step["weight2"] + hidden.mT @ error2,
            "bias2": step["bias2"] + error2.sum(2, keepdim=True),
        }


def _gelu_slope(x: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal_cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
