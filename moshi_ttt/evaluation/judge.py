"""The second third of an evaluation: say what is in a trace, and put it in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from moshi.models.compression import MimiModel

from moshi_ttt.diagnosis.jumps import Jump, find_jumps
from moshi_ttt.diagnosis.listening import decode, listen
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
    scalars: dict[str, float]
    """By TensorBoard tag; NaN where undefined."""


def judge(
    trace: Trace,
    read: TeacherForced,
    *,
    steps_per_sec: float,
    window_steps: int,
    starts_word: np.ndarray,
    cardinality: int,
    codec: MimiModel | None,
    seams: Sequence[int] = (),
) -> Judgement:
    """Find jumps, listen around the positions, and sum up; no model is needed any more.

    Args:
        trace: of the generation.
        read: what reading the held-out recordings gave.
        steps_per_sec: speed of the generation.
        window_steps: length of the windows before and after a position that are listened to.
        starts_word: what `listening.word_starts` says of the tokenizer.
        cardinality: entries of a codebook.
        codec: turns the codes into sound; None if they have none.
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
        codec=codec,
    )
    if seams:
        quality["seams"] = seam_measures(
            trace,
            seams,
            window_steps=window_steps,
            starts_word=starts_word,
            sound=None if codec is None else decode(codec, trace.codes),
        )
    scalars = evaluation_scalars(trace, jumps, read, quality, steps_per_sec=steps_per_sec)
    return Judgement(jumps, read, quality, scalars)
