"""Rises that something else in the run could hide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from synthetic_trace import SHAPE, quiet, trace_of

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import find_jumps


@pytest.mark.parametrize(("streams", "ratio"), [(4, 1.5), (2, 2.0), (8, 1.3)])
def test_two_rises_do_not_hide_each_other(streams: int, ratio: float) -> None:
    """Rates on 300 runs each: docs/finding_the_jump.md."""
    both = 0
    for trial in range(20):
        log_norm = quiet((streams, *SHAPE[1:]), seed=trial)
        for at in (375, 750):
            log_norm[:, 2:, at:] += np.log(ratio)
        steps = [jump.step for jump in find_jumps(trace_of(log_norm))]
        both += len(steps) == 2 and steps == pytest.approx([375, 750], abs=25)
    assert both >= 19


def test_a_rise_is_found_on_a_falling_norm() -> None:
    """Rates on 300 runs each: docs/finding_the_jump.md."""
    found = 0
    fall = np.linspace(0, np.log(0.5), SHAPE[-1])
    for trial in range(20):
        log_norm = quiet(seed=trial) + fall
        assert find_jumps(trace_of(log_norm)) == []
        log_norm[:, 2:, 500:] += np.log(1.3)
        found += [jump.step for jump in find_jumps(trace_of(log_norm))] == pytest.approx(
            [500], abs=25
        )
    assert found >= 19


STEPS = np.arange(SHAPE[-1])


@pytest.mark.parametrize(
    ("growth", "begins", "ends"),
    [
        (lambda: np.log(2 - np.exp(-STEPS / 75)), 8, 120),
        (lambda: np.log(2) / (1 + np.exp(-(STEPS - 450) / 40)), 360, 540),
        (lambda: np.log(1.6) * np.clip((STEPS - 400) / 100, 0, 1), 400, 500),
    ],
    ids=["saturating", "logistic", "linear"],
)
def test_growth_is_told_from_a_step_with_its_beginning_and_end(
    growth: Callable[[], np.ndarray], begins: int, ends: int
) -> None:
    """Rates on 150 runs each: docs/finding_the_jump.md."""
    runs = [find_jumps(trace_of(quiet(seed=trial) + growth())) for trial in range(10)]
    assert max(map(len, runs)) == 1
    jumps = [jump for run in runs for jump in run]
    assert len(jumps) >= 9
    for jump in jumps:
        assert jump.gradual
        assert jump.first_step == pytest.approx(begins, abs=40)
        assert jump.last_step == pytest.approx(ends, abs=40)
        assert jump.first_step <= jump.step <= jump.last_step
        assert 1.45 < jump.ratio < 2.1
        first, last = (Clock().describe(step) for step in (jump.first_step, jump.last_step))
        assert jump.describe(Clock()).startswith(f"input norm grows x{jump.ratio:.2f} from {first}")
        assert f" to {last}; layers " in jump.describe(Clock())


@pytest.mark.parametrize("ratio", [1.25, 1.68])
def test_a_step_is_no_growth(ratio: float) -> None:
    for trial in range(10):
        (jump,) = find_jumps(trace_of(quiet(seed=trial) + np.log(ratio) * (STEPS >= 500)))
        assert not jump.gradual
        assert jump.step == pytest.approx(500, abs=25)
