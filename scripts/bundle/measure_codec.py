"""Measure what a codec does to speech: distances, codebooks, and what a recogniser still hears.

    pip install pocketsphinx==5.0.4
    python scripts/bundle/measure_codec.py heldout/manifest.jsonl --codec codec --out codec.json

Writes the numbers as JSON and, beside it, the spectrograms of an original and its copy to look at.
The recogniser has a general English language model and knows nothing of the text: its word errors
on originals are the yardstick for those on copies. FOLDER needs mimi.safetensors and
mimi_config.json only.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_losses import spectral_distances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from moshi.models import MimiModel, loaders
from scipy.signal import resample_poly
from timeline import SPEAKERS
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
from torchmetrics.functional.text import word_error_rate
from tqdm import tqdm

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.data import read_manifest
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codes import encode_recording, visible_past_steps
from moshi_ttt.data.manifest import raise_together
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_atomic, write_json
from moshi_ttt.model.compiling import compile_on_gpu_only

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


def plain_words(text: str) -> str:
    """Lower-case words without punctuation, as the recogniser spells them."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


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


def codebook_usage(codes: np.ndarray, card: int) -> list[dict[str, float]]:
    """Words used and entropy in bits of every level of [K, T]."""
    found = []
    for level in codes:
        share = np.bincount(level, minlength=card) / len(level)
        used = share[share > 0]
        found.append({"used": len(used), "bits": float(-(used * np.log2(used)).sum())})
    return found


def word_errors(results: list[ChannelResult]) -> dict[str, float]:
    """Word error rates on originals and copies, their ratio, and the words they rest on."""
    references = [text for result in results for text in result.references]
    originals = [text for result in results for text in result.heard_originals]
    copies = [text for result in results for text in result.heard_copies]
    original = float(word_error_rate(originals, references))
    copied = float(word_error_rate(copies, references))
    return {
        "words": sum(len(text.split()) for text in references),
        "original": original,
        "copy": copied,
        "ratio": copied / original if original else float("nan"),
    }


def summary(results: list[tuple[ChannelResult, ChannelResult]], card: int) -> dict[str, Any]:
    """All numbers, per channel and together."""
    channels = {
        "left": [left for left, _ in results],
        "right": [right for _, right in results],
    }
    channels["both"] = channels["left"] + channels["right"]
    found: dict[str, Any] = {}
    for name, chosen in channels.items():
        weights = [result.weight_sec for result in chosen]

        def mean(values: list[float], weights: list[float] = weights) -> float:
            return float(np.average(values, weights=weights))

        found[name] = {
            "speech_sec": sum(weights),
            "word_error_rate": word_errors(chosen),
            "mel_nats": mean([r.mel_nats for r in chosen]),
            "linear": mean([r.linear for r in chosen]),
            "si_sdr_db": mean([r.si_sdr_db for r in chosen]),
            "envelope_correlation": mean([r.envelope for r in chosen]),
            "silence_db_original": mean([r.silence_db[0] for r in chosen]),
            "silence_db_copy": mean([r.silence_db[1] for r in chosen]),
        }
    codes = np.concatenate([result.codes for result in channels["both"]], axis=1)
    found["codebooks"] = codebook_usage(codes, card)
    first = channels["both"][:: max(1, len(results))][:2]
    found["examples"] = [
        {"said": said, "original": original, "copy": copied}
        for result in first
        for said, original, copied in list(
            zip(result.references, result.heard_originals, result.heard_copies, strict=True)
        )[:8]
    ]
    return found


def draw(result: tuple[ChannelResult, ChannelResult], path: Path) -> None:
    """Spectrograms of 4 s of both channels, originals above copies."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for row, name in enumerate(("original", "copy")):
        for column, channel in enumerate(result):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            # a floor under digital silence, which has no logarithm
            samples = channel.picture[row] + 1e-6
            axes.specgram(samples, NFFT=512, Fs=24_000, noverlap=384, vmin=-120)
            axes.set(title=f"{name}, {('left', 'right')[column]}", xlabel="s", ylabel="Hz")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=80))


def choose_jobs(manifest: Path, codec: Path, words: int, seconds: float) -> list[Job]:
    """The first recordings that together hold `words` words, `seconds` of each.

    Raises:
        UserError: nothing to measure, or a recording without alignments.
    """
    entries, problems = read_manifest(manifest)
    raise_together(str(manifest), problems)
    jobs, found = [], 0
    for entry in entries:
        path = entry.path.with_suffix(".json")
        if not path.is_file():
            raise UserError(f"{path} is missing; the words in it are what is measured: add it")
        rows = json.loads(path.read_text())["alignments"]
        until = min(seconds, entry.duration_sec)
        left, right = (phrases(rows, speaker, until) for speaker in SPEAKERS)
        if not left or not right:
            continue
        jobs.append(Job(entry.path, (left, right), until, codec))
        found += sum(len(phrase.text.split()) for phrase in left + right)
        if found >= words:
            break
    if not jobs:
        raise UserError(f"{manifest}: no recording in which both sides speak; give another one")
    return jobs


def main(args: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("manifest", type=Path, help="Recordings with word alignments.")
    add("--codec", type=Path, required=True, help="Folder of the codec.")
    add("--out", type=Path, default=Path("codec.json"), help="JSON to write.")
    add("--words", type=int, default=1500, help="To recognise, at least.")
    add("--seconds", type=float, default=120.0, help="Of each recording, at most.")
    add("--workers", type=int, default=os.cpu_count(), help="Processes.")
    options = parse(parser, args)
    if importlib.util.find_spec("pocketsphinx") is None:
        raise UserError(
            "pocketsphinx, which recognises the words, is not installed: "
            "pip install pocketsphinx==5.0.4"
        )
    card = load_codec(options.codec).cardinality
    jobs = choose_jobs(options.manifest, options.codec, options.words, options.seconds)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(options.workers, len(jobs))) as pool:
        results = list(tqdm(pool.imap(measure, jobs), total=len(jobs), unit="recording"))
    found = summary(results, card)
    write_json(options.out, found)
    draw(results[0], options.out.with_suffix(".png"))
    print(json.dumps({name: found[name] for name in ("left", "right", "both")}, indent=2))
    for level, use in enumerate(found["codebooks"]):
        print(f"codebook {level}: {use['used']} of {card} words used, {use['bits']:.2f} bits")
    print(f"{options.out}, {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    run_program(main)
