"""What a training run left, for tests that look at it."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run_folder: Path, tag: str) -> list[float]:
    """Values of a tag, in order."""
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def trained(run_folder: Path) -> dict[str, torch.Tensor]:
    """Weights in the last checkpoint."""
    checkpoint = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["state_dict"]
