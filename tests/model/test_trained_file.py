"""Trained weights that somebody else altered or moved: one line, and nothing is fetched unasked."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import LoraConfig, ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.model.subject import open_subject
from moshi_ttt.model.trained_file import read_trained
from moshi_ttt.model.weights import load_trained, save_trained

Change = Callable[[dict[str, Any]], object]
GATE = "transformer.layers.5.branch.gate"
CONFIG = ModelConfig(
    source="tiny",
    dtype="float32",
    context_steps=20,
    train="memory",
    memory=MemoryConfig(projections="own", layers=[5], heads=2, head_dim=8),
    lora=LoraConfig(targets=("ffn",)),
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", refuse)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source("tiny")
    groups = trainable_groups(build_lm(CONFIG, source))
    path = tmp_path_factory.mktemp("run") / "last.safetensors"
    weights = {name: one for group in groups.values() for name, one in group.items()}
    save_trained(path, weights, CONFIG, trained_steps=25, source=source)
    return path


@pytest.fixture
def altered(written: Path, tmp_path: Path) -> Callable[..., Path]:
    """Such a file after a change to its weights, its metadata or the config in that."""

    def alter(weights: Change = len, metadata: Change = len, config: Change = len) -> Path:
        path = tmp_path / "altered.safetensors"
        tensors = load_file(written)
        with safe_open(written, "pt") as file:
            said = file.metadata()
        values = json.loads(said["config"])
        config(values)
        said["config"] = json.dumps(values)
        weights(tensors)
        metadata(said)
        save_file(tensors, path, said)
        return path

    return alter


def refused(path: Path, *parts: str, base: str | None = None) -> None:
    with pytest.raises(UserError) as error:
        load_trained(path, base=base)
    assert "\n" not in str(error.value)
    for part in (str(path), *parts):
        assert part in str(error.value)


def test_what_is_written_is_read_with_lists_and_tuples_as_they_were(written: Path) -> None:
    file = read_trained(written)
    assert file.config == CONFIG
    assert (file.trained_steps, file.base) == (25, open_source("tiny").base_fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update({GATE: torch.zeros(3)}), "[3] float32 there, and it is [256]"),
        (lambda one: one.update({GATE: one[GATE].bfloat16()}), "[256] bfloat16 there, and it is"),
        (lambda one: one.update({GATE: one[GATE].int()}), "[256] int32 there, and it is"),
        (lambda one: one.update(other=torch.zeros(1)), "nothing of that name trains here"),
        (lambda one: one.pop(GATE), f"{GATE}, which is [256] float32 here, is missing there"),
        (lambda one: one[GATE].fill_(torch.nan), f"{GATE} is not finite"),
    ],
)
def test_weights_that_do_not_fit_their_own_config_are_named(
    altered: Callable[..., Path], change: Change, message: str
) -> None:
    refused(altered(weights=change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update(format="moshi-ttt 2"), "format 'moshi-ttt 2', and this version"),
        (lambda one: one.update(format="pt"), "holds no moshi-ttt weights"),
        (lambda one: one.update(config="{"), "what no version writes"),
        (lambda one: one.update(config="[" * 100_000), "what no version writes"),
        (lambda one: one.update(config="[]"), "[] is no ModelConfig"),
        (lambda one: one.pop("config"), "KeyError: 'config'"),
        (lambda one: one.update(trained_steps="many"), "what no version writes"),
        (lambda one: one.update(trained_steps="0"), "trained_steps=0"),
        (lambda one: one.update(base="0" * 64), "was trained on the base tiny (000000000000)"),
    ],
)
def test_metadata_of_no_version_is_refused(
    altered: Callable[..., Path], change: Change, message: str
) -> None:
    refused(altered(metadata=change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update(dtype="float128"), "dtype='float128'"),
        (lambda one: one.update(train="all"), "train='all'"),
        (lambda one: one.update(other=1), "other=1"),
        (lambda one: one.update(memory=None), "None is no MemoryConfig"),
        (lambda one: one.pop("source"), "missing 1 required"),
        (lambda one: one["memory"].update(heads="four"), "heads='four'"),
        (lambda one: one["memory"].update(heads=True), "heads=True"),
        (lambda one: one["memory"].update(layers={"a": 1}), "layers={'a': 1}"),
        (lambda one: one["memory"].update(forgetting_time_steps=[1]), "forgetting_time_steps=(1,)"),
        (lambda one: one["memory"].update(head_dim=10**6), "model.memory.head_dim=1000000 is not"),
        (lambda one: one["memory"].update(heads=0), "model.memory.heads=0 must be at least 1"),
        (lambda one: one["lora"].update(targets="ffn"), "targets='ffn'"),
    ],
)
def test_configs_of_no_version_are_refused_by_field(
    altered: Callable[..., Path], change: Change, message: str
) -> None:
    refused(altered(config=change), message)


@pytest.mark.parametrize("name", ["a-stranger/model", "/gone/moshi", "../../moshi", "a:b/c"])
def test_a_base_that_is_not_here_is_asked_for_and_never_fetched(
    altered: Callable[..., Path], name: str
) -> None:
    path = altered(config=lambda one: one.update(source=name))
    refused(path, f"was trained on {name!r}", "give --base FOLDER", "--base OWNER/NAME to fetch it")


def test_a_base_that_was_fetched_before_is_taken_from_where_it_lies(
    altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(name: str, file: str) -> str | None:
        return str(ASSETS / "tiny/config.json") if file == "config.json" else None

    monkeypatch.setattr("moshi_ttt.model.hub.try_to_load_from_cache", cached)
    path = altered(config=lambda one: one.update(source="kyutai/tiny"))
    assert load_trained(path)[1].name == "kyutai/tiny"


def test_a_base_that_was_moved_is_given_and_must_be_the_same(
    altered: Callable[..., Path], tmp_path: Path
) -> None:
    path = altered(config=lambda one: one.update(source="/gone/moshi"))
    moved = tmp_path / "moved"
    shutil.copytree(ASSETS / "tiny", moved)
    assert open_subject(path, "cpu", base=str(moved)).source.name == str(moved)
    weights = load_file(moved / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, moved / "model.safetensors")
    refused(path, f"{moved} is another one", base=str(moved))
    with pytest.raises(UserError, match=r"^--base='nope' is neither"):
        load_trained(path, base="nope")
    with pytest.raises(UserError, match="--base=tiny goes with --checkpoint"):
        open_subject("tiny", "cpu", base="tiny")


@pytest.mark.parametrize("script", ["evaluate", "attribute_jump", "measure_context"])
def test_the_programs_take_a_base(script: str, altered: Callable[..., Path]) -> None:
    main = importlib.import_module(script).main
    path = altered(config=lambda one: one.update(source="/gone/moshi"))
    with pytest.raises(UserError, match="give --base FOLDER"):
        main([f"--checkpoint={path}", "--device=cpu"])
    with pytest.raises(UserError, match=r"^--base='nope' is neither"):
        main([f"--checkpoint={path}", "--device=cpu", "--base=nope"])
