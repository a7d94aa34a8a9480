"""Moshi's depformer over whole clips, with the steps of each codebook side by side.

It has weights of its own for each codebook. In moshi the codebooks of a step lie side by side, so
that what one matrix multiplies has gaps, and one product becomes one for every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import no_compile
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_ROWS_TOGETHER = 16


def depformer_logits(lm: LMModel, sequence: Tensor, transformer_out: Tensor) -> list[Tensor]:
    """What `lm.forward_depformer_training` gives.

    Args:
        lm: not streaming.
        sequence: delayed codes, [B, K, T].
        transformer_out: what the temporal transformer makes of those before each, [B, T, D].

    Returns:
        [B, T, card] for each of Moshi's own codebooks.
    """
    if not _is_usual(lm.depformer):
        return [*lm.forward_depformer_training(sequence, transformer_out).unbind(1)]
    shape = transformer_out.shape[:2]
    embeds = [lm.depformer_text_emb, *lm.depformer_emb]
    codes = [sequence[:, 0], *sequence[:, lm.audio_offset :].unbind(1)]
    order = lm.depformer_weights_per_step_schedule or range(lm.dep_q)
    inputs = order if lm.depformer_multi_linear else [0] * lm.dep_q
    x = torch.stack(
        [
            (embed(code) + lm.depformer_in[index](transformer_out)).flatten(0, 1)
            for embed, code, index in zip(embeds, codes, inputs, strict=False)
        ]
    )  # [codebooks, B T, D]
    # as upstream: off a GPU, compiling costs more than it gives
    with nullcontext() if x.is_cuda else no_compile():
        for layer in lm.depformer.layers:
            if lm.depformer.checkpointing:
                x = checkpoint(_layer, layer, order, x, use_reentrant=False)
            else:
                x = _layer(layer, order, x)
    heads = zip(lm.linears, lm.depformer_norms, x, strict=True)
    return [linear(norm(one)).unflatten(0, shape) for linear, norm, one in heads]


def _is_usual(depformer: Any) -> bool:
    """Whether it is what every released Moshi has: weights for each codebook, and no positions."""
    return depformer.positional_embedding == "none" and all(
        layer.weights_per_step and layer.self_attn.kv_repeat == 1 for layer in depformer.layers
    )


def _layer(layer: Any, order: Iterable[int], x: Tensor) -> Tensor:
    """A `StreamingTransformerLayer` of the depformer, [codebooks, N, D] to the same.

    Args:
        layer: with weights for each codebook and attention to all codebooks before it.
        order: which of the weights each codebook has.
        x: its input.
    """
    attention = layer.self_attn

    def each(modules: Any, of: Tensor) -> Tensor:
        rows = zip(order, of.split(1), strict=True)
        return torch.cat([modules[index](row) for index, row in rows])

    q, k, v = (
        each(attention.in_projs, layer.norm1(x))
        .unflatten(-1, (3, attention.num_heads, -1))
        .permute(2, 1, 3, 0, 4)
    )  # [N, heads, codebooks, channels]
    y = among_codebooks(q, k, v, together=_ROWS_TOGETHER if x.is_cuda else 1)
    update = each(attention.out_projs, y.permute(2, 0, 1, 3).flatten(2))
    x = x.to(update) + layer.layer_scale_1(update)
    update = each(layer.gating, layer.norm2(x))
    return x.to(update) + layer.layer_scale_2(update)


def among_codebooks(q: Tensor, k: Tensor, v: Tensor, together: int) -> Tensor:
    """Attention of each codebook to itself and those before it in its step.

    Args:
        q: queries, [N, heads, codebooks, channels], a row for each step.
        k: keys, likewise.
        v: values, likewise.
        together: rows that one problem holds, side by side and blind for one another. A GPU works
            in tiles of 128 by 128, most of which a single row would leave empty.

    Returns:
        [N, heads, codebooks, channels].
    """
    rows, _, codebooks, _ = q.shape
    mask = torch.ones(codebooks, codebooks, dtype=torch.bool, device=q.device).tril()
    mask = torch.block_diag(*[mask] * together)

    def packed(x: Tensor) -> Tensor:
        if rows % together:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -rows % together))
        return x.unflatten(0, (-1, together)).transpose(1, 2).flatten(2, 3)

    y = F.scaled_dot_product_attention(packed(q), packed(k), packed(v), mask)
    return y.unflatten(2, (together, codebooks)).transpose(1, 2).flatten(0, 1)[:rows]
