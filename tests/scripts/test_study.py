"""A study from its YAML file to its figures, and what is drawn of it afterwards."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from moshi_ttt.data.codes_file import CodesFormat, read_codes, write_codes
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ASSETS, open_source

STUDY = importlib.import_module("study")
FIGURE = importlib.import_module("recall_figure")
MEASURED, SAY_COSTS = STUDY.StudyRun._measured, STUDY.StudyRun._say_costs
MEMORY_STEPS = 2
VARIANTS: list[dict[str, Any]] = [
    {"name": "base", "model": {"train": "lora", "context_steps": 375}},
    {"name": "memory", "steps": MEMORY_STEPS},
    {"name": "memory_seed1", "seed": 1, "steps": MEMORY_STEPS},
    {"name": "memory_sinks", "weights": "memory", "model": {"sinks": 4}, "inner_rate": 0},
    {"name": "memory_chunks", "weights": "memory", "run": {"chunk_sec": 1, "reprompt_sec": 0.4}},
]
READ_OTHERWISE = ("memory_sinks", "memory_chunks")
LEFT = ["base.json", "base_talk", "memory.json", "memory_talk", "trained"]


def shortened(folder: Path, name: str, steps: int) -> str:
    """A line of a manifest of the first steps of a bundled conversation, with its probes there."""
    heldout, source = ASSETS / "conversations/heldout", open_source("tiny")
    codes = read_codes(heldout / f"{name}.npz", None)[:, :steps]
    write_codes(folder / f"{name}.npz", codes, CodesFormat.of(source), name)
    beside = json.loads((heldout / f"{name}.json").read_text())
    seconds = source.clock.seconds(steps)
    beside["alignments"] = [word for word in beside["alignments"] if word[1][1] < seconds]
    beside["probes"] = [one for one in beside["probes"] if one["answer"][-1][1][1] < seconds - 1]
    (folder / f"{name}.json").write_text(json.dumps(beside))
    return json.dumps({"path": f"{name}.npz", "duration": seconds})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has run, of two recordings, one of which lasts a minute."""
    folder = tmp_path_factory.mktemp("study")
    lengths = {"heldout-00014": 760, "heldout-00006": 480}
    lines = [shortened(folder, name, steps) for name, steps in lengths.items()]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "study.yaml").write_text(yaml.safe_dump({"variants": VARIANTS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STUDY.StudyRun, "_say_costs", lambda *_: None)
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(STUDY.StudyRun, "_measured", interrupted(MEASURED))
            with pytest.raises(KeyboardInterrupt):
                STUDY.main(arguments(folder))
        assert sorted(path.name for path in (folder / "out").iterdir()) == LEFT
        STUDY.main(arguments(folder))
    return folder


@pytest.fixture(autouse=True)
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variant costs is measured where that is looked at."""
    monkeypatch.setattr(STUDY.StudyRun, "_say_costs", lambda *_: None)


def interrupted(measured: Any) -> Any:
    """Measuring stops after the second variant, whose weights the later ones have."""

    def measure(self: Any, one: Any, trained_sec: float) -> Any:
        if one.name == "memory_seed1":
            raise KeyboardInterrupt
        return measured(self, one, trained_sec)

    return measure


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"--study={folder}/study.yaml",
        f"--out={folder}/out",
        "--minutes=1",
        "--talk_minutes=0.03",
        "--run.prompts=1",
        "--run.seeds=1",
        "--run.prompt_sec=0.4",
        "--device=cpu",
        "--precision=32-true",
        "--model.context_steps=188",
        "--model.memory.rule=gated_delta",
        "--model.memory.layers=every:3",
        "--model.memory.projections=attention",
        "--model.memory.gate_init=0.3",
        "--model.loss.magnitude_reg=0",
        f"--data.manifest={folder}/data.jsonl",
        f"--data.val_manifest={folder}/data.jsonl",
        f"--data.cache_dir={folder}/cache",
        "--data.duration_sec=2",
        "--data.allow_any_duration=true",
        "--data.batch_size=2",
        *more,
    ]


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"out/{name}.json").read_text())


def test_a_record_holds_recall_loss_and_loudness_of_its_variant(folder: Path) -> None:
    base, memory = record(folder, "base"), record(folder, "memory")
    assert [record(folder, one["name"])["variant"] for one in VARIANTS] == VARIANTS
    assert (base["context_steps"], base["context_sec"]) == (375, 30.0)
    assert (memory["context_steps"], memory["context_sec"]) == (188, 15.04)
    assert base["recall"].keys() == {"kept"}
    assert memory["recall"].keys() == {"kept", "reset", "other"}
    for one in memory["recall"].values():
        assert one["own"]["gap_sec"] == [4, 20]
        assert one["own"]["words"] == [2, 1]
        assert all(
            low < high for low, high in zip(one["own"]["low"], one["own"]["high"], strict=True)
        )
    # the shorter recording is read for its probe alone
    assert memory["nll"]["recordings"] == [1]
    assert memory["gates"].keys() == memory["branch_ratios"].keys() == {"2", "5"}
    for found in memory["branch_ratios"].values():
        assert 0 < found["median"] < found["p95"] < found["p99"] <= found["max"] < 0.4
    assert base["gates"] == base["branch_ratios"] == {}
    assert not (folder / "out/trained/base.safetensors").exists()


def test_rows_upon_the_same_weights_differ_in_how_they_are_read_and_run(folder: Path) -> None:
    memory, sinks, chunks = (record(folder, name) for name in ("memory", *READ_OTHERWISE))
    assert [one["trained_sec"] > 0 for one in (memory, sinks, chunks)] == [True, False, False]
    assert not list((folder / "out/trained").glob("memory_[!s]*"))
    assert memory["gates"] == sinks["gates"] == chunks["gates"]
    assert sinks["nll"]["text"] != memory["nll"]["text"]
    # a memory that does not write has only what it began with
    assert 0 <= sinks["talk"]["branch_ratio"] < 0.5 * memory["talk"]["branch_ratio"]
    # read, it would be `memory`
    assert (chunks["recall"], chunks["nll"]["text"], chunks["branch_ratios"]) == ({}, [], {})
    slot = memory["talk"]["state_bytes"] - chunks["talk"]["state_bytes"]
    assert slot == 0
    kept = sinks["talk"]["state_bytes"] - memory["talk"]["state_bytes"]
    assert kept == 4 * 6 * 2 * 256 * 4  # sinks, layers, keys and values, channels, bytes
    assert memory["talk"]["branch_ratio"] > 0
    assert memory["talk"]["step_ms"] > 0
    quality = json.loads((folder / "out/memory_chunks_talk/quality.json").read_text())
    assert "seams" in quality


def test_seeds_read_other_clips(folder: Path) -> None:
    # from attention, nothing else is random
    trained = [one["name"] for one in VARIANTS if "steps" in one]
    weights = [load_file(folder / f"out/trained/{name}.safetensors") for name in trained]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_study_shows_its_variants_and_does_not_run_them_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was finished")

    table = (folder / "out/study.md").read_text()
    assert (folder / "out/recall.png").stat().st_size > 10_000
    assert (folder / "out/study.png").stat().st_size > 5_000
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| memory")]
    # at a glance, its training, recall of two classes with three memories, by rivals with two, and
    # three losses
    assert rows.count("| memory") == rows.count("| memory_sinks") == 2 + 2 * 3 + 2 + 3
    assert rows.count("| memory_chunks") == 2
    monkeypatch.setattr(STUDY.StudyRun, "_train", fail)
    assert STUDY.main(arguments(folder)).keys() == {one["name"] for one in VARIANTS}
    assert "1 of 2 held-out recordings" in capsys.readouterr().out
    # what others ran is shown too
    STUDY.main(arguments(folder, "--only", "memory"))
    assert (folder / "out/study.md").read_text() == table
    with pytest.raises(UserError, match=r"--minutes=2: none of 2 .*has 1 whole minutes"):
        STUDY.main(arguments(folder, "--minutes=2"))


def test_what_was_trained_is_measured_again(folder: Path) -> None:
    again = [f"--out={folder}/again", f"--trained={folder}/out", "--only", "base", "memory"]
    STUDY.main(arguments(folder, *again))
    assert not list((folder / "again").rglob("*.safetensors"))
    for name in ("base", "memory"):
        found = json.loads((folder / f"again/{name}.json").read_text())
        before = record(folder, name)
        # the clock's part of it
        del found["talk"]["step_ms"], before["talk"]["step_ms"]
        assert found == before
    elsewhere = [f"--out={folder}/x", f"--trained={folder}/again", "--only", "memory"]
    with pytest.raises(UserError, match=r"--trained .*again: .*memory\.saf.* not trained"):
        STUDY.main(arguments(folder, *elsewhere))


def test_one_machine_trains_and_another_measures_once_it_is_known_what_that_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(STUDY.StudyRun, "_say_costs", SAY_COSTS)
    there = [f"--out={folder}/there", "--only", "memory"]
    with monkeypatch.context() as patch:
        patch.setattr(STUDY.StudyRun, "_measured", None)
        assert STUDY.main(arguments(folder, *there, "--train_only")) == {}
    assert [path.name for path in (folder / "there").iterdir()] == ["trained"]
    said = capsys.readouterr().out
    assert re.search(r"memory: \d+\.\d min \(training \d+\.\d\)\n  together: about", said)
    monkeypatch.setattr(Trainer, "fit", None)
    found = STUDY.main(arguments(folder, *there))["memory"]
    said = capsys.readouterr().out
    assert re.search(r"memory: \d+\.\d min \(reading \d+\.\d, talking \d+\.\d\)", said)
    assert found["trained_sec"] > 0
    assert found["recall"] == record(folder, "memory")["recall"]


def test_variants_are_drawn_from_what_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "recall.png"
    call = [str(folder / "out"), "--out", str(figure)]
    FIGURE.main([*call, "--only", "memory"])
    printed = capsys.readouterr().out
    assert (
        f"| memory | 2 | {record(folder, 'memory')['parameters']:,} | {MEMORY_STEPS} |" in printed
    )
    assert "base" not in printed
    assert figure.stat().st_size > 10_000
    by_gap = figure.read_bytes()
    FIGURE.main([*call, "--by", "asked"])
    assert figure.stat().st_size > 10_000
    assert figure.read_bytes() != by_gap
    with pytest.raises(UserError, match=r"lora: .* have base, memory"):
        FIGURE.main([*call, "--only", "lora"])
    with pytest.raises(UserError, match="no variant"):
        FIGURE.main([str(tmp_path)])
    old = record(folder, "base")
    silent = tmp_path / "silent"
    silent.mkdir()
    (silent / "base.json").write_text(json.dumps(old | {"recall": {}}))
    with pytest.raises(UserError, match="base: read without probes"):
        FIGURE.main([str(silent)])
    del old["branch_ratios"]
    (tmp_path / "base.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"base\.json lacks branch_ratios.*start the study again"):
        FIGURE.main([str(tmp_path)])


def test_what_cannot_be_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("variants: [{name: x, steps: 1, model: {sinks: 188}}]")
    with pytest.raises(UserError, match=r"variant x\.model\.sinks=188 must be"):
        STUDY.main(arguments(folder, f"--study={tmp_path}/study.yaml", f"--out={tmp_path}/out"))
    silent = [f"--out={tmp_path}/out", "--talk_minutes=0"]
    with pytest.raises(UserError, match=r"memory_chunks\.run\.chunk_sec=1 with --talk_minutes=0"):
        STUDY.main(arguments(folder, *silent))
    assert not (tmp_path / "out").exists()
