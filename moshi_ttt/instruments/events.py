"""The events of a generation, from which the text log, the JSONL and the tables are made.

The same functions read a finished `Trace` and a block of a generation that is still running, so
that the console shows what the files will hold.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.files import plain, write_bytes
from moshi_ttt.instruments.critical import by_step, critical_steps
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.rings import CacheSnapshot

PER_LAYER = ("input_norm", "attention_norm", "ffn_norm", "input_max", "input_max_channel")
PER_MEMORY = (
    "branch_ratio",
    "branch_norm",
    "fast_weight_norm",
    "fast_weight_distance",
    "write_gate",
    "forgetting",
)
PER_STEP = ("text_entropy", "audio_entropy")
Values = Mapping[str, Any]
"""Arrays by the names of `Trace`, [S, rows, steps] and [S, steps]; `step_ms` [steps]."""


def cache_events(rings: Sequence[CacheSnapshot], clock: Clock) -> list[Event]:
    """`cache_created` at step 0, one for the rings that are alike.

    A depformer's ring lives within one step and has no length in time.
    """
    groups: dict[tuple[Any, ...], list[CacheSnapshot]] = defaultdict(list)
    for ring in rings:
        key = (ring.role, ring.capacity, ring.heads, ring.head_dim, ring.kept)
        groups[key].append(ring)
    events = []
    for alike in groups.values():
        ring = alike[0]
        first = dataclasses.replace(ring, end_offset=0)
        steps = None if ring.role == "depformer" else ring.capacity / ring.positions_per_step
        detail = {
            "role": ring.role,
            "capacity_steps": ring.capacity if steps is None else steps,
            "capacity_sec": None if steps is None else clock.seconds(steps),
            "capacity_legacy_tokens": None if steps is None else clock.legacy_tokens(steps),
            "sinks": ring.sinks,
            "thinning": ring.thinning,
            "rings": len(alike),
            "batch": ring.batch,
            "heads": ring.heads,
            "head_dim": ring.head_dim,
            "exec_mask": ring.exec_mask,
            "size_bytes": sum(one.size_bytes for one in alike),
            **({} if steps is None else _next_turn(first, -1, clock)),
            "modules": [one.module for one in alike],
        }
        events.append(Event("cache_created", 0, detail))
    return events


def _next_turn(ring: CacheSnapshot, step: int, clock: Clock) -> dict[str, Any]:
    """When writing goes back to the first slot again, by all clocks.

    Args:
        ring: as it stands after `step`, at which it may be younger than the run.
        step: of the run.
        clock: of the run.
    """
    turn = step + 1 + (ring.next_turn - ring.end_offset) / ring.positions_per_step
    return {
        "next_turn_step": turn,
        "next_turn_sec": clock.seconds(turn),
        "next_turn_legacy_token": clock.legacy_tokens(turn),
    }


def _place(ring: CacheSnapshot, step: int, clock: Clock) -> dict[str, Any]:
    """Where a temporal ring stands after a step: what it wrote, holds and has lost."""
    return {
        "end_offset": ring.end_offset,
        "turn": ring.wraps,
        "slot": ring.slot,
        "held_positions": ring.valid_positions,
        "lost_steps": ring.evicted_steps,
        **_next_turn(ring, step, clock),
    }


def turn_events(
    end_offset: np.ndarray, rings: Sequence[CacheSnapshot], clock: Clock, *, first_step: int = 0
) -> list[Event]:
    """First eviction and turns of the temporal rings within a block of steps.

    Args:
        end_offset: steps written to each layer's ring after each step of the block, [L, n].
        rings: the L temporal rings, for their names and what they keep.
        clock: of the run.
        first_step: step of the block's first column.

    Returns:
        One event for all rings that lost their first step, or turned, at the same step.
    """
    moved: dict[tuple[int, int], list[str]] = defaultdict(list)
    losing: dict[tuple[int, int], list[str]] = defaultdict(list)
    for row, ring in enumerate(rings):
        newest = end_offset[row].astype(np.int64) - 1
        levels = ring.kept.levels
        # the write that starts a turn is the first one past a multiple of the capacity
        first, stride, size = levels[0]
        turns, within = np.divmod(newest - first, stride * size)
        for column in np.flatnonzero((turns > 0) & (within == 0)):
            moved[first_step + int(column), int(turns[column])].append(ring.module)
        first, stride, size = levels[-1]
        for column in np.flatnonzero(newest == first + stride * size):
            losing[first_step + int(column), first].append(ring.module)
    events = [
        Event("first_eviction", step, {"modules": modules, "lost_step": lost_step})
        for (step, lost_step), modules in sorted(losing.items())
    ]
    for (step, turn), modules in sorted(moved.items()):
        ring = next(ring for ring in rings if ring.module == modules[0])
        first, stride, size = ring.kept.levels[0]
        ring = dataclasses.replace(ring, end_offset=first + turn * stride * size + 1)
        place = _place(ring, step, clock)
        lost = {
            "lost_sec": clock.seconds(place["lost_steps"]),
            "lost_legacy_tokens": clock.legacy_tokens(place["lost_steps"]),
        }
        events.append(Event("ring_turn", step, place | lost | {"modules": modules}))
    return events


def position_event(
    kind: str,
    step: int,
    values: Values,
    *,
    at: int,
    ring: CacheSnapshot,
    clock: Clock,
    names: Sequence[str] = (),
) -> Event:
    """What was measured at one step: medians over streams, the largest over layers.

    Args:
        kind: `critical_position` or `progress`.
        step: which step.
        values: a trace's or a block's arrays.
        at: index of the step in `values`.
        ring: a temporal ring, for its capacity and sinks.
        clock: of the run.
        names: of the position.
    """
    layers = {
        name: _over_streams(values[name][..., at])
        for name in (*PER_LAYER, *PER_MEMORY)
        if values[name].size
    }
    norms = layers["input_norm"]
    detail: dict[str, Any] = {"names": list(names)} if names else {}
    detail["norm_median"] = _middle(norms)
    if np.isfinite(norms).any():
        detail["norm_max"] = float(np.nanmax(norms))
        detail["norm_max_layer"] = int(np.nanargmax(norms))
    largest = layers["input_max"]
    if np.isfinite(largest).any():
        layer = int(np.nanargmax(largest))
        detail["channel_max"] = float(largest[layer])
        detail["channel_max_layer"] = layer
        detail["channel_max_channel"] = int(layers["input_max_channel"][layer])
    detail |= {name: _middle(layers[name]) for name in PER_MEMORY if name in layers}
    detail |= {name: _middle(values[name][:, at]) for name in PER_STEP}
    detail["step_ms"] = float(values["step_ms"][at])
    end_offset = int(values["ring_end_offset"][0, 0, at])
    detail |= _place(dataclasses.replace(ring, end_offset=end_offset), step, clock)
    detail["layers"] = {name: value.tolist() for name, value in layers.items()}
    return Event(kind, step, detail)


def generation_events(trace: Trace) -> list[Event]:
    """Creation and turns of the rings and every critical position, in order of position."""
    temporal = [ring for ring in trace.rings if ring.role == "temporal"]
    values = {
        name: getattr(trace, name)
        for name in (*PER_LAYER, *PER_MEMORY, *PER_STEP, "step_ms", "ring_end_offset")
    }
    events = cache_events(trace.rings, trace.clock)
    # every stream runs in step with the first one
    events += turn_events(trace.ring_end_offset[0], temporal, trace.clock)
    events += [
        position_event(
            "critical_position",
            step,
            values,
            at=step,
            ring=temporal[0],
            clock=trace.clock,
            names=names,
        )
        for step, names in by_step(critical_steps(trace.lengths)).items()
    ]
    return sorted(events, key=lambda event: event.step)


def write_events(path: Path, events: Iterable[Event], clock: Clock) -> None:
    """Write `events.jsonl`, one event a line; what is undefined is null."""
    lines = [json.dumps(plain(event.record(clock)), allow_nan=False) for event in events]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _over_streams(values: np.ndarray) -> np.ndarray:
    """Median over streams, [rows]; NaN where nothing was measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN
        median: np.ndarray = np.nanmedian(values.astype(np.float64), axis=0)
    return median


def _middle(values: np.ndarray) -> float | None:
    """Median of what was measured; None if nothing was."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one step of a generation."""

    kind: str
    """`cache_created`, `first_eviction`, `ring_turn`, `critical_position`, `jump`; a live log also
    has `progress`."""
    step: int
    detail: dict[str, Any] = field(default_factory=dict)

    def record(self, clock: Clock) -> dict[str, Any]:
        """The line of `events.jsonl`, with the position in all three clocks."""
        return {
            "event": self.kind,
            "step": self.step,
            "seconds": clock.seconds(self.step),
            "legacy_token": clock.legacy_tokens(self.step),
            **self.detail,
        }
