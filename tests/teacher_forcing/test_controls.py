"""The controls of recall: whether it is the memory that answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lm_fakes import hybrid
from moshi.models.lm import LMModel

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import gates_forced_to_zero, memory_swapped
from moshi_ttt.teacher_forcing.controls import (
    EVERYONE,
    Share,
    beyond_window,
    memory_verdict,
    read_recall,
)
from moshi_ttt.teacher_forcing.recall import Recall, wilson_interval
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

MakeLM = Callable[..., LMModel]
STEPS = 60


def probe(at: int, gap_sec: float = 20.0, asked: int | None = None) -> Probe:
    return Probe("day", gap_sec, 0.1, (range(at, at + 2),), asked_step=asked)


def recording(seed: int, *probes: Probe, steps: int = STEPS) -> EncodedRecording:
    generator = torch.Generator().manual_seed(seed)
    return EncodedRecording(
        f"r{seed}", torch.randint(4, 15, (17, steps), generator=generator), probes
    )


def nll(lm: LMModel, one: EncodedRecording, at: int) -> float:
    """Of the answer of `probe(at)`."""
    logits = lm(one.codes[None]).text_logits[0, 0, at : at + 2]
    return float(torch.nn.functional.cross_entropy(logits, one.codes[0, at : at + 2]))


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_each_question_is_read_with_the_memory_named(make_lm: MakeLM, rule: str) -> None:
    lm = hybrid(make_lm, rule=rule, write_gate=0.3)
    # the question of the second is not known: then it is the answer that is read without
    one = recording(1, probe(30, 4.0, asked=22), probe(50))
    other = recording(2, steps=40)
    read = read_teacher_forced(lm, [other, one], STEPS, STEPS).recall
    assert read is not None
    assert read.keys() == {"kept", "reset", "other"}
    with memory_swapped(lm) as ends:
        lm(other.codes[None])
    theirs = {index: end.last for index, end in ends.items()}
    expected = {"kept": [nll(lm, one, 30), nll(lm, one, 50)]}
    for name, memories in (("reset", None), ("other", theirs)):
        with memory_swapped(lm, [22, 50], memories):
            expected[name] = [nll(lm, one, 30), nll(lm, one, 50)]
    assert len({round(first, 4) for first, _ in expected.values()}) == 3
    for name, values in expected.items():
        found = read[name]["own"]
        assert found["gap_sec"] == [4, 20]
        assert found["words"] == [1, 1]
        assert found["nll"] == pytest.approx(values, rel=1e-4)


@torch.no_grad()
def test_the_other_memory_is_that_of_another_recording_at_the_end_of_what_was_read(
    make_lm: MakeLM,
) -> None:
    settings = {"layers": "every:1", "rule": "gated_delta", "projections": "attention"}
    lm = hybrid(make_lm, **settings, write_gate=0.3)
    # each has a bin of its own; lengths differ, and so does how far each is read
    recordings = [
        recording(1, probe(30, 4.0, asked=22), steps=60),
        recording(2, probe(40, 20.0, asked=30), steps=50),
        recording(3, probe(20, 60.0, asked=12), steps=70),
    ]
    read = read_teacher_forced(lm, recordings, 25, 25).recall
    assert read is not None
    expected = []
    for number, one in enumerate(recordings):
        before = recordings[number - 1]
        (theirs,) = before.probes
        with memory_swapped(lm) as ends:
            lm(before.codes[None, :, : max(25, theirs.answer_steps[-1].stop)])
        memories = {index: end.last for index, end in ends.items() if end.last is not None}
        (mine,) = one.probes
        assert mine.asked_step is not None
        with memory_swapped(lm, [mine.asked_step], memories):
            expected.append(nll(lm, one, mine.answer_steps[0].start))
    assert read["other"]["own"]["gap_sec"] == [4, 20, 60]
    assert read["other"]["own"]["nll"] == pytest.approx(expected, rel=1e-4)
    kept = read["kept"]["own"]["nll"]
    assert all(abs(one - other) > 1e-3 for one, other in zip(kept, expected, strict=True))


@torch.no_grad()
def test_read_by_itself_the_memory_kept_gives_what_the_loss_saw(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    recordings = [recording(1, probe(30)), recording(2)]
    read = read_teacher_forced(lm, recordings, 10, 10).recall
    assert read is not None
    alone = read_recall(lm, recordings, "kept", STEPS, 10)
    assert alone is not None
    assert alone["own"].keys() == read["kept"]["own"].keys()
    for name, values in read["kept"]["own"].items():
        assert alone["own"][name] == pytest.approx(values, rel=1e-5)


@torch.no_grad()
def test_a_single_recording_has_no_other_conversation(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    read = read_teacher_forced(lm, [recording(1, probe(30))], STEPS, STEPS).recall
    assert read is not None
    assert read.keys() == {"kept", "reset"}
    assert read_teacher_forced(lm, [recording(1), recording(2)], STEPS, STEPS).recall is None


@torch.no_grad()
def test_with_gates_shut_no_control_changes_anything(make_lm: MakeLM) -> None:
    lm = hybrid(make_lm)
    recordings = [recording(seed, probe(30, asked=20)) for seed in (1, 2)]
    with gates_forced_to_zero(lm):
        read = read_teacher_forced(lm, recordings, STEPS, STEPS).recall
    assert read is not None
    for memory in ("reset", "other"):
        assert read[memory]["own"]["nll"] == pytest.approx(read["kept"]["own"]["nll"], rel=1e-5)


def recall(**right: list[float]) -> Recall:
    """Shares of 50 words each at 10, 20 and 60 s, by group."""
    return {
        group: {"gap_sec": [10, 20, 60], "words": [50, 50, 50], "accuracy": shares}
        for group, shares in right.items()
    }


def test_words_beyond_the_window_are_pooled_by_class_and_memory() -> None:
    kept = recall(own=[1, 0.9, 0.7], heard=[1, 0.3, 0.1], own_unseen=[0, 0.5, 0.5])
    pools = beyond_window({"kept": kept, "reset": recall(own=[1, 0.1, 0.1])}, 15.0)
    assert pools == {
        EVERYONE: {"kept": Share(100, 200), "reset": Share(10, 100)},
        "own": {"kept": Share(80, 100), "reset": Share(10, 100)},
        "heard": {"kept": Share(20, 100)},
        "own_unseen": {"kept": Share(50, 100)},
    }
    assert pools["own"]["kept"].interval == wilson_interval(0.8, 100)
    assert beyond_window({"kept": kept}, 60.0) == {}


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ({"kept": 80, "reset": 10, "other": 12}, "used"),
        ({"kept": 20, "reset": 10, "other": 12}, "not shown"),  # the intervals touch
        ({"kept": 80, "reset": 10, "other": 75}, "not shown"),  # any memory would have done
        ({"kept": 80, "reset": 75, "other": 10}, "not shown"),
        ({"kept": 80, "reset": 10}, "not shown"),  # half of the proof
        ({"kept": 80}, "no memory"),
    ],
    ids=str,
)
def test_a_memory_is_used_only_if_it_beats_both_controls(
    shares: dict[str, int], verdict: str
) -> None:
    assert memory_verdict({name: Share(right, 100) for name, right in shares.items()}) == verdict
