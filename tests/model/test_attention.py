"""Attention without a mask a row is moshi's, in numbers, gradients and streams."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel

from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.model.attention import ParallelAttention, parallel_attention
from moshi_ttt.model.lora import AdapterAttention, LoraConfig, add_lora
from moshi_ttt.model.source import open_source

MakeLM = Callable[..., LMModel]


def pair(make_lm: MakeLM, **config: Any) -> tuple[LMModel, LMModel]:
    """A model as moshi made it, and the same with parallel attention."""
    plain = make_lm(**config)
    other = copy.deepcopy(plain)
    parallel_attention(other)
    return plain, other


@pytest.mark.parametrize(
    "config",
    [
        {"context": 1},
        {"context": 5},
        {"context": 7},
        {"context": 20},
        {"context": 40},
        {"kv_repeat": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
def test_numbers_and_gradients_are_moshis_for_every_window(
    make_lm: MakeLM, config: dict[str, int], autocast: bool
) -> None:
    found = []
    for lm in pair(make_lm, **config):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = lm(random_codes(20)).text_logits.float()
        logits.square().mean().backward()
        grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        found.append({"logits": logits, **grads})
    assert found[0].keys() == found[1].keys()
    # bf16 itself is as far from fp32
    tolerance = {"rtol": 0.05, "atol": 0.04} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name, **tolerance)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"depformer_weights_per_step_schedule": [0, 1, 2, 2, 3, 3, 3, 3]},
        {"depformer_pos_emb": "rope"},
    ],
    ids=["plain", "shared weights", "with positions"],
)
def test_what_is_generated_is_moshis(make_lm: MakeLM, config: dict[str, Any]) -> None:
    results = []
    for lm in pair(make_lm, **config):
        with borrowed(lm.eval(), 0):
            results.append(generate(lm, random_codes()[:, :, :10], random_codes()[:, 9:])[0])
    assert torch.equal(*results)


def test_no_name_and_no_weight_changes(make_lm: MakeLM) -> None:
    plain, other = pair(make_lm)
    for layer in (*other.transformer.layers, *other.depformer.layers):
        assert type(layer.self_attn) is ParallelAttention
    weights = other.state_dict()
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


def test_a_model_of_a_source_has_it_and_adapters_keep_it() -> None:
    lm = open_source("tiny").lm()
    assert type(lm.transformer.layers[0].self_attn) is ParallelAttention
    add_lora(lm, LoraConfig(targets=("qkv",)))
    assert type(lm.transformer.layers[0].self_attn) is AdapterAttention


def test_steps_with_rows_that_wait_or_begin_again_are_moshis(make_lm: MakeLM) -> None:
    outputs, rings = [], []
    for lm in pair(make_lm, context=5):
        attention = lm.transformer.layers[0].self_attn.eval()
        generator, seen = torch.Generator().manual_seed(0), []
        with torch.no_grad(), attention.streaming(3):
            for _ in range(23):
                rows = torch.rand(2, 3, generator=generator)
                attention.reset_streaming(rows[0] < 0.1)
                attention.set_exec_mask(rows[1] < 0.7)
                x = torch.randn(3, 1, lm.dim, generator=generator)
                # moshi's own gives NaN, or anything, for a row that waits and holds nothing
                seen.append(attention(x, x, x)[rows[1] < 0.7])
            state = attention.get_streaming_state()[""]
            rings.append([state.kv_cache.cache, state.kv_cache.end_offset, state.offset])
        outputs.append(torch.cat(seen))
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *rings))
