"""What the recorder writes down, against what the training forward computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_fakes import CONTEXT, STEPS, STREAMS, MakeLM, hybrid, random_codes
from moshi.models.lm import LMGen, LMModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.errors import UserError
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep
from moshi_ttt.instruments.attention_mass import AttentionWatch
from moshi_ttt.instruments.memory_watch import FAST_WEIGHT_STRIDE
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig, run_reference
from moshi_ttt.model.hybrid import add_memory, hybrid_layers, observe_branches
from moshi_ttt.model.rings import attention_of
from moshi_ttt.model.sinks import AttentionControls


def forced(lm: LMModel, attention: AttentionWatch | None = None) -> Recorder:
    """A run whose every token is forced, so that the parallel forward sees the same."""
    codes = random_codes()
    with borrowed(lm, 0):
        recorder = Recorder(lm, STREAMS, STEPS, attention)
        generate(lm, codes, codes[:, 9:], observers=[recorder])
    return recorder


def seen_in_parallel(lm: LMModel, modules: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Output [B, T, D] of each module in the training forward."""
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        lm(random_codes())
    for handle in handles:
        handle.remove()
    return outputs


def close(recorded: Any, expected: Tensor) -> None:
    torch.testing.assert_close(
        torch.from_numpy(recorded).double(), expected.double(), atol=1e-5, rtol=1e-4
    )


def test_contributions_and_largest_channel_are_those_of_the_layers(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    layer = lm.transformer.layers[1]
    before = lm.transformer.layers[0]
    out = seen_in_parallel(
        lm, {"in": before, "attention": layer.self_attn, "ffn": layer.gating, "out": layer}
    )
    arrays = forced(lm).arrays()
    close(arrays["input_norm"][:, 1], out["in"].norm(dim=-1))
    close(arrays["attention_norm"][:, 1], out["attention"].norm(dim=-1))
    close(arrays["ffn_norm"][:, 1], out["ffn"].norm(dim=-1))
    largest, channel = out["in"].abs().max(dim=-1)
    close(arrays["input_max"][:, 1], largest)
    assert (arrays["input_max_channel"][:, 1] == channel.numpy()).all()
    total = out["in"] + out["attention"] + out["ffn"]
    torch.testing.assert_close(total, out["out"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("placement", ["parallel", "post_attention"])
def test_branch_norms_are_those_that_the_branch_itself_reports(
    make_lm: MakeLM, bounded: bool, placement: str
) -> None:
    lm = hybrid(make_lm, bounded_readout=bounded, placement=placement)
    with torch.no_grad(), observe_branches(lm) as observed:
        lm(random_codes())
    arrays = forced(lm).arrays()
    for row, index in enumerate(hybrid_layers(lm)):
        stats = observed[index][0]
        close(arrays["branch_norm"][:, row], stats.norm)
        close(arrays["branch_raw_norm"][:, row], stats.raw_norm)
        close(arrays["branch_ratio"][:, row], stats.ratio)
        close(arrays["gate"][:, row], stats.gate_rms.expand(STREAMS, STEPS))


@pytest.mark.parametrize("rule", ["ttt_linear", "ttt_mlp", "gated_delta"])
def test_gates_of_the_memory_are_those_of_its_rule(make_lm: MakeLM, rule: str) -> None:
    lm = hybrid(make_lm, rule=rule)
    layer = hybrid_layers(lm)[2].branch.rule
    torch.nn.init.normal_(layer.write.weight, std=0.5)
    if rule == "gated_delta":
        torch.nn.init.normal_(layer.forget.weight, std=0.5)
    normed = seen_in_parallel(lm, {"normed": lm.transformer.layers[2].base.norm1})["normed"]
    out = {"write": layer.write(normed)}
    if rule == "gated_delta":
        out["forget"] = layer.forget(normed)
    arrays = forced(lm).arrays()
    close(arrays["write_gate"][:, 1], out["write"].sigmoid().mean(dim=-1))
    log_rates = layer.log_rate + out.get("forget", torch.zeros(STREAMS, STEPS, 2))
    rates = log_rates.clamp(max=0.0).exp().detach()
    close(arrays["forgetting"][:, 1], rates.mean(dim=-1))
    close(arrays["head_forgetting"][1], rates.mean(dim=(0, 1)))


@pytest.mark.parametrize("rule", ["ttt_linear", "ttt_mlp", "gated_delta"])
def test_fast_weights_are_those_of_the_slow_rule_and_are_held_between_looks(
    make_lm: MakeLM, rule: str
) -> None:
    lm = hybrid(make_lm, rule=rule)
    memory = hybrid_layers(lm)[2].branch.rule
    if rule == "gated_delta":
        torch.nn.init.normal_(memory.initial)  # the others begin at random
    normed = seen_in_parallel(lm, {"normed": lm.transformer.layers[2].base.norm1})["normed"]
    names = set(dict(memory.initial.named_parameters())) if rule != "gated_delta" else {"memory"}

    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state[name].detach().flatten(1) for name in sorted(names)], dim=1)

    looked = range(0, STEPS, FAST_WEIGHT_STRIDE)
    start = memory.init_state(STREAMS)
    after = [flat(run_reference(memory, normed[:, : at + 1], start)[1]) for at in looked]
    arrays = forced(lm).arrays()
    held = torch.arange(STEPS) // FAST_WEIGHT_STRIDE
    norms = torch.stack([one.norm(dim=1) for one in after], dim=1)
    close(arrays["fast_weight_norm"][:, 1], norms[:, held])
    ways = torch.stack([(one - flat(start)).norm(dim=1) for one in after], dim=1)
    close(arrays["fast_weight_distance"][:, 1], ways[:, held])
    assert (ways[:, -1] > 1e-3 * norms[:, -1]).all()


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(make_lm: MakeLM, layers: int, recorded: bool) -> int:
    """Tensor operations of one step inside the graph, as an eager step counts them."""
    lm = make_lm(num_layers=layers)
    add_memory(lm, MemoryConfig(layers=f"last:{layers}", heads=2, rule="gated_delta"))
    lm.eval()
    codes = random_codes(6)
    with borrowed(lm, 0), LMGen(lm).streaming(STREAMS) as _, torch.no_grad():
        recorder = Recorder(lm, STREAMS, 6)
        count = _Count()

        def step() -> None:
            lm.forward_text(codes[:, :, :1])

        if recorded:
            with recorder.attached():
                step()
                with count:
                    step()
        else:
            step()
            with count:
                step()
    return count.operations


def test_recording_costs_the_same_few_operations_whatever_the_number_of_layers(
    make_lm: MakeLM,
) -> None:
    few, many = (
        operations(make_lm, layers, True) - operations(make_lm, layers, False) for layers in (2, 9)
    )
    assert few == many
    assert few < 60  # a third of them are views, which launch nothing


def test_reading_in_blocks_gives_what_reading_at_once_gives(make_lm: MakeLM) -> None:
    recorder = forced(hybrid(make_lm))
    whole = recorder.arrays()
    del whole["head_forgetting"]  # of the run, not of its steps
    blocks = [recorder.read(0, 7), recorder.read(7, STEPS)]
    for name, values in whole.items():
        if name.startswith("attention_mass"):  # of looks, not of steps
            assert values.size == 0, name
            continue
        both = [torch.from_numpy(block[name]) for block in blocks]
        assert torch.equal(torch.cat(both, dim=-1), torch.from_numpy(values)), name
    assert (recorder.read(5, 9)["text_input"] == random_codes()[:, 0, 4:8].numpy()).all()
    assert whole["step_ms"].shape == (STEPS,)
    assert (whole["step_ms"] > 0).all()


def test_a_model_generates_the_same_after_recording_stopped_with_an_error(
    make_lm: MakeLM,
) -> None:
    lm, codes = hybrid(make_lm), random_codes()

    def plain() -> Tensor:
        with borrowed(lm, 0):
            return generate(lm, codes[:, :, :4], codes[:, 9:])

    def stop(step: int) -> None:
        if step == 20:
            raise KeyboardInterrupt

    before, weights = plain(), {name: value.clone() for name, value in lm.state_dict().items()}
    recorder = Recorder(lm, STREAMS, STEPS, AttentionWatch([0, 1], 3))
    with pytest.raises(KeyboardInterrupt), borrowed(lm, 0):
        generate(lm, codes[:, :, :4], codes[:, 9:], observers=[recorder, EachStep(stop)])
    assert torch.equal(plain(), before)
    assert all(torch.equal(value, weights[name]) for name, value in lm.state_dict().items())


def reference_mass(lm: LMModel, layer: int, step: int, sinks: int) -> Tensor:
    """The same from all queries and keys of the parallel forward, in a window of 16 steps."""
    attention = attention_of(lm.transformer.layers[layer])
    out = seen_in_parallel(lm, {"projected": attention.in_projs[0]})["projected"]
    q, k = out[..., : lm.dim], out[..., lm.dim : lm.dim + lm.dim // attention.kv_repeat]
    q, k = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in (q, k))
    k = k.repeat_interleave(attention.kv_repeat, dim=1)
    q, k = attention.rope(q, k, torch.zeros(STREAMS), time_before_heads=False)
    first = max(0, step + 1 - CONTEXT)
    scores = q[:, :, step, None] @ k[:, :, first : step + 1].mT * q.shape[-1] ** -0.5
    weights = scores.softmax(-1).mean(dim=1)[:, 0]  # [B, held]
    positions = torch.arange(first, step + 1)
    oldest = positions < first + -(-len(positions) // 4)
    parts = [positions == 0, positions < sinks, oldest]
    return torch.stack([weights[:, part].sum(dim=-1) for part in parts], dim=-1)


@pytest.mark.parametrize("kv_repeat", [1, 2])
def test_attention_mass_is_that_of_the_full_attention_matrix(
    make_lm: MakeLM, kv_repeat: int
) -> None:
    lm = make_lm(kv_repeat=kv_repeat).eval()
    arrays = forced(lm, AttentionWatch([0, 1], every_n_steps=7, sinks=3)).arrays()
    assert arrays["attention_mass_steps"].tolist() == [0, 7, 14, 21, 28, 35]
    assert arrays["attention_mass_layers"].tolist() == [0, 1]
    for look, step in enumerate(arrays["attention_mass_steps"].tolist()):
        for row, layer in enumerate([0, 1]):
            expected = reference_mass(lm, layer, step, sinks=3)
            close(arrays["attention_mass"][:, row, look], expected)
    # position 0 left the ring at step 16
    assert (arrays["attention_mass"][:, :, 3:, 0] == 0).all()
    assert (arrays["attention_mass"][:, :, 3:, 2] > 0).all()


def test_sinks_are_seen_to_be_kept_and_attended_to(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    AttentionControls(lm).set(context_steps=CONTEXT, sinks=2)
    recorder = forced(lm, AttentionWatch([0, 1], every_n_steps=7, sinks=2))
    mass = recorder.arrays()["attention_mass"]
    assert (mass[..., 0] > 0).all()
    assert (mass[..., 1] > mass[..., 0])[:, :, 1:].all()
    (ring, *_) = recorder.rings
    assert (ring.sinks, ring.evicted_steps) == (2, STEPS - CONTEXT - 2)
    assert ring.size_bytes == 2 * STREAMS * 2 * (CONTEXT + 2) * 16 * 4


def test_a_watch_of_layers_that_do_not_exist_says_so(make_lm: MakeLM) -> None:
    with pytest.raises(UserError, match=r"attention_layers=\[3\] names a layer outside 0..2"):
        Recorder(make_lm().eval(), STREAMS, STEPS, AttentionWatch([3]))
    with pytest.raises(UserError, match="every_n_steps=0"):
        AttentionWatch([0], every_n_steps=0)


def test_rings_say_whose_they_are_and_how_large(make_lm: MakeLM) -> None:
    rings = {ring.module: ring for ring in forced(hybrid(make_lm)).rings}
    temporal = rings["transformer.layers.0.base.self_attn"]
    assert (temporal.role, temporal.heads, temporal.head_dim) == ("temporal", 2, 16)
    assert temporal.size_bytes == 2 * STREAMS * 2 * CONTEXT * 16 * 4
    assert rings["depformer.layers.0.self_attn"].role == "depformer"
