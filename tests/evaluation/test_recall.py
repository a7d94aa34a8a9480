"""Recall of memory probes in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fakes import random_recording

from moshi_ttt.data import Probe
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.model.source import open_source


def test_an_evaluation_writes_recall_only_where_there_are_probes(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = source.lm(context_steps=12)
    run = LongRunConfig(
        **{"seconds": 3.0, "prompts": 1, "seeds": 1, "prompt_sec": 0.8, "audio_streams": 0},
        nll_recordings=1,
    )
    word = Probe("day", 9.0, 0.1, (range(50, 52),))
    ignored = Probe("day", 60.0, 0.1, (range(50, 52),))
    recordings = [random_recording(60, (word,)), random_recording(60, (ignored,))]
    folder = tmp_path / "run"
    kept = {"label": "x", "trained_steps": None}
    scalars = evaluate(lm, source, recordings, run, folder, **kept)  # type: ignore[arg-type]
    recall = json.loads((folder / "probes.json").read_text())
    assert (recall["gap_sec"], recall["words"]) == ([10], [1])
    assert scalars["longgen/recall/nll/gap_0010"] == pytest.approx(recall["nll"][0])
    assert "longgen/recall/accuracy/gap_0010" in scalars
    scalars = evaluate(lm, source, [random_recording(60, ())], run, folder, **kept)  # type: ignore[arg-type]
    assert not (folder / "probes.json").exists()
    assert not any("recall" in tag for tag in scalars)
