"""Long autoregressive generation with moshi's `LMGen`, started from a recording."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from moshi_ttt.generation.chunks import Chunks, Seams
from moshi_ttt.generation.observer import Observer
from moshi_ttt.rows import TEXT_ROW, Rows

logger = logging.getLogger(__name__)

_SMALL_DIM = 1024  # of a model whose step is too short to be shared among cores


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


@contextmanager
def fitting_threads(lm: LMModel) -> Iterator[None]:
    """Let a small model run on one core in here; on others its threads would wait for each other.

    That takes as long as the step itself, and thirty times as long where the cores are busy.
    """
    threads = torch.get_num_threads()
    if lm.device.type == "cpu" and lm.dim < _SMALL_DIM:
        torch.set_num_threads(1)
        _say_one_thread(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _say_one_thread(threads: int) -> None:
    if threads > 1:
        logger.info(
            "generating with one thread of %d, which is faster for a model this small", threads
        )


def generate(
    lm: LMModel,
    prompt: Tensor,
    user: Tensor,
    *,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    top_k: int = 250,
    top_k_text: int = 25,
    chunks: Chunks | None = None,
    observers: Sequence[Observer] = (),
) -> Tensor:
    """Force a prompt, then let the model run free against a given user.

    `LMGen` reads user frame t - 1 at step t (its step 0 reads the initial token), samples text
    and first own codebook of frame t, and the delayed codebooks of frame t - 1; forcing follows
    the same delays, so a forced step sees what the training forward sees.

    Args:
        lm: model in eval mode; call inside `borrowed`.
        prompt: [S, K, P] codes of P forced steps; -1 leaves a value to be sampled.
        user: [S, K_user, T] user codes of every step, prompt included; T is the length.
        temperature, top_k: of audio sampling.
        text_temperature, top_k_text: of text sampling.
        chunks: where attention begins afresh; None goes on with what its rings hold.
        observers: watch the whole run; after each step they are called in this order.

    Returns:
        [S, K_spoken, T - 1] text and own codes, delays undone.
    """
    streams, _, steps = user.shape
    user = user.to(lm.device)
    said = _Said(lm, prompt, steps)
    lm_gen = LMGen(
        lm,
        temp=temperature,
        temp_text=text_temperature,
        top_k=top_k,
        top_k_text=top_k_text,
        on_text_hook=said.text,
        on_audio_hook=said.audio,
    )

    def read(step: int) -> None:
        said.step = step
        lm_gen.step(user[:, :, max(0, step - 1), None])

    seams = Seams(chunks, lm_gen, read, observers)
    with fitting_threads(lm), ExitStack() as scope:
        scope.enter_context(lm_gen.streaming(streams))
        for observer in observers:
            scope.enter_context(observer.attached())
        for step in range(steps):
            seams.before(step)
            read(step)
            for observer in observers:
                observer.after_step(step)
        for observer in observers:
            observer.finish(steps)
    return said.frames


class _Said:
    """All that is said, in one place; `LMGen` calls it between its graphs, with what it sampled.

    What is known of a step already, of the prompt or because it has been said, is written over
    what was sampled.
    """

    def __init__(self, lm: LMModel, prompt: Tensor, steps: int) -> None:
        self.step = 0
        rows = Rows.of(lm)
        # room for all of it at once: a small tensor a step would pile up over a long run. In front
        # of it, for what delayed codebooks say before the first frame
        self._lead = max(lm.delays)
        shape = (len(prompt), rows.spoken.stop, self._lead + steps)
        self._tokens = torch.full(shape, -1, device=lm.device)
        forced = prompt[:, rows.spoken, :steps]
        self._tokens[:, :, self._lead : self._lead + forced.shape[-1]] = forced
        self._own = torch.arange(rows.own.start, rows.own.stop, device=lm.device)
        self._first = self._lead - torch.tensor(lm.delays[rows.own], device=lm.device)

    def text(self, sampled: Tensor) -> None:
        """Text tokens [S] of the frame of this step."""
        known = self._tokens[:, TEXT_ROW, self._lead + self.step]
        sampled.copy_(torch.where(known >= 0, known, sampled))
        known.copy_(sampled)

    def audio(self, sampled: Tensor) -> None:
        """Own codes [S, dep_q], each codebook of the frame that its delay leaves."""
        at = self._own, self._first + self.step
        known = self._tokens[:, *at]
        sampled.copy_(torch.where(known >= 0, known, sampled))
        self._tokens[:, *at] = sampled

    @property
    def frames(self) -> Tensor:
        """What is complete, [S, K_spoken, T - lead]."""
        return self._tokens[:, :, self._lead : max(self._lead, self._tokens.shape[-1] - self._lead)]
