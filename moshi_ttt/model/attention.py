"""moshi's attention in fewer operations: over whole clips, and among the codebooks of a step."""

from __future__ import annotations

from typing import Any, Self

import torch
from moshi.modules.transformer import (
    RingKVCache,
    StreamingMultiheadAttention,
    expand_repeated_kv,
)
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.compiling import fused


class ParallelAttention(StreamingMultiheadAttention):
    """The same numbers as moshi's.

    moshi's mask [B, 1, T, T] holds the same for every row, and making it moves more memory than
    attention itself. One [T, T] does; none is needed where the window reaches the first step, and
    where it is short, time and memory need not grow with the square of T.

    Where steps stream, what a step may see is found in one kernel in place of thirty.

    In the depformer, where codebooks stream, the next one is known beforehand: with all that have
    been in front of it, it needs neither positions nor a mask.
    """

    sinks: int = 0
    """First positions that every later one sees beside its window."""

    @classmethod
    def adopt(cls, attention: StreamingMultiheadAttention) -> Self:
        """The same attention, sharing all modules of `attention`."""
        adopted = cls(
            embed_dim=attention.embed_dim,
            num_heads=attention.num_heads,
            causal=attention.causal,
            context=attention.context,
            rope=attention.rope,
            kv_repeat=attention.kv_repeat,
            weights_per_step=attention.weights_per_step,
            weights_per_step_schedule=attention.weights_per_step_schedule,
            device="meta",
        )
        adopted.in_projs = attention.in_projs
        adopted.out_projs = attention.out_projs
        adopted.sinks = getattr(attention, "sinks", 0)
        return adopted.train(attention.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of T steps to themselves, [B, T, D]."""
        rows, steps = query.shape[:2]
        state = self._streaming_state
        usual = self.causal and self.kv_repeat == 1 and not self.rope
        if self.weights_per_step and usual and state is not None and steps == 1:
            return self._next_codebook(query, state)
        if self._streams_alone(state) and steps == 1:
            return self._next_step(query, state)
        if state is not None or self.weights_per_step or not self.causal:
            attended: Tensor = super().forward(query, key, value)
            return attended
        projected = self.in_projs[0](query)
        channels = self.embed_dim // self.num_heads
        q, k, v = (
            part.unflatten(-1, (-1, channels)).transpose(1, 2)
            for part in projected.split(self._widths(projected.shape[-1]), dim=-1)
        )
        if self.rope:
            start = torch.zeros(rows, device=query.device, dtype=torch.long)
            q, k = self.rope(q, k, start, time_before_heads=False)
        k, v, _ = self._complete_kv(k, v)
        if self.kv_repeat > 1:
            k, v = (expand_repeated_kv(one, self.kv_repeat) for one in (k, v))
        if self.context is not None and 2 * self.context < steps:
            y = _in_blocks(q, k, v, self.context, self.sinks)
        else:
            mask = self._window(steps, query.device)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out_projs[0](y.transpose(1, 2).flatten(2))

    def _streams_alone(self, state: Any) -> bool:
        """Whether it is a temporal attention that streams with moshi's own ring."""
        return (
            state is not None
            and self.causal
            and not self.weights_per_step
            and type(state.kv_cache) is RingKVCache
            and state.kv_cache.respect_exec_mask
        )

    def _next_step(self, query: Tensor, state: Any) -> Tensor:
        """Attention of one step to what the ring holds, [B, 1, D]."""
        projected = self.in_projs[0](query)
        channels, ring = self.embed_dim // self.num_heads, state.kv_cache
        q, k, v = (
            part.unflatten(-1, (-1, channels)).transpose(1, 2)
            for part in projected.split(self._widths(projected.shape[-1]), dim=-1)
        )
        if self.rope:
            q, k = self.rope(q, k, state.offset, time_before_heads=False)
        slots, mask = _turn(
            ring.end_offset, state.offset, state.exec_mask, ring.capacity, self.context, q.dtype
        )
        slots = slots.view(-1, 1, 1, 1).expand(k.shape)
        ring.cache[0].scatter_(2, slots, k)
        ring.cache[1].scatter_(2, slots, v)
        state.offset_cpu += 1
        k, v = ring.cache
        if self.kv_repeat > 1:
            k, v = (expand_repeated_kv(one, self.kv_repeat) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_projs[0](y.transpose(1, 2).flatten(2))

    def _next_codebook(self, query: Tensor, state: Any) -> Tensor:
        """Attention of one codebook to those before it in its step, [B, 1, D]."""
        book = state.offset_cpu
        schedule = self.weights_per_step_schedule
        weights = book if schedule is None else schedule[book]
        projected = self.in_projs[weights](query).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        keys, values = state.kv_cache.cache[:, :, :, : book + 1]
        keys[:, :, book:] = k
        values[:, :, book:] = v
        y = F.scaled_dot_product_attention(q, keys, values)
        state.kv_cache.end_offset += 1
        state.offset += 1
        state.offset_cpu += 1
        return self.out_projs[weights](y.transpose(1, 2).flatten(2))

    def _widths(self, projected: int) -> list[int]:
        """Channels of queries, keys and values."""
        shared = (projected - self.embed_dim) // 2
        return [self.embed_dim, shared, shared]

    def _window(self, steps: int, device: torch.device) -> Tensor | None:
        """What each step sees, [T, T]; None for all that is not ahead of it."""
        if self.context is None or self.context >= steps:
            return None
        position = torch.arange(steps, device=device)
        distance = position[:, None] - position
        return (distance >= 0) & ((distance < self.context) | (position < self.sinks))


@fused
def _turn(
    end_offset: Tensor,
    offset: Tensor,
    exec_mask: Tensor,
    capacity: int,
    context: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Make room for one step in a ring of moshi's.

    Args:
        end_offset: positions written, [B]; counts one more where `exec_mask` is true.
        offset: position of the query, [B]; likewise.
        exec_mask: [B]; a row that is false writes where its next step will write again.
        capacity: of the ring.
        context: how far a query sees.
        dtype: of the mask.

    Returns:
        The slot to write, [B], and what is added to the scores of all slots, [B, 1, 1, capacity].
    """
    slot = torch.arange(capacity, device=end_offset.device)
    newest, query = end_offset[:, None], offset[:, None]
    written = newest % capacity
    age = (written - slot) % capacity
    position = newest - age
    visible = (position >= 0) & (query >= position)
    # a row that is not executed has not written
    visible = visible & (slot < (newest + exec_mask[:, None]))
    if context is not None:
        visible = visible & (query - position < context)
    # as torch makes it of a mask of booleans, for every head anew
    added = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    end_offset.copy_(torch.where(exec_mask, end_offset + 1, end_offset))
    offset.copy_(torch.where(exec_mask, offset + 1, offset))
    return written[:, 0], added[:, None, None]


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, context: int, sinks: int) -> Tensor:
    """Attention to the last `context` steps and to sinks, [B, H, T, channels], in time linear in T.

    A block of `context` queries sees its own keys, those of the block before it, and the sinks.
    """
    rows, _, steps, _ = q.shape
    first = [one[:, :, None, :sinks] for one in (k, v)]
    padding = (0, 0, 0, -steps % context)
    q, k, v = (F.pad(one, padding).unflatten(2, (-1, context)) for one in (q, k, v))
    k, v = (torch.cat([F.pad(one, (0, 0, 0, 0, 1, -1)), one], dim=3) for one in (k, v))
    blocks = q.shape[2]
    k, v = (
        torch.cat([one, sink.expand(-1, -1, blocks, -1, -1)], dim=3)
        for one, sink in zip((k, v), first, strict=True)
    )
    query = torch.arange(context, device=q.device)[:, None]
    key = torch.arange(2 * context, device=q.device)
    mask = ((key > query) & (key <= query + context)).repeat(blocks, 1, 1)
    mask[0, :, :context] = False  # before the first block is nothing
    position = torch.arange(blocks * context, device=q.device).view(blocks, context, 1)
    # a sink that is within the window is among its keys
    left = position - torch.arange(sinks, device=q.device) >= context
    mask = torch.cat([mask, left], dim=-1)
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask.repeat(rows, 1, 1)[:, None])
    return y.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :steps]


def parallel_attention(model: nn.Module) -> None:
    """Make a `ParallelAttention` of every self-attention, in place, before anything streams."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is StreamingMultiheadAttention and not child.cross_attention:
                setattr(parent, name, ParallelAttention.adopt(child))
