"""Who speaks when: most of what a norm does in a conversation, whatever the model keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import uniform_filter1d

from moshi_ttt.diagnosis.spectrum import is_silent

WORD_STEPS = 13  # a second or so: Moshi speaks between the words of a sentence, too
VOICE_STEPS = 5
BLOCK_STEPS = 100  # longer than a turn, shorter than what is looked for


def moshi_speaks(text: np.ndarray, padding_ids: Sequence[int]) -> np.ndarray:
    """How much of its time around each step Moshi speaks, by its own text.

    Args:
        text: tokens, [S, T].
        padding_ids: tokens that say nothing.

    Returns:
        [S, T], 0 to 1.
    """
    return _around(~np.isin(text, padding_ids), WORD_STEPS)


def user_speaks(sound: np.ndarray, samples_per_step: int) -> np.ndarray:
    """How much of its time around each step the user can be heard.

    Args:
        sound: of the user, [S, T x samples_per_step], full scale 1.
        samples_per_step: of the codec.

    Returns:
        [S, T], 0 to 1.
    """
    steps = sound.reshape(len(sound), -1, samples_per_step)
    return _around(~is_silent(steps), VOICE_STEPS)


def _around(speaks: np.ndarray, steps: int) -> np.ndarray:
    share: np.ndarray = uniform_filter1d(speaks.astype(float), steps, axis=-1, mode="nearest")
    return share


def coupling(log_norm: np.ndarray, activity: np.ndarray) -> np.ndarray:
    """How a log norm follows who speaks: least squares within blocks of some seconds.

    A change that stays is in one block of each stream, and a slow one in none: neither is taken for
    talk. What is not finite is left out.

    Args:
        log_norm: [S, T].
        activity: [S, A, T].

    Returns:
        Change of the log norm for each activity from 0 to 1, [A].
    """
    length = min(BLOCK_STEPS, log_norm.shape[-1])
    whole = log_norm.shape[-1] // length * length
    norms = log_norm[:, :whole].reshape(-1, length)
    talk = np.moveaxis(activity[..., :whole], 1, -1).reshape(len(norms), length, -1)
    usable = np.isfinite(norms).all(axis=1)
    norms, talk = norms[usable], talk[usable]
    norms = norms - norms.mean(axis=1, keepdims=True)
    talk = talk - talk.mean(axis=1, keepdims=True)
    found: np.ndarray = np.linalg.lstsq(talk.reshape(norms.size, -1), norms.ravel(), rcond=None)[0]
    return found
