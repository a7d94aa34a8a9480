"""Questions that Moshi answers freely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lm_fakes import hybrid
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.evaluation.free_answers import (
    FreeAnswer,
    answer_sound,
    answers_record,
    choose_questions,
    free_answers,
    free_from,
)
from moshi_ttt.model.hybrid import hybrid_layers, memory_swapped
from moshi_ttt.model.source import open_source
from moshi_ttt.rows import Rows

MakeLM = Callable[..., LMModel]
SILENCE = torch.full((8, 1), 7)
PAD = 3


class Words:
    """Token n is the word `n`, but 19 goes on with the word before."""

    def decode(self, ids: list[int]) -> str:
        return "".join("-" if token == 19 else f" N{token}" for token in ids).strip()


def recording(seed: int, *probes: Probe, steps: int = 60) -> EncodedRecording:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, 15, (17, steps), generator=generator)
    return EncodedRecording(f"r{seed}", codes, probes)


def probe(answer: int, until: int | None, gap_sec: float = 20.0, **changes: object) -> Probe:
    words = (range(answer, answer + 2), range(answer + 2, answer + 3))
    one = Probe("day", gap_sec, 0.5, words, asked_step=answer - 8, asked_until_step=until)
    return replace(one, **changes)  # type: ignore[arg-type]


def speaking(lm: LMModel, token_of: Callable[[int], int]) -> LMModel:
    """Its text logits name `token_of(call)`, where calls count the steps of a generation."""
    calls = iter(range(10**6))

    def say(_: nn.Module, __: object, logits: Tensor) -> Tensor:
        said = torch.full_like(logits, -1e9)
        said[..., token_of(next(calls))] = 0
        return said

    lm.text_linear.register_forward_hook(say)
    return lm


def answer(text: str, expected: tuple[str, ...], one: Probe) -> FreeAnswer:
    return FreeAnswer("a", one, expected, text, torch.zeros(17, 5), 0)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("it is Four, two.", True),
        ("four or rather four then two", True),
        ("two four", False),
        ("four", False),
        ("fourteen two", False),
        ("", False),
    ],
)
def test_every_word_of_the_value_must_be_said_in_order(text: str, right: bool) -> None:
    assert answer(text, ("four", "two"), probe(30, 20)).right == right


def test_what_is_forced_ends_with_the_question_or_where_the_answer_starts() -> None:
    assert free_from(probe(30, 24)) == 25
    assert free_from(probe(30, None)) == 30
    assert free_from(probe(30, 33)) == 30  # never into the answer
    assert free_from(probe(30, 24), "key") == 30


def test_after_the_key_the_value_is_all_that_is_free(make_lm: MakeLM) -> None:
    one = recording(1, probe(30, 24))
    value = one.codes[0, 30:33].tolist()
    # free from step 30 on, where the recording has the value, which only the step before foretells
    lm = speaking(make_lm().eval(), lambda step: value[step - 30] if 30 <= step < 33 else PAD)
    asked = [(one, one.probes[0])]
    (found,) = free_answers(lm, Words(), asked, SILENCE, answer_steps=3, after="key")
    assert (found.free_from, found.right) == (30, True)
    assert torch.equal(found.codes[:, :30], one.codes[:, :30])
    assert found.codes.shape == (17, 33)


def test_an_answer_that_is_there_is_found_and_only_within_its_time(make_lm: MakeLM) -> None:
    one = recording(1, probe(30, 24))
    value = one.codes[0, 30:33]
    # step 30 says the first token, as the recording does; before and after it is silent
    said = {30 + index: int(token) for index, token in enumerate(value)}
    for length, right in ((8, True), (7, False)):
        lm = speaking(make_lm().eval(), lambda step: said.get(step, PAD))
        (found,) = free_answers(lm, Words(), [(one, one.probes[0])], SILENCE, answer_steps=length)
        assert found.expected == tuple(f"n{token}" for token in value.tolist())
        assert (found.free_from, found.right) == (25, right)
        # forced up to the end of the question, free behind it, with a user who is silent
        assert found.codes.shape == (17, 25 + length)
        assert torch.equal(found.codes[:, :25], one.codes[:, :25])
        assert found.codes[0, 25:30].tolist() == [PAD] * 5
        assert (found.codes[9:, 25:] == 7).all()
        assert found.record()["right"] == right


def test_questions_side_by_side_are_answered_as_they_are_alone(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm, rule="gated_delta", write_gate=0.3)
    recordings = [recording(1, probe(50, 45)), recording(2, probe(20, None), probe(40, 38))]
    questions = choose_questions(recordings, 3)
    assert len(questions) == 3

    def greedy(together: list[tuple[EncodedRecording, Probe]], streams: int) -> list[FreeAnswer]:
        # the random numbers of a batch are others than those of one stream: let there be none
        heads = (lm.text_linear, *lm.linears)
        handles = [
            head.register_forward_hook(lambda *call: call[-1] * 1e4)  # type: ignore[operator]
            for head in heads
        ]
        try:
            return free_answers(lm, Words(), together, SILENCE, answer_steps=6, streams=streams)
        finally:
            for handle in handles:
                handle.remove()

    for together, alone in zip(greedy(questions, 32), greedy(questions, 1), strict=True):
        assert together.recording == alone.recording
        assert together.probe == alone.probe
        assert torch.equal(together.codes, alone.codes)


@torch.no_grad()
def test_a_reset_takes_the_memory_of_the_stream_that_is_asked(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm, rule="gated_delta", write_gate=0.3)
    questions = [
        (one, one.probes[0]) for one in (recording(1, probe(30, 29)), recording(2, probe(50, 49)))
    ]
    seen: list[Tensor] = []
    handle = lm.text_linear.register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    logits = {}
    for memory in ("kept", "reset"):
        seen.clear()
        free_answers(lm, Words(), questions, SILENCE, answer_steps=5, memory=memory)  # type: ignore[arg-type]
        logits[memory] = torch.stack([one.reshape(2, -1) for one in seen], dim=1)
    handle.remove()
    for row, (one, asked) in enumerate(questions):
        start = free_from(asked)
        codes = one.codes[None, :, :start]
        assert asked.asked_step is not None
        torch.testing.assert_close(
            logits["kept"][row, :start], lm(codes).text_logits[0, 0], rtol=0, atol=1e-4
        )
        with memory_swapped(lm, [asked.asked_step]):
            expected = lm(codes).text_logits[0, 0]
        torch.testing.assert_close(logits["reset"][row, :start], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(logits["kept"][:, 24:], logits["reset"][:, 24:], atol=1e-3)
    assert all(not layer.branch.is_streaming for layer in hybrid_layers(lm).values())


def test_questions_are_taken_evenly_from_groups_and_gaps() -> None:
    near = [probe(20, 19, 4.0), probe(30, 29, 4.0), probe(40, 39, 4.0)]
    far, heard = probe(50, 49, 60.0), probe(50, 49, 4.0, recall_class="heard")
    recordings = [recording(1, *near), recording(2, far, heard)]
    assert [one for _, one in choose_questions(recordings, 4)] == [near[0], far, heard, near[1]]
    assert len(choose_questions(recordings, 99)) == 5


def test_shares_are_by_group_and_gap() -> None:
    near, far = probe(20, 19, 4.0), probe(20, 19, 60.0)
    heard = probe(20, 19, 4.0, recall_class="heard", unseen=("key",))
    said = [("four", near), ("two", near), ("four", far), ("", heard)]
    record = answers_record([answer(text, ("four",), one) for text, one in said])
    assert record.keys() == {"own", "heard_unseen"}
    own = record["own"]
    assert own["gap_sec"] == [4, 60]
    assert own["questions"] == [2, 1]
    assert own["right"] == [0.5, 1.0]
    assert own["chance"] == [0.5, 0.5]
    assert record["heard_unseen"]["right"] == [0.0]
    assert answers_record([]) == {}


def test_an_answer_can_be_heard() -> None:
    source = open_source("tiny")
    codes = torch.randint(0, 64, (17, 40))
    one = FreeAnswer("a", probe(30, 29), ("x",), "x", codes, 30)
    sound = answer_sound(source.codec(), one, Rows(8, 8), lead_steps=20)
    assert sound.shape == (30 * 1920, 2)
