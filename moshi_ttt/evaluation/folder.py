"""Write the folder of one evaluation; `trace` says what it holds, `report.evaluation` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from moshi_ttt.diagnosis.jumps import Jump
from moshi_ttt.diagnosis.listening import cut_outs
from moshi_ttt.instruments.events import generation_events, write_events
from moshi_ttt.instruments.trace import Trace, write_atomic, write_json
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
