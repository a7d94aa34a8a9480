"""The gated delta rule through the kernels of fla-core, an optional extra, where they are right.

`chunk_kda` decays every key channel on its own (Kimi Linear, arXiv:2510.26692); with one rate for
all channels it is our rule. Its sibling for one rate, `chunk_gated_delta_rule`, has no backward on
Hopper with triton 3.4.0 to 3.7.0. Sums run in bf16, so that only mixed precision asks for it; the
chunked form in fp32 stays what everything is compared with.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from moshi_ttt.compiling import fused

TESTED = "0.6."
"""Versions of fla-core whose outputs, states and gradients were compared with the reference."""
LARGEST_HEAD_DIM = 256
WORST_ERROR = 0.03
"""Of outputs, state and gradients against the chunked form, relative to their norm: bf16 gives
about 0.005, a kernel that is wrong gives more than 1."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Queries, keys, values [B, H, T, dh], write gates and log decays [B, H, T, 1]."""
Form = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]
"""Inputs and memory [B, H, dh, dh] to read-out [B, H, T, dh] and memory."""

logger = logging.getLogger(__name__)


def by_kernel(inputs: Inputs, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The rule over T steps.

    Args:
        inputs: of the rule on a GPU; queries, keys and values in fp32, or in bf16 with the layout
            [B, T, H, dh], as the kernel has them.
        memory: before the first step, [B, H, dh, dh], keys by values.

    Returns:
        The read-out [B, H, T, dh] in bf16, and the memory in fp32 after the last step.
    """
    from fla.ops.kda import chunk_kda  # imports triton

    q, k, v, log_alpha, beta = _as_kernel_wants(*inputs)
    y, memory = chunk_kda(
        q,
        k,
        v,
        log_alpha,
        beta,
        scale=1.0,
        initial_state=memory.contiguous(),
        output_final_state=True,
    )
    return y.transpose(1, 2), memory


@fused
def _as_kernel_wants(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys, values in bf16 and log decays [B, T, H, dh], write gates in bf16 [B, T, H]."""
    q, k, v, beta, log_alpha = (one.transpose(1, 2) for one in (q, k, v, beta, log_alpha))
    log_alpha = log_alpha.expand_as(k).contiguous()
    q, k, v, beta = (one.to(torch.bfloat16).contiguous() for one in (q, k, v, beta))
    return q, k, v, log_alpha, beta[..., 0]


@cache
def is_usable(head_dim: int, device: torch.device, chunked: Form) -> bool:
    """Whether the kernel is there and gives what the chunked form gives; says why if not.

    Args:
        head_dim: channels of a head.
        device: a GPU; it is tried out there the first time.
        chunked: the form that is right, to compare with.
    """
    if importlib.util.find_spec("fla") is None:
        return False
    found = version("fla-core")
    if not found.startswith(TESTED):
        return _fall_back(f"fla-core {found} was not compared with the reference, {TESTED}x was")
    if head_dim > LARGEST_HEAD_DIM:
        return _fall_back(f"heads of {head_dim} channels are wider than {LARGEST_HEAD_DIM}")
    logger.warning("gated_delta: fla-core compiles its kernels, for minutes on a new machine")
    try:
        error = largest_error(head_dim, device, chunked)
    except Exception as failure:  # whatever a compiler or driver may say: the other form works
        return _fall_back(f"fla-core {found} fails here ({type(failure).__name__}: {failure})")
    if not error < WORST_ERROR:
        return _fall_back(f"fla-core {found} errs by {error:.3f} here, {WORST_ERROR} is allowed")
    return True


def _fall_back(why: str) -> bool:
    logger.warning("gated_delta: %s; the pure PyTorch form is used", why)
    return False


@torch.enable_grad()
def largest_error(head_dim: int, device: torch.device, chunked: Form) -> float:
    """Largest relative error of read-out, memory and gradients on 2 x 2 heads and 101 steps.

    Args:
        head_dim: channels of a head.
        device: a GPU.
        chunked: what to compare with.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, device=device, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(101, head_dim), dim=-1) for _ in range(2))
    leaves = [q, k, draw(101, head_dim), draw(101, 1).sigmoid(), -draw(101, 1).sub(3).exp()]
    leaves = [one.detach().requires_grad_() for one in (*leaves, 0.1 * draw(head_dim, head_dim))]
    weights = draw(101, head_dim), draw(head_dim, head_dim)

    def run(form: Form) -> list[Tensor]:
        *inputs, memory = leaves
        outputs = form(tuple(inputs), memory)  # type: ignore[arg-type]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]

    pairs = zip(run(by_kernel), run(chunked), strict=True)
    errors = [(got - want).norm() / want.norm() for got, want in pairs]
    return float(torch.stack(errors).max().detach())
