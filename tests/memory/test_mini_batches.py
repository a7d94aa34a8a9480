"""Mini-batches of the ttt rules, many of which are read in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moshi_ttt.memory import MemoryConfig, MemoryState, build_rule, run_reference


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
def test_many_in_one_call_match_the_reference(name: str) -> None:
    torch.manual_seed(0)
    config = MemoryConfig(rule=name, projections="own", mini_batch_steps=2, write_gate=0.3)
    rule = build_rule(config.fitted(8, 2), 8).double()
    x = torch.randn(1, 6 + 35, 8, dtype=torch.float64)
    # from a state between two mini-batches: twice eight whole ones, one more, and a half
    state = rule(x[:, :6])[1]
    y, after = rule(x[:, 6:], state)
    expected, expected_after = run_reference(rule, x[:, 6:], state)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert after.keys() == expected_after.keys()
    for key, wanted in expected_after.items():
        torch.testing.assert_close(after[key], wanted, rtol=1e-10, atol=1e-10)

    read: list[int] = []
    advance = rule._advance

    def noted(chunk: list[Tensor], state: MemoryState) -> tuple[Tensor, MemoryState]:
        read.append(chunk[0].shape[2])
        return advance(chunk, state)

    rule._advance = noted
    rule(x[:, 6:], state)
    assert read == [16, 16, 2, 1]
