from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fakes import FakeSource, write_audio, write_manifest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import train.data
from moshi_ttt.data import check_manifest
from moshi_ttt.data.audio import read_audio
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ASSETS, open_source
from train.data import ConversationData

BATCHES = 3  # an epoch


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    fake = FakeSource()
    monkeypatch.setattr(train.data, "open_source", lambda name: fake)
    return fake


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Fields of a small data set: 5 clips of 1 s to train on, 3 to validate."""
    return {
        "manifest": str(write_manifest(tmp_path / "train.jsonl", {"a.wav": 3.0, "b.wav": 2.0})),
        "val_manifest": str(write_manifest(tmp_path / "val.jsonl", {"v.wav": 2.5})),
        "duration_sec": 1.0,
        "allow_any_duration": True,
        "batch_size": 2,
        "cache_dir": str(tmp_path / "cache"),
    }


class Interrupted(Exception):
    pass


class Witness(LightningModule):
    """Writes down the batches it is trained on; its weight depends on all of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[list[tuple[str, int]]] = []
        self.validated: list[tuple[str, int]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.fail_at:
            raise Interrupted
        self.seen.append(self.windows(batch))
        return (self.weight - batch["codes"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += self.windows(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @staticmethod
    def windows(batch: dict[str, Any]) -> list[tuple[str, int]]:
        return list(zip(batch["recording"], batch["start_step"].tolist(), strict=True))


def fit(
    options: dict[str, Any],
    *,
    fail_at: int | None = None,
    checkpoint: ModelCheckpoint | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    **trainer_options: Any,
) -> Witness:
    model = Witness(fail_at)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint is not None,
        callbacks=[] if checkpoint is None else [checkpoint],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 3, **trainer_options},
    )
    try:
        trainer.fit(model, datamodule=ConversationData(**options), ckpt_path=resume)
    except Interrupted:
        assert fail_at is not None
    if save is not None:
        trainer.save_checkpoint(save)
    return model


def test_each_epoch_trains_on_clips_cut_elsewhere_and_validates_on_the_same_held_out_ones(
    source: FakeSource, options: dict[str, Any]
) -> None:
    model = fit(options)
    assert len(model.seen) == 3 * BATCHES
    epochs = []
    for epoch in range(3):
        batches = model.seen[epoch * BATCHES : (epoch + 1) * BATCHES]
        epochs.append(sorted(window for batch in batches for window in batch))
        assert [name for name, _ in epochs[-1]] == 3 * ["a.wav"] + 2 * ["b.wav"]
        # 38 and 25 steps, clips of 13: inside, without padding
        assert all(start <= {"a.wav": 25, "b.wav": 12}[name] for name, start in epochs[-1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert model.validated == [("v.wav", 0), ("v.wav", 13), ("v.wav", 26)] * 3


def test_audio_is_encoded_once_over_epochs_and_data_modules(
    source: FakeSource, options: dict[str, Any]
) -> None:
    fit(options)
    fit({**options, "duration_sec": 2.0, "seed": 3})
    assert len(source.encoded) == len(set(source.encoded)) == 2 * 3  # channels x files


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("stop", range(1, 2 * BATCHES + 1))
@pytest.mark.parametrize("how", ["failed after a checkpoint", "saved as it failed", "max_steps"])
def test_interrupted_and_resumed_sees_what_an_uninterrupted_run_sees(
    source: FakeSource, options: dict[str, Any], tmp_path: Path, how: str, stop: int
) -> None:
    whole = fit(options)
    folder = tmp_path / "checkpoints"
    file = folder / "last.ckpt"
    if how == "failed after a checkpoint":
        keeper = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
        first = fit(options, fail_at=stop, checkpoint=keeper)
    elif how == "saved as it failed":
        keeper = ModelCheckpoint(folder, save_on_exception=True, every_n_epochs=100)
        first = fit(options, fail_at=stop, checkpoint=keeper)
        (file,) = folder.iterdir()
    else:
        first = fit(options, max_steps=stop, save=file)
    assert len(first.seen) == stop
    # an epoch that max_steps cut short counts in Lightning's epochs, so count steps
    finish = {"max_epochs": -1, "max_steps": 3 * BATCHES} if how == "max_steps" else {}
    second = fit(options, resume=file, **finish)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


def test_resuming_between_epochs_goes_on_with_the_next_order(
    source: FakeSource, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(options)
    first = fit(options, max_epochs=1, save=tmp_path / "x.ckpt")
    second = fit(options, resume=tmp_path / "x.ckpt")
    assert first.seen + second.seen == whole.seen


def test_overfitting_repeats_the_same_batch(source: FakeSource, options: dict[str, Any]) -> None:
    model = fit(options, overfit_batches=1)
    assert len(model.seen) == 3
    assert model.seen[0] == model.seen[1] == model.seen[2] == [("a.wav", 0), ("a.wav", 13)]


def test_problems_stop_the_run_before_anything_is_encoded(
    source: FakeSource, options: dict[str, Any], tmp_path: Path
) -> None:
    write_audio(tmp_path / "b.wav", 2.0, channels=1)
    with pytest.raises(UserError, match=r"(?s)train\.jsonl: 1 problem.*line 2: .*b\.wav"):
        fit(options)
    assert source.encoded == []


def test_warnings_of_the_check_are_logged(
    source: FakeSource,
    options: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "a.json").unlink()
    with caplog.at_level(logging.WARNING):
        fit({**options, "batch_size": 9}, max_epochs=1)
    assert "a.json do not exist" in caplog.text
    assert "data.batch_size=9 is more than the 5 clip(s)" in caplog.text


def test_validating_own_data_on_the_bundled_set_is_pointed_out(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    # the bundled codes are read by no other model than the tiny one
    del options["val_manifest"]
    ConversationData(**options).prepare_data()
    assert "data.val_manifest is the bundled held-out set but data.manifest is not" in caplog.text
    caplog.clear()
    ConversationData(cache_dir=options["cache_dir"]).prepare_data()
    assert "data.val_manifest" not in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("duration_sec", 180.0, "data.duration_sec=180 is outside 15..120; use 15-120, or set"),
        ("duration_sec", 14.9, "data.duration_sec=14.9 is outside 15..120"),
        ("duration_sec", float("nan"), "data.duration_sec=nan is outside"),
        ("batch_size", 0, "data.batch_size=0 must be at least 1"),
        ("seed", -1, "data.seed=-1 must be at least 0"),
        ("manifest", "nowhere.jsonl", "data.manifest=nowhere.jsonl does not exist"),
        (
            "manifest",
            "/dev/null",
            "data.manifest=/dev/null cannot be read (it is a pipe or a device)",
        ),
        ("val_manifest", "nowhere.jsonl", "data.val_manifest=nowhere.jsonl does not exist"),
    ],
)
def test_bad_fields_are_refused_at_once(
    source: FakeSource, options: dict[str, Any], field: str, value: Any, message: str
) -> None:
    options = {**options, "duration_sec": 15.0, "allow_any_duration": False, field: value}
    with pytest.raises(UserError) as error:
        ConversationData(**options)
    assert message in str(error.value)


def test_any_duration_is_allowed_when_asked_for(
    source: FakeSource, options: dict[str, Any]
) -> None:
    assert ConversationData(**options).clip_steps == 13
    with pytest.raises(UserError, match=r"data\.duration_sec=inf must be at least 1 and below inf"):
        ConversationData(**{**options, "duration_sec": float("inf")})


def test_the_tiny_model_reads_a_recording_as_its_codec_and_tokenizer_say(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 3.0})
    data = ConversationData(
        manifest=str(manifest), val_manifest=str(manifest), cache_dir=str(tmp_path / "cache")
    )
    data.prepare_data()
    data.setup("fit")
    (recording,) = data.val_recordings()
    assert data.clip_steps == 750
    assert recording.codes.shape == (17, 38)

    source = open_source("tiny")
    codec = source.codec()
    audio = read_audio(tmp_path / "a.wav", 24_000)
    with torch.no_grad():
        left, right = (codec.encode(row[None, None])[0] for row in audio)
    torch.testing.assert_close(recording.codes[1:9], left)
    torch.testing.assert_close(recording.codes[9:], right)
    hello = source.tokenizer().encode("hello")
    assert recording.codes[0].tolist() == [*hello, *[3] * (38 - len(hello))]


def test_the_bundled_sets_are_found_from_anywhere_and_are_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ConversationData()
    source = open_source("tiny")
    demo = [ASSETS / "demo" / f"{name}.jsonl" for name in ("train", "val")]
    for manifest in (data.manifest, data.val_manifest, *demo):
        check = check_manifest(manifest, source.clock, source.tokenizer(), decode=True)
        assert check.problems == check.warnings == []
    data.prepare_data()
    data.setup("fit")
    assert len(data.val_recordings()) == 28
    assert all(recording.probes for recording in data.val_recordings())
    assert not list(tmp_path.iterdir()), "codes that are bundled are not cached again"
