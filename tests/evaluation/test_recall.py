"""Recall of memory probes in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fakes import random_recording

from moshi_ttt.data import Probe
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.source import open_source
from moshi_ttt.report import write_report


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
    content = json.loads((folder / "probes.json").read_text())
    assert content.keys() == {"kept"}
    assert content["kept"].keys() == {"own"}
    recall = content["kept"]["own"]
    assert (recall["gap_sec"], recall["words"]) == ([10], [1])
    assert scalars["longgen/recall/own/nll/gap_0010"] == pytest.approx(recall["nll"][0])
    assert "longgen/recall/own/accuracy/gap_0010" in scalars
    # the context is 1 s
    assert scalars["longgen/recall/beyond_window/kept"] == recall["accuracy"][0]
    scalars = evaluate(lm, source, [random_recording(60, ())], run, folder, **kept)  # type: ignore[arg-type]
    assert not (folder / "probes.json").exists()
    assert not any("recall" in tag for tag in scalars)


def test_with_a_memory_its_controls_are_written_and_shown_too(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = source.lm(context_steps=12)
    add_memory(lm, MemoryConfig(layers="last:1"))
    run = LongRunConfig(
        **{"seconds": 3.0, "prompts": 1, "seeds": 1, "prompt_sec": 0.8, "audio_streams": 0},
        nll_recordings=2,
    )
    word = Probe("day", 9.0, 0.1, (range(50, 52),), asked_step=45)
    recordings = [random_recording(60, (word,)), random_recording(60, ())]
    scalars = evaluate(lm, source, recordings, run, tmp_path, label="x", trained_steps=None)
    content = json.loads((tmp_path / "probes.json").read_text())
    assert list(content) == ["kept", "reset", "other"]
    for memory, groups in content.items():
        assert groups["own"]["words"] == [1]
        accuracy = groups["own"]["accuracy"][0]
        assert scalars[f"longgen/recall/beyond_window/{memory}"] == accuracy
    assert "beyond it" in write_report(tmp_path).read_text()
