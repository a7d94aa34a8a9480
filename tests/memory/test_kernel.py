"""Where the fused kernel of the gated delta rule may be used, without a GPU to run it on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_ttt.memory import MemoryConfig, build_rule
from moshi_ttt.memory.gated_delta import kernel
from moshi_ttt.memory.gated_delta.chunked import chunked


@pytest.fixture
def agrees(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The decision, as if fla-core were installed and nothing decided yet."""
    kernel.is_usable.cache_clear()
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(kernel, "version", lambda _: "0.6.0")
    yield lambda head_dim=16: kernel.is_usable(head_dim, torch.device("cpu"), chunked)
    kernel.is_usable.cache_clear()


def test_without_a_gpu_it_is_never_asked_for() -> None:
    rule = build_rule(MemoryConfig(rule="gated_delta", heads=2).fitted(32, 2), 32)
    x = torch.randn(1, 70, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule._read_dtype(x) == torch.float32
        assert rule(x)[0].isfinite().all()


def test_a_kernel_that_gives_the_same_is_used(agrees: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernel, "by_kernel", chunked)
    assert agrees()


@pytest.mark.parametrize("wrong", ["read-out", "memory", "gradient"])
def test_a_kernel_that_is_wrong_somewhere_is_not(
    agrees: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    def form(inputs: kernel.Inputs, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_alpha = inputs
        if wrong == "gradient":  # right values, and a gradient that does not reach the write gate
            beta = beta.detach() + 0 * beta
        y, after = chunked((q, k, v, beta, log_alpha), memory)
        scale = {"read-out": (1.1, 1.0), "memory": (1.0, 0.9), "gradient": (1.0, 1.0)}[wrong]
        return scale[0] * y, scale[1] * after

    monkeypatch.setattr(kernel, "by_kernel", form)
    with caplog.at_level(logging.WARNING):
        assert not agrees()
        assert not agrees()
    compiling, record = caplog.records  # said once
    assert "compiles its kernels" in compiling.message
    assert "errs by" in record.message
    assert "pure PyTorch" in record.message


def test_what_was_not_compared_is_refused_by_name(
    agrees: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel, "version", lambda _: "0.7.1")
    assert not agrees()
    assert "fla-core 0.7.1 was not compared" in caplog.text
    kernel.is_usable.cache_clear()
    monkeypatch.setattr(kernel, "version", lambda _: "0.6.0")
    assert not agrees(512)
    assert "heads of 512 channels" in caplog.text


def test_a_kernel_that_cannot_be_built_falls_back(
    agrees: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "by_kernel", broken)
    assert not agrees()
    assert "fails here (RuntimeError: no compiler)" in caplog.text


def test_without_the_package_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    kernel.is_usable.cache_clear()
    if kernel.importlib.util.find_spec("fla") is None:
        assert not kernel.is_usable(16, torch.device("cpu"), chunked)
        assert not caplog.records
