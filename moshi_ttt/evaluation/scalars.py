"""Scalars of one evaluation by TensorBoard tag."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS, Jump, _median, ratios_at
from moshi_ttt.diagnosis.listening import _tag
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.rings import CacheSnapshot


def position_summary(
    trace: Trace, jumps: Sequence[Jump], *, window_steps: int = 50
) -> dict[str, float]:
    """Flat TensorBoard scalars of one generation; medians over streams, NaN where undefined."""
    nan = math.nan
    scalars: dict[str, float] = {}
    # a run that is forced throughout has no part of its own; all of it is looked at
    prompt_steps = trace.prompt_steps if trace.prompt_steps < trace.steps else 0
    first = max(prompt_steps, SETTLE_STEPS)

    def level(series: np.ndarray, start: int) -> float:
        """Median over streams of the median of one window; series [S, T]."""
        if start < 0 or start + window_steps > series.shape[-1]:
            return nan
        return _median(np.median(series[:, start : start + window_steps], axis=-1))

    end = trace.steps - window_steps
    for layer in range(trace.input_norm.shape[1]):
        norm = trace.input_norm[:, layer]
        tag = f"longgen/input_norm/layer_{layer:02d}"
        scalars[f"{tag}/start"] = level(norm, first)
        scalars[f"{tag}/end"] = level(norm, end)
        scalars[f"{tag}/growth"] = scalars[f"{tag}/end"] / scalars[f"{tag}/start"]
    for name, turns in (("C", 1), ("2C", 2)):
        ratios = ratios_at(trace, turns * trace.context_steps, window_steps=window_steps)
        for layer, ratio in enumerate(ratios):
            scalars[f"longgen/ratio_at_{name}/layer_{layer:02d}"] = float(ratio)

    scalars["longgen/jump/count"] = float(len(jumps))
    largest = max(jumps, key=lambda jump: jump.ratio, default=None)
    step = nan if largest is None else float(largest.step)
    scalars["longgen/jump/step"] = step
    scalars["longgen/jump/seconds"] = trace.clock.seconds(step)
    scalars["longgen/jump/legacy_token"] = (
        step if largest is None else float(trace.clock.legacy_tokens(step))
    )
    scalars["longgen/jump/ratio"] = step if largest is None else largest.ratio
    if largest is not None:
        for layer, ratio in zip(largest.layers, largest.layer_ratios, strict=True):
            scalars[f"longgen/jump/ratio/layer_{layer:02d}"] = ratio

    for index, layer in enumerate(trace.hybrid_layers):
        for name, array in (
            ("branch_ratio", trace.branch_ratio),
            ("raw_norm", trace.branch_raw_norm),
            ("gate", trace.gate),
        ):
            # the part that the model generates by itself
            scalars[f"memory/{name}/layer_{layer:02d}"] = _median(array[:, index, first:])
        scalars[f"memory/inner_updates/layer_{layer:02d}"] = _median(
            trace.inner_updates[:, index, -1]
        )
    for name, entropy in (("text", trace.text_entropy), ("audio", trace.audio_entropy)):
        scalars[f"longgen/entropy/{name}/start"] = level(entropy, first)
        scalars[f"longgen/entropy/{name}/end"] = level(entropy, end)

    written = trace.ring_end_offset[..., -1]
    written = written[np.isfinite(written)]
    ring = (
        CacheSnapshot("temporal", int(written.max()), trace.context_steps) if written.size else None
    )
    scalars["cache/evicted_steps"] = nan if ring is None else float(ring.evicted_steps)
    scalars["cache/wraps"] = nan if ring is None else float(ring.wraps)
    return scalars


def quality_scalars(quality: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of `quality.json` by TensorBoard tag."""
    scalars = {f"longgen/quality/{name}/whole": value for name, value in quality["whole"].items()}
    for position in quality["positions"]:
        for name, measure in position["measures"].items():
            for place in map(_tag, position["names"]):
                scalars[f"longgen/quality/{name}/change_at_{place}"] = measure["change"]
    return scalars


def recall_scalars(record: dict[str, list[float]]) -> dict[str, float]:
    """Accuracy and NLL of each bin by TensorBoard tag."""
    return {
        f"longgen/recall/{name}/gap_{gap:04g}": value
        for name in ("accuracy", "nll")
        for gap, value in zip(record["gap_sec"], record[name], strict=True)
    }
