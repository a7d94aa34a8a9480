"""Test-time training by mini-batch gradient descent: Sun et al. 2024, arXiv:2407.04620.

The memory is a small model f that is trained, while it is used, to map each key to its value:
loss 1/2 |f(k) - v|^2. Within a mini-batch all gradients are taken at the fast weights it started
from (the anchor), so that step t reads f(q) at `anchor - sum over s <= t of rate_s * gradient_s`.
Gradients of a linear map are outer products, so that sum never has to be formed for every t
(the paper's dual form); its mask over s <= t is what keeps the future out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.memory.config import MemoryConfig
from moshi_ttt.memory.rule import MemoryRule, MemoryState

_EPS = 1e-5
FastWeights = dict[str, Tensor]


class MiniBatchRule(MemoryRule):
    """Mini-batches, forgetting and the inner loss; subclasses say what f is.

    f ends in a LayerNorm, which makes the loss blind to the scale of the fast weights: left
    alone, their norm only grows. So at the end of each mini-batch of b steps they relax towards
    their learned initial value: `anchor <- W0 + a^b (W - W0)`, a = exp(-1 / forgetting time).

    The state holds, for each fast weight NAME: the anchor `NAME`, and the rate-weighted sum of
    the gradients so far in this mini-batch `step_NAME`, both [B, H, rows, columns]; `phase`,
    int64 [B], steps into the mini-batch; `updates`, int64 [B], mini-batches completed.
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__(dim, config)
        self.mini_batch_steps = config.mini_batch_steps
        self.inner_lr = config.inner_lr
        self.norm_scale = nn.Parameter(torch.ones(self.heads, 1, self.head_dim))
        self.norm_bias = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))
        # unit keys and unit-variance weights give f a pre-norm output of unit variance, where
        # the LayerNorm neither amplifies nor damps the inner gradient
        self.initial = nn.ParameterDict(
            {
                name: torch.randn(shape) if random else torch.zeros(shape)
                for name, (shape, random) in self._fast_weight_shapes().items()
            }
        )

    @property
    def steps_per_update(self) -> int:
        """One update a mini-batch."""
        return self.mini_batch_steps

    def init_state(self, batch_size: int) -> MemoryState:
        """The learned initial fast weights for each row; differentiable."""
        count = torch.zeros(batch_size, dtype=torch.int64, device=self.write.weight.device)
        state = {"phase": count, "updates": count}
        for name, w0 in self.initial.items():
            state[name] = w0.to(self.dtype).expand(batch_size, *w0.shape)
            state[f"step_{name}"] = torch.zeros_like(state[name])
        return state

    @abstractmethod
    def _fast_weight_shapes(self) -> dict[str, tuple[tuple[int, int, int], bool]]:
        """Name -> shape [H, rows, columns], and whether W0 starts random (weights) or 0."""

    @abstractmethod
    def _dual(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, anchor: FastWeights, step: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        """Read n steps of one mini-batch, and add their gradients to `step`."""

    def _chunk_lengths(self, steps: int, state: MemoryState | None) -> Sequence[int]:
        if steps == 1:
            return [1]
        phases = {0} if state is None else set(state["phase"].tolist())
        if len(phases) > 1:
            return [1] * steps
        head = min(self.mini_batch_steps - phases.pop(), steps)
        full, tail = divmod(steps - head, self.mini_batch_steps)
        return [head] + [self.mini_batch_steps] * full + [tail] * (tail > 0)

    def _advance(self, chunk: Sequence[Tensor], state: MemoryState) -> tuple[Tensor, MemoryState]:
        q, k, v, write = chunk
        anchor = {name: state[name] for name in self.initial}
        step = {name: state[f"step_{name}"] for name in self.initial}
        y, step = self._dual(q, k, v, self.inner_lr * write, anchor, step)

        phase = state["phase"] + q.shape[2]
        ends = phase == self.mini_batch_steps
        after: MemoryState = {
            "phase": phase.masked_fill(ends, 0),
            "updates": state["updates"] + ends,
        }
        rows = ends.view(-1, 1, 1, 1)
        kept = torch.exp(-self.mini_batch_steps * self.log_rate.to(self.dtype).exp())
        for name, w0 in self.initial.items():
            w0 = w0.to(self.dtype)
            relaxed = torch.lerp(w0, anchor[name] - step[name], kept.view(-1, 1, 1))
            after[name] = torch.where(rows, relaxed, anchor[name])
            after[f"step_{name}"] = step[name].masked_fill(rows, 0.0)
        return y, after

    def _read(self, q: Tensor, z: Tensor) -> Tensor:
        """f's last line: q + LayerNorm(z)."""
        normed = F.layer_norm(z, (self.head_dim,), eps=_EPS)
        return q + normed * self.norm_scale.to(z.dtype) + self.norm_bias.to(z.dtype)

    def _error(self, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """Gradient of 1/2 |k + LayerNorm(z) - v|^2 with respect to z, [B, H, n, dh]."""
        centred = z - z.mean(-1, keepdim=True)
        inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + _EPS)
        normed = centred * inverse_std
        scale = self.norm_scale.to(z.dtype)
        grad = scale * (k + normed * scale + self.norm_bias.to(z.dtype) - v)
        along = (grad * normed).mean(-1, keepdim=True)
        return inverse_std * (grad - grad.mean(-1, keepdim=True) - normed * along)


class TTTLinear(MiniBatchRule):
    """f(x) = x + LayerNorm(x W + b)."""

    def _fast_weight_shapes(self) -> dict[str, tuple[tuple[int, int, int], bool]]:
        return {
            "weight": ((self.heads, self.head_dim, self.head_dim), True),
            "bias": ((self.heads, 1, self.head_dim), False),
        }

    def _dual(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, anchor: FastWeights, step: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        weight, bias = anchor["weight"], anchor["bias"]
        error = rate * self._error(k, v, k @ weight + bias)
        z = q @ (weight - step["weight"]) + (bias - step["bias"]) - _causal(q, k) @ error
        return self._read(q, z), {
            "weight": step["weight"] + k.mT @ error,
            "bias": step["bias"] + error.sum(2, keepdim=True),
        }


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

    @property
    def hidden_scale(self) -> float:
        """c: the mean of gelu(n)^2 is 0.425 for a standard normal n."""
        return (0.425 * 4 * self.head_dim) ** -0.5

    def _dual(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, anchor: FastWeights, step: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        before = k @ anchor["weight1"] + anchor["bias1"]
        hidden = self.hidden_scale * F.gelu(before)
        error2 = self._error(k, v, hidden @ anchor["weight2"] + anchor["bias2"])
        slope = self.hidden_scale * _gelu_slope(before)
        error1 = rate * slope * (error2 @ anchor["weight2"].mT)
        error2 = rate * error2

        now = {name: anchor[name] - step[name] for name in anchor}
        read = q @ now["weight1"] + now["bias1"] - _causal(q, k) @ error1
        read = self.hidden_scale * F.gelu(read)
        z = read @ now["weight2"] + now["bias2"] - _causal(read, hidden) @ error2
        return self._read(q, z), {
            "weight1": step["weight1"] + k.mT @ error1,
            "bias1": step["bias1"] + error1.sum(2, keepdim=True),
            "weight2": step["weight2"] + hidden.mT @ error2,
            "bias2": step["bias2"] + error2.sum(2, keepdim=True),
        }


def _causal(queries: Tensor, keys: Tensor) -> Tensor:
    """How much step s <= t writes into the read-out of step t, bias included, [B, H, n, n]."""
    return (queries @ keys.mT + 1).tril()


def _gelu_slope(x: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal_cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
