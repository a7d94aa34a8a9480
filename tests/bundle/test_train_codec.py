"""Trainings of a codec far too small to be useful."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_fakes import STEP_SAMPLES, speech_of, tones
from moshi.models import MimiModel, loaders
from torch import Tensor

from moshi_ttt.errors import UserError


def test_the_encoder_rests_while_the_decoder_goes_on(
    script: Any,
    train_on_cpu: Callable[..., Any],
    short_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("codec_module")
    seen: dict[Any, list[dict[str, Tensor]]] = {phase: [] for phase in module.Phase}
    update = module.CodecTraining._update

    def watched(self: Any, audio: Tensor) -> Any:
        values = update(self, audio)
        weights = {name: p.detach().clone() for name, p in self.codec.named_parameters()}
        seen[self._phase].append(weights)
        return values

    monkeypatch.setattr(module.CodecTraining, "_update", watched)
    train_on_cpu(
        speech_of(tones(20)), tmp_path, script("codec_recipe").Recipe(updates=20, **short_recipe)
    )
    assert [len(updates) for updates in seen.values()] == [6, 8, 6]
    resting = {"encoder.", "encoder_transformer.", "downsample."}
    for phase, updates in seen.items():
        for name, last in updates[-1].items():
            moved = not torch.equal(updates[0][name], last)
            rests = phase is module.Phase.DECODER and (
                name.startswith(tuple(resting)) or "input_proj" in name
            )
            zero = last.eq(0).all()
            assert moved != rests or zero, f"{name} in {phase!r}"


def test_training_lowers_the_distance_and_resumes_and_writes_what_moshi_loads(
    script: Any,
    codec_config: dict[str, Any],
    train_on_cpu: Callable[..., Any],
    short_recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    train_codec, training = script("train_codec"), script("codec_training")
    losses, course = script("codec_losses"), script("codec_recipe").Recipe
    speech = speech_of(tones(20))
    short_recipe = short_recipe | {"peak_lr": 3e-3}

    def distance(codec: MimiModel) -> float:
        torch.manual_seed(1)
        audio = speech.pieces(8, 8)
        with torch.no_grad():
            codes = codec.eval().encode(audio)
            return float(losses.mel_distance(codec.decode(codes), audio))

    fresh = train_codec.build(codec_config, speech, 0)
    training.fit_codebooks(fresh, torch.randn(4, 16, 64), 32)
    half = train_on_cpu(speech, tmp_path, course(updates=12, **short_recipe))
    assert half._updates == 12
    assert distance(half.averaged()) < distance(fresh)
    with pytest.raises(UserError, match="--resume"):
        train_on_cpu(speech, tmp_path, course(updates=24, **short_recipe))
    whole = train_on_cpu(speech, tmp_path, course(updates=24, **short_recipe), resume=True)
    assert whole._updates == 24
    kept = whole.averaged()
    assert distance(kept) < distance(half.averaged())

    written = json.loads((tmp_path / "mimi_config.json").read_text())
    loaded = loaders.get_mimi(tmp_path / "mimi.safetensors", written, num_codebooks=3)
    audio = tones(2)[None, None, : 24 * STEP_SAMPLES]
    with torch.no_grad():
        codes = kept.eval().encode(audio)
        assert (loaded.encode(audio) == codes).float().mean() > 0.95  # weights are fp16 on disk
        torch.testing.assert_close(loaded.decode(codes), kept.decode(codes), atol=2e-3, rtol=0)


def test_a_training_that_is_cut_off_can_be_resumed_from_its_last_epoch(
    script: Any,
    train_on_cpu: Callable[..., Any],
    short_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CutOffError(Exception):
        pass

    module = script("codec_module")
    update = module.CodecTraining._update
    done = []

    def cut_off(self: Any, audio: Tensor) -> Any:
        if len(done) == 7:
            raise CutOffError
        done.append(audio.shape)
        return update(self, audio)

    speech, course = speech_of(tones(20)), script("codec_recipe").Recipe(updates=8, **short_recipe)
    with monkeypatch.context() as patched:
        patched.setattr(module.CodecTraining, "_update", cut_off)
        with pytest.raises(CutOffError):
            train_on_cpu(speech, tmp_path, course)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert kept["course"]["updates"] == short_recipe["updates_per_epoch"]
    assert (tmp_path / "mimi.safetensors").is_file()
    resumed = train_on_cpu(speech, tmp_path, course, resume=True)
    assert resumed._updates == 8


def test_an_update_on_a_cpu_is_simply_called(script: Any) -> None:
    heard = []

    def update(audio: Tensor) -> dict[str, Tensor]:
        heard.append(audio)
        return {"sum": audio.sum()}

    replayed = script("codec_replay").Replayed(update)
    pieces = [torch.full((2,), float(index)) for index in range(6)]
    found = [replayed("key", audio) for audio in pieces[:5]] + [replayed.plainly(pieces[5])]
    assert all(got is given for got, given in zip(heard, pieces, strict=True))
    assert [float(values["sum"]) for values in found] == [0, 2, 4, 6, 8, 10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_training_with_a_change_of_phase_equals_an_eager_one(
    script: Any,
    codec_config: dict[str, Any],
    short_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, replay = script("codec_module"), script("codec_replay")
    monkeypatch.setattr(module, "REPLACE_EVERY_UPDATES", 10)
    # 24 updates in each phase: every fourth is of long pieces, and the fourth of these is recorded;
    # an epoch ends, and is validated, every 5 updates
    short_recipe |= {"plain_share": 1 / 3, "decoder_share": 1 / 3}
    speech = tones(20)

    def train(name: str, updates: int = 72, *, resume: bool = False) -> Any:
        return script("train_codec").train(
            speech_of(speech),
            tmp_path / name,
            script("codec_recipe").Recipe(updates=updates, **short_recipe),
            config=codec_config,
            device="cuda",
            precision="32-true",
            resume=resume,
            progress_bar=False,
        )

    replayed = train("replayed")
    keys = {(stretch, phase) for stretch in (1, 4) for phase in module.Phase}
    assert set(replayed._replayed._recordings) == keys
    monkeypatch.setattr(replay, "_WARM_UP_CALLS", 10**9)
    eager = train("eager")
    assert not eager._replayed._recordings
    assert replayed._updates == eager._updates == 72
    for name in ("val/mel", "val/readout"):
        values = [float(m.trainer.callback_metrics[name]) for m in (replayed, eager)]
        # noise of 1e-4 on all weights moves these by 0.6 %, a learning rate that stands still by 4
        assert values[0] == pytest.approx(values[1], rel=0.02), name
    # what was resumed can be recorded again: its rate must not have stayed where it was read
    resumed = train("eager", 76, resume=True)
    assert resumed._settings["lr"].is_cuda


def test_resuming_nothing_and_too_little_speech_are_refused(
    script: Any, train_on_cpu: Callable[..., Any], short_recipe: dict[str, Any], tmp_path: Path
) -> None:
    course = script("codec_recipe").Recipe(updates=2, **short_recipe)
    with pytest.raises(UserError, match=r"last\.ckpt does not exist"):
        train_on_cpu(speech_of(tones(20)), tmp_path, course, resume=True)
    with pytest.raises(UserError, match="add recordings"):
        train_on_cpu(speech_of(tones(1)), tmp_path, course)
