"""Let a model answer a recording of the user's voice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from moshi.models.lm import LMModel

from moshi_ttt.data.audio import read_user
from moshi_ttt.data.codes import encode_recording
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.errors import check_setting
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.transcript import Spoken, spoken_lines
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep
from moshi_ttt.model.source import ModelSource
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW, Rows


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to a recording."""

    sound: np.ndarray
    """Left Moshi, right the user: [samples, 2] at the codec's rate."""
    lines: Spoken
    """What Moshi said in text, each stretch with the second at which it begins."""

    def transcript(self) -> str:
        """One line a stretch, e.g. ` 12.3 s  Hello there.`"""
        return "".join(f"{seconds:6.1f} s  {text}\n" for seconds, text in self.lines)


def reply(lm: LMModel, source: ModelSource, path: Path, config: LongRunConfig) -> Reply:
    """Talk freely for as long as a recording of the user lasts.

    Args:
        lm: model under test; handed back unchanged.
        source: whose codec, tokenizer and clock go with it.
        path: audio of one channel, the user; or of two, of which the right one is the user.
        config: seed, temperatures, top k and chunks; nothing else of it.

    Raises:
        UserError: the audio cannot be read, or lasts less than two steps.
    """
    clock, codec, rows = source.clock, source.codec(lm.device), Rows.of(lm)
    heard = read_user(path, clock.sample_rate)
    user = encode_recording(codec, heard[None])[: rows.user_codebooks]
    steps = user.shape[1]
    check_setting(steps >= 2, "--input", path, f"is shorter than two steps of {clock.step_sec} s")
    nothing = torch.zeros(1, rows.count, 0, dtype=torch.int64)
    with (
        borrowed(lm, config.seed),
        progress(total=steps, desc=f"answering {path.name}", unit="step") as bar,
    ):
        tokens = generate(
            lm,
            nothing,
            user[None],
            temperature=config.temperature,
            text_temperature=config.text_temperature,
            top_k=config.top_k,
            top_k_text=config.top_k_text,
            chunks=config.chunks(clock),
            observers=[EachStep(lambda _: bar.update())],
        )[0].cpu()
    said = decode(codec, tokens[None, rows.own].numpy())[0]
    length = min(len(said), len(heard))
    sound = np.stack([said[:length], heard[:length].numpy()], axis=1)
    return Reply(sound, spoken_lines(tokens[TEXT_ROW].tolist(), source))
