"""Chunked generation against the training forward of each chunk, and what its recording says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lm_fakes import STEPS, STREAMS, MakeLM, hybrid, random_codes
from moshi.models.lm import LMModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.errors import SettingError
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.generation.chunks import Chunks
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryState
from moshi_ttt.model.hybrid import memory_carried
from moshi_ttt.model.sinks import AttentionControls

N, M = 13, 6
BOTH = torch.ones(STREAMS, dtype=torch.bool)


def run(
    lm: LMModel, forced_steps: int, chunks: Chunks | None, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    codes = random_codes()
    with borrowed(lm, 0):
        recorder = Recorder(lm, STREAMS, STEPS)
        tokens = generate(
            lm,
            codes[:, :, :forced_steps],
            codes[:, 9:],
            chunks=chunks,
            observers=[recorder],
            **options,
        )
    return tokens, recorder.arrays()


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def read_in_chunks(lm: LMModel, codes: Tensor, keep_memory: bool) -> Tensor:
    """Entropy of the text at every step, each chunk read as a clip of its own, [S, T]."""
    found, memories = [], dict[int, MemoryState]()
    for seam in range(0, STEPS, N):
        first, stop = max(0, seam - M), min(seam + N, STEPS)
        clip = codes[..., first:stop]
        with memory_carried(lm, memories, BOTH):
            found.append(entropy(lm(clip).text_logits[:, 0])[:, seam - first :])
        if keep_memory:  # as it was before the steps that the next chunk reads again
            with memory_carried(lm, memories, BOTH) as swaps:
                lm(clip[..., : N - M + seam - first])
            memories = {index: one.last for index, one in swaps.items() if one.last is not None}
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("rule", ["vanilla", "ttt_linear", "ttt_mlp", "gated_delta"])
@pytest.mark.parametrize("keep_memory", [True, False])
@torch.no_grad()
def test_each_chunk_is_read_as_a_clip_with_the_memory_of_what_was_before(
    make_lm: MakeLM, rule: str, keep_memory: bool
) -> None:
    lm = make_lm().eval() if rule == "vanilla" else hybrid(make_lm, rule=rule)
    tokens, recorded = run(lm, STEPS, Chunks(N, M, keep_memory))
    assert torch.equal(tokens, random_codes()[:, :9, : STEPS - 1])
    got = torch.from_numpy(recorded["text_entropy"])
    torch.testing.assert_close(
        got, read_in_chunks(lm, random_codes(), keep_memory), atol=1e-4, rtol=1e-4
    )
    _, whole = run(lm, STEPS, None)
    changed = np.abs(recorded["text_entropy"] - whole["text_entropy"]).max(axis=0) > 1e-4
    assert not changed[:N].any()
    assert changed[N:].any()
    if rule != "vanilla":
        other = read_in_chunks(lm, random_codes(), not keep_memory)
        assert not torch.allclose(got[:, N:], other[:, N:], atol=1e-3)


@pytest.mark.parametrize("kept", [{}, {"sinks": 2, "thinning": 1, "farthest_steps": 7}])
def test_what_was_said_stays_and_is_recorded_once(make_lm: MakeLM, kept: dict[str, int]) -> None:
    lm = hybrid(make_lm)
    AttentionControls(lm).set(context_steps=8, **kept)
    plain, _ = run(lm, 4, None)
    for keep_memory in (True, False):
        tokens, recorded = run(lm, 4, Chunks(N, M, keep_memory))
        assert tokens.shape == plain.shape
        assert torch.equal(tokens[..., : N - 1], plain[..., : N - 1])
        assert ((tokens >= 0) & (tokens < 20)).all()
        assert (tokens[..., N:] != plain[..., N:]).any()
        steps = np.arange(1, STEPS + 1)
        for seam in Chunks(N, M).seams(STEPS):
            steps[seam:] = M + np.arange(1, STEPS - seam + 1)
        assert (recorded["ring_end_offset"] == steps).all()
        learned = np.arange(1, STEPS + 1) if keep_memory else steps
        assert (recorded["inner_updates"] == learned // 5).all()


def test_seams_are_far_enough_apart() -> None:
    clock = Clock()
    assert LongRunConfig().chunks(clock) is None
    config = LongRunConfig(chunk_sec=30, reprompt_sec=4, keep_memory=False)
    assert config.chunks(clock) == Chunks(375, 50, False)
    assert config.said == ", chunks of 30 s, memory not kept"
    assert LongRunConfig().said == ""
    assert list(Chunks(375, 50).seams(800)) == [375, 750]
    close = dataclasses.replace(config, chunk_sec=4.01)
    assert close.chunks(clock) == Chunks(51, 50, False)
    with pytest.raises(SettingError, match="chunk_sec=4 must be above 4; a chunk adds something"):
        dataclasses.replace(config, chunk_sec=4)
    with pytest.raises(SettingError, match="reprompt_sec=0 must be above 0"):
        dataclasses.replace(config, reprompt_sec=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep_memory", [True, False])
def test_chunks_in_a_cuda_graph_equal_eager_ones(make_lm: MakeLM, keep_memory: bool) -> None:
    lm = hybrid(make_lm, rule="gated_delta").cuda()
    AttentionControls(lm).set(context_steps=9, sinks=3, thinning=2, farthest_steps=8)
    _, graphed = run(lm, STEPS, Chunks(N, M, keep_memory))
    with no_cuda_graph():
        _, eager = run(lm, STEPS, Chunks(N, M, keep_memory))
    for name in ("input_norm", "text_entropy", "branch_ratio"):
        np.testing.assert_allclose(graphed[name], eager[name], atol=1e-4, rtol=1e-3)
