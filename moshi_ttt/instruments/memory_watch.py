"""What the memories of a hybrid do at each step: what they add, write, forget and hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.instruments.buffers import Buffers
from moshi_ttt.model.branch import Pieces
from moshi_ttt.model.hybrid import HybridLayer, hybrid_layers

FAST_WEIGHT_STRIDE = 16
"""Steps between two looks at the fast weights: they are hundreds of MiB on Moshi 7B and change
little from step to step."""


class MemoryWatch:
    """The part of a `Recorder` that looks at the memories; nothing to do in vanilla Moshi.

    Args:
        lm: the model, with its memory already added.
        buffers: of the recorder; room is made in them.
        batch_size: streams S.
        max_steps: steps T to make room for.
    """

    def __init__(self, lm: LMModel, buffers: Buffers, batch_size: int, max_steps: int) -> None:
        self._dim = lm.dim
        self._hybrids = hybrid_layers(lm)
        self._buffers = buffers
        count = len(self._hybrids)
        buffers.add(2 * count, "branch_norms")
        buffers.add(count, "branch_residual_norm", "write_gate", "forgetting")
        buffers.add(count, "inner_updates", dtype=torch.long)
        looks = -(-max_steps // FAST_WEIGHT_STRIDE)
        # norm of the fast weights, and their distance from where they began
        self._looks = torch.full((looks, 2, batch_size, count), float("nan"), device=lm.device)
        self._gate_rms = torch.full((count,), float("nan"), device=lm.device)
        heads = next((layer.branch.rule.heads for layer in self._hybrids.values()), 0)
        # log of what each head loses a step, [M, H]: where the data does not change it, and its
        # sum over the steps counted beside it
        self._rates = torch.full((count, heads), float("nan"), device=lm.device)
        self._lost = torch.zeros_like(self._rates)
        self._lossy_steps = torch.zeros((), device=lm.device)
        self._begun = 0
        self._pieces: list[Pieces] = []
        self._inputs: list[Sequence[Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._hybrids)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch while the scope is open."""
        branches = [layer.branch for layer in self._hybrids.values()]
        before = [(branch.keeper, branch.rule.observer) for branch in branches]
        if self:
            self._read_constants()
        try:
            for branch in branches:
                branch.keeper = self._pieces.append
                branch.rule.observer = self._inputs.append
            yield
        finally:
            self._drop_seen()
            for branch, watching in zip(branches, before, strict=True):
                branch.keeper, branch.rule.observer = watching

    @torch.no_grad()
    def _read_constants(self) -> None:
        """What the memories' parameters say once and for all: they do not learn in a run."""
        branches = [layer.branch for layer in self._hybrids.values()]
        gates = torch.stack([b.gate.tanh() if b.bounded else b.gate for b in branches]).float()
        self._gate_rms = gates.square().mean(dim=1).sqrt()
        log_rates = torch.stack([b.rule.log_rate for b in branches]).float()  # [M, H]
        # where forgetting does not depend on the data it stays at this
        self._rates = log_rates.exp()
        self._buffers.fill("forgetting", self._rates.mean(dim=1))

    def end_step(self) -> None:
        """Called at the end of each step, inside the graph: write what was seen."""
        if not self:
            return
        write = self._buffers.write
        projected, borrowed, residual, branch = zip(*self._pieces, strict=True)
        read_out = torch.cat(projected, dim=1)
        if borrowed[0] is not None:
            read_out = read_out + torch.cat(borrowed, dim=1)
        branches = torch.cat(branch, dim=1).to(read_out.dtype)
        write("branch_norms", l2_norm(torch.cat([read_out, branches], dim=1)))
        write("branch_residual_norm", l2_norm(torch.cat(residual, dim=1)))
        # write gates, and log of what is kept a step, [B, H, M, 1], averaged over the heads
        gates = torch.cat([one[3] for one in self._inputs], dim=2)
        write("write_gate", gates.mean(dim=1)[..., 0])
        if len(self._inputs[0]) > 4:
            log_alphas = torch.cat([one[4] for one in self._inputs], dim=2)
            write("forgetting", -log_alphas.mean(dim=1)[..., 0])
            self._lost.sub_(log_alphas.mean(dim=0)[..., 0].T)
            self._lossy_steps.add_(1)
        updates = [layer.branch.updates() for layer in self._hybrids.values()]
        write("inner_updates", torch.stack(updates, dim=1))
        self._drop_seen()

    def _drop_seen(self) -> None:
        self._pieces.clear()
        self._inputs.clear()

    def after_step(self, step: int) -> None:
        """Called between steps: looks at the fast weights if it is time to."""
        if self and step % FAST_WEIGHT_STRIDE == 0:
            looks = [_look(layer) for layer in self._hybrids.values()]
            self._looks[step // FAST_WEIGHT_STRIDE] = torch.stack(looks, dim=-1)

    def begin_again(self, step: int) -> None:
        """Called when the memories have begun afresh with a step."""
        self._begun = step

    def check(self, generated_steps: int) -> None:
        """Called at the end of a run, while it still streams.

        Raises:
            RuntimeError: a memory made no inner update in a run long enough for one.
        """
        for index, layer in self._hybrids.items():
            expected = (generated_steps - self._begun) // layer.branch.rule.steps_per_update
            if expected and int(layer.branch.updates().min()) != expected:
                raise RuntimeError(
                    f"layer {index}: {int(layer.branch.updates().min())} inner updates in "
                    f"{generated_steps} steps, expected {expected}; the memory is not adapting"
                )

    def head_forgetting(self) -> np.ndarray:
        """Rate of forgetting of each memory's heads, mean over streams and steps, [M, H]."""
        rates = self._lost / self._lossy_steps if self._lossy_steps else self._rates
        return rates.cpu().numpy()

    def derive(self, rows: dict[str, Any], first: int, stop: int) -> None:
        """Turn what `Buffers.read` gave of steps `first` to `stop` - 1 into `Trace` fields."""
        read_out, rows["branch_norm"] = np.split(rows.pop("branch_norms"), 2, axis=1)
        residual = rows.pop("branch_residual_norm")
        bounded = np.array([layer.branch.bounded for layer in self._hybrids.values()], dtype=bool)
        # the same bound as `MemoryBranch.forward`, in terms of norms
        mean_square = np.square(read_out) / self._dim
        bound = residual * self._dim**-0.5 / np.sqrt(1 + mean_square)
        rows["branch_raw_norm"] = np.where(bounded[:, None], read_out * bound, read_out)
        with np.errstate(invalid="ignore", divide="ignore"):
            rows["branch_ratio"] = rows["branch_norm"] / residual
        rows["gate"] = np.empty_like(rows["branch_norm"])
        rows["gate"][:] = self._gate_rms.cpu().numpy()[:, None]
        looks = self._looks.permute(1, 2, 3, 0).cpu().numpy()
        held = looks[..., np.arange(first, stop) // FAST_WEIGHT_STRIDE]
        rows["fast_weight_norm"], rows["fast_weight_distance"] = held


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm over channels, at least fp32, without a copy in fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def _look(layer: HybridLayer) -> Tensor:
    """L2 norm of all fast weights of a memory, and of what parts them from their start, [2, B].

    Sums within a mini-batch are no fast weights.
    """
    state = layer.branch.get_streaming_state()[""]
    norms = [
        torch.stack([l2_norm(one.flatten(1)) for one in (value, value - state.start[name])])
        for name, value in state.memory.items()
        if value.is_floating_point() and not name.startswith("step_")
    ]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)
