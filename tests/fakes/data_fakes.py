"""Recordings made on the spot, and a model source small enough to count its calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording, Probe

CLOCK = Clock()
PAD, END_PAD = 3, 0


class LetterTokenizer:
    """One token a letter: a = 10, b = 11, ..."""

    def encode(self, text: str) -> list[int]:
        return [10 + ord(letter) - ord("a") for letter in text]


class LoudnessCodec(nn.Module):
    """Two "codebooks" a channel, functions of each step's loudest sample."""

    frame_size = CLOCK.samples_per_step
    frame_rate = encoder_frame_rate = 12.5

    def __init__(self) -> None:
        super().__init__()
        self.encoder_transformer = nn.Identity()  # sees no past
        self.weight = nn.Parameter(torch.zeros(3))
        self.encoded: list[str] = []

    def encode(self, audio: Tensor) -> Tensor:
        self.encoded.append(hashlib.sha256(audio.numpy().tobytes()).hexdigest())
        steps = -(-audio.shape[-1] // self.frame_size)
        padded = nn.functional.pad(audio[0, 0], (0, steps * self.frame_size - audio.shape[-1]))
        level = (padded.view(steps, -1).abs().amax(1) * 100).round().long()
        return torch.stack([level, level + 1])[None]


class FakeSource:
    """What the data layer asks of a `ModelSource`."""

    name = "fake"
    clock = CLOCK
    n_q, dep_q = 4, 2
    card, text_card = 2048, 32_000
    text_padding_id, end_of_text_padding_id = PAD, END_PAD

    def __init__(self, fingerprint: str = "codec-1") -> None:
        self.codec_fingerprint = fingerprint
        self.tokenizer_fingerprint = "letters"
        self.codecs: list[LoudnessCodec] = []

    def codec(self, device: str) -> LoudnessCodec:
        self.codecs.append(LoudnessCodec())
        return self.codecs[-1]

    def tokenizer(self) -> LetterTokenizer:
        return LetterTokenizer()

    @property
    def encoded(self) -> list[str]:
        """Every piece of audio that was encoded, one channel each."""
        return [piece for codec in self.codecs for piece in codec.encoded]


def write_audio(
    path: Path,
    seconds: float,
    *,
    rate: int = CLOCK.sample_rate,
    channels: int = 2,
    seed: int = 0,
) -> None:
    """A stereo file of noise, both channels different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    soundfile.write(path, samples, rate)


def write_words(path: Path, words: Sequence[Any]) -> None:
    """The alignment file beside an audio file."""
    path.with_suffix(".json").write_text(json.dumps({"alignments": list(words)}))


def write_manifest(path: Path, seconds: dict[str, float]) -> Path:
    """A manifest of files that are written too, each with the word "hello" at its start."""
    lines = []
    for seed, (name, length) in enumerate(seconds.items()):
        write_audio(path.parent / name, length, seed=seed)
        write_words(path.parent / name, [["hello", [0.0, 0.5], "SPEAKER_MAIN"]])
        lines.append(json.dumps({"path": name, "duration": length}))
    path.write_text("\n".join(lines) + "\n")
    return path


def random_recording(steps: int, probes: tuple[Probe, ...] = ()) -> EncodedRecording:
    """Codes that a tiny model knows, none of them padding, with the probes given."""
    codes = torch.randint(4, 15, (17, steps), generator=torch.Generator().manual_seed(0))
    return EncodedRecording("a", codes, probes)
