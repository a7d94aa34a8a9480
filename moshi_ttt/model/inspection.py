"""What a model's files are held against before any is loaded: configs, and headers of weights.

A header tells names, shapes and types of 15 GB of weights in milliseconds, and a model on the meta
device has shapes and no data; moshi's own loaders build it, so that there is no second list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from moshi.models import loaders
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moshi_ttt.errors import UserError

FILE_KEYS = ("moshi_name", "mimi_name", "tokenizer_name", "mimi_config_name", "lora_name")
_LARGEST_CONFIG_BYTES = 1 << 20
_LFS_POINTER = b"version https://git-lfs"
_HEADER_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_LARGEST = 1e6
"""Of any number in a config: far above every model's, far below what hangs or fills a memory."""
LONGEST_CONTEXT_STEPS = 100_000  # 2.2 h; a ring has a slot for each
_COUNTS = {  # what is built one by one
    **{"num_layers": 256, "depformer_num_layers": 256, "n_q": 128, "dep_q": 64},
    **{"n_residual_layers": 64, "extra_heads_num_heads": 64, "delays": 1000},
    "context": LONGEST_CONTEXT_STEPS,
}
_NEEDED = ("dim", "num_layers", "num_heads", "n_q", "dep_q", "card", "text_card", "context")
# keys of relatives of Moshi whose inputs or outputs this project does not have
_FOREIGN = {
    "quantize": "its weights are quantized, which do not train; take the bf16 checkpoint",
    "conditioners": "it wants conditions beside the conversation; take a Moshi without them",
    "cross_attention": "it attends to conditions; take a Moshi without them",
    "demux_second_stream": "it has a second stream of text; take a Moshi with one",
    "demux_second_text_stream": "it has a second stream of text; take a Moshi with one",
    "extra_heads_num_heads": "it has further output heads; take a Moshi without them",
}


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a config.

    Raises:
        UserError: it cannot be read, or is none, or holds a number that no model has.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise UserError(f"{path} is larger than 1 MiB, which no config is; restore it")
        config = json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({error}); restore it") from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} holds a {type(config).__name__} where a config is a JSON object; restore it"
        )
    _check_numbers(config, path)
    return config


def _check_numbers(part: Any, path: Path, key: str = "") -> None:
    if isinstance(part, dict):
        for name, value in part.items():
            _check_numbers(value, path, name)
    elif isinstance(part, list):
        for value in part:
            _check_numbers(value, path, key)
    elif isinstance(part, int | float):
        most = _COUNTS.get(key, _LARGEST)
        if not -most <= part <= most:
            raise UserError(f"{path}: {key}={part:g} must be at most {most:g}; restore the file")


def check_config(config: dict[str, Any], path: Path, *, hub: bool = False) -> None:
    """Hold a checkpoint's config.json against what this project can train.

    Args:
        config: what `read_config` read.
        path: from where, for the messages.
        hub: it may name files of other repositories, as `hf://owner/name/file`.

    Raises:
        UserError: another kind of model, keys that are missing, or names that leave the folder.
    """
    for key in FILE_KEYS:
        if key in config:
            _check_name(config[key], key, path, hub)
    kind = config.get("model_type", "moshi")
    if kind != "moshi":
        raise UserError(
            f"{path}: model_type={kind!r} is no Moshi, and nothing else is trained here; take a "
            "checkpoint such as kyutai/moshiko-pytorch-bf16"
        )
    for key, reason in _FOREIGN.items():
        if config.get(key):
            raise UserError(f"{path}: the model has {key}, so {reason}")
    if config.get("lora") and not config.get("lora_name"):
        raise UserError(
            f"{path} says lora=true but names no lora weights, so moshi would add random ones; "
            "remove the key (merged checkpoint) or add lora_name"
        )
    for key in _NEEDED:
        value = config.get(key)
        if type(value) is not int or value < 1:
            got = f"is {value!r}" if key in config else "is missing"
            raise UserError(f"{path}: {key} {got}; it must be a whole number above 0; restore it")
    if config["dim"] % (2 * config["num_heads"]):
        raise UserError(
            f"{path}: num_heads={config['num_heads']} must divide dim={config['dim']} into an even "
            "number of channels; restore it"
        )
    own, read = config["dep_q"], config["n_q"]
    if read != 2 * own:
        raise UserError(
            f"{path}: n_q={read} and dep_q={own}, where a Moshi reads as many codebooks of the "
            f"user as it speaks itself (n_q = 2 dep_q, as 16 and 8); take a checkpoint of Moshi"
        )
    for key in ("existing_text_padding_id", "existing_text_end_padding_id"):
        value = config.get(key, 0)
        if type(value) is not int or not 0 <= value < config["text_card"]:
            raise UserError(
                f"{path}: {key}={value!r} is no text token; it must be in "
                f"0..{config['text_card'] - 1}"
            )


def _check_name(value: Any, key: str, path: Path, hub: bool) -> None:
    if hub and isinstance(value, str) and value.startswith("hf://"):
        return
    name = PurePosixPath(str(value).removeprefix("file://"))
    stays = not name.is_absolute() and ".." not in name.parts and "://" not in str(value)
    if not (isinstance(value, str) and stays and name.parts):
        raise UserError(
            f"{path}: {key}={value!r} must name a file inside the model's folder; copy or link it "
            "there, and name it relative to the folder"
        )


Header = dict[str, Tensor]
"""Tensors of a file by name, on the meta device: shape and type, no data."""


def read_header(path: Path) -> Header:
    """Names, shapes and types of a safetensors file, and whether all of it is there.

    Raises:
        UserError: it is something else, or a part of one.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights must be .safetensors; pickles are not read")
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        if pointer:
            raise UserError(
                f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: one.get_dtype() for name, one in slices.items()}
            return {
                name: torch.empty(
                    one.get_shape(),
                    dtype=_HEADER_TYPES.get(types[name], torch.uint8),
                    device="meta",
                )
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


class _Undrawn(TorchFunctionMode):
    """Builds modules without drawing random weights, which takes seconds even without data."""

    _DRAWING = frozenset({"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        drawing = getattr(func, "__name__", "") in self._DRAWING
        if drawing or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_weights(info: loaders.CheckpointInfo, place: str) -> None:
    """Hold the headers of a checkpoint's weights against the models of its configs.

    Args:
        info: every file there.
        place: the config, for the messages.

    Raises:
        UserError: the configs describe no model, or another one than the weights.
    """
    lm_header, codec_header = read_header(info.moshi_weights), read_header(info.mimi_weights)
    config = dict(info.lm_config or loaders._lm_kwargs)
    for name, tensor in lm_header.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{info.moshi_weights}: {name} is no float16, bfloat16, float32 or float64; "
                "quantized weights do not train: take the bf16 checkpoint"
            )
    adapters = {} if info.lora_weights is None else read_header(info.lora_weights)
    lm = _built(place, lambda: loaders.get_moshi_lm(None, config, "meta", torch.float32))
    _check_fits(lm, lm_header | adapters, info.moshi_weights, place)
    codec_config = info.mimi_config or loaders._mimi_config
    codebooks = max(config["dep_q"], config["n_q"] - config["dep_q"])
    codec = _built(
        "the codec's config",
        lambda: loaders.get_mimi(None, codec_config, "meta", num_codebooks=codebooks),
    )
    _check_fits(codec, codec_header, info.mimi_weights, "the codec's config")
    if codec.cardinality > config["card"]:
        raise UserError(
            f"{place}: card={config['card']}, and the codec has {codec.cardinality} entries a "
            "codebook; take both of one checkpoint"
        )


def _built(place: str, build: Any) -> Any:
    """A model on the meta device."""
    try:
        with torch.device("meta"), _Undrawn():
            return build()
    # moshi asserts, divides and looks up, whatever it is given
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{place} describes no model that moshi builds ({reason}); restore it"
        ) from error


def _check_fits(model: nn.Module, header: Header, path: Path, place: str) -> None:
    remedy = "take weights and config of one checkpoint"
    try:
        keys = model.load_state_dict(header, strict=False, assign=True)
    except RuntimeError as error:
        found = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = found[0] if found else str(error).splitlines()[0]
        raise UserError(f"{path} does not fit {place}: {reason}; {remedy}") from error
    for problem, names in (("lacks", keys.missing_keys), ("has too many", keys.unexpected_keys)):
        if names:
            raise UserError(
                f"{path} {problem} weights for {place} ({len(names)}, e.g. {names[0]}); {remedy}"
            )


def check_tokenizer(info: loaders.CheckpointInfo, place: str) -> None:
    """Hold the tokenizer against the model's text tokens, of the configs in `place`.

    Raises:
        UserError: it cannot be read, or knows more tokens than the model.
    """
    try:
        words = info.get_text_tokenizer().vocab_size()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{info.tokenizer} is no sentencepiece model; copy or download it again"
        ) from error
    text_card = int((info.lm_config or dict[str, Any](loaders._lm_kwargs))["text_card"])
    if words > text_card:
        raise UserError(
            f"{info.tokenizer} has {words} tokens, and {place} text_card={text_card}; take both of "
            "one checkpoint"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], consequence: str) -> None:
    """Look at every weight where it lies; the device is waited for once.

    Raises:
        UserError: naming the first one with a NaN or an infinity in it.
    """
    named = [(name, one) for name, one in tensors if one.is_floating_point() and one.numel()]
    if not named:
        return
    finite = torch.stack([one.detach().isfinite().all() for _, one in named]).tolist()
    if not all(finite):
        raise UserError(f"{named[finite.index(False)][0]} is not finite; {consequence}")
