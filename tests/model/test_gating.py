"""moshi's gating in training: the same numbers and names, with and without adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel

from moshi_ttt.model.gating import FusedGating, fuse_gating
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.source import open_source

MakeLM = Callable[..., LMModel]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_numbers_and_gradients_are_moshis(make_lm: MakeLM, adapted: bool) -> None:
    plain = make_lm().train()
    other = copy.deepcopy(plain)
    fuse_gating(other)
    assert isinstance(other.transformer.layers[0].gating, FusedGating)
    assert isinstance(other.depformer.layers[0].gating[0], FusedGating)
    assert plain.state_dict().keys() == other.state_dict().keys()
    found = []
    for lm in (plain, other):
        if adapted:
            torch.manual_seed(0)
            add_lora(lm, LoraConfig(rank=2, targets=("ffn", "depformer")))
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        output = lm(random_codes(20))
        (output.text_logits.square().mean() + output.logits.nan_to_num().square().mean()).backward()
        grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        found.append({"text": output.text_logits, **grads})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_a_model_that_is_loaded_has_it_everywhere() -> None:
    lm = open_source("tiny").lm()
    gatings = [module for module in lm.modules() if hasattr(module, "linear_in")]
    assert gatings
    assert all(type(module) is FusedGating for module in gatings)
