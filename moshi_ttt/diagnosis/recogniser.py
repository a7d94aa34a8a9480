"""Does the sound say what the text says? A recogniser that expects the text is asked what it hears.

The recogniser is pocketsphinx with the model of English in its wheel, which need not be there
(`pip install -e '.[asr]'`). It expects the trigrams of the text: one that expects nothing is
slower, and mistakes a quarter of the words of real speech that a small codec has copied. And yet
it follows the sound where that says something else; `scripts/measure_speech.py` measures it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.signal import resample_poly
from torchmetrics.functional.text import match_error_rate

RATE = 16_000  # of the recogniser's model, in Hz

logger = logging.getLogger(__name__)


@functools.cache
def can_recognise() -> bool:
    """Whether there is a recogniser; if not, that is said once."""
    if importlib.util.find_spec("pocketsphinx") is not None:
        return True
    logger.warning(
        "pocketsphinx is not installed: whether the sound says what the text says is not "
        "measured; pip install -e '.[asr]'"
    )
    return False


def plain_words(text: str) -> str:
    """Lower-case words without punctuation, as the recogniser spells them."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


class Recogniser:
    """Hears English that is expected to be some text.

    Args:
        texts: all that may be said, one or more, whose trigrams it expects.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from pocketsphinx import Decoder
        from pocketsphinx.lm import ArpaBoLM

        lines = [_pronounceable(text) for text in texts]
        words = sorted({word for line in lines for word in line.split()})
        trigrams = ArpaBoLM(text="".join(f"{line}\n" for line in lines), add_start=True)
        trigrams.compute()
        with TemporaryDirectory() as folder:
            dictionary, model = Path(folder) / "words.dict", Path(folder) / "text.lm"
            # the whole dictionary would take seconds to read, for every text
            dictionary.write_text("".join(_pronunciations()[word] for word in words))
            with model.open("w") as file:
                trigrams.write(file)
            self._decoder = Decoder(
                samprate=RATE,
                dict=str(dictionary),
                lm=str(model),
                cmn="batch",  # what is heard does not depend on what was heard before
                loglevel="FATAL",
            )

    def hears(self, samples: np.ndarray, sample_rate: int) -> str:
        """Words of some sound.

        Args:
            samples: [n], one or more, full scale 1.
            sample_rate: in Hz.
        """
        common = math.gcd(RATE, sample_rate)
        resampled = resample_poly(samples, RATE // common, sample_rate // common)
        pcm = (np.clip(resampled, -1, 1) * np.iinfo(np.int16).max).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return plain_words(hypothesis.hypstr) if hypothesis else ""


def agreement(text: str, heard: str) -> float:
    """How much of a text and of what is heard is the same: 1 - match error rate, 0..1.

    Words of the text whose pronunciation is unknown are left out; NaN if none is left.
    """
    said = _pronounceable(text)
    return 1 - float(match_error_rate([heard], [said])) if said else math.nan


def _pronounceable(text: str) -> str:
    """The words whose pronunciation is known."""
    return " ".join(filter(_pronunciations().__contains__, plain_words(text).split()))


@functools.cache
def _pronunciations() -> dict[str, str]:
    """Lines of the recogniser's dictionary, by the word that they pronounce."""
    from pocketsphinx import get_model_path

    lines: dict[str, str] = {}
    for line in Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines(True):
        word = line.partition(" ")[0].partition("(")[0]  # `read(2)` is another way to say it
        lines[word] = lines.get(word, "") + line
    return lines
