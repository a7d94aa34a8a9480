"""One instrumented long generation: run it, measure it, write its folder.

The training callback and `scripts/evaluate.py` both call `evaluate`, so that a checkpoint in
training, a finished one and vanilla Moshi are measured by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.jumps import find_jumps, position_summary
from moshi_ttt.diagnosis.listening import decode, listen, quality_scalars, word_starts
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.console import ConsoleLog, event_line
from moshi_ttt.evaluation.folder import write_audio, write_folder
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.attention_mass import AttentionProbe
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import ModelSource
from moshi_ttt.teacher_forcing.nll import STREAMS
from moshi_ttt.teacher_forcing.recall import recall_scalars
from moshi_ttt.teacher_forcing.recordings import TeacherForced, read_teacher_forced

STEPS_PAST_2C = 150
"""12 s: how far a run goes beyond the second turn of the ring, unless told otherwise."""


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
    """Seconds of a recording that are forced before the model runs free; the length of the run or
    more forces it throughout, which records the model reading instead of talking."""
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
    nll_recordings: int = 12
    """Held-out recordings that are read teacher-forced, the first ones of their manifest."""
    audio_streams: int = 1
    """Generated streams that are decoded to stereo audio (left Moshi, right user)."""
    quality_window_sec: float = 5.0
    """Seconds before and after each critical position that text and sound are compared in."""
    log_interval_steps: int = 0
    """Steps between two lines of a text log while it runs; critical positions and turns of the
    ring have lines as well. 0 logs nothing."""
    attention_layers: tuple[int, ...] = ()
    """Layers whose attention on the first key, on the first four positions and on the oldest
    quarter of the ring is computed again now and then; none by default."""
    attention_every_steps: int = 25
    """Steps between two looks at that attention."""

    def __post_init__(self) -> None:
        for name in (
            "prompts",
            "seeds",
            "top_k",
            "top_k_text",
            "nll_recordings",
            "attention_every_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)} must be at least 1")
        for name in ("temperature", "text_temperature", "nll_window_sec", "quality_window_sec"):
            if not getattr(self, name) > 0:
                raise UserError(f"run.{name}={getattr(self, name)} must be above 0")
        for name in ("prompt_sec", "audio_streams", "log_interval_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"run.{name}={getattr(self, name)} must be at least 0")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError(f"run.seconds={self.seconds} must be above 0")

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
    read: TeacherForced | None = None,
) -> dict[str, float]:
    """Generate, measure, and write the evaluation folder; the model is handed back unchanged.

    Args:
        lm: model under test, hybrid or vanilla.
        source: where its codec and clock come from.
        recordings: held-out recordings: prompts, users, and the text for the NLL.
        config: what to run.
        folder: written to; see `moshi_ttt.instruments.trace` for the layout.
        label: title in figures and tables.
        trained_steps: clip length of the training; None if unknown.
        read: what reading the recordings gave, if another run of this length and these windows
            has read them; None reads.

    Returns:
        The scalars of `summary.json`, by tag.

    Raises:
        UserError: no recording is long enough for the prompt.
    """
    started_sec = time.monotonic()
    clock = source.clock
    assert lm.context is not None, "moshi cannot stream without a context"
    steps = config.steps(clock, lm.context)
    prompt_steps = min(clock.steps(config.prompt_sec), steps)
    codec = source.codec(lm.device)
    padding_ids = (source.text_padding_id, source.end_of_text_padding_id)
    starts = choose_prompts(recordings, config.prompts, prompt_steps)
    prompt, user, names = _streams(starts, config, steps, prompt_steps, lm, codec, clock)
    with (
        borrowed(lm, config.seed),
        tqdm(total=steps, desc=f"generating, {label}", unit="step") as progress,
    ):
        probe = None
        if config.attention_layers:
            probe = AttentionProbe(list(config.attention_layers), config.attention_every_steps)
        recorder = Recorder(lm, len(names), steps, probe)
        log = None
        if config.log_interval_steps:
            log = ConsoleLog(
                recorder,
                clock,
                steps=steps,
                context_steps=lm.context,
                interval_steps=config.log_interval_steps,
                write=progress.write,
                prompt_steps=prompt_steps,
                trained_steps=trained_steps,
                text_padding_ids=padding_ids,
            )

        def on_step(step: int) -> None:
            progress.update()
            if log is not None:
                log.after_step(step)

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
            on_step=on_step,
        ).cpu()
        generating_sec = time.monotonic() - generating_sec
        if read is None:
            windows = clock.steps(config.nll_window_sec)
            read = read_teacher_forced(lm, recordings[: config.nll_recordings], steps, windows)
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
            channels=lm.dim,
            text_padding_ids=padding_ids,
            text_tokens=tokens[:, 0].numpy(),
            codes=tokens[:, 1:].numpy(),
            **recorder.arrays(),
        )
    jumps = find_jumps(trace)
    # the random 7B borrows a codec with smaller codebooks: most of its tokens have no sound
    audible = lm.card <= codec.cardinality
    quality = listen(
        trace,
        jumps,
        read.nll,
        window_steps=clock.steps(config.quality_window_sec),
        starts_word=word_starts(source.tokenizer()),
        cardinality=lm.card,
        codec=codec if audible else None,
    )
    wavs = [
        # left Moshi, right user
        decode(codec, torch.stack([tokens[row, 1:], user[row, :, : tokens.shape[-1]]]).numpy()).T
        for row in range(min(config.audio_streams, len(names)) if audible else 0)
    ]
    write_audio(folder, wavs, quality, trace)
    scalars = position_summary(trace, jumps)
    for stream in STREAMS:
        values = [value for value in read.nll[stream] if value == value]
        if values:
            scalars[f"longgen/nll/{stream}/first_window"] = values[0]
            scalars[f"longgen/nll/{stream}/last_window"] = values[-1]
            scalars[f"longgen/nll/{stream}/mean"] = sum(values) / len(values)
    if read.recall is not None:
        scalars |= recall_scalars(read.recall)
    scalars |= quality_scalars(quality)
    scalars["longgen/steps_per_sec"] = steps / generating_sec
    if config.log_interval_steps:
        for jump in jumps:
            print(event_line(jump.record(clock)))
    write_folder(folder, trace, jumps, read, quality, scalars, time.monotonic() - started_sec)
    return scalars


def choose_prompts(
    recordings: Sequence[EncodedRecording], prompts: int, prompt_steps: int
) -> list[tuple[EncodedRecording, int]]:
    """Starting points: round robin over the recordings, then evenly spaced within each.

    Raises:
        UserError: no recording is as long as the prompt.
    """
    usable = [one for one in recordings if one.steps >= prompt_steps]
    if not usable:
        raise UserError(
            f"no held-out recording is as long as the prompt of {prompt_steps} steps; lower "
            "run.prompt_sec or add a longer recording to data.val_manifest"
        )
    rounds = -(-prompts // len(usable))
    starts = []
    for number in range(prompts):
        recording = usable[number % len(usable)]
        room = recording.steps - prompt_steps
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
    silence = silence_codes(codec, clock, lm.num_codebooks - own).cpu()
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


def silence_codes(codec: MimiModel, clock: Clock, codebooks: int) -> Tensor:
    """[codebooks, 1] codes that the codec settles on when nothing is said."""
    silence = torch.zeros(1, 1, clock.steps(4.0) * clock.samples_per_step)
    with torch.no_grad():
        codes = codec.encode(silence.to(next(codec.parameters()).device))
    return codes[0, :codebooks, -1:]
