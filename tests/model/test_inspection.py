"""A model folder that cannot be used is refused in one line, before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from moshi_ttt.errors import UserError
from moshi_ttt.model.inspection import check_config
from moshi_ttt.model.source import ASSETS, open_source

TINY = ASSETS / "tiny"
CONFIG = json.loads((TINY / "config.json").read_text())
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15375963752\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle's files; whoever loads more than a header fails."""
    for path in TINY.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded, or the network was asked")

    monkeypatch.setattr("moshi.models.loaders.load_file", refuse)
    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", refuse)
    return tmp_path


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def half(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


@pytest.mark.parametrize("name", ["model.safetensors", "mimi.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: POINTER, "is a Git LFS pointer, not the weights; fetch them with `git lfs"),
        (half, "is not a whole safetensors file"),
        (lambda path: path.read_bytes() + b"more", "is not a whole safetensors file"),
        (lambda path: b"", "is not a whole safetensors file"),
        (lambda path: b"PK\x03\x04 a pickle", "is not a whole safetensors file"),
        (lambda path: b"\xff" * 4096, "is not a whole safetensors file"),
    ],
)
def test_weights_that_are_not_there_are_refused_by_their_header(
    folder: Path, name: str, content: Callable[[Path], bytes], message: str
) -> None:
    replace(folder / name, content(folder / name))
    refused(folder, str(folder / name), message)


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("out_norm.alpha"), "lacks weights for"),
        (lambda one: one.update(other=torch.zeros(2)), "has too many weights for"),
        (
            lambda one: one.update({"text_emb.weight": torch.zeros(5, 256)}),
            "size mismatch for text_emb.weight",
        ),
        (
            lambda one: one.update({"text_emb.weight": torch.zeros(1001, 256, dtype=torch.int8)}),
            "text_emb.weight is no float16, bfloat16, float32 or float64; quantized weights",
        ),
    ],
)
def test_weights_of_another_model_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    altered(folder, change)
    refused(folder, str(folder / "model.safetensors"), message)


def configure(folder: Path, name: str = "config.json", **changes: Any) -> None:
    config = json.loads((folder / name).read_text()) | changes
    replace(folder / name, json.dumps(config).encode())


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"dim": 10**9}, ["dim=1e+09 must be at most 1e+06"]),
        ({"num_layers": 10**6}, ["num_layers=1e+06 must be at most 256"]),
        ({"context": 10**9}, ["context=1e+09 must be at most"]),
        ({"delays": [10**5] * 17}, ["delays=100000 must be at most"]),
        ({"hidden_scale": float("nan")}, ["hidden_scale=nan must be"]),
        ({"dim": 512}, ["model.safetensors does not fit", "size mismatch"]),
        ({"num_layers": 7}, ["lacks weights"]),
        ({"num_layers": 5}, ["has too many weights"]),
        ({"num_heads": 3}, ["num_heads=3 must divide dim=256"]),
        ({"gating": "other"}, ["describes no model that moshi builds"]),
        ({"dim": "256"}, ["dim is '256'; it must be a whole number above 0"]),
        ({"context": None}, ["context is None"]),
        ({"delays": [0, 1]}, ["describes no model that moshi builds", "17 delays"]),
        ({"ttt_layers": [1]}, ["describes no model", "unexpected keyword argument 'ttt_layers'"]),
        ({"existing_text_padding_id": 5000}, ["existing_text_padding_id=5000", "0..999"]),
        ({"quantize": True}, ["quantize", "take the bf16 checkpoint"]),
        ({"conditioners": {"a": {"type": "lut"}}}, ["conditioners", "take a Moshi without"]),
        ({"cross_attention": True}, ["cross_attention", "take a Moshi without"]),
        ({"model_type": "hibiki"}, ["model_type='hibiki' is no Moshi"]),
        ({"model_type": "personaplex"}, ["model_type='personaplex' is no Moshi"]),
        ({"dep_q": 16}, ["n_q=16 and dep_q=16", "n_q = 2 dep_q"]),
        ({"n_q": 32, "dep_q": 0}, ["dep_q is 0"]),
        ({"card": 256, "text_card": 1000}, ["does not fit"]),
        ({"lora": True}, ["says lora=true but names no lora weights"]),
        ({"moshi_name": "../../etc/passwd"}, ["moshi_name='../../etc/passwd'", "inside the"]),
        ({"tokenizer_name": "/etc/passwd"}, ["tokenizer_name='/etc/passwd'", "inside the"]),
        ({"mimi_name": "file:///etc/passwd"}, ["mimi_name=", "inside the"]),
        ({"mimi_name": "hf://some/body/mimi.safetensors"}, ["mimi_name=", "inside the"]),
        ({"moshi_name": 7}, ["moshi_name=7", "inside the"]),
    ],
)
def test_configs_of_no_moshi_are_refused_by_key(
    folder: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    configure(folder, **changes)
    refused(folder, str(folder), *messages)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"sample_rate": 10**12}, ["mimi_config.json: sample_rate=1e+12 must be at most"]),
        ({"quantizer": {"n_q": 4}}, ["the codec's config describes no model"]),
        ({"seanet": None}, ["the codec's config describes no model"]),
    ],
)
def test_configs_of_no_codec_are_refused(
    folder: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    configure(folder, "mimi_config.json", **changes)
    refused(folder, *messages)


@pytest.mark.parametrize("name", ["config.json", "mimi_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list where a config is a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (1 << 20) + b"{}", "is larger than 1 MiB"),
    ],
)
def test_configs_that_are_no_json_object_are_refused(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    replace(folder / name, content)
    refused(folder, str(folder / name), message)


@pytest.mark.parametrize("key", ["dim", "n_q", "dep_q", "num_layers", "card", "text_card"])
def test_a_key_that_is_missing_is_named(folder: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    replace(folder / "config.json", json.dumps(config).encode())
    refused(folder, str(folder / "config.json"), f"{key} is missing")


def test_an_empty_config_is_no_first_release(folder: Path) -> None:
    replace(folder / "config.json", b"{}")
    refused(folder, str(folder / "config.json"), "dim is missing")


def test_a_tokenizer_that_is_none_is_refused(folder: Path) -> None:
    replace(folder / "tokenizer.model", POINTER)
    refused(folder, str(folder / "tokenizer.model"), "is no sentencepiece model")


@pytest.mark.parametrize("name", ["model.safetensors", "mimi.safetensors"])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    weights = load_file(folder / name)
    hurt = list(weights)[3]
    weights[hurt].view(-1)[0] = float("nan")
    (folder / name).unlink()
    save_file(weights, folder / name)
    source = open_source(str(folder))
    with pytest.raises(UserError, match=rf"is not finite; .*{name} is damaged"):
        source.lm() if name == "model.safetensors" else source.codec()


def test_the_released_moshi_is_a_moshi(tmp_path: Path) -> None:
    check_config(dict(loaders._lm_kwargs), tmp_path / "config.json")


def test_what_the_hub_has_of_another_kind_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(repository: str, name: str, **more: Any) -> str:
        fetched.append(name)
        (tmp_path / name).write_text(json.dumps(CONFIG | {"model_type": "hibiki"}))
        return str(tmp_path / name)

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", fetch)
    with pytest.raises(UserError, match="model_type='hibiki'"):
        open_source("kyutai/hibiki-1b-pytorch-bf16")
    assert fetched == ["config.json"]
