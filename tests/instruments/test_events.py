"""The event stream, its views, and the log of a run that is still going on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models.lm import LMModel
from synthetic_trace import make_trace

from moshi_ttt.clock import Clock
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.console import ConsoleLog, event_line
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.critical import Lengths, by_step, critical_steps
from moshi_ttt.instruments.events import (
    generation_events,
    position_event,
    turn_events,
    write_events,
)
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.rings import CacheSnapshot

STREAMS, STEPS, CONTEXT = 2, 60, 16


def test_critical_positions_are_those_of_both_clocks() -> None:
    positions = by_step(critical_steps(Lengths(375, 6200, prompt_steps=125, trained_steps=188)))
    assert [step for step, names in positions.items() if names[0].startswith("C")] == [
        374,
        375,
        376,
    ]
    assert positions[188] == ["trained length"]
    assert positions[125] == ["prompt end"]
    # 60 s: legacy token 6000, and with this capacity the second turn of the ring
    assert positions[750] == ["2C", "legacy token 6000", "legacy token 6001"]
    assert positions[762] == ["legacy token 6100"]
    assert [step for step in positions if 751 < step <= 850] == [
        760, 762, 770, 780, 790, 800, 810, 820, 830, 840, 850,
    ]  # fmt: skip
    assert positions[6000] == ["step 6000"]
    assert {6001, 6100} < set(positions)
    assert list(positions) == sorted(positions)


def test_positions_outside_the_run_are_left_out() -> None:
    positions = by_step(critical_steps(Lengths(375, 400, trained_steps=400)))
    assert max(positions) == 376
    assert all("trained length" not in names for names in positions.values())


def turns(written: Any, capacity: int = 10, first_step: int = 0, **kept: int) -> Any:
    rings = [CacheSnapshot(f"transformer.{n}", 0, capacity, **kept) for n in range(2)]
    written = np.broadcast_to(written, (2, len(written)))
    return [
        (event.kind, event.step, event.detail.get("lost_steps"))
        for event in turn_events(written, rings, Clock(), first_step=first_step)
    ]


def test_turns_happen_at_multiples_of_the_capacity() -> None:
    assert turns(np.arange(1, 35)) == [
        ("first_eviction", 10, None),
        ("ring_turn", 10, 1),
        ("ring_turn", 20, 11),
        ("ring_turn", 30, 21),
    ]
    # sinks have their own slots, so the ring fills later
    assert turns(np.arange(1, 26), sinks=3) == [
        ("first_eviction", 13, None),
        ("ring_turn", 13, 1),
        ("ring_turn", 23, 11),
    ]


def test_a_ring_that_thins_loses_early_and_turns_late() -> None:
    # of 10 slots 2 hold odd steps, 2 others that are even, 6 those that 4 divides
    assert turns(np.arange(1, 40), thinning=2) == [
        ("first_eviction", 5, None),
        ("ring_turn", 24, 15),
    ]


def test_blocks_tell_of_the_same_turns_as_the_whole() -> None:
    whole = turns(np.arange(1, 35))
    for cut in range(1, 34):
        parts = turns(np.arange(1, cut + 1)) + turns(np.arange(cut + 1, 35), first_step=cut)
        assert parts == whole


def test_events_of_a_trace_are_in_order_and_say_what_was_measured(tmp_path: Path) -> None:
    trace = make_trace(jump_at=750)
    events = generation_events(trace)
    assert [event.step for event in events] == sorted(event.step for event in events)
    write_events(tmp_path / "events.jsonl", events, trace.clock)
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [record["event"] for record in records]
    assert kinds[0] == "cache_created"
    assert kinds.count("ring_turn") == 2
    at = {name: r for r in records for name in r.get("names", [])}
    assert at["2C"]["lost_steps"] == 376
    assert at["2C"]["turn"] == 2
    assert at["2C"]["legacy_token"] == 6000
    expected = np.median(trace.input_norm[:, :, 750], axis=0)
    np.testing.assert_allclose(at["2C"]["layers"]["input_norm"], expected, rtol=1e-6)
    assert at["2C"]["norm_max_layer"] == int(np.argmax(expected))
    assert at["2C"]["norm_median"] > 1.3 * at["2C-1"]["norm_median"]
    # not measured in this trace: null, not 0
    assert at["2C"]["fast_weight_norm"] is None
    assert at["2C"]["layers"]["ffn_norm"] == [None] * 4


def test_cache_created_says_how_large_the_rings_are() -> None:
    trace = make_trace(shape=(2, 2, 400))
    rings = [
        CacheSnapshot(
            f"transformer.layers.{n}.self_attn", 400, 375, 8, 64, 1000, batch=4, exec_mask=True
        )
        for n in range(2)
    ]
    rings.append(CacheSnapshot("depformer.layers.0.self_attn", 8, 8, 4, 64, 10))
    rings.append(CacheSnapshot("codec.decoder.0.self_attn", 800, 250, 8, 64, 7, 0, 2))
    fields = {name: getattr(trace, name) for name in Trace.__slots__}
    events = generation_events(Trace(**fields | {"rings": rings}))
    temporal, depformer, codec = (e.detail for e in events if e.kind == "cache_created")
    assert (temporal["role"], temporal["rings"], temporal["size_bytes"]) == ("temporal", 2, 2000)
    assert (temporal["capacity_steps"], temporal["capacity_sec"]) == (375, 30.0)
    assert temporal["capacity_legacy_tokens"] == 3000
    assert (temporal["batch"], temporal["heads"], temporal["head_dim"]) == (4, 8, 64)
    assert temporal["exec_mask"] is True
    assert (temporal["next_turn_step"], temporal["next_turn_sec"]) == (375, 30.0)
    assert "next_turn_step" not in depformer
    assert codec["next_turn_legacy_token"] == 1000
    assert depformer["capacity_sec"] is None
    assert (codec["role"], codec["capacity_steps"], codec["capacity_sec"]) == ("codec", 125, 10.0)


def test_a_line_is_fields_without_blanks() -> None:
    trace = make_trace()
    ring = trace.rings[0]
    values = {name: getattr(trace, name) for name in Trace.__slots__}
    event = position_event(
        "critical_position",
        750,
        values,
        at=750,
        ring=ring,
        clock=trace.clock,
        names=["a b", "2C"],
    )
    line = event_line(event.record(trace.clock))
    fields = dict(part.split("=") for part in line.split(" "))
    assert list(fields)[:4] == ["event", "step", "seconds", "legacy_token"]
    assert (fields["seconds"], fields["legacy_token"]) == ("60.00", "6000")
    assert fields["names"] == "a_b,2C"
    assert len(fields["input_norm_by_layer"].split(",")) == 4
    assert "fast_weight_norm" not in fields  # not measured


def run_with_log(make_lm: Callable[..., LMModel], interval_steps: int) -> tuple[list[str], Any]:
    lm = make_lm()
    torch.manual_seed(3)
    add_memory(lm, MemoryConfig(layers=[1], heads=2, rule="gated_delta"))
    lm.eval()
    codes = torch.randint(0, 16, (STREAMS, 17, STEPS), generator=torch.Generator().manual_seed(1))
    lines: list[str] = []
    reads: list[tuple[int, int]] = []
    with borrowed(lm, 0):
        recorder = Recorder(lm, STREAMS, STEPS)
        read = recorder.read
        recorder.read = lambda first, stop: (  # type: ignore[method-assign]
            reads.append((first, stop)),
            read(first, stop),
        )[1]
        log = ConsoleLog(
            recorder,
            Clock(),
            steps=STEPS,
            context_steps=CONTEXT,
            interval_steps=interval_steps,
            write=lines.append,
            prompt_steps=5,
        )
        tokens = generate(lm, codes[:, :, :5], codes[:, 9:], observers=[recorder, log])
    trace = Trace(
        label="run",
        source="test",
        clock=Clock(),
        context_steps=CONTEXT,
        prompt_steps=5,
        trained_steps=None,
        streams=["a", "b"],
        hybrid_layers=[1],
        rings=recorder.rings,
        channels=lm.dim,
        text_padding_ids=(3, 0),
        text_tokens=tokens[:, 0].numpy(),
        codes=tokens[:, 1:].numpy(),
        **recorder.arrays(),
    )
    return lines, (trace, reads)


def test_the_log_of_a_run_says_what_its_files_say(make_lm: Callable[..., LMModel]) -> None:
    lines, (trace, reads) = run_with_log(make_lm, interval_steps=25)
    logged = [dict(part.split("=") for part in line.split(" ")) for line in lines]
    assert [line["step"] for line in logged if line["event"] == "progress"] == [
        "0",
        "25",
        "48",  # the third turn
        "50",
    ]
    stored = [event.record(trace.clock) for event in generation_events(trace)]
    for kind in ("first_eviction", "ring_turn", "critical_position"):
        expected = [event for event in stored if event["event"] == kind]
        found = [line for line in logged if line["event"] == kind]
        assert [int(line["step"]) for line in found] == [event["step"] for event in expected]
        for line, event in zip(found, expected, strict=True):
            if kind == "critical_position":
                assert float(line["norm_median"]) == pytest.approx(event["norm_median"], rel=1e-3)
    for line in logged:
        if line["event"] != "cache_created" and "slot" in line:
            step = int(line["step"])
            assert (int(line["end_offset"]), int(line["slot"])) == (step + 1, step % CONTEXT)
            assert line["held_positions"] == f"{max(0, step + 1 - CONTEXT)},{step}"
            assert int(line["next_turn_step"]) == step // CONTEXT * CONTEXT + CONTEXT
    assert [line["next_turn_sec"] for line in logged if line["event"] == "ring_turn"] == [
        "2.56",
        "3.84",
        "5.12",
    ]
    created = {line["role"]: line for line in logged if line["event"] == "cache_created"}
    assert set(created) == {"temporal", "depformer"}
    assert created["temporal"]["capacity_steps"] == str(CONTEXT)
    sizes = [created["temporal"][key] for key in ("heads", "batch", "exec_mask")]
    assert sizes == ["2", "2", "True"]
    assert created["temporal"]["next_turn_step"] == str(CONTEXT)
    # blocks that follow each other, one for each line: no step is read by itself
    points = [stop for _, stop in reads[:-1]]
    assert reads[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(reads[:-1]))
    assert len(points) < STEPS / 2


def test_padding_and_repetition_are_logged(make_lm: Callable[..., LMModel]) -> None:
    lines, _ = run_with_log(make_lm, interval_steps=20)
    last = dict(part.split("=") for part in lines[-1].split(" "))
    assert 0 <= float(last["text_padding_share"]) <= 1
    assert float(last["step_ms"]) > 0


def test_between_lines_nothing_is_asked_of_the_recorder() -> None:
    recorder: Any = object()
    log = ConsoleLog(
        recorder,
        Clock(),
        steps=STEPS,
        context_steps=CONTEXT,
        interval_steps=25,
        write=lambda line: pytest.fail(line),
    )
    for step in range(1, CONTEXT - 1):
        log.after_step(step)


def test_a_log_needs_an_interval(make_lm: Callable[..., LMModel]) -> None:
    with pytest.raises(UserError, match="log_interval=0 must be at least 1"):
        run_with_log(make_lm, interval_steps=0)
