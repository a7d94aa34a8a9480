"""The gated delta rule again, as its paper writes it: see `moshi_ttt.memory.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.memory.gated_delta.chunked import GatedDelta
from moshi_ttt.memory.reference import projections
from moshi_ttt.memory.rule import MemoryState


def gated_delta_row(rule: GatedDelta, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """What `rule` should return for one row, x [T, D]."""
    memories = list(state["memory"])
    outputs: list[list[Tensor]] = []
    for x_t in x:
        outputs.append([])
        for head in range(rule.heads):
            q, k, v, beta = projections(rule, x_t, head)
            log_rate = rule.log_rate[head] + rule.forget.weight[head] @ x_t
            alpha = torch.exp(-torch.exp(log_rate.clamp(max=0)))
            s = alpha * memories[head]
            memories[head] = s + beta * torch.outer(k, v - s.T @ k)
            outputs[-1].append(memories[head].T @ q)
    after = {"memory": torch.stack(memories), "updates": state["updates"] + len(x)}
    return torch.stack([torch.cat(heads) for heads in outputs]), after
