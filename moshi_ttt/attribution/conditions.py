"""One cell of the matrix: what is held, what is changed, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS

Regime = Literal["free", "forced", "silent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One cell of the matrix: what is held, and what is changed."""

    context_steps: int
    """Attention window and ring capacity C."""
    sinks: int = 0
    """First positions that are never evicted."""
    start_position: int = 0
    """Position of the first step."""
    regime: Regime = "free"
    """Moshi runs free; everything is forced from a recording; Moshi is free, the user silent."""
    gates_shut: bool = False
    """The memory runs and adds nothing."""
    model: str = ""
    """Which model, where there are several."""
    trained_steps: int | None = None
    """Clip length that the model was trained on."""
    has_memory: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether Moshi runs free and nothing is changed; the user may be either."""
        plain = replace(self, sinks=0, start_position=0, gates_shut=False)
        return self == plain and self.regime != "forced"

    @property
    def name(self) -> str:
        """Short and unique, fit for a file name."""
        parts = [self.model or "model", f"C{self.context_steps}"]
        if self.sinks:
            parts.append(f"sinks{self.sinks}")
        if self.start_position:
            parts.append(f"start{self.start_position}")
        if self.regime != "free":
            parts.append(self.regime)
        if self.gates_shut:
            parts.append("gate0")
        return "_".join(parts)


@dataclass(frozen=True, eq=False)
class Cell:
    """One batch of generations under one condition."""

    condition: Condition
    log_norm: np.ndarray  # [S, L, T] logarithm of each layer's input norm
    prompts: np.ndarray  # [S] prompt of each stream
    prompt_steps: int
    """Steps forced at the start; what happens up to there is left out."""
    nll: np.ndarray | None = None  # [S, 2, T] nats, text and first codebook; NaN without a token
    speaking: np.ndarray | None = None
    """[S, 2, T] how much of the time around each step Moshi and the user speak; None: unknown."""

    @property
    def first_step(self) -> int:
        """First step that is looked at."""
        return self.prompt_steps + SETTLE_STEPS
