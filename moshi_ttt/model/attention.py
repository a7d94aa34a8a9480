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
from moshi_ttt.model.blocks import Far, attend
from moshi_ttt.model.kept import Kept


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
    thinning: int = 0
    """How often older keys are halved within the same number of keys, as `Kept` has it."""
    farthest_steps: int | None = None
    """How far away a key may seem: the rotation between it and a query ends there."""

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
        for name in ("sinks", "thinning", "farthest_steps"):
            setattr(adopted, name, getattr(attention, name, getattr(cls, name)))
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
        q, k, v = self._projected(query)
        far = self._far(q, k) if self._bounds(steps) else None
        if self.rope:
            start = torch.zeros(rows, device=query.device, dtype=torch.long)
            q, k = self.rope(q, k, start, time_before_heads=False)
        k, v = self._repeated(k, v)
        if self.context is None or (far is None and self.kept.window >= steps):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = attend(self.kept, q, k, v, far)
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
        q, k, v = self._projected(query)
        ring = state.kv_cache
        if self.rope:
            q, k = self.rope(q, k, state.offset, time_before_heads=False)
        slots, mask = _turn(
            ring.end_offset, state.offset, state.exec_mask, ring.capacity, self.context, q.dtype
        )
        slots = slots.view(-1, 1, 1, 1).expand(k.shape)
        ring.cache[0].scatter_(2, slots, k)
        ring.cache[1].scatter_(2, slots, v)
        state.offset_cpu += 1
        y = F.scaled_dot_product_attention(q, *self._repeated(*ring.cache), mask)
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

    def _projected(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of T steps, [B, H, T, channels] each."""
        projected = self.in_projs[0](query)
        shared = (projected.shape[-1] - self.embed_dim) // 2
        parts = projected.split([self.embed_dim, shared, shared], dim=-1)
        channels = self.embed_dim // self.num_heads
        q, k, v = (part.unflatten(-1, (-1, channels)).transpose(1, 2) for part in parts)
        return q, k, v

    def _repeated(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One key and value for each query head."""
        if self.kv_repeat == 1:
            return k, v
        return expand_repeated_kv(k, self.kv_repeat), expand_repeated_kv(v, self.kv_repeat)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [B, H, T, channels], each step as at a position of its own, [B or 1, T]."""
        rows, heads, steps, channels = x.shape
        # moshi rotates consecutive positions: each step is a row here
        x = x.transpose(1, 2).reshape(-1, heads, 1, channels)
        assert self.rope is not None
        x, _ = self.rope(x, x, positions.expand(rows, -1).flatten(), time_before_heads=False)
        return x.view(rows, steps, heads, channels).transpose(1, 2)

    @property
    def kept(self) -> Kept:
        """Which keys a query sees; there is a context."""
        assert self.context is not None
        return Kept(self.context, self.sinks, self.thinning)

    def _bounds(self, steps: int) -> bool:
        """Whether one of T steps sees a key from further away than keys may seem."""
        most = self.farthest_steps
        if most is None or self.context is None or most + 1 >= steps:
            return False
        return bool(self.sinks or self.kept.further(most))

    def _far(self, q: Tensor, k: Tensor) -> Far:
        """Queries and keys, both before their rotation, as if they were as far apart as may be."""
        assert self.farthest_steps is not None
        steps = q.shape[2]
        position = torch.zeros(1, steps, device=q.device, dtype=torch.long)
        far_k = self._rotated(k, position)
        if self.kv_repeat > 1:
            far_k = expand_repeated_kv(far_k, self.kv_repeat)
        most = self.farthest_steps
        return Far(most, self._rotated(q, position + most), far_k)


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


def parallel_attention(model: nn.Module) -> None:
    """Make a `ParallelAttention` of every self-attention, in place, before anything streams."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is StreamingMultiheadAttention and not child.cross_attention:
                setattr(parent, name, ParallelAttention.adopt(child))
