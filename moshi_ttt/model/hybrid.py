"""Moshi's layers with a memory beside attention.

A hybrid layer wraps an unchanged Moshi layer; with its gates at 0 it computes what Moshi computes,
bit for bit. Memory is added to a loaded model before it first streams, because moshi's streaming
modules list their children once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import cast

import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingContainer, StreamingModule
from moshi.modules.transformer import StreamingTransformerLayer
from moshi.utils.compile import no_compile
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.errors import SettingError, UserError
from moshi_ttt.memory import MemoryConfig, MemoryState, resolve_layers
from moshi_ttt.model.branch import BranchStats, Carried, MemoryBranch, MemorySwaps, Shared


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
            normed = self.base.norm1(x)
            if self.placement == "parallel":
                h, branch = self._beside_attention(x, normed)
            else:
                h = self._attended(x, normed)
                wide = h.to(self.branch.rule.dtype)
                branch = self.branch(F.rms_norm(wide, wide.shape[-1:], eps=1e-8), residual=h)
            h = self.base._ff_block(h + branch.to(h.dtype))
            if self.base._streaming_state is not None:
                self.base._streaming_state.offset_cpu += x.shape[1]
            return h

    def _beside_attention(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """x + attention, and the branch, both of which read `normed`."""
        attention, branches = self.base.self_attn, list[Tensor]()
        # a step is many kernels too small for a GPU: those of memory and attention go side by side
        second = None
        if x.is_cuda and self.branch.is_streaming:
            second = _second_stream(x.device)
            second.wait_stream(torch.cuda.current_stream(x.device))

        def remember(qkv: Tensor | None = None) -> None:
            projected = None if second is None else torch.cuda.current_stream().record_event()

            def share() -> Tensor:
                assert qkv is not None
                if projected is not None:
                    projected.wait(second)
                return qkv

            shared = None if qkv is None else Shared(share, attention.out_projs[0])
            with torch.cuda.stream(second):
                branches.append(self.branch(normed, residual=x, shared=shared))

        if self.shares:
            # attention's input is the memory's: both use what this projection makes of it
            kept = list[Tensor]()  # until both are through with it

            def after_projection(_: nn.Module, __: tuple[Tensor, ...], qkv: Tensor) -> None:
                kept.append(qkv)
                remember(qkv)

            handle = attention.in_projs[0].register_forward_hook(after_projection)
            try:
                h = self._attended(x, normed)
            finally:
                handle.remove()
        else:
            remember()
            h = self._attended(x, normed)
        if second is not None:
            torch.cuda.current_stream(x.device).wait_stream(second)
        return h, branches[0]

    def _attended(self, x: Tensor, normed: Tensor) -> Tensor:
        """moshi's attention block, of an input that is normed once for it and for the memory."""
        update: Tensor = self.base.self_attn(normed, normed, normed)
        return x.to(update) + self.base.layer_scale_1(update)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
            "name all of them at once in the memory's layers"
        )
    chosen = {index: cast(StreamingTransformerLayer, layers[index]) for index in indices}
    for index, layer in chosen.items():
        if layer.cross_attention is not None or layer.skip_self_attn:
            raise SettingError(
                "layers",
                f"={config.layers} names layer {index}, which has cross-attention or no "
                "self-attention; use a Moshi without conditioning",
            )
        if config.projections != "own" and layer.self_attn.kv_repeat > 1:
            raise SettingError(
                "projections",
                f"={config.projections}: attention of layer {index} has fewer keys than queries, "
                "so its projections do not fit; use own",
            )
    fitted = config.fitted(lm.dim, chosen[indices[0]].self_attn.num_heads)
    for index, layer in chosen.items():
        # drawn on the CPU, equally for every device
        with torch.device("meta" if lm.device.type == "meta" else "cpu"):
            branch = MemoryBranch(lm.dim, fitted)
        branch.recomputed = lm.transformer.checkpointing
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


def set_inner_rate(lm: LMModel, rate: float) -> None:
    """Scale how much the memories learn while the model runs; before it streams.

    Args:
        lm: hybrid.
        rate: multiplies every write gate; 1 is as trained, 0 stops writing.

    Raises:
        UserError: there is no memory.
    """
    layers = hybrid_layers(lm)
    if not layers:
        raise UserError(f"inner_rate={rate:g}: the model has no memory that could learn")
    for layer in layers.values():
        layer.branch.rule.rate = rate


def reset_memories(lm: LMModel, rows: Tensor) -> None:
    """Take the memories of some streams [B] away while they run; their attention goes on."""
    for layer in hybrid_layers(lm).values():
        state = layer.branch._streaming_state
        assert state is not None, "nothing is remembered before streaming"
        state.reset(rows)


@contextmanager
def memory_swapped(
    lm: LMModel,
    steps: Sequence[int] = (),
    memories: Mapping[int, MemoryState] | None = None,
) -> Iterator[dict[int, MemorySwaps]]:
    """Take the memory away, or give another one, in the middle of parallel forwards: a control.

    Args:
        lm: hybrid, not streaming.
        steps: from each of them on, the memory is another one.
        memories: by layer index, e.g. what `last` of an earlier scope held; None resets.

    Yields:
        The swaps by layer index; after a forward, `last` of each is the memory at its end.
    """
    swaps = {
        index: MemorySwaps(tuple(sorted(steps)), None if memories is None else memories[index])
        for index in hybrid_layers(lm)
    }
    with _swapping(lm, swaps):
        yield swaps


@contextmanager
def memory_carried(
    lm: LMModel, memories: Mapping[int, MemoryState], rows: Tensor
) -> Iterator[dict[int, MemorySwaps]]:
    """Let parallel forwards begin from the memories that an earlier one left.

    No gradient reaches the earlier one; rows that begin at the learned start train it. Attention
    begins afresh in all of them. Be in such a scope in `backward` too: activation checkpointing
    runs the forward once more there.

    Args:
        lm: hybrid, not streaming.
        memories: by layer index, what `last` of an earlier scope held; empty if nothing was before.
        rows: which go on from there, bool [B].

    Yields:
        By layer index, what holds in `last` the memory at the end of a forward; detach it to keep
        it.
    """
    swaps = {
        index: MemorySwaps(begin=Carried(memories[index], rows) if memories else None)
        for index in hybrid_layers(lm)
    }
    with _swapping(lm, swaps):
        yield swaps


@contextmanager
def _swapping(lm: LMModel, swaps: Mapping[int, MemorySwaps]) -> Iterator[None]:
    layers = hybrid_layers(lm)
    try:
        for index, layer in layers.items():
            layer.branch.swaps = swaps[index]
        yield
    finally:
        for layer in layers.values():
            layer.branch.swaps = None
