"""What can be compared of several evaluations, and what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.files import write_json
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.comparison import common_losses, comparison_section, difference
from moshi_ttt.rows import GROUPS
from tests.fakes.synthetic_trace import make_trace, write_evaluation


def losses(starts: list[int], level: float, missing: int | None = None) -> dict[str, Any]:
    values = [None if start == missing else level + start / 1000 for start in starts]
    groups: dict[str, list[float | None]] = dict.fromkeys(GROUPS, values)
    return {"window_steps": 50, "start_step": starts, "recordings": [3] * len(starts), **groups}


def test_only_windows_that_all_have_are_compared() -> None:
    short, long = losses([0, 50, 100], 2.0, missing=0), losses([0, 50, 100, 150, 200], 1.5)
    common, found = common_losses([short, long])
    assert common.tolist() == [50, 100]
    for loss in found.values():
        np.testing.assert_allclose(loss, [[2.05, 2.1], [1.55, 1.6]])
    # means over all that each has would make it 0.45
    assert difference(found["text"][1], found["text"][0]) == "-0.500 [-0.500, -0.500]"
    assert difference(found["text"][0], found["text"][0]) is None


def test_an_interval_is_that_of_paired_differences() -> None:
    reference = np.array([1.0, 5.0, 2.0, 9.0])
    found = difference(reference + np.array([0.1, 0.3, 0.1, 0.3]), reference)
    half = 1.96 * np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2
    assert found == f"+0.200 [{0.2 - half:+.3f}, {0.2 + half:+.3f}]"
    assert difference(reference[:1] + 1, reference[:1]) == "+1.000"


@pytest.mark.parametrize("other", [None, losses([0], 1.0) | {"window_steps": 60}])
def test_windows_of_another_kind_are_not_compared(other: dict[str, Any] | None) -> None:
    assert common_losses([losses([0, 50], 1.0), other]) == (pytest.approx(np.array([])), {})


def evaluation(folder: Path, trace: Trace, nll: dict[str, Any], words: float) -> Evaluation:
    write_evaluation(folder, trace, clips=0)
    write_json(folder / "nll.json", nll)
    bins = {"gap_sec": [60], "words": [words], "accuracy": [0.5], "chance": [0.1], "nll": [1.0]}
    write_json(folder / "probes.json", {"kept": {"own": bins}})
    return Evaluation.load(folder)


def test_what_differs_between_runs_is_said(tmp_path: Path) -> None:
    nll = losses([0, 50, 100], 2.0)
    traces = {"a": make_trace(), "b": make_trace(), "c": make_trace(shape=(2, 2, 700))}
    evaluations = {
        "a": evaluation(tmp_path / "a", traces["a"], nll, 8),
        "b": evaluation(tmp_path / "b", traces["b"], nll, 8),
        "c": evaluation(tmp_path / "c", traces["c"], nll | {"recordings": [4] * 3}, 9),
    }
    (table, _) = comparison_section(
        {name: evaluations[name] for name in "ab"}, {name: traces[name] for name in "ab"}
    )
    assert "50% (22% to 78% of 8 words)" in table
    *warned, table, _ = comparison_section(evaluations, traces)
    text = " ".join(warned)
    for part in (
        "different lengths",
        "different prompts",
        "numbers of recordings",
        "different questions",
    ):
        assert part in text
    assert table.count("<tr>") == 1 + 3
