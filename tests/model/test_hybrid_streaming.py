"""Moshi with a memory, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from hybrid_fakes import MakeLM, codes, with_memory
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import MemoryBranch, hybrid_layers

every_rule = pytest.mark.parametrize("rule", RULES)
every_placement = pytest.mark.parametrize("placement", ["parallel", "post_attention"])


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
