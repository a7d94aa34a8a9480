"""One instrumented long generation: run it, measure it, write its folder.

The training callback and `scripts/evaluate.py` both call `evaluate`, so that a checkpoint in
training, a finished one and vanilla Moshi are measured by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.diagnosis.listening import decode, listen, word_starts
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.console import ConsoleLog, event_line
from moshi_ttt.evaluation.folder import write_audio, write_folder
from moshi_ttt.evaluation.scalars import position_summary, quality_scalars, recall_scalars
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.generation.prompts import choose_prompts
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.instruments.attention_mass import AttentionProbe
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import ModelSource
from moshi_ttt.teacher_forcing.nll import STREAMS
from moshi_ttt.teacher_forcing.recordings import TeacherForced, read_teacher_forced


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

        observers: list[Observer] = [recorder, EachStep(lambda _: progress.update())]
        if log is not None:
            observers.append(log)
        generating_sec = time.monotonic()
        tokens = generate(
            lm,
            prompt,
            user,
            temperature=config.temperature,
            text_temperature=config.text_temperature,
            top_k=config.top_k,
            top_k_text=config.top_k_text,
            observers=observers,
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
