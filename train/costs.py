"""What a study will cost: the pace of a few steps, times what is to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from moshi.models.lm import LMModel

from moshi_ttt.data import EncodedRecording
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.talk import talk
from moshi_ttt.generation.generate import borrowed
from moshi_ttt.model.forward import forward
from moshi_ttt.model.source import ModelSource
from moshi_ttt.teacher_forcing.controls import controls_of, probed_steps
from moshi_ttt.teacher_forcing.recordings import MAX_READ_STEPS

TRAINED_STEPS = 3  # the first waits for kernels
TALKED_SEC = 2.0


class Laps(Callback):
    """Takes the time of each training step."""

    def __init__(self) -> None:
        self._ends_sec: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step has ended, on the device as well."""
        _wait(pl_module.device)
        self._ends_sec.append(time.monotonic())

    @property
    def step_sec(self) -> float:
        """Of a step, without the first."""
        return float(np.diff(self._ends_sec).min())


def reading_sec(lm: LMModel, recordings: Sequence[EncodedRecording], steps: int) -> float:
    """Estimate of `read_teacher_forced`, from a minute of one recording.

    Args:
        lm: model, in any mode.
        recordings: what is to be read.
        steps: positions that the loss is wanted for.
    """
    piece = recordings[0].codes[None, :, : min(steps, 750)].to(lm.device)
    with borrowed(lm, seed=0):
        for _ in range(2):  # the first waits for kernels
            started_sec = time.monotonic()
            forward(lm, piece)
            _wait(lm.device)
    step_sec = (time.monotonic() - started_sec) / piece.shape[-1]
    whole = sum(max(steps, probed_steps(one, MAX_READ_STEPS)) for one in recordings)
    return step_sec * whole * (1 + len(controls_of(lm, recordings)))


def talking_sec(
    lm: LMModel, source: ModelSource, recordings: Sequence[EncodedRecording], run: LongRunConfig
) -> float:
    """Estimate of the generation that `run` asks for and of its sound, from two seconds of it."""
    assert run.seconds is not None
    codec = source.codec(lm.device)
    few = replace(run, seconds=TALKED_SEC, prompt_sec=TALKED_SEC / 2, chunk_sec=None)
    talked = talk(lm, source, codec, recordings, few, label="pace", trained_steps=None)
    started_sec = time.monotonic()
    if lm.card <= codec.cardinality:
        talked.sound(codec)
    sound_sec = time.monotonic() - started_sec
    again = run.reprompt_sec / run.chunk_sec if run.chunk_sec else 0.0
    generated_sec = float(np.nanmedian(talked.trace.step_ms)) / 1000 * talked.trace.steps
    return (generated_sec * (1 + again) + sound_sec) * run.seconds / TALKED_SEC


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
