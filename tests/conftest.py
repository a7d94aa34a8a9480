from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moshi_ttt.compiling import compile_on_gpu_only

compile_on_gpu_only()  # tests also build models by moshi's own classes

TINY_LM: dict[str, Any] = {
    "dim": 32,
    "num_heads": 2,
    "num_layers": 3,
    "hidden_scale": 4.125,
    "n_q": 16,
    "dep_q": 8,
    "card": 16,
    "text_card": 20,
    "context": 16,
    "causal": True,
    "max_period": 10_000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_dim_feedforward": 66,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.fixture
def make_lm() -> Callable[..., Any]:
    """Builds an `LMModel` of Moshi's structure, far too small to be useful."""
    from moshi.models.lm import LMModel

    def make(*, seed: int = 0, **overrides: Any) -> LMModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LMModel(**TINY_LM | overrides)

    return make
