"""Attention of a whole clip to what is kept, in time and memory linear in its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.model.kept import Kept, Level


class Far(NamedTuple):
    """How queries see keys that are further away than keys may seem."""

    steps: int  # that they may seem
    q: Tensor  # [B, H, T, D], all rotated by so many steps
    k: Tensor  # [B, H, T, D], rotated by none


def attend(kept: Kept, q: Tensor, k: Tensor, v: Tensor, far: Far | None = None) -> Tensor:
    """Attention of each step to the keys that it sees, [B, H, T, D].

    A key that may be too far away is there once more, for the queries that it is too far from:
    its rotation and theirs (`Far`) have channels of their own, so that one attention weighs both.

    Args:
        kept: which keys are seen.
        q: rotated queries, [B, H, T, D].
        k: rotated keys, likewise.
        v: values, likewise.
        far: None: keys seem as far away as they are.
    """
    (rows, _, steps, channels), levels = q.shape, kept.levels
    cut = _Blocks(kept, steps, q.device)
    key = cut.positions(levels)
    mask = cut.seen(key)
    q, keys, values = cut.queries(q), cut.keys(k, levels), cut.keys(v, levels)
    if far is not None:
        levels, apart = kept.further(far.steps), (0, channels)
        again = cut.positions(levels)
        near = mask & (cut.query - key <= far.steps)
        mask = torch.cat([near, cut.seen(again) & (cut.query - again > far.steps)], dim=-1)
        q = torch.cat([q, cut.queries(far.q)], dim=-1)
        keys = torch.cat([F.pad(keys, apart), F.pad(cut.keys(far.k, levels), apart[::-1])], dim=3)
        # as wide as keys, or it takes a slower way on a CPU
        values = F.pad(torch.cat([values, cut.keys(v, levels)], dim=3), apart)
    q, keys, values = (one.transpose(1, 2).flatten(0, 1) for one in (q, keys, values))
    if cut.blocks > 1:
        mask = mask.repeat(rows, 1, 1)
    y = F.scaled_dot_product_attention(q, keys, values, mask[:, None], scale=channels**-0.5)
    y = y.unflatten(0, (rows, cut.blocks)).transpose(1, 2).flatten(2, 3)
    return y[:, :, :steps, :channels]


class _Blocks:
    """Queries in blocks, each with the keys that one of it sees: its own, and some before them.

    A clip that is hardly longer than a block is one, of all keys.
    """

    def __init__(self, kept: Kept, steps: int, device: torch.device) -> None:
        self._kept = kept
        # so long that of a plain window no more than one block before is needed
        stride = 2**kept.thinning
        self._length = -(-(kept.capacity + kept.sinks) // stride) * stride
        if steps <= 2 * self._length:
            self._length = steps
        self.blocks = -(-steps // self._length)
        self._position = torch.arange(self.blocks * self._length, device=device)
        self.query = self._position.view(self.blocks, self._length, 1)
        """Their positions, [blocks, length, 1]."""

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, blocks, length, D] of [B, H, T, D]."""
        return self._filled(x).unflatten(2, (self.blocks, self._length))

    def positions(self, levels: Sequence[Level]) -> Tensor:
        """Of `keys`, [blocks, 1, n]; -1 where there is none."""
        found = self._keys(self._position[None, None, :, None], levels)
        return found[0, 0].mT

    def seen(self, key: Tensor) -> Tensor:
        """Whether the queries see keys at `positions`, [blocks, length, n]."""
        return (key >= 0) & self._kept.seen(self.query, key)

    def keys(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """Sinks, and of each kind those that a block may see, [B, H, blocks, n, D]."""
        return self._keys(self._filled(x), levels)

    def _filled(self, x: Tensor) -> Tensor:
        missing = len(self._position) - x.shape[2]
        return F.pad(x, (0, 0, 0, missing)) if missing else x  # by nothing, it would be copied

    def _keys(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        sinks = x[:, :, None, : self._kept.sinks]
        parts = [sinks.expand(-1, -1, self.blocks, -1, -1)] if self._kept.sinks else []
        for first, stride, size in levels:
            own = x[:, :, first::stride]
            if self.blocks == 1:
                parts.append(own[:, :, None])
                continue
            each = self._length // stride
            own = F.pad(own, (0, 0, 0, self.blocks * each - own.shape[2]), value=-1)
            own = own.unflatten(2, (self.blocks, each))
            before = -(-(size - 1 + -(-first // stride)) // each)
            for back in range(min(before, self.blocks - 1), -1, -1):
                parts.append(F.pad(own, (0, 0, 0, 0, back, -back), value=-1))
        return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
