"""Where a memory's projections come from: its own, copied from attention, shared with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import PROJECTIONS, RULES
from moshi_ttt.model.hybrid import HybridLayer, add_memory, hybrid_layers
from moshi_ttt.model.lora import LoraConfig, add_lora

MakeLM = Callable[..., LMModel]
every_rule = pytest.mark.parametrize("rule", RULES)
borrowed = pytest.mark.parametrize("projections", ["attention", "shared"])


def with_memory(lm: LMModel, **settings: Any) -> LMModel:
    """A copy of `lm` with an open, fast-learning memory in layers 1 and 2."""
    hybrid = copy.deepcopy(lm)
    defaults: dict[str, Any] = {"rule": "ttt_linear", "projections": "own", "layers": "last:2"}
    defaults |= {"mini_batch_steps": 5, "write_gate": 0.2}
    torch.manual_seed(0)
    add_memory(hybrid, MemoryConfig(**defaults | {"gate_init": 0.5} | settings))
    return hybrid


def both(layer: HybridLayer) -> tuple[tuple[Any, Tensor], ...]:
    """The memory's input and output projection, each with attention's weights."""
    attention, branch = layer.base.self_attn, layer.branch
    return (
        (branch.rule.qkv, attention.in_projs[0].weight),
        (branch.out_proj, attention.out_projs[0].weight),
    )


def merged(shared: LMModel, vanilla: LMModel, **settings: Any) -> LMModel:
    """The model whose memories own what those of `shared` borrow and correct."""
    owner = with_memory(vanilla, projections="own", **settings).double()
    for index, layer in hybrid_layers(owner).items():
        other = hybrid_layers(shared)[index]
        state = layer.branch.state_dict()
        for name, value in other.branch.state_dict().items():
            if name in state:
                state[name] = value
        for (mine, _), (correction, weight) in zip(both(layer), both(other), strict=True):
            with torch.no_grad():
                mine.weight.copy_(weight + correction.up.weight @ correction.down.weight)
        state |= {"rule.qkv.weight": layer.branch.rule.qkv.weight.detach()}
        state |= {"out_proj.weight": layer.branch.out_proj.weight.detach()}
        layer.branch.load_state_dict(state)
    return owner


def corrected(lm: LMModel) -> LMModel:
    """With corrections that are not 0."""
    for layer in hybrid_layers(lm).values():
        for projection, _ in both(layer):
            torch.nn.init.normal_(projection.up.weight, std=0.3)
    return lm


def logits(lm: LMModel, codes: Tensor) -> Tensor:
    output = lm(codes)
    return torch.cat([output.logits[output.mask].flatten(), output.text_logits.flatten()])


@every_rule
def test_shared_projections_are_attentions_plus_the_correction(make_lm: MakeLM, rule: str) -> None:
    vanilla = make_lm().double()
    shared = corrected(with_memory(vanilla, rule=rule, projections="shared", rank=3).double())
    owner = merged(shared, vanilla, rule=rule)
    codes = random_codes(30)
    got, expected = logits(shared, codes), logits(owner, codes)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, logits(vanilla, codes))
    for lm in (shared, owner):
        logits(lm, codes).square().mean().backward()
    for index, layer in hybrid_layers(shared).items():
        other = hybrid_layers(owner)[index].branch
        torch.testing.assert_close(layer.branch.gate.grad, other.gate.grad, rtol=1e-6, atol=1e-10)
        # d loss / d (up down) is what the owner's whole matrix gets
        up, down = layer.branch.rule.qkv.up, layer.branch.rule.qkv.down
        expected = other.rule.qkv.weight.grad @ down.weight.T
        torch.testing.assert_close(up.weight.grad, expected, rtol=1e-6, atol=1e-10)


@every_rule
def test_shared_projections_stream_as_they_read_in_parallel(make_lm: MakeLM, rule: str) -> None:
    shared = with_memory(make_lm(), rule=rule, projections="shared")
    lm = corrected(shared).double().eval()
    codes = random_codes(30)
    with torch.no_grad():
        whole = lm.forward_text(codes)[0]
        pieces = []
        with lm.streaming(len(codes)):
            for step in range(codes.shape[-1]):
                pieces.append(lm.forward_text(codes[..., step : step + 1])[0])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_projections_copied_from_attention_begin_as_attentions(make_lm: MakeLM) -> None:
    lm = with_memory(make_lm(), projections="attention")
    for layer in hybrid_layers(lm).values():
        for projection, weight in both(layer):
            assert torch.equal(projection.weight, weight)
            assert projection.weight.data_ptr() != weight.data_ptr()
        assert layer.branch.rule.heads == layer.base.self_attn.num_heads


def test_shared_projections_cost_their_rank_only(make_lm: MakeLM) -> None:
    def size(projections: str) -> int:
        lm = with_memory(make_lm(), projections=projections, rank=2, rule="gated_delta")
        layers = hybrid_layers(lm).values()
        return sum(
            p.numel() for layer in layers for pair in both(layer) for p in pair[0].parameters()
        )

    assert size("own") == size("attention") == 2 * (3 + 1) * 32 * 32
    assert size("shared") == 2 * (2 * (32 + 96) + 2 * (32 + 32))


def test_shared_projections_follow_an_adapter_on_attention(make_lm: MakeLM) -> None:
    lm = make_lm()
    add_lora(lm, LoraConfig(rank=2, targets=("qkv", "attention_out")))
    add_memory(lm, MemoryConfig(layers="last:1", projections="shared", gate_init=0.5))
    before = logits(lm, random_codes(20))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    (layer,) = hybrid_layers(lm).values()
    assert not torch.equal(logits(lm, random_codes(20)), before)
    assert "lora" in type(layer.base.self_attn.in_projs[0]).__module__


@pytest.mark.parametrize("projections", PROJECTIONS)
def test_gates_open_where_the_config_says(make_lm: MakeLM, projections: str) -> None:
    lm = with_memory(make_lm(), projections=projections, gate_init=0.25)
    for layer in hybrid_layers(lm).values():
        assert torch.equal(layer.branch.gate, torch.full((32,), 0.25))


@borrowed
def test_projections_that_do_not_fit_are_refused(make_lm: MakeLM, projections: str) -> None:
    with pytest.raises(UserError, match="placement=parallel"):
        MemoryConfig(projections=projections, placement="post_attention")
    with pytest.raises(UserError, match=r"head_dim=8.*32 channels"):
        add_memory(make_lm(), MemoryConfig(projections=projections, heads=2, head_dim=8))
    with pytest.raises(UserError, match="fewer keys than queries"):
        add_memory(make_lm(kv_repeat=2), MemoryConfig(projections=projections))


@pytest.mark.parametrize("projections", PROJECTIONS)
def test_what_a_stream_keeps_ready_is_not_what_clips_or_later_streams_read(
    make_lm: MakeLM, projections: str
) -> None:
    vanilla, codes = make_lm().eval(), random_codes(6)
    lm, other = (
        with_memory(vanilla, projections=projections, rule="gated_delta", rank=2) for _ in range(2)
    )

    def stream(model: LMModel) -> Tensor:
        with torch.no_grad(), model.streaming(2):
            return torch.cat([model.forward_text(one)[1] for one in codes.split(1, -1)], dim=2)

    before = stream(lm)
    for layer in hybrid_layers(lm).values():
        for parameter in layer.branch.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(lm.state_dict())
    assert torch.equal(lm(codes).text_logits, other(codes).text_logits)
    after = stream(lm)
    assert torch.equal(after, stream(other))
    assert not torch.equal(after, before)
    lm(codes).text_logits.square().mean().backward()
    gradients = [p.grad for one in hybrid_layers(lm).values() for p in one.branch.parameters()]
    assert all(gradient is not None for gradient in gradients)
