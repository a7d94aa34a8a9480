"""Models on the Hugging Face hub, and what was fetched of them before."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from moshi.models import loaders

from moshi_ttt.errors import SettingError
from moshi_ttt.model.inspection import check_config, read_config


def hub_info(name: str) -> loaders.CheckpointInfo:
    """Moshi's checkpoint info of a hub id; what cannot be used is refused before it is fetched."""
    config_path: Path | None = None
    try:
        path = config_path = Path(loaders.hf_hub_download(name, "config.json"))
        check_config(read_config(path), path, hub=True)
    except EntryNotFoundError as error:  # the first released Moshi had none
        if isinstance(error, LocalEntryNotFoundError):
            raise
    return loaders.CheckpointInfo.from_hf_repo(name, config_path=config_path)


def downloaded(name: str) -> Path:
    """The folder that holds what was fetched of a hub id before."""
    try:
        found = [try_to_load_from_cache(name, one) for one in ("config.json", loaders.MOSHI_NAME)]
    except HFValidationError:
        found = []
    paths = [Path(one) for one in found if isinstance(one, str)]
    if not paths:
        raise SettingError("source", f"={name!r} is no folder, and was never fetched from the hub")
    return paths[0].parent
