"""The depformer with the steps of each codebook side by side is moshi's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.model.depformer import among_codebooks, depformer_logits
from moshi_ttt.model.lora import LoraConfig, add_lora

MakeLM = Callable[..., LMModel]
SCHEDULE = [0, 1, 2, 2, 3, 3, 3, 3]


def inputs(lm: LMModel) -> tuple[Tensor, Tensor]:
    """Codes [2, 17, 12], some unknown, and what a temporal transformer might say of them."""
    codes = random_codes(12)
    codes[1, :, 9:] = -1
    generator = torch.Generator().manual_seed(3)
    return codes, torch.randn(2, 12, lm.dim, generator=generator).requires_grad_()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"depformer_weights_per_step_schedule": SCHEDULE},
        {"depformer_multi_linear": False},
        {"gradient_checkpointing": True},
        {"depformer_pos_emb": "sin"},
        {"depformer_weights_per_step": False},
    ],
    ids=lambda config: next(iter(config), "plain"),
)
def test_numbers_and_gradients_are_moshis(make_lm: MakeLM, config: dict[str, Any]) -> None:
    lm = make_lm(**config)
    found = []
    for run in (depformer_logits, lm.forward_depformer_training):
        codes, out = inputs(lm)
        args = (lm, codes, out) if run is depformer_logits else (codes, out)
        logits = run(*args)  # type: ignore[operator]
        logits = torch.stack(logits, 1) if isinstance(logits, list) else logits
        lm.zero_grad()
        logits.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
        found.append({"logits": logits, "out": out.grad, **grads})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("depformer.layers") for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_adapters_are_alive_in_it(make_lm: MakeLM) -> None:
    lm = make_lm()
    add_lora(lm, LoraConfig(rank=2, targets=("depformer",)))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    codes, out = inputs(lm)
    expected = lm.forward_depformer_training(codes, out)
    got = torch.stack(depformer_logits(lm, codes, out), 1)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 15, 16, 33])
def test_rows_that_are_attended_together_do_not_see_one_another(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shape = 3, rows, 2, 8, 4
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    found = []
    for together in (1, 16):
        y = among_codebooks(q, k, v, together)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
