"""moshi's attention without a mask a row, where nothing streams."""

from __future__ import annotations

from typing import Self

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention, expand_repeated_kv
from torch import Tensor
from torch.nn import functional as F


class ParallelAttention(StreamingMultiheadAttention):
    """The same numbers as moshi's; streaming, and the depformer's, are moshi's own code.

    moshi's mask [B, 1, T, T] holds the same for every row, and making it moves more memory than
    attention itself. One [T, T] does; none is needed where the window reaches the first step.
    """

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
        return adopted.train(attention.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of T steps to themselves, [B, T, D]."""
        if self._streaming_state is not None or self.weights_per_step or not self.causal:
            attended: Tensor = super().forward(query, key, value)
            return attended
        rows, steps = query.shape[:2]
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
        mask = self._window(steps, query.device)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out_projs[0](y.transpose(1, 2).flatten(2))

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
        return (distance >= 0) & (distance < self.context)


def parallel_attention(lm: LMModel) -> None:
    """Give the temporal layers of a model that has not streamed a `ParallelAttention`, in place."""
    for layer in lm.transformer.layers:
        for parent in list(layer.modules()):
            for name, child in parent.named_children():
                if type(child) is StreamingMultiheadAttention and not child.cross_attention:
                    setattr(parent, name, ParallelAttention.adopt(child))
