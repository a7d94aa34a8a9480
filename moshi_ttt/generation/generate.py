"""Long autoregressive generation with moshi's `LMGen`, started from a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.rows import TEXT_ROW, Rows


@contextmanager
def borrowed(lm: LMModel, seed: int) -> Iterator[LMModel]:
    """Use a model in training for generation, and hand it back exactly as it was.

    Modes of all modules, activation checkpointing, streaming flags and the random states of the
    CPU and of all GPUs are restored; gradients are not touched.

    Args:
        lm: the model; not copied.
        seed: of the random numbers drawn inside.
    """
    modes = {module: module.training for module in lm.modules()}
    checkpointing, detached = lm.transformer.checkpointing, lm._streaming_detached
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        try:
            torch.manual_seed(seed)
            lm.eval()
            lm.transformer.checkpointing = False
            yield lm
        finally:
            for module, mode in modes.items():
                module.training = mode
            lm.transformer.checkpointing = checkpointing
            lm.set_streaming_detached(detached)


def generate(
    lm: LMModel,
    prompt: Tensor,
    user: Tensor,
    *,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    top_k: int = 250,
    top_k_text: int = 25,
    recorder: Recorder | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Force a prompt, then let the model run free against a given user.

    `LMGen` reads user frame t - 1 at step t (its step 0 reads the initial token), samples text
    and first own codebook of frame t, and the delayed codebooks of frame t - 1; forcing follows
    the same delays, so a forced step sees what the training forward sees.

    Args:
        lm: model in eval mode; call inside `borrowed`.
        prompt: [S, K, P] codes of P forced steps; -1 leaves a value to be sampled.
        user: [S, K_user, T] user codes of every step, prompt included; T is the length.
        temperature: of audio sampling.
        text_temperature: of text sampling.
        top_k: of audio sampling.
        top_k_text: of text sampling.
        recorder: attached for the whole run.
        on_step: called with each finished step, e.g. to move a progress bar.

    Returns:
        [S, K_spoken, T - 1] text and own codes, delays undone.

    Raises:
        RuntimeError: the recorder saw another number of steps than were generated.
    """
    streams, _, steps = user.shape
    prompt, user = prompt.to(lm.device), user.to(lm.device)
    own = Rows.of(lm).own
    delays, prompted = lm.delays[own], prompt[:, own]
    step = 0

    def force_text(text_token: Tensor) -> None:
        if step < prompt.shape[-1]:
            forced = prompt[:, TEXT_ROW, step]
            text_token.copy_(torch.where(forced >= 0, forced, text_token))

    def force_audio(audio_tokens: Tensor) -> None:
        for codebook, delay in enumerate(delays):
            if 0 <= step - delay < prompt.shape[-1]:
                forced = prompted[:, codebook, step - delay]
                sampled = audio_tokens[:, codebook]
                audio_tokens[:, codebook] = torch.where(forced >= 0, forced, sampled)

    lm_gen = LMGen(
        lm,
        temp=temperature,
        temp_text=text_temperature,
        top_k=top_k,
        top_k_text=top_k_text,
        on_text_hook=force_text,
        on_audio_hook=force_audio,
    )
    frames: list[Tensor] = []
    with ExitStack() as scope:
        scope.enter_context(lm_gen.streaming(streams))
        if recorder is not None:
            scope.enter_context(recorder.attached())
        for step in range(steps):
            frame = lm_gen.step(user[:, :, max(0, step - 1), None])
            if frame is not None:
                frames.append(frame.clone())
            if recorder is not None:
                recorder.after_step(step)
            if on_step is not None:
                on_step(step)
        if recorder is not None:
            recorder.finish(steps)
    return torch.cat(frames, dim=-1)
