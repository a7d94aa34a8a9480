"""Trained weights as safetensors, with what is needed to use them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from moshi.models.lm import LMModel
from safetensors.torch import save
from torch import Tensor

from moshi_ttt.errors import SettingError, UserError, settings_at
from moshi_ttt.files import write_bytes
from moshi_ttt.model.build import TRAIN_BASE, ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.inspection import check_finite
from moshi_ttt.model.source import ASSETS, TINY, ModelSource, open_source
from moshi_ttt.model.trained_file import FORMAT, TrainedFile, difference, read_trained


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
    check_finite(weights.items(), f"{path} is not written over")
    metadata = {
        "format": FORMAT,
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
    path: Path,
    device: torch.device | str = "cpu",
    base: str | None = None,
    context_steps: int | None = None,
) -> tuple[LMModel, ModelSource, ModelConfig, int]:
    """Build the model of a file that `save_trained` wrote, and load its weights.

    Args:
        path: the `.safetensors` file, or the Lightning checkpoint it lies beside.
        device: where to put the model.
        base: where its base lies now, as `open_source` has it; None: where it lay, but nothing is
            fetched from the hub because a file says so.
        context_steps: ring capacity C to look at it with; None: the one it was trained with.

    Returns:
        LM in eval mode, its source, its config as it was trained, and the clip length it was
        trained on in steps.

    Raises:
        UserError: no such file, not one of ours, or its base has changed since or is not here.
    """
    file = read_trained(path)
    source = _base_of(file, base)
    _check_base(file, source)
    config = file.config
    if context_steps is not None:
        with settings_at("", context_steps="--context_steps"):
            config = dataclasses.replace(config, context_steps=context_steps)
    with settings_at(f"{file.path}: model"):
        shapes = trainable_weights(build_lm(config, source, "meta"))
        if problem := difference(file.header, shapes):
            raise UserError(
                f"{file.path} does not fit its own config: {problem}; it was altered, or written "
                "by another version"
            )
        lm = build_lm(config, source, device)
    lm.load_state_dict(file.weights(device), strict=False)
    return lm.eval(), source, file.config, file.trained_steps


def _base_of(file: TrainedFile, base: str | None) -> ModelSource:
    """The base of trained weights, which must lie on this machine unless it is given."""
    if base is not None:
        with settings_at("", source="--base"):
            return open_source(base)
    name = file.config.source
    try:
        return open_source(name, fetch=False)
    except UserError as error:
        raise UserError(
            f"{file.path} was trained on {name!r}, which cannot be used here ({error}); give "
            "--base FOLDER if it lies elsewhere, or --base OWNER/NAME to fetch it from the hub"
        ) from error


def check_start(name: str, config: ModelConfig, source: ModelSource) -> None:
    """Hold the weights that a run is to start from against its model, before that is loaded.

    The file may hold a part of what trains now, such as the memory of a run that adds LoRA to it.

    Args:
        name: `tiny` for the memory that is bundled with that model, or a file that `save_trained`
            wrote, or the Lightning checkpoint beside it.
        config: of the run.
        source: where the base of the run comes from.

    Raises:
        UserError: not such a file, one of another base, or of other shapes.
    """
    try:
        file = read_trained(_start_file(name))
        file.weights("cpu")
        _check_base(file, source)
    except UserError as error:
        raise SettingError(
            "init_from", f"={name}: {error}; `tiny` is the bundled memory, null starts without any"
        ) from error
    shapes = trainable_weights(build_lm(config, source, "meta"))
    if problem := difference(file.header, shapes, whole=False):
        raise SettingError(
            "init_from",
            f"={name}: {problem}; set model.train and model.memory as they were in that run, or "
            "init_from=null to start without it",
        )


def start_from(lm: LMModel, name: str) -> None:
    """Put the trained weights of another run in place of those that a new one starts with.

    Args:
        lm: built for the new run.
        name: what `check_start` found to fit it.
    """
    lm.load_state_dict(read_trained(_start_file(name)).weights(lm.device), strict=False)


def trained_steps_of(name: str) -> int:
    """Clip length, in steps, that weights were trained on, which `check_start` found to fit."""
    return read_trained(_start_file(name)).trained_steps


def _start_file(name: str) -> Path:
    return ASSETS / TINY / "memory.safetensors" if name == TINY else Path(name)


def trainable_weights(lm: LMModel) -> dict[str, Tensor]:
    """All that trains, by name: what `save_trained` writes of a model."""
    return {name: p for group in trainable_groups(lm).values() for name, p in group.items()}


def _check_base(file: TrainedFile, source: ModelSource) -> None:
    """Weights mean something on their own base only; where that base trained, they are the base."""
    known = file.base
    if file.config.train in TRAIN_BASE or known is None or known == source.base_fingerprint:
        return
    raise UserError(
        f"{file.path} was trained on the base {file.config.source} ({known[:12]}), and "
        f"{source.name} is another one ({source.base_fingerprint[:12]}); use the base it was "
        "trained on"
    )
