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
from pathlib import Path
from typing import Any

import numpy as np
from codec_copies import ChannelResult, Job, load_codec, measure, phrases
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timeline import SPEAKERS
from torchmetrics.functional.text import word_error_rate

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.data import read_manifest
from moshi_ttt.data.manifest import raise_together
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_atomic, write_json
from moshi_ttt.progress import progress


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
        results = list(progress(pool.imap(measure, jobs), total=len(jobs), unit="recording"))
    found = summary(results, card)
    write_json(options.out, found)
    draw(results[0], options.out.with_suffix(".png"))
    print(json.dumps({name: found[name] for name in ("left", "right", "both")}, indent=2))
    for level, use in enumerate(found["codebooks"]):
        print(f"codebook {level}: {use['used']} of {card} words used, {use['bits']:.2f} bits")
    print(f"{options.out}, {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    run_program(main)
