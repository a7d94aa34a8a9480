"""Where chosen layers look: attention on the first key, on the sinks, on the oldest keys.

moshi's fused attention never forms its weights. They are computed again outside the CUDA graph,
from the keys in the ring and from the query's input, which the step leaves in a buffer; that
costs something only when it is asked for, and only every n-th step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention, expand_repeated_kv
from moshi.utils.compile import no_compile
from torch import Tensor

from moshi_ttt.errors import check_fields, check_setting
from moshi_ttt.model.rings import attention_of, held_positions, ring_of

PARTS = ("first_key", "sinks", "oldest_quarter")
"""What the last axis of an attention mass is: position 0; the first positions, 0 included; the
lowest quarter of the positions in the ring. They overlap."""


def attention_mass(
    attention: StreamingMultiheadAttention, query_input: Tensor, sinks: int
) -> Tensor:
    """Attention weight of the last step on the `PARTS`, averaged over heads.

    Args:
        attention: after that step, still streaming.
        query_input: what the attention was called with, [B, 1, D].
        sinks: how many of the first positions count as sinks.

    Returns:
        [B, 3], shares of 1; 0 for keys that the ring no longer holds.
    """
    state = attention.get_streaming_state()[""]
    ring = ring_of(attention)
    projected = attention.in_projs[0](query_input)[..., : attention.embed_dim]
    q = projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    if attention.rope:
        # the offset already points to the next step; compiling it again costs more than it gives
        with no_compile():
            q, _ = attention.rope(q, q, state.offset - 1, time_before_heads=False)
    keys = ring.cache[0]
    if attention.kv_repeat > 1:
        keys = expand_repeated_kv(keys, attention.kv_repeat)
    held = held_positions(ring)  # [B, C]
    valid = held >= 0
    scores = (q.float() @ keys.float().mT).squeeze(2) * q.shape[-1] ** -0.5  # [B, H, C]
    weights = scores.masked_fill(~valid[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)
    count = valid.sum(dim=1, keepdim=True)
    # rank of each held position among those held, from the oldest
    rank = (held[:, None] < held[:, :, None]).logical_and(valid[:, None]).sum(dim=-1)
    parts = [held == 0, held < sinks, rank < (count + 3) // 4]
    return torch.stack([(weights * (part & valid)).sum(dim=1) for part in parts], dim=1)


def no_looks(streams: int) -> dict[str, np.ndarray]:
    """`Trace` fields of a run whose attention was not looked at."""
    return {
        "attention_mass": np.zeros((streams, 0, 0, len(PARTS)), dtype=np.float32),
        "attention_mass_layers": np.zeros(0, dtype=np.int64),
        "attention_mass_steps": np.zeros(0, dtype=np.int64),
    }


@dataclass(eq=False)
class AttentionWatch:
    """Attention mass of chosen layers at every n-th step; for one run."""

    layers: list[int]
    """Indices of temporal layers."""
    every_n_steps: int = 25
    """Steps between two looks; 25 steps = 2 s."""
    sinks: int = 4
    """How many of the first positions count as sinks."""
    _attentions: list[StreamingMultiheadAttention] = field(default_factory=list, init=False)
    _inputs: Tensor | None = field(default=None, init=False)  # [B, A, D]
    _masses: Tensor | None = field(default=None, init=False)  # [N, B, A, 3]
    _looks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_fields(self, "every_n_steps", "sinks", least=1)
        distinct = 0 < len(self.layers) == len(set(self.layers))
        self._check_layers(distinct, "must name distinct layers, e.g. [0]")

    def _check_layers(self, holds: bool, rule: str) -> None:
        # the key of `LongRunConfig`, which is where users name them
        check_setting(holds, "attention_layers", self.layers, rule)

    def prepare(self, lm: LMModel, batch_size: int, max_steps: int) -> None:
        """Make room for a run.

        Raises:
            UserError: a layer that the model does not have.
        """
        count = len(lm.transformer.layers)
        self._check_layers(
            all(0 <= layer < count for layer in self.layers),
            f"names a layer outside 0..{count - 1} of the model",
        )
        self._attentions = [attention_of(lm.transformer.layers[index]) for index in self.layers]
        rows = len(self.layers)
        self._inputs = torch.zeros(batch_size, rows, lm.dim, dtype=lm.dtype, device=lm.device)
        looks = -(-max_steps // self.every_n_steps)
        self._masses = torch.full(
            (looks, batch_size, rows, len(PARTS)), float("nan"), device=lm.device
        )
        self._looks = 0

    def keep(self, inputs: list[Tensor]) -> None:
        """Called at the end of each step, inside the graph, with what the layers were given."""
        assert self._inputs is not None
        self._inputs.copy_(torch.cat(inputs, dim=1))

    def after_step(self, step: int) -> None:
        """Called between steps: looks if it is time to."""
        if step % self.every_n_steps:
            return
        assert self._inputs is not None
        assert self._masses is not None
        for row, attention in enumerate(self._attentions):
            query_input = self._inputs[:, row : row + 1]
            self._masses[self._looks, :, row] = attention_mass(attention, query_input, self.sinks)
        self._looks += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """As `Trace` fields."""
        assert self._masses is not None
        looked = self._masses[: self._looks].permute(1, 2, 0, 3)
        return {
            "attention_mass": looked.cpu().numpy(),
            "attention_mass_layers": np.array(self.layers),
            "attention_mass_steps": np.arange(self._looks) * self.every_n_steps,
        }
