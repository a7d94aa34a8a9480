"""The verdict in simulated worlds in which one hypothesis, or none, is true."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_trace import noise
from worlds import (
    ABSOLUTE,
    DRIFT,
    EVICTION,
    LINEAGE,
    MEMORY,
    SEEDS,
    STEPS,
    TRAINED,
    WORLDS,
    Rise,
    absolute,
    beyond_training,
    drift,
    eviction,
    lineage,
    nothing,
    step_at,
    verdict,
    world,
)

from moshi_ttt.attribution.changepoint import (
    Interval,
    contrasts,
    held_out,
    onset,
    resampled_weights,
)
from moshi_ttt.attribution.conditions import Condition
from moshi_ttt.attribution.evidence import Evidence
from moshi_ttt.files import write_json


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WORLDS)
def test_the_true_hypothesis_is_the_only_one_supported(name: str, seed: int) -> None:
    rise, true, open_to = WORLDS[name]
    result = verdict(world(rise, seed=seed, trend=0.05))
    assert result.supported == [true], result.text()
    for one in result.findings:
        if one.hypothesis != true and one.hypothesis not in open_to:
            assert one.decision == "refuted", result.text()


@pytest.mark.parametrize("seed", SEEDS)
def test_growth_from_the_trained_length_on_needs_several_trained_lengths(seed: int) -> None:
    several = verdict(world(beyond_training, seed=seed, trained=(150, 300, 450)))
    assert several.supported == [TRAINED], several.text()
    single = verdict(world(beyond_training, seed=seed, trained=(188,)))
    assert single.decision(TRAINED) == "undecided"
    assert single.supported == [], single.text()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("trend", [0.0, 0.05])
def test_without_a_change_there_is_nothing_to_explain(seed: int, trend: float) -> None:
    result = verdict(world(nothing, seed=seed, trend=trend))
    assert result.change == "none", result.text()
    assert result.headline.startswith("nothing to explain")
    assert result.supported == []
    assert all(one.decision == "refuted" for one in result.findings), result.text()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("rise", "true"), [(lineage, LINEAGE), (absolute, ABSOLUTE), (nothing, None)]
)
def test_data_that_cannot_tell_leave_it_undecided(rise: Rise, true: str | None, seed: int) -> None:
    result = verdict(world(rise, sd=0.6, seed=seed))
    assert result.supported == []
    if true is not None:
        assert result.decision(true) == "undecided", result.text()
    else:
        assert result.headline.startswith("undecided")
        assert result.decision(ABSOLUTE) == "undecided"


def test_what_no_capacity_tells_alone_they_may_tell_together() -> None:
    finding = verdict(world(nothing, sd=0.2, seed=6, prompts=9, seeds=1)).findings[1]
    assert (finding.hypothesis, finding.decision) == (LINEAGE, "refuted")
    assert finding.reasons[0].startswith("no rise at 2C over all capacities: x1.03")
    for seed in SEEDS:  # and what is there is not averaged away
        there = world(lambda one: 0.4 * lineage(one), sd=0.12, seed=seed, prompts=9, seeds=1)
        assert verdict(there).decision(LINEAGE) != "refuted"


def test_two_streams_of_one_prompt_decide_nothing() -> None:
    few = verdict(world(lineage, prompts=1, seeds=2))
    assert {one.decision for one in few.findings} == {"undecided"}, few.text()


def test_sinks_that_do_not_help_speak_against_the_first_key() -> None:
    cells = world(lambda one: step_at(2 * one.context_steps))
    result = verdict(cells)
    assert result.decision(LINEAGE) == "refuted"
    assert result.supported == []
    without = [cell for cell in cells if not cell.condition.sinks]
    assert verdict(without).decision(LINEAGE) == "undecided"


def test_interventions_that_were_not_made_leave_their_hypotheses_undecided() -> None:
    cells = [
        cell
        for cell in world(drift)
        if cell.condition.regime == "free" and not cell.condition.gates_shut
    ]
    result = verdict(cells)
    assert result.decision(DRIFT) == "undecided"
    assert result.decision(MEMORY) == "undecided"
    assert "no run under teacher forcing to compare" in result.text()


def test_a_change_at_the_first_place_that_is_looked_at_can_be_compared() -> None:
    result = verdict(world(lambda one: step_at(104)))
    assert result.change == "step"
    assert {DRIFT, MEMORY} <= {
        one.hypothesis for one in result.findings if one.decision == "refuted"
    }, result.text()


def test_without_a_change_what_was_not_tried_stays_undecided() -> None:
    plain = verdict(world(nothing, memory=False, trained=(9_000,)))
    assert plain.change == "none"
    assert plain.decision(MEMORY) == "undecided"
    assert plain.decision(TRAINED) == "undecided"
    assert plain.decision(LINEAGE) == "refuted"


def test_a_change_in_a_model_without_memory_is_not_the_memorys() -> None:
    assert verdict(world(lineage, memory=False)).decision(MEMORY) == "refuted"


def test_the_verdict_gives_slope_and_removal_with_intervals(tmp_path) -> None:
    result = verdict(world(lineage))
    effects = next(one for one in result.findings if one.hypothesis == LINEAGE).effects
    slope, removed = effects["slope"], effects["removed_by_sinks"]
    assert slope.low <= 2 <= slope.high or slope.value == pytest.approx(2, abs=0.1)
    assert slope.high - slope.low < 0.5
    assert removed.low < 0.9 < removed.high or removed.value == pytest.approx(0.9, abs=0.08)
    assert "steps per step of C" in result.text()
    write_json(tmp_path / "verdict.json", result.record())
    record = json.loads((tmp_path / "verdict.json").read_text())
    assert record["supported"] == [LINEAGE]
    assert record["hypotheses"][EVICTION]["decision"] == "refuted"


def test_cells_of_different_streams_are_refused() -> None:
    cells = world(nothing)
    cells[3] = replace(cells[3], prompts=np.arange(9))
    with pytest.raises(ValueError, match="same streams"):
        Evidence(cells)
    with pytest.raises(ValueError, match="reference"):
        Evidence([cell for cell in cells if cell.condition.sinks])


def test_contrast_is_the_planted_ratio_and_ignores_a_steady_trend() -> None:
    level = step_at(300, 0.4) + np.linspace(0, 2, STEPS)
    result = contrasts(level)
    assert np.nanargmax(result) == 300
    assert result[300] == pytest.approx(0.4, abs=1e-6)
    assert contrasts(level, gap_steps=15)[310] == pytest.approx(0.4, abs=1e-6)
    assert np.isnan(result[:40]).all()
    assert np.isnan(result[-39:]).all()
    assert np.isnan(contrasts(level[:60])).all()


def test_a_rise_that_was_searched_for_in_noise_is_not_found_in_other_streams() -> None:
    generator = np.random.default_rng(0)
    searched, checked = [], []
    for _ in range(40):
        contrast = contrasts(noise(generator, (9, 1, 600), sd=0.1)[:, 0])
        searched.append(np.nanmax(contrast.mean(axis=0)))
        checked.append(held_out(contrast, np.repeat(np.arange(3), 3)).mean())
    assert np.mean(searched) > 0.05
    assert abs(np.mean(checked)) < 0.015


def test_onset_is_where_growth_begins() -> None:
    curve = 0.002 * np.maximum(0, np.arange(700) - 420) + 0.01 * np.sin(np.arange(700))
    assert onset(curve[None])[0] == pytest.approx(420, abs=15)
    assert np.isnan(onset(-curve[None])[0])
    assert np.isnan(onset(np.zeros((1, 50)))[0])


def test_resampling_draws_prompts_then_streams() -> None:
    prompts = np.repeat(np.arange(3), 4)
    weights = resampled_weights(prompts, resamples=300)
    assert weights.sum(axis=1) == pytest.approx(np.ones(300))
    per_prompt = weights.reshape(300, 3, 4).sum(axis=-1)
    # prompts come in thirds: none, one, two or three of the three draws
    assert np.allclose(per_prompt * 3, np.round(per_prompt * 3))
    assert (per_prompt == 0).any()


def test_an_interval_of_what_most_resamples_do_not_have_is_unknown() -> None:
    assert not Interval.of(1.0, np.array([1.0, np.nan, np.nan]), 9).known
    assert Interval.of(1.0, np.array([1.0, 2.0, np.nan]), 9).known
    assert Interval(0.91, 0.85, 0.96).text(".0f", 100) == "91 [85, 96]"


def test_an_intervention_that_makes_the_norm_rise_is_told() -> None:
    result = verdict(world(lambda one: (one.regime == "silent") * np.linspace(0, 0.4, STEPS)))
    assert result.change == "none"
    told = [line for line in result.observations if "of the plain run" in line]
    assert len(told) == 1
    assert "silent" in told[0]


def test_runs_with_a_silent_user_can_be_the_plain_ones() -> None:
    def turned(one: Condition) -> Condition:
        other = {"free": "silent", "silent": "free"}.get(one.regime, one.regime)
        return replace(one, regime=other)  # type: ignore[arg-type]

    cells = [replace(cell, condition=turned(cell.condition)) for cell in world(eviction)]
    result = verdict(cells)
    assert result.supported == [EVICTION], result.text()
    assert result.decision(DRIFT) == "undecided"
