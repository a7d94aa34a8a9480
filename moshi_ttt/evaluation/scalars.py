"""Scalars of one evaluation by TensorBoard tag."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.diagnosis.jumps import SETTLE_STEPS, Jump, finite_mean, finite_median, ratios_at
from moshi_ttt.diagnosis.listening import place_tag
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import EVERYONE, Recalls, beyond_window
from moshi_ttt.teacher_forcing.recordings import TeacherForced


def evaluation_scalars(
    trace: Trace,
    jumps: Sequence[Jump],
    read: TeacherForced,
    quality: Mapping[str, Any],
    segments: Mapping[str, Any],
    *,
    steps_per_sec: float,
) -> dict[str, float]:
    """All scalars of one evaluation.

    Args:
        trace: of the generation.
        jumps: and growth, found in it.
        read: what reading the held-out recordings gave.
        quality: what `listening.listen` returned.
        segments: what `monitor.flag` returned.
        steps_per_sec: speed of the generation.
    """
    scalars = position_summary(trace, jumps) | nll_scalars(read.nll)
    if read.contexts is not None:
        scalars |= context_scalars(read.contexts)
    if read.recall is not None:
        window_sec = trace.clock.seconds(trace.context_steps)
        scalars |= recall_scalars(read.recall, window_sec)
    shares = {f"longgen/flagged/{reason}": one for reason, one in segments["shares"].items()}
    speed = {
        "longgen/steps_per_sec": steps_per_sec,
        "longgen/times_real_time": steps_per_sec * trace.clock.step_sec,
    }
    return scalars | quality_scalars(quality) | shares | speed


def position_summary(
    trace: Trace, jumps: Sequence[Jump], *, window_steps: int = 50
) -> dict[str, float]:
    """Flat TensorBoard scalars of one generation; medians over streams, NaN where undefined."""
    # a run that is forced throughout has no part of its own; all of it is looked at
    first = max(trace.free_from, SETTLE_STEPS)
    return {
        **_norms(trace, first, window_steps),
        **_largest_jump(trace, [jump for jump in jumps if not jump.gradual]),
        **_growth([jump for jump in jumps if jump.gradual]),
        **_memory(trace, first),
        **_entropies(trace, first, window_steps),
    }


def _level(series: np.ndarray, start: int, window_steps: int) -> float:
    """Median over streams of the median of one window; series [S, T]."""
    if start < 0 or start + window_steps > series.shape[-1]:
        return math.nan
    return finite_median(np.median(series[:, start : start + window_steps], axis=-1))


def _norms(trace: Trace, first: int, window_steps: int) -> dict[str, float]:
    """Input norms after the prompt and at the end, and around the turns of the ring."""
    scalars: dict[str, float] = {}
    for layer in range(trace.input_norm.shape[1]):
        norm = trace.input_norm[:, layer]
        start = _level(norm, first, window_steps)
        end = _level(norm, trace.steps - window_steps, window_steps)
        tag = f"longgen/input_norm/layer_{layer:02d}"
        scalars |= {f"{tag}/start": start, f"{tag}/end": end, f"{tag}/growth": end / start}
    for name, turns in (("C", 1), ("2C", 2)):
        ratios = ratios_at(trace, turns * trace.context_steps, window_steps=window_steps)
        for layer, ratio in enumerate(ratios):
            scalars[f"longgen/ratio_at_{name}/layer_{layer:02d}"] = float(ratio)
    return scalars


def _largest_jump(trace: Trace, jumps: Sequence[Jump]) -> dict[str, float]:
    """How many jumps there are; where and how large the largest is."""
    count = {"longgen/jump/count": float(len(jumps))}
    if not jumps:
        undefined = ("step", "seconds", "legacy_token", "ratio")
        return count | {f"longgen/jump/{name}": math.nan for name in undefined}
    largest = max(jumps, key=lambda jump: jump.ratio)
    layers = zip(largest.layers, largest.layer_ratios, strict=True)
    return count | {
        "longgen/jump/step": float(largest.step),
        "longgen/jump/seconds": trace.clock.seconds(largest.step),
        "longgen/jump/legacy_token": float(trace.clock.legacy_tokens(largest.step)),
        "longgen/jump/ratio": largest.ratio,
        **{f"longgen/jump/ratio/layer_{layer:02d}": ratio for layer, ratio in layers},
    }


def _growth(growths: Sequence[Jump]) -> dict[str, float]:
    """How often a norm grew over a span, which is no jump, and the largest of it."""
    largest = max((growth.ratio for growth in growths), default=math.nan)
    return {"longgen/growth/count": float(len(growths)), "longgen/growth/ratio": largest}


def _memory(trace: Trace, first: int) -> dict[str, float]:
    """What each memory adds, from step `first` on; its fast weights at the end."""
    scalars: dict[str, float] = {}
    arrays = {
        "branch_ratio": trace.branch_ratio,
        "raw_norm": trace.branch_raw_norm,
        "gate": trace.gate,
    }
    for index, layer in enumerate(trace.hybrid_layers):
        for name, array in arrays.items():
            # the part that the model generates by itself
            scalars[f"memory/{name}/layer_{layer:02d}"] = finite_median(array[:, index, first:])
        ends = {
            "fast_weight_norm": trace.fast_weight_norm,
            "fast_weight_change": trace.fast_weight_change,
        }
        for name, array in ends.items():
            scalars[f"memory/{name}/layer_{layer:02d}"] = finite_median(array[:, index, -1])
        # of the head that forgets most slowly: the one that may fill up
        scalars[f"memory/half_life_sec/layer_{layer:02d}"] = float(trace.half_life_sec[index].max())
    return scalars


def _entropies(trace: Trace, first: int, window_steps: int) -> dict[str, float]:
    """Entropy of the predictions after the prompt and at the end."""
    scalars: dict[str, float] = {}
    for name, entropy in (("text", trace.text_entropy), ("audio", trace.audio_entropy)):
        tag = f"longgen/entropy/{name}"
        scalars[f"{tag}/start"] = _level(entropy, first, window_steps)
        scalars[f"{tag}/end"] = _level(entropy, trace.steps - window_steps, window_steps)
    return scalars


def nll_scalars(nll: Mapping[str, Any]) -> dict[str, float]:
    """First, last and mean window of the teacher-forced loss, in nats; none where none is defined.

    Args:
        nll: content of `nll.json`.
    """
    scalars: dict[str, float] = {}
    for group in GROUPS:
        values = [value for value in nll[group] if value == value]  # NaN is undefined
        if values:
            tag = f"longgen/nll/{group}"
            scalars[f"{tag}/first_window"] = values[0]
            scalars[f"{tag}/last_window"] = values[-1]
            scalars[f"{tag}/mean"] = sum(values) / len(values)
    return scalars


def context_scalars(contexts: Mapping[str, Any]) -> dict[str, float]:
    """Loss behind each context, nats; mean over the stretches that have such tokens.

    Args:
        contexts: content of `contexts.json`.
    """
    return {
        f"longgen/nll/{group}/behind_{seconds:g}s": finite_mean(np.array(contexts[group])[:, at])
        for group in GROUPS
        for at, seconds in enumerate(contexts["context_sec"])
    }


def quality_scalars(quality: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of `quality.json` by TensorBoard tag."""
    scalars = {f"longgen/quality/{name}/whole": value for name, value in quality["whole"].items()}
    for position in quality["positions"]:
        for name, measure in position["measures"].items():
            # one place may have several names; each would be the same curve again
            place = place_tag(position["names"][0])
            scalars[f"longgen/quality/{name}/change_at_{place}"] = measure["change"]
    for name, measure in quality.get("seams", {"measures": {}})["measures"].items():
        scalars[f"longgen/seam/{name}/change"] = measure["change"]
    return scalars


def recall_scalars(recalls: Recalls, window_sec: float) -> dict[str, float]:
    """Recall by TensorBoard tag.

    Accuracy and NLL of each group and bin with the memory kept, and the accuracy beyond the window
    of own and heard facts together with each memory.

    Args:
        recalls: content of `probes.json`.
        window_sec: attention's context.
    """
    scalars = {
        f"longgen/recall/{group}/{name}/gap_{gap:04g}": value
        for group, bins in recalls["kept"].items()
        for name in ("accuracy", "nll")
        for gap, value in zip(bins["gap_sec"], bins[name], strict=True)
    }
    pooled = beyond_window(recalls, window_sec).get(EVERYONE, {})
    return scalars | {
        f"longgen/recall/beyond_window/{memory}": one.share for memory, one in pooled.items()
    }
