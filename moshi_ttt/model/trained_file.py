"""A file of trained weights: what it says of itself, checked before anything is built on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor

from moshi_ttt.errors import UserError, settings_at
from moshi_ttt.model.build import ModelConfig
from moshi_ttt.model.inspection import Header, check_finite, read_header

FORMAT = "moshi-ttt 1"
Config = TypeVar("Config")


@dataclass(frozen=True)
class TrainedFile:
    """What `save_trained` wrote, but for the weights, which are read when asked for."""

    path: Path
    config: ModelConfig
    """How the model was built."""
    trained_steps: int
    """Clip length of the training."""
    base: str | None
    """Fingerprint of the base; the first files did not say."""
    header: Header
    """Shapes and types of the weights by their name in the LM."""

    def weights(self, device: torch.device | str) -> dict[str, Tensor]:
        """All of them, on a device.

        Raises:
            UserError: some are not finite.
        """
        with safe_open(self.path, "pt", device=str(device)) as file:
            weights = {name: file.get_tensor(name) for name in self.header}
        check_finite(weights.items(), f"{self.path} cannot be used; take an earlier checkpoint")
        return weights


def read_trained(path: Path) -> TrainedFile:
    """Read the header of such a file.

    Args:
        path: the `.safetensors` file, or the Lightning checkpoint it lies beside.

    Raises:
        UserError: no such file, not one of ours, or of another version.
    """
    path = path.with_suffix(".safetensors")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give RUN/checkpoints/last.ckpt or the .safetensors beside it"
        )
    header = read_header(path)
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    found = metadata.get("format", "")
    if found != FORMAT and found.startswith("moshi-ttt "):
        raise UserError(
            f"{path} is of format {found!r}, and this version of moshi-ttt reads {FORMAT!r}; use "
            "the version that wrote it"
        )
    if found != FORMAT:
        raise UserError(f"{path} holds no moshi-ttt weights; give a file of RUN/checkpoints")
    try:
        values, steps = json.loads(metadata["config"]), int(metadata["trained_steps"])
        if steps < 1:
            raise ValueError(f"trained_steps={steps}")
        with settings_at(f"{path}: model"):
            config = typed(ModelConfig, values)
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} says of itself what no version writes ({type(error).__name__}: {error}); it "
            "was altered: take another copy"
        ) from error
    return TrainedFile(path, config, steps, metadata.get("base"), header)


def typed(kind: type[Config], values: Any) -> Config:
    """A config of what JSON keeps of it, every value of the type that its field has.

    Raises:
        TypeError: fields that it does not have, or values of other types.
        UserError: of the config itself.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is no {kind.__name__}")
    hints, given = get_type_hints(kind), {}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(hint, type) and is_dataclass(hint):
            with settings_at(name):
                given[name] = typed(hint, value)
            continue
        if isinstance(value, list) and get_origin(hint) is tuple:
            value = tuple(value)  # which JSON does not have
        if not _is(value, hint):
            raise TypeError(f"{name}={value!r}")
        given[name] = value
    return kind(**given)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, among those that fields of configs have."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(hints) and all(map(_is, value, hints))
    if hint in (int, float):
        return type(value) in (int, hint)
    return hint in (str, bool, NoneType) and isinstance(value, hint)


def difference(
    theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], *, whole: bool = True
) -> str | None:
    """The first weight by which two models differ, in words; None if there is none.

    Args:
        theirs: by name, of a file.
        mine: of the model that they are for.
        whole: whether all of `mine` must be there.
    """
    for name, tensor in theirs.items():
        there = f"{name} is {_described(tensor)} there"
        if name not in mine:
            return f"{there}, and nothing of that name trains here"
        # float64, of a training in 64-true, holds every float32, and that every float16 of a bundle
        types = (mine[name].dtype, torch.float64, torch.float16)
        if tensor.shape != mine[name].shape or tensor.dtype not in types:
            return f"{there}, and it is {_described(mine[name])} here"
    for name, tensor in mine.items():
        if whole and name not in theirs:
            return f"{name}, which is {_described(tensor)} here, is missing there"
    return None


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
