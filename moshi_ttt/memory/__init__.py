"""Memories that learn while the model runs: three rules behind one interface."""

from __future__ import annotations

from moshi_ttt.memory.config import MemoryConfig, resolve_layers
from moshi_ttt.memory.gated_delta import GatedDelta
from moshi_ttt.memory.projections import Corrected
from moshi_ttt.memory.rule import MemoryRule, MemoryState
from moshi_ttt.memory.ttt import TTTMLP, TTTLinear

__all__ = ["Corrected", "MemoryConfig", "MemoryRule", "MemoryState", "build_rule", "resolve_layers"]

_RULES: dict[str, type[MemoryRule]] = {
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "gated_delta": GatedDelta,
}


def build_rule(config: MemoryConfig, dim: int) -> MemoryRule:
    """The rule that the fitted `config` names, for inputs of `dim` channels."""
    return _RULES[config.rule](dim, config)
