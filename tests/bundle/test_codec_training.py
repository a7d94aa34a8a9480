from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from codec_fakes import STEP_SAMPLES, tones
from moshi.models import MimiModel, loaders
from torch import Tensor

from moshi_ttt.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script() -> Any:
    """Imports a file of scripts/ by its name."""
    return importlib.import_module


@pytest.fixture
def config(script: Any) -> dict[str, Any]:
    """The codec's structure, far too small to be useful."""
    full = script("codec_training").CODEC_CONFIG
    width = {"input_dimension": 16, "output_dimension": 16}
    return full | {
        "seanet": full["seanet"] | {"dimension": 16, "n_filters": 2},
        "quantizer": full["quantizer"] | width | {"dimension": 8, "bins": 16, "n_q": 3},
        "transformer": full["transformer"]
        | {
            "d_model": 16,
            "num_heads": 2,
            "num_layers": 1,
            "dim_feedforward": 32,
            "input_dimension": 16,
            "output_dimensions": [16],
        },
    }


@pytest.fixture
def recipe(script: Any) -> dict[str, Any]:
    return {
        "rows": 4,
        "piece_steps": 4,
        "codebook_batches": 4,
        "updates_per_epoch": 5,
        "plain_share": 0.3,
        "decoder_share": 0.3,
    }


@pytest.fixture
def train_on_cpu(script: Any, config: dict[str, Any]) -> Callable[..., Any]:
    """`train_codec.train` of the small codec."""
    train = script("train_codec").train
    return partial(train, config=config, device="cpu", progress_bar=False)


def speech_of(script: Any, audio: Tensor) -> Any:
    return script("codec_speech").Speech((audio * 2**15).short(), STEP_SAMPLES)


def test_kmeans_finds_separate_clusters_and_uses_every_word(script: Any) -> None:
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    samples = (centres[:, None] + 0.1 * torch.randn(8, 50, 4)).flatten(0, 1)
    centroids, counts = script("codec_training").kmeans(samples, 16)
    assert (counts >= 1).all()
    assert torch.cdist(samples, centroids).min(dim=1).values.max() < 1
    # more words than samples, as in a very quiet recording
    centroids, counts = script("codec_training").kmeans(torch.ones(3, 4), 16)
    assert centroids.eq(1).all()


def test_fitted_codebooks_are_all_used_and_lower_the_error_level_by_level(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3).requires_grad_(False)
    latents = torch.randn(8, 16, 64)
    training.fit_codebooks(codec, latents, 32)
    codes = codec.quantizer.encode(latents)  # [8, 3, 64]
    for level, codebook in enumerate(training.codebooks(codec)):
        assert codebook.initialized
        assert len(codes[:, level].unique()) == 16
        assert codebook.cluster_usage.sum() == pytest.approx(32, rel=0.05)
    rest = codec.quantizer.rvq_rest
    target = rest.input_proj(latents)
    errors = [
        float((rest.vq.decode(rest.vq.encode(target, n)) - target).square().mean()) for n in (1, 2)
    ]
    assert errors[1] < errors[0] < float(target.square().mean())


def test_splitting_keeps_the_sum_and_gives_the_first_quantizer_the_largest_components(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3).requires_grad_(False)
    first, rest = training.quantizers(codec)
    # of 16 channels, 10 are what two quantizers of 2 and 8 dimensions can pass on
    mixed = torch.randn(16, 10) @ torch.randn(10, 8 * 64)
    latents = mixed.view(16, 8, 64).transpose(0, 1)
    readout = torch.randn(40, 16)

    def parts() -> list[Tensor]:
        return [one.output_proj(one.input_proj(latents)) for one in (first, rest)]

    def heard(part: Tensor) -> Tensor:
        return (readout @ part.transpose(0, 1).flatten(1)).T  # [N, 40]

    before = sum(parts())
    training.split_latents(codec, latents, readout)
    after = parts()
    torch.testing.assert_close(sum(after), before, atol=1e-3, rtol=1e-3)
    spread = torch.linalg.svdvals(heard(sum(after)) - heard(sum(after)).mean(dim=0))
    assert first.input_proj.weight[2:].eq(0).all()
    scores = torch.cat([first.input_proj(latents)[:, :2], rest.input_proj(latents)], dim=1)
    scores = scores.transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(scores)
    torch.testing.assert_close(correlation, torch.eye(10), atol=1e-3, rtol=0)
    deviation = scores.std(dim=1)
    torch.testing.assert_close(
        deviation / deviation[0], spread[:10] / spread[0], atol=1e-3, rtol=1e-3
    )


def test_the_first_quantizer_keeps_to_its_components_while_training(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    latents = torch.randn(4, 16, 64)
    training.split_latents(codec, latents, torch.randn(40, 16))
    training.fit_codebooks(codec, latents, 32)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    copied, latent, commitment = training.reconstruct(codec.train(), audio, quantise=True)
    (copied.square().mean() + latent.square().mean() + commitment).backward()
    first, rest = training.quantizers(codec)
    assert first.input_proj.weight.grad[:2].abs().max() > 0
    assert rest.input_proj.weight.grad.abs().amax(dim=(1, 2)).min() > 0
    assert first.input_proj.weight.grad[2:].eq(0).all()
    assert first.output_proj.weight.grad[:, 2:].eq(0).all()


def test_the_encoder_rests_while_the_decoder_goes_on(
    script: Any,
    train_on_cpu: Callable[..., Any],
    recipe: dict[str, Any],
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
    train_on_cpu(speech_of(script, tones(20)), tmp_path, module.Recipe(updates=20, **recipe))
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


def test_scaling_drives_the_encoders_activations_harder_and_nothing_else(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    audio = tones(2)[None, None, : 24 * STEP_SAMPLES]
    training.scale_convolutions(codec, audio)
    in_encoder = set(codec.encoder.modules())
    encoder: list[float] = []
    others: list[float] = []
    for module in codec.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            found = encoder if module in in_encoder else others
            module.register_forward_hook(lambda _m, _i, out, to=found: to.append(float(out.std())))
    with torch.no_grad():
        copied, latent, _ = training.reconstruct(codec, audio, quantise=False)
    assert encoder == pytest.approx([6] * (len(encoder) - 1) + [1], rel=1e-3)
    # the last one makes the sound; the sum of both quantisers' projections is the latent
    assert others[:-1] == pytest.approx([1] * (len(others) - 1), rel=1e-3)
    assert 0.5 < float(latent.std()) < 2
    assert others[-1] == pytest.approx(float(audio.std()), rel=1e-3)
    assert float(copied.std()) == pytest.approx(float(audio.std()), rel=0.2)


def test_readout_teaches_the_encoder_through_the_quantisers_without_the_decoder(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    training.fit_codebooks(codec.requires_grad_(False), torch.randn(4, 16, 64), 32)
    codec.train().requires_grad_(True)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    _, latent, _ = training.reconstruct(codec, audio, quantise=True)
    script("codec_losses").Readout(16, STEP_SAMPLES)(latent, audio).backward()
    for name, parameter in codec.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in codec.decoder.parameters())


def test_the_codecs_latents_are_at_50_hertz_and_its_transformers_see_four_seconds(
    script: Any,
) -> None:
    config = script("codec_training").CODEC_CONFIG
    codec = loaders.get_mimi(None, config, num_codebooks=8)
    assert codec.encoder_frame_rate == 50
    assert codec.frame_rate == 12.5
    assert config["transformer"]["context"] == 4 * codec.encoder_frame_rate


def test_reconstruct_quantised_equals_the_packages_own_forward(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    training.fit_codebooks(codec, torch.randn(4, 16, 64), 32)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    with torch.no_grad():
        copied, _, _ = training.reconstruct(codec, audio, quantise=True)
        torch.testing.assert_close(copied, codec(audio).x)


def test_pieces_are_drawn_where_it_is_loud_but_also_from_silence(script: Any) -> None:
    torch.manual_seed(0)
    audio = torch.zeros(400 * STEP_SAMPLES)
    audio[200 * STEP_SAMPLES :] = 0.5
    pieces = speech_of(script, audio).pieces(2000, 2)
    assert pieces.shape == (2000, 1, 2 * STEP_SAMPLES)
    silent = float((pieces.abs().amax(dim=(1, 2)) == 0).float().mean())
    assert 0.01 < silent < 0.15  # a floor of a tenth of the mean: 1 in 22
    assert float(pieces.max()) == 0.5


def test_detuned_pieces_are_the_same_sound_at_another_pitch(script: Any) -> None:
    torch.manual_seed(0)
    hertz, rate = 1000.0, 24_000
    time = torch.arange(200 * STEP_SAMPLES) / rate
    speech = speech_of(script, 0.5 * torch.sin(2 * torch.pi * hertz * time.double()).float())
    pieces = speech.pieces(64, 10, detune=0.2)
    spectrum = torch.fft.rfft(pieces[:, 0] * torch.hann_window(10 * STEP_SAMPLES)).abs()
    pitches = spectrum.argmax(dim=1) * rate / (10 * STEP_SAMPLES)
    plain = (pitches - hertz).abs() < 2
    assert 16 < int(plain.sum()) < 48
    assert pitches.min() > hertz * 0.8
    assert pitches.min() < hertz * 0.9 < 1.1 * hertz < pitches.max() < 1.25 * hertz
    # nothing but the tone: what is left is 16 bit and the interpolation
    tone = spectrum.square()
    near = tone.unfold(1, 9, 1).sum(dim=2).amax(dim=1)
    assert float((near / tone.sum(dim=1)).min()) > 1 - 1e-4


def test_training_lowers_the_distance_and_resumes_and_writes_what_moshi_loads(
    script: Any,
    config: dict[str, Any],
    train_on_cpu: Callable[..., Any],
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    train_codec, training = script("train_codec"), script("codec_training")
    losses, course = script("codec_losses"), script("codec_module").Recipe
    speech = speech_of(script, tones(20))
    recipe = recipe | {"peak_lr": 3e-3}

    def distance(codec: MimiModel) -> float:
        torch.manual_seed(1)
        audio = speech.pieces(8, 8)
        with torch.no_grad():
            codes = codec.eval().encode(audio)
            return float(losses.mel_distance(codec.decode(codes), audio))

    fresh = train_codec.build(config, speech, 0)
    training.fit_codebooks(fresh, torch.randn(4, 16, 64), 32)
    half = train_on_cpu(speech, tmp_path, course(updates=12, **recipe))
    assert half._updates == 12
    assert distance(half.averaged()) < distance(fresh)
    with pytest.raises(UserError, match="--resume"):
        train_on_cpu(speech, tmp_path, course(updates=24, **recipe))
    whole = train_on_cpu(speech, tmp_path, course(updates=24, **recipe), resume=True)
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
    recipe: dict[str, Any],
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

    speech, course = speech_of(script, tones(20)), module.Recipe(updates=8, **recipe)
    with monkeypatch.context() as patched:
        patched.setattr(module.CodecTraining, "_update", cut_off)
        with pytest.raises(CutOffError):
            train_on_cpu(speech, tmp_path, course)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert kept["course"]["updates"] == recipe["updates_per_epoch"]
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
    config: dict[str, Any],
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, replay = script("codec_module"), script("codec_replay")
    monkeypatch.setattr(module, "REPLACE_EVERY_UPDATES", 10)
    # 24 updates in each phase: every fourth is of long pieces, and the fourth of these is recorded;
    # an epoch ends, and is validated, every 5 updates
    recipe |= {"plain_share": 1 / 3, "decoder_share": 1 / 3}
    speech = tones(20)

    def train(name: str, updates: int = 72, *, resume: bool = False) -> Any:
        return script("train_codec").train(
            speech_of(script, speech),
            tmp_path / name,
            module.Recipe(updates=updates, **recipe),
            config=config,
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
    script: Any, train_on_cpu: Callable[..., Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    course = script("codec_module").Recipe(updates=2, **recipe)
    with pytest.raises(UserError, match=r"last\.ckpt does not exist"):
        train_on_cpu(speech_of(script, tones(20)), tmp_path, course, resume=True)
    with pytest.raises(UserError, match="add recordings"):
        train_on_cpu(speech_of(script, tones(1)), tmp_path, course)


def test_phrases_are_cut_at_pauses_of_one_speaker_only(script: Any) -> None:
    rows = [
        ["Hello,", [0.5, 0.9], "SPEAKER_MAIN"],
        ["there!", [1.0, 1.3], "SPEAKER_MAIN"],
        ["Yes.", [1.1, 1.4], "SPEAKER_USER"],
        ["It's", [1.8, 2.0], "SPEAKER_MAIN"],
        ["late", [9.9, 10.2], "SPEAKER_MAIN"],
    ]
    found = script("measure_codec").phrases(rows, "SPEAKER_MAIN", until_sec=10)
    assert [(p.text, p.start_sec, p.end_sec) for p in found] == [
        ("hello there", 0.5, 1.3),
        ("it's", 1.8, 2.0),
    ]


def test_word_errors_and_codebook_usage_count_over_everything(script: Any) -> None:
    measuring = script("measure_codec")

    def result(said: str, original: str, copied: str) -> Any:
        nothing = (np.zeros(1), np.zeros(1))
        return measuring.ChannelResult(
            [said], [original], [copied], np.zeros((1, 1)), 0, 0, 0, 0, (0, 0), 1, nothing
        )

    found = measuring.word_errors(
        [result("a b c", "a b c", "a x c"), result("d e f g h", "d e f g", "d e f")]
    )
    assert found["words"] == 8
    assert found["original"] == pytest.approx(1 / 8)
    assert found["copy"] == pytest.approx(3 / 8)
    assert found["ratio"] == pytest.approx(3)
    usage = measuring.codebook_usage(np.array([[0, 1, 2, 3], [5, 5, 5, 5]]), 8)
    assert usage == [{"used": 4, "bits": 2.0}, {"used": 1, "bits": 0.0}]


def test_decoding_in_pieces_equals_one_pass(
    script: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    script("codec_training").fit_codebooks(codec, torch.randn(4, 16, 64), 32)
    codes = torch.randint(16, (3, 180))
    measuring = script("measure_codec")
    pieces = measuring.decode_recording(codec, codes, piece_steps=70)
    whole = codec.decode(codes[None])[0, 0].detach()
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(measuring, "visible_past_steps", lambda *_: 1)
    short = measuring.decode_recording(codec, codes, piece_steps=70)
    assert (short - whole).abs().max() > 1e-3 * whole.abs().max(), "the past is not needed"


def test_measuring_without_a_recogniser_says_what_to_install(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measuring = script("measure_codec")
    monkeypatch.setattr("sys.argv", ["measure_codec.py", "m.jsonl", "--codec", str(tmp_path)])
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install pocketsphinx"):
        measuring.main()


def test_measured_copy_of_a_perfect_codec_has_no_distance(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = script("measure_codec")
    audio = tones(4)[: 48 * STEP_SAMPLES]
    soundfile.write(tmp_path / "a.wav", torch.stack([audio, audio], dim=1).numpy(), 24_000)
    row = [["hm", [0.6, 2.0], speaker] for speaker in measuring.SPEAKERS]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": row}))
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 3.84}))
    stored, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    monkeypatch.setattr(measuring, "recognise", lambda pieces: ["hm" for _ in pieces])
    monkeypatch.setattr(
        measuring, "decode_recording", lambda *_: torch.from_numpy(stored[:, 0].copy())
    )
    (job,) = measuring.choose_jobs(tmp_path / "m.jsonl", SCRIPTS.parent / "assets/tiny", 1, 60)
    found = measuring.summary([measuring.measure(job)], 512)["both"]
    assert found["mel_nats"] == 0
    assert found["si_sdr_db"] > 60
    assert found["envelope_correlation"] == pytest.approx(1)
