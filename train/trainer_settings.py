"""Settings of Lightning's trainer that this training does not have, refused before it is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from moshi_ttt.errors import UserError

_DECIDED = {"logger": None, "plugins": None, "use_distributed_sampler": True, "barebones": False}
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
_SAME = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": ""}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse what would end in a traceback after everything was loaded, or train nothing right.

    Raises:
        UserError: naming the setting.
    """
    for key, default in _DECIDED.items():
        if trainer[key] != default:
            raise UserError(
                f"trainer.{key}={trainer[key]} is decided by train/fit.py; leave it out"
            )
    if trainer["enable_checkpointing"] is False:
        raise UserError(
            "trainer.enable_checkpointing=False leaves nothing to evaluate or to resume from; "
            "leave it out"
        )
    precision = _SAME.get(str(trainer["precision"]), str(trainer["precision"]))
    if precision and precision not in _PRECISIONS:
        raise UserError(
            f"trainer.precision={precision} would store memories in less than float32, which loses "
            "most of their updates; use bf16-mixed, and model.dtype=bfloat16 for the frozen weights"
        )
    endless = trainer["max_epochs"] == -1 or (
        trainer["max_epochs"] is None and trainer["max_time"] is not None
    )
    if endless and trainer["max_steps"] == -1 and not trainer["fast_dev_run"]:
        raise UserError(
            f"trainer.max_epochs={trainer['max_epochs']} has no end that the schedule of the "
            "learning rate could reach; set trainer.max_steps (trainer.max_time may end it before)"
        )


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Say in a line what Lightning does not accept, such as a GPU where there is none."""
    try:
        yield
    except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
