"""Conversations for the trainer: checked and encoded once, then dealt out as windows of codes."""

from __future__ import annotations

import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from moshi_ttt.data import (
    EncodedRecording,
    LaneLoader,
    RecordingReader,
    WindowLoader,
    check_manifest,
    read_manifest,
)
from moshi_ttt.errors import UserError, check_bounds, check_setting, settings_at
from moshi_ttt.files import MISSING, why_unreadable
from moshi_ttt.model.source import ASSETS, ModelSource, open_source

DURATION_RANGE_SEC = (15.0, 120.0)
SHOWN_WARNINGS = 10

logger = logging.getLogger(__name__)


class ConversationData(LightningDataModule):
    """Stereo conversations as clips of Moshi's 17 rows of codes.

    A batch is `{"codes": int64 [B, 17, T], "start_step": int64 [B], "recording": list[str],
    "heard": list[bool]}`; `heard` tells which rows know any audio. Where memory is carried there is
    `"continues": list[bool]` too: which rows go on where those of the batch before stopped.

    Args:
        source: model whose codec and tokenizer encode the data; follows `model.source`.
        manifest: training recordings, one `{"path": "a.wav", "duration": 24.5}` a line; paths
            are relative to the manifest, audio is stereo, left = Moshi, right = user, and
            `a.json` beside it holds the words. The default is the bundled set of codes.
        val_manifest: held-out recordings in the same format, for validation and as prompts of
            long generations.
        duration_sec: length of a clip in seconds, 15 to 120. Recordings are cut into consecutive
            clips, those to train on elsewhere in every epoch; a rest of less than a quarter of a
            clip adds none.
        allow_any_duration: accept a `duration_sec` outside 15 to 120 seconds.
        batch_size: clips a batch on each device; the last batch of an epoch may be smaller.
        cache_dir: folder that keeps encoded audio, so that it is encoded only once; it may be
            shared between runs, and deleted at any time.
        carry: let a memory go on from clip to clip in training: each row of the batch goes through
            recordings from their first clip to the last one, padded, in an order that differs from
            epoch to epoch, and begins each with an empty memory. Gradients end where a clip begins;
            attention begins afresh there, as does what the model reads. The clips of an epoch are
            dealt to the rows of all devices in equal parts: a recording may be broken off at the
            end of one, to begin afresh in another, and less than a clip a row is left out. A model
            without a memory is given the same clips in the same order. Where no row could ever go
            on (each recording is one clip long, or there is one batch), clips are dealt as without.
        seed: decides, together with the epoch, where the training clips begin and their order.

    Raises:
        UserError: a value out of range, or a manifest that does not exist.
    """

    def __init__(
        self,
        source: str = "tiny",
        manifest: str = "assets/conversations/train/manifest.jsonl",
        val_manifest: str = "assets/conversations/heldout/manifest.jsonl",
        duration_sec: float = 60.0,
        allow_any_duration: bool = False,
        batch_size: int = 1,
        cache_dir: str = ".cache/codes",
        carry: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        low, high = DURATION_RANGE_SEC
        check_setting(
            allow_any_duration or low <= duration_sec <= high,
            "data.duration_sec",
            f"{duration_sec:g}",
            f"is outside {low:g}..{high:g}; use {low:g}-{high:g}, or set "
            "data.allow_any_duration=true",
        )
        check_bounds("data.duration_sec", duration_sec, least=1, below=math.inf)
        check_bounds("data.batch_size", batch_size, least=1)
        check_bounds("data.seed", seed, least=0)
        self.source = source
        self.manifest = _find_manifest("manifest", manifest)
        self.val_manifest = _find_manifest("val_manifest", val_manifest)
        self.duration_sec = duration_sec
        self.batch_size = batch_size
        self.cache_dir = Path(cache_dir)
        self.carry = carry
        self.seed = seed
        self._train: list[EncodedRecording] = []
        self._val: list[EncodedRecording] = []
        self._train_loader: WindowLoader | None = None
        self._resume: dict[str, Any] | None = None

    @cached_property
    def _model_source(self) -> ModelSource:
        with settings_at("data"):
            return open_source(self.source)

    @cached_property
    def _reader(self) -> RecordingReader:
        return RecordingReader(self._model_source, self.cache_dir)

    @property
    def clip_steps(self) -> int:
        """Length of a clip in steps."""
        return self._model_source.clock.steps(self.duration_sec)

    def prepare_data(self) -> None:
        """Check both manifests and encode what was never encoded; one process a machine, once.

        Raises:
            UserError: naming every file and line that cannot be used.
        """
        if self._train:
            return
        tokenizer = self._model_source.tokenizer()
        for path in (self.manifest, self.val_manifest):
            # damage behind an intact header shows below, when a recording is first encoded
            check = check_manifest(
                path, self._model_source.clock, tokenizer, decode=False, read=self._reader.codes
            )
            check.raise_problems()
            for warning in check.warnings[:SHOWN_WARNINGS]:
                logger.warning("%s: %s", path, warning)
            if len(check.warnings) > SHOWN_WARNINGS:
                logger.warning(
                    "%s: %d warnings in all; `python scripts/check_manifest.py %s` lists them",
                    *(path, len(check.warnings), path),
                )
        bundled = [
            path.resolve().is_relative_to(ASSETS) for path in (self.manifest, self.val_manifest)
        ]
        if bundled == [False, True]:
            logger.warning(
                "data.val_manifest is the bundled held-out set but data.manifest is not; set "
                "data.val_manifest to held-out recordings of your own"
            )
        for path in (self.manifest, self.val_manifest):
            self._reader.audio_codes(read_manifest(path)[0])

    def setup(self, stage: str) -> None:
        """Load every recording's codes from the cache, once in the life of this object."""
        if not self._train:
            self._train = self._reader.read(read_manifest(self.manifest)[0])
            self._val = self._reader.read(read_manifest(self.val_manifest)[0])

    def train_dataloader(self) -> WindowLoader:
        """Shuffled clips, cut elsewhere in every epoch, an equal share for each process.

        `overfit_batches` repeats clips of the fixed cut that validation has.

        Raises:
            UserError: fewer clips than processes.
        """
        trainer: Any = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress
        common: dict[str, Any] = {
            "recordings": self._train,
            "clip_steps": self.clip_steps,
            "batch_size": self.batch_size,
            "seed": None if trainer.overfit_batches else self.seed,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "trained_batches": lambda: progress.total.processed,
        }
        loader = (LaneLoader if self.carry else WindowLoader)(**common)
        if isinstance(loader, LaneLoader) and not loader.carries:
            loader = WindowLoader(**common)
            logger.warning(
                "data.carry has nothing to carry: no row of a batch has two clips of one "
                "recording, with %d clip(s) of %g s for each process and data.batch_size=%d; "
                "each begins with an empty memory",
                *(loader.windows, self.duration_sec, self.batch_size),
            )
        if self._resume is not None:
            loader.load_state_dict(self._resume)
        if loader.windows < self.batch_size:
            logger.warning(
                "data.batch_size=%d is more than the %d clip(s) that an epoch has for each "
                "process; every batch has %d",
                *(self.batch_size, loader.windows, loader.windows),
            )
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> WindowLoader:
        """Held-out clips in order; each is seen by exactly one process.

        Raises:
            UserError: fewer clips than processes.
        """
        trainer: Any = self.trainer
        return WindowLoader(
            self._val,
            self.clip_steps,
            self.batch_size,
            seed=None,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data, for the checkpoint.

        Lightning keeps the state of loaders too, but restores it only when it takes an epoch for
        unfinished; one that `max_steps` cut short it takes for finished.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position until the training loader is made."""
        self._resume = state_dict["train"]

    def val_recordings(self) -> list[EncodedRecording]:
        """Whole held-out recordings, in the order of their manifest."""
        return self._val


def _find_manifest(key: str, value: str) -> Path:
    """The file that a field means; bundled manifests are found from any working directory."""
    for path in (Path(value), ASSETS.parent / value):
        if path.is_file():
            return path
    why = why_unreadable(Path(value))
    said = f"does not exist (from {Path.cwd()})" if why == MISSING else f"cannot be read ({why})"
    raise UserError(
        f"data.{key}={value} {said}; give a JSON-lines file of "
        '{"path": "a.wav", "duration": 24.5}'
    )
