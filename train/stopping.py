"""Signals: a run that is asked to stop does so where it can go on from, and says how."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

INSIST_SEC = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what clusters send; a lost terminal; what SLURM sends ahead of time when asked to."""


class Stopped(BaseException):
    """The run was asked to stop; no error, so that nothing takes it for one.

    Args:
        signum: the signal.
        whole: whether weights, optimizer and position belong together, and may be kept.
    """

    def __init__(self, signum: int, *, whole: bool) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.whole = whole

    @property
    def status(self) -> int:
        """Exit status, as shells report a signal."""
        return 128 + self.signum


class StopOnSignal(Callback):
    """Raises `Stopped`: between optimizer steps while training, at once anywhere else.

    An optimizer step that began is finished, with all batches that it accumulates. Preparing data
    and evaluations change nothing that is kept, so that they are left at once. A second signal
    does not wait. Python drops what is raised in a finalizer, so that a signal that has not ended
    the run a second later is sent again.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._training = False
        self._insisting: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here these signals are ours."""
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            self._heard()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _listen(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self._asked = self._asked is not None, signum
        if again or not self._training:
            self._heard()
            self._insisting = threading.Timer(INSIST_SEC, os.kill, (os.getpid(), signum))
            self._insisting.daemon = True
            self._insisting.start()
            raise Stopped(signum, whole=not self._training)

    def _heard(self) -> None:
        if self._insisting is not None:
            self._insisting.cancel()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The run ends, and may take its time to."""
        self._heard()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning put a handler of its own before ours meanwhile."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a sanity check, for the same reason."""
        self._listen()

    def on_train_batch_start(self, *args: Any) -> None:
        """From here to the end of the step, weights and position do not belong together."""
        self._training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, but for the last of an epoch: its validation comes first."""
        accumulated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if accumulated and not trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """`RunCheckpoints` has saved by now, for a run that resumes to validate again."""
        self._leave_training(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a long generation, in a run without validation."""
        self._leave_training(trainer)

    def _leave_training(self, trainer: Trainer) -> None:
        if self._training:
            self._stop_if_asked(trainer)
            self._training = False

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = self._asked is not None
        if trainer.world_size > 1:  # saving takes all processes; one may hear of it later
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Stopped(self._asked or signal.SIGTERM, whole=True)
