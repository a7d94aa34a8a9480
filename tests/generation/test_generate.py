"""Generation against the training forward, and the recorder's promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lm_fakes import STEPS, STREAMS, MakeLM, hybrid, random_codes
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.generation.generate import borrowed, fitting_threads, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.instruments.attention_mass import no_looks
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.model.hybrid import hybrid_layers


def run(lm: LMModel, codes: Tensor, forced_steps: int, seed: int = 0) -> tuple[Tensor, Recorder]:
    with borrowed(lm, seed):
        recorder = Recorder(lm, STREAMS, STEPS)
        tokens = generate(lm, codes[:, :, :forced_steps], codes[:, 9:], observers=[recorder])
    return tokens, recorder


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("rule", ["vanilla", "ttt_linear", "ttt_mlp", "gated_delta"])
def test_forced_generation_predicts_what_the_training_forward_predicts(
    make_lm: MakeLM, rule: str
) -> None:
    lm = make_lm().eval() if rule == "vanilla" else hybrid(make_lm, rule=rule)
    codes = random_codes()
    _, recorder = run(lm, codes, forced_steps=STEPS)
    with torch.no_grad():
        output = lm(codes)
    recorded = recorder.arrays()
    # the first codebook has no delay, so every step of both streams lines up
    for name, logits in (
        ("text_entropy", output.text_logits[:, 0]),
        ("audio_entropy", output.logits[:, 0]),
    ):
        torch.testing.assert_close(
            torch.from_numpy(recorded[name]), entropy(logits), atol=1e-5, rtol=1e-5
        )


def test_prompt_is_returned_and_the_rest_is_generated(make_lm: MakeLM) -> None:
    codes = random_codes()
    tokens, _ = run(hybrid(make_lm), codes, forced_steps=12)
    assert tokens.shape == (STREAMS, 9, STEPS - 1)
    # a delayed codebook's last prompt frame is written one step after the prompt
    torch.testing.assert_close(tokens[:, :, :12], codes[:, :9, :12])
    assert (tokens[:, :, 12:] != codes[:, :9, 12:39]).any()
    assert ((tokens >= 0) & (tokens < 20)).all()


def test_missing_prompt_tokens_are_sampled(make_lm: MakeLM) -> None:
    codes = random_codes()
    codes[:, 0] = -1
    tokens, _ = run(hybrid(make_lm), codes, forced_steps=12)
    assert (tokens[:, 0] >= 0).all()
    torch.testing.assert_close(tokens[:, 1:, :12], codes[:, 1:9, :12])


def test_recorded_steps_equal_generated_steps_in_every_quantity(make_lm: MakeLM) -> None:
    _, recorder = run(hybrid(make_lm), random_codes(), forced_steps=12)
    arrays = recorder.arrays()
    assert recorder.recorded_steps == STEPS
    assert arrays["input_norm"].shape == (STREAMS, 3, STEPS)
    assert arrays["branch_ratio"].shape == (STREAMS, 2, STEPS)
    looks = [arrays.pop(name) for name in no_looks(STREAMS)]  # of looks, not of steps
    assert all(values.size == 0 for values in looks)
    heads = arrays.pop("head_forgetting")  # of the run, not of its steps
    assert heads.shape == (2, 2)
    assert (heads > 0).all()
    for name, values in arrays.items():
        assert values.shape[-1] == STEPS, name
        assert torch.isfinite(torch.from_numpy(values).double()).all(), name
    assert (arrays["ring_end_offset"] == torch.arange(1, STEPS + 1).numpy()).all()


def test_inner_updates_are_counted_as_the_rule_says(make_lm: MakeLM) -> None:
    steps = torch.arange(1, STEPS + 1)
    for rule, expected in (("ttt_linear", steps // 5), ("gated_delta", steps)):
        _, recorder = run(hybrid(make_lm, rule=rule), random_codes(), forced_steps=12)
        assert (recorder.arrays()["inner_updates"] == expected.numpy()).all()


def test_a_memory_that_does_not_adapt_is_an_error(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    for layer in hybrid_layers(lm).values():
        # as a state that is not carried from step to step would behave
        advance = layer.branch.rule._advance
        layer.branch.rule._advance = lambda chunk, state, advance=advance: (
            advance(chunk, state)[0],
            state,
        )
    with pytest.raises(RuntimeError, match="0 inner updates in 40 steps, expected 8"):
        run(lm, random_codes(), forced_steps=12)


def test_recorded_norms_are_those_of_the_layers(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    codes = random_codes()
    inputs: list[Tensor] = []
    layer = lm.transformer.layers[1]
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].norm(dim=-1)))
    with torch.no_grad():
        lm(codes)
    handle.remove()
    _, recorder = run(lm, codes, forced_steps=STEPS)
    recorded = torch.from_numpy(recorder.arrays()["input_norm"][:, 1])
    torch.testing.assert_close(recorded, inputs[0], atol=1e-5, rtol=1e-5)


def test_recording_does_not_change_what_is_generated(make_lm: MakeLM) -> None:
    lm, codes = hybrid(make_lm), random_codes()
    recorded, _ = run(lm, codes, forced_steps=12)
    with borrowed(lm, 0):
        plain = generate(lm, codes[:, :, :12], codes[:, 9:])
    assert torch.equal(recorded, plain)


def test_rings_are_named_by_module_path_with_their_capacity(make_lm: MakeLM) -> None:
    _, recorder = run(hybrid(make_lm), random_codes(), forced_steps=12)
    rings = {ring.module: ring for ring in recorder.rings}
    assert set(rings) == {
        "transformer.layers.0.base.self_attn",
        "transformer.layers.1.self_attn",
        "transformer.layers.2.base.self_attn",
        "depformer.layers.0.self_attn",
    }
    temporal = rings["transformer.layers.1.self_attn"]
    assert (temporal.capacity, temporal.end_offset) == (16, STEPS)
    assert (temporal.evicted_steps, temporal.wraps) == (STEPS - 16, 2)
    depformer = rings["depformer.layers.0.self_attn"]
    assert (depformer.capacity, depformer.end_offset, depformer.evicted_steps) == (8, 8, 0)


def test_hooks_leave_with_their_scope_even_after_an_error(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules()]

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    codes, recorder = random_codes(), Recorder(lm, STREAMS, STEPS)
    with pytest.raises(KeyboardInterrupt), borrowed(lm, 0):
        generate(lm, codes[:, :, :2], codes[:, 9:], observers=[recorder, EachStep(stop)])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules()] == before
    assert all(layer.branch.observer is None for layer in hybrid_layers(lm).values())
    assert not any(getattr(module, "is_streaming", False) for module in lm.modules())


def test_a_borrowed_model_comes_back_as_it_was(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm, rule="gated_delta").train()
    lm.transformer.layers[1].eval()
    lm.transformer.checkpointing = True
    modes = [module.training for module in lm.modules()]
    weights = {name: value.clone() for name, value in lm.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    codes = random_codes()
    with borrowed(lm, 5):
        generate(lm, codes[:, :, :4], codes[:, 9:])
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in lm.modules()] == modes
    assert lm.transformer.checkpointing
    assert not lm._streaming_detached
    assert all(torch.equal(value, weights[name]) for name, value in lm.state_dict().items())


def test_equal_seeds_generate_equally_and_others_do_not(make_lm: MakeLM) -> None:
    lm, codes = hybrid(make_lm), random_codes()
    first, _ = run(lm, codes, forced_steps=4, seed=0)
    again, _ = run(lm, codes, forced_steps=4, seed=0)
    other, _ = run(lm, codes, forced_steps=4, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Watcher(Observer):
    def __init__(self, name: str, calls: list[tuple[str, str, int]]) -> None:
        self.name, self.calls = name, calls

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.calls.append((self.name, "attached", -1))
        yield
        self.calls.append((self.name, "detached", -1))

    def after_step(self, step: int, /) -> None:
        self.calls.append((self.name, "step", step))

    def finish(self, steps: int, /) -> None:
        self.calls.append((self.name, "finish", steps))


def test_observers_are_called_in_their_order_at_every_step(make_lm: MakeLM) -> None:
    lm, codes = make_lm().eval(), random_codes(3)
    calls: list[tuple[str, str, int]] = []
    each = EachStep(lambda step: calls.append(("each", "step", step)))
    with borrowed(lm, 0):
        generate(
            lm, codes, codes[:, 9:], observers=[Watcher("a", calls), each, Watcher("b", calls)]
        )
    steps = [(name, "step", step) for step in range(3) for name in ("a", "each", "b")]
    assert calls == [
        ("a", "attached", -1),
        ("b", "attached", -1),
        *steps,
        ("a", "finish", 3),
        ("b", "finish", 3),
        ("b", "detached", -1),
        ("a", "detached", -1),
    ]


def test_a_recorder_is_an_observer_by_its_shape_alone(make_lm: MakeLM) -> None:
    recorder: Observer = Recorder(make_lm().eval(), STREAMS, STEPS)
    assert Observer not in type(recorder).__mro__
    assert all(
        hasattr(recorder, name) for name in ("attached", "after_step", "reading_again", "finish")
    )


def test_a_small_model_generates_on_one_core(make_lm: MakeLM) -> None:
    lm, codes = make_lm(), random_codes()
    threads, seen = torch.get_num_threads(), set[int]()
    watch = EachStep(lambda _: seen.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        with borrowed(lm, 0):
            generate(lm, codes[:, :, :2], codes[:, 9:], observers=[watch])
        assert seen == {1}
        assert torch.get_num_threads() == 2
        lm.dim = 4096
        with fitting_threads(lm):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
