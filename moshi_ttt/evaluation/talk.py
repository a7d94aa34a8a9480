"""The first third of an evaluation: let the model talk, and record every step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.diagnosis.monitor import Speech
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.console import ConsoleLog
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.generation.prompts import Batch, choose_prompts, seeded_batch
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.instruments.attention_mass import AttentionWatch
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import ModelSource
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW, Rows
from moshi_ttt.teacher_forcing.nll import step_nll

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Talk:
    """What came of one generation."""

    trace: Trace
    """Every step of it, with the tokens."""
    user: Tensor  # [S, K_user, T] codes of the user
    generating_sec: float
    """Wall time of the generation alone."""

    @property
    def steps_per_sec(self) -> float:
        """Speed, for all streams together."""
        return self.trace.steps / self.generating_sec

    def sound(self, codec: MimiModel) -> np.ndarray:
        """Every stream, Moshi and then the user, [S, 2, samples] of full scale 1."""
        codes = self.trace.codes
        # streams of the same prompt hear the same user
        users, which = np.unique(
            self.user.numpy()[..., : codes.shape[-1]], axis=0, return_inverse=True
        )
        return np.stack([decode(codec, codes), decode(codec, users)[which.ravel()]], axis=1)

    def speech(self, lm: LMModel, sound: np.ndarray | None) -> list[Speech]:
        """Moshi's side of every stream, which the model reads again to tell its surprise.

        Args:
            lm: model under test; handed back unchanged.
            sound: what `sound` gave; None if the codes have none.
        """
        trace, steps = self.trace, self.trace.codes.shape[-1]
        said = np.concatenate([trace.text_tokens[:, None], trace.codes], axis=1)
        codes = torch.cat([torch.from_numpy(said), self.user[..., :steps]], dim=1)
        sounds = [None] * len(codes) if sound is None else sound
        with borrowed(lm, seed=0):  # reading draws no random numbers
            return [speech_of(lm, *pair) for pair in zip(codes, sounds, strict=True)]


def speech_of(lm: LMModel, codes: Tensor, sound: np.ndarray | None) -> Speech:
    """Moshi's side of a conversation, as a model reads it.

    Args:
        lm: in eval mode.
        codes: [K, T].
        sound: of both sides, [2, samples]; None if the codes have none.
    """
    text_nll, sound_nll = (nll.numpy() for nll in step_nll(lm, codes))
    own = codes[Rows.of(lm).own].numpy()
    return Speech(
        text_tokens=codes[TEXT_ROW].numpy(),
        codes=own,
        text_nll=text_nll,
        sound_nll=sound_nll,
        sound=sound,
    )


def talk(
    lm: LMModel,
    source: ModelSource,
    codec: MimiModel,
    recordings: Sequence[EncodedRecording],
    config: LongRunConfig,
    *,
    label: str,
    trained_steps: int | None,
) -> Talk:
    """Generate and record; the model is handed back unchanged.

    Args:
        lm: model under test, hybrid or vanilla.
        source: where its clock and padding tokens come from.
        codec: of that source.
        recordings: held-out recordings: prompts and users.
        config: what to run.
        label: title in figures and tables.
        trained_steps: clip length of the training; None if unknown.

    Raises:
        UserError: no recording is long enough for the prompt.
        RuntimeError: the recorder saw another number of steps than were generated.
    """
    clock = source.clock
    assert lm.context is not None, "moshi cannot stream without a context"
    steps = config.steps(clock, lm.context)
    prompt_steps = min(clock.steps(config.prompt_sec), steps)
    batch = _batch(lm, codec, clock, recordings, config, steps, prompt_steps)
    # what the text log needs to know as well
    facts: dict[str, Any] = {
        "clock": clock,
        "context_steps": lm.context,
        "prompt_steps": prompt_steps,
        "trained_steps": trained_steps,
        "text_padding_ids": (source.text_padding_id, source.end_of_text_padding_id),
    }
    tokens, recorder, generating_sec = _generate(lm, batch, config, facts, label)
    trace = Trace(
        label=label,
        source=source.name,
        streams=batch.names,
        hybrid_layers=list(hybrid_layers(lm)),
        rings=recorder.rings,
        channels=lm.dim,
        text_tokens=tokens[:, TEXT_ROW].numpy(),
        codes=tokens[:, Rows.of(lm).own].numpy(),
        **facts,
        **recorder.arrays(),
    )
    return Talk(trace, batch.user, generating_sec)


def _batch(
    lm: LMModel,
    codec: MimiModel,
    clock: Clock,
    recordings: Sequence[EncodedRecording],
    config: LongRunConfig,
    steps: int,
    prompt_steps: int,
) -> Batch:
    rows = Rows.of(lm)
    starts = choose_prompts(recordings, config.prompts, prompt_steps, steps)
    lasts = min(recording.steps - start for recording, start in starts)
    if lasts < steps and config.user != "silence":
        logger.warning(
            "the user of a stream is silent from %s on, where its recording ends, and Moshi says "
            "less to silence; for %s of talk, add held-out recordings that last as long",
            *(clock.describe(lasts), clock.describe(steps)),
        )
    return seeded_batch(
        starts,
        silence_codes(codec, clock, rows.user_codebooks).cpu(),
        clock,
        steps=steps,
        prompt_steps=prompt_steps,
        seeds=config.seeds,
        rows=rows,
        silent_user=config.user == "silence",
        told_text=config.text == "recording",
    )


def _generate(
    lm: LMModel, batch: Batch, config: LongRunConfig, facts: dict[str, Any], label: str
) -> tuple[Tensor, Recorder, float]:
    """Tokens [S, K_spoken, T - 1] on the CPU, what was recorded, and seconds of wall time."""
    streams, _, steps = batch.user.shape
    with (
        borrowed(lm, config.seed),
        progress(total=steps, desc=f"generating, {label}", unit="step") as bar,
    ):
        watch = None
        if config.attention_layers:
            watch = AttentionWatch(list(config.attention_layers), config.attention_every_steps)
        recorder = Recorder(lm, streams, steps, watch)
        observers: list[Observer] = [recorder, EachStep(lambda _: bar.update())]
        if interval_steps := facts["clock"].interval("log_interval", config.log_interval):
            observers.append(
                ConsoleLog(
                    recorder, steps=steps, interval_steps=interval_steps, write=bar.write, **facts
                )
            )
        started_sec = time.monotonic()
        tokens = generate(
            lm,
            batch.prompt,
            batch.user,
            temperature=config.temperature,
            text_temperature=config.text_temperature,
            top_k=config.top_k,
            top_k_text=config.top_k_text,
            chunks=config.chunks(facts["clock"]),
            observers=observers,
        ).cpu()
        return tokens, recorder, time.monotonic() - started_sec
