"""A memory that goes on from one forward to the next in some rows, and begins in the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lm_fakes import hybrid, random_codes
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.memory import MemoryState
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import hybrid_layers, memory_carried, memory_swapped

MakeLM = Callable[..., LMModel]
every_rule = pytest.mark.parametrize("rule", RULES)
BOTH, NEITHER = torch.tensor([True, True]), torch.tensor([False, False])


def after(lm: LMModel, codes: Tensor) -> dict[int, MemoryState]:
    with memory_swapped(lm) as swaps:
        lm(codes)
    return {index: swap.last for index, swap in swaps.items() if swap.last is not None}


@every_rule
@pytest.mark.parametrize("border", [1, 10, 13])  # of mini-batches of 5
@torch.no_grad()
def test_two_clips_are_read_as_the_whole_of_them(make_lm: MakeLM, rule: str, border: int) -> None:
    lm = hybrid(make_lm, rule=rule).double()
    for index, layer in hybrid_layers(lm).items():
        branch, x = layer.branch, torch.randn(2, 37, 32, dtype=torch.float64)
        with memory_swapped(lm) as swaps:
            whole = branch(x, residual=x)
        expected = swaps[index].last
        with memory_carried(lm, {}, NEITHER) as swaps:
            first = branch(x[:, :border], residual=x[:, :border])
        assert swaps[index].last is not None
        memories = dict.fromkeys(swaps, swaps[index].last)
        with memory_carried(lm, memories, BOTH) as swaps:
            second = branch(x[:, border:], residual=x[:, border:])
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
        assert expected is not None
        for name, value in expected.items():
            torch.testing.assert_close(swaps[index].last[name], value, rtol=0, atol=1e-10)


@every_rule
@torch.no_grad()
def test_rows_that_go_on_and_rows_that_begin_stand_in_one_batch(make_lm: MakeLM, rule: str) -> None:
    lm, codes = hybrid(make_lm, rule=rule), random_codes()
    first, second = codes[..., :18], codes[..., 18:]  # the second in the middle of a mini-batch
    memories = after(lm, first)
    fresh = lm(second).text_logits
    with memory_carried(lm, memories, BOTH):
        carried = lm(second).text_logits
    with memory_carried(lm, memories, torch.tensor([True, False])) as swaps:
        mixed = lm(second).text_logits
    torch.testing.assert_close(mixed[0], carried[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], fresh[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(carried[1], fresh[1], atol=1e-3)
    for swap in swaps.values():
        whole, part = (
            rows["updates"].tolist() for rows in (after(lm, codes)[0], after(lm, second)[0])
        )
        assert swap.last["updates"].tolist() == [whole[0], part[1]]


@every_rule
@torch.no_grad()
def test_where_no_row_goes_on_nothing_is_different(make_lm: MakeLM, rule: str) -> None:
    lm, codes = hybrid(make_lm, rule=rule), random_codes()
    memories, expected = after(lm, codes), lm(codes).text_logits
    for one in ({}, memories):
        with memory_carried(lm, one, NEITHER):
            assert torch.equal(lm(codes).text_logits, expected)
    assert all(layer.branch.swaps is None for layer in hybrid_layers(lm).values())


@every_rule
def test_no_gradient_reaches_the_clip_before(make_lm: MakeLM, rule: str) -> None:
    lm = hybrid(make_lm, rule=rule)
    (index, layer), *_ = hybrid_layers(lm).items()
    first, second = (torch.randn(2, 12, 32, requires_grad=True) for _ in range(2))
    with memory_swapped(lm) as swaps:
        layer.branch(first, residual=first)
    memory = swaps[index].last  # its graph and all
    assert memory is not None
    assert any(one.requires_grad for one in memory.values())
    memories = dict.fromkeys(hybrid_layers(lm), memory)
    with memory_carried(lm, memories, BOTH):
        layer.branch(second, residual=second).square().sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert second.grad.abs().sum() > 0


def test_only_rows_that_begin_train_the_learned_start(make_lm: MakeLM) -> None:
    # the ttt rules forget towards their start, which every row trains
    lm, codes = hybrid(make_lm, rule="gated_delta"), random_codes()
    memories = after(lm, codes)
    starts = [layer.branch.rule.initial for layer in hybrid_layers(lm).values()]

    def gradients(batch: Tensor, going_on: list[bool], rows: slice) -> list[Tensor]:
        with memory_carried(lm, memories if len(batch) == 2 else {}, torch.tensor(going_on)):
            loss = lm(batch).text_logits[rows].square().sum()
        return list(torch.autograd.grad(loss, starts))

    assert not any(one.any() for one in gradients(codes, [True, True], slice(None)))
    mixed = gradients(codes, [True, False], slice(None))
    alone = gradients(codes[1:], [False], slice(None))
    for one, other in zip(mixed, alone, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@every_rule
def test_activation_checkpointing_gives_the_same_gradients(make_lm: MakeLM, rule: str) -> None:
    codes, gradients = random_codes(), []
    for checkpointing in (False, True):
        lm = hybrid(make_lm, rule=rule).train()
        lm.transformer.checkpointing = checkpointing
        for layer in hybrid_layers(lm).values():
            layer.branch.recomputed = checkpointing
        with torch.no_grad():
            memories = after(lm, codes[..., :18])
        rows = torch.tensor([True, False])
        with memory_carried(lm, memories, rows):
            loss = lm(codes[..., 18:]).text_logits.square().mean()
        with memory_carried(lm, memories, rows):
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in lm.named_parameters()})
    plain, checkpointed = gradients
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=0, msg=name)
