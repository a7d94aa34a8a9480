"""The controls against plain Moshi, and what is kept in models that are saved and opened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_fakes import CHANNELS, HEADS
from lm_fakes import MakeLM
from moshi.models.lm import LMModel
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from moshi.utils.compile import no_cuda_graph
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, build_lm
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.kept import Kept, KeptRing
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.rings import attention_of, ring_of
from moshi_ttt.model.sinks import AttentionControls
from moshi_ttt.model.source import open_source
from moshi_ttt.model.weights import load_trained, save_trained, trainable_weights

ROWS = 3


def test_sinks_and_what_is_thinned_come_back_with_the_weights(tmp_path: Path) -> None:
    source = open_source("tiny")
    memory = MemoryConfig(layers=[1], heads=2)
    config = ModelConfig(
        source="tiny",
        dtype="float32",
        context_steps=9,
        train="memory",
        sinks=2,
        thinning=3,
        farthest_steps=8,
        memory=memory,
    )
    lm = build_lm(config, source)
    save_trained(tmp_path / "w.safetensors", trainable_weights(lm), config, 25, source)
    loaded, _, found, _ = load_trained(tmp_path / "w.safetensors")
    assert (found.sinks, found.thinning, found.farthest_steps) == (2, 3, 8)
    with loaded.streaming(1):
        ring = ring_of(attention_of(loaded.transformer.layers[0]))
        assert isinstance(ring, KeptRing)
        assert (ring.sinks, ring.thinning, ring.farthest_steps) == (2, 3, 8)
    with pytest.raises(UserError, match="sinks=9"):
        dataclasses.replace(config, sinks=9)
    with pytest.raises(UserError, match="thinning=8 must be at least 0 and at most 7; each"):
        dataclasses.replace(config, thinning=8)
    with pytest.raises(UserError, match="farthest_steps=0"):
        dataclasses.replace(config, farthest_steps=0)


def test_a_ring_without_sinks_is_upstreams_ring() -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = RingKVCache(
        ROWS, HEADS, CHANNELS, 5, device=torch.device("cpu"), dtype=torch.float32
    )
    ours = KeptRing(ROWS, HEADS, CHANNELS, Kept(5), device=torch.device("cpu"), dtype=torch.float32)
    for step in range(23):
        k, v = torch.randn(2, ROWS, HEADS, 1, CHANNELS, generator=generator)
        runs = torch.rand(ROWS, generator=generator) < 0.7
        if step == 12:
            for ring in (upstream, ours):
                ring.reset(torch.tensor([True, False, False]))
        expected = upstream.complete(k, v, runs)
        added, _ = ours.write(k, k, v, runs)
        assert torch.equal(expected.keys, ours.cache[0])
        assert torch.equal(expected.values, ours.cache[1])
        # what a paused row reads is thrown away, and upstream's says so only before it has turned
        assert torch.equal(expected.positions[runs] >= 0, added[runs, 0, 0] == 0)


def tokens_and_norms(lm: LMModel, steps: int = 40) -> tuple[Tensor, Any]:
    codes = torch.randint(0, 16, (2, 17, steps), generator=torch.Generator().manual_seed(1))
    with borrowed(lm, 0):
        recorder = Recorder(lm, 2, steps)
        tokens = generate(lm, codes[:, :, :12], codes[:, 9:], observers=[recorder])
    return tokens, recorder.arrays()["input_norm"]


@pytest.mark.parametrize("memory", [False, True])
def test_controls_at_their_defaults_change_nothing(make_lm: MakeLM, memory: bool) -> None:
    plain, controlled = make_lm().eval(), make_lm().eval()
    if memory:
        for lm in (plain, controlled):
            torch.manual_seed(3)
            add_memory(lm, MemoryConfig(layers=[0, 2], heads=2, mini_batch_steps=5))
    AttentionControls(controlled).set(context_steps=16)
    for expected, got in zip(tokens_and_norms(plain), tokens_and_norms(controlled), strict=True):
        assert torch.equal(torch.as_tensor(expected), torch.as_tensor(got))


def test_capacity_and_sinks_change_between_generations_of_one_model(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    controls = AttentionControls(lm)
    controls.set(context_steps=12)
    _, twelve = tokens_and_norms(lm)
    controls.set(context_steps=12, sinks=2, thinning=2, farthest_steps=11)
    _, kept = tokens_and_norms(lm)
    controls.set(context_steps=16)
    _, sixteen = tokens_and_norms(lm)
    # nothing is evicted before step 6, so it makes no difference there; afterwards it does
    torch.testing.assert_close(
        torch.from_numpy(kept[..., :6]), torch.from_numpy(twelve[..., :6]), atol=1e-4, rtol=1e-4
    )
    assert abs(kept[:, 1:, 13:] - twelve[:, 1:, 13:]).max() > 1e-2
    _, plain = tokens_and_norms(make_lm().eval())
    assert (sixteen == plain).all()
    assert lm.context == 16


def test_a_start_position_turns_queries_and_keys_alike(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    controls = AttentionControls(lm)
    x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    outputs, keys = [], []
    for start in (0, 1000):
        controls.set(context_steps=16, start_position=start)
        attention = controls.attentions[0]
        with torch.no_grad(), attention.streaming(2):
            for scale in range(1, 20):
                y = attention(scale * x, scale * x, scale * x)
            keys.append(attention.get_streaming_state()[""].kv_cache.cache[0].clone())
            outputs.append(y)
    assert (keys[0] - keys[1]).abs().max() > 0.01
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_controls_take_adapters_along(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    add_lora(lm, LoraConfig(rank=2, targets=("qkv",)))
    controls = AttentionControls(lm)
    controls.set(context_steps=16, sinks=1)
    assert len(controls.attentions) == 3
    _, norms = tokens_and_norms(lm)
    assert torch.isfinite(torch.from_numpy(norms)).all()


def test_the_depformer_keeps_its_own_rings(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    AttentionControls(lm).set(context_steps=9, sinks=3)
    for module in lm.depformer.modules():
        if isinstance(module, StreamingMultiheadAttention):
            assert type(module) is StreamingMultiheadAttention
            assert module.context != 9


def test_misuse_is_refused(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    controls = AttentionControls(lm)
    with pytest.raises(UserError, match="sinks=-1"):
        controls.set(context_steps=16, sinks=-1)
    with pytest.raises(UserError, match="thinning=15"):
        controls.set(context_steps=16, thinning=15)
    with pytest.raises(UserError, match="context_steps=1"):
        controls.set(context_steps=1)
    with lm.streaming(1), pytest.raises(UserError, match="streaming"):
        controls.set(context_steps=16)
    with pytest.raises(UserError, match="streamed already"):
        AttentionControls(lm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_kept_in_a_cuda_graph_is_what_is_kept_without(make_lm: MakeLM) -> None:
    lm = make_lm().cuda().eval()
    AttentionControls(lm).set(
        context_steps=9, sinks=3, thinning=2, farthest_steps=8, start_position=100
    )
    codes = torch.randint(0, 16, (2, 17, 40), generator=torch.Generator().manual_seed(1))

    def norms() -> Tensor:
        with borrowed(lm, 0):
            recorder = Recorder(lm, 2, 40)
            generate(lm, codes, codes[:, 9:], observers=[recorder])
        return torch.from_numpy(recorder.arrays()["input_norm"])

    graphed = norms()
    with no_cuda_graph():
        torch.testing.assert_close(graphed, norms(), atol=1e-4, rtol=1e-4)
