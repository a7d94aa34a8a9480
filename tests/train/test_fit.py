"""What a training run keeps, resumes and leaves alone."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from run_fakes import scalars, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moshi_ttt.errors import UserError
from moshi_ttt.model.weights import load_trained
from train.fit import FitCLI, main
from train.module import MoshiTTT
from train.recipes import CONFIGS


def same_weights(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same, which then are the same bytes."""
    return one.read_bytes() == other.read_bytes()


def test_a_run_leaves_a_folder_that_evaluation_can_read(small: list[str], tmp_path: Path) -> None:
    folder = main([*small, f"--run_dir={tmp_path}", "--long_generation.every_n_epochs=2"])
    for file in (
        "config.yaml",
        "report.html",
        "checkpoints/last.ckpt",
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "longgen/epoch_000/traces.npz",
        "longgen/epoch_002/summary.json",
        "longgen/epoch_002/events.jsonl",
        "longgen/epoch_002/nll.json",
        "longgen/epoch_002/audio/stream_00.wav",
    ):
        assert (folder / file).is_file(), file
    assert not (folder / "longgen/epoch_001").exists()
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "last.safetensors", "best.safetensors"}
    events = EventAccumulator(str(folder)).Reload()
    (settings,) = events.Tensors("settings/text_summary")
    text = settings.tensor_proto.string_val[0].decode()
    assert (folder / "config.yaml").read_text() in text
    table = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.memory.rule" in table
    assert b"ttt_linear" in table
    lm, _, config, trained_steps = load_trained(folder / "checkpoints/last.ckpt")
    assert trained_steps == 25
    assert config.context_steps == lm.context == 20
    weights = lm.state_dict()
    kept = trained(folder)
    assert kept
    assert all(torch.equal(weights[name.removeprefix("lm.")], kept[name]) for name in kept)
    # a second run gets a folder of its own
    assert main([*small, f"--run_dir={tmp_path}"]) == tmp_path / "001"


def test_best_weights_are_those_of_the_lowest_held_out_loss_over_resumed_runs(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out_loss = [3.0, 1.0, 2.0, math.nan, 0.5]  # of each epoch
    monkeypatch.setattr(
        MoshiTTT,
        "on_validation_epoch_end",
        lambda self: self.log("val/loss", held_out_loss[self.current_epoch]),
    )

    folder = tmp_path / "000/checkpoints"
    best, last, copy = folder / "best.safetensors", folder / "last.safetensors", tmp_path / "copy"

    def closing_lines(epochs: int, *arguments: str) -> str:
        main([*small, f"--run_dir={tmp_path}", f"--trainer.max_epochs={epochs}", *arguments])
        return capsys.readouterr().out

    assert f"{best} (held-out loss 1.0000, epoch 2)" in closing_lines(2)
    assert same_weights(best, last)
    shutil.copy(best, copy)
    assert "held-out loss 1.0000, epoch 2" in closing_lines(4, "--ckpt_path=last")
    assert same_weights(best, copy)
    assert not same_weights(best, last)
    assert "held-out loss 0.5000, epoch 5" in closing_lines(5, "--ckpt_path=last")
    assert same_weights(best, last)
    assert load_trained(best)[3] == 25


def test_training_with_and_without_long_generation_gives_identical_weights(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pages and figures are drawn from files, and take ten times as long as the rest
    monkeypatch.setattr("callbacks.long_generation.write_report", lambda *_: None)
    monkeypatch.setattr("callbacks.long_generation.log_evaluation", lambda *_: None)
    # dropout makes the weights depend on the random state, which the callback must restore
    lora = ["--model.train=memory+lora", "--model.lora.rank=2", "--model.lora.dropout=0.5"]
    with_it = [*small, *lora, "--long_generation.every_n_epochs=1", f"--run_dir={tmp_path}/with"]
    without = [*small, *lora, f"--run_dir={tmp_path}/without"]
    first, second = trained(main(with_it)), trained(main(without))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_and_only_the_first_generates(small: list[str], tmp_path: Path) -> None:
    arguments = [
        *small,
        f"--run_dir={tmp_path}",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_epochs=1",
        "--long_generation.every_n_epochs=1",
    ]
    program = CONFIGS.parent / "train" / "fit.py"
    subprocess.run([sys.executable, program, *arguments], check=True, timeout=200)
    folder = tmp_path / "000"
    assert (folder / "longgen/epoch_001/summary.json").is_file()
    assert load_trained(folder / "checkpoints/last.ckpt")[3] == 25
    # 8 windows are 2 batches of 2 for each of the 2 processes
    assert len(scalars(folder, "train/loss")) == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_padding_after_a_recording_does_not_reach_the_weights(
    small: list[str], tmp_path: Path, precision: str
) -> None:
    # clips of 9 s from 8 s are padded, and padding has no residual in layer 0
    arguments = ["--data.duration_sec=9", "--model.memory.layers=[0, 3]", f"--run_dir={tmp_path}"]
    arguments += [f"--trainer.precision={precision}", "--trainer.max_epochs=4"]
    weights = trained(main([*small, *arguments]))
    assert any("layers.0.branch.gate" in name for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32}


class Interrupt(Callback):
    """Stops like a power cut, after the given optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("at_step", [3, 4, 6])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    small: list[str], tmp_path: Path, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # steps 3 and 6 are in the middle of epochs, one after its checkpoint and one at it; 4 is the
    # last one before the validation of epoch 0. Dropout needs the random state too
    args = [
        *small,
        "--model.train=memory+lora",
        "--model.lora.rank=2",
        "--model.lora.dropout=0.5",
        "--checkpoint.every_n_steps=2",
    ]
    uncut = main([*args, f"--run_dir={tmp_path}/whole"])
    whole = torch.load(uncut / "checkpoints/last.ckpt", weights_only=True)
    with monkeypatch.context() as patch:
        fit = FitCLI.instantiate_trainer

        def with_interrupt(self: FitCLI, **kwargs: Any) -> Any:
            trainer = fit(self, **kwargs)
            trainer.callbacks.append(Interrupt(at_step))
            return trainer

        patch.setattr(FitCLI, "instantiate_trainer", with_interrupt)
        with pytest.raises(RuntimeError, match="power cut"):
            main([*args, f"--run_dir={tmp_path}/cut"])
    folder = main([*args, f"--run_dir={tmp_path}/cut", "--ckpt_path=last"])
    assert folder == tmp_path / "cut/000"
    resumed = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 8
    best = "checkpoints/best.safetensors"
    assert same_weights(uncut / best, folder / best)
    assert scalars(folder, "val/loss") == scalars(uncut, "val/loss")
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    moments = whole["optimizer_states"][0]["state"]
    for index, state in resumed["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg_sq"], moments[index]["exp_avg_sq"])
    assert resumed["lr_schedulers"][0]["last_epoch"] == whole["lr_schedulers"][0]["last_epoch"]


def test_resuming_with_another_model_is_refused(small: list[str], tmp_path: Path) -> None:
    main([*small, f"--run_dir={tmp_path}", "--trainer.max_epochs=1"])
    with pytest.raises(UserError, match="trains other weights than this config"):
        main([*small, f"--run_dir={tmp_path}", "--ckpt_path=last", "--model.train=lora"])


def test_a_group_without_gradient_is_an_error(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moshi_ttt.model.branch import MemoryBranch

    # as an adapter that upstream code silently bypasses would behave
    forward = MemoryBranch.forward
    monkeypatch.setattr(
        MemoryBranch, "forward", lambda *args, **more: forward(*args, **more).detach() * 1.0
    )
    with pytest.raises((UserError, RuntimeError), match="no gradient reached gates, memory"):
        main([*small, f"--run_dir={tmp_path}", "--model.train=memory+lora"])


def test_memory_learns_and_the_regulariser_keeps_the_ratio_under_its_target(
    small: list[str], tmp_path: Path
) -> None:
    fast = [*small, "--trainer.max_epochs=12", "--model.optim.lr_gates=0.03"]
    target = ["--model.loss.magnitude_target=0.1", "--trainer.limit_val_batches=0"]
    kept = main([*fast, *target, "--model.loss.magnitude_reg=1", f"--run_dir={tmp_path}/on"])
    free = main(
        [
            *fast,
            *target,
            "--model.loss.magnitude_reg=0",
            "--model.memory.bounded_readout=false",
            f"--run_dir={tmp_path}/off",
        ]
    )
    for folder in (kept, free):
        assert not (folder / "checkpoints/best.safetensors").exists()  # nothing was held out
        loss = scalars(folder, "train/loss")
        assert np.mean(loss[-4:]) < np.mean(loss[:4]) - 0.01
    ratio_kept = scalars(kept, "train/branch_ratio/layer_05")
    ratio_free = scalars(free, "train/branch_ratio/layer_05")
    assert ratio_kept[0] == ratio_free[0] == 0
    assert max(ratio_kept) < 0.1
    assert ratio_free[-1] > 0.2
    assert ratio_free[-1] > 1.5 * ratio_free[len(ratio_free) // 3]
