"""An instrumented long generation: its folder, its events, and the programs around it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from moshi_ttt.command_line import parse
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory, hybrid_layers
from moshi_ttt.model.source import open_source
from moshi_ttt.report import write_report
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

STEPS, CONTEXT = 70, 30
CONFIG = LongRunConfig(
    seconds=STEPS * 0.08,
    prompts=2,
    seeds=2,
    prompt_sec=0.8,
    nll_window_sec=1.6,
    nll_sec=8.0,
    context_sec=(0.8, 1.6),
    audio_streams=1,
    quality_window_sec=0.8,
    attention_layers=(0, 5),
    attention_every_steps=10,
)


def recording(name: str, steps: int) -> EncodedRecording:
    generator = torch.Generator().manual_seed(len(name))
    codes = torch.randint(0, 512, (17, steps), generator=generator)
    codes[0] = 3
    return EncodedRecording(name, codes)


SMALL_MEMORY = MemoryConfig(
    rule="ttt_linear", projections="own", layers="last:1", head_dim=8, mini_batch_steps=8
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("run") / "longgen" / "epoch_001"
    source = open_source("tiny")
    lm = source.lm(context_steps=CONTEXT)
    add_memory(lm, SMALL_MEMORY)
    torch.nn.init.normal_(hybrid_layers(lm)[5].branch.gate, std=0.1)
    recordings = [recording("a", 60), recording("bb", 100)]
    scalars = evaluate(lm, source, recordings, CONFIG, folder, label="epoch 1", trained_steps=25)
    return folder, scalars


def test_the_trace_is_complete_and_comes_back_from_its_folder(
    evaluated: tuple[Path, dict[str, float]],
) -> None:
    trace = Trace.load(evaluated[0])
    assert trace.steps == STEPS
    # the recording that lasts as long as the generation comes first
    assert list(trace.streams) == [
        "bb from 0 s, seed 0",
        "bb from 0 s, seed 1",
        "a from 0 s, seed 0",
        "a from 0 s, seed 1",
    ]
    assert list(trace.hybrid_layers) == [5]
    assert trace.input_norm.shape == (4, 6, STEPS)
    assert trace.codes.shape == (4, 8, STEPS - 1)
    assert np.isfinite(trace.branch_ratio).all()
    assert (trace.inner_updates[:, 0] == np.arange(1, STEPS + 1) // 8).all()
    prompt = recording("a", 60).codes[1:9, :10].numpy()
    assert (trace.codes[2, :, :10] == prompt).all()
    # two seeds of a prompt share it and then part
    assert (trace.codes[2, :, :10] == trace.codes[3, :, :10]).all()
    assert (trace.codes[2] != trace.codes[3]).any()


def test_events_name_creation_eviction_and_every_turn_with_all_three_clocks(
    evaluated: tuple[Path, dict[str, float]],
) -> None:
    lines = (evaluated[0] / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    rings = ("cache_created", "first_eviction", "ring_turn")
    found = [(e["event"], e["step"], e.get("turn")) for e in events if e["event"] in rings]
    assert found == [
        ("cache_created", 0, None),
        ("cache_created", 0, None),
        ("first_eviction", CONTEXT, None),
        ("ring_turn", CONTEXT, 1),
        ("ring_turn", 2 * CONTEXT, 2),
    ]
    critical = [name for e in events if e["event"] == "critical_position" for name in e["names"]]
    assert critical == ["prompt end", "trained length", "C-1", "C", "C+1", "2C-1", "2C", "2C+1"]
    eviction = next(event for event in events if event["event"] == "first_eviction")
    assert eviction["seconds"] == pytest.approx(2.4)
    assert eviction["legacy_token"] == 240
    assert "transformer.layers.5.base.self_attn" in eviction["modules"]
    created = {event["role"]: event for event in events[:2]}
    assert {role: event["capacity_steps"] for role, event in created.items()} == {
        "temporal": CONTEXT,
        "depformer": 8,
    }
    assert created["temporal"]["capacity_sec"] == pytest.approx(2.4)
    assert created["temporal"]["size_bytes"] > 0


def test_summary_nll_and_audio_are_what_was_run(
    evaluated: tuple[Path, dict[str, float]],
) -> None:
    folder, scalars = evaluated
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["legacy_tokens"] == 8 * STEPS
    temporal = [ring for ring in summary["rings"] if ring["module"].startswith("transformer.")]
    assert all(ring["evicted_steps"] == STEPS - CONTEXT and ring["wraps"] == 2 for ring in temporal)
    assert summary["scalars"].keys() == scalars.keys()
    nll = json.loads((folder / "nll.json").read_text())
    assert nll["start_step"] == [0, 20, 40, 60, 80]  # further than was generated
    # random codes cannot be guessed: ln 512, and more for a model that is sure of something else
    assert all(np.log(512) - 0.2 < value < 3 * np.log(512) for value in nll["other_codebooks"])
    memory = "ttt_linear in layers 5, 34,408 parameters, 0.0022 MiB of state a stream"
    assert summary["about"]["memory"] == memory
    assert summary["about"]["examined with"] == "2 held-out recordings, 0 min"
    words = json.loads((folder / "transcripts.json").read_text())["streams"]
    assert len(words) == 4
    contexts = json.loads((folder / "contexts.json").read_text())
    assert np.shape(contexts["text"]) == (1, 2)  # a stretch, of the longer recording
    assert scalars["longgen/nll/text/behind_1.6s"] == contexts["text"][0][1]
    audio, rate = soundfile.read(folder / "audio" / "stream_00.wav")
    assert rate == 24_000
    assert audio.shape == ((STEPS - 1) * 1920, 2)


def test_quality_is_measured_around_the_positions_and_cut_out(
    evaluated: tuple[Path, dict[str, float]],
) -> None:
    folder, scalars = evaluated
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["audible"]
    places = {name: place for place in quality["positions"] for name in place["names"]}
    assert set(places) >= {"C", "trained length"}
    assert (places["C"]["before"], places["C"]["after"]) == ([20, 30], [30, 40])
    measures = places["C"]["measures"]
    assert {"rms", "spectral_flatness", "distinct_2", "codes_used", "nll_text"} <= set(measures)
    assert all(np.isfinite(measures["rms"][key]) for key in ("before", "after", "low", "high"))
    assert scalars["longgen/quality/rms/change_at_C"] == pytest.approx(measures["rms"]["change"])
    cut, _ = soundfile.read(folder / "audio" / "stream_00_at_C.wav")
    whole, _ = soundfile.read(folder / "audio" / "stream_00.wav")
    np.testing.assert_array_equal(cut, whole[20 * 1920 : 40 * 1920])


def test_what_happens_inside_is_recorded(evaluated: tuple[Path, dict[str, float]]) -> None:
    trace = Trace.load(evaluated[0])
    for name in ("attention_norm", "ffn_norm", "input_max", "fast_weight_norm", "write_gate"):
        assert np.isfinite(getattr(trace, name)).all(), name
    assert (trace.input_rms < trace.input_norm).all()
    assert trace.step_ms.shape == (STEPS,)
    assert trace.attention_mass.shape == (4, 2, 7, 3)
    assert (trace.attention_mass[..., 3:, 0] == 0).all()  # the first key left at step 30


def test_nll_by_position_agrees_with_a_step_by_step_count() -> None:
    lm = open_source("tiny").lm(context_steps=CONTEXT)
    one = recording("a", 45)
    nll = read_teacher_forced(lm, [one], steps=40, window_steps=20).nll
    with torch.no_grad():
        output = lm(one.codes[None, :, :40])
    picked = output.logits[0].log_softmax(-1).gather(-1, one.codes[1:9, :40, None])[..., 0]
    assert nll["first_codebook"] == pytest.approx(
        [-picked[0, :20].mean().item(), -picked[0, 20:].mean().item()], rel=1e-5
    )
    # the last delayed frame has no prediction
    assert nll["other_codebooks"][1] == pytest.approx(-picked[1:, 20:39].mean().item(), rel=1e-5)


def test_a_prompt_as_long_as_the_run_feeds_recordings_throughout(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = source.lm(context_steps=12)
    add_memory(lm, SMALL_MEMORY)
    one = recording("a", 100)
    run = LongRunConfig(seconds=8.0, prompt_sec=9.0, prompts=1, seeds=1, audio_streams=0)
    folder = tmp_path / "longgen/evaluation"
    evaluate(lm, source, [one], run, folder, label="forced", trained_steps=None)
    trace = Trace.load(folder)
    assert trace.prompt_steps == trace.steps == 100
    assert (trace.codes[0] == one.codes[1:9, :99].numpy()).all()
    text = write_report(tmp_path).read_text()
    assert "recordings were fed in throughout" in text
    assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower()


def test_recordings_that_another_run_has_read_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("tiny")
    lm, one = source.lm(context_steps=12), recording("a", 30)
    run = LongRunConfig(seconds=1.6, prompt_sec=0.4, prompts=1, seeds=1, audio_streams=0)
    read = read_teacher_forced(lm, [one], 20, 63)
    # would fail if it were called
    monkeypatch.setattr("moshi_ttt.evaluation.evaluate.read_teacher_forced", None)
    scalars = evaluate(lm, source, [one], run, tmp_path, label="", trained_steps=None, read=read)
    assert scalars["longgen/nll/text/mean"] == read.nll["text"][0]
    assert json.loads((tmp_path / "nll.json").read_text()) == read.nll


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"seconds": 0.0}, "seconds=0.0 must be above 0"),
        ({"seeds": 0}, "seeds=0"),
        ({"nll_recordings": 0}, "nll_recordings=0"),
        ({"nll_sec": 0.0}, "nll_sec=0.0 must be above 0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"audio_streams": -1}, "audio_streams=-1"),
        ({"log_interval": "8m"}, "log_interval=8m must be a length in steps"),
        ({"quality_window_sec": 0.0}, "quality_window_sec=0.0"),
        ({"attention_every_steps": 0}, "attention_every_steps=0"),
    ],
)
def test_impossible_runs_are_refused(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        LongRunConfig(**wrong)


def test_a_torn_trace_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "traces.npz").write_bytes(b"PK torn")
    with pytest.raises(UserError, match="is not a trace"):
        Trace.load(tmp_path)


@pytest.fixture
def program() -> Any:
    return importlib.import_module("evaluate")


def test_evaluate_writes_a_report_of_the_vanilla_control_and_compares(
    program: Any,
    tmp_path: Path,
    evaluated: tuple[Path, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.standard_normal((4 * 24_000, 2)), 24_000)
    (tmp_path / "val.jsonl").write_text('{"path": "a.wav", "duration": 4.0}')
    call = [
        *("--model", "tiny", "--seconds", "3", "--context_steps", "12"),
        *("--run.prompt_sec", "1", "--run.prompts", "1", "--run.seeds", "2"),
        *("--manifest", f"{tmp_path}/val.jsonl", "--cache_dir", f"{tmp_path}/cache"),
        *("--out", f"{tmp_path}/vanilla", "--device", "cpu", "--log-interval", "0.8s"),
    ]
    (tmp_path / "vanilla/000").mkdir(parents=True)  # of another call
    report = program.main(call)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("event=")]
    fields = [dict(part.split("=") for part in line.split(" ")) for line in lines]
    turns = [(one["step"], one["turn"]) for one in fields if one["event"] == "ring_turn"]
    assert turns == [("12", "1"), ("24", "2"), ("36", "3")]
    assert {"0", "10", "20", "30"} <= {one["step"] for one in fields}
    assert report == tmp_path / "vanilla/001/report.html"
    assert "tiny (vanilla, C = 12 steps)" in report.read_text()
    settings = yaml.safe_load((report.parent / "config.yaml").read_text())
    assert settings["context_steps"] == 12
    assert settings["run"]["seeds"] == 2
    again = parse(program._parser(), ["--config", f"{report.parent}/config.yaml"])
    assert (again.context_steps, again.seconds, again.run.seeds) == (12, 3, 2)
    trace = Trace.load(report.parent / "longgen/evaluation")
    assert trace.steps == 38
    assert trace.branch_ratio.shape == (2, 0, 38)
    run_folder = evaluated[0].parent.parent
    overlay = program.main(
        ["--compare", str(run_folder), f"{tmp_path}/vanilla", "--out", f"{tmp_path}/both"]
    )
    assert overlay == tmp_path / "both/000/report.html"
    text = overlay.read_text()
    assert "different lengths" in text
    assert "different lengths" in capsys.readouterr().out
    assert "tiny (vanilla, C = 12 steps)" in text
    assert "epoch 1" in text
