"""Latency of steps."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from moshi_ttt.instruments.latency import MARKS_KEPT, StepTimer


def test_every_step_has_its_time_however_long_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 3 * MARKS_KEPT + 7
    expected = np.linspace(0.01, 0.02, steps)
    ends = itertools.chain([0.0], expected.cumsum())
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    timer = StepTimer(torch.device("cpu"))
    timer.start()
    for step in range(steps):
        timer.mark()
        assert len(timer._marks) <= 2 * MARKS_KEPT
        if step == MARKS_KEPT + 3:  # as a log reads, while it goes on
            np.testing.assert_allclose(timer.read_ms(2, 5), 1000 * expected[2:5], rtol=1e-5)
    np.testing.assert_allclose(timer.read_ms(0, steps), 1000 * expected, rtol=1e-5)
    beyond = timer.read_ms(steps - 1, steps + 2)
    np.testing.assert_allclose(beyond[0], 1000 * expected[-1], rtol=1e-5)
    assert np.isnan(beyond[1:]).all()
    assert np.isnan(StepTimer(torch.device("cpu")).read_ms(0, 2)).all()
