"""What only a GPU can show: the memory and the recorder inside moshi's CUDA graphs."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import no_cuda_graph

from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.attention_mass import AttentionWatch
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig, build_rule
from moshi_ttt.memory.gated_delta.chunked import chunked
from moshi_ttt.memory.gated_delta.kernel import by_kernel
from moshi_ttt.model.hybrid import add_memory, hybrid_layers
from train.fit import main as fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MakeLM = Callable[..., LMModel]
STREAMS, STEPS = 2, 40


@pytest.fixture(params=["ttt_linear", "ttt_mlp", "gated_delta"])
def lm(make_lm: MakeLM, request: pytest.FixtureRequest) -> LMModel:
    lm = make_lm().cuda()
    config = MemoryConfig(rule=request.param, layers=[0, 2], heads=2, mini_batch_steps=5)
    add_memory(lm, config)
    for layer in hybrid_layers(lm).values():
        torch.nn.init.normal_(layer.branch.gate, std=0.5)
    return lm.eval()


def record(lm: LMModel, codes: torch.Tensor) -> Recorder:
    with borrowed(lm, 0):
        recorder = Recorder(lm, STREAMS, STEPS, AttentionWatch([0, 1], every_n_steps=7))
        generate(lm, codes, codes[:, 9:], observers=[recorder])
    return recorder


def test_traces_in_a_cuda_graph_equal_eager_ones_and_are_complete(lm: LMModel) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (STREAMS, 17, STEPS), generator=generator)
    graphed = record(lm, codes).arrays()
    with no_cuda_graph():
        eager = record(lm, codes).arrays()
    for name, values in graphed.items():
        assert torch.isfinite(torch.from_numpy(values).double()).all(), name
        # times are never equal, and of two channels of one size either may be the largest
        if name in ("step_ms", "input_max_channel"):
            continue
        torch.testing.assert_close(
            torch.from_numpy(values), torch.from_numpy(eager[name]), atol=1e-4, rtol=1e-4
        )
    per_update = next(iter(hybrid_layers(lm).values())).branch.rule.steps_per_update
    expected = torch.arange(1, STEPS + 1) // per_update
    assert (graphed["inner_updates"] == expected.numpy()).all()
    assert (graphed["step_ms"] > 0).all()
    assert graphed["attention_mass"].shape == (STREAMS, 2, 6, 3)


def test_the_graph_predicts_what_the_training_forward_predicts(lm: LMModel) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (STREAMS, 17, STEPS), generator=generator)
    recorded = torch.from_numpy(record(lm, codes).arrays()["text_entropy"])
    with torch.no_grad():
        log_p = lm(codes.cuda()).text_logits[:, 0].log_softmax(-1)
    torch.testing.assert_close(recorded, -(log_p.exp() * log_p).sum(-1).cpu(), atol=1e-4, rtol=1e-4)


def test_gradients_on_the_gpu_are_those_of_the_cpu(make_lm: MakeLM, lm: LMModel) -> None:
    branch = next(iter(hybrid_layers(lm).values())).branch
    cpu = copy.deepcopy(branch).cpu()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STREAMS, STEPS + 3, 32, generator=generator)  # 43 steps end in mid mini-batch
    for one, inputs in ((branch, x.cuda()), (cpu, x)):
        one(inputs, residual=inputs).square().sum().backward()
    expected = dict(cpu.named_parameters())
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(
            parameter.grad.cpu(), expected[name].grad, atol=1e-3, rtol=1e-3, msg=name
        )


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.parametrize("steps", [2, 63, 64, 65, 130, 750])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_fused_gated_delta_rule_is_the_chunked_one(steps: int, head_dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(steps)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, *shape, device="cuda", generator=generator)

    unit = torch.nn.functional.normalize
    q, k = (unit(draw(steps, head_dim), dim=-1) for _ in range(2))
    v = draw(steps, head_dim)
    # from forgetting at once to forgetting in hours
    beta, log_alpha = draw(steps, 1).sigmoid(), -(2 * draw(steps, 1) - 3).clamp(max=0.0).exp()
    leaves = [x.requires_grad_() for x in (q, k, v, beta, log_alpha, draw(head_dim, head_dim))]
    weights = draw(steps, head_dim), draw(head_dim, head_dim)
    found = []
    for form in (by_kernel, chunked):
        outputs = form(tuple(leaves[:5]), leaves[5])
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
def test_mixed_precision_takes_the_kernel_and_single_precision_does_not() -> None:
    config = MemoryConfig(rule="gated_delta", heads=2).fitted(32, 2)
    rule = build_rule(config, 32).cuda()
    x = torch.randn(2, 70, 32, device="cuda")
    exact, _ = rule(x)
    with torch.autocast("cuda", torch.bfloat16):
        mixed, state = rule(x)
    assert not torch.equal(mixed, exact)
    assert (mixed - exact).norm() < 0.03 * exact.norm()
    assert state["updates"].tolist() == [70, 70]


@pytest.mark.parametrize(("usable", "chosen"), [(0.9, "off"), (1e-4, "on")])
def test_activation_checkpointing_is_for_batches_that_do_not_fit_without(
    usable: float,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("train.checkpointing.USABLE", usable)
    fit(
        [
            *("--config", "long15s.yaml", "--trainer.max_steps=2", f"--run_dir={tmp_path}"),
            *("--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.limit_val_batches=1"),
            "--long_generation.every_n_epochs=0",
        ]
    )
    assert f"activation checkpointing: {chosen}, a step" in capsys.readouterr().out
