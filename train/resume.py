"""What a run goes on from: a checkpoint of ours, of the same model, with nothing broken in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.model.inspection import check_finite
from moshi_ttt.model.trained_file import difference

Part = TypeVar("Part")
_PARTS = ("state_dict", "rng", "loops", "optimizer_states", "pytorch-lightning_version")


def check_is_ours(path: Path) -> None:
    """Look at what a checkpoint has, before anything else is loaded; its tensors stay on the disk.

    Raises:
        UserError: it is of something else.
    """
    try:
        parts = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        missing = [name for name in _PARTS if name not in parts]
    # of another program, with objects in it that are not loaded from a stranger; or no checkpoint
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{_refusal(path)} ({reason}); {_REMEDY}") from error
    if not isinstance(parts, dict) or missing:
        lacks = f"it has no {missing[0]}" if missing else f"it is a {type(parts).__name__}"
        raise UserError(f"{_refusal(path)} ({lacks}); {_REMEDY}")


_REMEDY = "give a .ckpt of RUN/checkpoints, or its .safetensors to model.init_from"


def _refusal(path: Path) -> str:
    return f"--ckpt_path {path} was not written by a training of moshi-ttt"


def check_resumes(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Hold a checkpoint against the model that is to go on from it.

    Args:
        checkpoint: as Lightning loaded it.
        weights: what trains, by name in the LM.

    Raises:
        UserError: naming the first weight that differs, or is not finite.
    """
    theirs = {name.removeprefix("lm."): one for name, one in checkpoint["state_dict"].items()}
    if problem := difference(theirs, weights):
        raise UserError(
            f"the checkpoint trains other weights than this config: {problem}; resume with the "
            "config saved beside it"
        )
    states = [
        (f"{key} of parameter {index} in the optimizer", value)
        for optimizer in checkpoint["optimizer_states"]
        for index, state in optimizer["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    ]
    check_finite(
        [*theirs.items(), *states], "the checkpoint cannot be resumed from; take an earlier one"
    )


def gathered(own: Part, world_size: int) -> list[Part]:
    """What each process keeps for itself, by rank; takes all of them."""
    parts = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, own)
    return parts


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that draw dropout; every process draws its own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave, as far as there is any of it."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
