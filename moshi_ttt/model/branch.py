"""What a memory adds to the residual stream of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import getitem
from typing import NamedTuple, cast

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.compiling import fused
from moshi_ttt.memory import (
    Borrowed,
    Correction,
    MemoryConfig,
    MemoryRule,
    MemoryState,
    build_rule,
)
from moshi_ttt.memory.rule import overwrite


class BranchStats(NamedTuple):
    """Norms of one forward of one branch, connected to autograd.

    A ratio is NaN where branch and residual are both 0.
    """

    raw_norm: Tensor  # [B, T] L2 norm before the gate
    norm: Tensor  # [B, T] L2 norm of what is added to the residual
    residual_norm: Tensor  # [B, T] L2 norm of the residual
    gate: Tensor  # [D] as it multiplies: bounded, if the read-out is

    @property
    def gate_rms(self) -> Tensor:
        """Root mean square of the gate over channels, []."""
        return torch.linalg.vector_norm(self.gate) * len(self.gate) ** -0.5

    @property
    def ratio(self) -> Tensor:
        """Norm of what is added over the norm of what it is added to, [B, T]."""
        return self.norm / self.residual_norm

    @property
    def raw_ratio(self) -> Tensor:
        """The same before the gate, [B, T]."""
        return self.raw_norm / self.residual_norm


class Pieces(NamedTuple):
    """What a branch is made of, [B, T, D] each."""

    projected: Tensor  # what the rule read, projected
    borrowed: Tensor | None  # to be added to it: attention's projection of the same, if shared
    residual: Tensor
    branch: Tensor


class Shared(NamedTuple):
    """What a memory borrows from the attention of its layer."""

    qkv: Borrowed  # attention's projections of the normed input, before the rotation
    out_proj: nn.Module  # [..., D] to [..., D]


class Carried(NamedTuple):
    """The memory that an earlier forward left, for the rows that go on from it."""

    memory: MemoryState  # [B, ...]
    rows: Tensor  # [B] bool; the others begin at the learned start

    def start(self, rule: MemoryRule) -> MemoryState:
        """What a forward begins from; no gradient reaches the earlier one."""
        return {
            name: torch.where(
                self.rows.view(-1, *[1] * (fresh.dim() - 1)), self.memory[name].detach(), fresh
            )
            for name, fresh in rule.init_state(len(self.rows)).items()
        }


@dataclass(eq=False)
class MemorySwaps:
    """Other memories than the one that was written, from the start or given steps of a forward."""

    steps: tuple[int, ...] = ()
    """In order; from each of them on the memory is the one below, and is written to from there."""
    memory: MemoryState | None = None
    """In place of what was remembered, [1, ...] or [B, ...]; None: the learned start."""
    begin: Carried | None = None
    """In place of the learned start, at the first step."""
    last: MemoryState | None = None
    """The memory after the last forward, to be read."""

    def read(self, rule: MemoryRule, x: Tensor, shared_qkv: Borrowed | None) -> Tensor:
        """What `rule` reads for x [B, T, D], piece by piece."""
        whole = None if shared_qkv is None else shared_qkv()
        edges = [0, *(step for step in self.steps if 0 < step < x.shape[1]), x.shape[1]]
        outputs = []
        memory = None if self.begin is None else self.begin.start(rule)
        for first, stop in pairwise(edges):
            piece = slice(first, stop)
            qkv = None if whole is None else partial(getitem, whole, (slice(None), piece))
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

    @torch.no_grad()
    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        for name, buffer in self.memory.items():
            overwrite(buffer, reset_mask, self.start[name])


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
            self.out_proj = Correction(self.rule.width, dim, config.rank)
        else:
            self.out_proj = nn.Linear(self.rule.width, dim, bias=False)
            nn.init.normal_(self.out_proj.weight, std=self.rule.width**-0.5)
        self.gate = nn.Parameter(torch.full((dim,), config.gate_init))
        self.observer: Callable[[BranchStats], None] | None = None
        """Called in every forward; inside a CUDA graph only when it is captured."""
        self.keeper: Callable[[Pieces], None] | None = None
        """The same before anything is reduced: for who reduces all layers at once."""
        self.recomputed = False
        """Whether activation checkpointing runs the forward twice, observed or not."""
        self._prepared: tuple[Tensor, Tensor] | None = None
        self.swaps: MemorySwaps | None = None
        """What replaces the memory at the start or in the middle of a parallel forward."""

    def _prepare(self, dtype: torch.dtype) -> None:
        """Turn the small weights into what a stream needs, once and not at every step."""
        self.rule.prepare(dtype)
        if isinstance(self.out_proj, Correction):
            self._prepared = self.out_proj.weights(dtype)

    def _init_streaming_state(self, batch_size: int) -> _BranchState:
        self.rule.prepare(None)
        self._prepared = None
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
            [B, T, D], in the type of `residual`.
        """
        state, qkv = self._streaming_state, None if shared is None else shared.qkv
        if state is None and self.swaps is not None:
            y = self.swaps.read(self.rule, x, qkv)
        elif state is None:
            y, _ = self.rule(x, shared_qkv=qkv)
        else:
            if self._prepared is None:
                self._prepare(x.dtype)
            y = self.rule.stream(x, state.memory, state.exec_mask, qkv)
        borrowed = None
        if shared is None:
            z = self.out_proj(y.to(self.gate.dtype))
        else:
            y = y.to(cast(Tensor, shared.out_proj.weight).dtype)
            borrowed = shared.out_proj(y)
            prepared = None if state is None else self._prepared
            down, up = prepared or cast(Correction, self.out_proj).weights(y.dtype)
            z = F.linear(F.linear(y, down), up)
        # under grad also without an observer, where activation checkpointing runs the forward again
        # in backward, when the observer is gone, and needs the same graph
        observed = self.observer is not None or (self.recomputed and torch.is_grad_enabled())
        branch, stats = _read_out(
            z, borrowed, residual, self.gate, self.rule.dtype, self.bounded, observed
        )
        if stats is not None and self.observer is not None:
            self.observer(BranchStats(*stats))
        if self.keeper is not None:
            self.keeper(Pieces(z, borrowed, residual, branch))
        return branch


@fused
def _read_out(
    z: Tensor,
    borrowed: Tensor | None,
    residual: Tensor,
    gate: Tensor,
    dtype: torch.dtype,
    bounded: bool,
    observed: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """The branch for what the rule read and projected, [B, T, D], and the `BranchStats`."""
    given = residual.dtype
    z, residual, gate = z.to(dtype), residual.to(dtype), gate.to(dtype)
    if borrowed is not None:
        z = z + borrowed.to(dtype)
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
        return branch.to(given), None
    stats = norm(z, dim=-1), norm(branch, dim=-1), residual_norm.squeeze(-1), gate
    return branch.to(given), stats
