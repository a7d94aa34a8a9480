"""What a ring holds, has lost and overwrites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_fakes import keys_seen
from lm_fakes import MakeLM

from moshi_ttt.model.kept import Kept, KeptRing
from moshi_ttt.model.rings import CacheSnapshot, held_positions, ring_of, ring_snapshots, snapshot
from moshi_ttt.model.source import open_source


@pytest.mark.parametrize("sinks", [0, 3])
def test_held_positions_are_those_that_were_written_last(make_lm: MakeLM, sinks: int) -> None:
    ring = KeptRing(1, 1, 2, Kept(8, sinks), device=torch.device("cpu"), dtype=torch.float32)
    everything = torch.ones(1, dtype=torch.bool)
    for step in range(30):
        k = torch.full((1, 1, 1, 2), float(step))
        ring.write(k, k, torch.zeros_like(k), everything)
        held = held_positions(ring)[0]
        kept = held >= 0
        # each key was filled with its own position
        assert torch.equal(ring.cache[0, 0, 0, kept, 0], held[kept].float())
        snapshot = CacheSnapshot("transformer.x", step + 1, 8, sinks=sinks)
        assert snapshot.slot is not None
        assert ring.cache[0, 0, 0, snapshot.slot, 0] == step
        turns = (at for at in range(sinks + 8, 50, 8) if at > step)
        assert snapshot.next_turn == next(turns)
        first, last = snapshot.valid_positions or (0, -1)
        expected = set(range(min(sinks, step + 1))) | set(range(first, last + 1))
        assert set(held[kept].tolist()) == expected
        lost = snapshot.lost_positions
        gone = set() if lost is None else set(range(lost[0], lost[1] + 1))
        assert gone == set(range(step + 1)) - expected
        assert len(gone) == snapshot.evicted_steps


def test_the_slot_written_and_the_next_turn_of_a_thinned_ring_are_known() -> None:
    kept = Kept(8, 2, 2)
    slots = kept.slots(torch.device("cpu"))
    written = []
    for step in range(80):
        snapshot = CacheSnapshot("transformer.x", step + 1, 8, sinks=2, thinning=2)
        held = slots.held(torch.tensor([step]))[0]
        assert snapshot.slot is not None
        assert held[snapshot.slot] == step
        written.append(snapshot.slot)
        assert snapshot.next_turn > step
    turns = [step for step in range(3, 80) if written[step] == 2]
    ahead = {CacheSnapshot("x", step, 8, sinks=2, thinning=2).next_turn for step in range(3, 60)}
    assert sorted(ahead) == turns[: len(ahead)]


def test_ranges_of_a_ring_over_its_turns() -> None:
    def ranges(end: int) -> tuple[Any, ...]:
        ring = CacheSnapshot("transformer.layers.0.self_attn", end, 8)
        return ring.valid_positions, ring.lost_positions, ring.overwritten_slots, ring.wraps

    assert CacheSnapshot("transformer.x", 0, 8).slot is None
    assert ranges(0) == (None, None, None, 0)
    assert ranges(8) == ((0, 7), None, None, 0)
    assert ranges(9) == ((1, 8), (0, 0), (0, 0), 1)
    assert ranges(16) == ((8, 15), (0, 7), (0, 7), 1)
    assert ranges(17) == ((9, 16), (0, 8), (0, 0), 2)


@pytest.mark.parametrize(("capacity", "thinning"), [(8, 1), (11, 3), (5, 3)])
def test_a_ring_that_thins_says_what_it_has_and_what_is_gone(capacity: int, thinning: int) -> None:
    device = torch.device("cpu")
    ring = KeptRing(1, 1, 2, Kept(capacity, 2, thinning), device=device, dtype=torch.float32)
    for step in range(9 * capacity):
        k = torch.full((1, 1, 1, 2), float(step))
        ring.write(k, k, k, torch.ones(1, dtype=torch.bool))
        held = held_positions(ring)[0]
        assert torch.equal(ring.cache[0, 0, 0, held >= 0, 0], held[held >= 0].float())
        kept = set(held[held >= 0].tolist())
        assert kept == set(keys_seen(step, capacity, 2, thinning))
        now = snapshot("transformer.x", ring, step + 1)
        assert now.evicted_steps == step + 1 - len(kept)
        assert now.valid_positions is not None
        first, last = now.valid_positions
        assert kept >= set(range(first, last + 1))
        if lost := now.lost_positions:
            assert not kept & set(range(lost[0], lost[1] + 1))
    assert now.wraps > 0
    assert now.record()["thinning"] == thinning


def test_the_codecs_rings_are_told_apart_and_count_their_own_positions() -> None:
    codec = open_source("tiny").codec()
    with codec.streaming(1), torch.no_grad():
        for _ in range(3):
            codec.encode(torch.zeros(1, 1, 1920))
        rings = ring_snapshots(codec, prefix="codec", positions_per_step=4)
        assert {ring.role for ring in rings} == {"codec"}
        encoder = [ring for ring in rings if "encoder_transformer" in ring.module]
        assert encoder
        assert {ring.end_offset for ring in encoder} == {3 * 4}
        held = held_positions(ring_of(codec.encoder_transformer.transformer.layers[0].self_attn))
    assert held[0, :12].tolist() == list(range(12))
