"""What a memory adds to the residual stream of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.compiling import fused
from moshi_ttt.memory import (
    Corrected,
    MemoryConfig,
    MemoryRule,
    MemoryState,
    build_rule,
)


class BranchStats(NamedTuple):
    """Norms of one forward of one branch, connected to autograd.

    A ratio is NaN where branch and residual are both 0.
    """

    raw_norm: Tensor  # [B, T] L2 norm before the gate
    norm: Tensor  # [B, T] L2 norm of what is added to the residual
    residual_norm: Tensor  # [B, T] L2 norm of the residual
    gate_rms: Tensor  # [] root mean square of the gate over channels

    @property
    def ratio(self) -> Tensor:
        """Norm of what is added over the norm of what it is added to, [B, T]."""
        return self.norm / self.residual_norm

    @property
    def raw_ratio(self) -> Tensor:
        """The same before the gate, [B, T]."""
        return self.raw_norm / self.residual_norm


class Shared(NamedTuple):
    """What a memory borrows from the attention of its layer."""

    qkv: Tensor  # [B, T, 3 D] attention's projections of the normed input, before the rotation
    out_proj: nn.Module  # [..., D] to [..., D]


@dataclass(eq=False)
class MemorySwaps:
    """Other memories than the one that was written, from given steps of a forward on."""

    steps: tuple[int, ...] = ()
    """In order; from each of them on the memory is the one below, and is written to from there."""
    memory: MemoryState | None = None
    """In place of what was remembered, [1, ...] or [B, ...]; None: the learned start."""
    last: MemoryState | None = None
    """The memory after the last forward, to be read."""

    def read(self, rule: MemoryRule, x: Tensor, shared_qkv: Tensor | None) -> Tensor:
        """What `rule` reads for x [B, T, D], piece by piece."""
        edges = [0, *(step for step in self.steps if 0 < step < x.shape[1]), x.shape[1]]
        outputs, memory = [], None
        for first, stop in pairwise(edges):
            piece = slice(first, stop)
            qkv = None if shared_qkv is None else shared_qkv[:, piece]
            y, self.last = rule(x[:, piece], memory, qkv)
            outputs.append(y)
            memory = self._given(len(x))
        return torch.cat(outputs, dim=1)

    def _given(self, rows: int) -> MemoryState | None:
        if self.memory is None:
            return None
        return {name: one.expand(rows, *one.shape[1:]) for name, one in self.memory.items()}


@dataclass
class _BranchState(State):
    memory: MemoryState  # buffers at fixed addresses, so that a CUDA graph sees them change
    start: MemoryState  # of one row; not the rule, or a saved state would hold its slow weights

    def commit(self, memory: MemoryState) -> None:
        self._write(self.exec_mask, memory)

    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        self._write(reset_mask, self.start)

    @torch.no_grad()
    def _write(self, rows: Tensor, memory: MemoryState) -> None:
        for name, buffer in self.memory.items():
            _overwrite(buffer, rows, memory[name])


class MemoryBranch(StreamingModule[_BranchState]):
    """What a memory adds to the residual stream: rule, output projection, gate.

    Bounded read-out: z = projection of the rule's output, u = z / sqrt(1 + mean(z^2)), and the
    branch is tanh(gate) u rms(residual), so that its norm is at most max |tanh(gate)| times the
    residual's, by construction. Unbounded: gate z.

    A gate that starts at 0 gets a gradient at once, because the projection does not.
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        """Create and initialise the parameters for a stream of `dim` channels.

        Args:
            dim: channels of the residual stream.
            config: fitted to the model.
        """
        super().__init__()
        self.bounded = config.bounded_readout
        self.rule = build_rule(config, dim)
        self.out_proj: nn.Module
        if config.projections == "shared":
            self.out_proj = Corrected(self.rule.width, dim, config.rank)
        else:
            self.out_proj = nn.Linear(self.rule.width, dim, bias=False)
            nn.init.normal_(self.out_proj.weight, std=self.rule.width**-0.5)
        self.gate = nn.Parameter(torch.full((dim,), config.gate_init))
        self.observer: Callable[[BranchStats], None] | None = None
        """Called in every forward; inside a CUDA graph only when it is captured."""
        self.recomputed = False
        """Whether activation checkpointing runs the forward twice, observed or not."""
        self.swaps: MemorySwaps | None = None
        """What replaces the memory in the middle of a parallel forward."""

    def _init_streaming_state(self, batch_size: int) -> _BranchState:
        memory, start = self._initial(batch_size), self._initial(1)
        return _BranchState(batch_size, self.gate.device, memory, start)

    @torch.no_grad()
    def _initial(self, rows: int) -> MemoryState:
        return {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.rule.init_state(rows).items()
        }

    def updates(self) -> Tensor:
        """Inner updates of each row since its reset, int64 [B]; the streaming state itself."""
        assert self._streaming_state is not None, "inner updates are counted while streaming"
        return self._streaming_state.memory["updates"]

    @torch.no_grad()
    def copy_attention(self, attention: StreamingMultiheadAttention) -> None:
        """Begin with attention's own projections, in place of random ones."""
        for mine, theirs in (
            (self.rule.qkv, attention.in_projs[0]),
            (self.out_proj, attention.out_projs[0]),
        ):
            cast(nn.Linear, mine).weight.copy_(cast(nn.Linear, theirs).weight)

    def forward(self, x: Tensor, residual: Tensor, shared: Shared | None = None) -> Tensor:
        """The branch for T steps.

        Args:
            x: normed input of the memory, [B, T, D].
            residual: stream the branch will be added to, [B, T, D].
            shared: attention's projections, if they are shared.

        Returns:
            [B, T, D], fp32 or wider.
        """
        state, qkv = self._streaming_state, None if shared is None else shared.qkv
        if state is None and self.swaps is not None:
            y = self.swaps.read(self.rule, x, qkv)
        elif state is None:
            y, _ = self.rule(x, shared_qkv=qkv)
        else:
            y, memory = self.rule(x, state.memory, qkv)
            state.commit(memory)
        y = y.to(self.gate.dtype)
        if shared is None:
            z = self.out_proj(y)
        else:
            borrowed = shared.out_proj(y.to(cast(Tensor, shared.out_proj.weight).dtype))
            z = self.out_proj(y, borrowed.to(y.dtype))
        # under grad also without an observer, where activation checkpointing runs the forward again
        # in backward, when the observer is gone, and needs the same graph
        observed = self.observer is not None or (self.recomputed and torch.is_grad_enabled())
        branch, stats = _read_out(z, residual, self.gate, self.rule.dtype, self.bounded, observed)
        if stats is not None and self.observer is not None:
            self.observer(BranchStats(*stats))
        return branch


@fused
def _overwrite(buffer: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `values` [B, ...] or [1, ...] into the rows [B] of a buffer that are true."""
    mask = rows.view(-1, *[1] * (buffer.dim() - 1))
    buffer.copy_(torch.where(mask, values, buffer))


@fused
def _read_out(
    z: Tensor, residual: Tensor, gate: Tensor, dtype: torch.dtype, bounded: bool, observed: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """The branch for what the rule read, z [B, T, D], and the norms of `BranchStats`."""
    z, residual, gate = z.to(dtype), residual.to(dtype), gate.to(dtype)
    # unlike sqrt, the gradient of a norm at 0 is 0, not NaN
    norm = torch.linalg.vector_norm
    if bounded or observed:
        residual_norm = norm(residual, dim=-1, keepdim=True)
    if bounded:
        gate = gate.tanh()
        rms = residual_norm * residual.shape[-1] ** -0.5
        z = F.rms_norm(z, z.shape[-1:], eps=1.0) * rms
    branch = gate * z
    if not observed:
        return branch, None
    gate_rms = norm(gate) * len(gate) ** -0.5
    return branch, (norm(z, dim=-1), norm(branch, dim=-1), residual_norm.squeeze(-1), gate_rms)
