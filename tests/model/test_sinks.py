"""The ring with sinks against a slow fp64 attention, and the controls against plain Moshi."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.rings import attention_of, ring_of
from moshi_ttt.model.sinks import AttentionControls, SinkRing
from moshi_ttt.model.source import open_source
from moshi_ttt.model.weights import load_trained, save_trained, trainable_weights

MakeLM = Callable[..., LMModel]
ROWS, HEADS, CHANNELS = 3, 2, 8


def reference(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    """Attention of one row in fp64: the last query of q over the window and the sinks.

    q [H, D]; k and v [H, t, D] of all positions 0..t-1, unrotated; returns [H, D].
    """
    steps, half = k.shape[1], k.shape[2] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        turn = torch.polar(
            torch.ones(len(positions), half, dtype=torch.float64), positions[:, None] * frequencies
        )
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    seen = [p for p in range(steps) if p < sinks or p > steps - 1 - window]
    keys = rotated(k, torch.arange(steps, dtype=torch.float64))[:, seen]
    query = rotated(q[:, None], torch.tensor([steps - 1.0], dtype=torch.float64))
    weights = (query @ keys.mT / k.shape[2] ** 0.5).softmax(-1)
    return (weights @ v[:, seen].double())[:, 0]


def controlled_attention(make_lm: MakeLM, window: int, sinks: int, start: int = 0) -> Any:
    lm = make_lm(dim=HEADS * CHANNELS, num_heads=HEADS, num_layers=1).eval()
    controls = AttentionControls(lm)
    controls.set(context_steps=window, sinks=sinks, start_position=start)
    return controls.attentions[0].double()


@pytest.mark.parametrize("window", [3, 5, 12, 19])
@pytest.mark.parametrize("sinks", [1, 2, 3])
def test_a_whole_clip_sees_what_a_stream_sees(make_lm: MakeLM, window: int, sinks: int) -> None:
    attention = controlled_attention(make_lm, window, sinks)
    x = torch.randn(2, 20, HEADS * CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x, x, x)
        with attention.streaming(2):
            steps = [attention(step, step, step) for step in x.split(1, dim=1)]
        torch.testing.assert_close(whole, torch.cat(steps, dim=1))
        attention.sinks = 0
        assert not torch.allclose(attention(x, x, x), whole)


def test_sinks_of_a_model_come_back_with_its_weights(tmp_path: Path) -> None:
    source = open_source("tiny")
    memory = MemoryConfig(layers=[1], heads=2)
    config = ModelConfig(
        source="tiny", dtype="float32", context_steps=9, train="memory", sinks=2, memory=memory
    )
    lm = build_lm(config, source)
    save_trained(tmp_path / "w.safetensors", trainable_weights(lm), config, 25, source)
    loaded, _, found, _ = load_trained(tmp_path / "w.safetensors")
    assert found.sinks == 2
    with loaded.streaming(1):
        assert isinstance(ring_of(attention_of(loaded.transformer.layers[0])), SinkRing)
    with pytest.raises(UserError, match="sinks=9"):
        dataclasses.replace(config, sinks=9)


@pytest.mark.parametrize(("window", "sinks"), [(5, 1), (5, 3), (7, 7), (4, 6)])
def test_streaming_attends_to_window_and_sinks_through_wraps_resets_and_pauses(
    make_lm: MakeLM, window: int, sinks: int
) -> None:
    attention = controlled_attention(make_lm, window, sinks)
    generator = torch.Generator().manual_seed(window)
    history: list[list[Tensor]] = [[] for _ in range(ROWS)]
    checked = 0
    with torch.no_grad(), attention.streaming(ROWS):
        for step in range(6 * window):
            if step == 3 * window + 1:
                reset = torch.tensor([False, True, False])
                attention.reset_streaming(reset)
                history[1] = []
            x = torch.randn(ROWS, 1, HEADS * CHANNELS, generator=generator).double()
            runs = torch.rand(ROWS, generator=generator) < 0.7
            attention.set_exec_mask(runs)
            y = attention(x, x, x)
            for row in range(ROWS):
                if not runs[row]:
                    continue
                history[row].append(x[row, 0])
                q, k, v = (
                    attention.in_projs[0](torch.stack(history[row]))
                    .view(-1, 3, HEADS, CHANNELS)
                    .permute(1, 2, 0, 3)
                )
                expected = reference(q[:, -1], k, v, window, sinks).flatten()
                expected = attention.out_projs[0](expected)
                torch.testing.assert_close(y[row, 0], expected, atol=1e-6, rtol=1e-6)
                checked += 1
    assert max(len(one) for one in history) > 3 * window  # the ring has turned
    assert checked > 40


@pytest.mark.parametrize("chunks", [(3, 2, 4, 4, 1, 5, 5), (5, 5, 5, 5)])
def test_several_steps_at_once_write_what_one_at_a_time_writes(chunks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = sum(chunks)
    k, v = torch.randn(2, ROWS, HEADS, steps, CHANNELS, generator=generator)
    runs = torch.ones(ROWS, dtype=torch.bool)

    def ring() -> SinkRing:
        return SinkRing(
            ROWS, HEADS, CHANNELS, 5, 2, device=torch.device("cpu"), dtype=torch.float32
        )

    one, many = ring(), ring()
    for t in range(steps):
        last = one.complete(k[:, :, t, None], v[:, :, t, None], runs)
    at = 0
    for size in chunks:
        chunk = many.complete(k[:, :, at : at + size], v[:, :, at : at + size], runs)
        at += size
    assert torch.equal(last.positions, chunk.positions)
    assert torch.equal(last.keys, chunk.keys)
    assert torch.equal(last.values, chunk.values)


def test_a_ring_without_sinks_is_upstreams_ring() -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = RingKVCache(
        ROWS, HEADS, CHANNELS, 5, device=torch.device("cpu"), dtype=torch.float32
    )
    ours = SinkRing(ROWS, HEADS, CHANNELS, 5, 0, device=torch.device("cpu"), dtype=torch.float32)
    for step in range(23):
        k, v = torch.randn(2, ROWS, HEADS, 1, CHANNELS, generator=generator)
        runs = torch.rand(ROWS, generator=generator) < 0.7
        if step == 12:
            for ring in (upstream, ours):
                ring.reset(torch.tensor([True, False, False]))
        expected, got = upstream.complete(k, v, runs), ours.complete(k, v, runs)
        assert torch.equal(expected.keys, got.keys)
        assert torch.equal(expected.values, got.values)
        # what a paused row reads is thrown away, and upstream's says so only before it has turned
        assert torch.equal(expected.positions[runs], got.positions[runs])


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
    controls.set(context_steps=12, sinks=2)
    _, kept = tokens_and_norms(lm)
    controls.set(context_steps=16)
    _, sixteen = tokens_and_norms(lm)
    # nothing is evicted before step 12, so sinks make no difference there; afterwards they do
    torch.testing.assert_close(
        torch.from_numpy(kept[..., :12]), torch.from_numpy(twelve[..., :12]), atol=1e-4, rtol=1e-4
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
    with pytest.raises(UserError, match="context_steps=1"):
        controls.set(context_steps=1)
    with lm.streaming(1), pytest.raises(UserError, match="streaming"):
        controls.set(context_steps=16)
    with pytest.raises(UserError, match="streamed already"):
        AttentionControls(lm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sinks_in_a_cuda_graph_equal_eager_ones(make_lm: MakeLM) -> None:
    lm = make_lm().cuda().eval()
    AttentionControls(lm).set(context_steps=9, sinks=3, start_position=100)
    codes = torch.randint(0, 16, (2, 17, 40), generator=torch.Generator().manual_seed(1))

    def norms() -> Tensor:
        with borrowed(lm, 0):
            recorder = Recorder(lm, 2, 40)
            generate(lm, codes, codes[:, 9:], observers=[recorder])
        return torch.from_numpy(recorder.arrays()["input_norm"])

    graphed = norms()
    with no_cuda_graph():
        torch.testing.assert_close(graphed, norms(), atol=1e-4, rtol=1e-4)
