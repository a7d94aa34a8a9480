"""A run that is asked to stop does so within an optimizer step, and goes on as if it had not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.fit import FitCLI, main

WEIGHTS = "checkpoints/last.safetensors"


class At(Callback):
    """Does something in a hook, when the counter stands at a number."""

    def __init__(self, hook: str, step: int, action: Callable[[], object]) -> None:
        def act(trainer: Any, *args: Any, **settings: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                action()

        setattr(self, hook, act)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`main` with one more callback."""

    def run(arguments: list[str], callback: Callback | None = None) -> Path:
        instantiate = FitCLI.instantiate_trainer

        def instantiated(self: FitCLI, **kwargs: Any) -> Any:
            trainer = instantiate(self, **kwargs)
            if callback is not None:
                trainer.callbacks.insert(0, callback)
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(FitCLI, "instantiate_trainer", instantiated)
            return main(arguments)

    return run


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("hook", "step", "signum", "kept_step"),
    [
        ("on_train_batch_start", 1, signal.SIGTERM, 2),
        ("on_train_batch_end", 2, signal.SIGINT, 3),
        ("on_before_optimizer_step", 3, signal.SIGUSR1, 4),  # the last before a validation
        ("on_validation_batch_end", 4, signal.SIGTERM, 4),
        ("on_validation_epoch_end", 8, signal.SIGHUP, 8),
    ],
)
def test_a_signal_stops_where_the_run_can_go_on(
    small: list[str],
    uncut: Path,
    dropout: list[str],
    fit: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hook: str,
    step: int,
    signum: int,
    kept_step: int,
) -> None:
    arguments = [*small, *dropout, f"--run_dir={tmp_path}"]
    handler = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        fit(arguments, At(hook, step, send(signum)))
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) == handler
    kept = tmp_path / "000/checkpoints/last.ckpt"
    error = capsys.readouterr().err
    assert f"stopped by {signal.Signals(signum).name}: --ckpt_path {kept} goes on" in error
    assert torch.load(kept, weights_only=True)["global_step"] == kept_step
    folder = main([*arguments, f"--ckpt_path={kept}"])
    assert folder == tmp_path / "000"
    assert (folder / WEIGHTS).read_bytes() == (uncut / WEIGHTS).read_bytes()
    assert scalars(folder, "val/loss")[-1] == scalars(uncut, "val/loss")[-1]
    assert scalars(folder, "val/loss") == scalars(uncut, "val/loss")


@pytest.mark.parametrize("validates", [True, False])
def test_a_signal_during_long_generation_stops_at_once_and_loses_no_epoch(
    small: list[str],
    dropout: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    validates: bool,
) -> None:
    arguments = [*small, *dropout, "--long_generation.every_n_epochs=1", f"--run_dir={tmp_path}"]
    arguments += [] if validates else ["--trainer.limit_val_batches=0"]
    monkeypatch.setattr("callbacks.long_generation.write_report", lambda *_: None)
    monkeypatch.setattr("callbacks.long_generation.log_evaluation", lambda *_: None)
    evaluated: list[str] = []
    last = tmp_path / "000/checkpoints/last.ckpt"

    def evaluate(*args: Any, label: str, **kwargs: Any) -> None:
        evaluated.append(label)
        if evaluated == ["epoch 0", "epoch 1"]:
            # already: where there are several processes, they could no longer save it together
            assert torch.load(last, weights_only=True)["global_step"] == 4
            send(signal.SIGTERM)()
            pytest.fail("it went on")

    monkeypatch.setattr("callbacks.long_generation.evaluate", evaluate)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load(last, weights_only=True)["global_step"] == 4
    folder = main([*arguments, "--ckpt_path=last"])
    # with validation the run goes on before it, and evaluates epoch 1 again
    assert evaluated == ["epoch 0", "epoch 1", *(["epoch 1"] * validates), "epoch 2"]
    assert folder == last.parents[1]
    assert torch.load(last, weights_only=True)["global_step"] == 8


def test_a_signal_before_training_says_that_nothing_is_there_to_go_on_from(
    small: list[str], fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit([*small, f"--run_dir={tmp_path}"], At("setup", 0, send(signal.SIGTERM)))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: nothing was trained yet" in capsys.readouterr().err


def test_the_other_processes_of_a_run_do_not_outlive_the_first(
    small: list[str], fit: Callable[..., Path], tmp_path: Path
) -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=1, num_nodes=1)
    with subprocess.Popen(["sleep", "100"]) as other:
        launcher.procs = [other]

        class Launched(Callback):
            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                trainer.strategy._launcher = launcher
                send(signal.SIGTERM)()

        with pytest.raises(SystemExit):
            fit([*small, f"--run_dir={tmp_path}"], Launched())
        assert other.wait(timeout=5) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_falls_into_a_finalizer_is_not_lost(
    small: list[str], fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.stopping.INSIST_SEC", 0.1)

    class Thing:
        def __del__(self) -> None:
            send(signal.SIGTERM)()

    def act() -> None:
        thing = Thing()
        del thing  # Python drops what the handler raises
        time.sleep(20)
        pytest.fail("it went on")

    with pytest.raises(SystemExit) as stopped:
        fit([*small, f"--run_dir={tmp_path}"], At("on_validation_epoch_end", 4, act))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "000/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
