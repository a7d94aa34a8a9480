"""The gated delta rule: Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moshi_ttt.compiling import fused
from moshi_ttt.memory.config import MemoryConfig
from moshi_ttt.memory.gated_delta.kernel import Inputs, by_kernel, is_usable
from moshi_ttt.memory.rule import MemoryRule, MemoryState

_CHUNK_STEPS = 64


class GatedDelta(MemoryRule):
    """An associative matrix S that forgets, corrects itself and is read, at every step.

    `S <- alpha S; S <- S + beta k (v - k'S)'; y = q'S`: online gradient descent on
    1/2 |k'S - v|^2 with rate beta (the write gate) and a data-dependent decay alpha =
    exp(-exp(min(log_rate + w.x, 0))), whose time constant starts at the head's forgetting time.

    The state holds `memory`, S [B, H, dh, dh], keys by values, which starts at a learned value;
    and `updates`, int64 [B], one a step.
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__(dim, config)
        self.forget = nn.Linear(dim, self.heads, bias=False)
        nn.init.zeros_(self.forget.weight)
        self.initial = nn.Parameter(torch.zeros(self.heads, self.head_dim, self.head_dim))

    @property
    def steps_per_update(self) -> int:
        """Every step is one."""
        return 1

    def init_state(self, batch_size: int) -> MemoryState:
        """The learned initial memory for each row; differentiable."""
        return {
            "memory": self.initial.to(self.dtype).expand(batch_size, *self.initial.shape),
            "updates": torch.zeros(batch_size, dtype=torch.int64, device=self.initial.device),
        }

    def _gate_maps(self) -> list[nn.Linear]:
        return [*super()._gate_maps(), self.forget]

    def _gates(self, *projected: Tensor) -> tuple[Tensor, ...]:
        write, forget = projected
        log_alpha = self._per_head(_log_alpha(forget, self.log_rate, self.dtype))
        return *super()._gates(write), log_alpha

    def _read_dtype(self, x: Tensor) -> torch.dtype:
        mixed = x.is_cuda and torch.is_autocast_enabled("cuda") and self.dtype == torch.float32
        if mixed and x.shape[1] > 1 and is_usable(self.head_dim, x.device, chunked):
            return torch.bfloat16  # as the kernel wants them
        return self.dtype

    def _stream(self, inputs: Sequence[Tensor], state: MemoryState, rows: Tensor) -> Tensor:
        if inputs[0].shape[2] > 1:
            return super()._stream(inputs, state, rows)
        y: Tensor = _step_in_place(*inputs, state["memory"], state["updates"], rows)
        return y

    def _walk(
        self, inputs: Sequence[Tensor], state: MemoryState | None
    ) -> tuple[Tensor, MemoryState]:
        q, k, v, beta, log_alpha = inputs
        state = state or self.init_state(len(q))
        whole = q, k, v, beta, log_alpha
        if q.shape[2] == 1:
            y, memory = one_step(*whole, state["memory"])
        else:
            form = chunked if q.dtype == self.dtype else by_kernel
            y, memory = form(whole, state["memory"])
        return y, {"memory": memory, "updates": state["updates"] + q.shape[2]}


@fused
def _log_alpha(forget: Tensor, log_rate: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of what is kept a step, of what `forget` gave, [..., H].

    The log of the rate is at most 0, a forgetting time of one step: beyond it there is no memory
    to speak of, and differences of decays within a chunk would lose their digits.
    """
    return -(log_rate + forget.to(dtype)).clamp(max=0.0).exp()


@fused
def _step_in_place(*tensors: Tensor) -> Tensor:
    """`one_step` that leaves memory and count in their buffers, in the rows that are true."""
    q, k, v, beta, log_alpha, memory, updates, rows = tensors
    y, after = one_step(q, k, v, beta, log_alpha, memory)
    memory.copy_(torch.where(rows[:, None, None, None], after, memory))
    updates.add_(rows)
    return y


def one_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule over a single step: what a generation waits for."""
    # the memory is read once, for key and query, as sums that fuse with what is around them
    found, read = (_times(row, memory) for row in (k, q))
    alpha = log_alpha.exp()
    written = beta * (v - alpha * found)
    y = alpha * read + (q * k).sum(-1, keepdim=True) * written
    return y, alpha * memory + k.mT * written


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """`row @ matrix`, [..., 1, n] and [..., n, m]."""
    return (row.mT * matrix).sum(-2, keepdim=True)


def chunked(inputs: Inputs, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The rule over T steps, chunk after chunk, in plain PyTorch.

    Args:
        inputs: queries, keys, values [B, H, T, dh], write gates and log decays [B, H, T, 1].
        memory: before the first step, [B, H, dh, dh], keys by values.

    Returns:
        The read-out [B, H, T, dh] and the memory after the last step.
    """
    steps = inputs[0].shape[2]
    rest = steps % _CHUNK_STEPS  # a last, shorter chunk
    outputs = []
    for first, last, size in ((0, steps - rest, _CHUNK_STEPS), (steps - rest, steps, rest)):
        if first < last:
            q, k, v, beta, log_alpha = (
                x[:, :, first:last].unflatten(2, (-1, size)) for x in inputs
            )
            # compiling pays where all clips are as long: in training
            form = _chunks_of_a_training if torch.is_grad_enabled() else _chunks
            y, memory = form(q, k, v, beta, log_alpha, memory)
            outputs.append(y.flatten(2, 3))
    return torch.cat(outputs, dim=2), memory


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule over chunks of one length, [B, H, N, n, ...]."""
    # with g_t = alpha_1 ... alpha_t, unrolling the rule over a chunk gives
    #   S_t = g_t S_0 + sum over s <= t of (g_t / g_s) k_s w_s'
    #   w_t = beta_t (v_t - g_t S_0'k_t - sum over s < t of (g_t / g_s) (k_t.k_s) w_s)
    # i.e. one unit triangular system for all w of the chunk, linear in S_0: w = u - r S_0. So that
    # all but two products with S_0 is done for every chunk at once (the paper's section 3.3)
    log_decay = log_alpha.cumsum(-2)  # log g, [B, H, N, n, 1]
    # the differences above the diagonal are positive and could overflow: cut before exp too
    between = (log_decay - log_decay.mT).tril().exp().tril()  # g_t / g_s, [B, H, N, n, n]
    decay = log_decay.exp()

    u, r = beta * v, beta * decay * k
    if q.shape[-2] > 1:
        system = (beta * between * (k @ k.mT)).tril(-1)
        both = torch.cat([u, r], dim=-1)
        both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        u, r = both.chunk(2, dim=-1)
    to_end = between[..., -1, :, None] * k  # g_n / g_s k_s
    before, written = [], []
    for u_i, r_i, to_end_i, decay_i in zip(
        *(x.unbind(2) for x in (u, r, to_end, decay[..., -1:, :])), strict=True
    ):
        before.append(memory)
        written.append(u_i - r_i @ memory)
        memory = decay_i * memory + to_end_i.mT @ written[-1]
    y = (decay * q) @ torch.stack(before, 2)
    return y + (between * (q @ k.mT)) @ torch.stack(written, 2), memory


_chunks_of_a_training = fused(_chunks)
