"""What every memory rule shares: projections, write gate, forgetting, and the walk over time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.compiling import fused
from moshi_ttt.memory.config import MemoryConfig
from moshi_ttt.memory.projections import Correction

MemoryState = dict[str, Tensor]
"""Tensors by name, batch first, in fp32 (fp64 in a double module); `updates` is int64 [B]."""
Borrowed = Callable[[], Tensor]
"""Gives what attention's projection made of the same input, [B, T, 3 x H x dh].

Asked for as late as can be: a step does not wait for it before it must.
"""


Weights = tuple[Tensor, Tensor | None]
"""Of the maps to a few channels, one above the other, and of the second half of a correction."""


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
            self.qkv = Correction(dim, 3 * self.width, config.rank)
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
        self.observer: Callable[[Sequence[Tensor]], None] | None = None
        """Called with what `_project` gave; inside a CUDA graph only when it is captured."""
        self.rate = 1.0
        """Multiplies the write gates, which stay at most 1; 0 stops all inner updates."""
        self._prepared: Weights | None = None

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
        self, inputs: Sequence[Tensor], state: MemoryState | None
    ) -> tuple[Tensor, MemoryState]:
        """Run T steps; for T = 1 in tensor code that never branches on data.

        Args:
            inputs: what `_project` returned.
            state: before the first step; None starts afresh.

        Returns:
            The read-out [B, H, T, dh] and the state after T steps.
        """

    def forward(
        self, x: Tensor, state: MemoryState | None = None, shared_qkv: Borrowed | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Read and write T steps.

        The projections follow autocast, the inner maths does not. With T = 1 nothing waits for
        the device, so a step may be captured in a CUDA graph.

        Args:
            x: input, [B, T, D], any floating type.
            state: what `init_state` or an earlier call returned; None starts afresh.
            shared_qkv: attention's projection, if it is shared.

        Returns:
            The read-out [B, T, H x dh], in the state's type unless a kernel sums in bf16, and the
            state after T steps.
        """
        inputs = self._inputs(x, shared_qkv)
        with torch.autocast(x.device.type, enabled=False):
            y, state = self._walk(inputs, state)
        return y.transpose(1, 2).flatten(2), state

    @torch.no_grad()
    def stream(
        self, x: Tensor, state: MemoryState, rows: Tensor, shared_qkv: Borrowed | None = None
    ) -> Tensor:
        """Read and write T steps, and leave the new state in `state`, without gradients.

        Args:
            x: input, [B, T, D].
            state: changed in place, in those rows that are true.
            rows: [B].
            shared_qkv: as in `forward`.

        Returns:
            The read-out [B, T, H x dh].
        """
        inputs = self._inputs(x, shared_qkv, self._prepared)
        with torch.autocast(x.device.type, enabled=False):
            y = self._stream(inputs, state, rows)
        return y.transpose(1, 2).flatten(2)

    def _stream(self, inputs: Sequence[Tensor], state: MemoryState, rows: Tensor) -> Tensor:
        y, after = self._walk(inputs, state)
        for name, tensor in state.items():
            overwrite(tensor, rows, after[name])
        return y

    def _inputs(
        self, x: Tensor, shared_qkv: Borrowed | None, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        inputs = self._project(x, shared_qkv, weights)
        if self.rate != 1:
            q, k, v, write, *others = inputs
            inputs = (q, k, v, (self.rate * write).clamp(max=1), *others)
        if self.observer is not None:
            self.observer(inputs)
        return inputs

    def _project(
        self, x: Tensor, shared_qkv: Borrowed | None, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        """Unit queries and keys, values [B, H, T, dh], write gates [B, H, T, 1], and more.

        The first three are in `_read_dtype`, all else in `dtype`.
        """
        # halves are what a model is stored in; other inputs are as the parameters are
        half = x.dtype in (torch.bfloat16, torch.float16)
        x = x if half else x.to(self.write.weight.dtype)
        narrow, up = weights or self._weights(x.dtype)
        parts = F.linear(x, narrow).split(self._widths, dim=-1)
        gates = self._gates(*parts[: len(self._gate_maps())])
        qkv = self.qkv(x.to(self.write.weight.dtype)) if up is None else F.linear(parts[-1], up)
        borrowed = None if shared_qkv is None else shared_qkv()
        return *_heads_of(qkv, borrowed, self.heads, self.dtype, self._read_dtype(x)), *gates

    def _read_dtype(self, x: Tensor) -> torch.dtype:
        """Type of queries, keys and values for an input [B, T, D]."""
        return self.dtype

    def prepare(self, dtype: torch.dtype | None) -> None:
        """Keep weights as a stream of inputs of this type needs them; None lets go of them.

        Clips never read them: those of a training change from step to step.
        """
        self._prepared = None if dtype is None else self._weights(dtype)

    def _weights(self, dtype: torch.dtype) -> Weights:
        # each alone would leave most of a GPU idle
        narrow = [gate.weight for gate in self._gate_maps()]
        up = None
        if isinstance(self.qkv, Correction):
            narrow.append(self.qkv.down.weight)
            up = self.qkv.up.weight.to(dtype)
        return torch.cat(narrow).to(dtype), up

    @property
    def _widths(self) -> list[int]:
        gates = [self.heads] * len(self._gate_maps())
        return [*gates, self.qkv.down.out_features] if isinstance(self.qkv, Correction) else gates

    def _gate_maps(self) -> list[nn.Linear]:
        """Linear maps from the input to one channel a head."""
        return [self.write]

    def _gates(self, *projected: Tensor) -> tuple[Tensor, ...]:
        """What the rule makes of `_gate_maps`, [B, T, H] each and without biases, [B, H, T, 1]."""
        return (self._per_head(_sigmoid(projected[0], self.write.bias, self.dtype)),)

    @staticmethod
    def _per_head(projected: Tensor) -> Tensor:
        """[B, T, H] as the inner maths wants it: [B, H, T, 1]."""
        return projected.transpose(1, 2).unsqueeze(-1)


@fused
def overwrite(buffer: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `values` [B, ...] or [1, ...] into the rows [B] of a buffer that are true."""
    mask = rows.view(-1, *[1] * (buffer.dim() - 1))
    buffer.copy_(torch.where(mask, values, buffer))


@fused
def _heads_of(
    qkv: Tensor, borrowed: Tensor | None, heads: int, dtype: torch.dtype, given: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys, and values, [B, H, T, dh], of the sum of [B, T, 3 x H x dh].

    Computed in `dtype`, given in another.
    """
    qkv = qkv.to(dtype)
    if borrowed is not None:
        qkv = qkv + borrowed.to(dtype)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return _Unit.apply(q, given), _Unit.apply(k, given), v.to(given)


@fused
def _sigmoid(x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(dtype) + bias).sigmoid()


class _Unit(torch.autograd.Function):
    """x / |x|; keeps what it gives for its backward pass, which the memory keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: torch.dtype) -> Tensor:
        # smooth at 0, unlike a clamped norm: a silent input gets no gradient of 1e12
        scale = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        unit = x * scale
        if (
            given != unit.dtype
        ):  # torch 2.11 compiles a cast that changes nothing to a wrong gradient
            unit = unit.to(given)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        unit, gradient = unit.to(scale.dtype), gradients[0].to(scale.dtype)
        along = (unit * gradient).sum(-1, keepdim=True)
        return scale * (gradient - unit * along), None
