"""What the memory adds: it learns, stays bounded and is measured."""

from __future__ import annotations

import pytest
import torch
from hybrid_fakes import MakeLM, codes, logits, open_gates, with_memory
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import BranchStats, MemoryBranch, hybrid_layers, observe_branches

every_rule = pytest.mark.parametrize("rule", RULES)
every_placement = pytest.mark.parametrize("placement", ["parallel", "post_attention"])


def loss(lm: LMModel, batch: Tensor) -> Tensor:
    return logits(lm, batch).square().mean()


@every_rule
@every_placement
def test_the_gate_learns_from_zero_and_then_everything_does(
    make_lm: MakeLM, rule: str, placement: str
) -> None:
    hybrid = with_memory(make_lm(), rule=rule, placement=placement)
    loss(hybrid, codes(1, 20)).backward()
    for layer in hybrid_layers(hybrid).values():
        assert layer.branch.gate.grad.abs().min() > 0
    open_gates(hybrid, 0.1)
    hybrid.zero_grad()
    loss(hybrid, codes(1, 20)).backward()
    for layer in hybrid_layers(hybrid).values():
        for name, parameter in layer.branch.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@every_rule
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(
    make_lm: MakeLM, rule: str, autocast: bool
) -> None:
    gradients = []
    for checkpointing in (False, True):
        lm = with_memory(make_lm(gradient_checkpointing=checkpointing), rule=rule, gate=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with observe_branches(lm) as stats:
                value = loss(lm, codes(2, 23))
            # the regulariser of training: connected through what the observer saw
            ratios = [entry.ratio for entries in stats.values() for entry in entries]
            value = value + torch.stack(ratios).square().mean()
        value.backward()
        assert [len(entries) for entries in stats.values()] == [1, 1]
        gradients.append({name: parameter.grad for name, parameter in lm.named_parameters()})
        gradients[-1]["loss"] = value.detach()
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=0, msg=name)


def test_the_memory_alone_can_train_on_a_frozen_model(make_lm: MakeLM) -> None:
    lm = with_memory(make_lm())
    lm.requires_grad_(False)
    branches = [layer.branch.requires_grad_() for layer in hybrid_layers(lm).values()]
    parameters = [parameter for branch in branches for parameter in branch.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(lm, codes(1, 20))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


@every_placement
def test_placement_decides_what_the_branch_reads_and_is_relative_to(
    make_lm: MakeLM, placement: str
) -> None:
    lm = with_memory(make_lm(), placement=placement, gate=0.5)
    layer = hybrid_layers(lm)[2]
    base, branch, x = layer.base, layer.branch, torch.randn(2, 9, 32)
    normed = base.norm1(x)
    h = x + base.self_attn(normed, normed, normed)
    if placement == "parallel":
        h = h + branch(normed, x)
    else:
        h = h + branch(h / h.square().mean(-1, keepdim=True).sqrt(), h)
    torch.testing.assert_close(layer(x), h + base.gating(base.norm2(h)))


@every_placement
def test_bounded_branch_never_exceeds_the_gate_times_the_residual(
    make_lm: MakeLM, placement: str
) -> None:
    lm = with_memory(make_lm(), placement=placement, gate=0.3)
    for scale in (1.0, 1e4):  # a projection gone wild changes nothing
        limits = {}
        with torch.no_grad():
            for index, layer in hybrid_layers(lm).items():
                layer.branch.out_proj.weight *= scale
                limits[index] = layer.branch.gate.tanh().abs().max()
        with observe_branches(lm) as stats:
            logits(lm, codes(2, 30))
        for index, (entry,) in stats.items():
            assert entry.ratio.max() <= limits[index] * (1 + 1e-5)
            assert entry.raw_ratio.max() <= 1 + 1e-5
            assert entry.ratio.min() > 0


def test_unbounded_branch_has_a_norm_of_its_own(make_lm: MakeLM) -> None:
    lm = with_memory(make_lm(), bounded_readout=False, gate=1.0)
    ratios = []
    for scale in (1, 100):
        with torch.no_grad():
            for layer in hybrid_layers(lm).values():
                layer.branch.out_proj.weight *= scale
        with observe_branches(lm) as stats:
            logits(lm, codes(1, 20))
        ratios.append(stats[1][0].ratio.mean())
    torch.testing.assert_close(ratios[1], 100 * ratios[0])
    assert ratios[1] > 10


def test_observed_norms_are_those_of_what_is_added() -> None:
    torch.manual_seed(0)
    branch = MemoryBranch(32, MemoryConfig().fitted(32, 4))
    with torch.no_grad():
        branch.gate.normal_()
    seen: list[BranchStats] = []
    branch.observer = seen.append
    x, residual = torch.randn(2, 7, 32), 3 * torch.randn(2, 7, 32)
    residual[1, 4] = 0
    added = branch(x, residual)
    assert seen[0].norm.shape == (2, 7)
    torch.testing.assert_close(seen[0].norm, added.norm(dim=-1))
    torch.testing.assert_close(seen[0].residual_norm, residual.norm(dim=-1))
    ungated = added / branch.gate.tanh()
    torch.testing.assert_close(seen[0].raw_norm, ungated.norm(dim=-1))
    torch.testing.assert_close(seen[0].gate_rms, branch.gate.tanh().square().mean().sqrt())
    expected = torch.zeros(2, 7, dtype=torch.bool)
    expected[1, 4] = True
    assert torch.equal(seen[0].ratio.isnan(), expected)


def test_a_silent_residual_gives_a_silent_branch_and_finite_gradients() -> None:
    torch.manual_seed(0)
    branch = MemoryBranch(32, MemoryConfig().fitted(32, 4))
    torch.nn.init.normal_(branch.gate)
    seen: list[BranchStats] = []
    branch.observer = seen.append
    x, residual = torch.zeros(2, 1, 7, 32, requires_grad=True).unbind()
    added = branch(x, residual)
    assert added.abs().max() == 0
    objective = added.sum() + seen[0].norm.sum() + seen[0].gate_rms
    inputs = [x, residual, *branch.parameters()]
    for gradient in torch.autograd.grad(objective, inputs, materialize_grads=True):
        assert gradient.isfinite().all()


def test_observers_leave_with_their_scope(make_lm: MakeLM) -> None:
    lm = with_memory(make_lm())
    with observe_branches(lm) as stats:
        logits(lm, codes(1, 5))
    with pytest.raises(AssertionError), observe_branches(lm):
        lm(codes(1, 5)[:, :3])  # not enough codebooks
    assert all(layer.branch.observer is None for layer in hybrid_layers(lm).values())
    logits(lm, codes(1, 5))
    assert {index: len(entries) for index, entries in stats.items()} == {1: 1, 2: 1}
