"""Lasting rises of the norm: found where they are, and not where they are not."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from synthetic_trace import SHAPE, make_trace, noise, quiet, trace_of

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump, find_jumps, ratios_at, spans
from moshi_ttt.diagnosis.rises import p_value
from moshi_ttt.errors import UserError
from moshi_ttt.files import write_json
from moshi_ttt.instruments.events import Event

TRIALS = 60


@pytest.mark.parametrize(
    ("streams", "ratio", "least"),
    [(4, 1.2, 0.8), (8, 1.2, 0.93), (4, 1.4, 0.98), (4, 1.68, 0.98), (1, 1.68, 0.95)],
)
def test_planted_steps_are_found_within_25_steps(streams: int, ratio: float, least: float) -> None:
    """Rates on 300 runs each: docs/finding_the_jump.md."""
    hits, elsewhere = 0, 0
    for trial in range(TRIALS):
        generator = np.random.default_rng(trial)
        log_norm = noise(generator, (streams, *SHAPE[1:]), sd=0.06)
        position = int(generator.integers(150, SHAPE[-1] - 140))
        log_norm[:, 2:, position:] += np.log(ratio)
        jumps = find_jumps(trace_of(log_norm))
        hits += any(abs(jump.step - position) <= 25 for jump in jumps)
        elsewhere += any(abs(jump.step - position) > 50 for jump in jumps)
    assert hits / TRIALS >= least
    assert elsewhere <= 1


def flat(generator: np.random.Generator) -> np.ndarray:
    return np.zeros(SHAPE)


def linear_growth(generator: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(np.log(np.linspace(1, 3, SHAPE[-1])), SHAPE)


def exponential_growth(generator: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(np.linspace(0, 1.5, SHAPE[-1]), SHAPE)


def growth_from_the_middle_on(generator: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(0.0015 * np.maximum(0, np.arange(SHAPE[-1]) - 400), SHAPE)


def slow_waves(generator: np.random.Generator) -> np.ndarray:
    waves = generator.uniform(0.5, 2) * np.linspace(0, 2 * np.pi, SHAPE[-1])
    return np.broadcast_to(0.3 * np.sin(waves + generator.uniform(0, 6)), SHAPE)


def random_walks(generator: np.random.Generator) -> np.ndarray:
    walk = np.cumsum(0.005 * generator.normal(size=(SHAPE[0], 1, SHAPE[-1])), axis=-1)
    return np.broadcast_to(walk, SHAPE)


def short_bursts(generator: np.random.Generator) -> np.ndarray:
    bursts = np.zeros(SHAPE)
    for start in generator.integers(50, SHAPE[-1] - 60, size=6):
        length = generator.integers(2, 40)
        bursts[..., start : start + length] += np.log(generator.uniform(1.5, 3))
    return bursts


def one_long_burst(generator: np.random.Generator) -> np.ndarray:
    burst = np.zeros(SHAPE)
    burst[..., 400 : 400 + generator.integers(40, 140)] = np.log(1.7)
    return burst


@pytest.mark.parametrize(
    "shape_of_norm",
    [
        flat,
        linear_growth,
        exponential_growth,
        growth_from_the_middle_on,
        slow_waves,
        random_walks,
        short_bursts,
        one_long_burst,
    ],
)
def test_no_alarm_without_a_lasting_step(
    shape_of_norm: Callable[[np.random.Generator], np.ndarray],
) -> None:
    """Rates on 300 runs each: docs/finding_the_jump.md."""
    alarms = 0
    for trial in range(TRIALS):
        generator = np.random.default_rng(1000 + trial)
        log_norm = noise(generator, SHAPE, sd=0.06) + shape_of_norm(generator)
        alarms += bool(find_jumps(trace_of(log_norm)))
    assert alarms <= 2


def test_layers_that_rise_together_are_one_jump_that_names_what_lies_nearest() -> None:
    trace = make_trace(jump_at=763)
    (jump,) = find_jumps(trace)
    assert abs(jump.step - 763) <= 3
    assert jump.layers == (1, 2, 3)
    assert jump.first_layer == 1
    assert jump.ratio == pytest.approx(1.5, rel=0.06)
    assert jump.layer_ratios == pytest.approx([1.5] * 3, rel=0.08)
    assert jump.agreement == 1
    assert jump.nearest == "2C = trained length = legacy token 6000"
    assert jump.distance_steps == jump.step - 750


def test_a_rise_at_the_end_of_the_prompt_is_told_so() -> None:
    (jump,) = find_jumps(make_trace(jump_at=100, trained_steps=None))
    assert jump.nearest == "prompt end"
    assert jump.distance_steps is not None
    assert abs(jump.distance_steps) <= 3


def test_a_run_without_structural_positions_has_no_nearest_one() -> None:
    log_norm = quiet((4, 4, 600))
    log_norm[..., 300:] += 0.5
    trace = trace_of(log_norm, context_steps=1000, prompt_steps=0, trained_steps=None)
    (jump,) = find_jumps(trace)
    assert jump.nearest is None
    assert jump.distance_steps is None


@pytest.mark.parametrize(("streams", "ratio"), [(1, 1.68), (4, 1.2), (4, 1.4)])
def test_the_interval_of_the_place_holds_it(streams: int, ratio: float) -> None:
    held, widths = [], []
    for trial in range(40):
        generator = np.random.default_rng(trial)
        log_norm = noise(generator, (streams, *SHAPE[1:]), sd=0.06)
        position = int(generator.integers(150, SHAPE[-1] - 140))
        log_norm[:, 2:, position:] += np.log(ratio)
        for jump in find_jumps(trace_of(log_norm)):
            if abs(jump.step - position) <= 50:
                held.append(jump.first_step <= position <= jump.last_step)
                widths.append(jump.last_step - jump.first_step)
    assert np.mean(held) > 0.85
    assert np.median(widths) < 50


def test_agreement_by_chance_is_told_from_agreement() -> None:
    generator = np.random.default_rng(0)
    log_norm = noise(generator, SHAPE, sd=0.06)
    log_norm[..., 500:] += np.log(1.4)
    (jump,) = find_jumps(trace_of(log_norm))
    assert jump.p_value < 0.01
    (alone,) = find_jumps(trace_of(log_norm[:1] + 0.3 * (np.arange(900) >= 500)))
    assert math.isnan(alone.p_value)
    # streams that rise as often as this, each at its own times, rise together by chance
    waves = np.stack([np.roll(np.repeat([0, 1, 0, 1, 0, 1], 150), 37 * row) for row in range(4)])
    assert p_value(0.4 * waves + 0.01 * log_norm[:, 0], 150, 50, generator) > 0.01


def test_two_separate_jumps_are_both_found_in_order() -> None:
    log_norm = quiet((4, 4, 1500))
    log_norm[..., 400:] += np.log(1.4)
    log_norm[:, 2:, 1000:] += np.log(1.7)
    jumps = find_jumps(trace_of(log_norm))
    assert [jump.step for jump in jumps] == pytest.approx([400, 1000], abs=5)
    assert [jump.layers for jump in jumps] == [(0, 1, 2, 3), (2, 3)]


def test_a_fall_is_no_jump() -> None:
    log_norm = quiet()
    log_norm[..., 500:] -= 0.5
    assert find_jumps(trace_of(log_norm)) == []


def test_a_rise_of_half_of_the_streams_is_no_jump() -> None:
    log_norm = quiet()
    log_norm[:2, :, 500:] += 0.7
    assert find_jumps(trace_of(log_norm)) == []


def test_streams_that_are_not_finite_are_left_out() -> None:
    trace = make_trace(jump_at=500)
    trace.input_norm[0, :, 700:] = np.nan
    trace.input_norm[1, 2, 300] = 0
    (jump,) = find_jumps(trace)
    assert abs(jump.step - 500) <= 3
    trace.input_norm[:] = np.nan
    assert find_jumps(trace) == []


def test_a_noiseless_step_has_a_finite_score() -> None:
    log_norm = np.zeros((1, 2, 600))
    log_norm[..., 300:] = np.log(1.5)
    (jump,) = find_jumps(trace_of(log_norm, prompt_steps=0))
    assert jump.step == 300
    assert math.isfinite(jump.score)


@pytest.mark.parametrize("steps", [9, 60, 199])
def test_a_run_shorter_than_four_windows_has_no_jump(steps: int) -> None:
    log_norm = quiet((2, 2, steps))
    log_norm[..., steps // 2 :] += 1
    assert find_jumps(trace_of(log_norm)) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window_steps": 2}, "window_steps=2"),
        ({"min_ratio": 0.9}, "min_ratio=0.9"),
        ({"min_score": -1}, "min_score=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_jumps(make_trace(), **setting)  # type: ignore[arg-type]


def test_seven_thousand_steps_of_32_layers_take_less_than_two_seconds() -> None:
    trace = trace_of(np.random.default_rng(0).normal(size=(8, 32, 7000)) * 0.1)
    start = time.monotonic()
    find_jumps(trace)
    assert time.monotonic() - start < 2


def test_a_jump_survives_json_with_all_three_clocks(tmp_path) -> None:
    (jump,) = find_jumps(make_trace(jump_at=763))
    event = jump.event()
    assert isinstance(event, Event)
    assert (event.kind, event.step) == ("jump", jump.step)
    write_json(tmp_path / "jump.json", jump.record(Clock()))
    record = json.loads((tmp_path / "jump.json").read_text())
    assert record["event"] == "jump"
    assert record["seconds"] == pytest.approx(0.08 * jump.step)
    assert record["legacy_token"] == 8 * jump.step
    assert record["first_layer"] == 1
    assert Jump.from_record(record) == jump
    (alone,) = find_jumps(make_trace(shape=(1, 4, 900), jump_at=763))
    write_json(tmp_path / "alone.json", alone.record(Clock()))
    read = Jump.from_record(json.loads((tmp_path / "alone.json").read_text()))
    assert math.isnan(read.p_value)
    assert read.step == alone.step


def test_records_of_another_version_are_refused_with_the_remedy() -> None:
    (jump,) = find_jumps(make_trace(jump_at=763))
    record = jump.record(Clock())
    for name in ("p_value", "first_step", "last_step"):
        del record[name]
    with pytest.raises(UserError, match=r"lacks p_value, first_step, last_step.*evaluate again"):
        Jump.from_record(record)


def test_a_jump_is_described_in_all_three_clocks() -> None:
    jump = Jump(763, 1.41, 9.0, 1.0, (0, 1, 3), (1.4, 1.41, 1.5), "2C", 13, 0.01, 760, 766, False)
    assert jump.describe(Clock()) == (
        "input norm x1.41 at step 763 (61.04 s, legacy token 6104), 13 steps after 2C; "
        "layers 0-1, 3"
    )


def test_spans_fold_runs_of_layers() -> None:
    assert spans([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"
    assert spans([]) == ""


def test_ratio_at_a_position_compares_the_windows_on_both_sides() -> None:
    trace = make_trace(jump_at=750)
    assert ratios_at(trace, 750) == pytest.approx([1, 1.5, 1.5, 1.5], rel=0.1)
    assert ratios_at(trace, 375) == pytest.approx([1, 1, 1, 1], rel=0.1)
    assert np.isnan(ratios_at(trace, 860)).all()
    assert np.isnan(ratios_at(trace, 40)).all()
