"""The second third of an evaluation: say what is in a trace, and put it in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moshi_ttt.diagnosis.jumps import Jump, find_jumps
from moshi_ttt.diagnosis.listening import listen
from moshi_ttt.diagnosis.monitor import Speech, flag
from moshi_ttt.diagnosis.seams import seam_measures
from moshi_ttt.evaluation.scalars import evaluation_scalars
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.teacher_forcing.recordings import TeacherForced


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found in one generation."""

    jumps: Sequence[Jump]
    """Lasting rises of the input norm, in order of position."""
    read: TeacherForced
    """What reading the held-out recordings gave."""
    quality: dict[str, Any]
    """Content of `quality.json`."""
    segments: dict[str, Any]
    """Content of `segments.json`."""
    scalars: dict[str, float]
    """By TensorBoard tag; NaN where undefined."""


def judge(
    trace: Trace,
    read: TeacherForced,
    speech: Sequence[Speech],
    *,
    steps_per_sec: float,
    window_steps: int,
    starts_word: np.ndarray,
    cardinality: int,
    sound: np.ndarray | None,
    seams: Sequence[int] = (),
) -> Judgement:
    """Find jumps, listen around the positions, flag what went bad, and sum up, without a model.

    Args:
        trace: of the generation.
        read: what reading the held-out recordings gave.
        speech: of every stream; what went bad in it is flagged.
        steps_per_sec: speed of the generation.
        window_steps: length of the windows before and after a position that are listened to.
        starts_word: what `listening.word_starts` says of the tokenizer.
        cardinality: entries of a codebook.
        sound: of Moshi in all streams, [S, samples]; None if the codes have none.
        seams: steps before which attention began afresh.
    """
    jumps = find_jumps(trace)
    quality = listen(
        trace,
        jumps,
        read.nll,
        window_steps=window_steps,
        starts_word=starts_word,
        cardinality=cardinality,
        sound=sound,
    )
    if seams:
        quality["seams"] = seam_measures(
            trace,
            seams,
            window_steps=window_steps,
            starts_word=starts_word,
            sound=sound,
        )
    first = trace.free_from
    measures = [
        one.measures(trace.clock, trace.text_padding_ids, cardinality, first) for one in speech
    ]
    segments = flag(measures, trace.clock, first, trace.text_tokens.shape[1])
    scalars = evaluation_scalars(trace, jumps, read, quality, segments, steps_per_sec=steps_per_sec)
    return Judgement(jumps, read, quality, segments, scalars)
