"""The model that is trained: a base Moshi, what is added to it, and which of it learns."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from moshi.models.lm import LMModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moshi_ttt.errors import UserError
from moshi_ttt.instruments.trace import write_bytes
from moshi_ttt.memory import MemoryConfig, resolve_layers
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.lora import LoraConfig, add_lora
from moshi_ttt.model.source import ModelSource, open_source

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
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.train in TRAIN_BASE and self.dtype != "float32":
            raise UserError(
                f"model.train={self.train} with model.dtype=bfloat16 would lose small updates of "
                "the base weights; set model.dtype=float32 (and trainer.precision=bf16-mixed for "
                "speed)"
            )
        if self.context_steps is not None and self.context_steps < 2:
            raise UserError(
                f"model.context_steps={self.context_steps} must be at least 2 steps, or null for "
                "the checkpoint's own"
            )


def check_fits(config: ModelConfig, source: ModelSource) -> None:
    """Hold a config against the checkpoint's, before anything is loaded or encoded.

    Raises:
        UserError: the memory's layers or heads do not fit the model.
    """
    if config.train in WITH_MEMORY:
        resolve_layers(config.memory.layers, source.num_layers)
        config.memory.resolved_head_dim(source.dim)


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
    """
    lm = source.lm(
        device=device,
        dtype=getattr(torch, config.dtype),
        context_steps=config.context_steps,
        gradient_checkpointing=gradient_checkpointing,
    )
    lm.requires_grad_(config.train in TRAIN_BASE)
    if "lora" in config.train:
        add_lora(lm, config.lora)
    if config.train in WITH_MEMORY:
        add_memory(lm, config.memory)
    return lm


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


def save_trained(
    path: Path, weights: dict[str, Tensor], config: ModelConfig, trained_steps: int
) -> None:
    """Write trainable weights as safetensors, atomically, with what is needed to use them.

    Args:
        path: file to write.
        weights: trainable parameters by their name in the LM.
        config: how the model was built.
        trained_steps: clip length of the training, in steps.
    """
    metadata = {
        "format": "moshi-ttt 1",
        "config": json.dumps(dataclasses.asdict(config)),
        "trained_steps": str(trained_steps),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_bytes(path, save(tensors, metadata))


def load_trained(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[LMModel, ModelSource, ModelConfig, int]:
    """Build the model of a file that `save_trained` wrote, and load its weights.

    Args:
        path: the `.safetensors` file, or the Lightning checkpoint it lies beside.
        device: where to put the model.

    Returns:
        LM in eval mode, its source, its config, and the clip length it was trained on in steps.

    Raises:
        UserError: no such file, or not one of ours.
    """
    path = path.with_suffix(".safetensors")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give RUN/checkpoints/last.ckpt or the .safetensors beside it"
        )
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); copy it again") from error
    if metadata.get("format") != "moshi-ttt 1":
        raise UserError(f"{path} holds no moshi-ttt weights; give a file of RUN/checkpoints")
    config = _config_from_dict(json.loads(metadata["config"]))
    source = open_source(config.source)
    lm = build_lm(config, source, device)
    expected = {name for group in trainable_groups(lm).values() for name in group}
    if expected != weights.keys():
        raise UserError(f"{path} does not fit its own config; it was written by another version")
    lm.load_state_dict(weights, strict=False)
    return lm.eval(), source, config, int(metadata["trained_steps"])


def _config_from_dict(values: dict[str, Any]) -> ModelConfig:
    def tuples(part: dict[str, Any]) -> dict[str, Any]:
        # JSON has no tuples, and the configs have no other sequences
        return {key: tuple(v) if isinstance(v, list) else v for key, v in part.items()}

    memory = MemoryConfig(**tuples(values.pop("memory")))
    lora = LoraConfig(**tuples(values.pop("lora")))
    return ModelConfig(**values, memory=memory, lora=lora)
