"""Record every step of a generation on the device, CUDA graphs included.

`LMGen` captures the forward pass in a CUDA graph, so Python in a hook runs once, at capture,
and never again. What does run at every replay are the *tensor operations* that the hook issued:
each of ours writes into a preallocated buffer at a step index that is itself a device tensor.
Nothing is synchronised until the run is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from moshi_ttt.hybrid import BranchStats, hybrid_layers
from moshi_ttt.trace import CacheSnapshot


class Recorder:
    """Buffers for `max_steps` steps of `batch_size` streams of one LM.

    Args:
        lm: the model, with its memory already added.
        batch_size: streams S.
        max_steps: steps T to make room for; a later step is an index error.
    """

    def __init__(self, lm: LMModel, batch_size: int, max_steps: int) -> None:
        self._lm = lm
        self._hybrids = hybrid_layers(lm)
        layers, hybrids, device = len(lm.transformer.layers), len(self._hybrids), lm.device

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            fill = float("nan") if dtype.is_floating_point else -1
            return torch.full(shape, fill, dtype=dtype, device=device)

        self._step = torch.full((1,), -1, dtype=torch.long, device=device)
        per_layer = (layers, max_steps, batch_size)
        per_hybrid = (hybrids, max_steps, batch_size)
        self._buffers = {
            "input_norm": buffer(*per_layer),
            "ring_end_offset": buffer(*per_layer, dtype=torch.long),
            "branch_raw_norm": buffer(*per_hybrid),
            "branch_norm": buffer(*per_hybrid),
            "branch_ratio": buffer(*per_hybrid),
            "gate": buffer(*per_hybrid),
            "inner_updates": buffer(*per_hybrid, dtype=torch.long),
            "text_entropy": buffer(1, max_steps, batch_size),
            "audio_entropy": buffer(1, max_steps, batch_size),
        }
        self._depformer_rings: dict[str, CacheSnapshot] = {}
        self.rings: list[CacheSnapshot] = []
        """Every ring by module path at the end of the run; filled by `finish`."""

    def _write(self, name: str, row: int, value: Tensor) -> None:
        target = self._buffers[name][row]
        target.index_copy_(0, self._step, value.to(target.dtype).expand(1, target.shape[1]))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the scope is open; afterwards the model is as it was, also on an error."""
        with ExitStack() as scope:

            def on_input(module: nn.Module, hook: Callable[..., None]) -> None:
                scope.callback(module.register_forward_pre_hook(hook).remove)

            def on_output(module: nn.Module, hook: Callable[..., None]) -> None:
                scope.callback(module.register_forward_hook(hook).remove)

            # the first thing of a step: every write below is at the index set here
            on_input(self._lm.transformer, self._next_step)
            for row, layer in enumerate(self._lm.transformer.layers):
                on_input(layer, self._input_norm_hook(row))
                on_output(_attention(layer), self._ring_hook(row))
            for row, layer in enumerate(self._hybrids.values()):
                scope.callback(setattr, layer.branch, "observer", layer.branch.observer)
                layer.branch.observer = self._branch_hook(row)
                on_output(layer, self._updates_hook(row))
            on_output(self._lm.text_linear, self._entropy_hook("text_entropy"))
            on_output(self._lm.linears[0], self._entropy_hook("audio_entropy"))
            for name, module in self._lm.depformer.named_modules(prefix="depformer"):
                if isinstance(module, StreamingMultiheadAttention):
                    on_output(module, self._depformer_ring_hook(name))
            yield

    def _next_step(self, *_: Any) -> None:
        self._step.add_(1)

    def _input_norm_hook(self, row: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._write("input_norm", row, args[0].float().norm(dim=-1).view(1, -1))

        return hook

    def _ring_hook(self, row: int) -> Callable[..., None]:
        def hook(module: StreamingMultiheadAttention, *_: Any) -> None:
            self._write("ring_end_offset", row, _ring(module).end_offset.view(1, -1))

        return hook

    def _depformer_ring_hook(self, name: str) -> Callable[..., None]:
        # the depformer's rings live within one step and all steps are alike, so what is seen
        # while the graph is captured holds for every replay
        def hook(module: StreamingMultiheadAttention, *_: Any) -> None:
            written = self._depformer_rings.get(name)
            end_offset = 1 if written is None else written.end_offset + 1
            capacity = _ring(module).capacity
            self._depformer_rings[name] = CacheSnapshot(name, min(end_offset, capacity), capacity)

        return hook

    def _branch_hook(self, row: int) -> Callable[[BranchStats], None]:
        def observe(stats: BranchStats) -> None:
            self._write("branch_raw_norm", row, stats.raw_norm.view(1, -1))
            self._write("branch_norm", row, stats.norm.view(1, -1))
            self._write("branch_ratio", row, stats.ratio.view(1, -1))
            self._write("gate", row, stats.gate_rms.view(1, 1))

        return observe

    def _updates_hook(self, row: int) -> Callable[..., None]:
        def hook(module: Any, *_: Any) -> None:
            self._write("inner_updates", row, module.branch.updates().view(1, -1))

        return hook

    def _entropy_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
            log_p = logits.float().log_softmax(dim=-1)
            self._write(name, 0, -(log_p.exp() * log_p).sum(dim=-1).view(1, -1))

        return hook

    @property
    def recorded_steps(self) -> int:
        """Steps recorded so far (synchronises with the device)."""
        return int(self._step.item()) + 1

    def finish(self, generated_steps: int) -> None:
        """Close the record at the end of a run, while the rings still exist.

        Raises:
            RuntimeError: a step was generated and not recorded, or the other way round; or a
                memory made no inner update in a run long enough for one.
        """
        if self.recorded_steps != generated_steps:
            raise RuntimeError(f"recorded {self.recorded_steps} of {generated_steps} steps")
        if (self._buffers["ring_end_offset"][:, :generated_steps] < 0).any():
            raise RuntimeError("a layer was not recorded at every step")
        for index, layer in self._hybrids.items():
            expected = generated_steps // layer.branch.rule.steps_per_update
            if expected and int(layer.branch.updates().min()) != expected:
                raise RuntimeError(
                    f"layer {index}: {int(layer.branch.updates().min())} inner updates in "
                    f"{generated_steps} steps, expected {expected}; the memory is not adapting"
                )
        # the depformer writes and drops its rings within each step: theirs is the fill at the
        # end of one
        self.rings = [
            CacheSnapshot(name, int(_ring(module).end_offset.max()), _ring(module).capacity)
            for name, module in self._lm.named_modules()
            if isinstance(module, StreamingMultiheadAttention) and module.is_streaming
        ] + list(self._depformer_rings.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """What was recorded, as `Trace` fields: [S, layers, T], entropies [S, T]."""
        steps = self.recorded_steps
        arrays = {
            name: values[:, :steps].permute(2, 0, 1).contiguous().cpu().numpy()
            for name, values in self._buffers.items()
        }
        for name in ("text_entropy", "audio_entropy"):
            arrays[name] = arrays[name][:, 0]
        return arrays


def _attention(layer: nn.Module) -> StreamingMultiheadAttention:
    return next(m for m in layer.modules() if isinstance(m, StreamingMultiheadAttention))


def _ring(module: StreamingModule) -> Any:
    """The `RingKVCache` of a streaming attention."""
    return module.get_streaming_state()[""].kv_cache
