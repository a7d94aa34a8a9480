"""Trained weights as safetensors, with what is needed to use them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moshi_ttt.errors import SettingError, UserError, settings_at
from moshi_ttt.files import write_bytes
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import TRAIN_BASE, ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import ASSETS, TINY, ModelSource, open_source


def save_trained(
    path: Path,
    weights: dict[str, Tensor],
    config: ModelConfig,
    trained_steps: int,
    source: ModelSource,
) -> None:
    """Write trainable weights as safetensors, atomically, with what is needed to use them.

    Args:
        path: file to write.
        weights: trainable parameters by their name in the LM.
        config: how the model was built.
        trained_steps: clip length of the training, in steps.
        source: opened `config.source`, whose base they belong to.

    Raises:
        UserError: some are not finite; what the file held stays.
    """
    _check_finite(weights, f"{path} is not written over")
    metadata = {
        "format": "moshi-ttt 1",
        "config": json.dumps(dataclasses.asdict(config)),
        "trained_steps": str(trained_steps),
        "base": source.base_fingerprint,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_bytes(path, _ordered(save(tensors, metadata)))


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header in a fixed order: equal weights are equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


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
        UserError: no such file, not one of ours, or its base has changed since.
    """
    weights, metadata = _read(path, device)
    with settings_at(f"{path}: model"):
        config = _config_from_dict(json.loads(metadata["config"]))
        source = open_source(config.source)
        _check_base(path, metadata, config, source)
        lm = build_lm(config, source, device)
    expected = {name for group in trainable_groups(lm).values() for name in group}
    if expected != weights.keys():
        raise UserError(f"{path} does not fit its own config; it was written by another version")
    lm.load_state_dict(weights, strict=False)
    return lm.eval(), source, config, int(metadata["trained_steps"])


def check_start(name: str, source: ModelSource) -> None:
    """Hold the weights that a run is to start from against its base, before anything is loaded.

    Args:
        name: `tiny` for the memory that is bundled with that model, or a file that `save_trained`
            wrote, or the Lightning checkpoint beside it.
        source: where the base of the run comes from.

    Raises:
        UserError: not such a file, or one of another base.
    """
    path = _start_file(name)
    try:
        _, metadata = _read(path, "cpu")
        _check_base(path, metadata, _config_from_dict(json.loads(metadata["config"])), source)
    except UserError as error:
        raise SettingError(
            "init_from", f"={name}: {error}; `tiny` is the bundled memory, null starts without any"
        ) from error


def start_from(lm: LMModel, name: str) -> None:
    """Put the trained weights of another run in place of those that a new one starts with.

    The file may hold a part of what trains now, such as the memory of a run that adds LoRA to it.

    Args:
        lm: built for the new run.
        name: what `check_start` found to be of its base.

    Raises:
        UserError: weights that do not fit.
    """
    weights, _ = _read(_start_file(name), lm.device)
    mine = {name: p for group in trainable_groups(lm).values() for name, p in group.items()}
    for weight, tensor in weights.items():
        if weight not in mine or mine[weight].shape != tensor.shape:
            has = "nothing of that name trains"
            if weight in mine:
                has = f"it is {list(mine[weight].shape)}"
            raise SettingError(
                "init_from",
                f"={name}: {weight} is {list(tensor.shape)} there, and {has} here; set model.train "
                "and model.memory as they were in that run, or init_from=null to start without it",
            )
    lm.load_state_dict(weights, strict=False)


def _start_file(name: str) -> Path:
    return ASSETS / TINY / "memory.safetensors" if name == TINY else Path(name)


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of one of our files."""
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
    _check_finite(weights, f"{path} cannot be used; take an earlier checkpoint")
    return weights, metadata


def _check_finite(weights: dict[str, Tensor], consequence: str) -> None:
    """Raise a `UserError` that names the first weight with a NaN or an infinity in it."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite; {consequence}")


def _check_base(
    path: Path, metadata: dict[str, str], config: ModelConfig, source: ModelSource
) -> None:
    """Weights mean something on their own base only; where that base trained, they are the base."""
    if config.train in TRAIN_BASE:
        return
    known = metadata.get("base")  # the first files did not say
    if known is not None and known != source.base_fingerprint:
        raise UserError(
            f"{path} was trained on the base {config.source} ({known[:12]}), and {source.name} is "
            f"another one ({source.base_fingerprint[:12]}); use the base it was trained on"
        )


def _config_from_dict(values: dict[str, Any]) -> ModelConfig:
    def tuples(part: dict[str, Any]) -> dict[str, Any]:
        # JSON has no tuples, and the configs have no other sequences
        return {key: tuple(v) if isinstance(v, list) else v for key, v in part.items()}

    with settings_at("memory"):
        memory = MemoryConfig(**tuples(values.pop("memory")))
    with settings_at("lora"):
        lora = LoraConfig(**tuples(values.pop("lora")))
    return ModelConfig(**values, memory=memory, lora=lora)
