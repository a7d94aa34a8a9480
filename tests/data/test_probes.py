"""Memory probes: read from their file, found in the text row, and measured against the gap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_fakes import CLOCK, FakeSource, LetterTokenizer, write_audio
from moshi.models.lm import LMOutput
from synthetic_trace import make_trace, write_evaluation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from callbacks.tensorboard import log_evaluation
from moshi_ttt.data import EncodedRecording, Probe, RecordingReader, check_manifest, read_manifest
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.evaluation.scalars import recall_scalars
from moshi_ttt.files import write_json
from moshi_ttt.model.source import open_source
from moshi_ttt.report import compare_report, write_report
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.recall import gap_positions, recall_figure, recall_finding
from moshi_ttt.teacher_forcing.recall import ProbeRecall, gap_bin, recall_record, wilson_interval
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

MakeLM = Callable[..., Any]
MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
WORDS: list[Any] = [
    ["two", [0.2, 0.3], USER],
    ["is", [1.0, 1.1], MAIN],
    ["four", [2.0, 2.1], MAIN],  # step 25
    ["two", [2.16, 2.3], MAIN],  # step 27, cuts "four" short after two letters
]


def probe(**changes: Any) -> dict[str, Any]:
    answer = [["four", [2.0, 2.1]], ["two", [2.16, 2.3]]]
    return {
        **{"kind": "code", "key": "my code", "asked_by": USER, "answered_by": MAIN},
        **{"fact": [], "echo": [], "asked_at": 1.5, "answer": answer},
        **{"gap_sec": 12.5, "chance": 0.1, **changes},
    }


def write_recording(folder: Path, probes: Any) -> Path:
    write_audio(folder / "a.wav", 4.0)
    (folder / "a.json").write_text(json.dumps({"alignments": WORDS, "probes": probes}))
    manifest = folder / "m.jsonl"
    manifest.write_text('{"path": "a.wav", "duration": 4.0}')
    return manifest


def read(manifest: Path) -> EncodedRecording:
    reader = RecordingReader(FakeSource(), manifest.parent / "cache")
    return reader.read(read_manifest(manifest)[0])[0]


def test_an_answer_is_where_its_tokens_are_in_the_text_row(tmp_path: Path) -> None:
    mirrored = probe(asked_by=MAIN, answered_by=USER, answer=[["two", [0.2, 0.3]]])
    recording = read(write_recording(tmp_path, [mirrored, probe()]))
    answer = (range(25, 27), range(27, 30))
    assert recording.probes == (Probe("code", 12.5, 0.1, answer, "heard"),)
    letters = LetterTokenizer().encode("fotwo")
    assert recording.codes[0, 25:30].tolist() == letters
    found = check_manifest(tmp_path / "m.jsonl", CLOCK, LetterTokenizer(), decode=False)
    assert (found.problems, found.probes) == ([], 1)


def test_a_probe_says_its_class_and_what_of_it_is_unseen(tmp_path: Path) -> None:
    said = [
        probe(**{"class": "own", "unseen": ["template", "key"]}),
        probe(**{"class": "heard"}),
        # from before there were classes: the echo tells
        probe(echo=[["two", [1.2, 1.3]]]),
        probe(),
    ]
    found = read(write_recording(tmp_path, said)).probes
    assert [one.recall_class for one in found] == ["own", "heard", "own", "heard"]
    assert [one.unseen for one in found] == [("template", "key"), (), (), ()]


def test_recordings_without_probes_have_none(tmp_path: Path) -> None:
    assert read(write_recording(tmp_path, [])).probes == ()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (probe(answer=[["five", [2.0, 2.1]]]), "probe 0 .* says no 'five' at 2 s"),
        (probe(answer=[["four", [2.5, 2.6]]]), "probe 0 .* says no 'four' at 2.5 s"),
        (probe(answer=[["two", [0.2, 0.3]]]), "probe 0 .* says no 'two'"),  # the other side's word
        (probe(gap_sec=-1), "probe 0 .*gap_sec=-1 is outside"),
        (probe(chance=1.5), "probe 0 .*chance=1.5 is outside"),
        (probe(**{"class": "told"}), "probe 0 .*class='told' is none of own, heard"),
        (probe(unseen="key"), "probe 0 .*unseen='key' is not a list"),
        (probe(unseen=[1]), "probe 0 .*unseen=.1. is not a list of words"),
        (probe(gap_sec="soon"), "probe 0 is malformed .*soon"),
        ({"kind": "code"}, "probe 0 is malformed .*answered_by"),
        ("code", "probe 0 is malformed"),
        (None, "probes=None is not a list"),
    ],
)
def test_probes_that_do_not_fit_are_refused(tmp_path: Path, broken: Any, complaint: str) -> None:
    manifest = write_recording(tmp_path, broken and [broken])
    with pytest.raises(UserError, match=rf"a\.json: {complaint}"):
        read(manifest)
    (problem,) = check_manifest(manifest, CLOCK, LetterTokenizer(), decode=False).problems
    assert problem.startswith("line 1: ")


def test_probes_beside_codes_are_held_against_their_text_row(tmp_path: Path) -> None:
    from encode_manifest import encode_manifest

    manifest = write_recording(tmp_path / "audio", [probe()])
    source: Any = FakeSource()
    encode_manifest(manifest, tmp_path / "codes", source, tmp_path / "cache", with_words=True)
    encoded = tmp_path / "codes/manifest.jsonl"
    assert read(encoded).probes == read(manifest).probes
    path = tmp_path / "codes/a.json"
    # the words moved by a second after they were encoded
    path.write_text(path.read_text().replace("[2.0, 2.1]", "[3.0, 3.1]"))
    with pytest.raises(UserError, match=r"'four' at 3 s, and the text row holds other tokens"):
        read(encoded)
    found = check_manifest(encoded, CLOCK, LetterTokenizer(), decode=False)
    assert len(found.problems) == 1


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
    metric = ProbeRecall()
    metric.update(LM, output, codes, probes)
    record = recall_record(metric)
    assert record is not None
    assert record["gap_sec"] == [4, 90]
    assert record["words"] == [3, 1]
    assert record["accuracy"] == pytest.approx([2 / 3, 1])
    assert record["chance"] == pytest.approx([(0.1 + 0.1 + 0.2) / 3, 0.125])
    expected = -(math.log(0.3) + math.log(0.6) + math.log(0.25) + math.log(0.9)) / 4
    assert record["nll"] == pytest.approx([expected, -math.log(0.9)], rel=1e-5)
    assert recall_scalars(record).keys() == {
        f"longgen/recall/{name}/gap_{gap}"
        for name in ("accuracy", "nll")
        for gap in ("0004", "0090")
    }


def test_every_token_of_a_word_must_be_right() -> None:
    codes = torch.full((1, 17, 20), 3)
    codes[0, 0, [5, 6]] = torch.tensor([11, 12])
    metric = ProbeRecall()
    for second in (12, 13):
        output = planted_output({5: {11: 0.9}, 6: {second: 0.9}})
        metric.update(LM, output, codes, [Probe("day", 20.0, 0.1, (range(5, 7),))])
    assert metric.compute()["accuracy"][2] == 0.5


def test_without_probes_there_is_no_record() -> None:
    metric = ProbeRecall()
    metric.update(LM, planted_output({}), torch.full((1, 17, 20), 3), [])
    assert recall_record(metric) is None


def test_the_interval_is_wilsons() -> None:
    # worked out by hand for 8 of 10, and the ends that the normal interval gets wrong
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(1.0, 10)[1] == 1.0


def recording(steps: int, probes: tuple[Probe, ...]) -> EncodedRecording:
    codes = torch.randint(4, 15, (17, steps), generator=torch.Generator().manual_seed(0))
    return EncodedRecording("a", codes, probes)


def test_a_recording_is_read_on_to_its_last_probe_but_not_without_end(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshi_ttt.teacher_forcing.recordings.MAX_READ_STEPS", 50)
    lm = make_lm().eval()
    near, far = (Probe("day", 20.0, 0.1, (range(at, at + 2),)) for at in (40, 60))
    plain = read_teacher_forced(lm, [recording(80, ())], steps=30, window_steps=15)
    probed = read_teacher_forced(lm, [recording(80, (near, far))], steps=30, window_steps=15)
    assert plain.recall is None
    assert probed.recall is not None
    assert probed.recall["words"] == [1]
    assert probed.nll["start_step"] == plain.nll["start_step"] == [0, 15]
    for stream in ("text", "first_codebook"):
        assert probed.nll[stream] == pytest.approx(plain.nll[stream], rel=1e-5)
    # against the text logits themselves
    codes = recording(80, ()).codes[None, :, :50]
    with torch.no_grad():
        picked = lm(codes).text_logits[0, 0].log_softmax(-1).gather(-1, codes[0, 0, :, None])
    assert probed.recall["nll"] == pytest.approx([-picked[40:42].mean().item()], rel=1e-4)


def test_an_evaluation_writes_recall_only_where_there_are_probes(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = source.lm(context_steps=12)
    run = LongRunConfig(
        **{"seconds": 3.0, "prompts": 1, "seeds": 1, "prompt_sec": 0.8, "audio_streams": 0},
        nll_recordings=1,
    )
    word = Probe("day", 9.0, 0.1, (range(50, 52),))
    ignored = Probe("day", 60.0, 0.1, (range(50, 52),))
    recordings = [recording(60, (word,)), recording(60, (ignored,))]
    folder = tmp_path / "run"
    kept = {"label": "x", "trained_steps": None}
    scalars = evaluate(lm, source, recordings, run, folder, **kept)  # type: ignore[arg-type]
    recall = json.loads((folder / "probes.json").read_text())
    assert (recall["gap_sec"], recall["words"]) == ([10], [1])
    assert scalars["longgen/recall/nll/gap_0010"] == pytest.approx(recall["nll"][0])
    assert "longgen/recall/accuracy/gap_0010" in scalars
    scalars = evaluate(lm, source, [recording(60, ())], run, folder, **kept)  # type: ignore[arg-type]
    assert not (folder / "probes.json").exists()
    assert not any("recall" in tag for tag in scalars)


RECALL = {
    "gap_sec": [4, 20, 60, 240],
    "words": [100, 50, 40, 10],
    "accuracy": [0.9, 0.6, 0.2, 0.0],
    "chance": [0.1, 0.1, 0.1, 0.1],
    "nll": [0.5, 1.0, 3.0, 4.0],
    "low": [0.83, 0.46, 0.1, 0.0],
    "high": [0.94, 0.72, 0.35, 0.28],
}


def test_the_finding_tells_recall_within_the_window_from_beyond_it() -> None:
    text = recall_finding(make_trace(context_steps=375), RECALL)
    assert "window of 30 s, 80% of 150 words are right (about 4 to 20 s)" in text
    assert "beyond it, 16% of 50 words are right (about 60 to 240 s)" in text
    assert "would give 10%" in text
    assert "beyond it, no probe was asked" in recall_finding(make_trace(context_steps=3000), RECALL)


def test_reports_show_recall_with_probes_and_nothing_of_it_without(tmp_path: Path) -> None:
    run, plain = tmp_path / "probed", tmp_path / "plain"
    for folder in (run, plain):
        for epoch in range(2):
            write_evaluation(folder / f"longgen/epoch_{epoch:03d}", make_trace(seed=epoch), clips=0)
    before = write_report(plain).read_text()
    for epoch in range(2):
        write_json(run / f"longgen/epoch_{epoch:03d}/probes.json", RECALL)
    text = write_report(run).read_text()
    assert "Asked for a fact" in text
    assert "memory probe" in text
    # once for the latest evaluation, once for all of them
    assert text.count("<img") == before.count("<img") + 2
    assert "probe" not in before
    assert "recall" not in before
    both = compare_report([run, plain], tmp_path / "both.html").read_text()
    assert 'alt="comparison: recall"' in both


@pytest.mark.filterwarnings("error")
def test_the_figure_marks_chance_context_and_trained_length() -> None:
    traces = [make_trace(context_steps=375, trained_steps=188), make_trace(context_steps=750)]
    positions = [gap_positions(trace) for trace in traces]
    one_bin = {key: values[:1] for key, values in RECALL.items()}
    for curves in ({"a": RECALL}, {"a": RECALL, "b": one_bin}, {"a": one_bin}):
        figure = recall_figure(curves, positions[: len(curves)])
        assert pixels(figure).std() > 5
    figure = recall_figure({"a": RECALL}, [{"C": 30.0, "trained length": 15.04}])
    assert positions[0] == {"C": 30.0, "trained length": 15.04}
    accuracy, nll = figure.axes
    texts = [text.get_text() for text in accuracy.texts]
    assert texts == ["chance", "C\n30 s", "trained length\n15.04 s"]
    assert nll.get_xscale() == "log"
    assert next(label.get_text() for label in nll.get_xticklabels()) == "4 s\n100"
    # the curve, chance, C, trained length
    assert len(accuracy.lines) == 4
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), RECALL["accuracy"])


def test_tensorboard_gets_the_figure(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", make_trace(), clips=0)
    write_json(tmp_path / "run/probes.json", RECALL)
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        log_evaluation(writer, tmp_path / "run", 3)
    tags = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0}).Reload().Tags()
    assert "longgen/figures/recall" in tags["images"]
