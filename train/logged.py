"""What a training run says of its model: how much trains, and what each branch adds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moshi_ttt.model.branch import BranchStats


def parameter_counts(
    lm: nn.Module, groups: Mapping[str, Mapping[str, nn.Parameter]]
) -> dict[str, int]:
    """Parameters of each group that trains, and `frozen` of all others."""
    counts = {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}
    return counts | {"frozen": sum(p.numel() for p in lm.parameters() if not p.requires_grad)}


def gradient_norms(groups: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each group; 0 where none has come."""
    norms = {}
    for name, group in groups.items():
        gradients = [p.grad for p in group.values() if p.grad is not None]
        norms[name] = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return norms


def branch_scalars(stats: BranchStats, layer: str) -> dict[str, Tensor]:
    """What is logged of one branch; undefined at padding, which has no residual in layer 0."""
    return {
        f"train/branch_ratio/{layer}": stats.ratio.nanmean(),
        f"train/branch_ratio_max/{layer}": stats.ratio.nan_to_num().max(),
        f"train/raw_branch_ratio/{layer}": stats.raw_ratio.nanmean(),
        f"train/gate/{layer}": stats.gate_rms,
    }
