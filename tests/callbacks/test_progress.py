"""Progress where nobody sees a bar."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import progress
from callbacks.progress import ProgressLines


def test_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    trainer: Any = SimpleNamespace(
        current_epoch=1,
        global_step=7,
        num_training_batches=12,
        num_val_batches=[2],
        progress_bar_metrics={"train/loss": 3.41234},
        print=print,
    )
    lines, module = ProgressLines(), Any
    for batch_idx in range(12):
        seconds += 1
        lines.on_train_batch_end(trainer, module, None, None, batch_idx)  # type: ignore[arg-type]
    for batch_idx in range(2):
        lines.on_validation_batch_end(trainer, module, None, None, batch_idx)  # type: ignore[arg-type]
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"{what} epoch=2 batch={place} step=7 train/loss=3.412"
        for what, place in (
            ("train", "5/12"),
            ("train", "10/12"),
            ("train", "12/12"),
            ("validate", "2/2"),
        )
    ]
