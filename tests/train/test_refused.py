"""Checkpoints that cannot be resumed, and settings of the trainer: each works or is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moshi_ttt.errors import UserError
from moshi_ttt.model.weights import load_trained
from train.fit import main


def refused(arguments: list[str]) -> str:
    with pytest.raises(UserError) as error:
        main(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "first", "shapes"),
    [
        ("memory.heads=2", "transformer.layers.5.branch.rule.", ("[4] float32 there", "[2]")),
        ("memory.layers=last:2", "transformer.layers.4.", ("[", "nothing of that name")),
        ("lora.rank=3", "lora_A.default.weight", ("[2, 256] float32 there", "[3, 256] float32")),
    ],
)
def test_a_resume_into_other_shapes_names_the_first_weight_and_both(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    setting: str,
    first: str,
    shapes: tuple[str, str],
) -> None:
    resume = [f"--run_dir={tmp_path}", f"--ckpt_path={uncut}/checkpoints/last.ckpt"]
    message = refused([*small, *dropout, *resume, f"--model.{setting}"])
    for part in ("trains other weights", first, *shapes, "resume with the config saved beside it"):
        assert part in message


class Strange:
    """What a checkpoint of another program may hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "it has no state_dict"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.5.0", "loops": {}}, "it has no rng"),
        (torch.zeros(3), "was not written by a training of moshi-ttt"),
        ([1], "was not written by a training of moshi-ttt"),
        ({"state_dict": {}, "hyper_parameters": Strange()}, "Weights only load failed"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_before_anything_is_loaded(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: Any,
    message: str,
) -> None:
    monkeypatch.setattr("train.module.open_source", None)
    torch.save(content, tmp_path / "other.ckpt")
    found = refused([*small, f"--run_dir={tmp_path}/runs", f"--ckpt_path={tmp_path}/other.ckpt"])
    assert found.startswith(f"--ckpt_path {tmp_path}/other.ckpt was not written by a training")
    assert message in found
    assert not (tmp_path / "runs").exists()


def hurt_weights(checkpoint: dict[str, Any]) -> None:
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = torch.nan


def hurt_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].view(-1)[0] = torch.inf


@pytest.mark.parametrize(
    ("hurt", "name"),
    [
        (hurt_weights, "transformer.layers."),
        (hurt_optimizer, "exp_avg of parameter 0 in the optimizer"),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_refused(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    hurt: Callable[[dict[str, Any]], None],
    name: str,
) -> None:
    checkpoint = torch.load(uncut / "checkpoints/last.ckpt", weights_only=True)
    hurt(checkpoint)
    torch.save(checkpoint, tmp_path / "hurt.ckpt")
    resume = [f"--run_dir={tmp_path}/runs", f"--ckpt_path={tmp_path}/hurt.ckpt"]
    message = refused([*small, *dropout, *resume, "--trainer.max_epochs=3"])
    assert message.startswith(name)
    assert "is not finite; the checkpoint cannot be resumed from; take an earlier one" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_epochs=-1"], "trainer.max_epochs=-1 has no end"),
        (["max_epochs=-1", "max_time=00:00:00:05"], "set trainer.max_steps (trainer.max_time may"),
        (["barebones=true"], "trainer.barebones=True is decided by train/fit.py; leave it out"),
        (["enable_checkpointing=false"], "trainer.enable_checkpointing=False leaves nothing"),
        (["precision=bf16-true"], "trainer.precision=bf16-true would store memories in less"),
        (["precision=16-true"], "trainer.precision=16-true would store memories in less"),
        (["precision=transformer-engine"], "use bf16-mixed"),
        (["logger=true"], "trainer.logger=True is decided by train/fit.py"),
        (["logger=TensorBoardLogger", "logger.save_dir=x"], "is decided by train/fit.py"),
        (["logger+=CSVLogger", "logger.save_dir=x"], "is decided by train/fit.py"),
        (["accelerator=hpu"], "trainer: "),
    ],
)
def test_settings_of_the_trainer_that_cannot_work_are_refused_at_once(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("train.module.open_source", None)
    arguments = [f"--trainer.{setting}" for setting in settings]
    assert message in refused([*small, f"--run_dir={tmp_path}/runs", *arguments])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        (["fast_dev_run=true"], "last.safetensors"),
        (["max_epochs=-1", "max_steps=2"], "last.safetensors"),
        (["precision=64-true", "max_steps=1"], "last.safetensors"),
        (["callbacks+=ModelCheckpoint", "max_epochs=1"], "epoch=0-step=4.safetensors"),
    ],
)
def test_settings_of_the_trainer_that_work_leave_weights_to_evaluate(
    small: list[str], tmp_path: Path, settings: list[str], file: str
) -> None:
    arguments = [f"--trainer.{setting}" for setting in settings]
    folder = main([*small, f"--run_dir={tmp_path}", *arguments])
    assert load_trained(folder / "checkpoints" / file)[3] == 25
