"""Unit queries and keys keep what they give for the backward pass."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.memory.rule import _Unit


def test_unit_vectors_and_their_gradient() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    x[0, 0, 0] = 0  # smooth there, too
    assert torch.autograd.gradcheck(lambda x: _Unit.apply(x, x.dtype), x.requires_grad_())
    torch.testing.assert_close(
        _Unit.apply(x, x.dtype), x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    )
    half = _Unit.apply(x, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    (half.double() * torch.arange(4)).sum().backward()
    (exact,) = torch.autograd.grad((_Unit.apply(x, x.dtype) * torch.arange(4)).sum(), x)
    assert (x.grad - exact)[1:].norm() < 0.01 * exact[1:].norm()


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_same_when_compiled(given: torch.dtype) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return _Unit.apply(x, given).float().sin().sum()

    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    # no code is generated: what differed between torch versions is how the graph is taken
    (got,) = torch.autograd.grad(torch.compile(loss, backend="eager")(x), x)
    torch.testing.assert_close(got, expected)
