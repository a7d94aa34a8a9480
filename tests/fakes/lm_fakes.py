"""Random codes, and a hybrid model small enough to run everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory, hybrid_layers

MakeLM = Callable[..., LMModel]
STREAMS, STEPS, CONTEXT = 2, 40, 16  # the ring of `make_lm` turns twice


def random_codes(steps: int = STEPS) -> Tensor:
    """Tokens of every stream, [STREAMS, 17, steps]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 16, (STREAMS, 17, steps), generator=generator)


def hybrid(make_lm: MakeLM, **config: Any) -> LMModel:
    """A model with memory in layers 0 and 2, unless `config` names others; its gates are open."""
    lm = make_lm()
    torch.manual_seed(3)
    defaults: dict[str, Any] = {"rule": "ttt_linear", "projections": "own"}
    defaults |= {"layers": [0, 2], "heads": 2, "mini_batch_steps": 5}
    defaults |= {"write_gate": 0.03, "forgetting_time_steps": (50.0, 20_000.0)}
    add_memory(lm, MemoryConfig(**defaults | config))
    for layer in hybrid_layers(lm).values():
        torch.nn.init.normal_(layer.branch.gate, std=0.5)
    return lm.eval()
