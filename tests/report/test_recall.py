"""Recall of memory probes on the pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import RECALL, make_trace, write_evaluation

from moshi_ttt.files import write_json
from moshi_ttt.report import compare_report, write_report
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.recall import gap_positions, recall_figure, recall_finding


def test_the_finding_tells_recall_within_the_window_from_beyond_it() -> None:
    text = recall_finding(make_trace(context_steps=375), RECALL)
    assert "window of 30 s, 80% of 150 words are right (about 4 to 20 s)" in text
    assert "beyond it, 16% of 50 words are right (about 60 to 240 s)" in text
    assert "would give 10%" in text
    assert "beyond it, no probe was asked" in recall_finding(make_trace(context_steps=3000), RECALL)


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
    both = compare_report([run, plain], tmp_path / "both.html").read_text()
    assert 'alt="comparison: recall"' in both


@pytest.mark.filterwarnings("error")
def test_the_figure_marks_chance_context_and_trained_length() -> None:
    traces = [make_trace(context_steps=375, trained_steps=188), make_trace(context_steps=750)]
    positions = [gap_positions(trace) for trace in traces]
    one_bin = {key: values[:1] for key, values in RECALL.items()}
    for curves in ({"a": RECALL}, {"a": RECALL, "b": one_bin}, {"a": one_bin}):
        figure = recall_figure(curves, positions[: len(curves)])
        assert pixels(figure).std() > 5
    figure = recall_figure({"a": RECALL}, [{"C": 30.0, "trained length": 15.04}])
    assert positions[0] == {"C": 30.0, "trained length": 15.04}
    accuracy, nll = figure.axes
    texts = [text.get_text() for text in accuracy.texts]
    assert texts == ["chance", "C\n30 s", "trained length\n15.04 s"]
    assert nll.get_xscale() == "log"
    assert next(label.get_text() for label in nll.get_xticklabels()) == "4 s\n100"
    # the curve, chance, C, trained length
    assert len(accuracy.lines) == 4
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), RECALL["accuracy"])
