from __future__ import annotations

import pytest
from data_fakes import CLOCK, END_PAD, PAD, LetterTokenizer

from moshi_ttt.data.alignments import Word
from moshi_ttt.data.text import TextRow, lay_text

A, B, C, D = 10, 11, 12, 13


def laid(words: list[Word] | None, steps: int) -> TextRow:
    return lay_text(
        words, LetterTokenizer(), steps, CLOCK, padding_id=PAD, end_of_padding_id=END_PAD
    )


@pytest.mark.parametrize(
    ("words", "steps", "expected", "dropped"),
    [
        # 0.5 s is inside step 6 (0.48 to 0.56 s)
        ([("ab", 0.5)], 10, [PAD] * 5 + [END_PAD, A, B, PAD, PAD], 0),
        # a word in the first step has no padding step before it to mark
        ([("a", 0.0)], 3, [A, PAD, PAD], 0),
        ([("a", 0.079)], 3, [A, PAD, PAD], 0),
        # starts on a step's first sample belong to that step
        ([("a", 0.08)], 3, [END_PAD, A, PAD], 0),
        # back to back: no padding between, so no mark
        ([("ab", 0.08), ("c", 0.24)], 5, [END_PAD, A, B, C, PAD], 0),
        # one padding step between is the mark itself
        ([("a", 0.08), ("c", 0.24)], 5, [END_PAD, A, END_PAD, C, PAD], 0),
        # the later word cuts the earlier one short: "cd" is lost
        ([("abcd", 0.0), ("a", 0.16)], 4, [A, B, A, PAD], 2),
        # two words in one step: only the later is said
        ([("ab", 0.0), ("cd", 0.05)], 3, [C, D, PAD], 2),
        # the recording ends before the word does
        ([("abcd", 0.08)], 3, [END_PAD, A, B], 2),
        # a start after the last step is said nowhere
        ([("ab", 0.4)], 3, [PAD, PAD, PAD], 2),
    ],
)
def test_words_fall_on_the_steps_worked_out_by_hand(
    words: list[tuple[str, float]], steps: int, expected: list[int], dropped: int
) -> None:
    got = laid([Word(text, start, start + 1) for text, start in words], steps)
    assert got.tokens.tolist() == expected
    assert got.dropped_tokens == dropped
    assert got.written_tokens == sum(token >= A for token in expected)


def test_unknown_text_is_the_zero_token_and_silence_is_padding() -> None:
    assert laid(None, 3).tokens.tolist() == [-1, -1, -1]
    assert laid([], 3).tokens.tolist() == [PAD, PAD, PAD]


def test_step_boundaries_are_exact_where_floats_are_not() -> None:
    assert 2.32 * 12.5 < 29  # upstream's rule puts a word that starts with step 29 into step 28
    starts = range(2, 6000, 3)  # a padding step, its mark, the word
    words = [Word("a", round(step * 0.08, 2), 1e9) for step in starts]
    assert laid(words, 6000).tokens.tolist() == [PAD, END_PAD, A] * 2000


def test_a_word_across_the_cut_keeps_its_tokens() -> None:
    tokens = laid([Word("abcd", 0.08, 0.5)], 8).tokens
    assert tokens[3:].tolist() == [C, D, PAD, PAD, PAD]
