"""What was said in text, with the second at which each part of it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moshi_ttt.diagnosis.listening import word_starts
from moshi_ttt.model.source import ModelSource

Spoken = list[tuple[float, str]]
"""Second and text of each part, in order."""
PAUSE_SEC = 1.0  # a longer one begins a new line


def spoken_lines(tokens: Sequence[int], source: ModelSource) -> Spoken:
    """Stretches of words without a long pause.

    Args:
        tokens: one text token a step; padding, and what the tokenizer does not know, is silence.
        source: whose tokenizer and clock they are of.
    """
    clock = source.clock
    return list(_parts(tokens, source, lambda step, after: clock.seconds(after - step) > PAUSE_SEC))


def spoken_words(tokens: Sequence[int], source: ModelSource) -> Spoken:
    """Word by word; the arguments are those of `spoken_lines`."""
    starts = word_starts(source.tokenizer())
    return list(_parts(tokens, source, lambda _, after: bool(starts[tokens[after]])))


def said_between(words: Spoken, first_sec: float, stop_sec: float) -> str:
    """What begins at `first_sec` or later, and before `stop_sec`."""
    return " ".join(text for second, text in words if first_sec <= second < stop_sec)


def _parts(
    tokens: Sequence[int], source: ModelSource, parts: Callable[[int, int], bool]
) -> Iterator[tuple[float, str]]:
    """What is said between two steps that `parts` says are parted."""
    tokenizer = source.tokenizer()
    silent = (source.text_padding_id, source.end_of_text_padding_id)
    known = range(tokenizer.get_piece_size())
    spoken = [step for step, one in enumerate(tokens) if one in known and one not in silent]
    first = 0
    for number, step in enumerate(spoken, 1):
        if number == len(spoken) or parts(step, spoken[number]):
            text = tokenizer.decode([tokens[one] for one in spoken[first:number]])
            yield source.clock.seconds(spoken[first]), text
            first = number
