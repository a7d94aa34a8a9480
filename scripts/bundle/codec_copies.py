"""One recording and its copy by a codec: what both channels lose, in numbers and in words heard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_losses import spectral_distances
from moshi.models import MimiModel, loaders
from scipy.signal import resample_poly
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from moshi_ttt.compiling import compile_on_gpu_only
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codes import encode_recording, visible_past_steps
from moshi_ttt.diagnosis.recogniser import plain_words
from moshi_ttt.errors import UserError

_GAP_SEC = 0.4  # between words: cut there
_MARGIN_SEC = 0.15  # kept around what is cut
_RECOGNISER_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that one speaker says without a pause."""

    text: str
    start_sec: float
    end_sec: float


@dataclass(frozen=True, slots=True)
class Job:
    """One recording for one process."""

    audio_path: Path
    phrases: tuple[list[Phrase], list[Phrase]]  # left, right
    seconds: float
    codec: Path


@dataclass(frozen=True, slots=True)
class ChannelResult:
    """What was measured on one channel of one recording."""

    references: list[str]
    heard_originals: list[str]
    heard_copies: list[str]
    codes: np.ndarray  # [K, steps that lie in phrases]
    mel_nats: float
    linear: float
    si_sdr_db: float
    envelope: float
    silence_db: tuple[float, float]  # level outside of phrases, original and copy, re full scale
    weight_sec: float
    picture: tuple[np.ndarray, np.ndarray]


def phrases(rows: list[list[Any]], speaker: str, until_sec: float) -> list[Phrase]:
    """Cut one speaker's alignments `[text, [start, end], speaker]` at pauses of over 0.4 s."""
    words = sorted((row for row in rows if row[2] == speaker), key=lambda row: row[1][0])
    groups: list[list[list[Any]]] = []
    for word in words:
        if word[1][1] + _MARGIN_SEC > until_sec:
            break
        if groups and word[1][0] - groups[-1][-1][1][1] <= _GAP_SEC:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        Phrase(plain_words(" ".join(w[0] for w in group)), group[0][1][0], group[-1][1][1])
        for group in groups
    ]


def load_codec(folder: Path) -> MimiModel:
    """The codec of a folder, in eval mode.

    Raises:
        UserError: a file is missing.
    """
    weights, config_path = folder / "mimi.safetensors", folder / "mimi_config.json"
    for path in (weights, config_path):
        if not path.is_file():
            raise UserError(
                f"--codec {folder}: {path.name} is missing; give a folder that train_codec.py "
                "wrote, or one in moshi's layout such as assets/tiny"
            )
    config = json.loads(config_path.read_text())
    compile_on_gpu_only()
    return loaders.get_mimi(weights, config, num_codebooks=8).requires_grad_(False)


@torch.no_grad()
def decode_recording(codec: MimiModel, codes: Tensor, piece_steps: int = 750) -> Tensor:
    """Decode [K, T] in pieces, each behind all that its first sample can depend on; [samples]."""
    past_steps = visible_past_steps(codec, codec.decoder_transformer)
    pieces = []
    for done in range(0, codes.shape[1], piece_steps):
        begin = max(0, done - past_steps)
        samples = codec.decode(codes[None, :, begin : done + piece_steps])[0, 0]
        pieces.append(samples[(done - begin) * codec.frame_size :])
    return torch.cat(pieces)


def recognise(pieces: list[np.ndarray]) -> list[str]:
    """What pocketsphinx hears in each piece of 24 kHz audio; a fresh decoder every call."""
    from pocketsphinx import Decoder  # a build-time tool, no dependency of the project

    decoder = Decoder(samprate=_RECOGNISER_RATE, loglevel="FATAL")
    heard = []
    for piece in pieces:
        samples = resample_poly(piece, 2, 3)
        pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes()
        decoder.start_utt()
        decoder.process_raw(pcm, full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        heard.append(plain_words(hypothesis.hypstr) if hypothesis else "")
    return heard


def measure(job: Job) -> tuple[ChannelResult, ChannelResult]:
    """Copy one recording and compare."""
    torch.set_num_threads(1)
    codec = load_codec(job.codec)
    audio = read_audio(job.audio_path, codec.sample_rate)[:, : round(job.seconds * 24_000)]
    audio = audio[:, : audio.shape[1] // codec.frame_size * codec.frame_size]
    codes = encode_recording(codec, audio)  # [2 * K, T]
    left, right = (
        _measure_channel(codec, original, channel_codes, spoken)
        for original, channel_codes, spoken in zip(audio, codes.chunk(2), job.phrases, strict=True)
    )
    return left, right


def _measure_channel(
    codec: MimiModel, original: Tensor, codes: Tensor, spoken: list[Phrase]
) -> ChannelResult:
    copied = decode_recording(codec, codes)
    rate, step = codec.sample_rate, codec.frame_size
    spans = [
        slice(
            max(0, round((phrase.start_sec - _MARGIN_SEC) * rate)),
            round((phrase.end_sec + _MARGIN_SEC) * rate),
        )
        for phrase in spoken
    ]
    inside = torch.zeros(len(original), dtype=torch.bool)
    for span in spans:
        inside[span] = True
    in_steps = inside.view(-1, step).any(dim=1)
    mel, linear = spectral_distances(copied[inside][None, None], original[inside][None, None])
    si_sdr = [
        scale_invariant_signal_distortion_ratio(copied[span], original[span]) for span in spans
    ]
    levels = [x.view(-1, step).square().mean(dim=1).sqrt() for x in (original, copied)]
    quiet = [10 * torch.log10(x[~inside].square().mean() + 1e-12) for x in (original, copied)]
    shown = spans[0] if spans else slice(0, rate)
    shown = slice(shown.start, shown.start + 4 * rate)
    return ChannelResult(
        references=[phrase.text for phrase in spoken],
        heard_originals=recognise([original[span].numpy() for span in spans]),
        heard_copies=recognise([copied[span].numpy() for span in spans]),
        codes=codes[:, in_steps].numpy(),
        mel_nats=float(mel),
        linear=float(linear),
        si_sdr_db=float(torch.stack(si_sdr).mean()),
        envelope=float(torch.corrcoef(torch.stack(levels))[0, 1]),
        silence_db=(float(quiet[0]), float(quiet[1])),
        weight_sec=float(inside.sum()) / rate,
        picture=(original[shown].numpy(), copied[shown].numpy()),
    )
