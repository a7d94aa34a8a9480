"""What a codec does to speech, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from codec_fakes import STEP_SAMPLES, tones
from moshi.models import loaders

from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ASSETS


def test_phrases_are_cut_at_pauses_of_one_speaker_only(script: Any) -> None:
    rows = [
        ["Hello,", [0.5, 0.9], "SPEAKER_MAIN"],
        ["there!", [1.0, 1.3], "SPEAKER_MAIN"],
        ["Yes.", [1.1, 1.4], "SPEAKER_USER"],
        ["It's", [1.8, 2.0], "SPEAKER_MAIN"],
        ["late", [9.9, 10.2], "SPEAKER_MAIN"],
    ]
    found = script("codec_copies").phrases(rows, "SPEAKER_MAIN", until_sec=10)
    assert [(p.text, p.start_sec, p.end_sec) for p in found] == [
        ("hello there", 0.5, 1.3),
        ("it's", 1.8, 2.0),
    ]


def test_word_errors_and_codebook_usage_count_over_everything(script: Any) -> None:
    measuring = script("measure_codec")

    def result(said: str, original: str, copied: str) -> Any:
        nothing = (np.zeros(1), np.zeros(1))
        return script("codec_copies").ChannelResult(
            [said], [original], [copied], np.zeros((1, 1)), 0, 0, 0, 0, (0, 0), 1, nothing
        )

    found = measuring.word_errors(
        [result("a b c", "a b c", "a x c"), result("d e f g h", "d e f g", "d e f")]
    )
    assert found["words"] == 8
    assert found["original"] == pytest.approx(1 / 8)
    assert found["copy"] == pytest.approx(3 / 8)
    assert found["ratio"] == pytest.approx(3)
    usage = measuring.codebook_usage(np.array([[0, 1, 2, 3], [5, 5, 5, 5]]), 8)
    assert usage == [{"used": 4, "bits": 2.0}, {"used": 1, "bits": 0.0}]


def test_decoding_in_pieces_equals_one_pass(
    script: Any, codec_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3)
    script("codec_training").fit_codebooks(codec, torch.randn(4, 16, 64), 32)
    codes = torch.randint(16, (3, 180))
    copies = script("codec_copies")
    pieces = copies.decode_recording(codec, codes, piece_steps=70)
    whole = codec.decode(codes[None])[0, 0].detach()
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(copies, "visible_past_steps", lambda *_: 1)
    short = copies.decode_recording(codec, codes, piece_steps=70)
    assert (short - whole).abs().max() > 1e-3 * whole.abs().max(), "the past is not needed"


def test_measuring_without_a_recogniser_says_what_to_install(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measuring = script("measure_codec")
    monkeypatch.setattr("sys.argv", ["measure_codec.py", "m.jsonl", "--codec", str(tmp_path)])
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install pocketsphinx"):
        measuring.main()


def test_measured_copy_of_a_perfect_codec_has_no_distance(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, copies = script("measure_codec"), script("codec_copies")
    audio = tones(4)[: 48 * STEP_SAMPLES]
    soundfile.write(tmp_path / "a.wav", torch.stack([audio, audio], dim=1).numpy(), 24_000)
    row = [["hm", [0.6, 2.0], speaker] for speaker in measuring.SPEAKERS]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": row}))
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 3.84}))
    stored, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    monkeypatch.setattr(copies, "recognise", lambda pieces: ["hm" for _ in pieces])
    monkeypatch.setattr(
        copies, "decode_recording", lambda *_: torch.from_numpy(stored[:, 0].copy())
    )
    (job,) = measuring.choose_jobs(tmp_path / "m.jsonl", ASSETS / "tiny", 1, 60)
    found = measuring.summary([copies.measure(job)], 512)["both"]
    assert found["mel_nats"] == 0
    assert found["si_sdr_db"] > 60
    assert found["envelope_correlation"] == pytest.approx(1)
