"""The folder of one evaluation, written and read here and nowhere else.

    traces.npz                  every field of the `Trace`
    events.jsonl                rings, critical positions and jumps, one event a line
    nll.json                    teacher-forced loss by position, what `read_teacher_forced` gives
    contexts.json               loss of the same seconds behind contexts, what
                                `ContextSweep.record` gives, if recordings were long enough
    quality.json                text and sound around the positions, what `listening.listen` gives,
                                and at seams, if it was generated in chunks, `seam_measures`
    segments.json               what of it went bad, and why, what `monitor.flag` gives
    probes.json                 recall of planted facts by memory and group, what `recall_record`
                                gives of each, if the recordings held any
    transcripts.json            what each stream said, word by word: [second, word]
    audio/stream_00.wav         a whole stream: left Moshi, right the user
    audio/stream_00_at_2C.wav   what is heard of the first one around one position
    summary.json                what was run and what was found, with every scalar

`summary.json` is written last: a folder that has it is complete. What is undefined is null. A run
keeps its evaluations side by side in `RUN/longgen/`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump
from moshi_ttt.diagnosis.listening import cut_outs
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.judge import Judgement
from moshi_ttt.evaluation.transcript import Spoken
from moshi_ttt.files import write_atomic, write_json
from moshi_ttt.instruments.events import generation_events, write_events
from moshi_ttt.instruments.trace import Trace

EVENTS, NLL, QUALITY = "events.jsonl", "nll.json", "quality.json"
SEGMENTS, PROBES, CONTEXTS = "segments.json", "probes.json", "contexts.json"
TRANSCRIPTS, AUDIO, SUMMARY = "transcripts.json", "audio", "summary.json"
CONFIG = "config.yaml"
"""The settings, in the folder of a run or of scripts/evaluate.py."""
CUT = "_at_"  # between the name of a stream and that of a position

logger = logging.getLogger(__name__)


def write_folder(
    folder: Path,
    trace: Trace,
    judged: Judgement,
    sound: Sequence[np.ndarray],
    wall_sec: float,
    *,
    transcripts: Sequence[Spoken] = (),
    about: Mapping[str, str] | None = None,
) -> None:
    """Write all of it; what an earlier evaluation left is removed, its summary first.

    Args:
        folder: of the evaluation; made if it is not there.
        trace: of the generation.
        judged: what was found in it.
        sound: the first streams, [samples, 2] each; none if the codes have no sound.
        wall_sec: time that all of it took.
        transcripts: words of every stream.
        about: what else a reader wants to know, by what it is about.
    """
    (folder / SUMMARY).unlink(missing_ok=True)  # from here on the folder is not complete
    _write_audio(folder / AUDIO, sound, judged.quality, trace.clock)
    trace.save(folder)
    events = generation_events(trace) + [jump.event() for jump in judged.jumps]
    events.sort(key=lambda event: event.step)
    write_events(folder / EVENTS, events, trace.clock)
    write_json(folder / NLL, judged.read.nll)
    write_json(folder / QUALITY, judged.quality)
    write_json(folder / SEGMENTS, judged.segments)
    for name, found in ((PROBES, judged.read.recall), (CONTEXTS, judged.read.contexts)):
        (folder / name).unlink(missing_ok=True)
        if found is not None:
            write_json(folder / name, found)
    write_json(folder / TRANSCRIPTS, {"streams": transcripts})
    write_json(
        folder / SUMMARY,
        {
            "label": trace.label,
            "source": trace.source,
            "steps": trace.steps,
            "seconds": trace.clock.seconds(trace.steps),
            "legacy_tokens": trace.clock.legacy_tokens(trace.steps),
            "streams": trace.streams,
            "about": about or {},
            "wall_sec": wall_sec,
            "ended_unix_sec": time.time(),
            "steps_per_sec": judged.scalars["longgen/steps_per_sec"],
            "jumps": [jump.record(trace.clock) for jump in judged.jumps],
            "rings": [ring.record() for ring in trace.rings],
            "scalars": judged.scalars,
        },
    )


def _write_audio(
    folder: Path, sound: Sequence[np.ndarray], quality: Mapping[str, Any], clock: Clock
) -> None:
    """Whole streams, and what is heard around each position."""
    for stale in folder.glob("stream_*.wav"):  # of an earlier evaluation
        stale.unlink()
    for row, wav in enumerate(sound):
        name = f"stream_{row:02d}"
        # around the positions the first is enough: the others are heard there too
        cuts = {} if row else cut_outs(quality, wav, clock.samples_per_step)
        files = {name: wav} | {f"{name}{CUT}{place}": cut for place, cut in cuts.items()}
        for stem, samples in files.items():
            write_wav(folder / f"{stem}.wav", samples, clock.sample_rate)


def write_wav(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write [samples, channels] whole or not at all."""

    def write(file: IO[bytes]) -> None:
        soundfile.write(file, wav, sample_rate, format="WAV")

    write_atomic(path, write)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation folder; the arrays stay on disk until `trace` is called."""

    folder: Path
    summary: dict[str, Any]
    """Content of `summary.json`; null is None."""

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read `summary.json`, which is written last and marks a complete folder.

        Raises:
            UserError: it is missing or not readable.
        """
        return cls(folder, _read_json(folder / SUMMARY))

    @property
    def label(self) -> str:
        """Who was measured."""
        return str(self.summary["label"])

    @property
    def scalars(self) -> dict[str, float]:
        """Scalars by TensorBoard tag; undefined ones are left out."""
        return {
            tag: float(value) for tag, value in self.summary["scalars"].items() if value is not None
        }

    @property
    def jumps(self) -> list[Jump]:
        """Jumps that were found when the generation was measured."""
        return [Jump.from_record(record) for record in self.summary["jumps"]]

    @property
    def nll(self) -> dict[str, Any] | None:
        """Content of `nll.json`; None if there is none, or if it holds no window."""
        nll = self._content(NLL)
        return nll if nll and nll["start_step"] else None

    @property
    def recall(self) -> dict[str, Any] | None:
        """Content of `probes.json`, by memory; None if the recordings held no probes.

        One without controls, as evaluations were written before there were any, is left out and
        said so.
        """
        recall = self._content(PROBES)
        if recall is None or "kept" in recall:
            return recall
        logger.warning(
            "%s has no controls of the memory; evaluate again to see recall", self.folder
        )
        return None

    @property
    def contexts(self) -> dict[str, Any] | None:
        """Content of `contexts.json`; None if it was not measured."""
        return self._content(CONTEXTS)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Lines of `events.jsonl`."""
        path = self.folder / EVENTS
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    @property
    def quality(self) -> dict[str, Any]:
        """Content of `quality.json`."""
        return _read_json(self.folder / QUALITY)

    @property
    def segments(self) -> dict[str, Any] | None:
        """Content of `segments.json`; None of an evaluation from before there was any."""
        return self._content(SEGMENTS)

    @property
    def audio(self) -> list[Path]:
        """Generated sound files of whole streams, by name."""
        return [path for path in self._sounds() if CUT not in path.stem]

    @property
    def transcripts(self) -> list[Spoken]:
        """Words of every stream, [second, word] each; empty if they were not written down."""
        found = self._content(TRANSCRIPTS)
        return [] if found is None else found["streams"]

    @property
    def cuts(self) -> list[Path]:
        """Sound around critical positions, cut out of the streams, by name."""
        return [path for path in self._sounds() if CUT in path.stem]

    def _content(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return _read_json(path) if path.exists() else None

    def _sounds(self) -> list[Path]:
        return sorted((self.folder / AUDIO).glob("*.wav"))

    def trace(self) -> Trace:
        """Read the arrays."""
        return Trace.load(self.folder)


def find_evaluations(folder: Path) -> list[Evaluation]:
    """Complete evaluations of a run, in the order of their folder names.

    Args:
        folder: a run (`RUN/longgen/*` is searched), one evaluation folder, or a folder of numbered
            runs, of which the newest that has any is meant.

    Raises:
        UserError: there is none.
    """
    if (folder / SUMMARY).exists():
        return [Evaluation.load(folder)]
    found = sorted(path.parent for path in (folder / "longgen").glob(f"*/{SUMMARY}"))
    if not found and (numbered := sorted(folder.glob(f"[0-9][0-9][0-9]/longgen/*/{SUMMARY}"))):
        return find_evaluations(numbered[-1].parents[2])
    if not found:
        raise UserError(
            f"{folder} holds no finished long generation (no longgen/*/{SUMMARY}); "
            "give a run folder, or an evaluation folder such as RUN/longgen/epoch_000"
        )
    return [Evaluation.load(path) for path in found]


def unique_labels(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """Labels for legends; those that occur twice get their name added."""
    counts = Counter(evaluation.label for evaluation in evaluations)
    return [
        evaluation.label if counts[evaluation.label] == 1 else f"{evaluation.label} ({name})"
        for evaluation, name in zip(evaluations, names, strict=True)
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); run the evaluation again to write it anew"
        ) from error
    assert isinstance(value, dict), path
    return value
