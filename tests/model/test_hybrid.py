from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from moshi.models.lm import LMGen, LMModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.branch import BranchStats, MemoryBranch
from moshi_ttt.model.hybrid import add_memory, gates_forced_to_zero, hybrid_layers, observe_branches

MakeLM = Callable[..., LMModel]
every_rule = pytest.mark.parametrize("rule", RULES)
every_placement = pytest.mark.parametrize("placement", ["parallel", "post_attention"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def with_memory(lm: LMModel, *, gate: float | None = None, **settings: object) -> LMModel:
    """A copy of `lm` with a fast-learning memory in layers 1 and 2."""
    hybrid = copy.deepcopy(lm)
    defaults = {"layers": "last:2", "mini_batch_steps": 5, "write_gate": 0.2}
    defaults["forgetting_time_steps"] = (10.0, 100.0)
    torch.manual_seed(0)
    add_memory(hybrid, MemoryConfig(**defaults | settings))
    if gate is not None:
        open_gates(hybrid, gate)
    return hybrid


def open_gates(lm: LMModel, gate: float) -> None:
    with torch.no_grad():
        for layer in hybrid_layers(lm).values():
            layer.branch.gate.normal_(std=gate)


def codes(batch_size: int, steps: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randint(16, (batch_size, 16, steps), generator=generator)
    text = torch.randint(20, (batch_size, 1, steps), generator=generator)
    return torch.cat([text, audio], dim=1)


def logits(lm: LMModel, batch: Tensor) -> Tensor:
    output = lm(batch)
    return torch.cat([output.logits[output.mask].flatten(), output.text_logits.flatten()])


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


# gate 0 is Moshi


@every_rule
@every_placement
@both_dtypes
def test_shut_gates_equal_moshi_bit_for_bit_in_training_forward(
    make_lm: MakeLM, rule: str, placement: str, dtype: torch.dtype
) -> None:
    vanilla = make_lm(dtype=dtype)
    hybrid = with_memory(vanilla, rule=rule, placement=placement)
    expected, got = logits(vanilla, codes(2, 37)), logits(hybrid, codes(2, 37))
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert not torch.equal(logits(with_memory(vanilla, gate=0.5), codes(2, 37)), expected)


@every_rule
@every_placement
@both_dtypes
def test_shut_gates_equal_moshi_bit_for_bit_in_generation(
    make_lm: MakeLM, rule: str, placement: str, dtype: torch.dtype
) -> None:
    vanilla = make_lm(dtype=dtype)
    expected, _ = generate(vanilla, 36)  # past two turns of the ring
    got, updates = generate(with_memory(vanilla, rule=rule, placement=placement), 36)
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


# learning


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


# read-out and its measurement


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


# streaming


@every_rule
@every_placement
def test_streaming_the_model_equals_its_parallel_forward(
    make_lm: MakeLM, rule: str, placement: str
) -> None:
    lm = with_memory(make_lm(), rule=rule, placement=placement, gate=0.5).eval()
    batch = codes(2, 37)
    with torch.no_grad():
        expected, _ = lm.forward_text(batch)
        with lm.streaming(2):
            steps = [lm.forward_text(step)[0] for step in batch.split(1, dim=-1)]
            state = lm.get_streaming_state()
            # a wrapped layer keeps the same books as one that is not
            assert state["transformer.layers.0"].offset_cpu == 37
            assert state["transformer.layers.1.base"].offset_cpu == 37
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


@every_rule
def test_rows_of_a_streaming_model_pause_and_restart_on_their_own(
    make_lm: MakeLM, rule: str
) -> None:
    lm = with_memory(make_lm(), rule=rule, gate=0.5).eval()
    batch = codes(2, 30)
    runs = torch.ones(30, 2, dtype=torch.bool)
    runs[5:12, 0] = False
    runs[8:10, 1] = False
    outputs = []
    with torch.no_grad(), lm.streaming(2):
        for step in range(30):
            if step == 17:
                lm.reset_streaming(torch.tensor([False, True]))
            lm.set_exec_mask(runs[step])
            outputs.append(lm.forward_text(batch[:, :, step : step + 1])[0])
        counts = hybrid_layers(lm)[2].branch.updates().tolist()
        heard = [runs[:, 0], runs[:, 1] & (torch.arange(30) >= 17)]
        assert counts == [int(row.sum()) // (1 if rule == "gated_delta" else 5) for row in heard]
        streamed = torch.cat(outputs, 1)
    for row, mask in enumerate(heard):
        with torch.no_grad():
            expected, _ = lm.forward_text(batch[row : row + 1, :, mask])
        torch.testing.assert_close(streamed[row, mask], expected[0], rtol=1e-4, atol=1e-5)


@every_rule
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
def test_random_masks_and_resets_equal_a_parallel_run_of_what_each_row_heard(
    rule: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    config = MemoryConfig(rule=rule, heads=2, mini_batch_steps=5, write_gate=0.3)
    branch = MemoryBranch(8, config.fitted(8, 2)).to(dtype)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    parallel = copy.deepcopy(branch)
    longest = 0

    def check(pieces: list[Tensor], updates: int) -> int:
        """Compare one row since its reset with a parallel run; returns its steps."""
        if not pieces:
            return 0
        x, residual, streamed = torch.cat(pieces, 1).unsqueeze(1)
        expected = parallel(x, residual)
        torch.testing.assert_close(streamed, expected, rtol=tolerance, atol=tolerance)
        steps = x.shape[1]
        assert updates == (steps if rule == "gated_delta" else steps // 5)
        return steps

    rows = 3
    heard: list[list[Tensor]] = [[] for _ in range(rows)]  # inputs and outputs since reset
    with torch.no_grad(), branch.streaming(rows):
        for call in range(60):
            reset = torch.rand(rows) < (1 if call == 59 else 0.05)
            for row in reset.nonzero().flatten().tolist():
                longest = max(longest, check(heard[row], int(branch.updates()[row])))
                heard[row] = []
            branch.reset_streaming(reset)
            runs = torch.rand(rows) < 0.7
            branch.set_exec_mask(runs)
            x, residual = torch.randn(2, rows, int(torch.randint(1, 4, ())), 8, dtype=dtype)
            y = branch(x, residual)
            for row in runs.nonzero().flatten().tolist():
                heard[row].append(torch.stack([x[row], residual[row], y[row]]))
    assert longest > 20


@every_rule
def test_reset_returns_a_row_to_the_learned_initial_state(rule: str) -> None:
    torch.manual_seed(0)
    branch = MemoryBranch(8, MemoryConfig(rule=rule, mini_batch_steps=2, heads=2).fitted(8, 2))
    with torch.no_grad():
        learned = [p for name, p in branch.rule.named_parameters() if name.startswith("initial")]
        for parameter in learned:
            parameter += 1  # training moved it away from its initialisation
        start = branch.rule.init_state(2)
        with branch.streaming(2):
            branch(torch.randn(2, 7, 8), torch.randn(2, 7, 8))
            moved = {name: value.clone() for name, value in _memory(branch).items()}
            branch.reset_streaming(torch.tensor([True, False]))
            for name, value in _memory(branch).items():
                assert torch.equal(value[0], start[name][0])
                assert torch.equal(value[1], moved[name][1])
            assert not torch.equal(moved["updates"], start["updates"])


def _memory(branch: MemoryBranch) -> dict[str, Tensor]:
    return branch.get_streaming_state()[""].memory


def test_streaming_state_keeps_its_buffers(make_lm: MakeLM) -> None:
    # a captured CUDA graph replays on these addresses
    lm = with_memory(make_lm(), gate=0.5)
    branch = hybrid_layers(lm)[1].branch
    with lm.streaming(2):
        addresses = {name: value.data_ptr() for name, value in _memory(branch).items()}
        assert len(set(addresses.values())) == len(addresses)
        for step in codes(2, 12).split(1, dim=-1):
            lm.forward_text(step)
        lm.reset_streaming(torch.tensor([True, False]))
        assert {name: value.data_ptr() for name, value in _memory(branch).items()} == addresses
        assert not any(value.requires_grad for value in _memory(branch).values())


class NoHostReads(TorchFunctionMode):
    """Raises where code would wait for the device, which CUDA graphs forbid."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in {"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__index__"}
        assert func not in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


@every_rule
@every_placement
def test_a_streaming_step_never_reads_the_device(
    make_lm: MakeLM, rule: str, placement: str
) -> None:
    lm = with_memory(make_lm(), rule=rule, placement=placement)
    layer = hybrid_layers(lm)[2]
    with torch.no_grad(), lm.streaming(2), NoHostReads():
        for _ in range(6):
            layer(torch.zeros(2, 1, 32))
        if rule != "gated_delta":
            with pytest.raises(AssertionError):
                layer(torch.zeros(2, 2, 32))  # several steps ask for the phase


# wrapping


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
    with pytest.raises(UserError, match=r"model\.memory\.layers=last:1 .*cross-attention"):
        add_memory(lm, MemoryConfig())
    assert hybrid_layers(lm) == {}
