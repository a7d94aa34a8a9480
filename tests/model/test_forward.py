"""The forward that leaves out the work for audio that nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lm_fakes import random_codes
from moshi.models.lm import LMModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.model.depformer import depformer_logits
from moshi_ttt.model.forward import forward, text_forward
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses

MakeLM = Callable[..., LMModel]


def codes_with_silent_rows(silent: list[bool]) -> Tensor:
    codes = random_codes(20).repeat(2, 1, 1)[: len(silent)]
    codes[torch.tensor(silent), 1:] = -1
    codes[0, :, 15:] = -1  # padding after a short recording
    return codes


@pytest.mark.parametrize("silent", [[False, True, False], [True, True], [False, False]], ids=str)
def test_it_gives_what_moshi_gives_wherever_something_is_known(
    make_lm: MakeLM, silent: list[bool]
) -> None:
    lm, codes = make_lm().eval().requires_grad_(False), codes_with_silent_rows(silent)
    got, expected = forward(lm, codes), lm(codes)
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.text_mask, expected.text_mask)
    torch.testing.assert_close(got.logits[got.mask], expected.logits[expected.mask])
    assert torch.equal(got.text_logits, expected.text_logits)
    assert got.logits.shape == expected.logits.shape


@pytest.mark.parametrize(
    ("audio", "steps"),
    # the codebooks behind the first come a step later
    [
        *((slice(1), 2), (slice(7), 8), (slice(19), 20), (slice(20), 20)),
        *((slice(3, 7), 5), (slice(12, None), 8), (slice(-1, None), 1)),
    ],
    ids=str,
)
def test_audio_is_predicted_where_it_is_asked_for_and_text_throughout(
    make_lm: MakeLM, audio: slice, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, codes = make_lm().eval().requires_grad_(False), codes_with_silent_rows([False, True])
    whole = forward(lm, codes)
    lengths: list[int] = []

    def count(lm: LMModel, sequence: Tensor, out: Tensor) -> list[Tensor]:
        lengths.append(sequence.shape[-1])
        return depformer_logits(lm, sequence, out)

    monkeypatch.setattr("moshi_ttt.model.forward.depformer_logits", count)
    got = forward(lm, codes, audio=audio)
    assert lengths == [steps]
    assert torch.equal(got.text_logits, whole.text_logits)
    assert torch.equal(got.text_mask, whole.text_mask)
    assert torch.equal(got.mask, whole.mask[..., audio])
    known = got.logits[got.mask]
    torch.testing.assert_close(known, whole.logits[:, :, audio][got.mask])


@pytest.mark.parametrize("silent", [[False, True], [False, False]], ids=str)
def test_the_text_alone_is_moshis_and_runs_no_depformer(
    make_lm: MakeLM, silent: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, codes = make_lm().eval().requires_grad_(False), codes_with_silent_rows(silent)
    expected = lm(codes)
    monkeypatch.setattr(LMModel, "forward_depformer_training", None)
    got = text_forward(lm, codes)
    assert torch.equal(got.text_logits, expected.text_logits)
    assert torch.equal(got.text_mask, expected.text_mask)
    assert got.logits.shape == expected.logits.shape
    assert got.mask.shape == expected.mask.shape
    assert not got.mask.any()


def test_gradients_are_moshis_too(make_lm: MakeLM) -> None:
    grads = []
    for run in (forward, lambda lm, codes: lm(codes)):
        lm = make_lm()
        output = run(lm, codes_with_silent_rows([False, True, False]))
        text = output.text_logits[output.text_mask].square().mean()
        (output.logits[output.mask].square().mean() + text).backward()
        grads.append({name: p.grad for name, p in lm.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7)


def test_the_depformer_is_left_alone_where_all_is_text(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    calls: list[int] = []

    def count(lm: LMModel, sequence: Tensor, out: Tensor) -> list[Tensor]:
        calls.append(len(sequence))
        return depformer_logits(lm, sequence, out)

    monkeypatch.setattr("moshi_ttt.model.forward.depformer_logits", count)
    forward(lm, codes_with_silent_rows([False, True, True]))
    assert calls == [1]
    forward(lm, codes_with_silent_rows([True, True]))
    assert calls == [1]
    # where several processes train one, each gets its gradient in every step
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    forward(lm, codes_with_silent_rows([True, True]))
    assert calls == [1, 2]
    forward(lm.requires_grad_(False), codes_with_silent_rows([True, True]))
    assert calls == [1, 2]


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the CPU wait for a GPU, or depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        waits = func in (aten._local_scalar_dense.default, aten.nonzero.default)
        if func in (aten.index.Tensor, aten.index_put_.default):
            waits = any(one is not None and one.dtype == torch.bool for one in args[1])
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("silent", [[False, True, False], [True, True], [False, False]], ids=str)
def test_told_what_is_heard_it_gives_the_same_and_waits_for_nothing(
    make_lm: MakeLM, silent: list[bool]
) -> None:
    codes = codes_with_silent_rows(silent)
    results = []
    for heard in (None, [not one for one in silent]):
        lm = make_lm()
        with nullcontext() if heard is None else _NoWaiting():
            output = forward(lm, codes, heard)
            losses = lm_losses(lm, output, codes, LossConfig(), heard)
            sum(losses).backward()
        grads = [p.grad for p in lm.parameters() if p.grad is not None]
        results.append([*losses, *grads])
    assert torch.isfinite(results[0][0])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_reading_text_alone_is_bitwise_moshi_with_all_audio_unknown(make_lm: MakeLM) -> None:
    codes = codes_with_silent_rows([True, True])
    grads = []
    for run in (forward, lambda lm, codes: lm(codes)):
        lm = make_lm()
        output = run(lm, codes)
        output.text_logits.square().mean().backward()
        embeddings = [*lm.emb.parameters(), *lm.text_emb.parameters()]
        grads.append([output.text_logits, *(p.grad for p in embeddings)])
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)
