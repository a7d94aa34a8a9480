"""Attention under control: capacity, what is kept beyond it, and start position of a generation.

All are set between generations, not while one runs. With the defaults the model computes what
Moshi computes, bit for bit: keeping nothing is upstream's own ring, and no shift its own rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.errors import UserError, check_bounds
from moshi_ttt.model.kept import MOST_THINNING, KeptRing
from moshi_ttt.model.lora import AdapterAttention
from moshi_ttt.model.rings import attention_of
from moshi_ttt.model.window import set_window


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
    """moshi's attention with a ring that may keep more, and a rotation that may be shifted."""

    def _init_streaming_state(self, batch_size: int):  # type: ignore[no-untyped-def]
        state = super()._init_streaming_state(batch_size)
        # a bound that a window alone already keeps asks for nothing
        if self.sinks or self.thinning or self._bounds(self.kept.capacity):
            _, _, heads, _, channels = state.kv_cache.cache.shape
            like = state.kv_cache.cache
            state.kv_cache = KeptRing(
                batch_size,
                heads,
                channels,
                self.kept,
                self.farthest_steps,
                device=like.device,
                dtype=like.dtype,
            )
        return state

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of T steps to themselves, or of one step to what a ring holds, [B, T, D]."""
        state = self._streaming_state
        if state is None or not isinstance(state.kv_cache, KeptRing):
            return super().forward(query, key, value)
        assert query.shape[1] == 1, "several steps at once would overwrite keys that they read"
        q, unrotated, v = self._projected(query)
        k, ring = unrotated, state.kv_cache
        if self.rope:
            q, k = self.rope(q, k, state.offset, time_before_heads=False)
        added, positions = ring.write(k, unrotated, v, state.exec_mask)
        if positions.shape[1]:
            kept, seen = ring.far_keys
            seen.copy_(self._rotated(kept, positions))
        state.offset.copy_(torch.where(state.exec_mask, state.offset + 1, state.offset))
        state.offset_cpu += 1
        y = F.scaled_dot_product_attention(q, *self._repeated(*ring.cache), added)
        return self.out_projs[0](y.transpose(1, 2).flatten(2))


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

    def set(
        self,
        *,
        context_steps: int,
        sinks: int = 0,
        thinning: int = 0,
        farthest_steps: int | None = None,
        start_position: int = 0,
    ) -> None:
        """Choose what the next generation runs with.

        Args:
            context_steps: attention window and ring capacity C.
            sinks: first positions that stay readable beside the window; 0 is upstream's ring.
            thinning: how often older keys are halved within the C, as `Kept` has it.
            farthest_steps: how far away a key may seem; None: as far as it is.
            start_position: position of the first step, for the rotation.

        Raises:
            UserError: a value out of its bounds, the model is streaming, or has no positions.
        """
        check_bounds("context_steps", context_steps, least=2)
        check_bounds("sinks", sinks, least=0)
        check_thinning("thinning", thinning, context_steps)
        check_bounds("farthest_steps", farthest_steps, least=1)
        check_bounds("start_position", start_position, least=0)
        if any(attention.is_streaming for attention in self._attentions):
            raise UserError("the model is streaming; its ring cannot change before that ends")
        set_window(self._lm, context_steps)
        for attention in self._attentions:
            attention.sinks, attention.thinning = sinks, thinning
            attention.farthest_steps = farthest_steps
            if isinstance(attention.rope, _ShiftedRotary):
                attention.rope.start_position = start_position
                continue
            for name, value in (
                ("start_position", start_position),
                ("farthest_steps", farthest_steps),
            ):
                if value:
                    raise UserError(f"{name}={value}: the model has no positions")

    @property
    def attentions(self) -> Sequence[ControlledAttention]:
        """The temporal attentions, from the first layer to the last."""
        return self._attentions


def check_thinning(key: str, thinning: int | None, context_steps: int | None) -> None:
    """Refuse what leaves one of the parts of a ring of `context_steps` without a slot."""
    most = min(MOST_THINNING, (context_steps or MOST_THINNING + 2) - 2)
    remedy = "each halving takes its part of the window's keys"
    check_bounds(key, thinning, least=0, most=most, remedy=remedy)


def keep(
    lm: LMModel,
    *,
    sinks: int | None = None,
    thinning: int | None = None,
    farthest_steps: int | None = None,
) -> None:
    """Let every step see more than its window, in training and in generation.

    Args:
        lm: as `AttentionControls` wants it.
        sinks: first positions that are seen beside the window; None: as the model has it.
        thinning: how often older keys are halved; likewise.
        farthest_steps: how far away a key may seem; likewise.
    """
    assert lm.context is not None, "without a window nothing is evicted"
    controls = AttentionControls(lm)
    one = controls.attentions[0]
    controls.set(
        context_steps=lm.context,
        sinks=one.sinks if sinks is None else sinks,
        thinning=one.thinning if thinning is None else thinning,
        farthest_steps=one.farthest_steps if farthest_steps is None else farthest_steps,
    )


@contextmanager
def windows_alone(lm: LMModel) -> Iterator[None]:
    """Let no step see more than its window inside the scope; not while streaming."""
    found = [attention_of(layer) for layer in lm.transformer.layers]
    kept = [one for one in found if isinstance(one, ControlledAttention)]
    before = [(one.sinks, one.thinning, one.farthest_steps) for one in kept]
    try:
        for one in kept:
            one.sinks, one.thinning, one.farthest_steps = 0, 0, None
        yield
    finally:
        for one, values in zip(kept, before, strict=True):
            one.sinks, one.thinning, one.farthest_steps = values


def _controlled(attention: StreamingMultiheadAttention) -> ControlledAttention:
    controlled = ControlledAttention.adopt(attention)
    assert isinstance(controlled, ControlledAttention)
    if attention.rope is not None and not isinstance(attention.rope, _ShiftedRotary):
        controlled.rope = _ShiftedRotary(attention.rope)  # type: ignore[assignment]
    return controlled
