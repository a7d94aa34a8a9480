"""Where a model comes from: hub id, local folder, the bundled `tiny`, or `moshi7b-random`.

All of them end in moshi's own loaders; the bundled model takes the same path as the real one.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.clock import Clock
from moshi_ttt.compiling import compile_on_gpu_only
from moshi_ttt.errors import SettingError, UserError
from moshi_ttt.model.attention import parallel_attention
from moshi_ttt.model.gating import fuse_gating
from moshi_ttt.model.hub import downloaded, hub_info
from moshi_ttt.model.inspection import (
    check_config,
    check_finite,
    check_tokenizer,
    check_weights,
    read_config,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TINY = "tiny"
TINY_CLIP_SEC = 20.0
"""What the bundled model was trained on."""
RANDOM_7B = "moshi7b-random"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # training moves every weight: a few blocks tell it


class ModelSource:
    """LM, codec and text tokenizer of one checkpoint; each is loaded when asked for.

    Args:
        name: what the user called it.
        info: moshi's paths and configs.
        random_lm: build the LM with random weights instead of reading them (mechanics and
            benchmarks only: it knows nothing).
    """

    def __init__(self, name: str, info: loaders.CheckpointInfo, random_lm: bool = False) -> None:
        self.name = name
        self.random_lm = random_lm
        self._info = info
        self._lm_config: dict[str, Any] = dict(info.lm_config or loaders._lm_kwargs)

    @property
    def n_q(self) -> int:
        """Audio codebooks the LM reads: Moshi's own and the user's."""
        return int(self._lm_config["n_q"])

    @property
    def dep_q(self) -> int:
        """Audio codebooks the depformer predicts: Moshi's own."""
        return int(self._lm_config["dep_q"])

    @property
    def card(self) -> int:
        """Entries of an audio codebook; a code is below it."""
        return int(self._lm_config["card"])

    @property
    def text_card(self) -> int:
        """Text vocabulary; a text token is below it."""
        return int(self._lm_config["text_card"])

    @property
    def text_padding_id(self) -> int:
        """Text token between words."""
        return int(self._lm_config.get("existing_text_padding_id", 3))

    @property
    def end_of_text_padding_id(self) -> int:
        """Text token of the last padding step before a word."""
        return int(self._lm_config.get("existing_text_end_padding_id", 0))

    @property
    def dim(self) -> int:
        """Channels of the temporal transformer."""
        return int(self._lm_config["dim"])

    @property
    def num_layers(self) -> int:
        """Layers of the temporal transformer."""
        return int(self._lm_config["num_layers"])

    @property
    def num_heads(self) -> int:
        """Attention heads of the temporal transformer."""
        return int(self._lm_config["num_heads"])

    @property
    def clock(self) -> Clock:
        """Time units of the codec."""
        config: dict[str, Any] = self._info.mimi_config or loaders._mimi_config
        return Clock(config["sample_rate"], round(config["sample_rate"] / config["frame_rate"]))

    @property
    def trained_steps(self) -> int | None:
        """Clip length of its training in steps; None: unknown, as of all but the bundled one."""
        bundled = not self.random_lm and self._info.moshi_weights.parent == ASSETS / TINY
        return self.clock.steps(TINY_CLIP_SEC) if bundled else None

    def lm(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        context_steps: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> LMModel:
        """The language model, in eval mode.

        Args:
            device: where to put it; `meta` gives its shapes alone, and reads nothing.
            dtype: of all its weights.
            context_steps: attention window and ring capacity of the temporal transformer;
                None keeps the checkpoint's. The depformer is not touched.
            gradient_checkpointing: recompute each layer in the backward pass.
        """
        compile_on_gpu_only()
        overrides: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing}
        if context_steps is not None:
            overrides["context"] = context_steps
        with torch.random.fork_rng():
            if self.random_lm or torch.device(device).type == "meta":
                torch.manual_seed(0)
                lm = loaders.get_moshi_lm(
                    None, self._lm_config, device, dtype, lm_kwargs_overrides=overrides
                )
            else:
                lm = self._info.get_moshi(device=device, dtype=dtype, lm_kwargs_overrides=overrides)
                self._check_finite(lm, self._info.moshi_weights)
        parallel_attention(lm)
        fuse_gating(lm)
        return lm

    def codec(self, device: torch.device | str = "cpu") -> MimiModel:
        """The codec, in eval mode, without gradients."""
        compile_on_gpu_only()
        # moshi draws random weights before it loads the real ones: nobody's random numbers may
        # depend on whether something was loaded
        with torch.random.fork_rng():
            codec = self._info.get_mimi(device=device).requires_grad_(False)
        self._check_finite(codec, self._info.mimi_weights)
        # what it encodes to the last digit must stay as it was; nobody hears a digit
        assert codec.decoder_transformer is not None, "every Mimi has one"
        parallel_attention(codec.decoder_transformer)
        return codec

    @staticmethod
    def _check_finite(model: nn.Module, path: Path) -> None:
        check_finite(model.state_dict().items(), f"{path} is damaged; copy or download it again")

    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        """The text tokenizer."""
        return self._info.get_text_tokenizer()

    @cached_property
    def codec_fingerprint(self) -> str:
        """Hash of the codec's weights and config: equal fingerprints encode equally."""
        config = json.dumps(self._info.mimi_config or loaders._mimi_config, sort_keys=True)
        digest = hashlib.sha256(config.encode())
        with self._info.mimi_weights.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def base_fingerprint(self) -> str:
        """Tells bases apart whose weights differ; reads a sample of a large file."""
        digest = hashlib.sha256(json.dumps(self._lm_config, sort_keys=True, default=str).encode())
        if not self.random_lm:
            path = self._info.moshi_weights
            size = path.stat().st_size
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer and the padding ids: equal fingerprints give equal text rows."""
        digest = hashlib.sha256(self._info.tokenizer.read_bytes())
        digest.update(json.dumps([self.text_padding_id, self.end_of_text_padding_id]).encode())
        return digest.hexdigest()


def open_source(name: str, *, fetch: bool = True) -> ModelSource:
    """Find a model by name; reads configs, not weights.

    Args:
        name: `tiny` (bundled), `moshi7b-random` (Moshi 7B's architecture with random weights,
            and the tiny bundle's codec and tokenizer), a folder in moshi's checkpoint layout
            (never touches the network), or a hub id such as `kyutai/moshiko-pytorch-bf16`.
        fetch: download what a hub id names; False takes what was downloaded before.

    Raises:
        UserError: nothing by that name, or a file of it is missing or unusable.
    """
    if name == TINY:
        return ModelSource(name, _folder_info(ASSETS / "tiny"))
    if name == RANDOM_7B:
        info = _folder_info(ASSETS / "tiny")
        info.lm_config = dict(loaders._lm_kwargs)
        return ModelSource(name, info, random_lm=True)
    if Path(name).is_dir():
        return ModelSource(name, _folder_info(Path(name)))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SettingError(
            "source",
            f"={name!r} is neither `tiny`, `moshi7b-random`, an existing folder nor a hub id "
            "(owner/name); check the spelling or give the path of a downloaded model",
        )
    if not fetch:
        return ModelSource(name, _folder_info(downloaded(name)))
    try:
        return ModelSource(name, _checked(hub_info(name), name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingError(
            "source",
            f"={name!r} could not be fetched from the hub ({error}); check the id and the "
            "network, or give a local folder with the same files",
        ) from error


def _folder_info(folder: Path) -> loaders.CheckpointInfo:
    """Moshi's checkpoint info of a folder, every file checked, no network."""
    config_path = folder / "config.json"
    names: dict[str, Any] = {}
    if config_path.exists():  # the first released Moshi had none
        names = read_config(config_path)
        check_config(names, config_path)

    def local(key: str, default: str | None = None) -> Path:
        value = names.get(key, default)
        path = folder / str(value).removeprefix("file://")
        if not path.is_file():
            raise UserError(
                f"{path} is missing ({key} of {config_path.name}, value {value!r}); a local model "
                "folder must hold every file it names: copy it there and name it relative to the "
                "folder"
            )
        return path

    moshi_weights = local("moshi_name", loaders.MOSHI_NAME)
    mimi_weights = local("mimi_name", loaders.MIMI_NAME)
    tokenizer = local("tokenizer_name", loaders.TEXT_TOKENIZER_NAME)
    if not names:
        return _checked(loaders.CheckpointInfo(moshi_weights, mimi_weights, tokenizer), str(folder))
    mimi_config_path = local("mimi_config_name") if "mimi_config_name" in names else None
    if mimi_config_path is not None:
        read_config(mimi_config_path)
    info = loaders.CheckpointInfo.from_hf_repo(
        "local/none",
        config_path=config_path,
        moshi_weights=moshi_weights,
        mimi_weights=mimi_weights,
        tokenizer=tokenizer,
        mimi_config_path=mimi_config_path,
        lora_weights=local("lora_name") if "lora_name" in names else None,
    )
    return _checked(info, str(config_path))


def _checked(info: loaders.CheckpointInfo, place: str) -> loaders.CheckpointInfo:
    """The same, once its weights and its tokenizer have been held against its configs."""
    check_weights(info, place)
    check_tokenizer(info, place)
    return info
