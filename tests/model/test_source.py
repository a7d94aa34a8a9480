"""Model sources, and the weights a training writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models.lm import LMModel
from safetensors.torch import load_file, save_file

from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import LoraConfig, ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.model.weights import check_start, load_trained, save_trained, start_from

TINY = ASSETS / "tiny"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", refuse)


def copy_of_tiny(folder: Path, **changes: object) -> Path:
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_local_folder_loads_like_the_bundle_and_never_asks_the_network(tmp_path: Path) -> None:
    folder = open_source(str(copy_of_tiny(tmp_path / "mine")))
    bundle = open_source("tiny")
    weights = folder.lm().state_dict()
    assert all(
        torch.equal(value, weights[name]) for name, value in bundle.lm().state_dict().items()
    )
    assert folder.codec_fingerprint == bundle.codec_fingerprint
    assert folder.clock == bundle.clock
    assert (folder.n_q, folder.dep_q, folder.text_padding_id) == (16, 8, 3)
    assert folder.tokenizer().encode("hello") == bundle.tokenizer().encode("hello")


def test_bundled_codes_are_only_for_models_that_can_read_them(tmp_path: Path) -> None:
    codes = ASSETS / "conversations" / "heldout" / "manifest.jsonl"
    assert bundled_held_out(open_source("tiny")) == codes
    assert bundled_held_out(open_source("moshi7b-random")) == codes
    other = copy_of_tiny(tmp_path / "other")
    weights = load_file(other / "mimi.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "mimi.safetensors")
    assert bundled_held_out(open_source(str(other))) == ASSETS / "demo" / "val.jsonl"


def test_context_override_reaches_temporal_attention_only() -> None:
    lm = open_source("tiny").lm(context_steps=20)
    assert lm.context == 20
    assert {layer.self_attn.context for layer in lm.transformer.layers} == {20}
    assert {layer.self_attn.context for layer in lm.depformer.layers} == {None}


def test_loading_draws_no_random_numbers() -> None:
    source = open_source("tiny")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    source.lm()
    source.codec()
    assert torch.equal(torch.rand(2), expected)


def test_random_7b_says_what_it_is_without_being_built() -> None:
    source = open_source("moshi7b-random")
    assert source.random_lm
    assert source.num_layers == 32
    assert source.clock.samples_per_step == 1920


@pytest.mark.parametrize("name", ["tinny", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_unknown_names_are_refused_with_the_ways_to_mend_them(name: str) -> None:
    with pytest.raises(UserError, match="neither `tiny`"):
        open_source(name)


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", offline)
    with pytest.raises(UserError, match=r"kyutai/moshiko.*local folder"):
        open_source("kyutai/moshiko-pytorch-bf16")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "mine")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is missing \(tokenizer_name"):
        open_source(str(folder))


def test_a_config_that_would_add_random_lora_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora=true"):
        open_source(str(copy_of_tiny(tmp_path / "mine", lora=True)))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "mine", moshi_name="model.pt")
    (folder / "model.pt").write_bytes(b"")
    with pytest.raises(UserError, match="pickles are not read"):
        open_source(str(folder))


def config(train: str, **more: object) -> ModelConfig:
    return ModelConfig(
        source="tiny",
        dtype="float32",
        context_steps=40,
        train=train,
        memory=MemoryConfig(projections="own", layers="last:1", heads=2, head_dim=8),
        lora=LoraConfig(rank=2, targets=("ffn",)),
        **more,
    )


@pytest.mark.parametrize(
    ("train", "groups"),
    [
        ("memory", {"memory", "gates"}),
        ("lora", {"rest"}),
        ("memory+lora", {"memory", "gates", "rest"}),
        ("base", {"rest"}),
        ("full", {"memory", "gates", "rest"}),
    ],
)
def test_what_trains_is_one_field_and_comes_back_from_its_file(
    train: str, groups: set[str], tmp_path: Path
) -> None:
    source = open_source("tiny")
    chosen = config(train)
    lm = build_lm(chosen, source)
    found = trainable_groups(lm)
    assert set(found) == groups
    assert all("lora_" in name for name in found.get("rest", {})) == (train not in ("base", "full"))
    assert bool(hybrid_layers(lm)) == (train not in ("lora", "base"))
    with torch.no_grad():
        for group in found.values():
            for parameter in group.values():
                parameter.add_(torch.randn_like(parameter))
    weights = {name: p.data for group in found.values() for name, p in group.items()}
    save_trained(tmp_path / "last.safetensors", weights, chosen, 188, source)
    loaded, _, again, trained_steps = load_trained(tmp_path / "last.ckpt")
    assert again == chosen
    assert trained_steps == 188
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in lm.state_dict().items())


def trained_file(path: Path, train: str, source: Any, **memory: Any) -> LMModel:
    """A file of weights that were moved by something, and the model that has them."""
    chosen = config(train)
    chosen = dataclasses.replace(chosen, memory=dataclasses.replace(chosen.memory, **memory))
    lm = build_lm(chosen, source)
    groups = trainable_groups(lm)
    with torch.no_grad():
        for group in groups.values():
            for parameter in group.values():
                parameter.add_(torch.randn_like(parameter))
    weights = {name: p.data for group in groups.values() for name, p in group.items()}
    save_trained(path, weights, chosen, 188, source)
    return lm


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    source, path = open_source("tiny"), tmp_path / "last.safetensors"
    old = trained_file(path, "memory", source)
    new = build_lm(config("memory+lora"), source)  # more trains than the file holds
    check_start(str(path), config("memory+lora"), source)
    start_from(new, str(path))
    state = new.state_dict()
    for name, value in old.state_dict().items():
        if ".branch." in name:
            assert torch.equal(value, state[name])


def test_tiny_means_the_memory_bundled_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("tiny")
    monkeypatch.setattr("moshi_ttt.model.weights.ASSETS", tmp_path)
    with pytest.raises(UserError, match=r"init_from=tiny: .*tiny/memory\.saf.* does not exist"):
        check_start("tiny", config("memory"), source)
    old = trained_file(tmp_path / "tiny/memory.safetensors", "memory", source)
    new = build_lm(config("memory"), source)
    check_start("tiny", config("memory"), source)
    start_from(new, "tiny")
    assert all(
        torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items()
    )
    with pytest.raises(UserError, match=r"init_from=tiny: .* another one .* null starts without"):
        check_start("tiny", config("memory"), open_source("moshi7b-random"))


def test_weights_that_do_not_fit_are_refused_by_name_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = open_source("tiny"), tmp_path / "last.safetensors"
    trained_file(path, "memory", source, heads=8)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"heads\\": 8', b'\\"heads\\": 4'))
    monkeypatch.setattr("moshi.models.loaders.CheckpointInfo.get_moshi", None)
    with pytest.raises(UserError, match=r"init_from=.*branch\..* is \[.* it is \["):
        check_start(str(path), config("memory"), source)
    with pytest.raises(UserError, match="nothing of that name trains"):
        check_start(str(path), config("lora"), source)
    with pytest.raises(UserError, match=r"does not fit its own config: .*branch\..* is \["):
        load_trained(path)


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    tiny, path = open_source("tiny"), tmp_path / "last.safetensors"
    copy = tmp_path / "copy"
    shutil.copytree(ASSETS / "tiny", copy)
    trained_file(path, "memory", tiny)
    chosen = config("memory")
    check_start(str(path), chosen, open_source(str(copy)))  # the same base, wherever it lies
    weights = load_file(copy / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"^init_from=.*last\.safetensors: .* another one"):
        check_start(str(path), chosen, open_source(str(copy)))


@pytest.mark.parametrize("train", ["base", "full"])
def test_training_base_weights_in_bf16_is_refused(train: Any) -> None:
    with pytest.raises(UserError, match=rf"^train={train}.*float32"):
        ModelConfig(source="tiny", dtype="bfloat16", context_steps=None, train=train)


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_trained(tmp_path / "nothing.ckpt")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_trained(tmp_path / "torn.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no moshi-ttt weights"):
        load_trained(tmp_path / "other.safetensors")
