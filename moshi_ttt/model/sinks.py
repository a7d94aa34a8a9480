"""Attention under experimental control: capacity, sinks and start position of a generation.

The three are set between generations, not while one runs. With the defaults the model computes
what Moshi computes, bit for bit: no sinks is upstream's own ring, and no shift its own rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import KVCacheResult, StreamingMultiheadAttention
from torch import Tensor, nn

from moshi_ttt.errors import UserError, check_bounds
from moshi_ttt.model.lora import AdapterAttention
from moshi_ttt.model.window import set_window


class SinkRing:
    """A ring of `capacity` steps beside `sinks` slots that are never overwritten.

    A query at position q reads the positions in (q - capacity, q] and those below `sinks`.
    Position p lives in slot p if p < sinks, else in slot sinks + (p - sinks) % capacity. Keys are
    stored rotated by their true position, as upstream stores them, so the rotation between a
    query and a sink goes on growing. Tensor operations only: it lives inside a CUDA graph.

    Args:
        batch_size: rows B.
        num_heads: key heads H.
        dim_per_head: channels of a head D.
        capacity: steps of the window, the attention's context.
        sinks: first positions that are kept.
        device: of the cache.
        dtype: of the cache.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        dim_per_head: int,
        capacity: int,
        sinks: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.sinks = sinks
        self.respect_exec_mask = True
        shape = (2, batch_size, num_heads, sinks + capacity, dim_per_head)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.end_offset = torch.zeros(batch_size, device=device, dtype=torch.long)

    def reset(self, reset_mask: Tensor) -> None:
        """Forget the rows of `reset_mask` [B]: nothing that they wrote is read again."""
        self.end_offset.masked_fill_(reset_mask, 0)

    def complete(self, k: Tensor, v: Tensor, exec_mask: Tensor) -> KVCacheResult:
        """Write T steps and return everything that may be read.

        Args:
            k: rotated keys, [B, H, T, D], T at most `capacity`.
            v: values, [B, H, T, D].
            exec_mask: [B]; a row that is False writes where its next step will write again.

        Returns:
            Keys and values [B, H, sinks + capacity, D]; positions [B, sinks + capacity], -1 in
            slots that hold nothing. The positions serve moshi's mask, which drops what is
            `capacity` or more steps old: a sink that old gives the oldest position that is not.
        """
        rows, heads, steps, channels = k.shape
        written = torch.arange(steps, device=k.device) + self.end_offset.view(-1, 1)
        slots = torch.where(
            written < self.sinks, written, self.sinks + (written - self.sinks) % self.capacity
        )
        slots = slots.view(rows, 1, steps, 1).expand(-1, heads, -1, channels)
        self.cache[0].scatter_(2, slots, k)
        self.cache[1].scatter_(2, slots, v)

        last = self.end_offset.view(-1, 1) + steps - 1
        self.end_offset.copy_(torch.where(exec_mask, self.end_offset + steps, self.end_offset))
        # counted from the first position that is no sink, the newest step in the ring is `newest`
        newest = last - self.sinks
        ages = (newest - torch.arange(self.capacity, device=k.device)) % self.capacity
        ring = (last - ages).masked_fill(ages > newest, -1)
        sinks = torch.arange(self.sinks, device=k.device).expand(rows, -1)
        positions = torch.cat([sinks, ring], dim=1)
        held = (positions >= 0) & (positions < self.end_offset.view(-1, 1))
        recent = torch.maximum(positions, last - self.capacity + 1)
        readable = torch.cat([recent[:, : self.sinks], ring], dim=1)
        return KVCacheResult(self.cache[0], self.cache[1], readable.masked_fill(~held, -1))


class _ShiftedRotary(nn.Module):
    """Moshi's rotation, for a stream that begins at `start_position` instead of 0."""

    def __init__(self, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.rope = rope
        self.start_position = 0

    def forward(self, q: Tensor, k: Tensor, offset: Tensor, **layout: Any) -> Any:
        """`q` and `k` rotated by their positions, `offset` [B] plus the start position."""
        return self.rope(q, k, offset + self.start_position, **layout)


class ControlledAttention(AdapterAttention):
    """moshi's attention with a ring that may keep sinks, and a rotation that may be shifted."""

    def _init_streaming_state(self, batch_size: int):  # type: ignore[no-untyped-def]
        state = super()._init_streaming_state(batch_size)
        if self.sinks:
            _, _, heads, capacity, channels = state.kv_cache.cache.shape
            like = state.kv_cache.cache
            state.kv_cache = SinkRing(
                batch_size,
                heads,
                channels,
                capacity,
                self.sinks,
                device=like.device,
                dtype=like.dtype,
            )
        return state


class AttentionControls:
    """Hands on the temporal attention of one model; the depformer's is not touched.

    Takes the place of every temporal attention with one that shares its weights. Create it before
    the model first streams, because moshi's streaming modules list their children once.

    Args:
        lm: loaded model, with its memory and adapters.

    Raises:
        UserError: the model has streamed, or adds absolute positions to its input.
    """

    def __init__(self, lm: LMModel) -> None:
        if lm._cached_children is not None:
            raise UserError("the model has streamed already; take control right after loading")
        if lm.transformer.positional_embedding not in ("rope", "rope_concat", "none"):
            raise UserError(
                f"positional_embedding={lm.transformer.positional_embedding!r} cannot be shifted; "
                "only rotary positions can"
            )
        self._lm = lm
        self._attentions: list[ControlledAttention] = []
        for layer in lm.transformer.layers:
            for parent in list(layer.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, StreamingMultiheadAttention):
                        self._attentions.append(_controlled(child))
                        setattr(parent, name, self._attentions[-1])

    def set(self, *, context_steps: int, sinks: int = 0, start_position: int = 0) -> None:
        """Choose what the next generation runs with.

        Args:
            context_steps: attention window and ring capacity C.
            sinks: first positions that stay readable beside the window; 0 is upstream's ring.
            start_position: position of the first step, for the rotation.

        Raises:
            UserError: a value below its least, or the model is streaming.
        """
        for name, value, least in (
            ("context_steps", context_steps, 2),
            ("sinks", sinks, 0),
            ("start_position", start_position, 0),
        ):
            check_bounds(name, value, least=least)
        if any(attention.is_streaming for attention in self._attentions):
            raise UserError("the model is streaming; its ring cannot change before that ends")
        set_window(self._lm, context_steps)
        for attention in self._attentions:
            attention.sinks = sinks
            if isinstance(attention.rope, _ShiftedRotary):
                attention.rope.start_position = start_position
            elif start_position:
                raise UserError(f"start_position={start_position}: the model has no positions")

    @property
    def attentions(self) -> Sequence[ControlledAttention]:
        """The temporal attentions, from the first layer to the last."""
        return self._attentions


def keep_sinks(lm: LMModel, sinks: int) -> None:
    """Let every step see the first positions beside its window, in training and in generation.

    Args:
        lm: as `AttentionControls` wants it.
        sinks: how many.
    """
    assert lm.context is not None, "without a window nothing is evicted"
    AttentionControls(lm).set(context_steps=lm.context, sinks=sinks)


def _controlled(attention: StreamingMultiheadAttention) -> ControlledAttention:
    controlled = ControlledAttention.adopt(attention)
    assert isinstance(controlled, ControlledAttention)
    if attention.rope is not None and not isinstance(attention.rope, _ShiftedRotary):
        controlled.rope = _ShiftedRotary(attention.rope)  # type: ignore[assignment]
    return controlled
