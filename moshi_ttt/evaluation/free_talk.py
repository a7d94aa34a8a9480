"""What a study keeps of a long generation: norms, cost, and how it sounds minute by minute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile
from moshi.models.lm import LMModel

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import can_be_searched, finite_mean
from moshi_ttt.diagnosis.listening import word_starts
from moshi_ttt.diagnosis.quality import audio_measures, codes_measures, text_measures
from moshi_ttt.diagnosis.recogniser import Recogniser, agreement, can_recognise
from moshi_ttt.diagnosis.voice import voice_drift
from moshi_ttt.evaluation.about import memory_bytes
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.evaluation.transcript import Spoken, said_between
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.source import ModelSource


def talk_record(lm: LMModel, source: ModelSource, evaluation: Evaluation) -> dict[str, Any]:
    """What a study keeps of an evaluation.

    Args:
        lm: the model that talked.
        source: whose tokenizer goes with it.
        evaluation: of that generation; its sound is that of the first streams.

    Returns:
        `streams`; `searched`, whether it was long enough for a jump to be found; `jumps`, their
        records; `norm_growth`, of the layer whose input norm grew most from start to end;
        `branch_ratio`, of the loudest memory; `step_ms`, median of all streams together;
        `state_bytes`, what rings and memories of one stream hold; `by_minute`, of the minutes since
        the prompt, what `minute_measures` gives, and `agreement_by_minute` if there is a
        recogniser. What is undefined is NaN.
    """
    trace, scalars = evaluation.trace(), evaluation.scalars
    rings = [ring for ring in trace.rings if ring.role == "temporal"]
    sound = [soundfile.read(path)[0][:, 0] for path in evaluation.audio]
    starts_word = word_starts(source.tokenizer())
    by_minute = minute_measures(trace, sound, starts_word=starts_word, cardinality=lm.card)
    if sound and can_recognise():
        by_minute |= agreement_by_minute(trace, sound, evaluation.transcripts)
    return {
        "streams": len(trace.streams),
        "searched": can_be_searched(trace),
        "jumps": evaluation.summary["jumps"],
        "norm_growth": _largest(scalars, "longgen/input_norm/", "/growth"),
        "branch_ratio": _largest(scalars, "memory/branch_ratio/"),
        "step_ms": float(np.nanmedian(trace.step_ms[trace.free_from :])),
        "state_bytes": memory_bytes(lm) + sum(ring.size_bytes // ring.batch for ring in rings),
        "by_minute": by_minute,
    }


def _largest(scalars: dict[str, float], beginning: str, end: str = "") -> float:
    """The largest of those whose tags begin and end so; NaN without any."""
    found = [
        value for tag, value in scalars.items() if tag.startswith(beginning) and tag.endswith(end)
    ]
    return max(found, default=np.nan)


def minute_measures(
    trace: Trace, sound: Sequence[np.ndarray], *, starts_word: np.ndarray, cardinality: int
) -> dict[str, list[float]]:
    """Measures of text, codes and sound by name, a value a minute: means over streams.

    Args:
        trace: of the generation; minutes count from the end of its prompt, and a rest is left out.
        sound: Moshi in the first streams, [samples] each; none if the codes have no sound.
        starts_word: what `word_starts` says of the tokenizer.
        cardinality: entries of a codebook.
    """
    clock = trace.clock
    by_minute: dict[str, list[float]] = {}
    for window in _minutes(trace):
        found: list[dict[str, float]] = []
        for text, codes in zip(trace.text_tokens, trace.codes, strict=True):
            measures = text_measures(
                text[window],
                trace.text_padding_ids,
                starts_word=starts_word,
                step_sec=clock.step_sec,
            )
            found.append(measures | codes_measures(codes[:, window], cardinality))
        heard = [audio_measures(_cut(one, window, clock), clock.sample_rate) for one in sound]
        for of_streams in filter(None, (found, heard)):
            for name in of_streams[0]:
                mean = finite_mean(np.array([one[name] for one in of_streams]))
                by_minute.setdefault(name, []).append(mean)
    drifts = [
        voice_drift([_cut(one, window, clock) for window in _minutes(trace)], clock.sample_rate)
        for one in sound
    ]
    return by_minute | _means("voice_distance_db", drifts)


def agreement_by_minute(
    trace: Trace, sound: Sequence[np.ndarray], transcripts: Sequence[Spoken]
) -> dict[str, list[float]]:
    """`recogniser_agreement` of sound with text, a value a minute: mean over streams.

    Args:
        trace: of the generation, as in `minute_measures`.
        sound: Moshi in the first streams, [samples] each.
        transcripts: words of every stream, with the second at which each begins.
    """
    clock, minutes = trace.clock, _minutes(trace)
    if not minutes:
        return {}
    edges_sec = [(clock.seconds(window.start), clock.seconds(window.stop)) for window in minutes]
    agreements = []
    for one, words in zip(sound, transcripts, strict=False):
        texts = [said_between(words, *edges) for edges in edges_sec]
        recogniser = Recogniser(texts)
        heard = [recogniser.hears(_cut(one, at, clock), clock.sample_rate) for at in minutes]
        agreements.append([*map(agreement, texts, heard)])
    return _means("recogniser_agreement", agreements)


def _minutes(trace: Trace) -> list[slice]:
    """Steps of each whole minute since the prompt; what is said in the last step is not known."""
    first, minute = trace.free_from, trace.clock.steps(60)
    return [slice(at, at + minute) for at in range(first, trace.steps - minute + 1, minute)]


def _means(name: str, streams: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """A measure by minute, mean over the streams in which it is defined; empty without any."""
    means = [finite_mean(np.array(minute)) for minute in zip(*streams, strict=True)]
    return {name: means} if means else {}


def _cut(samples: np.ndarray, window: slice, clock: Clock) -> np.ndarray:
    return samples[window.start * clock.samples_per_step : window.stop * clock.samples_per_step]
