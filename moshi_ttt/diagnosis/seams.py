"""Can the seams of a chunked generation be heard, read or seen? Measured there and elsewhere.

Pure functions of sound, tokens and norms. What is undefined is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.diagnosis.quality import compare
from moshi_ttt.diagnosis.spectrum import FFT_SAMPLES
from moshi_ttt.instruments.trace import Trace

SILENT_DB, EMPTY_DB = -60, -100  # of full scale: quieter is silence; in one bin of a spectrum
ELSEWHERE_EVERY = 5  # steps between two places that seams are compared with


def seam_measures(
    trace: Trace,
    seams: Sequence[int],
    *,
    window_steps: int,
    starts_word: np.ndarray,
    sound: np.ndarray | None,
) -> dict[str, Any]:
    """Content of `seams` in `quality.json`.

    Args:
        trace: of the generation.
        seams: steps before which attention began afresh.
        window_steps: steps before and after a place whose words are compared; shorter where
            seams lie close.
        starts_word: what `listening.word_starts` says of the tokenizer.
        sound: of all streams, [S, samples]; None if the codes have none.

    Returns:
        `steps`, of the seams that are measured, those after the prompt with a window on either
        side; `window_steps`; `measures` by name, each with the means `elsewhere` and `at_seams`,
        and the mean `change` of a seam against its own stream elsewhere, with its 95 % interval,
        `low` and `high`: `level_step_db` and `spectral_flux_db` of the sound, `norm_step` of
        layers' inputs, `repeated_tokens`, `words_per_minute` and `broken_words` of the text.
    """
    window, steps, elsewhere = _places(trace, seams, window_steps)
    at_every_step = {"norm_step": _near(norm_steps(trace.input_norm))}
    if sound is not None:
        samples = sound.reshape(len(sound), -1, trace.clock.samples_per_step)
        at_every_step |= {name: _near(one) for name, one in sound_steps(samples).items()}

    def measured(stream: int, step: int) -> dict[str, float]:
        numbers = {name: float(values[stream, step]) for name, values in at_every_step.items()}
        return numbers | words_after(trace, stream, step, window, starts_word)

    streams = range(len(trace.text_tokens))
    there = [[measured(stream, step) for step in steps] for stream in streams]
    usual = [[measured(stream, step) for step in elsewhere] for stream in streams]
    names = dict.fromkeys(name for stream in there for one in stream for name in one)
    return {
        "steps": steps,
        "window_steps": window,
        "measures": {name: _compared(name, usual, there) for name in names},
    }


def _places(
    trace: Trace, seams: Sequence[int], window_steps: int
) -> tuple[int, list[int], list[int]]:
    """Steps of a window, seams with one on either side after the prompt, and places without any."""
    stop = trace.text_tokens.shape[1]
    apart = min(np.diff([0, *seams]), default=stop)
    window = max(1, min(window_steps, int(apart) // 3))
    inside = range(trace.free_from + window, stop - window + 1)
    elsewhere = [
        step
        for step in inside[::ELSEWHERE_EVERY]
        if all(abs(step - seam) >= window for seam in seams)
    ]
    return window, [seam for seam in seams if seam in inside], elsewhere


def words_after(
    trace: Trace, stream: int, step: int, window_steps: int, starts_word: np.ndarray
) -> dict[str, float]:
    """What is said in a window from a step on, and how much of it had been said in one before."""
    tokens = trace.text_tokens[stream]
    said = ~np.isin(tokens, trace.text_padding_ids)
    begins = starts_word[tokens.clip(0, len(starts_word) - 1)] & said
    before, after = slice(step - window_steps, step), slice(step, step + window_steps)
    # a word is said without a pause
    broken = said[after] & ~begins[after] & ~said[step - 1 : step + window_steps - 1]
    again = longest_shared(tokens[before][said[before]], tokens[after][said[after]])
    minutes = window_steps * trace.clock.step_sec / 60
    return {
        "repeated_tokens": float(again),
        "words_per_minute": float(begins[after].sum()) / minutes,
        "broken_words": float(broken.sum()),
    }


def _compared(
    name: str,
    usual: Sequence[Sequence[Mapping[str, float]]],
    there: Sequence[Sequence[Mapping[str, float]]],
) -> dict[str, float]:
    """Each seam with the mean of its own stream elsewhere."""
    pairs = [
        (float(np.mean([one[name] for one in elsewhere])) if elsewhere else np.nan, seam[name])
        for elsewhere, seams in zip(usual, there, strict=True)
        for seam in seams
    ]
    found = compare([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return {"elsewhere": found.pop("before"), "at_seams": found.pop("after"), **found}


def _near(values: np.ndarray) -> np.ndarray:
    """The largest value at a step and its neighbours: delayed codebooks spread a seam over two."""
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=-np.inf)
    return np.max([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], axis=0)


def sound_steps(samples: np.ndarray) -> dict[str, np.ndarray]:
    """How much the sound changes where a step begins.

    Args:
        samples: of streams S, step by step, [S, T, samples].

    Returns:
        `level_step_db`, difference of the levels of a step and the one before, both at least
        -60 dB; `spectral_flux_db`, root mean square over frequency of the difference between the
        spectra, in dB, of the last 43 ms before and the first after (spectral flux, Bello et al.
        2005, of log spectra); [S, T] each, 0 at the first step.
    """
    samples = samples.astype(np.float64)
    level = _db(np.sqrt(np.mean(np.square(samples), axis=-1)), SILENT_DB)
    window = np.hanning(FFT_SAMPLES)
    # a sinus of full scale has magnitude 1
    first, last = (
        _db(np.abs(np.fft.rfft(piece * window)) * 2 / window.sum(), EMPTY_DB)
        for piece in (samples[..., :FFT_SAMPLES], samples[..., -FFT_SAMPLES:])
    )
    flux = np.sqrt(np.mean(np.square(first[:, 1:] - last[:, :-1]), axis=-1))
    return {
        "level_step_db": np.abs(np.diff(level, axis=1, prepend=level[:, :1])),
        "spectral_flux_db": np.pad(flux, ((0, 0), (1, 0))),
    }


def _db(amplitude: np.ndarray, least: float) -> np.ndarray:
    decibels: np.ndarray = 20 * np.log10(np.maximum(amplitude, 10 ** (least / 20)))
    return decibels


def norm_steps(norms: np.ndarray) -> np.ndarray:
    """How much norms [S, L, T] change from step to step: mean over layers of |ln ratio|, [S, T]."""
    logs = np.log(norms.astype(np.float64))
    steps: np.ndarray = np.abs(np.diff(logs, axis=-1, prepend=logs[..., :1])).mean(axis=1)
    return steps


def longest_shared(before: np.ndarray, after: np.ndarray) -> int:
    """Length of the longest passage of `before` that `after` says again."""
    longest, run = 0, np.zeros(len(before) + 1, dtype=int)
    for token in after:
        # a passage that ends with this token is one longer than the one that ended before it
        run[1:] = np.where(before == token, run[:-1] + 1, 0)
        longest = max(longest, int(run.max()))
    return longest
