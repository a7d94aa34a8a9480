"""Test-time training by mini-batch gradient descent: Sun et al. 2024, arXiv:2407.04620.

The memory is a small model f that is trained, while it is used, to map each key to its value:
loss 1/2 |f(k) - v|^2. Within a mini-batch all gradients are taken at the fast weights it started
from (the anchor), so that step t reads f(q) at `anchor - sum over s <= t of rate_s * gradient_s`.
Gradients of a linear map are outer products, so that sum never has to be formed for every t
(the paper's dual form); its mask over s <= t is what keeps the future out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.compiling import fused
from moshi_ttt.memory.config import MemoryConfig
from moshi_ttt.memory.rule import MemoryRule, MemoryState

_EPS = 1e-5
_AT_ONCE = 8
"""Whole mini-batches in one call: what a call of a compiled function costs is paid once for all."""
FastWeights = dict[str, Tensor]


class Norm(NamedTuple):
    """The LayerNorm that f ends in, for each head [H, 1, dh]."""

    scale: Tensor
    bias: Tensor

    def read(self, q: Tensor, z: Tensor) -> Tensor:
        """f's last line: q + LayerNorm(z)."""
        normed = F.layer_norm(z, z.shape[-1:], eps=_EPS)
        return q + normed * self.scale + self.bias

    def error(self, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """Gradient of 1/2 |k + LayerNorm(z) - v|^2 with respect to z, [B, H, n, dh]."""
        centred = z - z.mean(-1, keepdim=True)
        inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + _EPS)
        normed = centred * inverse_std
        grad = self.scale * (k + normed * self.scale + self.bias - v)
        along = (grad * normed).mean(-1, keepdim=True)
        return inverse_std * (grad - grad.mean(-1, keepdim=True) - normed * along)


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

    @staticmethod
    @abstractmethod
    def dual(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        anchor: FastWeights,
        step: FastWeights,
        norm: Norm,
    ) -> tuple[Tensor, FastWeights]:
        """Read n steps of one mini-batch, and add their gradients to `step`.

        Args:
            q: queries, [B, H, n, dh].
            k: keys, likewise.
            v: values, likewise.
            rate: of each step, [B, H, n, 1].
            anchor: fast weights that the mini-batch started from.
            step: sum of its gradients so far.
            norm: of f.

        Returns:
            The read-out [B, H, n, dh], and the sum after these steps.
        """

    def _chunk_lengths(self, steps: int, state: MemoryState | None) -> Sequence[int]:
        if steps == 1:
            return [1]
        phases = {0} if state is None else set(state["phase"].tolist())
        size = self.mini_batch_steps
        if phases == {0}:
            calls, rest = divmod(steps, _AT_ONCE * size)
            return [*[_AT_ONCE * size] * calls, *_lengths(range(size, rest, size), rest)]
        # a border wherever a mini-batch of any row ends
        ends = {stop for phase in phases for stop in range(size - phase, steps, size)}
        return _lengths(sorted(ends), steps)

    def _walk(
        self, inputs: Sequence[Tensor], state: MemoryState | None
    ) -> tuple[Tensor, MemoryState]:
        rows, _, steps, _ = inputs[0].shape
        lengths = self._chunk_lengths(steps, state)
        state = state or self.init_state(rows)
        outputs = []
        for chunk in zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True):
            y, state = self._advance(chunk, state)
            outputs.append(y)
        return torch.cat(outputs, dim=2), state

    def _advance(self, chunk: Sequence[Tensor], state: MemoryState) -> tuple[Tensor, MemoryState]:
        q, k, v, write = chunk
        norm = Norm(self.norm_scale.to(self.dtype), self.norm_bias.to(self.dtype))
        initial = {name: w0.to(self.dtype) for name, w0 in self.initial.items()}
        rate, dual = self.inner_lr * write, self.dual
        return _advance(
            q, k, v, rate, state, initial, norm, self.log_rate, self.steps_per_update, dual
        )


@fused
def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    state: MemoryState,
    initial: FastWeights,
    norm: Norm,
    log_rate: Tensor,
    mini_batch_steps: int,
    dual: Callable[..., tuple[Tensor, FastWeights]],
) -> tuple[Tensor, MemoryState]:
    """The read-out of n steps, and the state after them: of one mini-batch, or of whole ones."""
    kept = torch.exp(-mini_batch_steps * log_rate.to(q.dtype).exp())
    outputs = []
    parts = (one.split(mini_batch_steps, dim=2) for one in (q, k, v, rate))
    for q, k, v, rate in zip(*parts, strict=True):
        anchor = {name: state[name] for name in initial}
        step = {name: state[f"step_{name}"] for name in initial}
        y, step = dual(q, k, v, rate, anchor, step, norm)
        outputs.append(y)

        phase = state["phase"] + q.shape[2]
        ends = phase == mini_batch_steps
        state = {"phase": phase.masked_fill(ends, 0), "updates": state["updates"] + ends}
        rows = ends.view(-1, 1, 1, 1)
        for name, w0 in initial.items():
            relaxed = torch.lerp(w0, anchor[name] - step[name], kept.view(-1, 1, 1))
            state[name] = torch.where(rows, relaxed, anchor[name])
            state[f"step_{name}"] = step[name].masked_fill(rows, 0.0)
    return torch.cat(outputs, dim=2), state


def _lengths(ends: Iterable[int], steps: int) -> list[int]:
    """Of the parts that `steps` fall into where each of `ends` is a border."""
    return [stop - first for first, stop in pairwise([0, *ends, steps]) if stop > first]


def causal(queries: Tensor, keys: Tensor) -> Tensor:
    """How much step s <= t writes into the read-out of step t, bias included, [B, H, n, n]."""
    return (queries @ keys.mT + 1).tril()
