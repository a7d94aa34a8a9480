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
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from moshi_ttt.instruments.attention_mass import AttentionWatch, no_looks
from moshi_ttt.instruments.buffers import Buffers
from moshi_ttt.instruments.latency import StepTimer
from moshi_ttt.instruments.memory_watch import MemoryWatch, l2_norm
from moshi_ttt.model.hybrid import HybridLayer
from moshi_ttt.model.rings import CacheSnapshot, attention_of, ring_of, ring_snapshots, snapshot


class Recorder:
    """Records `max_steps` steps of `batch_size` streams of one LM.

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
        attention: AttentionWatch | None = None,
    ) -> None:
        self._lm = lm
        self._batch_size = batch_size
        self._layers = list(lm.transformer.layers)
        layers = len(self._layers)
        self._buffers = Buffers(max_steps, batch_size, lm.device)
        self._buffers.add(3 * layers, "residual_norms")
        self._buffers.add(layers, "input_max")
        self._buffers.add(layers, "input_max_channel", "ring_end_offset", dtype=torch.long)
        self._buffers.add(1, "text_input", dtype=torch.long)
        self._buffers.add(1, "text_entropy", "audio_entropy")
        self._memories = MemoryWatch(lm, self._buffers, batch_size, max_steps)
        self._attention = attention
        if attention is not None:
            attention.prepare(lm, batch_size, max_steps)
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._depformer_rings: dict[str, CacheSnapshot] = {}
        self._timer = StepTimer(lm.device)
        self.rings: list[CacheSnapshot] = []
        """Every ring by module path: as they were made, after the first step; as they stand at
        the end, after `finish`."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the scope is open; afterwards the model is as it was, also on an error."""
        lm = self._lm
        with ExitStack() as scope:
            scope.callback(self._seen.clear)
            scope.enter_context(self._memories.attached())

            def on_input(module: nn.Module, hook: Callable[..., None]) -> None:
                scope.callback(module.register_forward_pre_hook(hook).remove)

            def on_output(module: nn.Module, hook: Callable[..., None], **kwargs: bool) -> None:
                scope.callback(module.register_forward_hook(hook, **kwargs).remove)

            # first and last thing of a step: every write is at the index set by the first
            on_input(lm.text_emb, self._keep_input("text"))
            on_input(lm.transformer, self._buffers.next_step)
            on_output(lm.transformer, self._end_step)
            for layer in self._layers:
                base: Any = layer.base if isinstance(layer, HybridLayer) else layer
                on_input(layer, self._keep_input("input"))
                # the layer scales (identities in Moshi) pass on what is really added
                on_output(base.layer_scale_1, self._keep_output("attention"))
                on_output(base.layer_scale_2, self._keep_output("ffn"))
            if self._attention is not None:
                for index in self._attention.layers:
                    on_input(attention_of(self._layers[index]), self._keep_input("query"))
            on_output(lm.text_linear, self._entropy_hook("text_entropy"))
            on_output(lm.linears[0], self._entropy_hook("audio_entropy"))
            for name, module in lm.depformer.named_modules(prefix="depformer"):
                if isinstance(module, StreamingMultiheadAttention):
                    on_output(module, self._depformer_ring_hook(name))
            self._timer.start()
            yield

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name].append(args[0])

        return hook

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[name].append(output)

        return hook

    def _end_step(self, *_: Any) -> None:
        # [B, 3 L, D]: one copy and one reduction instead of one for each layer
        seen, layers, write = self._seen, len(self._layers), self._buffers.write
        added = torch.cat([*seen["input"], *seen["attention"], *seen["ffn"]], dim=1)
        write("residual_norms", l2_norm(added))
        largest, channel = added[:, :layers].abs().max(dim=-1)
        write("input_max", largest)
        write("input_max_channel", channel)
        rings = [ring_of(attention_of(layer)) for layer in self._layers]
        write("text_input", seen["text"][0])
        write("ring_end_offset", torch.stack([ring.end_offset for ring in rings], dim=1))
        self._memories.end_step()
        if self._attention is not None:
            self._attention.keep(seen["query"])
        if not self.rings:
            # no reading here: a graph may be being captured
            names = {module: name for name, module in self._lm.named_modules()}
            self.rings = [
                snapshot(names[attention_of(layer)], ring, 0)
                for layer, ring in zip(self._layers, rings, strict=True)
            ]
        seen.clear()

    def _entropy_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
            log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
            self._buffers.write(name, -(log_p.exp() * log_p).sum(dim=-1))

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
        self._memories.after_step(step)
        if self._attention is not None:
            self._attention.after_step(step)

    @contextmanager
    def reading_again(self, first: int, remembers: bool) -> Iterator[None]:
        """Leave out what comes in this scope, as `Observer` has it."""
        if not remembers:
            self._memories.begin_again(first)
        with self._buffers.aside():
            yield

    @property
    def recorded_steps(self) -> int:
        """Steps recorded so far (synchronises with the device)."""
        return self._buffers.steps

    def finish(self, generated_steps: int) -> None:
        """Close the record at the end of a run, while the rings still exist.

        Raises:
            RuntimeError: a step was generated and not recorded, or the other way round; or a
                memory made no inner update in a run long enough for one.
        """
        if self.recorded_steps != generated_steps:
            raise RuntimeError(f"recorded {self.recorded_steps} of {generated_steps} steps")
        if self._buffers.lacks("ring_end_offset", generated_steps):
            raise RuntimeError("a layer was not recorded at every step")
        self._memories.check(generated_steps)
        # the depformer writes and drops its rings within each step: theirs is the fill at the
        # end of one
        self.rings = ring_snapshots(self._lm) + list(self._depformer_rings.values())

    def read(self, first: int, stop: int) -> dict[str, Any]:
        """Steps `first` to `stop` - 1 as `Trace` fields, [S, rows, steps] (waits for the device).

        Besides, `text_input` [S, steps]: the text token that each step read, i.e. the one of the
        step before. Reading in blocks is what keeps a log from waiting at every step.
        """
        rows: dict[str, Any] = self._buffers.read(first, stop)
        norms = np.split(rows.pop("residual_norms"), 3, axis=1)
        rows |= zip(("input_norm", "attention_norm", "ffn_norm"), norms, strict=True)
        for name in ("text_entropy", "audio_entropy", "text_input"):
            rows[name] = rows[name][:, 0]
        self._memories.derive(rows, first, stop)
        rows["step_ms"] = self._timer.read_ms(first, stop)
        return rows

    def arrays(self) -> dict[str, Any]:
        """All that was recorded, as `Trace` fields: [S, layers, T], entropies [S, T]."""
        arrays = self.read(0, self.recorded_steps)
        del arrays["text_input"]  # the trace has the tokens themselves
        arrays["head_forgetting"] = self._memories.head_forgetting()
        attention = self._attention
        return arrays | (no_looks(self._batch_size) if attention is None else attention.arrays())
