"""One instrumented long generation: run it, measure it, write its folder.

The training callback and `scripts/evaluate.py` both call `evaluate`, so that a checkpoint in
training, a finished one and vanilla Moshi are measured by the same code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import soundfile
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.generation import borrowed, generate
from moshi_ttt.hybrid import hybrid_layers
from moshi_ttt.jumps import Jump, find_jumps, position_summary
from moshi_ttt.loading import ModelSource
from moshi_ttt.metrics import STREAMS, PositionNLL
from moshi_ttt.recorder import Recorder
from moshi_ttt.trace import Trace, ring_events, write_atomic, write_json

STEPS_PAST_2C = 150


@dataclass(frozen=True, kw_only=True)
class LongRunConfig:
    """What to generate and how."""

    seconds: float | None = None
    """Length of the generation in seconds; null runs 150 steps past 2C, the second turn of the
    ring."""
    prompts: int = 2
    """Different starting points, taken from the held-out recordings."""
    seeds: int = 2
    """Random continuations of each prompt; prompts x seeds streams run as one batch."""
    prompt_sec: float = 10.0
    """Seconds of a recording that are forced before the model runs free."""
    user: Literal["recording", "silence"] = "recording"
    """What the user does after the prompt: goes on as recorded (then silence), or is silent."""
    temperature: float = 0.8
    """Sampling temperature of the audio tokens."""
    text_temperature: float = 0.7
    """Sampling temperature of the text tokens."""
    top_k: int = 250
    """Audio tokens to sample from."""
    top_k_text: int = 25
    """Text tokens to sample from."""
    seed: int = 0
    """Seed of the sampling; equal weights and seeds generate equally."""
    nll_window_sec: float = 5.0
    """Window of the teacher-forced NLL against position, in seconds."""
    audio_streams: int = 1
    """Generated streams that are decoded to stereo audio (left Moshi, right user)."""

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "top_k", "top_k_text"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)} must be at least 1")
        for name in ("temperature", "text_temperature", "nll_window_sec"):
            if not getattr(self, name) > 0:
                raise UserError(f"run.{name}={getattr(self, name)} must be above 0")
        for name in ("prompt_sec", "audio_streams"):
            if getattr(self, name) < 0:
                raise UserError(f"run.{name}={getattr(self, name)} must be at least 0")
        if self.seconds is not None and self.seconds <= self.prompt_sec:
            raise UserError(
                f"run.seconds={self.seconds} must be longer than "
                f"run.prompt_sec={self.prompt_sec}; nothing would be generated"
            )

    def steps(self, clock: Clock, context_steps: int) -> int:
        """Length of the run in steps."""
        if self.seconds is not None:
            return clock.steps(self.seconds)
        return 2 * context_steps + STEPS_PAST_2C


def evaluate(
    lm: LMModel,
    source: ModelSource,
    recordings: Sequence[EncodedRecording],
    config: LongRunConfig,
    folder: Path,
    *,
    label: str,
    trained_steps: int | None,
) -> dict[str, float]:
    """Generate, measure, and write the evaluation folder; the model is handed back unchanged.

    Args:
        lm: model under test, hybrid or vanilla.
        source: where its codec and clock come from.
        recordings: held-out recordings: prompts, users, and the text for the NLL.
        config: what to run.
        folder: written to; see `moshi_ttt.trace` for the layout.
        label: title in figures and tables.
        trained_steps: clip length of the training; None if unknown.

    Returns:
        The scalars of `summary.json`, by tag.

    Raises:
        UserError: no recording is long enough for the prompt.
    """
    started_sec = time.monotonic()
    clock = source.clock
    assert lm.context is not None, "moshi cannot stream without a context"
    steps = config.steps(clock, lm.context)
    prompt_steps = clock.steps(config.prompt_sec)
    codec = source.codec(lm.device)
    starts = choose_prompts(recordings, config.prompts, prompt_steps)
    prompt, user, names = _streams(starts, config, steps, prompt_steps, lm, codec, clock)
    with (
        borrowed(lm, config.seed),
        tqdm(total=steps, desc=f"generating, {label}", unit="step") as progress,
    ):
        recorder = Recorder(lm, len(names), steps)
        generating_sec = time.monotonic()
        tokens = generate(
            lm,
            prompt,
            user,
            temperature=config.temperature,
            text_temperature=config.text_temperature,
            top_k=config.top_k,
            top_k_text=config.top_k_text,
            recorder=recorder,
            on_step=lambda _: progress.update(),
        ).cpu()
        generating_sec = time.monotonic() - generating_sec
        nll = position_nll(lm, recordings, steps, clock.steps(config.nll_window_sec))
        trace = Trace(
            label=label,
            source=source.name,
            clock=clock,
            context_steps=lm.context,
            prompt_steps=prompt_steps,
            trained_steps=trained_steps,
            streams=names,
            hybrid_layers=list(hybrid_layers(lm)),
            rings=recorder.rings,
            text_tokens=tokens[:, 0].numpy(),
            codes=tokens[:, 1:].numpy(),
            **recorder.arrays(),
        )
        # the random 7B borrows a codec with smaller codebooks: most of its tokens have no sound
        audible = min(config.audio_streams, len(names)) if lm.card <= codec.cardinality else 0
        wavs = [
            _decode(codec, tokens[row, 1:], user[row, :, : tokens.shape[-1]])
            for row in range(audible)
        ]
    jumps = find_jumps(trace)
    scalars = position_summary(trace, jumps)
    for stream in STREAMS:
        values = [value for value in nll[stream] if value == value]
        if values:
            scalars[f"longgen/nll/{stream}/first_window"] = values[0]
            scalars[f"longgen/nll/{stream}/last_window"] = values[-1]
            scalars[f"longgen/nll/{stream}/mean"] = sum(values) / len(values)
    scalars["longgen/steps_per_sec"] = steps / generating_sec
    for row, wav in enumerate(wavs):
        path = folder / "audio" / f"stream_{row:02d}.wav"
        write_atomic(path, partial(_write_wav, wav=wav, sample_rate=clock.sample_rate))
    _write_folder(folder, trace, jumps, nll, scalars, time.monotonic() - started_sec)
    return scalars


def choose_prompts(
    recordings: Sequence[EncodedRecording], prompts: int, prompt_steps: int
) -> list[tuple[EncodedRecording, int]]:
    """Starting points: round robin over the recordings, then evenly spaced within each.

    Raises:
        UserError: no recording is longer than the prompt.
    """
    usable = [one for one in recordings if one.codes.shape[-1] > prompt_steps]
    if not usable:
        raise UserError(
            f"no held-out recording is longer than the prompt of {prompt_steps} steps; lower "
            "run.prompt_sec or add a longer recording to data.val_manifest"
        )
    rounds = -(-prompts // len(usable))
    starts = []
    for number in range(prompts):
        recording = usable[number % len(usable)]
        room = recording.codes.shape[-1] - prompt_steps
        starts.append((recording, room * (number // len(usable)) // rounds))
    return starts


def _streams(
    starts: Sequence[tuple[EncodedRecording, int]],
    config: LongRunConfig,
    steps: int,
    prompt_steps: int,
    lm: LMModel,
    codec: MimiModel,
    clock: Clock,
) -> tuple[Tensor, Tensor, list[str]]:
    """Prompt [S, K, P], user [S, K_user, steps] and names of the S streams."""
    own = 1 + lm.dep_q
    silence = _silence_codes(codec, clock, lm.num_codebooks - own).cpu()
    prompts, users, names = [], [], []
    for recording, start in starts:
        codes = recording.codes[:, start : start + steps]
        user = silence.repeat(1, steps)
        heard_steps = codes.shape[-1] if config.user == "recording" else prompt_steps
        heard = codes[own:, :heard_steps]
        user[:, :heard_steps] = torch.where(heard >= 0, heard, user[:, :heard_steps])
        for seed in range(config.seeds):
            prompts.append(codes[:, :prompt_steps])
            users.append(user)
            names.append(f"{recording.name} from {clock.seconds(start):.0f} s, seed {seed}")
    return torch.stack(prompts), torch.stack(users), names


def _silence_codes(codec: MimiModel, clock: Clock, codebooks: int) -> Tensor:
    """[codebooks, 1] codes that the codec settles on when nothing is said."""
    silence = torch.zeros(1, 1, clock.steps(4.0) * clock.samples_per_step)
    with torch.no_grad():
        codes = codec.encode(silence.to(next(codec.parameters()).device))
    return codes[0, :codebooks, -1:]


def _decode(codec: MimiModel, own: Tensor, user: Tensor) -> np.ndarray:
    """[samples, 2] audio: left Moshi, right user."""
    codes = torch.stack([own, user.cpu()])  # [2, Q, T]
    with torch.no_grad():
        audio = codec.decode(codes.to(next(codec.parameters()).device))
    return audio[:, 0].T.clamp(-1, 1).float().cpu().numpy()


@torch.no_grad()
def position_nll(
    lm: LMModel, recordings: Sequence[EncodedRecording], steps: int, window_steps: int
) -> dict[str, Any]:
    """Teacher-forced NLL of held-out recordings against position.

    One parallel forward a recording: the streaming form is the same function.

    Args:
        lm: model under test, in eval mode.
        recordings: whole recordings; each is cut at `steps`.
        steps: positions to look at.
        window_steps: length of a window.

    Returns:
        `window_steps`, `start_step` and one list a stream (nats; NaN without tokens).
    """
    # one process evaluates while the others wait: adding up over all of them would wait for ever
    metric = PositionNLL(window_steps, -(-steps // window_steps), sync_on_compute=False)
    metric.to(lm.device)
    for recording in tqdm(recordings, desc="teacher-forced NLL", unit="recording", leave=False):
        codes = recording.codes[None, :, :steps].to(lm.device)
        metric.update(lm, lm(codes), codes)
    # torchmetrics turns a single window into a scalar
    values = {stream: nll.reshape(-1).tolist() for stream, nll in metric.compute().items()}
    starts = [window * window_steps for window in range(len(values["text"]))]
    return {"window_steps": window_steps, "start_step": starts, **values}


def _write_wav(file: IO[bytes], wav: np.ndarray, sample_rate: int) -> None:
    soundfile.write(file, wav, sample_rate, format="WAV")


def _write_folder(
    folder: Path,
    trace: Trace,
    jumps: Sequence[Jump],
    nll: dict[str, Any],
    scalars: dict[str, float],
    wall_sec: float,
) -> None:
    """Everything but the audio; `summary.json` last, so that it marks a complete folder."""
    trace.save(folder)
    events = ring_events(trace) + [jump.event() for jump in jumps]
    lines = [
        json.dumps(event.record(trace.clock)) for event in sorted(events, key=lambda e: e.step)
    ]
    write_atomic(
        folder / "events.jsonl", lambda file: file.write(("\n".join(lines) + "\n").encode())
    )
    write_json(folder / "nll.json", nll)
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
