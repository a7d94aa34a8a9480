"""The tiny Moshi has learnt, and the bundled codes are those of its codec and its tokenizer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models import LMGen, MimiModel, loaders
from probe_words import KINDS
from torch import Tensor

from moshi_ttt.data import CodesFormat, EncodedRecording, read_recordings
from moshi_ttt.data.alignments import read_alignments
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codes import visible_past_steps
from moshi_ttt.data.codes_file import read_codes
from moshi_ttt.data.text import lay_text
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.teacher_forcing.nll import PositionNLL

DEMO, CONVERSATIONS = ASSETS / "demo", ASSETS / "conversations"
HELD_OUT = sorted((CONVERSATIONS / "heldout").glob("*.json"))
SPEECH_STEPS = 250  # 20 s
CLIP_STEPS = 250  # the 20 s that the language model was trained on


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    return open_source("tiny").codec()


@pytest.fixture(scope="module")
def demo_audio() -> Tensor:
    """The recording whose codes are bundled too, [2, samples]."""
    return read_audio(DEMO / "val-01.ogg", 24_000)


@pytest.fixture(scope="module")
def speech(codec: MimiModel, demo_audio: Tensor) -> Tensor:
    """Its first 20 s of Moshi's side, [1, 1, samples]."""
    return demo_audio[None, :1, : SPEECH_STEPS * codec.frame_size]


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[EncodedRecording]]:
    unused = Path("nothing is encoded")
    source = open_source("tiny")
    return {
        split: read_recordings(source, CONVERSATIONS / split / "manifest.jsonl", unused)
        for split in ("train", "heldout")
    }


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
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    files = {"moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_type"}
    sizes = {"dim", "text_card", "card", "num_heads", "num_layers", "context", "depformer_dim"}
    sizes |= {"depformer_dim_feedforward", "depformer_num_heads", "depformer_num_layers"}
    assert config.keys() == loaders._lm_kwargs.keys() | files
    assert {k for k, v in loaders._lm_kwargs.items() if config[k] != v} <= sizes


def test_tokenizer_reads_every_bundled_word_without_bytes() -> None:
    tokenizer = open_source("tiny").tokenizer()
    words = {
        word
        for path in [*DEMO.glob("*.json"), *HELD_OUT]
        for word, _, _ in json.loads(path.read_text())["alignments"]
    }
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
    assert codes.shape == (1, 8, SPEECH_STEPS)
    again = open_source("tiny").codec().encode(speech[..., : 60 * codec.frame_size])
    assert torch.equal(codes[..., :60], again)  # what comes later does not matter either
    silence = codec.encode(torch.zeros_like(speech))
    # half of it is the other side's, which may well sound like silence
    loud = speech.reshape(-1, codec.frame_size).square().mean(dim=1).sqrt() > 1e-2  # [steps]
    assert loud.sum() > 70
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


@torch.no_grad()
def test_bundled_codes_are_those_of_the_audio(codec: MimiModel, demo_audio: Tensor) -> None:
    codes = read_codes(DEMO / "val-01.npz", CodesFormat.of(open_source("tiny")))
    past = visible_past_steps(codec, codec.encoder_transformer)
    for channel, rows in enumerate((codes[1:9], codes[9:])):
        sound = demo_audio[channel][None, None]
        # begin and end of the recording; the end is encoded behind all that the codec can see
        begin = codec.encode(sound[..., : 100 * codec.frame_size])[0]
        first = codes.shape[-1] - past - 100
        end = codec.encode(sound[..., first * codec.frame_size :])[0, :, past:]
        found = torch.cat([begin, end], dim=1)
        # on other processors a few codes round to a neighbour
        same = found == torch.cat([rows[:, :100], rows[:, -100:]], dim=1)
        assert same.float().mean() > 0.995


def test_bundled_words_are_those_of_the_alignments(
    bundled: dict[str, list[EncodedRecording]],
) -> None:
    source = open_source("tiny")
    clock = source.clock
    for one in bundled["heldout"]:
        path = (CONVERSATIONS / "heldout" / one.name).with_suffix(".json")
        words = read_alignments(path, clock.seconds(one.steps), clock.step_sec).words
        row = lay_text(
            words or [],
            source.tokenizer(),
            one.steps,
            clock,
            padding_id=source.text_padding_id,
            end_of_padding_id=source.end_of_text_padding_id,
        )
        assert torch.equal(one.codes[0], row.tokens)


def test_every_recording_is_whole_and_uses_every_codebook(
    bundled: dict[str, list[EncodedRecording]],
) -> None:
    hours = sum(one.steps for one in bundled["train"]) * 0.08 / 3600
    assert hours > 1
    assert len(bundled["heldout"]) == 28
    for one in bundled["train"] + bundled["heldout"]:
        assert one.steps * 0.08 > 180
        assert one.codes.min() >= 0
        assert one.codes[1:].max() < 512
        assert all(len(level.unique()) > 100 for level in one.codes[1:])


def test_held_out_recordings_are_in_no_sense_trained_on(
    bundled: dict[str, list[EncodedRecording]],
) -> None:
    names = {split: {one.name for one in found} for split, found in bundled.items()}
    assert not names["train"] & names["heldout"]
    made_of = [
        str(np.load(CONVERSATIONS / split / name)["made_of"])
        for split, found in names.items()
        for name in found
    ]
    assert len(set(made_of)) == len(made_of)
    # templates and probes are common to both, longer stretches of talk are not
    train, held_out = (passages(bundled[split]) for split in ("train", "heldout"))
    assert len(held_out & train) < 0.02 * len(held_out)
    records = [json.loads(path.read_text()) for path in HELD_OUT]
    assert {record["split"] for record in records} == {"heldout"}
    # its voice is in no training recording (scripts/bundle/voices.py)
    assert sum("heart-deep" in record["voices"] for record in records) >= 8


def passages(recordings: list[EncodedRecording]) -> set[tuple[int, ...]]:
    """Every 16 consecutive tokens of words."""
    found = set()
    for one in recordings:
        tokens = [token for token in one.codes[0].tolist() if token not in (0, 3)]
        found |= {tuple(tokens[i : i + 16]) for i in range(len(tokens) - 15)}
    return found


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.stem)
def test_held_out_probes_point_at_the_planted_and_the_answered_words(path: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_text())
    words = {(word, *span, speaker) for word, span, speaker in record["alignments"]}
    assert len(record["probes"]) >= 5
    for probe in record["probes"]:
        said_by = dict.fromkeys(("echo", "answer"), probe["answered_by"])
        said_by["fact"] = probe["asked_by"]
        for part, speaker in said_by.items():
            assert all((word, *span, speaker) in words for word, span in probe[part])
        values = [[word for word, _ in probe[part]] for part in ("fact", "echo", "answer")]
        assert values[0] == values[2]
        assert values[1] in ([], values[0])
        assert len(values[0]) == KINDS[probe["kind"]].words
        mentions = [span for part in ("fact", "echo") for _, span in probe[part]]
        assert all(a[1] <= b[0] for a, b in pairwise(mentions))
        last_mention = mentions[-1][1]
        assert last_mention < probe["asked_at"] < probe["answer"][0][1][0]
        assert any(word[1] == probe["asked_at"] and word[3] == probe["asked_by"] for word in words)
        assert probe["gap_sec"] == pytest.approx(probe["asked_at"] - last_mention, abs=2e-3)


def test_held_out_probes_are_read_over_every_gap(
    bundled: dict[str, list[EncodedRecording]],
) -> None:
    probes = [probe for one in bundled["heldout"] for probe in one.probes]
    assert len(probes) > 100
    for low, high in pairwise((3, 8, 15, 30, 50, 75, 105, 150, 210, 300)):
        assert sum(low <= probe.gap_sec < high for probe in probes) >= 3, (low, high)
    # the tokens at an answer's steps are the answer's
    tokenizer = open_source("tiny").tokenizer()
    answers = {
        tokenizer.decode(one.codes[0, steps.start : steps.stop].tolist()).strip(".").lower()
        for one in bundled["heldout"]
        for probe in one.probes
        for steps in probe.answer_steps
        if probe.kind == "colour"
    }
    colours = {"red", "blue", "green", "yellow", "purple", "orange", "grey", "brown"}
    assert len(answers & colours) >= 6
    assert len(answers - colours) <= 2  # cut short by the next word


@torch.no_grad()
def test_the_language_model_has_learnt(bundled: dict[str, list[EncodedRecording]]) -> None:
    lm = open_source("tiny").lm()
    codes = torch.stack([one.codes[:, :CLIP_STEPS] for one in bundled["heldout"]])
    metric = PositionNLL(CLIP_STEPS, 1)
    metric.update(lm, lm(codes), codes)
    (text,), (first,) = (metric.record()[group] for group in ("text", "first_codebook"))
    # the best that anyone can do who knows how frequent each token is here, and nothing else
    best_unigram = [entropy(codes[:, row]) for row in (0, lm.audio_offset)]
    assert text < best_unigram[0] - 0.7
    assert first < best_unigram[1] - 1.0


def entropy(tokens: Tensor) -> float:
    """Of the frequencies of tokens, in nats."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return -torch.special.xlogy(share, share).sum().item()
