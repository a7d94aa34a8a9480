"""What training writes to TensorBoard and says on the console."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.fit import main, without_tips

LOSSES = ("loss", "text_loss", "audio_loss")


def check_pace(events: EventAccumulator, steps: list[int]) -> None:
    """Two clips of 25 steps and 17 streams an optimizer step."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("speed/")]
    found = {tag.removeprefix("speed/"): events.Scalars(tag) for tag in tags}
    values = {name: [one.value for one in series] for name, series in found.items()}
    assert all([one.step for one in series] == steps for series in found.values())
    pace = values["optimizer_steps_per_sec"]
    for name, factor in (
        ("steps_per_sec", 50),
        ("tokens_per_sec", 50 * 17),
        ("times_real_time", 50 * 0.08),
    ):
        assert values[name] == pytest.approx([factor * one for one in pace], rel=1e-5)
    # five and two of eight steps are left, and the pauses after the epochs
    first, last = values["left_min"]
    assert first > last > 2 / 60 * 0.5 / max(pace)
    assert any(tag.startswith("lr-") for tag in events.Tags()["scalars"])


def test_what_is_logged_is_the_same_however_often_it_is_logged(
    small: list[str], tmp_path: Path
) -> None:
    logged = {}
    for every in (1, 3):
        args = ["--model.loss.magnitude_reg=0", "--model.loss.audio_weight=0.3"]
        # of the two clips of a step one in three is predicted: none in the steps 1, 4 and 7
        args.append("--model.loss.audio_every=3")
        args.append(f"--trainer.log_every_n_steps={every}")
        events = EventAccumulator(str(main([*small, *args, f"--run_dir={tmp_path}/{every}"])))
        events.Reload()
        logged[every] = {
            (tag, event.step): event.value
            for tag in events.Tags()["scalars"]
            if tag.startswith("train/")
            for event in events.Scalars(tag)
        }
        if every == 3:
            check_pace(events, [2, 5])
    assert {step for _, step in logged[1]} == set(range(8))
    assert logged[3] == {key: value for key, value in logged[1].items() if key[1] in (2, 5)}
    for step in range(8):
        loss, text, audio = (logged[1][f"train/{name}", step] for name in LOSSES)
        assert math.isnan(audio) == (step in (1, 4, 7))
        assert loss == pytest.approx(text + 0.3 * (0 if math.isnan(audio) else audio), rel=1e-5)
    per_layer = ("branch_ratio", "branch_ratio_max", "raw_branch_ratio", "gate")
    names = {f"{name}/layer_05" for name in per_layer}
    names |= {*LOSSES, "magnitude_penalty"}
    names |= {"grad_norm/gates", "grad_norm/memory"}
    assert {tag.removeprefix("train/") for tag, _ in logged[3]} == names


def test_lightning_says_what_it_says_but_no_tips(caplog: pytest.LogCaptureFixture) -> None:
    without_tips()
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO):
        said.info("Tip: For seamless cloud logging, try another product")
        said.info("GPU available: False")
    assert caplog.messages == ["GPU available: False"]
