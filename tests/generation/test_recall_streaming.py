"""Recall as it is used: step by step through `LMGen` it is that of the parallel forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from lm_fakes import CONTEXT, STEPS, hybrid, random_codes
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor, nn

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import Observer
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import gates_forced_to_zero, hybrid_layers
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.controls import read_recall
from moshi_ttt.teacher_forcing.recall import ProbeRecall, recall_record

MakeLM = Callable[..., LMModel]


class TextLogits(Observer):
    """Text logits of every step."""

    def __init__(self, lm: LMModel) -> None:
        self._lm = lm
        self.steps: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        def keep(_: nn.Module, __: object, logits: Tensor) -> None:
            self.steps.append(logits.reshape(logits.shape[0], 1, 1, -1).clone())

        handle = self._lm.text_linear.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def streamed(lm: LMModel, codes: Tensor) -> Tensor:
    """Text logits [S, 1, T, card] of `LMGen` with everything forced."""
    watch = TextLogits(lm)
    with borrowed(lm, seed=0):
        generate(lm, codes, codes[:, Rows.of(lm).user], observers=[watch])
    return torch.cat(watch.steps, dim=2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("projections", ["own", "attention", "shared"])
@torch.no_grad()
def test_answers_step_by_step_are_those_of_the_parallel_forward(
    make_lm: MakeLM, rule: str, projections: str
) -> None:
    lm = hybrid(make_lm, rule=rule, projections=projections, write_gate=0.3)
    if projections == "shared":
        for layer in hybrid_layers(lm).values():
            for projection in (layer.branch.rule.qkv, layer.branch.out_proj):
                nn.init.normal_(projection.up.weight, std=0.3)
    codes = random_codes()
    expected, got = lm(codes).text_logits, streamed(lm, codes)
    # both before and after the ring has begun to lose its oldest keys
    assert CONTEXT < STEPS // 2
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    with gates_forced_to_zero(lm):
        assert (lm(codes).text_logits - expected).abs().max() > 1e-2

    words = tuple(range(at, at + 2) for at in (10, 24, 36))
    probe = Probe("day", 20.0, 0.1, words, asked_step=8)
    metric = ProbeRecall()
    everywhere = torch.ones(1, 1, STEPS, dtype=torch.bool)
    audio = torch.full((1, lm.dep_q, STEPS, lm.card), torch.nan)
    silent = torch.zeros(1, lm.dep_q, STEPS, dtype=torch.bool)
    metric.update(lm, LMOutput(audio, silent, got[:1], everywhere), codes[:1], [probe])
    by_step = recall_record(metric)
    at_once = read_recall(lm, [EncodedRecording("a", codes[0], (probe,))], "kept", STEPS)
    assert by_step is not None
    assert at_once is not None
    assert by_step["own"].pop("nll") == pytest.approx(at_once["own"].pop("nll"), abs=1e-4)
    assert by_step == at_once
