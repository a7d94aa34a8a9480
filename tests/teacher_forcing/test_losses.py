"""Losses and the NLL metric against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.model.branch import BranchStats
from moshi_ttt.model.window import window as set_to
from moshi_ttt.teacher_forcing.losses import (
    LossConfig,
    lm_losses,
    magnitude_penalty,
    read_clips,
    token_nll,
)
from moshi_ttt.teacher_forcing.nll import PositionNLL

MakeLM = Callable[..., LMModel]


def output_with(probability: Tensor, codes: Tensor, text_card: int, card: int) -> LMOutput:
    """Logits that give every target the probability [B, K, T], and the rest evenly shared."""

    def logits(targets: Tensor, p: Tensor, size: int) -> Tensor:
        rest = ((1 - p) / (size - 1)).log()
        spread = rest[..., None].expand(*targets.shape, size).clone()
        return spread.scatter(-1, targets.clamp(min=0)[..., None], p.log()[..., None])

    mask = codes != -1
    return LMOutput(
        logits(codes[:, 1:9], probability[:, 1:9], card),
        mask[:, 1:9],
        logits(codes[:, :1], probability[:, :1], text_card),
        mask[:, :1],
    )


def test_losses_are_means_weighted_and_normalised_by_their_weights(make_lm: MakeLM) -> None:
    codes = torch.ones(1, 17, 3, dtype=torch.long)
    codes[0, 0] = torch.tensor([3, 5, 0])  # padding, a word, end of padding
    probability = torch.full((1, 17, 3), 0.5)
    probability[0, 0, 1] = 0.25
    probability[0, 1] = 0.125
    output = output_with(probability, codes, text_card=20, card=16)
    text, audio = lm_losses(
        make_lm(), output, codes, LossConfig(text_padding_weight=0.5, first_codebook_weight=10.0)
    )
    # (0.5 ln2 + 1 ln4 + 0.5 ln2) / 2 and (10 ln8 + 7 ln2) / 17
    assert text.item() == pytest.approx(1.5 * math.log(2), rel=1e-5)
    assert audio.item() == pytest.approx((10 * 3 + 7) / 17 * math.log(2), rel=1e-5)
    both = LossConfig(audio_weight=0.2).likelihood(text, audio)
    assert both.item() == pytest.approx(text.item() + 0.2 * audio.item(), rel=1e-5)


@pytest.mark.parametrize("window", [3, 7])
def test_beyond_the_window_the_loss_is_that_of_these_positions_alone(
    make_lm: MakeLM, window: int
) -> None:
    lm = make_lm(context=20)
    codes = random_codes(12)
    codes[0, :, 9:] = -1  # a recording that ends
    config = LossConfig(text_padding_weight=0.3, beyond_window=True)
    plain = dataclasses.replace(config, beyond_window=False)
    losses, gradients = [], []
    for one in (config, plain):
        with set_to(lm, window):
            output = lm(codes)
            if one is plain:  # the rest is not there
                output = LMOutput(
                    output.logits[:, :, window:],
                    output.mask[:, :, window:],
                    output.text_logits[:, :, window:],
                    output.text_mask[:, :, window:],
                )
            losses.append(lm_losses(lm, output, codes[..., -output.mask.shape[-1] :], one))
        lm.zero_grad()
        one.likelihood(*losses[-1]).backward()
        gradients.append(lm.text_emb.weight.grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    with set_to(lm, window):
        assert lm_losses(lm, lm(codes), codes, plain)[0] != losses[0][0]
    with set_to(lm, 12):  # nothing is beyond it
        assert lm_losses(lm, lm(codes), codes, config)[0] == 0


def test_clips_that_a_window_covers_cannot_be_counted_beyond_it() -> None:
    LossConfig().check_fits(None, 10)
    LossConfig(beyond_window=True).check_fits(9, 10)
    for window in (10, None):
        with pytest.raises(
            UserError, match="beyond_window=True would count nothing: clips have 10"
        ):
            LossConfig(beyond_window=True).check_fits(window, 10)


def test_invalid_positions_with_nan_logits_do_not_reach_loss_or_gradient() -> None:
    logits = torch.zeros(1, 1, 3, 4)
    logits[0, 0, 2] = float("nan")
    logits.requires_grad_()
    mask = torch.tensor([[[True, True, False]]])
    nll = token_nll(logits, torch.tensor([[[0, 1, -1]]]), mask)
    torch.testing.assert_close(nll, torch.tensor([[[math.log(4), math.log(4), 0.0]]]))
    nll.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, 0, 2] == 0).all()


def test_nll_and_gradient_are_those_of_the_valid_positions_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (3, 2, 5), generator=generator)
    mask = torch.rand(3, 2, 5, generator=generator) < 0.6
    mask[1] = False
    logits[~mask], targets[~mask] = float("nan"), -1
    plain = logits.clone().requires_grad_()
    expected = torch.zeros(mask.shape)
    expected[mask] = torch.nn.functional.cross_entropy(plain[mask], targets[mask], reduction="none")
    expected.square().sum().backward()
    for heard in (None, [True, False, True], [True, True, True]):
        masked = logits.clone().requires_grad_()
        nll = token_nll(masked, targets, mask, heard)
        nll.square().sum().backward()
        assert torch.equal(nll, expected)
        assert torch.equal(masked.grad, plain.grad)
    # nothing is even looked at where nothing is heard
    assert not token_nll(logits[1:2], targets[1:2], mask[1:2], [False]).any()


def test_a_batch_without_a_single_word_has_a_text_loss_of_zero(make_lm: MakeLM) -> None:
    codes = torch.ones(1, 17, 3, dtype=torch.long)
    codes[:, 0] = -1
    output = output_with(torch.full((1, 17, 3), 0.5), codes, text_card=20, card=16)
    text, audio = lm_losses(make_lm(), output, codes, LossConfig())
    assert text.item() == 0
    assert audio.item() == pytest.approx(math.log(2), rel=1e-5)


def stats(ratio: list[float]) -> BranchStats:
    norm = torch.tensor([ratio], requires_grad=True)
    return BranchStats(norm, norm, torch.ones(1, len(ratio)), torch.tensor(1.0))


def test_magnitude_penalty_is_free_at_first_one_at_the_target_and_quadratic() -> None:
    quiet, loud = stats([0.0, 0.15]), stats([0.2, 0.25])
    penalty = magnitude_penalty({1: [quiet], 3: [loud]}, LossConfig(magnitude_over="positions"))
    assert penalty.item() == pytest.approx((0 + 0 + 1 + 4) / 4, rel=1e-5)
    penalty.backward()
    assert (quiet.norm.grad == 0).all()
    torch.testing.assert_close(loud.norm.grad, torch.tensor([[2 / 0.05 / 4, 4 / 0.05 / 4]]))


def test_positions_without_a_residual_reach_neither_penalty_nor_gradient() -> None:
    one = stats([0.0, 0.25])
    one = one._replace(residual_norm=torch.tensor([[0.0, 1.0]]))
    penalty = magnitude_penalty({0: [one]}, LossConfig(magnitude_over="positions"))
    assert penalty.item() == pytest.approx(4, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(one.norm.grad, torch.tensor([[0.0, 4 / 0.05]]))


@pytest.mark.parametrize("over", ["positions", "mean"])
def test_the_penalty_is_that_of_the_defined_ratios_alone(
    over: Literal["positions", "mean"],
) -> None:
    config = LossConfig(magnitude_target=0.2, magnitude_over=over)
    one, other = stats([0.1, 0.3, 0.5]), stats([0.4, 0.21, 0.0])
    residual = torch.tensor([[2.0, 0.0, 1.5]], requires_grad=True)
    one = one._replace(residual_norm=residual)
    penalty = magnitude_penalty({0: [one], 1: [other]}, config)
    seen = [one.norm[0, [0, 2]] / residual[0, [0, 2]], other.norm[0]]
    ratios = torch.stack([r.mean() for r in seen]) if over == "mean" else torch.cat(seen)
    expected = torch.relu((ratios - 0.15) / 0.05).square().mean()
    leaves = [one.norm, other.norm, residual]
    torch.testing.assert_close(penalty, expected)
    grads = (torch.autograd.grad(one, leaves) for one in (penalty, expected))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "wrong", [{"magnitude_target": 0.0}, {"text_padding_weight": -1.0}, {"magnitude_reg": -0.1}]
)
def test_impossible_loss_settings_name_their_key(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}="):
        LossConfig(**wrong)


def test_position_nll_averages_each_stream_within_its_windows(make_lm: MakeLM) -> None:
    codes = torch.ones(2, 17, 5, dtype=torch.long)
    codes[1, :, 3:] = -1  # a shorter row
    probability = torch.full((2, 17, 5), 0.5)
    probability[:, 1] = 0.25
    probability[:, :, 2:] **= 2
    metric = PositionNLL(window_steps=2, windows=4)
    metric.update(make_lm(), output_with(probability, codes, 20, 16), codes)
    ln2 = math.log(2)
    result = metric.compute()
    nan = float("nan")
    expected = {"text": [1, 2, 2, nan], "first_codebook": [2, 4, 4, nan]}
    for group, values in {**expected, "other_codebooks": [1, 2, 2, nan]}.items():
        torch.testing.assert_close(
            result[group], torch.tensor(values, dtype=torch.float64) * ln2, equal_nan=True
        )
    record = metric.record()
    assert list(record) == ["window_steps", "start_step", *expected, "other_codebooks"]
    assert (record["window_steps"], record["start_step"]) == (2, [0, 2, 4, 6])
    assert record["first_codebook"][:3] == pytest.approx([2 * ln2, 4 * ln2, 4 * ln2])
    assert math.isnan(record["first_codebook"][3])


def test_a_single_window_of_position_nll_is_still_a_list(make_lm: MakeLM) -> None:
    codes, probability = _four_rows()
    metric = PositionNLL(window_steps=4, windows=1)
    metric.update(make_lm(), output_with(probability, codes, 20, 16), codes)
    record = metric.record()
    assert record["start_step"] == [0]
    assert record["text"] == [metric.compute()["text"].item()]


def _one_process(rank: int, folder: str) -> None:
    """Rank 0 sees three rows, rank 1 one: unequal shares must not be averaged as equals."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    metric = PositionNLL(window_steps=2, windows=2)
    rows = slice(0, 3) if rank == 0 else slice(3, 4)
    codes, probability = _four_rows()
    layout = type("Layout", (), {"n_q": 16, "dep_q": 8})
    metric.update(layout, output_with(probability[rows], codes[rows], 20, 16), codes[rows])
    result = metric.compute()
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _four_rows() -> tuple[Tensor, Tensor]:
    codes = torch.ones(4, 17, 4, dtype=torch.long)
    codes[0, :, 1:] = -1
    probability = torch.linspace(0.1, 0.9, codes.numel()).view(codes.shape)
    return codes, probability


def test_position_nll_of_two_processes_is_that_of_one(make_lm: MakeLM, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_process, args=(str(tmp_path),), nprocs=2)
    codes, probability = _four_rows()
    metric = PositionNLL(window_steps=2, windows=2)
    metric.update(make_lm(), output_with(probability, codes, 20, 16), codes)
    expected = metric.compute()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for group, values in expected.items():
            torch.testing.assert_close(found[group], values)


def test_each_spoken_clip_has_its_turn_to_be_predicted() -> None:
    heard = [True, False, True, True, False, True]
    every = [LossConfig(audio_every=2).predicted(heard, step) for step in (0, 1)]
    assert every[0] == [True, False, False, True, False, False]
    assert every[1] == [False, False, True, False, False, True]
    assert LossConfig().predicted(heard, 5) == heard
    assert LossConfig(audio_weight=0).predicted(heard, 0) == [False] * 6
    assert LossConfig(audio_weight=0).predicted(heard, 0, taught=True) == heard


def test_the_audio_loss_is_that_of_the_predicted_clips_alone(make_lm: MakeLM) -> None:
    lm, config = make_lm(), LossConfig()
    codes = torch.cat([random_codes(12), random_codes(13)[:1, :, 1:]])
    _, text, audio = read_clips(lm, codes, config, [True] * 3, [False, True, False])
    _, _, alone = read_clips(lm, codes[1:2], config)
    _, all_text, _ = read_clips(lm, codes, config)
    torch.testing.assert_close(audio, alone)
    torch.testing.assert_close(text, all_text)
    _, text, audio = read_clips(lm, codes, config, [True] * 3, [False] * 3)
    torch.testing.assert_close(text, all_text)
    assert audio == 0
