"""Talking, judging and writing, each by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from moshi.models.lm import LMModel
from synthetic_trace import make_trace

from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.folder import Evaluation, write_folder
from moshi_ttt.evaluation.judge import Judgement, judge
from moshi_ttt.evaluation.scalars import nll_scalars, position_summary
from moshi_ttt.evaluation.talk import Talk, talk
from moshi_ttt.files import plain
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.forward import forward
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.report.text import findings, loudest_memory
from moshi_ttt.teacher_forcing.controls import Recalls
from moshi_ttt.teacher_forcing.recordings import TeacherForced

STEPS = 24
NLL = {
    "window_steps": 63,
    "start_step": [0, 63, 126],
    "text": [2.0, 4.0, math.nan],
    "first_codebook": [math.nan] * 3,
    "other_codebooks": [1.0, 1.0, 1.0],
}
RECALL = {
    "kept": {
        "own": {
            "gap_sec": [4.0],
            "words": [10.0],
            "accuracy": [0.5],
            "chance": [0.1],
            "nll": [1.5],
            "low": [0.2],
            "high": [0.8],
        }
    }
}


def recording(steps: int, seed: int = 0) -> EncodedRecording:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 512, (17, steps), generator=generator)
    codes[0] = 3
    return EncodedRecording(f"talk_{seed}", codes)


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelSource, LMModel]:
    source = open_source("tiny")
    return source, source.lm(context_steps=10)


def talked(
    tiny: tuple[ModelSource, LMModel], recordings: Sequence[EncodedRecording], **changes: Any
) -> Talk:
    source, lm = tiny
    config = {"prompts": 1, "seeds": 2, "prompt_sec": 0.4} | changes
    return talk(
        lm,
        source,
        source.codec(),
        recordings,
        LongRunConfig(seconds=STEPS * 0.08, **config),  # type: ignore[arg-type]
        label="x",
        trained_steps=None,
    )


@pytest.mark.parametrize(("steps", "warned"), [(STEPS // 2, True), (STEPS, False)])
def test_a_user_who_falls_silent_on_the_way_is_told(
    tiny: tuple[ModelSource, LMModel], caplog: pytest.LogCaptureFixture, steps: int, warned: bool
) -> None:
    talked(tiny, [recording(steps)])
    assert ("silent from step 12 (0.96 s" in caplog.text) == warned
    caplog.clear()
    talked(tiny, [recording(steps)], user="silence")
    assert "silent from" not in caplog.text


def judged(trace: Trace, recall: Recalls | None = None) -> Judgement:
    return judge(
        trace,
        TeacherForced(NLL, recall, {}),
        [],
        steps_per_sec=80.0,
        window_steps=60,
        starts_word=np.arange(1000) % 2 == 0,
        cardinality=512,
        sound=None,
    )


def test_talking_gives_a_trace_the_user_and_their_sound(
    tiny: tuple[ModelSource, LMModel],
) -> None:
    one = recording(15)
    result = talked(tiny, [one])
    assert result.trace.steps == STEPS
    assert result.trace.text_tokens.shape == (2, STEPS - 1)
    assert (result.trace.codes[:, :, :5] == one.codes[1:9, :5].numpy()).all()
    # the recording ends and silence follows
    assert (result.user[:, :, :15] == one.codes[9:]).all()
    silence = result.user[0, :, 15:]
    assert (silence == silence[:, :1]).all()
    assert result.steps_per_sec == STEPS / result.generating_sec
    codec = tiny[0].codec()
    sound = result.sound(codec)
    assert sound.shape == (2, 2, (STEPS - 1) * 1920)
    with torch.no_grad():
        user = codec.decode(result.user[:1, :, : STEPS - 1])[0, 0].clamp(-1, 1).numpy()
    np.testing.assert_allclose(sound[:, 1], [user, user], atol=1e-5)
    # read again with the user that was heard; the delayed codebooks of the last step come too late
    speech = result.speech(tiny[1], sound)[1]
    assert (speech.codes == result.trace.codes[1]).all()
    assert (speech.text_tokens == result.trace.text_tokens[1]).all()
    codes = torch.cat([torch.from_numpy(speech.codes), result.user[1, :, : STEPS - 1]])
    codes = torch.cat([torch.from_numpy(speech.text_tokens)[None], codes])[None]
    with torch.no_grad():
        logits = forward(tiny[1], codes).text_logits[0, 0]
    nll = torch.nn.functional.cross_entropy(logits, codes[0, 0], reduction="none")
    np.testing.assert_allclose(speech.text_nll, nll, atol=1e-5)
    assert np.isfinite(speech.sound_nll).all()


def test_a_silent_user_says_nothing_after_the_prompt(
    tiny: tuple[ModelSource, LMModel],
) -> None:
    one = recording(40)
    user = talked(tiny, [one], user="silence").user
    assert (user[:, :, :5] == one.codes[9:, :5]).all()
    assert (user[:, :, 5:] == user[:, :, 5:6]).all()


def test_text_can_be_that_of_the_recording_and_sound_is_moshis_own(
    tiny: tuple[ModelSource, LMModel],
) -> None:
    one = recording(40)
    one.codes[0] = torch.arange(40) + 100
    trace = talked(tiny, [one], text="recording").trace
    told, heard = one.codes[0, : STEPS - 1].numpy(), one.codes[1:9, : STEPS - 1].numpy()
    assert (trace.text_tokens == told).all()
    assert (trace.codes[:, :, :4] == heard[:, :4]).all()
    assert (trace.codes[:, :, 5:] != heard[:, 5:]).any()
    assert trace.free_from == 5


def test_a_judgement_is_of_a_trace_alone_and_holds_every_kind_of_scalar() -> None:
    trace = make_trace(jump_at=763)
    result = judged(trace, RECALL)
    assert result.jumps == find_jumps(trace)
    assert not result.quality["audible"]
    scalars = result.scalars
    assert scalars["longgen/jump/count"] == 1
    assert scalars["longgen/recall/own/accuracy/gap_0004"] == 0.5
    assert "longgen/quality/distinct_2/whole" in scalars
    assert scalars["longgen/steps_per_sec"] == 80
    assert scalars["longgen/times_real_time"] == 80 * 0.08
    assert not any("recall" in tag for tag in judged(trace).scalars)


def test_loss_is_summed_up_over_the_windows_that_hold_tokens() -> None:
    assert nll_scalars(NLL) == {
        "longgen/nll/text/first_window": 2.0,
        "longgen/nll/text/last_window": 4.0,
        "longgen/nll/text/mean": 3.0,
        "longgen/nll/other_codebooks/first_window": 1.0,
        "longgen/nll/other_codebooks/last_window": 1.0,
        "longgen/nll/other_codebooks/mean": 1.0,
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    trace = make_trace(jump_at=763)
    result = judged(trace, RECALL)
    wav = np.linspace(-0.5, 0.5, 899 * 1920)[:, None].repeat(2, axis=1)
    write_folder(tmp_path, trace, result, [wav], wall_sec=12.5)
    evaluation = Evaluation.load(tmp_path)
    assert evaluation.label == trace.label
    assert evaluation.jumps == result.jumps
    assert evaluation.nll == plain(NLL)
    assert evaluation.recall == RECALL
    assert evaluation.quality == plain(json.loads(json.dumps(plain(result.quality))))
    assert evaluation.segments == plain(result.segments)
    defined = {tag: value for tag, value in result.scalars.items() if math.isfinite(value)}
    assert evaluation.scalars == defined
    assert evaluation.summary["wall_sec"] == 12.5
    assert {event["event"] for event in evaluation.events} >= {"critical_position", "jump"}
    (whole,) = evaluation.audio
    assert whole.name == "stream_00.wav"
    assert "stream_00_at_2C.wav" in [path.name for path in evaluation.cuts]
    assert len(soundfile.read(whole)[0]) == 899 * 1920
    np.testing.assert_array_equal(evaluation.trace().input_norm, trace.input_norm)


def test_an_earlier_evaluation_leaves_neither_sound_nor_probes(tmp_path: Path) -> None:
    trace = make_trace(jump_at=763)
    wav = np.zeros((899 * 1920, 2))
    write_folder(tmp_path, trace, judged(trace, RECALL), [wav], wall_sec=1.0)
    before = Evaluation.load(tmp_path).cuts
    assert any("at_jump" in path.name or "at_2C" in path.name for path in before)
    write_folder(tmp_path, trace, judged(trace), [], wall_sec=1.0)
    evaluation = Evaluation.load(tmp_path)
    assert evaluation.audio == evaluation.cuts == []
    assert evaluation.recall is None


def test_a_folder_that_is_being_written_again_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace()
    write_folder(tmp_path, trace, judged(trace), [], wall_sec=1.0)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("moshi_ttt.evaluation.folder.write_events", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path, make_trace(jump_at=763), judged(trace), [], wall_sec=1.0)
    with pytest.raises(UserError, match="summary"):
        Evaluation.load(tmp_path)


def test_recall_without_controls_is_left_out_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, make_trace(), judged(make_trace(), RECALL), [], wall_sec=1.0)
    (tmp_path / "probes.json").write_text(json.dumps({"gap_sec": [4.0], "accuracy": [0.5]}))
    assert Evaluation.load(tmp_path).recall is None
    assert "evaluate again" in caplog.text


@pytest.mark.parametrize(
    ("prompt_steps", "free_from"),
    [(0, 0), (1, 1), (298, 298), (299, 0), (300, 0)],
)
def test_scalars_report_and_quality_agree_on_what_was_generated(
    prompt_steps: int, free_from: int
) -> None:
    trace = make_trace(shape=(2, 2, 300), hybrid_layers=(1,), prompt_steps=prompt_steps)
    trace.branch_ratio[..., :298] = 0.25  # then: the last steps
    trace.branch_ratio[..., 298:] = 0.75
    trace.text_tokens[:] = 3
    trace.text_tokens[:, 298:] = 100
    assert trace.free_from == free_from
    last = free_from == 298
    nothing_generated = prompt_steps >= 299
    assert ("Nothing was generated" in findings(trace, [])[0]) == nothing_generated
    assert loudest_memory(trace) == (1, 0.75 if last else 0.25)
    summary = position_summary(trace, [])
    assert summary["memory/branch_ratio/layer_01"] == (0.75 if last else 0.25)
    assert summary["longgen/entropy/text/start"] == pytest.approx(
        math.nan if last else 1.5, rel=0.1, nan_ok=True
    )
    share = judged(trace).quality["whole"]["padding_share"]
    assert share == pytest.approx(0 if last else (298 - free_from) / (299 - free_from))
