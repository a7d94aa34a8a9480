"""Recall as it is used: step by step through `LMGen` it is that of the parallel forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from lm_fakes import CONTEXT, STEPS, hybrid, random_codes
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor, nn

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.hybrid import gates_forced_to_zero, hybrid_layers, reset_memories
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.recall import ProbeRecall, Recall, recall_record
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

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


def streamed(lm: LMModel, codes: Tensor, resets: Sequence[int] = ()) -> Tensor:
    """Text logits [S, 1, T, card] of `LMGen` with everything forced.

    The memory is taken away just before each of the steps `resets` is read.
    """

    def reset(finished: int) -> None:
        if finished + 1 in resets:
            reset_memories(lm, torch.ones(len(codes), dtype=torch.bool))

    watch = TextLogits(lm)
    with borrowed(lm, seed=0):
        generate(lm, codes, codes[:, Rows.of(lm).user], observers=[watch, EachStep(reset)])
    return torch.cat(watch.steps, dim=2)


def recall_of(lm: LMModel, text_logits: Tensor, recording: EncodedRecording) -> Recall:
    """What `read_recall` counts, of logits [1, 1, T, card] that came some other way."""
    metric = ProbeRecall(STEPS, 1)
    everywhere = torch.ones(1, 1, STEPS, dtype=torch.bool)
    audio = torch.full((1, lm.dep_q, STEPS, lm.card), torch.nan)
    silent = torch.zeros(1, lm.dep_q, STEPS, dtype=torch.bool)
    output = LMOutput(audio, silent, text_logits, everywhere)
    metric.update(lm, output, recording.codes[None], recording.probes)
    found = recall_record(metric)
    assert found is not None
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("projections", ["own", "attention", "shared"])
@torch.no_grad()
def test_recall_step_by_step_is_that_of_the_parallel_reading_kept_and_reset(
    make_lm: MakeLM, rule: str, projections: str
) -> None:
    lm = hybrid(make_lm, layers="every:1", rule=rule, projections=projections, write_gate=0.3)
    assert len(hybrid_layers(lm)) == len(lm.transformer.layers)
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

    probes = (
        Probe("day", 4.0, 0.1, (range(10, 12),), asked_step=8),
        Probe("day", 20.0, 0.1, (range(24, 26), range(26, 27)), asked_step=21),
        # nothing is known of the question: the memory goes before the answer
        Probe("day", 60.0, 0.1, (range(36, 38),), "heard"),
    )
    recording = EncodedRecording("a", codes[0], probes)
    by_step = {
        "kept": recall_of(lm, got[:1], recording),
        "reset": recall_of(lm, streamed(lm, codes, resets=(8, 21, 36))[:1], recording),
    }
    at_once = read_teacher_forced(lm, [recording], STEPS, STEPS).recall
    assert at_once is not None
    assert at_once.keys() == by_step.keys()
    for memory, found in by_step.items():
        assert at_once[memory].keys() == found.keys() == {"own", "heard"}
        for group, bins in found.items():
            wanted = dict(at_once[memory][group])
            assert bins.pop("nll") == pytest.approx(wanted.pop("nll"), abs=1e-4)
            assert bins == wanted
    kept, reset = (at_once[memory]["own"]["nll"] for memory in ("kept", "reset"))
    assert all(abs(one - other) > 1e-3 for one, other in zip(kept, reset, strict=True))
