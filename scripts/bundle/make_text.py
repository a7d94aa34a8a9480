"""Write conversations as text alone, to be trained on beside spoken ones.

    python scripts/bundle/make_text.py build/text/drill --split drill --hours 900 --model build/tiny
    python scripts/bundle/make_text.py build/pasted --split far --seed 1 --hours 300 \
        --model build/tiny --words_of build/far/manifest.jsonl

Moshi's language model was one of text before it heard anything, and so is the tiny one: recall and
grammar need far more words than anyone wants to synthesise and encode. Each file holds what Moshi
says, laid over steps as if it were spoken; the audio is unknown (-1), which is no input and no
target. All facts are Moshi's own: one that only the user says is nowhere in such a file. With
`--words_of` both sides are put together from the codes of phrases in spoken conversations: see
word_bank.py. Writes OUT/text-SPLIT-NNNNN.npz and OUT/manifest.jsonl. Conversation i depends on the
seed, the split, the range of lengths, the phrases and i alone.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_conversations import Recipe, add_set, recipes, write_manifest
from splits import SPLITS
from timeline import SPEAKERS, plan
from utterance import SAMPLE_RATE, Utterance
from word_bank import WordBank, lay_pasted

from moshi_ttt.command_line import add_model, parse, program_parser
from moshi_ttt.data import CodesFormat
from moshi_ttt.data.alignments import Word
from moshi_ttt.data.codes_file import CODES_SUFFIX, write_codes
from moshi_ttt.data.text import ZERO_TOKEN, lay_text
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW, Rows

_STREAM = 2  # of a recipe's random numbers; speech has 0 and 1
_WORD_SEC, _LETTER_SEC, _PAUSE_SEC = 0.012, 0.050, 0.16
"""From one word to the next, its letters, and what the last of a sentence takes more: means of the
synthesisers, over 8103 words."""
_SPREAD = 0.25  # of the logarithm


class Reader:
    """Says nothing, and takes as long for it as a voice would."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._speed = rng.uniform(0.9, 1.1)

    def say(self, sentence: str) -> Utterance:
        """Words and their times, without sound."""
        words = sentence.split()
        letters = np.array([len(word.strip(".,?!")) for word in words])
        seconds = _WORD_SEC + _LETTER_SEC * letters
        seconds *= np.exp(_SPREAD * self._rng.standard_normal(len(words))) / self._speed
        seconds[-1] += _PAUSE_SEC
        edges = np.concatenate([[0.0], np.cumsum(seconds)]).tolist()
        silence = np.zeros(round(edges[-1] * SAMPLE_RATE), np.float32)
        return Utterance(silence, tuple(zip(words, edges, edges[1:], strict=False)))


@cache  # by names, which are equal in every call of a process; a source is another one in each
def _bank(manifest: Path, model: str) -> WordBank:
    return WordBank.read(manifest, open_source(model))


def write_text(
    recipe: Recipe, folder: Path, source: ModelSource, words_of: Path | None = None
) -> tuple[str, float]:
    """Write one conversation, its sound unknown or that of phrases in a manifest.

    Returns:
        The name of its file, and its length in seconds.
    """
    rng, clock = recipe.rng(_STREAM), source.clock
    split = replace(SPLITS[recipe.split], own_share=1.0)
    if words_of is None:
        made = plan((Reader(rng), Reader(rng)), rng, recipe.least_sec, split)
        steps = clock.steps(made.duration_sec)
        codes = torch.full((Rows.of(source).count, steps), ZERO_TOKEN)
        words = [Word(text, *span) for text, span, who in made.alignments() if who == SPEAKERS[0]]
    else:
        speakers = _bank(words_of, source.name).speakers(rng, clock)
        made = plan(speakers, rng, recipe.least_sec, split)
        steps = clock.steps(made.duration_sec)
        codes, words = lay_pasted(made.placed, speakers, source, steps)
    laid = lay_text(
        words,
        source.tokenizer(),
        steps,
        clock,
        padding_id=source.text_padding_id,
        end_of_padding_id=source.end_of_text_padding_id,
    )
    codes[TEXT_ROW] = laid.tokens
    path = folder / f"text-{recipe.name}{CODES_SUFFIX}"
    write_codes(path, codes, CodesFormat.of(source), f"text of {recipe}")
    return path.name, round(clock.seconds(steps), 4)


def main(
    out: Path,
    *,
    hours: float,
    model: str,
    split: str = "train",
    minutes: tuple[float, float] = (3.0, 15.0),
    seed: int = 0,
    workers: int = 1,
    words_of: Path | None = None,
) -> None:
    """Write the text files and their manifest.

    Raises:
        UserError: the model or the words cannot be read, or there is nothing to write.
    """
    if not 0 < hours < float("inf"):
        raise UserError(f"--hours {hours:g} must be above 0; give hours of text, such as 300")
    todo = list(recipes(hours, split, seed, minutes))
    with settings_at("", source="--model"):
        source = open_source(model)
    write = partial(write_text, folder=out, source=source, words_of=words_of)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn")) as pool:
        written = pool.map(write, todo, chunksize=4)
        durations_sec = dict(progress(written, total=len(todo), unit="conversation"))
    write_manifest(out / "manifest.jsonl", durations_sec)


if __name__ == "__main__":
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("out", type=Path, help="Folder to write.")
    add("--hours", type=float, required=True, help="Hours of text.")
    add_model(parser, required=True)
    add("--words_of", type=Path, help="Manifest of speech whose phrases are the sound.")
    add_set(parser)
    run_program(partial(main, **vars(parse(parser, None))))
