"""Loss of the same seconds behind contexts of any length."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.contexts import ContextSweep
from moshi_ttt.teacher_forcing.losses import token_nll

SWEEP = ContextSweep((0.08, 0.8, 2.4), target_sec=0.4, spacing_sec=0.8)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("measure_context")
    monkeypatch.setattr(module, "SWEEP", SWEEP)
    return module


def recording(steps: int, seed: int) -> EncodedRecording:
    codes = torch.randint(1, 500, (17, steps), generator=torch.Generator().manual_seed(seed))
    return EncodedRecording(f"{seed}.npz", codes, ())


def test_every_context_is_measured_on_the_same_seconds() -> None:
    source = open_source("tiny")
    lm = source.lm()
    long, middle, short = recording(46, 0), recording(40, 1), recording(20, 2)
    pieces = SWEEP.stretches([long, middle, short], source.clock)
    ends = [(long, 30), (long, 40), (middle, 30)]
    for piece, (one, start) in zip(pieces, ends, strict=True):
        assert torch.equal(piece, one.codes[:, start - 30 : start + 5])
    values = SWEEP.nll(lm, pieces, source.clock)
    assert list(values) == list(GROUPS)
    for index, context in enumerate((1, 10, 30)):
        expected = []
        for one, start in ends:
            codes = one.codes[None, :, start - context : start + 5]
            with torch.no_grad():
                output = lm(codes)
            nll = token_nll(output.text_logits, codes[:, :1], output.text_mask)
            expected.append(nll[..., -5:].mean())
        assert values["text"][index] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_numbers_and_figure_are_written_for_every_model(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> list[EncodedRecording]:
        return [recording(46, 0)]

    monkeypatch.setattr(script, "read_recordings", read)
    arguments = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    script.main(arguments)
    assert (tmp_path / "context.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "context.json").read_text())
    assert written["stretches"] == 2
    assert len(written["nll"]["tiny"]["first_codebook"]) == len(SWEEP.context_sec)
    monkeypatch.setattr(script, "read_recordings", lambda *_: [recording(20, 0)])
    with pytest.raises(UserError, match="--manifest"):
        script.main(arguments)
