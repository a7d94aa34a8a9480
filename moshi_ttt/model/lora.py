"""LoRA through PEFT, alive in every module it is put on, in training and in streaming.

Two places in moshi look at the type of a Linear, and a PEFT layer is not an `nn.Linear`:
- `StreamingMultiheadAttention._init_streaming_state` raises for it; `AdapterAttention` shows it
  the base layer while the state is made.
- `ActivationGating.forward` reads `.weight` directly if `linear_in` is an `nn.Linear`, and then
  asserts that `linear_out` is one too; so the feed-forward adapters always come as a pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import nn

from moshi_ttt.errors import SettingError, UserError, check_fields, check_setting
from moshi_ttt.model.attention import ParallelAttention

Target = Literal["qkv", "attention_out", "ffn", "depformer"]

# relative to the LM; `base.` where a memory wraps the layer
_LAYER = r"transformer\.layers\.\d+\.(base\.)?"
_PATTERNS: dict[str, str] = {
    "qkv": _LAYER + r"self_attn\.in_projs\.\d+",
    "attention_out": _LAYER + r"self_attn\.out_projs\.\d+",
    "ffn": _LAYER + r"gating\.linear_(in|out)",
    "depformer": r"depformer\..*(in_projs\.\d+|out_projs\.\d+|linear_in|linear_out)"
    r"|depformer_in\.\d+|linears\.\d+",
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the base model."""

    rank: int = 16
    """Rank r of the update B A."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, 0..1."""
    targets: tuple[Target, ...] = ("qkv", "attention_out", "ffn")
    """Modules that get an adapter: `qkv` and `attention_out` (temporal attention), `ffn` (both
    matrices of the temporal feed-forward), `depformer` (all its matrices and output heads)."""

    def __post_init__(self) -> None:
        check_fields(self, "rank", least=1)
        check_fields(self, "alpha", above=0)
        check_fields(self, "dropout", least=0, below=1)
        check_setting(
            len(self.targets) > 0 and set(self.targets) <= set(get_args(Target)),
            "targets",
            list(self.targets),
            f"must name one or more of {', '.join(get_args(Target))}",
        )


class AdapterAttention(ParallelAttention):
    """moshi's attention with projections that may be PEFT layers.

    Its streaming state takes device and dtype from `in_projs[0]` and knows three types of
    Linear; it is shown the base layers.
    """

    def _init_streaming_state(self, batch_size: int):  # type: ignore[no-untyped-def]
        adapted = self.in_projs
        self.in_projs = nn.ModuleList([getattr(one, "base_layer", one) for one in adapted])
        try:
            return super()._init_streaming_state(batch_size)
        finally:
            self.in_projs = adapted


def add_lora(lm: LMModel, config: LoraConfig) -> list[str]:
    """Put adapters on the chosen modules, in place; base weights must be loaded before.

    Args:
        lm: model that has not streamed yet.
        config: what to adapt.

    Returns:
        Names of the adapted modules.

    Raises:
        UserError: a target matches no module of this model.
    """
    # importing peft takes seconds, and most runs have no adapters
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if lm._cached_children is not None:
        raise UserError("the model has streamed already; add LoRA before the first generation")
    for target in config.targets:
        pattern = _PATTERNS[target]
        if not any(_matches(pattern, name, module) for name, module in lm.named_modules()):
            raise SettingError(
                "targets", f": {target!r} matches no Linear of this model; remove it"
            )
    inject_adapter_in_model(
        PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="|".join(_PATTERNS[target] for target in config.targets),
        ),
        lm,
    )
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if (
                isinstance(child, StreamingMultiheadAttention)
                and not isinstance(child, AdapterAttention)
                and any(isinstance(part, LoraLayer) for part in child.modules())
            ):
                setattr(module, name, AdapterAttention.adopt(child))
    adapted = {name: one for name, one in lm.named_modules() if isinstance(one, LoraLayer)}
    for layer in adapted.values():
        # the small matrices learn in fp32 whatever the base is stored in
        layer.lora_A.float()
        layer.lora_B.float()
    return list(adapted)


@contextmanager
def adapters_off(lm: LMModel) -> Iterator[None]:
    """Run without adapters inside the scope; a model without any is as it is."""
    layers = [one for one in lm.modules() if callable(getattr(one, "enable_adapters", None))]
    try:
        for layer in layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # type: ignore[operator]


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and re.fullmatch(pattern, name) is not None
