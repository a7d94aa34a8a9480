"""What a profile of a fit adds up."""

from __future__ import annotations

from profile_fit import busy_us


def test_kernels_that_run_side_by_side_count_once() -> None:
    assert busy_us([(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (6.0, 7.0)]) == 3.0 + 4.0
    assert busy_us([]) == 0.0
