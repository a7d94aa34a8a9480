"""What every memory rule shares: projections, write gate, forgetting, and the walk over time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moshi_ttt.compiling import fused
from moshi_ttt.memory.config import MemoryConfig
from moshi_ttt.memory.projections import Corrected

MemoryState = dict[str, Tensor]
"""Tensors by name, batch first, in fp32 (fp64 in a double module); `updates` is int64 [B]."""


class MemoryRule(nn.Module, ABC):
    """Fast weights that learn while the model runs, H heads of dh channels.

    A rule is functional: `forward` returns a new state and changes nothing in place, so that
    activation checkpointing may run it twice. It is exact at every split of time: one call on T
    steps, and T calls on one step each, compute the same thing.
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        """Create and initialise the parameters for inputs of `dim` channels.

        Args:
            dim: channels of the input.
            config: fitted, i.e. with `heads` and `head_dim` in numbers.
        """
        super().__init__()
        assert config.heads is not None
        assert config.head_dim is not None
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv: nn.Module
        if config.projections == "shared":
            self.qkv = Corrected(dim, 3 * self.width, config.rank)
        else:
            self.qkv = nn.Linear(dim, 3 * self.width, bias=False)
            nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        self.write = nn.Linear(dim, self.heads)
        nn.init.zeros_(self.write.weight)
        nn.init.constant_(self.write.bias, math.log(config.write_gate / (1 - config.write_gate)))
        shortest, longest = (math.log(steps) for steps in config.forgetting_time_steps)
        share = (torch.arange(self.heads) + 0.5) / self.heads
        # log of the rate of forgetting a step, i.e. minus the log of the forgetting time [H]
        self.log_rate = nn.Parameter(-(shortest + (longest - shortest) * share))

    @property
    def width(self) -> int:
        """Channels of the read-out, H x dh."""
        return self.heads * self.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the state and of the inner maths: at least fp32.

        At a write gate of 0.005, bf16 would round most of every update away.
        """
        return torch.promote_types(self.write.weight.dtype, torch.float32)

    @property
    @abstractmethod
    def steps_per_update(self) -> int:
        """Steps from one inner update, as `updates` counts them, to the next."""

    @abstractmethod
    def init_state(self, batch_size: int) -> MemoryState:
        """The learned initial fast weights for each row; differentiable."""

    @abstractmethod
    def _walk(
        self, inputs: Sequence[Tensor], state: MemoryState | None, mixed: bool
    ) -> tuple[Tensor, MemoryState]:
        """Run T steps; for T = 1 in tensor code that never branches on data.

        Args:
            inputs: what `_project` returned.
            state: before the first step; None starts afresh.
            mixed: whether the caller runs in mixed precision, so that sums in bf16 are welcome.

        Returns:
            The read-out [B, H, T, dh] and the state after T steps.
        """

    def forward(
        self, x: Tensor, state: MemoryState | None = None, shared_qkv: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Read and write T steps.

        The projections follow autocast, the inner maths does not. With T = 1 nothing waits for
        the device, so a step may be captured in a CUDA graph.

        Args:
            x: input, [B, T, D], any floating type.
            state: what `init_state` or an earlier call returned; None starts afresh.
            shared_qkv: what attention's projection made of x, [B, T, 3 x H x dh], if it is shared.

        Returns:
            The read-out [B, T, H x dh] in the state's type, and the state after T steps.
        """
        mixed = torch.is_autocast_enabled(x.device.type)
        inputs = self._project(x.to(self.write.weight.dtype), shared_qkv)
        with torch.autocast(x.device.type, enabled=False):
            y, state = self._walk(inputs, state, mixed)
        return y.transpose(1, 2).flatten(2), state

    def _project(self, x: Tensor, shared_qkv: Tensor | None) -> tuple[Tensor, ...]:
        """Unit queries and keys, values [B, H, T, dh] and write gates [B, H, T, 1]."""
        qkv = self.qkv(x) if shared_qkv is None else self.qkv(x, shared_qkv.to(x.dtype))
        q, k, v = _heads_of(qkv, self.heads, self.dtype)
        return q, k, v, self._per_head(_sigmoid(self.write(x), self.dtype))

    @staticmethod
    def _per_head(projected: Tensor) -> Tensor:
        """[B, T, H] as the inner maths wants it: [B, H, T, 1]."""
        return projected.transpose(1, 2).unsqueeze(-1)


@fused
def _heads_of(qkv: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys, and values, [B, H, T, dh], of [B, T, 3 x H x dh]."""
    q, k, v = qkv.to(dtype).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return _unit(q), _unit(k), v


@fused
def _sigmoid(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).sigmoid()


def _unit(x: Tensor) -> Tensor:
    # smooth at 0, unlike a clamped norm: a silent input gets no gradient of 1e12
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
