"""Pieces of speech that a codec is trained on."""

from __future__ import annotations

from typing import Any

import torch
from codec_fakes import STEP_SAMPLES, speech_of


def test_pieces_are_drawn_where_it_is_loud_but_also_from_silence(script: Any) -> None:
    torch.manual_seed(0)
    audio = torch.zeros(400 * STEP_SAMPLES)
    audio[200 * STEP_SAMPLES :] = 0.5
    pieces = speech_of(audio).pieces(2000, 2)
    assert pieces.shape == (2000, 1, 2 * STEP_SAMPLES)
    silent = float((pieces.abs().amax(dim=(1, 2)) == 0).float().mean())
    assert 0.01 < silent < 0.15  # a floor of a tenth of the mean: 1 in 22
    assert float(pieces.max()) == 0.5


def test_detuned_pieces_are_the_same_sound_at_another_pitch(script: Any) -> None:
    torch.manual_seed(0)
    hertz, rate = 1000.0, 24_000
    time = torch.arange(200 * STEP_SAMPLES) / rate
    speech = speech_of(0.5 * torch.sin(2 * torch.pi * hertz * time.double()).float())
    pieces = speech.pieces(64, 10, detune=0.2)
    spectrum = torch.fft.rfft(pieces[:, 0] * torch.hann_window(10 * STEP_SAMPLES)).abs()
    pitches = spectrum.argmax(dim=1) * rate / (10 * STEP_SAMPLES)
    plain = (pitches - hertz).abs() < 2
    assert 16 < int(plain.sum()) < 48
    assert pitches.min() > hertz * 0.8
    assert pitches.min() < hertz * 0.9 < 1.1 * hertz < pitches.max() < 1.25 * hertz
    # nothing but the tone: what is left is 16 bit and the interpolation
    tone = spectrum.square()
    near = tone.unfold(1, 9, 1).sum(dim=2).amax(dim=1)
    assert float((near / tone.sum(dim=1)).min()) > 1 - 1e-4
