"""Recall as it is used: does Moshi say the value when it is asked?

Everything is forced up to the end of the question; then Moshi talks freely and the user is silent.
An answer counts if every word of the value is said within a few seconds, in order. Unlike the
teacher-forced measure this asks Moshi to speak at the right time, and to hear itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.evaluation.folder import write_wav
from moshi_ttt.files import write_json
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep
from moshi_ttt.generation.users import silence_codes, user_codes
from moshi_ttt.model.hybrid import hybrid_layers, reset_memories
from moshi_ttt.model.source import ModelSource
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW, Rows
from moshi_ttt.teacher_forcing.recall import (
    GAP_CENTRES_SEC,
    GROUPS,
    Recall,
    gap_bin,
    group_of,
    wilson_interval,
)

Question = tuple[EncodedRecording, Probe]
ANSWER_SEC = 5.0  # within which the value has to be said
LEAD_SEC = 10.0  # of the recording, to be heard before an answer
HEARD_ANSWERS = 10


class Decoder(Protocol):
    """What is used of a sentencepiece processor."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


@dataclass(frozen=True, slots=True)
class FreeAnswer:
    """What came after one question."""

    recording: str
    probe: Probe
    expected: tuple[str, ...]
    """Words of the value, as the recording's text row has them."""
    text: str
    """What Moshi said."""
    codes: Tensor
    """[K, T] from the start of the recording to the end of the answer: text, own, user."""
    free_from: int
    """First step that was not forced."""

    @property
    def right(self) -> bool:
        """Whether all words of the value were said, in order, whatever came between."""
        said = iter(_words(self.text))
        return all(word in said for word in self.expected)

    @property
    def name(self) -> str:
        """For a file: class, gap and whether it is right."""
        right = "right" if self.right else "wrong"
        return f"{GROUPS[group_of(self.probe)]}_{self.probe.gap_sec:.0f}s_{right}"

    def record(self) -> dict[str, Any]:
        """One answer as people read it."""
        return {
            "recording": self.recording,
            "kind": self.probe.kind,
            "group": GROUPS[group_of(self.probe)],
            "gap_sec": self.probe.gap_sec,
            "expected": list(self.expected),
            "said": self.text,
            "right": self.right,
        }


def choose_questions(recordings: Sequence[EncodedRecording], count: int) -> list[Question]:
    """At most `count` questions, as evenly over groups and gaps as there are."""
    cells: dict[tuple[int, int], list[Question]] = {}
    for recording in recordings:
        for probe in recording.probes:
            cell = group_of(probe), gap_bin(probe.gap_sec)
            cells.setdefault(cell, []).append((recording, probe))
    rounds = zip_longest(*(cells[cell] for cell in sorted(cells)))
    return [one for turn in rounds for one in turn if one is not None][:count]


After = Literal["question", "key"]
"""What is forced last: the question, or the part of Moshi's answer that names what is asked for
("your number was"), so that a model which did not understand the question is asked all the same."""


def free_from(probe: Probe, after: After = "question") -> int:
    """First step that is not forced; where the value starts if the question's end is unknown."""
    answer = probe.answer_steps[0].start
    if after == "key" or probe.asked_until_step is None:
        return answer
    return min(probe.asked_until_step + 1, answer)


def free_answers(
    lm: LMModel,
    decoder: Decoder,
    questions: Sequence[Question],
    silence: Tensor,
    *,
    answer_steps: int,
    memory: Literal["kept", "reset"] = "kept",
    after: After = "question",
    streams: int = 32,
    seed: int = 0,
) -> list[FreeAnswer]:
    """Ask, and let Moshi answer freely; the model is handed back unchanged.

    Args:
        lm: model under test.
        decoder: its text tokenizer.
        questions: what `choose_questions` gave.
        silence: what `silence_codes` gave, [K_user, 1].
        answer_steps: how long Moshi may talk.
        memory: `reset` takes it away just before each question.
        after: what is forced last.
        streams: questions asked side by side, as memory allows; those of similar length are.
        seed: of the sampling.

    Returns:
        An answer a question, in order.
    """
    order = sorted(range(len(questions)), key=lambda index: free_from(questions[index][1], after))
    found: dict[int, FreeAnswer] = {}
    batches = range(0, len(order), streams)
    for first in progress(batches, desc=f"free answers, {memory}", unit="batch", leave=False):
        batch = order[first : first + streams]
        asked = [questions[index] for index in batch]
        with borrowed(lm, seed):
            starts = [free_from(probe, after) for _, probe in asked]
            spoken, user = _talk(lm, asked, starts, silence, answer_steps, memory)
        for row, (index, one, start) in enumerate(zip(batch, asked, starts, strict=True)):
            codes = torch.cat([spoken[row], user[row]])[:, : start + answer_steps]
            found[index] = _answer(lm, decoder, one, codes, start)
    return [found[index] for index in range(len(questions))]


def _talk(
    lm: LMModel,
    questions: Sequence[Question],
    starts: Sequence[int],
    silence: Tensor,
    answer_steps: int,
    memory: str,
) -> tuple[Tensor, Tensor]:
    """Codes [S, K_spoken, T] and users [S, K_user, T] of questions side by side.

    The streams are forced until their own start: what is -1 is sampled.
    """
    rows = Rows.of(lm)
    steps = max(starts) + answer_steps
    forced = torch.full((len(starts), rows.count, steps + 1), -1)
    for row, ((recording, _), start) in enumerate(zip(questions, starts, strict=True)):
        forced[row, :, :start] = recording.codes[:, :start]
    user = user_codes(forced, silence, rows)  # behind the question it is not known, so silent
    resets: dict[int, list[int]] = {}
    if memory == "reset":
        for row, ((_, probe), start) in enumerate(zip(questions, starts, strict=True)):
            resets.setdefault(start if probe.asked_step is None else probe.asked_step, []).append(
                row
            )

    def reset(step: int) -> None:
        # what is read from the next step on is the question
        if step + 1 in resets:
            mask = torch.zeros(len(starts), dtype=torch.bool, device=lm.device)
            mask[resets[step + 1]] = True
            reset_memories(lm, mask)

    prompt = forced[..., : max(starts)]
    return generate(lm, prompt, user, observers=[EachStep(reset)]).cpu(), user[..., :steps]


def _answer(
    lm: LMModel, decoder: Decoder, question: Question, codes: Tensor, start: int
) -> FreeAnswer:
    recording, probe = question
    padding = (lm.text_padding_token_id, lm.end_of_text_padding_id)

    def text(tokens: Tensor) -> str:
        return decoder.decode([token for token in tokens.tolist() if token not in padding])

    value = [
        text(recording.codes[TEXT_ROW, steps.start : steps.stop]) for steps in probe.answer_steps
    ]
    return FreeAnswer(
        recording.name,
        probe,
        tuple(word for one in value for word in _words(one)),
        text(codes[TEXT_ROW, start:]),
        codes,
        start,
    )


def answer_sound(codec: MimiModel, answer: FreeAnswer, rows: Rows, lead_steps: int) -> np.ndarray:
    """The answer and the `lead_steps` before it, left Moshi, right the user: [samples, 2].

    What is not known of the forced part (-1) sounds as code 0.
    """
    piece = answer.codes[:, max(0, answer.free_from - lead_steps) :].clamp(min=0)
    return decode(codec, torch.stack([piece[rows.own], piece[rows.user]]).numpy()).T


def _words(text: str) -> list[str]:
    """Lower-cased and without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def answers_record(answers: Sequence[FreeAnswer]) -> Recall:
    """Lists over the bins that hold questions, by group and quantity.

    `gap_sec` (middle of the bin), `questions`, `right` (share), `low` and `high` (95 % Wilson
    interval), `chance` (of guessing every word of the value).
    """
    record: Recall = {}
    for group, name in enumerate(GROUPS):
        for row, gap_sec in enumerate(GAP_CENTRES_SEC):
            cell = [
                one
                for one in answers
                if (group_of(one.probe), gap_bin(one.probe.gap_sec)) == (group, row)
            ]
            if not cell:
                continue
            right = sum(one.right for one in cell) / len(cell)
            low, high = wilson_interval(right, len(cell))
            chance = sum(one.probe.chance ** len(one.expected) for one in cell) / len(cell)
            values = {"gap_sec": gap_sec, "questions": len(cell), "right": right}
            values |= {"low": low, "high": high, "chance": chance}
            for what, value in values.items():
                record.setdefault(name, {}).setdefault(what, []).append(value)
    return record


def answer_freely(
    lm: LMModel,
    source: ModelSource,
    recordings: Sequence[EncodedRecording],
    count: int,
    after: After,
    folder: Path,
) -> dict[str, Recall]:
    """Shares of questions that are answered, by memory, group and gap.

    Args:
        lm: in eval mode.
        source: whose codec, tokenizer and clock go with it.
        recordings: with probes.
        count: questions at most.
        after: what is forced last.
        folder: for what was said, and for the first answers as sound.
    """
    codec, clock, rows = source.codec(lm.device), source.clock, Rows.of(lm)
    questions = choose_questions(recordings, count)
    shares: dict[str, Recall] = {}
    memories: tuple[Literal["kept", "reset"], ...] = ("kept", "reset")
    for memory in memories if hybrid_layers(lm) else memories[:1]:
        answers = free_answers(
            lm,
            source.tokenizer(),
            questions,
            silence_codes(codec, clock, rows.user_codebooks).cpu(),
            answer_steps=clock.steps(ANSWER_SEC),
            memory=memory,
            after=after,
        )
        shares[memory] = answers_record(answers)
        write_json(folder / f"{memory}.json", {"answers": [one.record() for one in answers]})
        if memory == "kept" and lm.card <= codec.cardinality:
            for number, one in enumerate(answers[:HEARD_ANSWERS]):
                wav = answer_sound(codec, one, rows, clock.steps(LEAD_SEC))
                write_wav(folder / f"{number:02d}_{one.name}.wav", wav, clock.sample_rate)
    return shares
