"""What a training leaves in the bundle's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from make_tiny import build_lm as build_untrained
from make_tiny import finish, lm_config

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, Trained, build_lm
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.model.trained_file import read_trained
from moshi_ttt.model.weights import load_trained, save_trained, trainable_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "tiny"
    shutil.copytree(ASSETS / "tiny", path)
    return path


def trained(folder: Path, path: Path, train: Trained) -> dict[str, torch.nn.Parameter]:
    """Weights of a run upon `folder`, as they are saved."""
    source = open_source(str(folder))
    memory = MemoryConfig(layers="last:1", gate_init=0.3)
    config = ModelConfig(
        source=str(folder), dtype="float32", context_steps=20, train=train, memory=memory
    )
    weights = trainable_weights(build_lm(config, source))
    save_trained(path, weights, config, trained_steps=25, source=source)
    return weights


@pytest.mark.parametrize("train", ["memory", "memory+lora"])
def test_a_memory_lies_beside_its_base_and_is_that_of_the_bundled_model(
    train: Trained, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "last.safetensors"
    weights = trained(folder, path, train)
    finish(folder, path)
    left = read_trained(folder / "memory.safetensors")
    assert left.config.source == "tiny"
    found = left.weights("cpu")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], one.half()) for name, one in weights.items())
    # wherever the folder was made: its base is the bundled one, by its content
    _, source, config, trained_steps = load_trained(folder / "memory.safetensors")
    assert (source.name, config.context_steps, trained_steps) == ("tiny", 20, 25)


def test_what_is_neither_a_base_nor_a_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    trained(folder, path, "lora")
    with pytest.raises(UserError, match=r"model\.train=lora; use base, memory or"):
        finish(folder, path)


def test_another_shape_begins_with_activations_of_order_one() -> None:
    lm = build_untrained(seed=0, config=lm_config(dim=128, layers=3, norm="layer_norm_f32"))
    assert (lm.dim, len(lm.transformer.layers)) == (128, 3)
    assert type(lm.transformer.layers[0].norm1).__name__ == "LayerNormF32"
    codes = torch.randint(0, lm.card, (2, lm.num_codebooks, 40))
    output = lm(codes)
    valid = output.logits[output.mask]
    assert 0.3 < valid.std() < 3
    with pytest.raises(UserError, match=r"--dim=100 makes no heads of 64 channels"):
        lm_config(dim=100)
