"""Made-up generations with known content, for tests of what reads a `Trace`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import lfilter

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.evaluation.scalars import position_summary
from moshi_ttt.files import write_json
from moshi_ttt.instruments.attention_mass import no_looks
from moshi_ttt.instruments.events import Event
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.rings import CacheSnapshot


def noise(
    generator: np.random.Generator, shape: tuple[int, int, int], *, sd: float, memory: float = 0.8
) -> np.ndarray:
    """Log-norm noise [S, L, T]: what speech does to norms, as far as medians can tell.

    Half the variance is shared by the layers of a stream, half is a layer's own; both are AR(1)
    (`memory` 0.8: 5 steps) with heavy-tailed innovations (Student t, 4 degrees of freedom). On
    top, each stream switches between talking and listening (25 steps each on average, 10 %).
    """
    streams, layers, steps = shape
    innovations = generator.standard_t(4, size=(streams, layers + 1, steps)) / np.sqrt(2)
    correlated = lfilter([np.sqrt(1 - memory**2)], [1.0, -memory], innovations, axis=-1)
    talks = np.cumsum(generator.random((streams, 1, steps)) < 1 / 25, axis=-1) % 2
    return sd * (correlated[:, :1] + correlated[:, 1:]) / np.sqrt(2) + 0.1 * talks


def not_measured(shape: tuple[int, int, int], hybrids: int) -> dict[str, np.ndarray]:
    """Arrays of a trace [S, L, T] that most tests do not care for: NaN, or nothing looked at."""
    streams, _, steps = shape
    per_layer = ("input_max", "input_max_channel", "attention_norm", "ffn_norm")
    per_memory = ("fast_weight_norm", "fast_weight_distance", "write_gate", "forgetting")
    shapes = dict.fromkeys(per_layer, shape)
    shapes |= dict.fromkeys(per_memory, (streams, hybrids, steps))
    arrays = {name: np.full(shape, np.nan, dtype=np.float32) for name, shape in shapes.items()}
    arrays["head_forgetting"] = np.full((hybrids, 2), np.nan, dtype=np.float32)
    arrays["step_ms"] = np.full(steps, np.nan, dtype=np.float32)
    return arrays | no_looks(streams)


def make_trace(
    *,
    log_norm: np.ndarray | None = None,
    shape: tuple[int, int, int] = (4, 4, 900),
    hybrid_layers: Sequence[int] = (2, 3),
    context_steps: int = 375,
    prompt_steps: int = 100,
    trained_steps: int | None = 750,
    label: str = "epoch 1",
    seed: int = 0,
    jump_at: int | None = None,
) -> Trace:
    """A trace of the given shape [S, L, T]; `log_norm` replaces the noise of the input norms.

    With `jump_at`, the norms of layer 1 and deeper rise by 50 % from that step on.
    """
    generator = np.random.default_rng(seed)
    if log_norm is None:
        log_norm = noise(generator, shape, sd=0.06)
    streams, layers, steps = log_norm.shape
    norm = np.exp(log_norm + np.log(8 + 4 * np.arange(layers))[:, None])
    norm[..., 0] *= 20  # the sink
    if jump_at is not None:
        norm[:, 1:, jump_at:] *= 1.5
    memory_shape = (streams, len(hybrid_layers), steps)
    wobble = np.exp(noise(generator, memory_shape, sd=0.1)) if hybrid_layers else 1.0
    ramp = np.arange(steps) / steps
    raw = np.broadcast_to(10 * (1 + ramp) * wobble, memory_shape)
    gate = np.full(memory_shape, 0.05) * (1 + 0.2 * ramp)
    written = np.broadcast_to(np.arange(1, steps + 1), (streams, layers, steps))
    return Trace(
        **not_measured((streams, layers, steps), len(hybrid_layers)),
        label=label,
        source="tiny",
        clock=Clock(),
        context_steps=context_steps,
        prompt_steps=prompt_steps,
        trained_steps=trained_steps,
        streams=[f"talk_{index // 2}/seed_{index % 2}" for index in range(streams)],
        hybrid_layers=list(hybrid_layers),
        rings=[
            CacheSnapshot(f"transformer.layers.{layer}.self_attn", steps, context_steps)
            for layer in range(layers)
        ],
        channels=64,
        text_padding_ids=(3, 0),
        input_norm=norm.astype(np.float32),
        branch_raw_norm=raw.astype(np.float32),
        branch_norm=(raw * gate).astype(np.float32),
        branch_ratio=(raw * gate / 15).astype(np.float32),
        gate=gate.astype(np.float32),
        inner_updates=np.broadcast_to(np.arange(steps) // 16, memory_shape).astype(np.float32),
        ring_end_offset=written.astype(np.float32),
        text_entropy=(1.5 + 0.2 * generator.normal(size=(streams, steps))).astype(np.float32),
        audio_entropy=(3 + 0.4 * generator.normal(size=(streams, steps))).astype(np.float32),
        text_tokens=generator.integers(0, 1000, size=(streams, steps - 1)),
        codes=generator.integers(0, 512, size=(streams, 8, steps - 1)),
    )


def write_evaluation(folder: Path, trace: Trace, *, nll: bool = True, clips: int = 1) -> None:
    """An evaluation folder as a long generation leaves it, with `clips` seconds-long sounds."""
    jumps = find_jumps(trace)
    scalars = position_summary(trace, jumps)
    trace.save(folder)
    events = [
        Event("cache_created", 0, {"modules": [ring.module for ring in trace.rings]}),
        Event("first_eviction", trace.context_steps, {"lost_step": 0}),
        *(jump.event() for jump in jumps),
    ]
    lines = [json.dumps(event.record(trace.clock)) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    rings = [ring.record() for ring in trace.rings]
    if nll:
        windows = trace.steps // 63
        losses = {
            name: [None, *(level + 0.01 * window for window in range(1, windows))]
            for level, name in enumerate(("text", "first_codebook", "other_codebooks"), 2)
        }
        starts = [63 * window for window in range(windows)]
        write_json(folder / "nll.json", {"window_steps": 63, "start_step": starts, **losses})
        for name, level in (("text", 2.1), ("first_codebook", 3.1), ("other_codebooks", 4.1)):
            scalars[f"longgen/nll/{name}/mean"] = level
    for clip in range(clips):
        time = np.arange(2 * 24_000) / 24_000
        tones = np.stack([np.sin(2 * np.pi * 220 * time), np.sin(2 * np.pi * 330 * time)], axis=1)
        path = folder / "audio" / f"stream_{clip:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * tones, 24_000)
    words = [[[0.4, "Hello"], [0.6, "<b>"], [5.0, "there."]] for _ in trace.streams]
    write_json(folder / "transcripts.json", {"streams": words})
    quality = {"window_sec": 5.0, "audible": False, "whole": {}, "positions": []}
    write_json(folder / "quality.json", quality)
    write_json(
        folder / "summary.json",
        {
            "label": trace.label,
            "source": trace.source,
            "steps": trace.steps,
            "seconds": trace.clock.seconds(trace.steps),
            "streams": trace.streams,
            "wall_sec": 12.5,
            "ended_unix_sec": 1.8e9 + 600 * int("0" + re.sub(r"\D", "", folder.name)),
            "about": {"memory": "ttt_linear in layers 2-3", "examined with": "2 recordings"},
            "steps_per_sec": 72.0,
            "jumps": [jump.record(trace.clock) for jump in jumps],
            "rings": rings,
            "scalars": scalars,
        },
    )


BINS = {
    "gap_sec": [4, 20, 60, 240],
    "words": [100, 50, 40, 10],
    "accuracy": [0.9, 0.6, 0.2, 0.0],
    "chance": [0.1, 0.1, 0.1, 0.1],
    "nll": [0.5, 1.0, 3.0, 4.0],
    "low": [0.83, 0.46, 0.1, 0.0],
    "high": [0.94, 0.72, 0.35, 0.28],
}
"""One group of `recall_record`: good within the window, chance beyond it."""
RECALL = {"kept": {"own": BINS}}
"""Content of `probes.json` for a model without a memory."""


def remembered(kept: float, reset: float, other: float | None) -> dict[str, dict[str, Any]]:
    """Content of `probes.json` for a memory: own words right beyond 30 s, with each memory.

    Facts that were only heard are answered as in `BINS`, whatever the memory.
    """
    found = {"kept": kept, "reset": reset} | ({} if other is None else {"other": other})
    own = {memory: BINS | {"accuracy": [0.9, 0.6, far, far]} for memory, far in found.items()}
    return {memory: {"own": bins, "heard": BINS} for memory, bins in own.items()}


SHAPE = (4, 4, 900)  # streams, layers, steps: what the tiny model's default evaluation records


def trace_of(log_norm: np.ndarray, **settings: object) -> Trace:
    """A run without memory that has these log norms."""
    return make_trace(log_norm=log_norm, hybrid_layers=(), **settings)  # type: ignore[arg-type]


def quiet(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Log norms in which nothing happens."""
    return noise(np.random.default_rng(seed), shape, sd=0.06)
