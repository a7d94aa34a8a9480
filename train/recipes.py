"""Recipes: configs that hold only what differs from the recipe that they name as their `base`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from moshi_ttt.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load_recipe(text: str, path: Any = "") -> Any:
    """YAML, upon its base if it names one.

    Args:
        text: of a config; or of any value on the command line, which stays as it is.
        path: file of the config, beside which its base is looked for before `configs/`.

    Raises:
        UserError: there is no such base.
    """
    value = get_loader("yaml")(text)
    if not isinstance(value, dict) or "base" not in value:
        return value
    name = value.pop("base")
    for folder in (Path(str(path)).absolute().parent, CONFIGS):
        file = folder / str(name)
        if file.is_file():
            return upon(load_recipe(file.read_text(encoding="utf-8"), file), value)
    raise UserError(f"base={name} of {path or 'a config'} is neither beside it nor in {CONFIGS}")


def upon(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base`, with what `own` has instead; sections are merged, anything else is replaced."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = upon(merged[key], value) if both else value
    return merged


# a mode of jsonargparse's parser; values come out as in its own "yaml"
set_loader("recipe", load_recipe, exceptions=(yaml.YAMLError,))


def resolve_configs(args: list[str]) -> list[str]:
    """Let `--config NAME` mean `configs/NAME` where there is no such file here."""
    resolved = list(args)
    for index, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        position = index if value else index + 1
        name = value or (args[position] if position < len(args) else "")
        if name and not Path(name).exists() and (CONFIGS / name).is_file():
            resolved[position] = f"{flag}={CONFIGS / name}" if value else str(CONFIGS / name)
    return resolved
