from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fakes import FakeSource, write_manifest
from moshi.models import loaders
from moshi.models.compression import MimiModel

from moshi_ttt.data import RecordingReader, read_manifest, read_recordings
from moshi_ttt.data.cache import CodeCache
from moshi_ttt.data.codes import decode_recording, encode_recording
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    """Mimi's structure with a narrow encoder whose attention sees 10 positions (5 steps)."""
    torch.manual_seed(0)
    small = {"d_model": 16, "num_heads": 2, "num_layers": 2, "dim_feedforward": 32, "context": 10}
    ends = {"input_dimension": 16, "output_dimensions": [16], "layer_scale": 1.0}
    levels = {"dimension": 8, "n_q": 4, "bins": 64, "input_dimension": 16, "output_dimension": 16}
    config: dict[str, Any] = {
        **loaders._mimi_config,
        "seanet": {**loaders._seanet_kwargs, "dimension": 16, "n_filters": 2},
        "transformer": {**loaders._transformer_kwargs, **small, **ends},
        "quantizer": levels,
    }
    codec = loaders.get_mimi(None, config, num_codebooks=4).eval().double()
    # untrained codebooks are all zeros: take latents, then small residuals, as codewords
    with torch.no_grad():
        latent = codec.encode_to_latent(torch.randn(1, 1, 1920 * 64).double(), quantize=False)
        for quantizer in (codec.quantizer.rvq_first, codec.quantizer.rvq_rest):
            first, *rest = [layer._codebook for layer in quantizer.vq.layers]
            first.embedding_sum.copy_(quantizer.input_proj(latent)[0].T)
            for codebook in rest:
                codebook.embedding_sum.normal_(std=0.01)
    return codec


def test_pieces_give_the_codes_of_one_pass(codec: MimiModel) -> None:
    audio = torch.randn(2, 1920 * 160 - 700, dtype=torch.float64)
    whole = torch.cat([codec.encode(row[None, None])[0] for row in audio])
    assert whole.shape == (8, 160)
    assert whole.dtype == torch.int64
    assert all(row.unique().numel() > 8 for row in whole)
    # 2 layers x 9 positions = 9 steps, and 13 of the convolutions; too short a piece is doubled
    for max_piece_steps in (1, 45, 61, 159):
        torch.testing.assert_close(encode_recording(codec, audio, max_piece_steps), whole)


def test_the_past_behind_a_piece_is_needed(
    codec: MimiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = torch.randn(1, 1920 * 100, dtype=torch.float64)
    whole = encode_recording(codec, audio)
    monkeypatch.setattr("moshi_ttt.data.codes.visible_past_steps", lambda *_: 1)
    assert not torch.equal(encode_recording(codec, audio, 45), whole)


def test_pieces_give_the_sound_of_one_pass(codec: MimiModel) -> None:
    codes = torch.randint(0, 64, (4, 160), generator=torch.Generator().manual_seed(1))
    whole = codec.decode(codes[None])[0, 0].detach().float()
    assert whole.std() > 0
    assert whole.shape == (1920 * 160,)
    for max_piece_steps in (1, 45, 61, 159, 3000):
        sound = decode_recording(codec, codes, max_piece_steps)
        torch.testing.assert_close(sound, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))


@pytest.fixture
def audio_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.wav"
    path.write_bytes(b"the cache hashes bytes")
    return path


def test_codes_come_back_as_they_were(tmp_path: Path, audio_file: Path) -> None:
    codes = torch.randint(-1, 2048, (16, 9))
    cache = CodeCache(tmp_path / "cache", {"codec": "1"})
    assert cache.load(audio_file) is None
    cache.store(audio_file, codes)
    loaded = CodeCache(tmp_path / "cache", {"codec": "1"}).load(audio_file)
    assert loaded is not None
    torch.testing.assert_close(loaded, codes)


def test_other_audio_codecs_and_settings_have_other_codes(tmp_path: Path, audio_file: Path) -> None:
    paths = {
        CodeCache(tmp_path, {"codec": codec, "sample_rate": rate}).path(audio_file)
        for codec in ("1", "2")
        for rate in (24_000, 16_000)
    }
    audio_file.write_bytes(b"edited")
    paths.add(CodeCache(tmp_path, {"codec": "1", "sample_rate": 24_000}).path(audio_file))
    assert len(paths) == 5


def test_a_copy_under_another_name_has_the_same_codes(tmp_path: Path, audio_file: Path) -> None:
    copy = tmp_path / "b.wav"
    copy.write_bytes(audio_file.read_bytes())
    cache = CodeCache(tmp_path, {})
    assert cache.path(copy) == cache.path(audio_file)


def cut(content: bytes) -> bytes:
    return content[:-3]


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip_last_bit, lambda content: b""])
def test_a_damaged_file_counts_as_absent(
    tmp_path: Path, audio_file: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = CodeCache(tmp_path, {})
    cache.store(audio_file, torch.arange(32).view(16, 2))
    path = cache.path(audio_file)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load(audio_file) is None


def _store_many(folder: Path, audio_file: Path) -> None:
    for _ in range(50):
        CodeCache(folder, {}).store(audio_file, torch.arange(16_000).view(16, 1000))


def test_concurrent_writers_leave_a_whole_file_at_every_moment(
    tmp_path: Path, audio_file: Path
) -> None:
    cache = CodeCache(tmp_path / "cache", {})
    cache.store(audio_file, torch.arange(16_000).view(16, 1000))
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_store_many, args=(cache.folder, audio_file)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert cache.load(audio_file) is not None
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in cache.folder.iterdir()] == [cache.path(audio_file).name]


def test_audio_is_encoded_once_in_the_life_of_a_cache(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0, "b.wav": 2.0})
    entries, _ = read_manifest(manifest)
    first, second = FakeSource(), FakeSource()
    codes = RecordingReader(first, tmp_path / "cache").audio_codes([*entries, entries[0]])
    assert len(first.encoded) == len(set(first.encoded)) == 4  # two files of two channels
    again = RecordingReader(second, tmp_path / "cache").audio_codes([*entries, entries[0]])
    assert second.codecs == []
    for one, other in zip(codes, again, strict=True):
        torch.testing.assert_close(one, other)


def test_a_damaged_code_file_is_rebuilt(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0, "b.wav": 2.0})
    entries, _ = read_manifest(manifest)
    codes = RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(entries)
    damaged = next((tmp_path / "cache").iterdir())
    damaged.write_bytes(cut(damaged.read_bytes()))
    source = FakeSource()
    again = RecordingReader(source, tmp_path / "cache").audio_codes(entries)
    assert len(source.encoded) == 2
    for one, other in zip(codes, again, strict=True):
        torch.testing.assert_close(one, other)


def test_another_codec_encodes_again(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0})
    entries, _ = read_manifest(manifest)
    RecordingReader(FakeSource("codec-1"), tmp_path / "cache").audio_codes(entries)
    source = FakeSource("codec-2")
    RecordingReader(source, tmp_path / "cache").audio_codes(entries)
    assert len(source.encoded) == 2


def test_encoding_leaves_the_random_state_alone(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0})
    before = torch.get_rng_state()
    # a real codec: moshi draws random weights before it loads them
    source = open_source("tiny")
    RecordingReader(source, tmp_path / "cache").audio_codes(read_manifest(manifest)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_recordings_are_named_together_and_the_rest_is_kept(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0, "b.wav": 1.0, "c.wav": 1.0})
    for name in ("a.wav", "c.wav"):
        (tmp_path / name).write_text(f"{name} is spoilt")
    entries, _ = read_manifest(manifest)
    with pytest.raises(UserError, match=r"(?s)2 problem.*line 1: .*a\.wav.*line 3: .*c\.wav"):
        RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(entries)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_are_text_then_moshi_then_user(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0})
    entries, _ = read_manifest(manifest)
    source = FakeSource()
    (recording,) = RecordingReader(source, tmp_path / "cache").read(entries)
    (audio,) = RecordingReader(source, tmp_path / "cache").audio_codes(entries)
    assert recording.name == "a.wav"
    assert recording.codes.shape == (5, 13)  # 1 text + 2 x 2 codebooks; 1 s is 12.5 steps
    assert recording.codes.dtype == torch.int64
    torch.testing.assert_close(recording.codes[1:], audio)
    assert recording.codes[0].tolist() == [17, 14, 21, 21, 24, *[3] * 8]  # h e l l o
    left, right = source.encoded
    assert left != right


def test_recordings_of_a_manifest_are_those_of_its_entries(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0, "b.wav": 2.0})
    found = read_recordings(FakeSource(), manifest, tmp_path / "cache")
    expected = RecordingReader(FakeSource(), tmp_path / "other").read(read_manifest(manifest)[0])
    assert [one.name for one in found] == ["a.wav", "b.wav"]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.codes, other.codes)


def test_all_that_is_wrong_with_a_manifest_is_named_before_anything_is_encoded(
    tmp_path: Path,
) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0, "b.wav": 1.0, "c.wav": 1.0})
    (tmp_path / "a.wav").write_text("spoilt")
    (tmp_path / "b.json").write_text("{}")
    manifest.write_text(manifest.read_text() + "not json\n")
    source = FakeSource()
    with pytest.raises(UserError, match=r"(?s)m\.jsonl: 3 problem.*line 4.*line 1.*line 2"):
        read_recordings(source, manifest, tmp_path / "cache")
    assert source.codecs == []
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        read_recordings(source, tmp_path / "nowhere.jsonl", tmp_path / "cache")
