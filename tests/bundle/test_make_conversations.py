"""The program that makes conversations, and the bundled ones."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conversation_fakes import (
    DEMO,
    ROOT,
)

from moshi_ttt.data.alignments import read_alignments


def test_an_interrupted_run_keeps_what_is_finished(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    make = scripts["make_conversations"]
    recipe = make.Recipe(0, "train", 3, (3.0, 15.0))
    path = tmp_path / f"{recipe.name}.wav"
    assert make.finished_sec(path, recipe) is None
    with path.open("wb") as file:
        make._write_audio(file, np.zeros((48_000, 2), np.float32), ".wav")
    assert make.finished_sec(path, recipe) is None, "the words are missing"
    content = {"recipe": {"seed": 0, "split": "train", "index": 3, "minutes": [3.0, 15.0]}}
    path.with_suffix(".json").write_text(json.dumps(content))
    assert make.finished_sec(path, recipe) == 2.0
    assert make.finished_sec(path, make.Recipe(1, "train", 3, (3.0, 15.0))) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hours": 0}, "--hours 0 must"),
        ({"hours": 1, "minutes": (5.0, 3.0)}, "--minutes 5 3 must"),
        ({"hours": 1, "workers": 0}, "--workers 0 must"),
        ({"hours": 1, "first": -1}, "--first -1 must"),
    ],
)
def test_impossible_arguments_are_named(
    scripts: dict[str, ModuleType], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    from moshi_ttt.errors import UserError

    with pytest.raises(UserError, match=message):
        scripts["make_conversations"].main(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [("make_conversations", ["{out}", "--hours", "1"]), ("make_demo", ["--out", "{out}"])],
)
def test_programs_without_the_voices_end_with_status_2(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    program: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [one.format(out=tmp_path) for one in arguments]
    monkeypatch.setattr("sys.argv", [program, *filled])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "bundle" / f"{program}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot import hibari")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train-01", "train-02", "train-03", "train-04", "val-01"])
def test_probes_of_the_demo_point_at_the_right_words(name: str) -> None:
    path = DEMO / f"{name}.json"
    content = json.loads(path.read_text())
    words = {(word, *span, speaker) for word, span, speaker in content["alignments"]}
    assert len(content["probes"]) >= 5
    for probe in content["probes"]:
        for part, speaker in (
            ("fact", "asked_by"),
            ("echo", "answered_by"),
            ("answer", "answered_by"),
        ):
            assert all((word, *span, probe[speaker]) in words for word, span in probe[part])
        assert [word for word, _ in probe["answer"]] == [word for word, _ in probe["fact"]]
        last_mention = (probe["echo"] or probe["fact"])[-1][1][1]
        assert probe["asked_at"] > last_mention
        assert probe["gap_sec"] == pytest.approx(probe["asked_at"] - last_mention, abs=2e-3)
        # somebody begins to speak at the question
        assert any(
            start == probe["asked_at"] and speaker == probe["asked_by"]
            for _, start, _, speaker in words
        )
    read = read_alignments(path, duration_sec=300.0, step_sec=0.08)
    assert read.words
    assert not read.problems
    assert content["split"] == ("heldout" if name == "val-01" else "train")
