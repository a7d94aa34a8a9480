"""An evaluation in chunks: what its files, scalars and report say of the seams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from moshi_ttt.data import EncodedRecording
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.source import open_source
from moshi_ttt.report import write_report
from moshi_ttt.report.audible import SEAM_MEASURES, seam_section


def test_an_evaluation_in_chunks_measures_its_seams(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = source.lm(context_steps=30)
    add_memory(lm, MemoryConfig(layers="last:1"))
    codes = torch.randint(0, 512, (17, 100), generator=torch.Generator().manual_seed(0))
    codes[0] = 3
    config = LongRunConfig(
        seconds=6, prompts=1, prompt_sec=0.8, chunk_sec=2, reprompt_sec=0.8, nll_sec=4
    )
    folder = tmp_path / "longgen" / "evaluation"
    recordings = [EncodedRecording("a", codes)]
    scalars = evaluate(lm, source, recordings, config, folder, label="x", trained_steps=25)
    trace = Trace.load(folder)
    seams = json.loads((folder / "quality.json").read_text())["seams"]
    assert seams["steps"] == [25, 50]
    assert seams["window_steps"] == 8
    assert list(seams["measures"]) == ["norm_step", *(n for n in SEAM_MEASURES if n != "norm_step")]
    assert all(np.isfinite(list(one.values())).all() for one in seams["measures"].values())
    for name in SEAM_MEASURES:
        assert scalars[f"longgen/seam/{name}/change"] == seams["measures"][name]["change"]
    # attention begins afresh with ten steps and the memory goes on
    assert trace.ring_end_offset[0, 0].tolist() == [*range(1, 26), *range(11, 36), *range(11, 36)]
    assert trace.inner_updates[0, 0, -1] == trace.steps == 75
    page = write_report(tmp_path).read_text()
    assert "Do the seams show?" in page
    assert "2 seams in each stream" in page
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    turns = [event["step"] for event in events if event["event"] == "ring_turn"]
    assert turns == [45, 70]


def test_without_seams_there_is_no_section_and_with_too_early_ones_a_sentence() -> None:
    assert seam_section({}) == []
    nowhere = seam_section({"seams": {"steps": [], "measures": {}, "window_steps": 5}})
    assert "No seam" in nowhere[1]
