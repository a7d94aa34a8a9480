from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from moshi.models import LMGen, MimiModel, loaders
from torch import Tensor

from moshi_ttt.loading import open_source

ROOT = Path(__file__).resolve().parent.parent
DEMO, TINY = ROOT / "assets" / "demo", ROOT / "assets" / "tiny"
SAMPLE_RATE = 24_000
SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_USER")  # left, right


@dataclass(frozen=True, slots=True)
class Recording:
    path: Path
    audio: np.ndarray  # [samples, 2]
    alignments: list[tuple[str, tuple[float, float], str]]

    def words(self, channel: int) -> list[tuple[float, float]]:
        """Spans in seconds of one side's words."""
        return [span for _, span, speaker in self.alignments if speaker == SPEAKERS[channel]]


def entries(manifest: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DEMO / manifest).read_text().splitlines()]


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    found = []
    for entry in entries("train.jsonl") + entries("val.jsonl"):
        path = DEMO / str(entry["path"])
        audio, sample_rate = soundfile.read(path, dtype="float32")
        assert sample_rate == SAMPLE_RATE
        found.append(
            Recording(path, audio, json.loads(path.with_suffix(".json").read_text())["alignments"])
        )
    return found


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    return open_source("tiny").codec()


@pytest.fixture(scope="module")
def speech(recordings: list[Recording]) -> Tensor:
    """30 s of Moshi's side of the held-out recording, [1, 1, samples]."""
    return torch.from_numpy(recordings[-1].audio[: 30 * SAMPLE_RATE, 0].copy())[None, None]


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def test_bundles_stay_small() -> None:
    assert size_mb(DEMO) <= 6
    assert size_mb(TINY) <= 30  # ten million weights in bf16, and a codec


@pytest.mark.parametrize(("manifest", "least_sec"), [("train.jsonl", 170), ("val.jsonl", 185)])
def test_manifest_durations_match_the_files(manifest: str, least_sec: float) -> None:
    for entry in entries(manifest):
        info = soundfile.info(DEMO / str(entry["path"]))
        assert (info.samplerate, info.channels) == (SAMPLE_RATE, 2)
        assert entry["duration"] == pytest.approx(info.frames / info.samplerate)
        assert info.frames / info.samplerate >= least_sec


def test_validation_recordings_are_held_out() -> None:
    train, val = (
        {entry["path"] for entry in entries(f"{name}.jsonl")} for name in ("train", "val")
    )
    assert len(train) >= 4
    assert val
    assert not train & val


def test_alignments_are_sorted_and_inside_the_audio(recordings: list[Recording]) -> None:
    for recording in recordings:
        spans = [span for _, span, _ in recording.alignments]
        assert spans == sorted(spans)
        assert all(0 <= start < end <= len(recording.audio) / SAMPLE_RATE for start, end in spans)
        assert all(word and word == word.strip() for word, _, _ in recording.alignments)
        for channel in (0, 1):
            words = recording.words(channel)
            assert len(words) > 100
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(words)), (
                "a side talks over itself"
            )


def test_words_are_loud_and_long_gaps_are_quiet(recordings: list[Recording]) -> None:
    for recording in recordings:
        for channel in (0, 1):
            words = recording.words(channel)
            loud = [rms(recording, channel, start, end) for start, end in words]
            assert min(loud) > 3e-3, "a word without sound"
            gaps = [
                rms(recording, channel, a[1] + 0.1, b[0] - 0.1)
                for a, b in itertools.pairwise(words)
                if b[0] - a[1] > 0.5
            ]
            assert len(gaps) > 20
            assert max(gaps) < 1e-3, "sound where no word is"


def rms(recording: Recording, channel: int, start_sec: float, end_sec: float) -> float:
    first, last = round(start_sec * SAMPLE_RATE), round(end_sec * SAMPLE_RATE)
    return float(np.sqrt(np.square(recording.audio[first:last, channel]).mean()))


def test_no_shift_of_the_alignments_fits_the_sound_better(recordings: list[Recording]) -> None:
    def energy(recording: Recording, channel: int, shift_sec: float) -> float:
        squared = np.square(recording.audio[:, channel])
        spans = [
            (
                max(0, round((start + shift_sec) * SAMPLE_RATE)),
                round((end + shift_sec) * SAMPLE_RATE),
            )
            for start, end in recording.words(channel)
        ]
        return float(sum(squared[first:last].sum() for first, last in spans))

    for recording in recordings:
        for channel in (0, 1):
            shifted = {s: energy(recording, channel, s) for s in (-0.1, -0.05, 0.0, 0.05, 0.1)}
            assert max(shifted, key=lambda s: shifted[s]) == 0.0


def test_both_sides_sometimes_speak_at_once(recordings: list[Recording]) -> None:
    for recording in recordings:
        overlap_sec = sum(
            max(0.0, min(left[1], right[1]) - max(left[0], right[0]))
            for left in recording.words(0)
            for right in recording.words(1)
        )
        assert 0.5 < overlap_sec < 20


def test_tiny_bundle_loads_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(loaders, "hf_hub_download", refuse)
    source = open_source("tiny")
    lm, codec, tokenizer = source.lm(), source.codec(), source.tokenizer()
    assert (lm.n_q, lm.dep_q, lm.context) == (16, 8, 375)
    assert (codec.frame_size, codec.num_codebooks, codec.cardinality) == (1920, 8, lm.card)
    assert tokenizer.vocab_size() == lm.text_card
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, lm.text_padding_token_id)


def test_tiny_config_differs_from_moshis_only_in_size() -> None:
    config = json.loads((TINY / "config.json").read_text())
    files = {"moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_type"}
    sizes = {"dim", "text_card", "card", "num_heads", "num_layers", "context", "depformer_dim"}
    sizes |= {"depformer_dim_feedforward", "depformer_num_heads", "depformer_num_layers"}
    assert config.keys() == loaders._lm_kwargs.keys() | files
    assert {k for k, v in loaders._lm_kwargs.items() if config[k] != v} <= sizes


def test_tokenizer_reads_every_demo_word_without_bytes(recordings: list[Recording]) -> None:
    tokenizer = open_source("tiny").tokenizer()
    words = {word for recording in recordings for word, _, _ in recording.alignments}
    tokens = {word: tokenizer.encode(word) for word in words}
    assert all(tokenizer.decode(ids) == word for word, ids in tokens.items())
    assert not any(tokenizer.is_byte(i) for ids in tokens.values() for i in ids)
    assert np.mean([len(ids) for ids in tokens.values()]) < 3


def test_tiny_lm_activations_are_healthy_in_every_layer() -> None:
    lm = open_source("tiny").lm()
    rms_of_input: list[float] = []
    for layer in [*lm.transformer.layers, *lm.depformer.layers]:
        layer.register_forward_pre_hook(
            lambda _, inputs: rms_of_input.append(inputs[0].square().mean().sqrt().item())
        )
    # codes of no recording; ids that text and audio both have
    codes = torch.randint(
        min(lm.card, lm.text_card), (1, 17, 50), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        output = lm(codes)
    # the depformer runs once a codebook, or once for all of them
    assert len(rms_of_input) >= len(lm.transformer.layers) + len(lm.depformer.layers)
    # training makes streams grow with depth; a bound is for what bf16 or a lost layer would do
    assert all(0.01 < value < 50 for value in rms_of_input)
    assert output.text_logits[output.text_mask].std() < 20


def test_tiny_lm_generates_tokens_of_its_vocabulary() -> None:
    lm = open_source("tiny").lm()
    generator = LMGen(lm)
    torch.manual_seed(0)
    with torch.no_grad(), generator.streaming(1):
        outputs = [generator.step(torch.zeros(1, 8, 1, dtype=torch.long)) for _ in range(6)]
    tokens = torch.cat([output for output in outputs if output is not None], dim=2)
    assert tokens.shape == (1, 9, 5)  # one step late: the delays
    assert tokens.min() >= 0
    assert tokens[:, 0].max() < lm.text_card
    assert tokens[:, 1:].max() < lm.card


@torch.no_grad()
def test_encoding_is_repeatable_and_hears_speech(codec: MimiModel, speech: Tensor) -> None:
    codes = codec.encode(speech)
    assert codes.shape == (1, 8, 375)
    assert torch.equal(codes, open_source("tiny").codec().encode(speech))
    silence = codec.encode(torch.zeros_like(speech))
    # half of the 30 s is the other side's turn, which may well sound like silence
    loud = speech.reshape(-1, codec.frame_size).square().mean(dim=1).sqrt() > 1e-2  # [steps]
    assert loud.sum() > 100
    assert (codes != silence)[..., loud].float().mean() > 0.5
    assert all(len(level.unique()) > 32 for level in codes[0]), "a dead codebook"


@torch.no_grad()
def test_decoded_speech_follows_the_loudness_of_the_original(
    codec: MimiModel, speech: Tensor
) -> None:
    decoded = codec.decode(codec.encode(speech))
    assert decoded.shape == speech.shape
    envelopes = [
        x.reshape(-1, codec.frame_size).square().mean(dim=1).add(1e-8).log()
        for x in (decoded, speech)
    ]
    assert torch.corrcoef(torch.stack(envelopes))[0, 1] > 0.8
