"""The optimiser: AdamW, and how its learning rates go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moshi_ttt.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, one learning rate a group."""

    lr_memory: float = 1e-3
    """Peak learning rate of the memories (projections, initial fast weights, write and
    forgetting gates)."""
    lr_gates: float = 1e-2
    """Peak learning rate of the output gates."""
    lr_rest: float = 1e-4
    """Peak learning rate of everything else that trains: LoRA, or the base weights."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the projection matrices; nothing else decays."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    warmup_fraction: float = 0.05
    """Part of all optimizer steps spent warming up, 0..1."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end, as a part of the peak, 0..1."""

    def __post_init__(self) -> None:
        check_fields(self, "lr_memory", "lr_gates", "lr_rest", above=0)
        check_fields(self, "weight_decay", least=0)
        check_fields(
            self, "beta1", "beta2", "warmup_fraction", "final_lr_fraction", least=0, most=1
        )

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate at an optimizer step, as a part of the peak; never 0."""
        warmup_steps = max(1, round(self.warmup_fraction * total_steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine


def adamw(
    groups: Mapping[str, Mapping[str, nn.Parameter]], config: OptimConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW over `trainable_groups`, matrices apart from what never decays.

    Args:
        groups: parameters by group and name.
        config: rates by group.
        fused: one kernel in place of a dozen; on a GPU.
    """
    rates = {"memory": config.lr_memory, "gates": config.lr_gates, "rest": config.lr_rest}
    chosen = []
    for name, parameters in groups.items():
        matrices = [p for p in parameters.values() if p.ndim == 2]
        others = [p for p in parameters.values() if p.ndim != 2]
        for kind, members, decay in (
            ("matrices", matrices, config.weight_decay),
            ("others", others, 0.0),
        ):
            if members:
                chosen.append(
                    {
                        "name": f"{name}/{kind}",
                        "params": members,
                        "lr": rates[name],
                        "weight_decay": decay,
                    }
                )
    return torch.optim.AdamW(chosen, betas=(config.beta1, config.beta2), fused=fused or None)


def apply_settings(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    fresh: torch.optim.Optimizer,
) -> None:
    """Go on with the rates that the config has now, where a checkpoint brought back those it had.

    Args:
        optimizer: as restored; its moments stay.
        schedule: of that optimizer, at the step it goes on from.
        fresh: what `adamw` makes of the config for the same parameters.
    """
    groups = zip(optimizer.param_groups, fresh.param_groups, schedule.lr_lambdas, strict=True)
    for index, (group, new, factor) in enumerate(groups):
        schedule.base_lrs[index] = group["initial_lr"] = new["lr"]
        group["lr"] = new["lr"] * factor(schedule.last_epoch)
        group["weight_decay"], group["betas"] = new["weight_decay"], new["betas"]


def clip_gradients(
    optimizer: torch.optim.Optimizer, most: float, algorithm: str | None = None
) -> None:
    """Clip what the optimizer reads: each entry if `algorithm` is `value`, else their norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, most)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, most)
