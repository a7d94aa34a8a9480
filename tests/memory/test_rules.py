from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moshi_ttt.memory import MemoryConfig, MemoryRule, MemoryState, build_rule, run_reference
from moshi_ttt.memory.config import RULES

DIM = 8
MINI_BATCH = 5
STEPS = 37  # not a multiple of the mini-batch
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

every_rule = pytest.mark.parametrize("name", RULES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def make_rule(name: str, dtype: torch.dtype = torch.float64, **overrides: object) -> MemoryRule:
    """A rule with no parameter at a special value: gates, decays and biases all depend on data."""
    torch.manual_seed(0)
    settings = {"projections": "own", "heads": 2, "mini_batch_steps": MINI_BATCH}
    settings |= {"write_gate": 0.3}
    settings |= {"forgetting_time_steps": (10.0, 100.0)} | overrides
    rule = build_rule(MemoryConfig(rule=name, **settings).fitted(DIM, 2), DIM).to(dtype)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return rule


def make_input(batch_size: int = 2, steps: int = STEPS, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, steps, DIM, generator=generator, dtype=dtype)


def assert_same(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_same_state(got: MemoryState, want: MemoryState, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_same(got[name], want[name], tolerance)


def state_after(rule: MemoryRule, steps: int) -> MemoryState:
    """A state in mid-flight, as leaves that can take gradients."""
    _, state = rule(make_input(steps=steps + 3)[:, 3:])
    return {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in state.items()
    }


@every_rule
def test_output_and_state_match_the_reference(name: str) -> None:
    rule = make_rule(name)
    x = make_input()
    y, state = rule(x)
    expected, expected_state = run_reference(rule, x, rule.init_state(2))
    assert y.shape == (2, STEPS, rule.width)
    assert_same(y, expected, 1e-10)
    assert_same_state(state, expected_state, 1e-10)


def assert_same_as_the_reference(rule: MemoryRule, steps: int) -> None:
    """Outputs, state and gradients of everything, from a state in mid-flight, in fp64."""
    x = make_input(steps=steps).requires_grad_()
    state = state_after(rule, 7)
    initial = [tensor for tensor in state.values() if tensor.requires_grad]
    wanted = [x, *rule.parameters(), *initial]
    weights = torch.randn(2, steps, rule.width, dtype=torch.float64)

    def gradients(y: Tensor, after: MemoryState) -> list[Tensor]:
        floating = [tensor for tensor in after.values() if tensor.is_floating_point()]
        objective = (y * weights).sum() + sum(tensor.square().sum() for tensor in floating)
        return torch.autograd.grad(objective, wanted, materialize_grads=True)

    (y, after), (expected, expected_after) = rule(x, state), run_reference(rule, x, state)
    assert_same(y, expected, 1e-10)
    assert_same_state(after, expected_after, 1e-10)
    pairs = zip(gradients(y, after), gradients(expected, expected_after), strict=True)
    for got, want in pairs:
        assert_same(got, want, 1e-9)


@every_rule
def test_gradients_match_the_reference(name: str) -> None:
    assert_same_as_the_reference(make_rule(name), 13)


def fast_forgetting(dtype: torch.dtype) -> MemoryRule:
    """A `gated_delta` that forgets from nothing to far beyond the clamp, where exp overflows."""
    rule = make_rule("gated_delta", dtype, forgetting_time_steps=(1.0, 1e4))
    with torch.no_grad():
        rule.forget.weight.mul_(200)
    return rule


@pytest.mark.parametrize("fast", [False, True], ids=["usual", "up to the clamp"])
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 129, 150])
def test_chunks_of_any_length_match_the_reference_with_their_gradients(
    steps: int, fast: bool
) -> None:
    rule = fast_forgetting(torch.float64) if fast else make_rule("gated_delta")
    assert_same_as_the_reference(rule, steps)


@every_rule
def test_every_parameter_gets_a_gradient(name: str) -> None:
    rule = make_rule(name)
    rule(make_input())[0].square().sum().backward()
    for key, parameter in rule.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_rule
def test_no_output_sees_a_later_input(name: str) -> None:
    rule = make_rule(name)
    x = make_input(batch_size=1)
    before = rule(x)[0]
    for step in range(STEPS):
        changed = x.clone()
        changed[:, step] += 1
        after = rule(changed)[0]
        assert torch.equal(after[:, :step], before[:, :step])
        assert not torch.allclose(after[:, step], before[:, step])


@every_rule
def test_jacobian_is_lower_triangular_and_reaches_back(name: str) -> None:
    rule = make_rule(name)
    x = make_input(batch_size=1, steps=13)
    jacobian = torch.autograd.functional.jacobian(lambda x: rule(x)[0].sum(-1), x)
    influence = jacobian[0, :, 0].abs().amax(-1)  # [output step, input step]
    assert influence.triu(1).max() == 0
    assert influence.tril().add(torch.ones(13, 13).triu(1)).min() > 0


@every_rule
@both_dtypes
def test_streaming_equals_parallel_for_every_split_point(name: str, dtype: torch.dtype) -> None:
    rule = make_rule(name, dtype)
    x = make_input(dtype=dtype)
    expected, expected_state = rule(x)
    for split in range(1, STEPS):
        first, state = rule(x[:, :split])
        second, state = rule(x[:, split:], state)
        assert_same(torch.cat([first, second], 1), expected, TOLERANCE[dtype])
        assert_same_state(state, expected_state, TOLERANCE[dtype])


@every_rule
@both_dtypes
def test_streaming_step_by_step_equals_parallel(name: str, dtype: torch.dtype) -> None:
    rule = make_rule(name, dtype)
    x = make_input(dtype=dtype)
    expected, expected_state = rule(x)
    outputs, state = [], rule.init_state(2)
    for step in x.split(1, dim=1):
        y, state = rule(step, state)
        outputs.append(y)
    assert_same(torch.cat(outputs, 1), expected, TOLERANCE[dtype])
    assert_same_state(state, expected_state, TOLERANCE[dtype])


@every_rule
def test_rows_at_different_phases_advance_together(name: str) -> None:
    rule = make_rule(name)
    x = make_input(batch_size=1)
    late, late_state = rule(x[:, 3:])
    _, early = rule(x[:, :3])
    state = {key: torch.cat([early[key], value]) for key, value in rule.init_state(1).items()}
    y, after = rule(x[:, 3:].expand(2, -1, -1), state)
    assert_same(y[:1], rule(x)[0][:, 3:], 1e-10)
    assert_same(y[1:], late, 1e-10)
    assert_same_state({key: value[1:] for key, value in after.items()}, late_state, 1e-10)


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
def test_updates_count_completed_mini_batches(name: str) -> None:
    rule = make_rule(name)
    for steps, updates in ((4, 0), (5, 1), (14, 2), (37, 7)):
        _, state = rule(make_input(steps=steps))
        assert state["updates"].tolist() == [updates, updates]
        assert state["phase"].tolist() == [steps % 5] * 2


def test_gated_delta_updates_every_step() -> None:
    _, state = make_rule("gated_delta")(make_input(steps=37))
    assert state["updates"].tolist() == [37, 37]


@every_rule
def test_forward_leaves_its_state_untouched(name: str) -> None:
    rule = make_rule(name)
    state = state_after(rule, 7)
    before = {key: tensor.detach().clone() for key, tensor in state.items()}
    rule(make_input(), state)
    assert_same_state({key: tensor.detach() for key, tensor in state.items()}, before, 0)


@every_rule
def test_state_and_inner_maths_stay_fp32_under_autocast_and_in_bf16_modules(name: str) -> None:
    low = make_rule(name, torch.bfloat16)
    mixed = make_rule(name, torch.bfloat16).float()  # the same values
    x = make_input().bfloat16()
    y, state = low(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_y, mixed_state = mixed(x)
    assert {tensor.dtype for tensor in (y, *state.values())} == {torch.float32, torch.int64}
    # both round the projections to bf16 and nothing after them
    assert_same(mixed_y, y, 1e-5)
    assert_same_state(mixed_state, state, 1e-5)
    unrounded, _ = mixed(x)
    assert not torch.allclose(unrounded, y, atol=1e-4)
    assert_same(unrounded, y, 0.2)


@every_rule
def test_a_small_write_is_not_rounded_away(name: str) -> None:
    # a whole second of writes at a gate of 1e-6 would vanish in bf16
    rule = make_rule(name, torch.bfloat16, mini_batch_steps=1)
    with torch.no_grad():
        rule.write.weight.zero_()
        rule.write.bias.fill_(-14)
    _, state = rule(make_input(batch_size=1, steps=12).bfloat16())
    with torch.no_grad():
        rule.write.bias.fill_(-40)
    _, unwritten = rule(make_input(batch_size=1, steps=12).bfloat16())
    fast = "memory" if name == "gated_delta" else "weight1" if name == "ttt_mlp" else "weight"
    assert (state[fast] - unwritten[fast]).norm() > 1e-7


@every_rule
def test_memory_recalls_which_value_belongs_to_a_key(name: str) -> None:
    rule = make_rule(name, torch.float32, head_dim=16, forgetting_time_steps=(2e4, 2e4))
    with torch.no_grad():
        q, k, _ = rule.qkv.weight.chunk(3)
        q.copy_(k)  # ask for what was written
        shown = make_input(1, 4, torch.float32)
        values = rule.qkv(shown)[0, :, 2 * rule.width :]
        y, _ = rule(shown.repeat(1, 100, 1))
    likeness = torch.cosine_similarity(y[0, -4:, None], values[None], dim=-1)
    assert likeness.argmax(-1).tolist() == [0, 1, 2, 3]
    assert likeness.diag().min() > 0.9


@every_rule
@pytest.mark.parametrize("repeated", [False, True], ids=["random", "identical keys"])
def test_state_stays_bounded_over_half_an_hour(name: str, repeated: bool) -> None:
    # 22 500 steps = 30 min; a strong write gate, and the worst input: one key, many values
    rule = make_rule(name, torch.float32, write_gate=0.5, mini_batch_steps=16)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 22_500, DIM, generator=generator)
    if repeated:
        with torch.no_grad():
            for part in rule.qkv.weight.chunk(3)[:2]:
                part[:, 4:] = 0
        x[:, :, :4] = x[:, :1, :4]
    norms, state = [], None
    with torch.no_grad():
        for piece in x.split(7_500, dim=1):
            y, state = rule(piece, state)
            assert y.isfinite().all()
            fast = [tensor for tensor in state.values() if tensor.dim() == 4]
            norms.append(torch.cat([tensor.flatten() for tensor in fast]).norm())
    assert norms[2] < 1.5 * max(norms[0], norms[1])
    assert norms[2] < 25  # 26 to 130 for the ttt rules if they never forget


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_chunks_are_as_exact_as_steps_up_to_the_fastest_forgetting(
    dtype: torch.dtype, tolerance: float
) -> None:
    rule = fast_forgetting(dtype)
    x = make_input(steps=150, dtype=dtype)
    whole, state = rule(x)
    pieces, after = [], None
    for step in range(150):
        y, after = rule(x[:, step : step + 1], after)
        pieces.append(y)
    rates = (-rule._project(x, None)[-1]).log()
    assert rates.max() == 0.0
    assert rates.min() < -10
    assert_same(whole, torch.cat(pieces, dim=1), tolerance)
    assert_same_state(state, after, tolerance)
    whole.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in rule.parameters())
