from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from moshi.models import MimiModel, loaders
from torch import Tensor

from moshi_ttt.errors import UserError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STEP_SAMPLES = 1920


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of scripts/ by its name."""
    monkeypatch.syspath_prepend(SCRIPTS)
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
        "judged_steps": 2,
        "filters": 2,
        "codebook_batches": 4,
        "updates_per_epoch": 5,
        "plain_share": 0.3,
        "adversarial_from": 0.6,
    }


def tones(seconds: float, seed: int = 0) -> Tensor:
    """Something speech-like: gliding harmonics that come and go, [samples]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * 24_000)) / 24_000
    pitch = 150 + 40 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 24_000
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    gate = (np.sin(2 * np.pi * 0.9 * time) > 0) * 0.1
    return torch.tensor(voice * gate + 1e-3 * rng.normal(size=len(time)), dtype=torch.float32)


def speech_of(script: Any, audio: Tensor) -> Any:
    return script("codec_speech").Speech((audio * 2**15).short(), STEP_SAMPLES)


def slow_mel_distance(a: np.ndarray, b: np.ndarray, fft_size: int, filters: int) -> float:
    """One resolution of the distance, frame by frame and filter by filter."""

    def log_mel(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, fft_size // 2, mode="reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft_size) / fft_size)
        top = 2595 * math.log10(1 + 12_000 / 700)
        edges = [700 * (10 ** (top * i / (filters + 1) / 2595) - 1) for i in range(filters + 2)]
        rows = []
        for start in range(0, len(padded) - fft_size + 1, fft_size // 4):
            frame = np.fft.rfft(padded[start : start + fft_size] * window)
            magnitude = np.abs(frame) / math.sqrt(fft_size)
            row = []
            for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
                weights = [
                    max(0.0, min((f - low) / (middle - low), (high - f) / (high - middle)))
                    for f in np.linspace(0, 12_000, fft_size // 2 + 1)
                ]
                value = np.dot(weights, magnitude) / max(sum(weights), 1e-3)
                row.append(math.log(value + 1e-3))
            rows.append(row)
        return np.array(rows)

    return float(np.abs(log_mel(a) - log_mel(b)).mean())


def test_mel_distance_equals_a_slow_reference(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = script("codec_losses")
    monkeypatch.setattr(losses, "FFT_SIZES", (256,))
    monkeypatch.setattr(losses, "_MELS", (24,))
    a, b = tones(0.1, 0), tones(0.1, 1) * 0.5
    measured = float(losses.mel_distance(a[None, None], b[None, None]))
    assert measured == pytest.approx(slow_mel_distance(a.numpy(), b.numpy(), 256, 24), rel=1e-3)


def test_spectral_distances_of_equal_sounds_are_zero_and_finite_in_silence(script: Any) -> None:
    losses = script("codec_losses")
    sound = tones(0.5)[None, None]
    assert [float(d) for d in losses.spectral_distances(sound, sound)] == [0, 0]
    silence = torch.zeros(1, 1, 9600, requires_grad=True)
    sum(losses.spectral_distances(silence, sound[..., :9600])).backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


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


def test_scaling_gives_every_convolution_unit_variance(script: Any, config: dict[str, Any]) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    audio = tones(2)[None, None, : 24 * STEP_SAMPLES]
    training.scale_to_unit_variance(codec, audio)
    deviations = []
    for module in codec.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            module.register_forward_hook(lambda _m, _i, out: deviations.append(float(out.std())))
    with torch.no_grad():
        copied, _ = training.reconstruct(codec, audio, quantise=False)
    assert deviations[:-1] == pytest.approx([1] * len(deviations[:-1]), rel=1e-3)
    assert float(copied.std()) == pytest.approx(float(audio.std()), rel=0.2)


def test_reconstruct_quantised_equals_the_packages_own_forward(
    script: Any, config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, config, num_codebooks=3)
    training.fit_codebooks(codec, torch.randn(4, 16, 64), 32)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    with torch.no_grad():
        copied, _ = training.reconstruct(codec, audio, quantise=True)
        torch.testing.assert_close(copied, codec(audio).x)


def test_balanced_gradients_do_not_depend_on_the_scale_of_a_loss(script: Any) -> None:
    losses = script("codec_losses")
    output = torch.randn(100, requires_grad=True)

    def combined(factor: float) -> Tensor:
        balance = losses.GradientBalance({"a": 1.0, "b": 2.0})
        values = {"a": output.square().mean(), "b": factor * output.abs().mean()}
        return balance(values, output)

    torch.testing.assert_close(combined(1), combined(1000))
    (own,) = torch.autograd.grad(output.square().mean(), output)
    (other,) = torch.autograd.grad(output.abs().mean(), output)
    expected = own + 2 * own.norm() / other.norm() * other
    torch.testing.assert_close(combined(1), expected)


def test_pieces_are_drawn_where_it_is_loud_but_also_from_silence(script: Any) -> None:
    torch.manual_seed(0)
    audio = torch.zeros(400 * STEP_SAMPLES)
    audio[200 * STEP_SAMPLES :] = 0.5
    pieces = speech_of(script, audio).pieces(2000, 2)
    assert pieces.shape == (2000, 1, 2 * STEP_SAMPLES)
    silent = float((pieces.abs().amax(dim=(1, 2)) == 0).float().mean())
    assert 0.01 < silent < 0.15  # a floor of a tenth of the mean: 1 in 22
    assert float(pieces.max()) == 0.5


@pytest.mark.parametrize("adversarial", [False, True])
def test_training_lowers_the_distance_and_resumes_and_writes_what_moshi_loads(
    script: Any, config: dict[str, Any], recipe: dict[str, Any], tmp_path: Path, adversarial: bool
) -> None:
    train_codec, training = script("train_codec"), script("codec_training")
    losses, course = script("codec_losses"), script("codec_module").Recipe
    speech = speech_of(script, tones(20))
    settings: dict[str, Any] = {"config": config, "device": "cpu", "progress_bar": False}
    recipe = recipe | {"adversarial": adversarial, "peak_lr": 3e-3}

    def distance(codec: MimiModel) -> float:
        torch.manual_seed(1)
        audio = speech.pieces(8, 8)
        with torch.no_grad():
            codes = codec.eval().encode(audio)
            return float(losses.mel_distance(codec.decode(codes), audio))

    fresh = train_codec.build(config, speech, 0)
    training.fit_codebooks(fresh, torch.randn(4, 16, 64), 32)
    half = train_codec.train(speech, tmp_path, course(updates=12, **recipe), **settings)
    assert half._updates == 12
    assert distance(half.averaged()) < distance(fresh)
    with pytest.raises(UserError, match="--resume"):
        train_codec.train(speech, tmp_path, course(updates=24, **recipe), **settings)
    whole = train_codec.train(
        speech,
        tmp_path,
        course(updates=24, **recipe),
        **settings,
        resume=True,
    )
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


def test_resuming_nothing_and_too_little_speech_are_refused(
    script: Any, config: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    train_codec = script("train_codec")
    course = script("codec_module").Recipe(updates=2, **recipe)
    settings: dict[str, Any] = {"config": config, "device": "cpu", "progress_bar": False}
    with pytest.raises(UserError, match=r"last\.ckpt does not exist"):
        train_codec.train(speech_of(script, tones(20)), tmp_path, course, resume=True, **settings)
    with pytest.raises(UserError, match="add recordings"):
        train_codec.train(speech_of(script, tones(1)), tmp_path, course, **settings)


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
