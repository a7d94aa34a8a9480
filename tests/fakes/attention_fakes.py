"""Attention in fp64, one query at a time, and one of Moshi's attentions to compare with it."""

from __future__ import annotations

from typing import Any

import torch
from lm_fakes import MakeLM
from torch import Tensor

from moshi_ttt.model.sinks import AttentionControls

HEADS, CHANNELS = 2, 8


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """`x` [..., t, D] turned by `positions` [t], as Su et al. (2021) have it."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(
        torch.ones(len(positions), half, dtype=torch.float64),
        positions.double()[:, None] * frequencies,
    )
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def keys_seen(newest: int, window: int, sinks: int = 0, thinning: int = 0) -> list[int]:
    """What the query at `newest` sees, said as the issue says it."""
    parts = thinning + 2
    full = 2 * (window // parts) if thinning else window  # steps all of which are seen
    longest = (window - thinning * (window // parts)) * 2**thinning
    seen = []
    for position in range(newest + 1):
        distance, number = newest - position, position - sinks
        reach = full  # twice as far with each halving
        for halving in range(1, thinning + 1):
            if number % 2**halving == 0:
                reach = longest if halving == thinning else full * 2**halving
        if position < sinks or distance < reach:
            seen.append(position)
    return seen


def reference(q: Tensor, k: Tensor, v: Tensor, seen: list[int], most: int | None = None) -> Tensor:
    """Attention of one row: the last query over the keys that are `seen`.

    q [H, D]; k and v [H, t, D] of all positions 0..t-1, unrotated; returns [H, D]. No key seems
    more than `most` away.
    """
    newest = k.shape[1] - 1
    positions = torch.tensor(seen)
    if most is not None:
        positions = positions.clamp(min=newest - most)
    keys = rotated(k[:, seen], positions)
    query = rotated(q[:, None], torch.tensor([newest]))
    weights = (query @ keys.mT / k.shape[2] ** 0.5).softmax(-1)
    return (weights @ v[:, seen].double())[:, 0]


def controlled_attention(make_lm: MakeLM, window: int, **kept: Any) -> Any:
    lm = make_lm(dim=HEADS * CHANNELS, num_heads=HEADS, num_layers=1).eval()
    controls = AttentionControls(lm)
    controls.set(context_steps=window, **kept)
    return controls.attentions[0].double()


def projections(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of a row [t, dim], [3, H, t, D], unrotated."""
    return attention.in_projs[0](x).view(-1, 3, HEADS, CHANNELS).permute(1, 2, 0, 3)
