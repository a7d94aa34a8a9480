"""The text row: words laid over steps the way Moshi was trained.

The algorithm is moshi-finetune's (`finetune/data/interleaver.py`), applied to the whole recording:
cut afterwards, a word that crosses the start of a window keeps its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data.alignments import Word

ZERO_TOKEN = -1  # moshi's "no input, no target"


class Tokenizer(Protocol):
    """What is used of a sentencepiece processor."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text row of one recording."""

    tokens: Tensor  # [T] int64
    written_tokens: int
    dropped_tokens: int
    """Tokens of words that the next word cut short: speech faster than a token a step."""
    word_steps: tuple[range, ...]
    """Of each word, the steps that hold its tokens; empty if all of them were dropped."""


def lay_text(
    words: Sequence[Word] | None,
    tokenizer: Tokenizer,
    steps: int,
    clock: Clock,
    *,
    padding_id: int,
    end_of_padding_id: int,
) -> TextRow:
    """Lay words over steps, one token a step from the step in which a word starts.

    A later word cuts an earlier one short. The padding step before a token becomes
    end-of-padding, which tells the model that a word comes next.

    Args:
        words: by start; None for unknown text, which gives `ZERO_TOKEN` throughout.
        tokenizer: applied to each word on its own.
        steps: length T of the recording.
        clock: of the codec.
        padding_id: token of a step without a word.
        end_of_padding_id: token of the last padding step before a word.
    """
    if words is None:
        return TextRow(torch.full((steps,), ZERO_TOKEN), 0, 0, ())
    tokens = [padding_id] * steps
    waiting = deque(words)
    unfinished: deque[int] = deque()
    word_steps: list[range] = []
    written = dropped = 0
    for step in range(steps):
        while waiting and _step_of(waiting[0], clock) <= step:
            dropped += len(unfinished)
            unfinished = deque(tokenizer.encode(waiting.popleft().text))
            word_steps.append(range(step, step))
        if unfinished:
            if step > 0 and tokens[step - 1] == padding_id:
                tokens[step - 1] = end_of_padding_id
            tokens[step] = unfinished.popleft()
            word_steps[-1] = range(word_steps[-1].start, step + 1)
            written += 1
    dropped += len(unfinished) + sum(len(tokenizer.encode(word.text)) for word in waiting)
    word_steps += [range(steps, steps) for _ in waiting]
    return TextRow(torch.tensor(tokens), written, dropped, tuple(word_steps))


def _step_of(word: Word, clock: Clock) -> int:
    """The step in which a word starts, on whole samples: as a float 2.32 s * 12.5 is below 29."""
    return round(word.start_sec * clock.sample_rate) // clock.samples_per_step
