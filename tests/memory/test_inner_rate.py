"""How much a memory learns while it is used, scaled for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moshi_ttt.memory import MemoryConfig, build_rule
from moshi_ttt.memory.config import RULES


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rate", [0.0, 0.5, 100.0])
def test_write_gates_are_multiplied_in_clips_and_streams(name: str, rate: float) -> None:
    torch.manual_seed(0)
    config = MemoryConfig(rule=name, projections="own", heads=2, mini_batch_steps=5, write_gate=0.3)
    rule = build_rule(config.fitted(8, 2), 8).double()
    torch.nn.init.normal_(rule.write.weight, std=0.3)
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    usual, _ = rule(x)
    gates: list[Tensor] = []

    def observe(inputs: Sequence[Tensor]) -> None:
        gates.append(inputs[3])

    rule.observer = observe
    rule(x)
    rule.rate = rate
    whole, after = rule(x)
    torch.testing.assert_close(gates[1], (rate * gates[0]).clamp(max=1))
    assert not torch.allclose(whole, usual)

    state = {key: value.clone() for key, value in rule.init_state(2).items()}
    rows = torch.ones(2, dtype=torch.bool)
    steps = [rule.stream(step, state, rows) for step in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    for key, value in after.items():
        torch.testing.assert_close(state[key], value)
    if rate == 0:  # it has learned nothing but what it began with
        start = rule.init_state(2)
        for key in start.keys() - {"phase", "updates"}:
            torch.testing.assert_close(state[key], start[key])
