"""Recall of memory probes, measured against the gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_fakes import random_recording
from moshi.models.lm import LMOutput

from moshi_ttt.data import Probe
from moshi_ttt.evaluation.scalars import recall_scalars
from moshi_ttt.teacher_forcing.controls import Share, by_rivals, by_when_asked
from moshi_ttt.teacher_forcing.recall import ProbeRecall, gap_bin, recall_record, wilson_interval
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

MakeLM = Callable[..., Any]


@pytest.mark.parametrize(
    ("gap", "row"),
    [(0.0, 0), (6.2, 0), (6.4, 1), (14.0, 1), (14.2, 2), (40, 4 - 1), (207.8, 7), (1e4, 8)],
)
def test_bins_part_at_geometric_means(gap: float, row: int) -> None:
    assert gap_bin(gap) == row


LM: Any = SimpleNamespace(text_padding_token_id=3, end_of_text_padding_id=0)


def planted_output(favourites: dict[int, dict[int, float]], steps: int = 20) -> LMOutput:
    """Text probabilities at single steps (the rest of the mass spread evenly) over 20 tokens."""
    probabilities = torch.full((1, 1, steps, 20), 1 / 20)
    for step, values in favourites.items():
        probabilities[0, 0, step] = (1 - sum(values.values())) / (20 - len(values))
        for token, value in values.items():
            probabilities[0, 0, step, token] = value
    mask = torch.ones(1, 1, steps, dtype=torch.bool)
    audio = torch.zeros(1, 8, steps, 4)
    return LMOutput(audio, mask.expand(-1, 8, -1), probabilities.log(), mask)


def test_answers_are_told_apart_by_their_rivals() -> None:
    codes = torch.full((1, 17, 20), 11)
    output = planted_output({step: {11: 0.9} for step in (4, 6, 10)} | {8: {7: 0.9}})
    probes = [
        Probe("code", 60.0, 0.1, (range(4, 5),), rivals=0),
        Probe("code", 60.0, 0.1, (range(6, 7), range(8, 9)), rivals=2),
        Probe("code", 240.0, 0.1, (range(10, 11),), rivals=5),
        Probe("code", 4.0, 0.1, (range(8, 9),), rivals=1),
        Probe("code", 60.0, 0.1, (range(8, 9),)),  # nobody knows
    ]
    metric = ProbeRecall(10, 2)
    metric.update(LM, output, codes, probes)
    recall = recall_record(metric)
    assert recall is not None
    assert recall["own"]["rival_count"] == [0, 1, 2, 2]
    assert recall["own"]["rival_gap_sec"] == [60, 4, 60, 240]
    assert recall["own"]["rival_words"] == [1, 1, 2, 1]
    assert recall["own"]["rival_right"] == [1, 0, 1, 1]
    assert sum(recall["own"]["words"]) == 6
    found = by_rivals({"kept": recall}, 15.0, "own")
    assert found == {"kept": {0: Share(1, 1), 2: Share(2, 3)}}
    assert by_rivals({"kept": recall}, 15.0, "heard") == {}


def test_planted_predictions_give_known_accuracy_and_nll_in_their_bins() -> None:
    codes = torch.full((1, 17, 20), 3)
    codes[0, 0, [5, 6, 8, 10, 12]] = torch.tensor([11, 12, 13, 14, 15])
    output = planted_output(
        {
            # likeliest of the words, though padding is likelier: right
            5: {11: 0.3, 3: 0.4, 0: 0.2},
            6: {12: 0.6},
            8: {7: 0.5, 13: 0.25},  # another word is likelier
            10: {14: 0.9},
            12: {9: 0.5, 15: 0.25},  # the second token of a word whose first is right
        }
    )
    probes = [
        Probe("code", 4.5, 0.1, (range(5, 7), range(8, 9))),
        Probe("city", 5.0, 0.2, (range(10, 11),)),
        # one word of two tokens, the second wrong; far away
        Probe("city", 100.0, 0.125, (range(10, 11),)),
        Probe("day", 1000.0, 0.125, (range(19, 21),)),  # beyond what was read
    ]
    metric = ProbeRecall(10, 2)
    metric.update(LM, output, codes, probes)
    recall = recall_record(metric)
    assert recall is not None
    assert recall.keys() == {"own"}
    record = recall["own"]
    assert record["gap_sec"] == [4, 90]
    assert record["words"] == [3, 1]
    assert record["accuracy"] == pytest.approx([2 / 3, 1])
    assert record["chance"] == pytest.approx([(0.1 + 0.1 + 0.2) / 3, 0.125])
    expected = -(math.log(0.3) + math.log(0.6) + math.log(0.25) + math.log(0.9)) / 4
    assert record["nll"] == pytest.approx([expected, -math.log(0.9)], rel=1e-5)
    # nobody says when the questions were asked: in the window in which the answer begins
    assert record["asked_step"] == [0, 10, 10]
    assert record["asked_gap_sec"] == [4, 4, 90]
    assert record["asked_words"] == [2, 1, 1]
    assert record["asked_right"] == [1, 1, 1]
    asked = by_when_asked({"kept": recall}, 3.0, "own")
    assert asked == {"kept": {0: Share(1, 2), 10: Share(2, 2)}}
    assert by_when_asked({"kept": recall}, 20.0, "own") == {"kept": {10: Share(1, 1)}}
    assert by_when_asked({"kept": recall}, 20.0, "heard") == {}
    scalars = recall_scalars({"kept": recall, "reset": recall}, window_sec=20.0)
    assert scalars.keys() == {
        *(
            f"longgen/recall/own/{name}/gap_{gap}"
            for name in ("accuracy", "nll")
            for gap in ("0004", "0090")
        ),
        *(f"longgen/recall/beyond_window/{memory}" for memory in ("kept", "reset")),
    }
    assert scalars["longgen/recall/own/accuracy/gap_0004"] == pytest.approx(2 / 3)
    assert scalars["longgen/recall/beyond_window/kept"] == 1
    assert not any("beyond" in tag for tag in recall_scalars({"kept": recall}, window_sec=90.0))


def test_classes_and_what_is_unseen_are_counted_apart() -> None:
    codes = torch.full((1, 17, 20), 3)
    codes[0, 0, 5] = 11
    word, metric = (range(5, 6),), ProbeRecall(10, 2)
    probes = [
        Probe("day", 20.0, 0.1, word, "own"),
        Probe("day", 20.0, 0.1, word, "heard"),
        Probe("day", 20.0, 0.1, word, "heard"),
        Probe("day", 20.0, 0.1, word, "heard", ("key",)),
    ]
    metric.update(LM, planted_output({5: {11: 0.9}}), codes, probes)
    recall = recall_record(metric)
    assert recall is not None
    assert {group: bins["words"] for group, bins in recall.items()} == {
        "own": [1],
        "heard": [2],
        "heard_unseen": [1],
    }


def test_every_token_of_a_word_must_be_right() -> None:
    codes = torch.full((1, 17, 20), 3)
    codes[0, 0, [5, 6]] = torch.tensor([11, 12])
    metric = ProbeRecall(10, 2)
    for second in (12, 13):
        output = planted_output({5: {11: 0.9}, 6: {second: 0.9}})
        metric.update(LM, output, codes, [Probe("day", 20.0, 0.1, (range(5, 7),))])
    assert metric.compute()["accuracy"][0, 2] == 0.5


def test_without_probes_there_is_no_record() -> None:
    metric = ProbeRecall(10, 2)
    metric.update(LM, planted_output({}), torch.full((1, 17, 20), 3), [])
    assert recall_record(metric) is None


def test_the_interval_is_wilsons() -> None:
    # worked out by hand for 8 of 10, and the ends that the normal interval gets wrong
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(1.0, 10)[1] == 1.0


def test_a_recording_is_read_on_to_its_last_probe_but_not_without_end(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshi_ttt.teacher_forcing.recordings.MAX_READ_STEPS", 50)
    lm = make_lm().eval()
    near, far = (Probe("day", 20.0, 0.1, (range(at, at + 2),)) for at in (40, 60))
    plain = read_teacher_forced(lm, [random_recording(80, ())], steps=30, window_steps=15)
    probed = read_teacher_forced(lm, [random_recording(80, (near, far))], steps=30, window_steps=15)
    assert plain.recall is None
    assert probed.recall is not None
    assert probed.recall.keys() == {"kept"}  # nothing to take away from a model without memory
    found = probed.recall["kept"]["own"]
    assert found["words"] == [1]
    assert probed.nll["start_step"] == plain.nll["start_step"] == [0, 15]
    for group in ("text", "first_codebook"):
        assert probed.nll[group] == pytest.approx(plain.nll[group], rel=1e-5)
    # against the text logits themselves
    codes = random_recording(80, ()).codes[None, :, :50]
    with torch.no_grad():
        picked = lm(codes).text_logits[0, 0].log_softmax(-1).gather(-1, codes[0, 0, :, None])
    assert found["nll"] == pytest.approx([-picked[40:42].mean().item()], rel=1e-4)
