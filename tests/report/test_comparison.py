"""What can be compared of several evaluations, and what is warned of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.files import write_json
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.comparison import (
    common_contexts,
    common_losses,
    comparison_lines,
    comparison_section,
)
from moshi_ttt.report.intervals import loss_difference, share_difference
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.controls import Share
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
    assert loss_difference(found["text"][1], found["text"][0]) == "-0.500 [-0.500, -0.500]"


def test_an_interval_is_that_of_paired_differences() -> None:
    reference = np.array([1.0, 5.0, 2.0, 9.0])
    changes = np.array([0.1, 0.3, 0.1, 0.3])
    found = loss_difference(reference + changes, reference)
    half = 3.182 * np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2  # Student's t, 3 degrees of freedom
    assert found == f"+0.200 [{0.2 - half:+.3f}, {0.2 + half:+.3f}]"
    some = np.append(reference, np.nan), np.append(reference, 1.0)
    assert loss_difference(some[0] + np.append(changes, 0), some[1]) == found
    assert loss_difference(reference[:1] + 1, reference[:1]) == "+1.000"
    assert loss_difference(reference[:0], reference[:0]) == "-"


def test_an_interval_of_shares_is_newcombes() -> None:
    # his example: 56 of 70 against 48 of 80 (Statistics in Medicine 17, 1998, table II)
    assert share_difference(Share(56, 70), Share(48, 80)) == "+20% [+5%, +33%]"
    assert share_difference(Share(0, 10), Share(0, 10)) == "+0% [-28%, +28%]"


def contexts(stretches: list[int], level: float, **changes: Any) -> dict[str, Any]:
    losses = [[level + one, level + one - 0.25] for one in stretches]
    found = {"context_sec": [10.0, 100.0], "target_sec": 5.0, "stretches": stretches}
    return found | dict.fromkeys(GROUPS, losses) | changes


def test_losses_behind_contexts_are_of_the_stretches_that_all_have() -> None:
    found = common_contexts([contexts([7, 8, 9], 1.0), contexts([9, 8, 1], 0.5)])
    assert list(found)[:2] == ["loss behind 10 s, text", "loss behind 100 s, text"]
    for name, loss in found.items():
        shift = 0.25 * ("100 s" in name)
        np.testing.assert_allclose(loss, np.array([[9, 10], [8.5, 9.5]]) - shift)
    one = contexts([7], 1.0)
    for other in (None, contexts([8], 1.0), contexts([7], 1.0, target_sec=4.0)):
        assert common_contexts([one, other]) == {}
    fewer = contexts([7], 1.0, context_sec=[100.0])
    assert len(common_contexts([one, fewer | {group: [[1.0]] for group in GROUPS}])) == 3


@pytest.mark.parametrize("other", [None, losses([0], 1.0) | {"window_steps": 60}])
def test_windows_of_another_kind_are_not_compared(other: dict[str, Any] | None) -> None:
    assert common_losses([losses([0, 50], 1.0), other]) == (pytest.approx(np.array([])), {})


def evaluation(
    folder: Path, trace: Trace, nll: dict[str, Any], words: float, right: float = 0.5
) -> Evaluation:
    write_evaluation(folder, trace, clips=0)
    write_json(folder / "nll.json", nll)
    bins = {"gap_sec": [60], "words": [words], "accuracy": [right], "chance": [0.1], "nll": [1.0]}
    write_json(folder / "probes.json", {"kept": {"own": bins}})
    write_json(folder / "contexts.json", contexts([int(words), 20], nll["text"][0] - 20))
    return Evaluation.load(folder)


def test_what_differs_between_runs_is_said(tmp_path: Path) -> None:
    nll = losses([0, 50, 100], 2.0)
    traces = {"a": make_trace(), "b": make_trace(), "c": make_trace(shape=(2, 2, 700))}
    evaluations = {
        "a": evaluation(tmp_path / "a", traces["a"], nll, 8),
        "b": evaluation(tmp_path / "b", traces["b"], losses([0, 50, 100], 1.9), 8, right=0.75),
        "c": evaluation(tmp_path / "c", traces["c"], nll | {"recordings": [4] * 3}, 9),
    }
    (table, _) = comparison_section(
        {name: evaluations[name] for name in "ab"}, {name: traces[name] for name in "ab"}
    )
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    by_name = {row[0]: row[1:] for row in cells}
    assert by_name["recall, own, kept"] == ["50% [22%, 78%]", "75% [41%, 93%] (+25% [-19%, +59%])"]
    assert by_name["loss behind 10 s, text"] == ["-4.000", "-4.100 (-0.100 [-0.100, -0.100])"]
    assert by_name["loss by position, text"] == ["2.050", "1.950 (-0.100 [-0.100, -0.100])"]
    lines = comparison_lines(
        {name: evaluations[name] for name in "ab"}, {name: traces[name] for name in "ab"}
    )
    assert lines[0] == "recall, own, kept: a 50% [22%, 78%]; b 75% [41%, 93%] (+25% [-19%, +59%])"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "loss behind 10 s, text",
        "loss behind 100 s, text",
        "loss by position, text",
    ]
    *warned, table, _ = comparison_section(evaluations, traces)
    text = " ".join(warned)
    for part in (
        "different lengths",
        "different prompts",
        "numbers of recordings",
        "behind contexts are of different recordings",
        "different questions",
    ):
        assert part in text
    assert table.count("<tr>") == 1 + 1 + 6 + 3
