"""What the slow references of the rules share: one row, one head, one step at a time, in fp64.

A reference shares nothing with its rule but the parameters and the names in the state.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moshi_ttt.memory.rule import MemoryRule, MemoryState


class ReferenceRow(Protocol):
    """One row of a rule, slowly and obviously."""

    def __call__(self, rule: Any, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """What `rule` should read for x [T, D], [T, H x dh], and the state after it."""
        ...


def over_rows(
    row: ReferenceRow, rule: MemoryRule, x: Tensor, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """`row` for each row of x [B, T, D] and of the state, stacked again."""
    rows = [
        row(rule, x[i], {name: tensor[i] for name, tensor in state.items()})
        for i in range(x.shape[0])
    ]
    after = {name: torch.stack([state[name] for _, state in rows]) for name in state}
    return torch.stack([y for y, _ in rows]), after


def projections(rule: MemoryRule, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value [dh] and write gate [] of one head, for x [D]."""
    weight: Any = rule.qkv.weight
    q, k, v = (
        weight[part * rule.width :][head * rule.head_dim :][: rule.head_dim] @ x
        for part in range(3)
    )
    gate = torch.sigmoid(rule.write.weight[head] @ x + rule.write.bias[head])
    return q / (q @ q + 1e-6).sqrt(), k / (k @ k + 1e-6).sqrt(), v, gate
