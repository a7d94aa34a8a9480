"""A model to examine is opened in one way, whatever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, build_lm
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.rings import attention_of
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.model.subject import open_subject, short_name
from moshi_ttt.model.weights import save_trained, trainable_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    memory = MemoryConfig(layers="last:1")
    config = ModelConfig(
        source="tiny", dtype="float32", context_steps=20, train="memory", memory=memory
    )
    source = open_source("tiny")
    path = tmp_path_factory.mktemp("runs") / "long60s/000/checkpoints/best.safetensors"
    path.parent.mkdir(parents=True)
    weights = trainable_weights(build_lm(config, source))
    save_trained(path, weights, config, trained_steps=25, source=source)
    return path


@pytest.mark.parametrize("name", ["tiny", str(ASSETS / "tiny")])
def test_a_source_is_opened_as_it_is(name: str) -> None:
    subject = open_subject(name, "cpu", dtype="bfloat16", context_steps=12)
    assert subject.lm.context == 12
    assert subject.lm.dtype == torch.bfloat16
    assert subject.trained_steps == 250  # 20 s, whatever the way to it
    assert subject.label == f"{name} (vanilla, C = 12 steps)"
    assert short_name(name) == "tiny"
    assert not hybrid_layers(subject.lm)


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_is_opened_by_either_of_its_files(
    checkpoint: Path, suffix: str, kind: type[str] | type[Path]
) -> None:
    name = kind(checkpoint.with_suffix(suffix))
    subject = open_subject(name, "cpu")
    assert subject.lm.context == 20
    assert subject.trained_steps == 25
    assert subject.label == "long60s/000 best"
    assert short_name(name) == "long60s-000-best"
    assert list(hybrid_layers(subject.lm)) == [5]


def test_a_checkpoint_may_be_looked_at_with_another_window(checkpoint: Path) -> None:
    subject = open_subject(checkpoint, "cpu", context_steps=12)
    assert subject.lm.context == 12
    assert subject.label == "long60s/000 best, C = 12 steps"
    with pytest.raises(UserError, match=r"^--context_steps=1 must be at least 2"):
        open_subject(checkpoint, "cpu", context_steps=1)


def test_a_model_may_be_looked_at_with_sinks_and_another_inner_rate(checkpoint: Path) -> None:
    subject = open_subject(checkpoint, "cpu", sinks=3, inner_rate=0.5)
    assert subject.label == "long60s/000 best, 3 sinks, inner rate x 0.5"
    assert all(attention_of(layer).sinks == 3 for layer in subject.lm.transformer.layers)  # type: ignore[attr-defined]
    assert [one.branch.rule.rate for one in hybrid_layers(subject.lm).values()] == [0.5]
    subject = open_subject(checkpoint, "cpu", thinning=2, farthest_steps=19)
    words = "older keys halved x 2, keys seem at most 19 steps away"
    assert subject.label == f"long60s/000 best, {words}"
    attention = attention_of(subject.lm.transformer.layers[0])
    assert (attention.sinks, attention.thinning, attention.farthest_steps) == (0, 2, 19)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--thinning=11 must be at least 0 and at most 10"):
        open_subject(checkpoint, "cpu", thinning=11)
    with pytest.raises(UserError, match="--farthest_steps=0"):
        open_subject(checkpoint, "cpu", farthest_steps=0)
    assert open_subject("tiny", "cpu", sinks=1).label == "tiny (vanilla, 1 sinks)"
    with pytest.raises(UserError, match="--sinks=20 must be at least 0 and at most 19"):
        open_subject(checkpoint, "cpu", sinks=20)
    with pytest.raises(UserError, match="no memory"):
        open_subject("tiny", "cpu", inner_rate=0)


def test_the_type_of_a_checkpoint_cannot_be_chosen(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="--dtype goes with --model"):
        open_subject(checkpoint, "cpu", dtype="float32")
