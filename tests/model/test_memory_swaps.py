"""The control that takes the memory away, or gives another one, in the middle of a forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lm_fakes import hybrid, random_codes
from moshi.models.lm import LMModel

from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import hybrid_layers, memory_swapped

MakeLM = Callable[..., LMModel]
every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
@torch.no_grad()
def test_without_steps_nothing_changes_and_the_memory_is_kept(make_lm: MakeLM, rule: str) -> None:
    lm, codes = hybrid(make_lm, rule=rule), random_codes()
    expected = lm(codes).text_logits
    with memory_swapped(lm) as swaps:
        assert torch.equal(lm(codes).text_logits, expected)
    with lm.streaming(len(codes)):
        inputs = lm._get_initial_token().expand(len(codes), -1, -1)
        for step in range(codes.shape[-1]):
            lm.forward_text(inputs)
            delayed = [codes[:, row, max(0, step - d)] for row, d in enumerate(lm.delays)]
            inputs = torch.stack(delayed, dim=1)[..., None]
        counts = {i: one.branch.updates().tolist() for i, one in hybrid_layers(lm).items()}
    for index, swap in swaps.items():
        assert swap.last is not None
        assert swap.last["updates"].tolist() == counts[index]
    assert all(layer.branch.swaps is None for layer in hybrid_layers(lm).values())


@every_rule
@torch.no_grad()
def test_from_a_reset_on_the_memory_has_read_only_what_came_since(
    make_lm: MakeLM, rule: str
) -> None:
    lm = hybrid(make_lm, rule=rule)
    for layer in hybrid_layers(lm).values():
        branch, x = layer.branch, torch.randn(2, 30, 32)
        whole = branch(x, residual=x)
        with memory_swapped(lm, [17, 23]):
            got = branch(x, residual=x)
        assert torch.equal(got[:, :17], branch(x[:, :17], residual=x[:, :17]))
        for first, stop in ((17, 23), (23, 30)):
            piece = x[:, first:stop]
            torch.testing.assert_close(got[:, first:stop], branch(piece, residual=piece))
        assert not torch.allclose(got[:, 17:], whole[:, 17:], atol=1e-4)


@every_rule
@torch.no_grad()
def test_another_conversations_memory_goes_on_from_where_it_was(make_lm: MakeLM, rule: str) -> None:
    lm = hybrid(make_lm, rule=rule)
    theirs, mine = torch.randn(1, 20, 32), torch.randn(2, 30, 32)
    branches = {index: layer.branch for index, layer in hybrid_layers(lm).items()}
    with memory_swapped(lm) as swaps:
        for branch in branches.values():
            branch(theirs, residual=theirs)
    memories = {index: swap.last for index, swap in swaps.items()}
    with memory_swapped(lm, [12], memories):
        got = {index: branch(mine, residual=mine) for index, branch in branches.items()}
    for index, branch in branches.items():
        spliced = torch.cat([theirs.expand(2, -1, -1), mine[:, 12:]], dim=1)
        expected = branch(spliced, residual=spliced)[:, 20:]
        torch.testing.assert_close(got[index][:, 12:], expected, rtol=1e-4, atol=1e-5)
