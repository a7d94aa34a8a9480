from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_trace import RECALL, make_trace, write_evaluation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from callbacks.tensorboard import log_evaluation
from moshi_ttt.errors import UserError
from moshi_ttt.files import write_json
from moshi_ttt.report import write_report


def logged(folder: Path, logs: Path) -> EventAccumulator:
    with SummaryWriter(str(logs)) as writer:
        log_evaluation(writer, folder, 17)
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0, "audio": 0})
    return events.Reload()


def test_scalars_figures_and_audio_of_a_hybrid_are_logged(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", make_trace(jump_at=763), clips=2)
    events = logged(tmp_path / "run", tmp_path / "logs")
    tags = events.Tags()
    assert {
        "at_a_glance/jumps",
        "longgen/jump/ratio/layer_03",
        "longgen/input_norm/layer_03/end",
        "memory/branch_ratio/layer_02",
    } <= set(tags["scalars"])
    assert "longgen/jump/count" not in tags["scalars"]  # once is enough
    assert min(tags["scalars"]).startswith("at_a_glance/")  # TensorBoard opens what comes first
    (count,) = events.Scalars("at_a_glance/jumps")
    assert (count.step, count.value) == (17, 1)
    names = ("input_norm", "heat_map", "memory", "entropy", "nll", "audio")
    assert set(tags["images"]) == {f"longgen/figures/{name}" for name in names}
    (image,) = events.Images("longgen/figures/input_norm")
    assert (image.width, image.height) == (1600, 832)
    assert set(tags["audio"]) == {"longgen/audio/stream_00", "longgen/audio/stream_01"}
    (clip,) = events.Audio("longgen/audio/stream_00")
    assert clip.sample_rate == 24_000
    assert clip.length_frames == 48_000


def test_sound_around_the_positions_is_logged_too(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", make_trace(), clips=1)
    whole = tmp_path / "run/audio/stream_00.wav"
    whole.with_name("stream_00_at_2C.wav").write_bytes(whole.read_bytes())
    tags = logged(tmp_path / "run", tmp_path / "logs").Tags()
    assert set(tags["audio"]) == {"longgen/audio/stream_00", "longgen/audio/stream_00_at_2C"}


def images(page: Path) -> list[str]:
    found = re.findall(r"<img[^>]*>", page.read_text())
    assert len(found) == 6
    return found


def test_the_report_shows_the_figures_that_were_logged_without_drawing_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "longgen/epoch_001"
    write_evaluation(folder, make_trace(jump_at=763))
    drawn_anew = images(write_report(tmp_path))
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        pictures = log_evaluation(writer, folder, 17)
    # would fail if it were called
    monkeypatch.setattr("moshi_ttt.report.pages.evaluation_pictures", None)
    assert images(write_report(tmp_path, {folder: pictures})) == drawn_anew


def test_undefined_scalars_and_missing_parts_are_skipped(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", make_trace(hybrid_layers=()), nll=False, clips=0)
    tags = logged(tmp_path / "run", tmp_path / "logs").Tags()
    assert "at_a_glance/jumps" in tags["scalars"]
    assert "longgen/jump/step" not in tags["scalars"]
    assert set(tags["images"]) == {
        f"longgen/figures/{name}" for name in ("input_norm", "heat_map", "entropy")
    }
    assert tags["audio"] == []


def test_an_unfinished_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    make_trace().save(tmp_path)
    with SummaryWriter(str(tmp_path / "logs")) as writer, pytest.raises(UserError, match="summary"):
        log_evaluation(writer, tmp_path, 0)


def test_tensorboard_gets_the_figure_of_recall(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", make_trace(), clips=0)
    write_json(tmp_path / "run/probes.json", RECALL)
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        log_evaluation(writer, tmp_path / "run", 3)
    tags = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0}).Reload().Tags()
    assert "longgen/figures/recall" in tags["images"]
