"""A codec far too small to be useful, how it is trained, and conversations nobody speaks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from conversation_fakes import MODULES, SPLITS, make_plan


@pytest.fixture
def script() -> Any:
    """Imports a file of scripts/ by its name."""
    return importlib.import_module


@pytest.fixture
def codec_config(script: Any) -> dict[str, Any]:
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
def short_recipe() -> dict[str, Any]:
    return {
        "rows": 4,
        "piece_steps": 4,
        "codebook_batches": 4,
        "updates_per_epoch": 5,
        "plain_share": 0.3,
        "decoder_share": 0.3,
    }


@pytest.fixture
def train_on_cpu(script: Any, codec_config: dict[str, Any]) -> Callable[..., Any]:
    """`train_codec.train` of the small codec."""
    train = script("train_codec").train
    return partial(train, config=codec_config, device="cpu", progress_bar=False)


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module")
def plans(scripts: dict[str, ModuleType]) -> dict[str, list[Any]]:
    return {s: [make_plan(scripts, s, seed) for seed in range(4, 13)] for s in SPLITS}
