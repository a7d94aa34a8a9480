"""One instrumented long generation: talk, judge, write its folder.

The training callback and `scripts/evaluate.py` both call `evaluate`, so that a checkpoint in
training, a finished one and vanilla Moshi are measured by the same code.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from moshi.models.lm import LMModel

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.listening import word_starts
from moshi_ttt.evaluation.about import about
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.console import log_events
from moshi_ttt.evaluation.folder import write_folder
from moshi_ttt.evaluation.judge import judge
from moshi_ttt.evaluation.talk import talk
from moshi_ttt.evaluation.transcript import spoken_words
from moshi_ttt.generation.generate import borrowed
from moshi_ttt.model.source import ModelSource
from moshi_ttt.teacher_forcing.contexts import ContextSweep
from moshi_ttt.teacher_forcing.recordings import TeacherForced, read_teacher_forced

CONTEXT_SPACING_SEC = 100.0
"""Between two stretches whose loss behind contexts is measured."""


def evaluate(
    lm: LMModel,
    source: ModelSource,
    recordings: Sequence[EncodedRecording],
    config: LongRunConfig,
    folder: Path,
    *,
    label: str,
    trained_steps: int | None,
    read: TeacherForced | None = None,
) -> dict[str, float]:
    """Generate, measure, and write the evaluation folder; the model is handed back unchanged.

    Args:
        lm: model under test, hybrid or vanilla.
        source: where its codec and clock come from.
        recordings: held-out recordings: prompts, users, and the text for the NLL.
        config: what to run.
        folder: written to; see `moshi_ttt.evaluation.folder` for the layout.
        label: title in figures and tables.
        trained_steps: clip length of the training; None if unknown.
        read: what reading the recordings gave, if another run has read them as this one would;
            None reads.

    Returns:
        The scalars of `summary.json`, by tag.

    Raises:
        UserError: no recording is long enough for the prompt.
    """
    started_sec = time.monotonic()
    clock, codec = source.clock, source.codec(lm.device)
    talked = talk(lm, source, codec, recordings, config, label=label, trained_steps=trained_steps)
    read = read or _read(lm, clock, recordings, config, talked.trace.steps)
    # the random 7B borrows a codec with smaller codebooks: most of its tokens have no sound
    sound = talked.sound(codec) if lm.card <= codec.cardinality else None
    judged = judge(
        talked.trace,
        read,
        talked.speech(lm, sound),
        steps_per_sec=talked.steps_per_sec,
        window_steps=clock.steps(config.quality_window_sec),
        starts_word=word_starts(source.tokenizer()),
        cardinality=lm.card,
        sound=None if sound is None else sound[:, 0],
        seams=chunks.seams(talked.trace.steps) if (chunks := config.chunks(clock)) else [],
    )
    if clock.interval("log_interval", config.log_interval):
        log_events((jump.event() for jump in judged.jumps), clock)
    clips = [] if sound is None else [pair.T for pair in sound[: config.audio_streams]]
    write_folder(
        folder,
        talked.trace,
        judged,
        clips,
        time.monotonic() - started_sec,
        transcripts=[spoken_words(row, source) for row in talked.trace.text_tokens.tolist()],
        about=about(lm, recordings[: config.nll_recordings], clock),
    )
    return judged.scalars


def _read(
    lm: LMModel,
    clock: Clock,
    recordings: Sequence[EncodedRecording],
    config: LongRunConfig,
    generated_steps: int,
) -> TeacherForced:
    """Let it read recordings: loss by position, recall, loss behind contexts."""
    heard = recordings[: config.nll_recordings]
    steps = generated_steps if config.nll_sec is None else clock.steps(config.nll_sec)
    with borrowed(lm, config.seed):
        read = read_teacher_forced(lm, heard, steps, clock.steps(config.nll_window_sec))
        if not config.context_sec:
            return read
        sweep = ContextSweep(config.context_sec, spacing_sec=CONTEXT_SPACING_SEC)
        return dataclasses.replace(read, contexts=sweep.record(lm, heard, clock))
