"""Rises that something else in the run could hide."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_trace import SHAPE, quiet, trace_of

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
