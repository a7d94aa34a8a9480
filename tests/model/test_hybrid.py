"""Moshi with a memory: equal to Moshi while the gates are shut, and wrapped with care."""

from __future__ import annotations

import copy

import pytest
import torch
from hybrid_fakes import MakeLM, codes, logits, open_gates, with_memory
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import PROJECTIONS, RULES
from moshi_ttt.model.hybrid import add_memory, gates_forced_to_zero, hybrid_layers

every_rule = pytest.mark.parametrize("rule", RULES)
every_branch = pytest.mark.parametrize(
    ("projections", "placement"),
    [(kind, "parallel") for kind in PROJECTIONS] + [("own", "post_attention")],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@torch.no_grad()
def generate(lm: LMModel, steps: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Generated codes [B, 9, steps - 1], and each memory's updates [B] at the end."""
    lm = copy.deepcopy(lm).eval()  # what has streamed takes no memory
    torch.manual_seed(3)
    generator = LMGen(lm)
    user = codes(2, steps)[:, 9:]
    with generator.streaming(2):
        outputs = [generator.step(user[:, :, step : step + 1]) for step in range(steps)]
        updates = {
            index: layer.branch.updates().clone() for index, layer in hybrid_layers(lm).items()
        }
    return torch.cat([output for output in outputs if output is not None], -1), updates


@every_rule
@every_branch
@both_dtypes
def test_shut_gates_equal_moshi_bit_for_bit_in_training_forward(
    make_lm: MakeLM, rule: str, projections: str, placement: str, dtype: torch.dtype
) -> None:
    vanilla = make_lm(dtype=dtype)
    hybrid = with_memory(vanilla, rule=rule, projections=projections, placement=placement)
    expected, got = logits(vanilla, codes(2, 37)), logits(hybrid, codes(2, 37))
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    open_gates(hybrid, 0.5)
    assert not torch.equal(logits(hybrid, codes(2, 37)), expected)


@every_rule
@every_branch
@both_dtypes
def test_shut_gates_equal_moshi_bit_for_bit_in_generation(
    make_lm: MakeLM, rule: str, projections: str, placement: str, dtype: torch.dtype
) -> None:
    vanilla = make_lm(dtype=dtype)
    expected, _ = generate(vanilla, 36)  # past two turns of the ring
    hybrid = with_memory(vanilla, rule=rule, projections=projections, placement=placement)
    got, updates = generate(hybrid, 36)
    assert torch.equal(got, expected)
    per_row = 36 if rule == "gated_delta" else 36 // 5
    assert {index: count.tolist() for index, count in updates.items()} == {
        1: [per_row, per_row],
        2: [per_row, per_row],
    }


def test_open_gates_change_generation(make_lm: MakeLM) -> None:
    vanilla = make_lm()
    expected, _ = generate(vanilla, 36)
    assert not torch.equal(generate(with_memory(vanilla, gate=0.5), 36)[0], expected)


def test_shut_gates_leave_moshis_gradients_alone(make_lm: MakeLM) -> None:
    vanilla = make_lm()
    hybrid = with_memory(vanilla)
    for lm in (vanilla, hybrid):
        logits(lm, codes(1, 20)).square().mean().backward()
    got = {name.replace(".base.", "."): p.grad for name, p in hybrid.named_parameters()}
    for name, parameter in vanilla.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_gates_forced_to_zero_is_vanilla_moshi_and_restores_exactly(make_lm: MakeLM) -> None:
    vanilla = make_lm()
    hybrid = with_memory(vanilla, gate=0.5)
    before = copy.deepcopy(hybrid.state_dict())
    with gates_forced_to_zero(hybrid):
        assert torch.equal(logits(hybrid, codes(1, 20)), logits(vanilla, codes(1, 20)))
    with pytest.raises(AssertionError), gates_forced_to_zero(hybrid):
        hybrid(codes(1, 20)[:, :3])  # not enough codebooks
    for name, value in hybrid.state_dict().items():
        assert torch.equal(value, before[name])


def test_add_memory_wraps_the_named_layers_in_fp32(make_lm: MakeLM) -> None:
    lm = make_lm(dtype=torch.bfloat16)
    base = lm.transformer.layers[1]
    assert add_memory(lm, MemoryConfig(layers=[1])) == [1]
    assert list(hybrid_layers(lm)) == [1]
    assert hybrid_layers(lm)[1].base is base
    dtypes = {parameter.dtype for parameter in hybrid_layers(lm)[1].branch.parameters()}
    assert dtypes == {torch.float32}
    assert lm.dtype == torch.bfloat16


def test_a_model_that_streams_or_has_streamed_is_refused(make_lm: MakeLM) -> None:
    lm = make_lm()
    with lm.streaming(1), pytest.raises(UserError, match="already streamed"):
        add_memory(lm, MemoryConfig())
    with pytest.raises(UserError, match="already streamed"):
        add_memory(lm, MemoryConfig())
    assert hybrid_layers(lm) == {}


def test_a_second_memory_is_refused(make_lm: MakeLM) -> None:
    lm = with_memory(make_lm())
    with pytest.raises(UserError, match=r"layers \[1, 2\] already have a memory"):
        add_memory(lm, MemoryConfig(layers=[0]))


def test_cross_attention_is_refused(make_lm: MakeLM) -> None:
    lm = make_lm(cross_attention=True)
    with pytest.raises(UserError, match=r"^layers=every:1 .*cross-attention"):
        add_memory(lm, MemoryConfig())
    assert hybrid_layers(lm) == {}
