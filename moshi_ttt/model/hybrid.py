"""Moshi's layers with a memory beside attention.

A hybrid layer wraps an unchanged Moshi layer; with its gates at 0 it computes what Moshi computes,
bit for bit. Memory is added to a loaded model before it first streams, because moshi's streaming
modules list their children once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import State, StreamingContainer, StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformerLayer
from moshi.utils.compile import no_compile
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.errors import UserError
from moshi_ttt.memory import (
    Corrected,
    MemoryConfig,
    MemoryRule,
    MemoryState,
    build_rule,
    resolve_layers,
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


@dataclass
class _BranchState(State):
    rule: MemoryRule
    memory: MemoryState  # buffers at fixed addresses, so that a CUDA graph sees them change

    def commit(self, memory: MemoryState) -> None:
        self._write(self.exec_mask, memory)

    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        self._write(reset_mask, self.rule.init_state(self.batch_size))

    @torch.no_grad()
    def _write(self, rows: Tensor, memory: MemoryState) -> None:
        for name, buffer in self.memory.items():
            mask = rows.view(-1, *[1] * (buffer.dim() - 1))
            buffer.copy_(torch.where(mask, memory[name], buffer))


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

    def _init_streaming_state(self, batch_size: int) -> _BranchState:
        with torch.no_grad():
            memory = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in self.rule.init_state(batch_size).items()
            }
        return _BranchState(batch_size, self.gate.device, self.rule, memory)

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
        if state is None:
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
        z = z.to(self.rule.dtype)
        residual = residual.to(self.rule.dtype)
        gate = self.gate.to(self.rule.dtype)
        if self.bounded:
            gate = gate.tanh()
            z = z * torch.rsqrt(1 + z.square().mean(-1, keepdim=True)) * _rms(residual)
        branch = gate * z
        # under grad also without an observer: activation checkpointing runs the forward again
        # in backward, when the observer is gone, and needs the same graph
        if self.observer is not None or torch.is_grad_enabled():
            norm = torch.linalg.vector_norm
            stats = BranchStats(
                raw_norm=norm(z, dim=-1),
                norm=norm(branch, dim=-1),
                residual_norm=norm(residual, dim=-1),
                gate_rms=_rms(gate)[0],
            )
            if self.observer is not None:
                self.observer(stats)
        return branch


def _rms(x: Tensor) -> Tensor:
    """Root mean square over channels, [..., 1]; unlike sqrt, its gradient at 0 is 0, not NaN."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5


class HybridLayer(StreamingContainer):
    """A Moshi layer with a memory branch, called like the layer it wraps.

    `parallel`: h = x + attention(n(x)) + branch(n(x)), the branch relative to x.
    `post_attention`: h = x + attention(n(x)), then h + branch(h / rms(h)), relative to h.
    """

    def __init__(self, base: StreamingTransformerLayer, branch: MemoryBranch, config: MemoryConfig):
        """Wrap `base`, which must have self-attention and no cross-attention."""
        super().__init__()
        assert base.cross_attention is None
        assert not base.skip_self_attn
        self.base = base
        self.branch = branch
        self.placement = config.placement
        self.shares = config.projections == "shared"

    def forward(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """The layer's output [B, T, D] for its input x [B, T, D], in the type Moshi gives it."""
        assert cross_attention_src is None
        # as upstream: off a GPU, compiling costs more than it gives
        with nullcontext() if x.is_cuda else no_compile():
            if self.shares:
                attention = self.base.self_attn
                # attention's input is the memory's: both use what this projection makes of it
                with _output_of(attention.in_projs[0]) as projected:
                    h = self.base._sa_block(x)
                shared = Shared(projected[0], attention.out_projs[0])
                branch = self.branch(self.base.norm1(x), residual=x, shared=shared)
            elif self.placement == "parallel":
                h = self.base._sa_block(x)
                branch = self.branch(self.base.norm1(x), residual=x)
            else:
                h = self.base._sa_block(x)
                wide = h.to(self.branch.rule.dtype)
                branch = self.branch(F.rms_norm(wide, wide.shape[-1:], eps=1e-8), residual=h)
            h = self.base._ff_block(h + branch.to(h.dtype))
            if self.base._streaming_state is not None:
                self.base._streaming_state.offset_cpu += x.shape[1]
            return h


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module gives inside the scope."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def add_memory(lm: LMModel, config: MemoryConfig) -> list[int]:
    """Give layers of the temporal transformer a memory, in place.

    The new parameters are fp32 on the model's device, whatever its type. Load the model's weights
    first: the wrapped layers' parameters move to `...layers.N.base`.

    Returns:
        Indices of the wrapped layers, at least one.

    Raises:
        UserError: no such layers, the heads do not fit, the model has been streamed or already
            has a memory, or a layer has cross-attention.
    """
    layers = lm.transformer.layers
    indices = resolve_layers(config.layers, len(layers))
    # streaming lists the children once: a branch added later would silently never get a state
    for module in (lm, lm.transformer, *layers):
        if cast(StreamingModule, module)._cached_children is not None or module.is_streaming:
            raise UserError(
                "a memory cannot be added to a model that has already streamed; "
                "add it right after loading, before the first generation"
            )
    if hybrid_layers(lm):
        raise UserError(
            f"layers {sorted(hybrid_layers(lm))} already have a memory; "
            "name all layers at once in model.memory.layers"
        )
    chosen = {index: cast(StreamingTransformerLayer, layers[index]) for index in indices}
    for index, layer in chosen.items():
        if layer.cross_attention is not None or layer.skip_self_attn:
            raise UserError(
                f"model.memory.layers={config.layers} names layer {index}, which has "
                "cross-attention or no self-attention; use a Moshi without conditioning"
            )
        if config.projections != "own" and layer.self_attn.kv_repeat > 1:
            raise UserError(
                f"model.memory.projections={config.projections}: attention of layer {index} has "
                "fewer keys than queries, so its projections do not fit; use own"
            )
    fitted = config.fitted(lm.dim, chosen[indices[0]].self_attn.num_heads)
    for index, layer in chosen.items():
        branch = MemoryBranch(lm.dim, fitted)
        if config.projections == "attention":
            branch.copy_attention(layer.self_attn)
        branch.to(device=lm.device, dtype=torch.float32)
        layers[index] = HybridLayer(layer, branch, config)
    return indices


def hybrid_layers(lm: LMModel) -> dict[int, HybridLayer]:
    """The layers that have a memory, by index."""
    layers = enumerate(lm.transformer.layers)
    return {index: layer for index, layer in layers if isinstance(layer, HybridLayer)}


@contextmanager
def observe_branches(lm: LMModel) -> Iterator[dict[int, list[BranchStats]]]:
    """Collect `BranchStats` of every forward inside the scope, by layer index.

    Close the scope before `backward`: activation checkpointing runs the forward once more there.
    """
    layers = hybrid_layers(lm)
    stats: dict[int, list[BranchStats]] = {index: [] for index in layers}
    before = {index: layer.branch.observer for index, layer in layers.items()}
    try:
        for index, layer in layers.items():
            layer.branch.observer = stats[index].append
        yield stats
    finally:
        for index, layer in layers.items():
            layer.branch.observer = before[index]


@contextmanager
def gates_forced_to_zero(lm: LMModel) -> Iterator[None]:
    """Shut every gate inside the scope: the control that runs everything but adds nothing.

    The parameter itself is zeroed and restored exactly, so captured CUDA graphs obey too.
    """
    gates = [layer.branch.gate for layer in hybrid_layers(lm).values()]
    saved = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, saved, strict=True):
                gate.copy_(value)
