"""Scalars of one run, a number for each position worth one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from synthetic_trace import make_trace, quiet, trace_of

from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.evaluation.scalars import position_summary


def test_summary_of_a_hybrid_with_a_jump() -> None:
    trace = make_trace(jump_at=763)
    jumps = find_jumps(trace)
    scalars = position_summary(trace, jumps)
    assert scalars["longgen/jump/count"] == 1
    assert scalars["longgen/jump/step"] == jumps[0].step
    assert scalars["longgen/jump/seconds"] == pytest.approx(0.08 * jumps[0].step)
    assert scalars["longgen/jump/legacy_token"] == 8 * jumps[0].step
    assert scalars["longgen/jump/ratio"] == pytest.approx(1.5, rel=0.06)
    assert scalars["longgen/jump/ratio/layer_03"] == jumps[0].layer_ratios[-1]
    assert "longgen/jump/ratio/layer_00" not in scalars
    norm = np.median(np.median(trace.input_norm[:, 3, 100:150], axis=-1))
    assert scalars["longgen/input_norm/layer_03/start"] == pytest.approx(float(norm))
    assert scalars["longgen/input_norm/layer_03/growth"] == pytest.approx(1.5, rel=0.1)
    assert scalars["longgen/ratio_at_C/layer_03"] == pytest.approx(1, rel=0.1)
    assert scalars["longgen/ratio_at_2C/layer_03"] == pytest.approx(1.5, rel=0.1)
    for layer, index in ((2, 0), (3, 1)):
        ratio = float(np.median(trace.branch_ratio[:, index, 100:]))
        assert scalars[f"memory/branch_ratio/layer_{layer:02d}"] == pytest.approx(ratio)
        assert math.isnan(scalars[f"memory/fast_weight_change/layer_{layer:02d}"])
    trace.fast_weight_norm[:, 0], trace.fast_weight_distance[:, 0] = 4.0, 1.0
    trace.fast_weight_distance[:, 0, -1] = [1.0, 2.0, 2.0, 3.0]
    moved = position_summary(trace, [])
    assert moved["memory/fast_weight_change/layer_02"] == 0.5
    assert moved["memory/fast_weight_norm/layer_02"] == 4
    lasting = dataclasses.replace(trace, head_forgetting=np.array([[1e-2, 1e-3], [1e-4, 0.5]]))
    slowest = position_summary(lasting, [])
    assert slowest["memory/half_life_sec/layer_02"] == pytest.approx(0.08 * math.log(2) / 1e-3)
    assert slowest["memory/half_life_sec/layer_03"] == pytest.approx(0.08 * math.log(2) / 1e-4)
    assert scalars["longgen/entropy/text/end"] == pytest.approx(1.5, rel=0.1)


def test_growth_is_counted_apart_from_jumps() -> None:
    ramp = np.log(1.6) * np.clip((np.arange(900) - 300) / 100, 0, 1)
    scalars = position_summary(grown := trace_of(quiet() + ramp), find_jumps(grown))
    assert scalars["longgen/jump/count"] == 0
    assert math.isnan(scalars["longgen/jump/ratio"])
    assert scalars["longgen/growth/count"] == 1
    assert scalars["longgen/growth/ratio"] == pytest.approx(1.6, rel=0.1)
    both = trace_of(quiet() + ramp + np.log(1.5) * (np.arange(900) >= 700))
    scalars = position_summary(both, find_jumps(both))
    assert (scalars["longgen/jump/count"], scalars["longgen/growth/count"]) == (1, 1)
    assert scalars["longgen/jump/step"] == pytest.approx(700, abs=5)


@pytest.mark.filterwarnings("error")
def test_summary_of_norms_that_are_not_finite_is_nan_without_a_warning() -> None:
    trace = make_trace()
    trace.input_norm[:, 0, 300:] = np.inf
    trace.input_norm[:, 1, 300:] = np.nan
    scalars = position_summary(trace, find_jumps(trace))
    for layer in (0, 1):
        assert math.isfinite(scalars[f"longgen/input_norm/layer_{layer:02d}/start"])
        assert math.isnan(scalars[f"longgen/input_norm/layer_{layer:02d}/growth"])
        assert math.isnan(scalars[f"longgen/ratio_at_C/layer_{layer:02d}"])
    assert math.isfinite(scalars["longgen/ratio_at_C/layer_02"])


def test_summary_is_nan_where_nothing_is_defined() -> None:
    trace = make_trace(hybrid_layers=(), context_steps=600)
    scalars = position_summary(trace, [])
    assert scalars["longgen/jump/count"] == scalars["longgen/growth/count"] == 0
    assert math.isnan(scalars["longgen/growth/ratio"])
    for tag in ("step", "seconds", "legacy_token", "ratio"):
        assert math.isnan(scalars[f"longgen/jump/{tag}"])
    assert math.isfinite(scalars["longgen/ratio_at_C/layer_00"])
    assert math.isnan(scalars["longgen/ratio_at_2C/layer_00"])
    assert not any(tag.startswith("memory/") for tag in scalars)
    assert all(isinstance(value, float) for value in scalars.values())
