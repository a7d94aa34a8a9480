"""The model that is trained: a base Moshi, what is added to it, and which of it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.errors import check_bounds, check_fields, check_setting, settings_at
from moshi_ttt.memory import MemoryConfig, resolve_layers
from moshi_ttt.model.hybrid import add_memory, hybrid_layers
from moshi_ttt.model.inspection import LONGEST_CONTEXT_STEPS
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.sinks import check_thinning, keep
from moshi_ttt.model.source import ModelSource

Trained = Literal["memory", "lora", "memory+lora", "base", "full"]
Dtype = Literal["float32", "bfloat16"]
TRAIN_BASE = ("base", "full")  # Moshi's own weights learn
WITH_MEMORY = ("memory", "memory+lora", "full")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to build the model again; saved with its weights."""

    source: str
    dtype: Dtype
    context_steps: int | None
    train: Trained
    sinks: int = 0
    thinning: int = 0
    farthest_steps: int | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_setting(
            self.train not in TRAIN_BASE or self.dtype == "float32",
            "train",
            self.train,
            f"with dtype={self.dtype} would lose small updates of the base weights; set "
            "dtype=float32 (and bf16-mixed as the trainer's precision, for speed)",
        )
        own = "use null for the checkpoint's own"
        check_fields(self, "context_steps", least=2, most=LONGEST_CONTEXT_STEPS, remedy=own)
        most = (self.context_steps or LONGEST_CONTEXT_STEPS) - 1
        check_fields(self, "sinks", least=0, most=most, remedy="they stand beside the window")
        check_thinning("thinning", self.thinning, self.context_steps)
        check_fields(self, "farthest_steps", least=1, remedy="null bounds no distance")


def check_fits(config: ModelConfig, source: ModelSource) -> None:
    """Hold a config against the checkpoint's, before anything is loaded or encoded.

    Raises:
        UserError: the memory's layers or heads, or the adapters' rank, do not fit the model.
    """
    if "lora" in config.train:
        remedy = "the model has no more channels; use e.g. 16"
        check_bounds("lora.rank", config.lora.rank, most=source.dim, remedy=remedy)
    if config.train in WITH_MEMORY:
        with settings_at("memory"):
            resolve_layers(config.memory.layers, source.num_layers)
            config.memory.fitted(source.dim, source.num_heads)


def build_lm(
    config: ModelConfig,
    source: ModelSource,
    device: torch.device | str = "cpu",
    gradient_checkpointing: bool = False,
) -> LMModel:
    """Load the base, add LoRA and memory as `config.train` says, freeze the rest.

    `memory` and `lora` leave Moshi's own weights alone; `base` trains them and adds nothing, which
    is plain Moshi from wherever `source` starts; `full` trains them and a memory.

    Args:
        config: what to build.
        source: opened `config.source`.
        device: where to put it.
        gradient_checkpointing: recompute layers in the backward pass.

    Raises:
        UserError: they do not fit, which is said before anything is loaded.
    """
    check_fits(config, source)
    lm = source.lm(
        device=device,
        dtype=getattr(torch, config.dtype),
        context_steps=config.context_steps,
        gradient_checkpointing=gradient_checkpointing,
    )
    lm.requires_grad_(config.train in TRAIN_BASE)
    if "lora" in config.train:
        with settings_at("lora"):
            add_lora(lm, config.lora)
    if config.train in WITH_MEMORY:
        with settings_at("memory"):
            add_memory(lm, config.memory)
    if config.sinks or config.thinning or config.farthest_steps is not None:
        keep(
            lm,
            sinks=config.sinks,
            thinning=config.thinning,
            farthest_steps=config.farthest_steps,
        )
    return lm


def recompute_layers(lm: LMModel, recompute: bool) -> None:
    """Set activation checkpointing of a built model: each layer's forward again in backward."""
    lm.transformer.checkpointing = lm.depformer.checkpointing = recompute
    for layer in hybrid_layers(lm).values():
        layer.branch.recomputed = recompute


def trainable_groups(lm: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by name, in the groups that have learning rates of their own.

    `gates`: output gates of the memories; `memory`: the rest of the memories; `rest`: LoRA or
    base weights. Groups without a parameter are left out.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            group = "rest"
            if ".branch." in name:
                group = "gates" if name.endswith(".branch.gate") else "memory"
            groups.setdefault(group, {})[name] = parameter
    return groups
