"""Recall of memory probes on the pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import BINS, RECALL, make_trace, remembered, write_evaluation

from moshi_ttt.files import write_json
from moshi_ttt.report import compare_report, write_report
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.recall import gap_positions, recall_figure, recall_overlay_figure
from moshi_ttt.report.recall_words import recall_finding, recall_numbers

CONTROLS = (", memory reset", ", memory exchanged")


def test_the_finding_tells_recall_within_the_window_from_beyond_it() -> None:
    text = recall_finding(make_trace(context_steps=375), RECALL)
    assert "window of 30 s, 80% of 150 words are right (about 4 to 20 s)" in text
    assert "beyond it, 16% of 50 words are right (about 60 to 240 s)" in text
    assert "would give 10%" in text
    assert "beyond it, no probe was asked" in recall_finding(make_trace(context_steps=3000), RECALL)
    # one class and no memory: nothing to tell apart
    assert "By class" not in text
    assert "memory" not in text


def test_the_finding_says_that_the_memory_is_used_only_if_it_beats_both_controls() -> None:
    trace = make_trace(context_steps=375)
    text = recall_finding(trace, remembered(0.9, 0.1, 0.1))
    assert "By class, beyond the window: own 90% (79% to 96% of 50 words); heard 16%" in text
    assert "with a memory taken away just before the question" in text
    assert "with a memory of another conversation" in text
    assert "So the memory is used (shown for own facts)." in text
    for other in (0.9, None):
        text = recall_finding(trace, remembered(0.9, 0.1, other))
        assert "is used is not shown" in text
        assert ("single recording" in text) == (other is None)


def test_all_numbers_stand_in_a_folded_table() -> None:
    (table,) = recall_numbers(remembered(0.9, 0.1, 0.2))
    assert table.startswith("<details>")
    assert table.count("<tr>") == 1 + 2 * 3 * 4
    assert "<td>own</td><td>other</td>" in table
    assert recall_numbers(None) == []


def test_reports_show_recall_with_probes_and_nothing_of_it_without(tmp_path: Path) -> None:
    run, plain = tmp_path / "probed", tmp_path / "plain"
    for folder in (run, plain):
        for epoch in range(2):
            write_evaluation(folder / f"longgen/epoch_{epoch:03d}", make_trace(seed=epoch), clips=0)
    before = write_report(plain).read_text()
    for epoch in range(2):
        write_json(run / f"longgen/epoch_{epoch:03d}/probes.json", RECALL)
    text = write_report(run).read_text()
    assert "Asked for a fact" in text
    assert "memory probe" in text
    # once for the latest evaluation, once for all of them
    assert text.count("<img") == before.count("<img") + 2
    assert "probe" not in before
    assert "recall" not in before
    assert "Recall of planted facts, all numbers" in text
    write_json(run / "longgen/epoch_001/probes.json", remembered(0.9, 0.1, 0.1))
    assert "So the memory is used" in write_report(run).read_text()
    both = compare_report([run, plain], tmp_path / "both.html").read_text()
    assert 'alt="comparison: recall"' in both


@pytest.mark.filterwarnings("error")
def test_the_figure_marks_chance_context_and_trained_length() -> None:
    traces = [make_trace(context_steps=375, trained_steps=188), make_trace(context_steps=750)]
    positions = [gap_positions(trace) for trace in traces]
    one_bin = {"kept": {"own": {key: values[:1] for key, values in BINS.items()}}}
    for recalls in (RECALL, one_bin, {"kept": {"heard_unseen": BINS}}):
        assert pixels(recall_figure(recalls, positions[0])).std() > 5
    for runs in ({"a": RECALL, "b": one_bin}, {"a": RECALL}, {"a": RECALL, "b": RECALL}):
        figure = recall_overlay_figure(runs, positions[: len(runs)])
        assert pixels(figure).std() > 5
    figure = recall_figure(RECALL, {"C": 30.0, "trained length": 15.04})
    assert positions[0] == {"C": 30.0, "trained length": 15.04}
    accuracy, nll = figure.axes
    texts = [text.get_text() for text in accuracy.texts]
    assert texts == ["chance", "C\n30 s", "trained length\n15.04 s"]
    assert nll.get_xscale() == "log"
    assert next(label.get_text() for label in nll.get_xticklabels()) == "4 s\n100"
    # the curve, chance, C, trained length
    assert len(accuracy.lines) == 4
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), BINS["accuracy"])


@pytest.mark.filterwarnings("error")
def test_the_figure_of_a_memory_shows_both_classes_and_thin_controls() -> None:
    recalls = remembered(0.9, 0.1, 0.2)
    accuracy, nll = recall_figure(recalls, {"C": 30.0}).axes
    lines = {line.get_label(): line for line in accuracy.lines}
    named = [f"{kind}{memory}" for kind in ("own", "heard") for memory in ("", *CONTROLS)]
    assert {label for label in lines if not str(label).startswith("_")} == set(named)
    for kind in ("own", "heard"):
        for control in CONTROLS:
            assert lines[kind + control].get_linewidth() < lines[kind].get_linewidth()
            assert lines[kind + control].get_color() == lines[kind].get_color()
    shown = lines["own, memory exchanged"].get_ydata()
    np.testing.assert_array_equal(shown, recalls["other"]["own"]["accuracy"])
    assert next(label.get_text() for label in nll.get_xticklabels()) == "4 s\n100\n100"


@pytest.mark.filterwarnings("error")
def test_the_overlay_has_a_panel_a_class_and_a_curve_a_run_with_its_memory_kept() -> None:
    runs = {"base": RECALL, "memory": remembered(0.9, 0.1, 0.2), "heard": {"kept": {"heard": BINS}}}
    figure = recall_overlay_figure(runs, [{"C": 30.0}] * 3)
    own, heard, _ = figure.axes
    # beside the curves: chance, C, and the run that stands in the legend alone
    assert len(own.lines) == 2 + 2 + 1
    assert len(heard.lines) == 2 + 2
    np.testing.assert_array_equal(own.lines[1].get_ydata(), [0.9, 0.6, 0.9, 0.9])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
