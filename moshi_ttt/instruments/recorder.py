"""Record every step of a generation on the device, CUDA graphs included.

`LMGen` captures the forward pass in a CUDA graph, so Python in a hook runs once, at capture,
and never again. What does run at every replay are the *tensor operations* that the hook issued.
The hooks inside a step therefore issue none: they keep references to what passes by, and the end
of the step reduces all layers at once and writes into preallocated buffers at a step index that
is itself a device tensor. The number of kernels does not grow with the number of layers, and
nothing is synchronised until somebody reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from moshi_ttt.instruments.attention_mass import AttentionProbe
from moshi_ttt.instruments.latency import StepTimer
from moshi_ttt.memory import GatedDelta
from moshi_ttt.model.hybrid import HybridLayer, hybrid_layers
from moshi_ttt.model.rings import CacheSnapshot, attention_of, ring_of, ring_snapshots, snapshot

FAST_WEIGHT_STRIDE = 16
"""Steps between two looks at the fast weights: they are hundreds of MiB on Moshi 7B and change
little from step to step."""


class Recorder:
    """Buffers for `max_steps` steps of `batch_size` streams of one LM.

    Args:
        lm: the model, with its memory already added.
        batch_size: streams S.
        max_steps: steps T to make room for; a later step is an index error.
        attention: layers whose attention mass is looked at now and then; None costs nothing.
    """

    def __init__(
        self,
        lm: LMModel,
        batch_size: int,
        max_steps: int,
        attention: AttentionProbe | None = None,
    ) -> None:
        self._lm = lm
        self._layers = list(lm.transformer.layers)
        self._hybrids = hybrid_layers(lm)
        self._probe = attention
        self._device = lm.device
        layers, hybrids = len(self._layers), len(self._hybrids)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            fill = float("nan") if dtype.is_floating_point else -1
            return torch.full(shape, fill, dtype=dtype, device=self._device)

        self._step = torch.full((1,), -1, dtype=torch.long, device=self._device)
        per_layer = (max_steps, batch_size, layers)
        per_hybrid = (max_steps, batch_size, hybrids)
        self._buffers = {
            "residual_norms": buffer(max_steps, batch_size, 3 * layers),
            "input_max": buffer(*per_layer),
            "input_max_channel": buffer(*per_layer, dtype=torch.long),
            "ring_end_offset": buffer(*per_layer, dtype=torch.long),
            "text_input": buffer(max_steps, batch_size, 1, dtype=torch.long),
            "text_entropy": buffer(max_steps, batch_size, 1),
            "audio_entropy": buffer(max_steps, batch_size, 1),
            "branch_norms": buffer(max_steps, batch_size, 2 * hybrids),
            "branch_residual_norm": buffer(*per_hybrid),
            "write_gate": buffer(*per_hybrid),
            "forgetting": buffer(*per_hybrid),
            "inner_updates": buffer(*per_hybrid, dtype=torch.long),
        }
        samples = -(-max_steps // FAST_WEIGHT_STRIDE)
        self._fast_weight_norm = buffer(samples, batch_size, hybrids)
        self._gate_rms = buffer(hybrids)
        self._log_rates = buffer(0)
        if attention is not None:
            attention.prepare(lm, batch_size, max_steps)
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._depformer_rings: dict[str, CacheSnapshot] = {}
        self._timer = StepTimer(self._device)
        self.rings: list[CacheSnapshot] = []
        """Every ring by module path: as they were made, after the first step; as they stand at
        the end, after `finish`."""

    def _write(self, name: str, values: Tensor) -> None:
        """Store the values of all streams, [S, columns], at the current step."""
        target = self._buffers[name]
        target.index_copy_(0, self._step, values.view(1, *target.shape[1:]).to(target.dtype))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the scope is open; afterwards the model is as it was, also on an error."""
        lm = self._lm
        with ExitStack() as scope:
            scope.callback(self._seen.clear)

            def on_input(module: nn.Module, hook: Callable[..., None]) -> None:
                scope.callback(module.register_forward_pre_hook(hook).remove)

            def on_output(module: nn.Module, hook: Callable[..., None], **kwargs: bool) -> None:
                scope.callback(module.register_forward_hook(hook, **kwargs).remove)

            # first and last thing of a step: every write is at the index set by the first
            on_input(lm.text_emb, self._keep_input("text"))
            on_input(lm.transformer, self._begin_step)
            on_output(lm.transformer, self._end_step)
            for layer in self._layers:
                base: Any = layer.base if isinstance(layer, HybridLayer) else layer
                on_input(layer, self._keep_input("input"))
                # the layer scales (identities in Moshi) pass on what is really added
                on_output(base.layer_scale_1, self._keep_output("attention"))
                on_output(base.layer_scale_2, self._keep_output("ffn"))
            for layer in self._hybrids.values():
                on_output(layer.branch, self._keep_branch, with_kwargs=True)
                on_output(layer.branch.out_proj, self._keep_output("read_out"))
                on_output(layer.branch.rule.write, self._keep_output("write"))
                if isinstance(layer.branch.rule, GatedDelta):
                    on_output(layer.branch.rule.forget, self._keep_output("forget"))
            if self._probe is not None:
                for index in self._probe.layers:
                    on_input(attention_of(self._layers[index]), self._keep_input("query"))
            on_output(lm.text_linear, self._entropy_hook("text_entropy"))
            on_output(lm.linears[0], self._entropy_hook("audio_entropy"))
            for name, module in lm.depformer.named_modules(prefix="depformer"):
                if isinstance(module, StreamingMultiheadAttention):
                    on_output(module, self._depformer_ring_hook(name))
            self._read_constants()
            self._timer.start()
            yield

    @torch.no_grad()
    def _read_constants(self) -> None:
        """What the memories' parameters say once and for all: they do not learn in a run."""
        if not self._hybrids:
            return
        branches = [layer.branch for layer in self._hybrids.values()]
        gates = torch.stack([b.gate.tanh() if b.bounded else b.gate for b in branches]).float()
        self._gate_rms = gates.square().mean(dim=1).sqrt()
        self._log_rates = torch.stack([b.rule.log_rate for b in branches]).float()  # [M, H]
        # where forgetting does not depend on the data it stays at this
        self._buffers["forgetting"][:] = self._log_rates.exp().mean(dim=1)

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name].append(args[0])

        return hook

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[name].append(output)

        return hook

    def _keep_branch(
        self, _: nn.Module, __: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        self._seen["branch_residual"].append(kwargs["residual"])
        self._seen["branch"].append(output)

    def _begin_step(self, *_: Any) -> None:
        self._step.add_(1)

    def _end_step(self, *_: Any) -> None:
        # [B, 3 L, D]: one copy and one reduction instead of one for each layer
        seen, layers = self._seen, len(self._layers)
        added = torch.cat([*seen["input"], *seen["attention"], *seen["ffn"]], dim=1)
        self._write("residual_norms", _norm(added))
        largest, channel = added[:, :layers].abs().max(dim=-1)
        self._write("input_max", largest)
        self._write("input_max_channel", channel)
        rings = [ring_of(attention_of(layer)) for layer in self._layers]
        self._write("text_input", seen["text"][0])
        self._write("ring_end_offset", torch.stack([ring.end_offset for ring in rings], dim=1))
        if self._hybrids:
            self._end_step_of_memories()
        if self._probe is not None:
            self._probe.keep(seen["query"])
        if not self.rings:
            # no reading here: a graph may be being captured
            names = {module: name for name, module in self._lm.named_modules()}
            self.rings = [
                snapshot(names[attention_of(layer)], ring, 0)
                for layer, ring in zip(self._layers, rings, strict=True)
            ]
        seen.clear()

    def _end_step_of_memories(self) -> None:
        seen = self._seen
        norms = _norm(torch.cat([*seen["read_out"], *seen["branch"]], dim=1))
        self._write("branch_norms", norms)
        self._write("branch_residual_norm", _norm(torch.cat(seen["branch_residual"], dim=1)))
        # write gates and forgetting rates, [B, M, H], averaged over the heads
        self._write("write_gate", torch.cat(seen["write"], dim=1).sigmoid().mean(dim=-1))
        if seen["forget"]:
            rules = [cast(GatedDelta, layer.branch.rule) for layer in self._hybrids.values()]
            rates = [rule.log_rates(raw) for rule, raw in zip(rules, seen["forget"], strict=True)]
            log_rates = torch.cat(rates, dim=1)
            self._write("forgetting", log_rates.exp().mean(dim=-1))
        updates = [layer.branch.updates() for layer in self._hybrids.values()]
        self._write("inner_updates", torch.stack(updates, dim=1))

    def _entropy_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
            log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
            self._write(name, -(log_p.exp() * log_p).sum(dim=-1))

        return hook

    def _depformer_ring_hook(self, name: str) -> Callable[..., None]:
        # the depformer's rings live within one step and all steps are alike, so what is seen
        # while the graph is captured holds for every replay
        def hook(module: StreamingMultiheadAttention, *_: Any) -> None:
            ring, before = ring_of(module), self._depformer_rings.get(name)
            end_offset = 1 if before is None else min(before.end_offset + 1, ring.capacity)
            self._depformer_rings[name] = snapshot(name, ring, end_offset)

        return hook

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """What is done outside the graph, between two steps: launches, never waits.

        Args:
            step: the step that was just generated, from 0.
        """
        self._timer.mark()
        if step == 0:
            self.rings += self._depformer_rings.values()
        if self._hybrids and step % FAST_WEIGHT_STRIDE == 0:
            norms = [_fast_weight_norm(layer) for layer in self._hybrids.values()]
            self._fast_weight_norm[step // FAST_WEIGHT_STRIDE] = torch.stack(norms, dim=1)
        if self._probe is not None:
            self._probe.after_step(step)

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
        if (self._buffers["ring_end_offset"][:generated_steps] < 0).any():
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
        self.rings = ring_snapshots(self._lm) + list(self._depformer_rings.values())

    def read(self, first: int, stop: int) -> dict[str, Any]:
        """Steps `first` to `stop` - 1 as `Trace` fields, [S, rows, steps] (waits for the device).

        Besides, `text_input` [S, steps]: the text token that each step read, i.e. the one of the
        step before. Reading in blocks is what keeps a log from waiting at every step.
        """
        rows = {
            name: values[first:stop].permute(1, 2, 0).contiguous().cpu().numpy()
            for name, values in self._buffers.items()
        }
        norms = np.split(rows.pop("residual_norms"), 3, axis=1)
        rows |= zip(("input_norm", "attention_norm", "ffn_norm"), norms, strict=True)
        for name in ("text_entropy", "audio_entropy", "text_input"):
            rows[name] = rows[name][:, 0]
        read_out, rows["branch_norm"] = np.split(rows.pop("branch_norms"), 2, axis=1)
        residual = rows.pop("branch_residual_norm")
        bounded = np.array([layer.branch.bounded for layer in self._hybrids.values()], dtype=bool)
        # the same bound as `MemoryBranch.forward`, in terms of norms
        mean_square = np.square(read_out) / self._lm.dim
        bound = residual * self._lm.dim**-0.5 / np.sqrt(1 + mean_square)
        rows["branch_raw_norm"] = np.where(bounded[:, None], read_out * bound, read_out)
        with np.errstate(invalid="ignore", divide="ignore"):
            rows["branch_ratio"] = rows["branch_norm"] / residual
        rows["gate"] = np.empty_like(rows["branch_norm"])
        rows["gate"][:] = self._gate_rms.cpu().numpy()[:, None]
        looks = self._fast_weight_norm.permute(1, 2, 0).cpu().numpy()
        rows["fast_weight_norm"] = looks[..., np.arange(first, stop) // FAST_WEIGHT_STRIDE]
        rows["step_ms"] = self._timer.read_ms(first, stop)
        return rows

    def arrays(self) -> dict[str, Any]:
        """All that was recorded, as `Trace` fields: [S, layers, T], entropies [S, T]."""
        arrays = self.read(0, self.recorded_steps)
        del arrays["text_input"]  # the trace has the tokens themselves
        return arrays | (self._probe.arrays() if self._probe is not None else {})


def _norm(x: Tensor) -> Tensor:
    """L2 norm over channels, at least fp32, without a copy in fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def _fast_weight_norm(layer: HybridLayer) -> Tensor:
    """L2 norm of all fast weights of a memory, [B]; sums within a mini-batch are none."""
    memory = layer.branch.get_streaming_state()[""].memory
    norms = [
        torch.linalg.vector_norm(value.flatten(1), dim=1)
        for name, value in memory.items()
        if value.is_floating_point() and not name.startswith("step_")
    ]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)
