"""A memory in Moshi's last layers, codes to read, and the logits that come of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory, hybrid_layers

MakeLM = Callable[..., LMModel]


def with_memory(lm: LMModel, *, gate: float | None = None, **settings: object) -> LMModel:
    """A copy of `lm` with a fast-learning memory in layers 1 and 2."""
    hybrid = copy.deepcopy(lm)
    defaults = {"rule": "ttt_linear", "projections": "own", "layers": "last:2"}
    defaults |= {"mini_batch_steps": 5, "write_gate": 0.2}
    defaults["forgetting_time_steps"] = (10.0, 100.0)
    torch.manual_seed(0)
    add_memory(hybrid, MemoryConfig(**defaults | settings))
    if gate is not None:
        open_gates(hybrid, gate)
    return hybrid


def open_gates(lm: LMModel, gate: float) -> None:
    with torch.no_grad():
        for layer in hybrid_layers(lm).values():
            layer.branch.gate.normal_(std=gate)


def codes(batch_size: int, steps: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randint(16, (batch_size, 16, steps), generator=generator)
    text = torch.randint(20, (batch_size, 1, steps), generator=generator)
    return torch.cat([text, audio], dim=1)


def logits(lm: LMModel, batch: Tensor) -> Tensor:
    output = lm(batch)
    return torch.cat([output.logits[output.mask].flatten(), output.text_logits.flatten()])
