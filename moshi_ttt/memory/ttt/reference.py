"""The ttt rules again, slowly: see `moshi_ttt.memory.reference`.

The gradients of the inner loss come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.memory.reference import projections
from moshi_ttt.memory.rule import MemoryState
from moshi_ttt.memory.ttt.mini_batch import MiniBatchRule
from moshi_ttt.memory.ttt.mlp import TTTMLP


def ttt_row(rule: MiniBatchRule, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """What `rule` should return for one row, x [T, D]."""
    names = list(rule.initial)
    phase, updates = int(state["phase"]), int(state["updates"])
    anchors = [{name: state[name][head] for name in names} for head in range(rule.heads)]
    steps = [{name: state[f"step_{name}"][head] for name in names} for head in range(rule.heads)]
    outputs: list[list[Tensor]] = []
    for x_t in x:
        outputs.append([])
        phase += 1
        for head in range(rule.heads):
            q, k, v, gate = projections(rule, x_t, head)
            anchor = anchors[head]
            loss = 0.5 * ((_f(rule, head, k, anchor) - v) ** 2).sum()
            grads = torch.autograd.grad(loss, list(anchor.values()), create_graph=True)
            for name, grad in zip(names, grads, strict=True):
                steps[head][name] = steps[head][name] + rule.inner_lr * gate * grad
            now = {name: anchor[name] - steps[head][name] for name in names}
            outputs[-1].append(_f(rule, head, q, now))
            if phase == rule.mini_batch_steps:
                forgetting_time = torch.exp(-rule.log_rate[head])
                kept = torch.exp(-rule.mini_batch_steps / forgetting_time)
                for name in names:
                    w0 = rule.initial[name][head]
                    anchor[name] = w0 + kept * (now[name] - w0)
                    steps[head][name] = torch.zeros_like(w0)
        if phase == rule.mini_batch_steps:
            phase, updates = 0, updates + 1
    after = {"phase": torch.tensor(phase), "updates": torch.tensor(updates)}
    for name in names:
        after[name] = torch.stack([anchor[name] for anchor in anchors])
        after[f"step_{name}"] = torch.stack([step[name] for step in steps])
    return torch.stack([torch.cat(heads) for heads in outputs]), after


def _f(rule: MiniBatchRule, head: int, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    if isinstance(rule, TTTMLP):
        hidden = F.gelu(x @ w["weight1"] + w["bias1"][0]) / (0.425 * 4 * rule.head_dim) ** 0.5
        z = hidden @ w["weight2"] + w["bias2"][0]
    else:
        z = x @ w["weight"] + w["bias"][0]
    normed = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
    return x + normed * rule.norm_scale[head, 0] + rule.norm_bias[head, 0]
