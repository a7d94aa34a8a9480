"""Write the folder of one evaluation; `trace` says what it holds, `report.evaluation` reads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from moshi_ttt.diagnosis.jumps import Jump
from moshi_ttt.diagnosis.listening import cut_outs
from moshi_ttt.errors import UserError
from moshi_ttt.files import write_atomic, write_json
from moshi_ttt.instruments.events import generation_events, write_events
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.teacher_forcing.recordings import TeacherForced


def write_audio(
    folder: Path, wavs: Sequence[np.ndarray], quality: Mapping[str, Any], trace: Trace
) -> None:
    """Whole streams, and what is heard around each position.

    Args:
        folder: of the evaluation; files go to `audio/`.
        wavs: sound of the first streams, [samples, 2].
        quality: what `listening.listen` returned.
        trace: for its clock.
    """
    for stale in (folder / "audio").glob("stream_*_at_*.wav"):  # an earlier one's jumps
        stale.unlink()
    clock = trace.clock
    for row, wav in enumerate(wavs):
        files = {f"stream_{row:02d}": wav}
        cuts = cut_outs(quality, wav, clock.samples_per_step)
        files |= {f"stream_{row:02d}_at_{place}": cut for place, cut in cuts.items()}
        for name, samples in files.items():
            write = partial(_write_wav, wav=samples, sample_rate=clock.sample_rate)
            write_atomic(folder / "audio" / f"{name}.wav", write)


def _write_wav(file: IO[bytes], wav: np.ndarray, sample_rate: int) -> None:
    soundfile.write(file, wav, sample_rate, format="WAV")


def write_folder(
    folder: Path,
    trace: Trace,
    jumps: Sequence[Jump],
    read: TeacherForced,
    quality: Mapping[str, Any],
    scalars: Mapping[str, float],
    wall_sec: float,
) -> None:
    """Everything but the audio; `summary.json` last, so that it marks a complete folder."""
    trace.save(folder)
    events = generation_events(trace) + [jump.event() for jump in jumps]
    events.sort(key=lambda event: event.step)
    write_events(folder / "events.jsonl", events, trace.clock)
    write_json(folder / "nll.json", read.nll)
    write_json(folder / "quality.json", quality)
    (folder / "probes.json").unlink(missing_ok=True)  # of an earlier evaluation
    if read.recall is not None:
        write_json(folder / "probes.json", read.recall)
    write_json(
        folder / "summary.json",
        {
            "label": trace.label,
            "source": trace.source,
            "steps": trace.steps,
            "seconds": trace.clock.seconds(trace.steps),
            "legacy_tokens": trace.clock.legacy_tokens(trace.steps),
            "streams": trace.streams,
            "wall_sec": wall_sec,
            "steps_per_sec": scalars["longgen/steps_per_sec"],
            "jumps": [jump.record(trace.clock) for jump in jumps],
            "rings": [ring.record() for ring in trace.rings],
            "scalars": scalars,
        },
    )


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
        return cls(folder, _read_json(folder / "summary.json"))

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
        path = self.folder / "nll.json"
        nll = _read_json(path) if path.exists() else None
        return nll if nll and nll["start_step"] else None

    @property
    def recall(self) -> dict[str, Any] | None:
        """Content of `probes.json`; None if the recordings held no probes."""
        path = self.folder / "probes.json"
        return _read_json(path) if path.exists() else None

    @property
    def events(self) -> list[dict[str, Any]]:
        """Lines of `events.jsonl`."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    @property
    def quality(self) -> dict[str, Any]:
        """Content of `quality.json`."""
        return _read_json(self.folder / "quality.json")

    @property
    def audio(self) -> list[Path]:
        """Generated sound files of whole streams, by name."""
        return [path for path in self._sounds() if "_at_" not in path.stem]

    @property
    def cuts(self) -> list[Path]:
        """Sound around critical positions, cut out of the streams, by name."""
        return [path for path in self._sounds() if "_at_" in path.stem]

    def _sounds(self) -> list[Path]:
        return sorted((self.folder / "audio").glob("*.wav"))

    def trace(self) -> Trace:
        """Read the arrays."""
        return Trace.load(self.folder)


def find_evaluations(folder: Path) -> list[Evaluation]:
    """Complete evaluations of a run, in the order of their folder names.

    Args:
        folder: a run (`RUN/longgen/*` is searched) or one evaluation folder.

    Raises:
        UserError: there is none.
    """
    if (folder / "summary.json").exists():
        return [Evaluation.load(folder)]
    found = sorted(path.parent for path in (folder / "longgen").glob("*/summary.json"))
    if not found:
        raise UserError(
            f"{folder} holds no finished long generation (no longgen/*/summary.json); "
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
