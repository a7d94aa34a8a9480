"""What reading held-out recordings gives beside their recall."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lm_fakes import hybrid
from moshi.models.lm import LMModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moshi_ttt.data import EncodedRecording, Probe
from moshi_ttt.model.hybrid import HybridLayer, hybrid_layers
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

MakeLM = Callable[..., LMModel]


def recording(steps: int, *probes: Probe) -> EncodedRecording:
    generator = torch.Generator().manual_seed(steps)
    codes = torch.randint(4, 15, (17, steps), generator=generator)
    return EncodedRecording(f"{steps}", codes, probes)


def test_every_window_of_the_loss_is_the_mean_of_the_same_recordings(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    long, exact, short = recording(45), recording(30), recording(29)
    read = read_teacher_forced(lm, [long, short, exact], steps=30, window_steps=10).nll
    assert read["start_step"] == [0, 10, 20]
    assert read["recordings"] == [2, 2, 2]
    alone = [read_teacher_forced(lm, [one], 30, 10).nll for one in (long, exact)]
    for group in GROUPS[:2]:  # the delay leaves every recording equally many tokens
        means = [sum(pair) / 2 for pair in zip(*(one[group] for one in alone), strict=True)]
        assert read[group] == pytest.approx(means, rel=1e-5)


def test_where_none_is_long_enough_the_number_of_recordings_is_told(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    read = read_teacher_forced(lm, [recording(25), recording(15)], 40, 10).nll
    assert read["recordings"] == [2, 2, 1, 0]
    assert [math.isnan(value) for value in read["text"]] == [False, False, False, True]


def test_how_loud_the_memories_are_is_measured_at_every_position_with_them_kept(
    make_lm: MakeLM,
) -> None:
    lm = hybrid(make_lm, rule="gated_delta")
    recordings = [
        recording(40, Probe("day", 20.0, 0.1, (range(30, 32),), asked_step=20)),
        recording(25),
    ]
    read = read_teacher_forced(lm, recordings, 10, 10)
    assert read.recall is not None
    assert read.recall.keys() == {"kept", "reset", "other"}
    ratios: dict[int, list[Tensor]] = {index: [] for index in hybrid_layers(lm)}

    def watch(index: int, layer: HybridLayer) -> RemovableHandle:
        def hook(_: object, __: object, given: dict[str, Tensor], branch: Tensor) -> None:
            ratios[index].append(branch[0].norm(dim=-1) / given["residual"][0].norm(dim=-1))

        return layer.branch.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(index, layer) for index, layer in hybrid_layers(lm).items()]
    with torch.no_grad():
        # as far as the last answer, and as far as the loss
        for one, steps in zip(recordings, (32, 10), strict=True):
            lm(one.codes[None, :, :steps])
    for handle in handles:
        handle.remove()
    shares = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    assert read.branch_ratios.keys() == ratios.keys() == {0, 2}
    for index, found in read.branch_ratios.items():
        whole = torch.cat(ratios[index])
        expected = {name: float(whole.quantile(share)) for name, share in shares.items()}
        assert found == pytest.approx(expected, rel=1e-4)
    assert read_teacher_forced(make_lm().eval(), recordings, 10, 10).branch_ratios == {}
