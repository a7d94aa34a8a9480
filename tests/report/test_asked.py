"""Recall by when it was asked for, and by what else was said since, on the pages."""

from __future__ import annotations

from typing import Any

from synthetic_trace import BINS, make_trace

from moshi_ttt.clock import Clock
from moshi_ttt.report.asked import asked_at_times, asked_figure, asked_finding, asked_spans
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.recall_words import rivals_finding
from moshi_ttt.report.study import Variant
from moshi_ttt.report.study_table import study_table
from moshi_ttt.teacher_forcing.controls import Recalls, Share


def asked(*minutes: float) -> Recalls:
    """Ten words a minute, half of them beyond a window of 30 s: all right, then none at last."""
    steps = [round(750 * minute) for minute in minutes]
    last = len(minutes) - 1
    kept = BINS | {
        "asked_step": [step for step in steps for _ in range(2)],
        "asked_gap_sec": [4, 60] * len(minutes),
        "asked_words": [5, 5] * len(minutes),
        "asked_right": [right for at in range(len(minutes)) for right in (0, 5 * (at < last))],
    }
    return {"kept": {"own": kept}, "reset": {"own": kept | {"asked_right": [0.0] * 2 * (last + 1)}}}


def test_short_conversations_are_told_by_minutes_and_long_ones_in_fives() -> None:
    length, short = asked_spans(asked(0.2, 0.9, 4.5), 30, "own", Clock())
    assert length == 1
    assert short["kept"] == {0: Share(10, 10), 4: Share(0, 5)}
    assert short["reset"] == {0: Share(0, 10), 4: Share(0, 5)}
    length, long = asked_spans(asked(1, 4, 6, 29), 30, "own", Clock())
    assert length == 5
    assert long["kept"] == {0: Share(10, 10), 5: Share(5, 5), 25: Share(0, 5)}
    assert asked_spans({"kept": {"own": BINS}}, 30, "own", Clock()) == (1, {})


def test_the_finding_parts_the_answers_in_two_halves_of_time() -> None:
    trace = make_trace(context_steps=375)
    (text,) = asked_finding(asked(0, 1, 2, 3), trace)
    assert "100% (72% to 100% of 10 words) before minute 2.0" in text
    assert "50% (24% to 76% of 10 words) from then on" in text
    # all at once, or nobody knows when
    assert asked_finding(asked(1), trace) == []
    assert asked_finding({"kept": {"own": BINS}}, trace) == []
    assert asked_finding({"kept": {}}, trace) == []


def test_the_figure_has_a_line_for_each_memory_and_is_left_out_without_a_second_span() -> None:
    trace = make_trace(context_steps=375)
    figure = asked_figure(asked(0, 1, 2), trace)
    assert [line.get_label() for line in figure.axes[0].lines] == ["own", "own, memory reset"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [1, 1, 0]
    assert pixels(figure).std() > 1
    assert asked_at_times(asked(0, 1), trace)
    assert not asked_at_times(asked(1), trace)
    assert not asked_at_times({"kept": {"own": BINS}}, trace)


def rivals(*counts: int) -> Recalls:
    """Ten words beyond a window of 30 s for each number of rivals: all right, then half, none."""
    kept = BINS | {
        "rival_count": [*counts, 1],
        "rival_gap_sec": [60.0] * len(counts) + [4.0],
        "rival_words": [10] * (len(counts) + 1),
        "rival_right": [*(10 - 5 * count for count in counts), 0],
    }
    return {
        "kept": {"own": kept},
        "reset": {"own": kept | {"rival_right": [0] * (len(counts) + 1)}},
    }


def test_the_finding_tells_answers_apart_by_what_was_said_since() -> None:
    trace = make_trace(context_steps=375)
    (text,) = rivals_finding(rivals(0, 1, 2), trace)
    assert "none 100% (72% to 100% of 10 words), one 50% (24% to 76% of 10 words)" in text
    assert "two or more 0% (0% to 28% of 10 words)." in text
    # nothing to compare, or nobody knows
    assert rivals_finding(rivals(0), trace) == []
    assert rivals_finding({"kept": {"own": BINS}}, trace) == []
    assert rivals_finding({"kept": {}}, trace) == []


def study_record(recall: Recalls) -> Any:
    return {
        "variant": {"name": "memory", "steps": 5},
        "trained_sec": 1.0,
        "parameters": 5,
        "context_steps": 375,
        "context_sec": 30.0,
        "recall": recall,
        "nll": {"window_steps": 750, "start_step": [], "recordings": []}
        | {group: [] for group in ("text", "first_codebook", "other_codebooks")},
        "gates": {},
        "branch_ratios": {},
    }


def test_a_study_has_a_row_for_each_memory() -> None:
    record = study_record(asked(1, 6))
    table = study_table([Variant("memory", (record,))])
    assert "| variant | memory | minute 2 | minute 7 |" in table
    assert "| memory | kept | 100 [57 to 100] | 0 [0 to 43] |" in table
    assert "| memory | reset | 0 [0 to 43] | 0 [0 to 43] |" in table
    later = {**record, "recall": asked(1, 6, 29)}
    assert "| minute 1 to 5 | minute 6 to 10 | minute 26 to 30 |" in study_table(
        [Variant("memory", (later,))]
    )
    assert "by when" not in study_table([Variant("memory", (record | {"recall": {}},))])
    table = study_table([Variant("memory", (study_record(rivals(0, 2)),))])
    assert "| variant | memory | none | one | two or more |" in table
    assert "| memory | kept | 100 [72 to 100] | - | 0 [0 to 28] |" in table
    assert "| memory | reset | 0 [0 to 28] | - | 0 [0 to 28] |" in table
    assert "by rivals" not in study_table([Variant("memory", (record,))])
