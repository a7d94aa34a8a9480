"""How a generation sounds and reads, in numbers: pure functions of samples and tokens.

A jump of a norm matters if it can be heard. What is undefined (nothing was said, no window) is
NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from moshi_ttt.diagnosis.spectrum import FFT_SAMPLES, heard_power, is_silent
from moshi_ttt.rows import GROUPS

CLIPPED = 0.999  # of full scale; decoded audio is cut off at 1
FRAME_SEC = 0.02  # of the silence share
TOKENS_PER_N_GRAM = 3
NAN = math.nan

AUDIO = ("rms", "silence_share", "spectral_flatness", "spectral_centroid_hz", "clipping_share")
TEXT = (
    "padding_share",
    "words_per_minute",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
    "longest_repeat",
)
CODES = ("codes_used", "code_perplexity_first", "code_perplexity_others")


def audio_measures(samples: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Level, silence, spectrum and clipping of one channel.

    Args:
        samples: [n], full scale 1.
        sample_rate: in Hz.

    Returns:
        `rms`; `silence_share`, of frames of 20 ms below -50 dB; `spectral_flatness`, geometric
        over arithmetic mean of the power spectrum averaged over the frames that are not silent
        (1 white noise, near 0 a tone); `spectral_centroid_hz` of the same spectrum;
        `clipping_share` of samples at full scale.
    """
    if samples.size == 0:
        return dict.fromkeys(AUDIO, NAN)
    samples = samples.astype(np.float64)
    flatness, centroid_hz = _spectrum_measures(samples, sample_rate)
    frames = _frames(samples, round(FRAME_SEC * sample_rate))
    return {
        "rms": _rms(samples),
        "silence_share": float(np.mean(is_silent(frames))),
        "spectral_flatness": flatness,
        "spectral_centroid_hz": centroid_hz,
        "clipping_share": float(np.mean(np.abs(samples) >= CLIPPED)),
    }


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def _frames(samples: np.ndarray, length: int) -> np.ndarray:
    """Whole frames side by side, [frames, length]; a shorter signal is one frame."""
    if len(samples) < length:
        return samples[None]
    return samples[: len(samples) // length * length].reshape(-1, length)


def _spectrum_measures(samples: np.ndarray, sample_rate: int) -> tuple[float, float]:
    frames = heard_power(samples)
    if not len(frames):
        return NAN, NAN
    power = frames.mean(axis=0)[1:-1]  # neither the offset nor the half band at the end
    hertz = np.fft.rfftfreq(FFT_SAMPLES, 1 / sample_rate)[1:-1]
    # far below anything audible, so that a pure tone is flat 0, not log of 0
    floor = 1e-12 * power.max()
    flatness = np.exp(np.mean(np.log(power + floor))) / np.mean(power + floor)
    return float(flatness), float((hertz * power).sum() / power.sum())


def text_measures(
    tokens: np.ndarray,
    padding_ids: Sequence[int],
    *,
    starts_word: np.ndarray | None = None,
    step_sec: float = NAN,
) -> dict[str, float]:
    """Pace and repetition of one text stream.

    Args:
        tokens: one a step, [n].
        padding_ids: tokens that say nothing.
        starts_word: whether each token of the vocabulary starts a word, [vocabulary]; None
            leaves the pace undefined.
        step_sec: length of a step.

    Returns:
        `padding_share`; `words_per_minute`; `distinct_n`, different n-grams over n-grams;
        `repetition`, 1 - distinct_3; `longest_repeat`, tokens of the longest passage that comes
        again without overlapping itself.
    """
    if len(tokens) == 0:
        return dict.fromkeys(TEXT, NAN)
    said = tokens[~np.isin(tokens, padding_ids)]
    words = NAN
    if starts_word is not None:
        known = said[(said >= 0) & (said < len(starts_word))]
        words = float(starts_word[known].sum()) / (len(tokens) * step_sec / 60)
    distinct = {f"distinct_{n}": distinct_n(said, n) for n in (1, 2, TOKENS_PER_N_GRAM)}
    return {
        "padding_share": 1 - len(said) / len(tokens),
        "words_per_minute": words,
        **distinct,
        "repetition": 1 - distinct[f"distinct_{TOKENS_PER_N_GRAM}"],
        "longest_repeat": float(longest_repeat(said)),
    }


def running_text(
    tokens: np.ndarray, padding_ids: Sequence[int], window_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padding share and repetition of every step, over the steps before it.

    Args:
        tokens: text tokens, [S, n].
        padding_ids: tokens that say nothing.
        window_steps: steps that are looked back on; fewer at the start.

    Returns:
        Padding share [S, n]; and, of the tokens said in the window, the share that ends a trigram
        which had been said within as many steps before it, [S, n], NaN while nothing was said.
    """
    said = ~np.isin(tokens, padding_ids)
    rows = zip(tokens, said, strict=True)
    again = np.stack([said_again(*row, window_steps) for row in rows])
    spoken_steps, again_steps = (_running_sum(flags, window_steps) for flags in (said, again))
    steps = np.minimum(np.arange(1, tokens.shape[1] + 1), window_steps)
    with np.errstate(invalid="ignore"):
        return 1 - spoken_steps / steps, again_steps / np.where(spoken_steps, spoken_steps, np.nan)


def said_again(tokens: np.ndarray, said: np.ndarray, look_back_steps: int) -> np.ndarray:
    """Whether a trigram ends at a step that had been said before.

    Args:
        tokens: one a step, [n].
        said: the steps that count, [n]; trigrams reach over the others.
        look_back_steps: how long before, at most.

    Returns:
        [n], False where nothing is said.
    """
    again = np.zeros_like(said)
    seen: dict[tuple[int, ...], int] = {}
    spoken = np.flatnonzero(said).tolist()
    for place in range(TOKENS_PER_N_GRAM - 1, len(spoken)):
        at = spoken[place]
        gram = tuple(tokens[spoken[place - TOKENS_PER_N_GRAM + 1 : place + 1]].tolist())
        again[at] = at - seen.get(gram, -look_back_steps - 1) <= look_back_steps
        seen[gram] = at
    return again


def _running_sum(flags: np.ndarray, window_steps: int) -> np.ndarray:
    total = np.cumsum(flags, axis=1, dtype=np.float64)
    total[:, window_steps:] -= total[:, :-window_steps].copy()
    return total


def distinct_n(tokens: np.ndarray, n: int) -> float:
    """Different n-grams over all n-grams, 0..1; NaN without any."""
    count = len(tokens) - n + 1
    if count < 1:
        return NAN
    return len({tuple(tokens[at : at + n].tolist()) for at in range(count)}) / count


def longest_repeat(tokens: np.ndarray) -> int:
    """Length of the longest passage that occurs twice without overlapping itself."""
    longest = 0
    for lag in range(1, len(tokens)):
        if lag > longest:  # a passage that comes again after `lag` has at most `lag` tokens
            same = np.flatnonzero(np.concatenate([[True], tokens[lag:] != tokens[:-lag], [True]]))
            longest = max(longest, min(lag, int(np.diff(same).max()) - 1))
    return longest


def codes_measures(codes: np.ndarray, cardinality: int) -> dict[str, float]:
    """How much of the codebooks is used.

    Args:
        codes: [Q, n], the first row the semantic codebook.
        cardinality: entries of a codebook.

    Returns:
        `codes_used`, different codes over those there could be in n steps, mean over codebooks;
        `code_perplexity_first` and `code_perplexity_others`, exp of the entropy of their use.
    """
    if codes.shape[1] == 0:
        return dict.fromkeys(CODES, NAN)
    counts = [np.unique(row, return_counts=True)[1] for row in codes]
    shares = [count / count.sum() for count in counts]
    perplexities = [float(np.exp(-(share * np.log(share)).sum())) for share in shares]
    most = min(cardinality, codes.shape[1])
    return {
        "codes_used": float(np.mean([len(count) / most for count in counts])),
        "code_perplexity_first": perplexities[0],
        "code_perplexity_others": float(np.mean(perplexities[1:])) if len(codes) > 1 else NAN,
    }


def nll_measures(nll: Mapping[str, Any], first: int, stop: int) -> dict[str, float]:
    """Teacher-forced NLL of steps `first` to `stop` - 1, in nats, from windows of `nll.json`.

    The windows that lie at least half inside count, equally.
    """
    starts, length = np.array(nll["start_step"]), nll["window_steps"]
    inside = np.minimum(starts + length, stop) - np.maximum(starts, first)
    chosen = inside * 2 >= min(length, stop - first)
    measures = {}
    for group in (group for group in GROUPS if group in nll):
        kept = np.array(nll[group], dtype=float)[chosen]
        kept = kept[np.isfinite(kept)]
        measures[f"nll_{group}"] = float(kept.mean()) if kept.size else NAN
    return measures


def compare(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """A measure before and after a position, stream by stream.

    Args:
        before: one value a stream.
        after: the same streams.

    Returns:
        Means `before` and `after`; mean of the paired differences `change`, with its 95 %
        interval by Student's t (`low`, `high`), which needs two streams or more.
    """
    pairs = np.array([before, after], dtype=float)
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    count = pairs.shape[1]
    if count == 0:
        return dict.fromkeys(("before", "after", "change", "low", "high"), NAN)
    differences = pairs[1] - pairs[0]
    change, half = float(differences.mean()), NAN
    if count > 1:
        error = float(differences.std(ddof=1)) / math.sqrt(count)
        half = float(student_t.ppf(0.975, count - 1)) * error
    return {
        "before": float(pairs[0].mean()),
        "after": float(pairs[1].mean()),
        "change": change,
        "low": change - half,
        "high": change + half,
    }


def around(
    step: int, window_steps: int, *, first: int, stop: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Windows before and after a step inside `first`..`stop`, as (first, stop) pairs.

    None if less than half a window is left on one side.
    """
    before, after = (max(first, step - window_steps), step), (step, min(stop, step + window_steps))
    if any(2 * (end - start) < window_steps for start, end in (before, after)):
        return None
    return before, after


Measure = Callable[[int, int, int], dict[str, float]]
"""Measures of one stream (index) in steps first..stop."""


def measure_around(
    windows: tuple[tuple[int, int], tuple[int, int]], streams: int, measure: Measure
) -> dict[str, dict[str, float]]:
    """`compare` of every measure of every stream, by name."""
    before, after = (
        [measure(stream, first, stop) for stream in range(streams)] for first, stop in windows
    )
    return {
        name: compare([one[name] for one in before], [one[name] for one in after])
        for name in before[0]
    }
