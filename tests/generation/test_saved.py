"""Streams that are saved, taken up, paused and reset through `LMGen`, against undisturbed ones."""

from __future__ import annotations

import copy
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hybrid_fakes import MakeLM, codes, with_memory
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.generation.saved import SavedStream, load_stream, save_stream
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.sinks import AttentionControls

every_rule = pytest.mark.parametrize("rule", RULES)
STREAMS, STEPS, CONTEXT = 2, 40, 16  # mini-batches are of 5 steps
# text, two codebooks of its own, three of the user's: few, because the depformer takes the time
CODEBOOKS: dict[str, Any] = {"n_q": 5, "dep_q": 2, "delays": [0, 0, 1, 0, 1, 2]}


def fresh(make_lm: MakeLM, rule: str, sinks: int = 0) -> LMModel:
    """The same weights, in a model that was never used."""
    lm = with_memory(make_lm(**CODEBOOKS), rule=rule, gate=0.5).eval()
    if sinks:
        AttentionControls(lm).set(context_steps=CONTEXT - sinks, sinks=sinks)
    return lm


def user(streams: int, steps: int) -> Tensor:
    return codes(streams, steps)[:, 3:6]


def go_on(lm_gen: LMGen, heard: Tensor) -> list[Tensor]:
    """Every frame of [S, K, T] that is heard."""
    frames = [lm_gen.step(one) for one in heard.split(1, dim=-1)]
    return [frame.clone() for frame in frames if frame is not None]


def through_a_file(saved: SavedStream) -> SavedStream:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: SavedStream = torch.load(file, weights_only=True)
    return loaded


def assert_same(found: SavedStream, expected: SavedStream) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@every_rule
@pytest.mark.parametrize(("at", "sinks"), [(1, 0), (13, 0), (33, 0), (33, 3)])
def test_a_saved_stream_goes_on_bit_for_bit_in_a_fresh_model(
    make_lm: MakeLM, rule: str, at: int, sinks: int
) -> None:
    heard = user(STREAMS, STEPS)
    first = LMGen(fresh(make_lm, rule, sinks))
    with first.streaming(STREAMS):
        torch.manual_seed(0)
        go_on(first, heard[..., :at])
        saved, random = through_a_file(save_stream(first)), torch.get_rng_state()
        expected = go_on(first, heard[..., at:])
        end = save_stream(first)
    if rule != "gated_delta":  # in the middle of a mini-batch
        assert int(saved["lm.transformer.layers.2.branch.memory.phase"][0]) == at % 5 > 0
    second = LMGen(fresh(make_lm, rule, sinks))
    with second.streaming(STREAMS):
        go_on(second, heard[..., 2:9])  # wherever it stands
        load_stream(second, saved)
        torch.set_rng_state(random)
        found = go_on(second, heard[..., at:])
        assert_same(save_stream(second), end)
    assert torch.equal(torch.cat(found), torch.cat(expected))
    assert torch.cat(expected).unique().numel() > 10


def test_what_is_saved_is_the_moment_and_loading_leaves_it_alone(make_lm: MakeLM) -> None:
    lm_gen, heard = LMGen(fresh(make_lm, "ttt_mlp"), use_sampling=False), user(STREAMS, STEPS)
    with lm_gen.streaming(STREAMS):
        go_on(lm_gen, heard[..., :13])
        saved = save_stream(lm_gen)
        kept = copy.deepcopy(saved)
        expected = go_on(lm_gen, heard[..., 13:])
        for _ in range(2):
            load_stream(lm_gen, saved)
            assert_same(saved, kept)
            assert torch.equal(torch.cat(go_on(lm_gen, heard[..., 13:])), torch.cat(expected))


def test_a_loaded_stream_stays_where_its_graphs_look(make_lm: MakeLM) -> None:
    # a captured CUDA graph replays on these addresses; moshi makes new offsets at every step
    lm_gen = LMGen(fresh(make_lm, "ttt_linear"))

    def addresses() -> dict[str, int]:
        states = lm_gen.lm_model.get_streaming_state()
        rings = {n: s.kv_cache.cache for n, s in states.items() if hasattr(s, "kv_cache")}
        memory = states["transformer.layers.2.branch"].memory
        return {name: value.data_ptr() for name, value in (rings | memory).items()}

    with lm_gen.streaming(STREAMS):
        go_on(lm_gen, user(STREAMS, 7))
        before = addresses()
        load_stream(lm_gen, through_a_file(save_stream(lm_gen)))
        assert addresses() == before


def test_moshis_own_state_of_the_model_goes_on_too_and_holds_no_weights(make_lm: MakeLM) -> None:
    first, second = fresh(make_lm, "ttt_mlp"), fresh(make_lm, "ttt_mlp")
    batch, row = codes(STREAMS, STEPS)[:, :6], torch.tensor([True, False])

    def run(lm: LMModel, steps: Tensor) -> Tensor:
        return torch.cat([lm.forward_text(step)[1] for step in steps.split(1, -1)], dim=2)

    with torch.no_grad(), first.streaming(STREAMS), second.streaming(STREAMS):
        run(first, batch[..., :33])
        state = copy.deepcopy(first.get_streaming_state())
        parts: list[Any] = [part for one in state.values() for part in vars(one).values()]
        assert not any(isinstance(part, torch.nn.Module) for part in parts)
        second.set_streaming_state(state)
        for lm in (first, second):
            lm.reset_streaming(row)
        assert torch.equal(run(first, batch[..., 33:]), run(second, batch[..., 33:]))


def test_a_stream_of_another_shape_is_refused_and_changes_nothing(make_lm: MakeLM) -> None:
    lm_gen, other = LMGen(fresh(make_lm, "ttt_linear", sinks=3)), fresh(make_lm, "ttt_linear")
    moved = LMGen(fresh(make_lm, "ttt_linear", sinks=2))  # as many slots, one more of them a sink
    with lm_gen.streaming(STREAMS):
        go_on(lm_gen, user(STREAMS, 7))
        saved = save_stream(lm_gen)
    for target, streams, words in (
        (moved, STREAMS, "capacity was saved as 13 and is 14"),
        (LMGen(other), STREAMS, "only one of them has"),
        (LMGen(fresh(make_lm, "ttt_linear", sinks=3)), 1, "batch_size was saved as 2 and is 1"),
    ):
        with target.streaming(streams):
            before = save_stream(target)
            with pytest.raises(UserError, match=words):
                load_stream(target, saved)
            assert_same(save_stream(target), before)


@every_rule
def test_eight_streams_that_pause_and_restart_at_random_equal_the_same_streams_alone(
    make_lm: MakeLM, rule: str
) -> None:
    streams, steps = 8, 50
    lm = fresh(make_lm, rule)
    heard = user(streams, steps)
    generator = torch.Generator().manual_seed(0)
    runs = torch.rand(steps, streams, generator=generator) < 0.8
    resets = torch.rand(steps, streams, generator=generator) < 0.04
    runs[:, 0], resets[:, 0] = True, False  # one row is not disturbed
    assert resets.sum() > 8
    together, logits, end = _played(lm, heard, runs, resets)
    assert _memory(end, 0)["updates"] == steps // (1 if rule == "gated_delta" else 5)
    for row in range(streams):
        edges = [0, *resets[:, row].nonzero().flatten().tolist(), steps]
        for first, stop in pairwise(edges):
            # alone it knows of no step in which it paused, and a restart is a new stream
            mine = first + runs[first:stop, row].nonzero().flatten()
            if not len(mine):
                continue
            alone, alone_logits, alone_end = _played(lm, heard[row : row + 1, :, mine])
            assert torch.equal(together[mine, row], alone[:, 0])
            torch.testing.assert_close(logits[mine, row], alone_logits[:, 0], rtol=1e-4, atol=1e-5)
        if len(mine):
            torch.testing.assert_close(
                _memory(end, row), _memory(alone_end, 0), rtol=1e-4, atol=1e-5
            )
    assert together[3:].unique().numel() > 10


def _played(
    lm: LMModel, heard: Tensor, runs: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedStream]:
    """Frames [T, S, K] and text logits [T, S, card] of a greedy run, and its last state."""
    logits: list[Tensor] = []
    lm_gen = LMGen(
        lm,
        use_sampling=False,
        support_out_of_sync=True,
        on_text_logits_hook=lambda one: logits.append(one[:, 0, 0].clone()),
    )
    frames = []
    with lm_gen.streaming(heard.shape[0]):
        for step in range(heard.shape[-1]):
            if runs is not None and resets is not None:
                lm_gen.reset_streaming(resets[step])
                lm_gen.set_exec_mask(runs[step])
            frames.append(lm_gen.step(heard[..., step, None])[..., 0].clone())
        return torch.stack(frames), torch.stack(logits), save_stream(lm_gen)


def _memory(saved: SavedStream, row: int) -> dict[str, Tensor]:
    prefix = "lm.transformer.layers.2.branch.memory."
    return {
        name.removeprefix(prefix): torch.as_tensor(value)[row]
        for name, value in saved.items()
        if name.startswith(prefix)
    }
