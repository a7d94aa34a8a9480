"""A study of recall from its YAML file to its figure, and what is drawn of it afterwards."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moshi_ttt.data.codes_file import CodesFormat, read_codes, write_codes
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ASSETS, open_source

STUDY = importlib.import_module("recall_study")
FIGURE = importlib.import_module("recall_figure")
MEMORY_STEPS = 2
VARIANTS: list[dict[str, Any]] = [
    {"name": "base", "model": {"train": "lora", "context_steps": 375}},
    {"name": "memory", "steps": MEMORY_STEPS},
    {"name": "memory_seed1", "seed": 1, "steps": MEMORY_STEPS},
]


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
    STUDY.main(arguments(folder))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"--study={folder}/study.yaml",
        f"--out={folder}/out",
        "--minutes=1",
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
    assert [one["variant"] for one in (base, memory)] == VARIANTS[:2]
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


def test_seeds_read_other_clips(folder: Path) -> None:
    # from attention, nothing else is random
    weights = [load_file(folder / f"out/trained/{one['name']}.safetensors") for one in VARIANTS[1:]]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_study_shows_its_variants_and_does_not_run_them_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was finished")

    table = (folder / "out/recall.md").read_text()
    assert (folder / "out/recall.png").stat().st_size > 10_000
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| memory")]
    assert rows.count("| memory") == len(rows) == 1 + 3 * 3
    monkeypatch.setattr(STUDY, "_run", fail)
    assert STUDY.main(arguments(folder)).keys() == {one["name"] for one in VARIANTS}
    assert "1 of 2 held-out recordings" in capsys.readouterr().out
    # what others ran is shown too
    STUDY.main(arguments(folder, "--only", "memory"))
    assert (folder / "out/recall.md").read_text() == table
    with pytest.raises(UserError, match=r"--minutes=2: none of 2 .*has 1 whole minutes"):
        STUDY.main(arguments(folder, "--minutes=2"))


def test_what_was_trained_is_measured_again(folder: Path) -> None:
    again = [f"--out={folder}/again", f"--trained={folder}/out", "--only", "base", "memory"]
    STUDY.main(arguments(folder, *again))
    assert not list((folder / "again").rglob("*.safetensors"))
    for name in ("base", "memory"):
        found = json.loads((folder / f"again/{name}.json").read_text())
        assert found == record(folder, name)
    elsewhere = [f"--out={folder}/x", f"--trained={folder}/again", "--only", "memory"]
    with pytest.raises(UserError, match=r"--trained .*again: .*memory\.saf.* not trained"):
        STUDY.main(arguments(folder, *elsewhere))


def test_one_machine_trains_and_another_measures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [f"--out={folder}/there", "--only", "memory"]
    with monkeypatch.context() as patch:
        patch.setattr(STUDY, "_measured", None)
        assert STUDY.main(arguments(folder, *there, "--train_only")) == {}
    assert [path.name for path in (folder / "there").iterdir()] == ["trained"]
    monkeypatch.setattr(STUDY.Trainer, "fit", None)
    found = STUDY.main(arguments(folder, *there))["memory"]
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
