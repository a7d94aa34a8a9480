"""Speech that no voice has to make, for the tests of the codec's training."""

from __future__ import annotations

import numpy as np
import torch
from codec_speech import Speech
from torch import Tensor

SAMPLE_RATE = 24_000
STEP_SAMPLES = 1920


def tones(seconds: float, seed: int = 0) -> Tensor:
    """Something speech-like: gliding harmonics that come and go, [samples]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 150 + 40 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    gate = (np.sin(2 * np.pi * 0.9 * time) > 0) * 0.1
    return torch.tensor(voice * gate + 1e-3 * rng.normal(size=len(time)), dtype=torch.float32)


def speech_of(audio: Tensor) -> Speech:
    """Audio [samples] as a training reads it."""
    return Speech((audio * 2**15).short(), STEP_SAMPLES)
