"""The base as a teacher: what it says, and that nothing of the student is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel, LMOutput

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.attention import parallel_attention
from moshi_ttt.model.forward import forward
from moshi_ttt.model.hybrid import add_memory, hybrid_layers
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.window import set_window
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.distillation import (
    DistillationConfig,
    Group,
    base_output,
    divergence,
)

MakeLM = Callable[..., LMModel]


def student_and_base(make_lm: MakeLM) -> tuple[LMModel, LMModel]:
    """A model whose memory and adapters say something, and the one that it was made from."""
    base = make_lm(context=5)
    parallel_attention(base)
    student = copy.deepcopy(base).requires_grad_(False)
    add_lora(student, LoraConfig(rank=2, targets=("qkv", "ffn", "depformer")))
    add_memory(student, MemoryConfig(layers=[0, 2], heads=2))
    for name, parameter in student.named_parameters():
        if "lora_B" in name or name.endswith("branch.gate"):
            torch.nn.init.normal_(parameter, std=0.5)
    return student, base


def same(one: LMOutput, other: LMOutput) -> bool:
    return torch.equal(one.text_logits, other.text_logits) and torch.equal(
        one.logits.nan_to_num(), other.logits.nan_to_num()
    )


@pytest.mark.parametrize("window_steps", [None, 5, 9])
def test_the_teacher_is_the_base_bit_for_bit(make_lm: MakeLM, window_steps: int | None) -> None:
    student, base = student_and_base(make_lm)
    codes = random_codes(20)
    before = forward(student, codes)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    taught = base_output(student, codes, DistillationConfig(weight=1, window_steps=window_steps))
    set_window(base, window_steps)
    assert same(taught, forward(base, codes))
    assert not same(taught, before)
    assert same(forward(student, codes), before)
    assert student.context == 5
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("groups", [("text",), ("other_codebooks",), GROUPS])
def test_the_divergence_is_what_it_says(make_lm: MakeLM, groups: tuple[Group, ...]) -> None:
    student, _ = student_and_base(make_lm)
    codes = random_codes(20)
    codes[1, 1:] = -1  # words alone
    config = DistillationConfig(weight=1, groups=groups)
    taught, said = base_output(student, codes, config), forward(student, codes)
    found = divergence(said, taught, groups)
    expected = 0.0
    for name, mine, theirs, mask in (
        ("text", said.text_logits, taught.text_logits, said.text_mask),
        ("first_codebook", said.logits[:, 0], taught.logits[:, 0], said.mask[:, 0]),
        ("other_codebooks", said.logits[:, 1:], taught.logits[:, 1:], said.mask[:, 1:]),
    ):
        if name in groups:
            p = theirs[mask].double().log_softmax(-1)
            q = mine[mask].detach().double().log_softmax(-1)
            expected += float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 0
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert float(divergence(said, said, groups)) == pytest.approx(0, abs=1e-6)
    found.backward()
    gate = hybrid_layers(student)[0].branch.gate
    assert gate.grad is not None
    assert gate.grad.isfinite().all()
    assert gate.grad.abs().sum() > 0


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"weight": -1}, {"groups": ()}, {"groups": ("user",)}, {"window_steps": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DistillationConfig(**wrong)  # type: ignore[arg-type]
    DistillationConfig().check_fits("base")
    with pytest.raises(UserError, match="frozen base"):
        DistillationConfig(weight=1).check_fits("full")
