"""Memories that learn while the model runs: three rules behind one interface."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moshi_ttt.memory.config import MemoryConfig, resolve_layers
from moshi_ttt.memory.gated_delta import GatedDelta
from moshi_ttt.memory.gated_delta.reference import gated_delta_row
from moshi_ttt.memory.projections import Correction
from moshi_ttt.memory.reference import ReferenceRow, over_rows
from moshi_ttt.memory.rule import Borrowed, MemoryRule, MemoryState
from moshi_ttt.memory.ttt import TTTMLP, TTTLinear
from moshi_ttt.memory.ttt.reference import ttt_row

__all__ = [
    "Borrowed",
    "Correction",
    "GatedDelta",
    "MemoryConfig",
    "MemoryRule",
    "MemoryState",
    "build_rule",
    "resolve_layers",
    "rule_name",
    "run_reference",
]


class _Room(NamedTuple):
    rule: type[MemoryRule]
    reference: ReferenceRow


# the one place that knows which rules there are, and what stands beside each
_ROOMS = {
    "ttt_linear": _Room(TTTLinear, ttt_row),
    "ttt_mlp": _Room(TTTMLP, ttt_row),
    "gated_delta": _Room(GatedDelta, gated_delta_row),
}


def build_rule(config: MemoryConfig, dim: int) -> MemoryRule:
    """The rule that the fitted `config` names, for inputs of `dim` channels."""
    return _ROOMS[config.rule].rule(dim, config)


def rule_name(rule: MemoryRule) -> str:
    """What a rule is called in configs."""
    return next(name for name, room in _ROOMS.items() if room.rule is type(rule))


def run_reference(rule: MemoryRule, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """What `rule(x, state)` should return, computed slowly and obviously."""
    row = next(room.reference for room in _ROOMS.values() if room.rule is type(rule))
    return over_rows(row, rule, x, state)
